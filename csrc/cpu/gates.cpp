// What a recorded forward keeps to be replayed: a ReLU's gates, one bit per element (1/32 of a float32 activation), and
// a max-pool's choices, 32 bits per output. The replay of either is a linear map, and so is its backward.
#include "simd.h"

namespace fastfisher::FASTFISHER_SIMD {
namespace {
constexpr int64_t kBits = 32;
}

void gate_pack(Type type, const void* x, int64_t numel, uint32_t* bits, int64_t begin, int64_t end) {
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    const auto* source = static_cast<const typename T::Storage*>(x);
    for (int64_t word = begin; word < end; ++word) {
      const auto* element = source + word * kBits;
      uint32_t packed = 0;
      if ((word + 1) * kBits <= numel) {
#pragma omp simd reduction(| : packed)
        for (int k = 0; k < kBits; ++k) packed |= static_cast<uint32_t>(T::load(element[k]) > 0) << k;
      } else {
        for (int k = 0; k < numel - word * kBits; ++k) packed |= static_cast<uint32_t>(T::load(element[k]) > 0) << k;
      }
      bits[word] = packed;
    }
  });
}

void gate_apply(Type type, const void* x, int64_t numel, const uint32_t* bits, void* out, int64_t begin, int64_t end) {
  dispatch(type, [&](auto tag) {
    using Storage = typename decltype(tag)::Storage;
    const auto* source = static_cast<const Storage*>(x);
    auto* target = static_cast<Storage*>(out);
    for (int64_t word = begin; word < end; ++word) {
      const uint32_t packed = bits[word];
      const int64_t first = word * kBits;
      if (first + kBits <= numel) {
#pragma omp simd
        for (int k = 0; k < kBits; ++k) target[first + k] = (packed >> k) & 1u ? source[first + k] : Storage(0);
      } else {
        for (int k = 0; k < numel - first; ++k) target[first + k] = (packed >> k) & 1u ? source[first + k] : Storage(0);
      }
    }
  });
}

void gate_take(Type type, const void* x, int64_t elements, const int32_t* indices, int64_t outputs, void* out,
               int64_t begin, int64_t end) {
  dispatch(type, [&](auto tag) {
    using Storage = typename decltype(tag)::Storage;
    for (int64_t plane = begin; plane < end; ++plane) {
      const auto* source = static_cast<const Storage*>(x) + plane * elements;
      const auto* index = indices + plane * outputs;
      auto* target = static_cast<Storage*>(out) + plane * outputs;
      for (int64_t k = 0; k < outputs; ++k) target[k] = source[index[k]];
    }
  });
}

void gate_put(Type type, const void* y, int64_t outputs, const int32_t* indices, int64_t elements, void* out,
              int64_t begin, int64_t end) {
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    using Storage = typename T::Storage;
    for (int64_t plane = begin; plane < end; ++plane) {
      const auto* source = static_cast<const Storage*>(y) + plane * outputs;
      const auto* index = indices + plane * outputs;
      auto* target = static_cast<Storage*>(out) + plane * elements;
      for (int64_t j = 0; j < elements; ++j) target[j] = Storage(0);
      for (int64_t k = 0; k < outputs; ++k) target[index[k]] = T::store(T::load(target[index[k]]) + T::load(source[k]));
    }
  });
}

}  // namespace fastfisher::FASTFISHER_SIMD

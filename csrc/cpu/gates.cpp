// The gates of a ReLU, one bit per element: a forward that is to be replayed keeps 1/32 of the activation.
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
        for (int k = 0; k < numel - word * kBits; ++k)
          packed |= static_cast<uint32_t>(T::load(element[k]) > 0) << k;
      }
      bits[word] = packed;
    }
  });
}

void gate_apply(Type type, const void* x, int64_t numel, const uint32_t* bits, void* out, int64_t begin,
                int64_t end) {
  dispatch(type, [&](auto tag) {
    using Storage = typename decltype(tag)::Storage;
    const auto* source = static_cast<const Storage*>(x);
    auto* target = static_cast<Storage*>(out);
    for (int64_t word = begin; word < end; ++word) {
      const uint32_t packed = bits[word];
      const int64_t first = word * kBits;
      if (first + kBits <= numel) {
#pragma omp simd
        for (int k = 0; k < kBits; ++k)
          target[first + k] = (packed >> k) & 1u ? source[first + k] : Storage(0);
      } else {
        for (int k = 0; k < numel - first; ++k)
          target[first + k] = (packed >> k) & 1u ? source[first + k] : Storage(0);
      }
    }
  });
}

}  // namespace fastfisher::FASTFISHER_SIMD

// What finite differences do to whole sets of gradients: the combine and the norm. Both are bound by memory.
#include "simd.h"

namespace fastfisher::FASTFISHER_SIMD {
namespace {
constexpr int64_t kLanes = 16;
}

double axpy_diff(Type type, void* out, const void* a, const void* b, double scale, int64_t begin, int64_t end) {
  if (scale == 0) return 0;  // nothing is read, so that a NaN in it does not come through
  return dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    using Storage = typename T::Storage;
    using Compute = typename T::Compute;
    auto* target = static_cast<Storage*>(out);
    const auto* minuend = static_cast<const Storage*>(a);
    const auto* subtrahend = static_cast<const Storage*>(b);
    const Compute factor = static_cast<Compute>(scale);
    double lanes[kLanes] = {};
    const auto step = [&](int64_t j, int64_t lane) {
      const Compute difference = T::load(minuend[j]) - T::load(subtrahend[j]);
      target[j] = T::store(T::load(target[j]) + factor * difference);
      lanes[lane] += static_cast<double>(difference) * static_cast<double>(difference);
    };
    int64_t j = begin;
    for (; j + kLanes <= end; j += kLanes) {
#pragma omp simd
      for (int64_t k = 0; k < kLanes; ++k) step(j + k, k);
    }
    for (; j < end; ++j) step(j, 0);
    double sum = 0;
    for (int64_t k = 0; k < kLanes; ++k) sum += lanes[k];
    return sum;
  });
}

double sum_squares(Type type, const void* x, int64_t begin, int64_t end) {
  return dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    const auto* source = static_cast<const typename T::Storage*>(x);
    double lanes[kLanes] = {};
    int64_t j = begin;
    for (; j + kLanes <= end; j += kLanes) {
#pragma omp simd
      for (int64_t k = 0; k < kLanes; ++k) {
        const double value = static_cast<double>(T::load(source[j + k]));
        lanes[k] += value * value;
      }
    }
    double sum = 0;
    for (int64_t k = 0; k < kLanes; ++k) sum += lanes[k];
    for (; j < end; ++j) {
      const double value = static_cast<double>(T::load(source[j]));
      sum += value * value;
    }
    return sum;
  });
}

}  // namespace fastfisher::FASTFISHER_SIMD

// Batch normalisation in train mode, of x[examples, channels, size], a range of channels at a time: what one channel
// holds (512 KiB of 128 images of 32 x 32) stays in the cache between the passes over it, so memory is read once and
// written once. Four vectors at a time are added in the compute type, and those sums in float64.
#include "simd.h"

namespace fastfisher::FASTFISHER_SIMD {
namespace {

// The sum of f(j) over vectors j and of g(j) over the elements left, for j in [0, size).
template <class Compute, class Vectors, class Elements>
inline double sum_over(int64_t size, Vectors vector_at, Elements element_at) {
  constexpr int64_t lanes = Vector<Compute>::lanes;
  using Value = typename Vector<Compute>::Value;
  double sum = 0;
  int64_t j = 0;
  Doubles total = {};
  for (; j + 4 * lanes <= size; j += 4 * lanes) {
    const Value part = (vector_at(j) + vector_at(j + lanes)) + (vector_at(j + 2 * lanes) + vector_at(j + 3 * lanes));
    total += folded(part);
  }
  for (; j + lanes <= size; j += lanes) total += folded(vector_at(j));
  for (; j < size; ++j) sum += static_cast<double>(element_at(j));
  return sum + horizontal_sum(total);
}

template <class T>
struct Planes {
  using Storage = typename T::Storage;
  const Storage* first;
  int64_t stride;
  const Storage* operator[](int64_t example) const { return first + example * stride; }
};

}  // namespace

void batch_norm(Type type, const void* x, const BatchShape& shape, const void* weight, const void* bias, double eps,
                void* y, double* mean, double* variance, int64_t begin, int64_t end) {
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    using Storage = typename T::Storage;
    using Compute = typename T::Compute;
    using Value = typename Vector<Compute>::Value;
    constexpr int64_t lanes = Vector<Compute>::lanes;
    const double count = static_cast<double>(shape.examples * shape.size);
    for (int64_t c = begin; c < end; ++c) {
      const int64_t stride = shape.channels * shape.size;
      const Planes<T> planes{static_cast<const Storage*>(x) + c * shape.size, stride};
      double sum = 0, squares = 0;
      for (int64_t n = 0; n < shape.examples; ++n) {
        const auto* plane = planes[n];
        sum += sum_over<Compute>(
            shape.size, [&](int64_t j) { return Value(T::load(plane + j)); },
            [&](int64_t j) { return T::load(plane[j]); });
      }
      mean[c] = sum / count;
      const Compute center = static_cast<Compute>(mean[c]);
      for (int64_t n = 0; n < shape.examples; ++n) {
        const auto* plane = planes[n];
        squares += sum_over<Compute>(
            shape.size,
            [&](int64_t j) {
              const Value d = Value(T::load(plane + j)) - center;
              return Value(d * d);
            },
            [&](int64_t j) {
              const Compute d = T::load(plane[j]) - center;
              return d * d;
            });
      }
      // The centre was rounded: Σ(x - m)² = Σ(x - c)² - n (m - c)².
      const double off = mean[c] - static_cast<double>(center);
      const double spread = squares / count - off * off;
      variance[c] = spread < 0 ? 0 : spread;
      const double gain = weight ? static_cast<double>(T::load(static_cast<const Storage*>(weight)[c])) : 1;
      const double offset = bias ? static_cast<double>(T::load(static_cast<const Storage*>(bias)[c])) : 0;
      const double scale = gain / __builtin_sqrt(variance[c] + eps);
      const Compute a = static_cast<Compute>(scale), b = static_cast<Compute>(offset - mean[c] * scale);
      for (int64_t n = 0; n < shape.examples; ++n) {
        const auto* plane = planes[n];
        auto* target = static_cast<Storage*>(y) + c * shape.size + n * stride;
        int64_t j = 0;
        for (; j + lanes <= shape.size; j += lanes) T::store(target + j, Value(T::load(plane + j)) * a + b);
        for (; j < shape.size; ++j) target[j] = T::store(T::load(plane[j]) * a + b);
      }
    }
  });
}

void batch_norm_backward(Type type, const void* grad, const uint32_t* gates, const void* x, const BatchShape& shape,
                         const void* weight, const double* mean, const double* variance, double eps, void* grad_x,
                         void* grad_weight, void* grad_bias, int64_t begin, int64_t end) {
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    using Storage = typename T::Storage;
    using Compute = typename T::Compute;
    using Value = typename Vector<Compute>::Value;
    constexpr int64_t lanes = Vector<Compute>::lanes;
    const double count = static_cast<double>(shape.examples * shape.size);
    const auto channel = [&](int64_t c, auto gates_of) {
      const int64_t stride = shape.channels * shape.size;
      const Planes<T> planes{static_cast<const Storage*>(x) + c * shape.size, stride};
      const Planes<T> grads{static_cast<const Storage*>(grad) + c * shape.size, stride};
      const Compute center = static_cast<Compute>(mean[c]);
      double sum = 0, dot = 0;
      for (int64_t n = 0; n < shape.examples; ++n) {
        const ChannelSums found = channel_sums<T>(planes[n], grads[n], center, shape.size, gates_of(c, n));
        sum += found.sums;
        dot += found.products;
      }
      dot -= sum * (mean[c] - static_cast<double>(center));
      const double inverse = 1 / __builtin_sqrt(variance[c] + eps);
      if (grad_weight) static_cast<Storage*>(grad_weight)[c] = T::store(static_cast<Compute>(dot * inverse));
      if (grad_bias) static_cast<Storage*>(grad_bias)[c] = T::store(static_cast<Compute>(sum));
      if (!grad_x) return;
      const double gain = weight ? static_cast<double>(T::load(static_cast<const Storage*>(weight)[c])) : 1;
      // dx = a g + b (x - mean) + offset
      const Compute a = static_cast<Compute>(gain * inverse);
      const Compute b = static_cast<Compute>(-gain * inverse * inverse * inverse * dot / count);
      const Compute offset = static_cast<Compute>(-gain * inverse * sum / count);
      for (int64_t n = 0; n < shape.examples; ++n) {
        const auto *plane = planes[n], *g = grads[n];
        const auto open = gates_of(c, n);
        auto* target = static_cast<Storage*>(grad_x) + c * shape.size + n * stride;
        int64_t j = 0;
        for (; j + lanes <= shape.size; j += lanes) {
          const Value v = open(Value(T::load(g + j)), j);
          T::store(target + j, v * a + ((Value(T::load(plane + j)) - center) * b + offset));
        }
        for (; j < shape.size; ++j)
          target[j] = T::store(open(T::load(g[j]), j) * a + ((T::load(plane[j]) - center) * b + offset));
      }
    };
    for (int64_t c = begin; c < end; ++c) {
      if (gates)
        channel(c, [&](int64_t c, int64_t n) { return Gated<T>{gates, (n * shape.channels + c) * shape.size}; });
      else
        channel(c, [](int64_t, int64_t) { return Ungated<T>{}; });
    }
  });
}

}  // namespace fastfisher::FASTFISHER_SIMD

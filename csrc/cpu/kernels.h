// The CPU kernels, on raw pointers: no torch here, so each file compiles in a second and can be compiled once
// per SIMD level. Every function takes a range [begin, end) of its parallel dimension; the glue in ops.cpp
// splits the range over torch's own thread pool. Results never depend on the split.
#pragma once

#include <cstdint>

#include "../philox.h"

namespace fastfisher {

// Columns in one tile of the inverse-CDF search. Part of the definition of the draw (see reference.py): the
// first Philox word picks a tile by the tiles' sums, the second an element within it.
constexpr int64_t kTile = 1024;

// The widest row the sampling kernels take: its tiles' sums live on the stack.
constexpr int64_t kMaxColumns = 262144;

// The elements that one task of `sum_squares` adds up: fixed, so that the order of the sum is.
constexpr int64_t kReductionChunk = 1 << 16;

enum class Type { f32, f64, bf16, f16 };

enum class Distribution { gaussian, rademacher };

// The window of a max-pool, without padding or dilation.
struct Pool {
  int64_t height, width, stride_height, stride_width;
};

// What a batch normalisation sees: x[examples, channels, size], contiguous.
struct BatchShape {
  int64_t examples, channels, size;
};

// A convolution in three dimensions (leading ones of size 1 for fewer), seen from one group of one example.
struct Convolution {
  int64_t channels, outputs, groups;  // channels and outputs of one group
  int64_t input[3], kernel[3], stride[3], padding[3], dilation[3], output[3];
  int64_t needed[3];  // how much of the padded input the outputs see
};

struct Kernels {
  const char* level;

  // Rows [begin, end) of logits[N, C] (contiguous). nll is float32, or float64 for float64 logits.
  // A row with NaN, +inf, or nothing above -inf leaves nll = NaN, label = -1, dlogits = NaN; the lowest such
  // row is returned, or -1. Row i draws as row first + i of the key.
  int64_t (*sample_cross_entropy)(Type type, const void* logits, int64_t columns, Key key, uint64_t first, double scale,
                                  void* nll, int64_t* labels, void* dlogits, int64_t begin, int64_t end);

  // out = (p * v - p (p . v)) * scale with p = dlogits / scale + onehot(label), rows [begin, end).
  void (*softmax_hessian_product)(Type type, const void* dlogits, const int64_t* labels, const void* vector,
                                  int64_t columns, double scale, void* out, int64_t begin, int64_t end);

  // out = x where x > 0 (or NaN), else 0; out may be x. Word k of bits holds those gates of elements
  // 32k .. 32k + 31, lowest bit first; words [begin, end).
  void (*gate_relu)(Type type, const void* x, int64_t numel, void* out, uint32_t* bits, int64_t begin, int64_t end);

  // out = x where the element's bit is set, else 0; words [begin, end).
  void (*gate_apply)(Type type, const void* x, int64_t numel, const uint32_t* bits, void* out, int64_t begin,
                     int64_t end);

  // Max-pool of planes [begin, end) of x[planes, height, width]: the values, and where in its plane each lies. Where
  // `gated`, x is a ReLU's output, and a maximum of 0 has index -1: no gradient passes there.
  void (*gate_max_pool)(Type type, const void* x, int64_t height, int64_t width, const Pool& pool, bool gated,
                        void* values, int32_t* indices, int64_t begin, int64_t end);

  // Max-pool gates: out[p][k] = x[p][indices[p][k]], 0 at index -1, for planes p in [begin, end).
  void (*gate_take)(Type type, const void* x, int64_t elements, const int32_t* indices, int64_t outputs, void* out,
                    int64_t begin, int64_t end);

  // Its transpose: out[p][indices[p][k]] += y[p][k] on planes of zeros, in the order of k; none at index -1.
  void (*gate_put)(Type type, const void* y, int64_t outputs, const int32_t* indices, int64_t elements, void* out,
                   int64_t begin, int64_t end);

  // out += scale (a - b), elements [begin, end); returns the sum of (a - b)^2 over them, in float64.
  double (*axpy_diff)(Type type, void* out, const void* a, const void* b, double scale, int64_t begin, int64_t end);

  // The sum of squares of elements [begin, end) in float64, in an order fixed by the range alone.
  double (*sum_squares)(Type type, const void* x, int64_t begin, int64_t end);

  // y = weight (x - mean) / sqrt(variance + eps) + bias by the batch's own mean and (biased) variance of each of the
  // channels [begin, end); weight and bias may be null (1 and 0).
  void (*batch_norm)(Type type, const void* x, const BatchShape& shape, const void* weight, const void* bias,
                     double eps, void* y, double* mean, double* variance, int64_t begin, int64_t end);

  // Its backward, from a gradient that passes where the bits of `gates` (as gate_relu's; may be null) are set; any of
  // the three gradients may be null.
  void (*batch_norm_backward)(Type type, const void* grad, const uint32_t* gates, const void* x,
                              const BatchShape& shape, const void* weight, const double* mean, const double* variance,
                              double eps, void* grad_x, void* grad_weight, void* grad_bias, int64_t begin, int64_t end);

  // Per example i in [begin, end), with x[N, channels of all groups, input] and d[N, outputs, output]: the squared
  // norms of the weight gradient and of the bias gradient. Scratch as ops.cpp sizes it.
  void (*grad_sqnorm_conv)(Type type, const Convolution& c, bool use_gram, const void* x, const void* d, double* weight,
                           double* bias, void* scratch, int64_t begin, int64_t end);

  // The same for a[N, positions, inputs] and d[N, positions, outputs] of a linear layer.
  void (*grad_sqnorm_linear)(Type type, int64_t positions, int64_t inputs, int64_t outputs, bool use_gram,
                             const void* a, const void* d, double* weight, void* scratch, int64_t begin, int64_t end);

  // Rows [begin, end) of a[N * channels, width] and d: the sums of (a - center[channel]) d and of d.
  void (*channel_products)(Type type, const void* a, const void* d, const void* center, int64_t channels, int64_t width,
                           double* products, double* sums, int64_t begin, int64_t end);

  // out = (sqrt(p) * e - p (sqrt(p) . e)) * scale with p = softmax(logits) and random signs e, rows [begin, end).
  // Rows without a softmax, and first, as in sample_cross_entropy.
  int64_t (*rademacher_cotangent)(Type type, const void* logits, int64_t columns, Key key, uint64_t first, double scale,
                                  void* out, int64_t begin, int64_t end);

  // The sum of z x over elements [begin, end), in float64, with z the probe of element first + j (see probes.cpp).
  double (*probe_dot)(Type type, const void* x, Key key, Distribution distribution, uint64_t first, int64_t begin,
                      int64_t end);

  // out = x + eps z, or eps z where x is null, elements [begin, end).
  void (*perturb)(Type type, void* out, const void* x, Key key, double eps, Distribution distribution, uint64_t first,
                  int64_t begin, int64_t end);
};

// The widest set of kernels that this processor can run.
const Kernels& kernels();

// The same functions, compiled once per SIMD level.
#define FASTFISHER_DECLARE_LEVEL(LEVEL)                                                                             \
  namespace LEVEL {                                                                                                 \
  int64_t sample_cross_entropy(Type, const void*, int64_t, Key, uint64_t, double, void*, int64_t*, void*, int64_t,  \
                               int64_t);                                                                            \
  void softmax_hessian_product(Type, const void*, const int64_t*, const void*, int64_t, double, void*, int64_t,     \
                               int64_t);                                                                            \
  void gate_relu(Type, const void*, int64_t, void*, uint32_t*, int64_t, int64_t);                                   \
  void gate_apply(Type, const void*, int64_t, const uint32_t*, void*, int64_t, int64_t);                            \
  void gate_max_pool(Type, const void*, int64_t, int64_t, const Pool&, bool, void*, int32_t*, int64_t, int64_t);    \
  void gate_take(Type, const void*, int64_t, const int32_t*, int64_t, void*, int64_t, int64_t);                     \
  void gate_put(Type, const void*, int64_t, const int32_t*, int64_t, void*, int64_t, int64_t);                      \
  double axpy_diff(Type, void*, const void*, const void*, double, int64_t, int64_t);                                \
  double sum_squares(Type, const void*, int64_t, int64_t);                                                          \
  void batch_norm(Type, const void*, const BatchShape&, const void*, const void*, double, void*, double*, double*,  \
                  int64_t, int64_t);                                                                                \
  void batch_norm_backward(Type, const void*, const uint32_t*, const void*, const BatchShape&, const void*,         \
                           const double*, const double*, double, void*, void*, void*, int64_t, int64_t);            \
  void grad_sqnorm_conv(Type, const Convolution&, bool, const void*, const void*, double*, double*, void*, int64_t, \
                        int64_t);                                                                                   \
  void grad_sqnorm_linear(Type, int64_t, int64_t, int64_t, bool, const void*, const void*, double*, void*, int64_t, \
                          int64_t);                                                                                 \
  void channel_products(Type, const void*, const void*, const void*, int64_t, int64_t, double*, double*, int64_t,   \
                        int64_t);                                                                                   \
  int64_t rademacher_cotangent(Type, const void*, int64_t, Key, uint64_t, double, void*, int64_t, int64_t);         \
  double probe_dot(Type, const void*, Key, Distribution, uint64_t, int64_t, int64_t);                               \
  void perturb(Type, void*, const void*, Key, double, Distribution, uint64_t, int64_t, int64_t);                    \
  }
FASTFISHER_DECLARE_LEVEL(baseline)
FASTFISHER_DECLARE_LEVEL(avx2)
FASTFISHER_DECLARE_LEVEL(avx512)
#undef FASTFISHER_DECLARE_LEVEL

}  // namespace fastfisher

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

struct Kernels {
  const char* level;

  // Rows [begin, end) of logits[N, C] (contiguous). nll is float32, or float64 for float64 logits.
  // A row with NaN, +inf, or nothing above -inf leaves nll = NaN, label = -1, dlogits = NaN; the lowest such
  // row is returned, or -1.
  int64_t (*sample_cross_entropy)(Type type, const void* logits, int64_t columns, Key key, double scale, void* nll,
                                  int64_t* labels, void* dlogits, int64_t begin, int64_t end);

  // out = (p * v - p (p . v)) * scale with p = dlogits / scale + onehot(label), rows [begin, end).
  void (*softmax_hessian_product)(Type type, const void* dlogits, const int64_t* labels, const void* vector,
                                  int64_t columns, double scale, void* out, int64_t begin, int64_t end);

  // Word k of bits holds (x > 0) of elements 32k .. 32k + 31, lowest bit first; words [begin, end).
  void (*gate_pack)(Type type, const void* x, int64_t numel, uint32_t* bits, int64_t begin, int64_t end);

  // out = x where the element's bit is set, else 0; words [begin, end).
  void (*gate_apply)(Type type, const void* x, int64_t numel, const uint32_t* bits, void* out, int64_t begin,
                     int64_t end);

  // Max-pool gates: out[p][k] = x[p][indices[p][k]] for planes p in [begin, end).
  void (*gate_take)(Type type, const void* x, int64_t elements, const int32_t* indices, int64_t outputs, void* out,
                    int64_t begin, int64_t end);

  // Its transpose: out[p][indices[p][k]] += y[p][k] on planes of zeros, in the order of k.
  void (*gate_put)(Type type, const void* y, int64_t outputs, const int32_t* indices, int64_t elements, void* out,
                   int64_t begin, int64_t end);

  // out += scale (a - b), elements [begin, end); returns the sum of (a - b)^2 over them, in float64.
  double (*axpy_diff)(Type type, void* out, const void* a, const void* b, double scale, int64_t begin, int64_t end);

  // The sum of squares of elements [begin, end) in float64, in an order fixed by the range alone.
  double (*sum_squares)(Type type, const void* x, int64_t begin, int64_t end);

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
#define FASTFISHER_DECLARE_LEVEL(LEVEL)                                                                            \
  namespace LEVEL {                                                                                                \
  int64_t sample_cross_entropy(Type, const void*, int64_t, Key, double, void*, int64_t*, void*, int64_t, int64_t); \
  void softmax_hessian_product(Type, const void*, const int64_t*, const void*, int64_t, double, void*, int64_t,    \
                               int64_t);                                                                           \
  void gate_pack(Type, const void*, int64_t, uint32_t*, int64_t, int64_t);                                         \
  void gate_apply(Type, const void*, int64_t, const uint32_t*, void*, int64_t, int64_t);                           \
  void gate_take(Type, const void*, int64_t, const int32_t*, int64_t, void*, int64_t, int64_t);                    \
  void gate_put(Type, const void*, int64_t, const int32_t*, int64_t, void*, int64_t, int64_t);                     \
  double axpy_diff(Type, void*, const void*, const void*, double, int64_t, int64_t);                               \
  double sum_squares(Type, const void*, int64_t, int64_t);                                                         \
  double probe_dot(Type, const void*, Key, Distribution, uint64_t, int64_t, int64_t);                              \
  void perturb(Type, void*, const void*, Key, double, Distribution, uint64_t, int64_t, int64_t);                   \
  }
FASTFISHER_DECLARE_LEVEL(baseline)
FASTFISHER_DECLARE_LEVEL(avx2)
FASTFISHER_DECLARE_LEVEL(avx512)
#undef FASTFISHER_DECLARE_LEVEL

}  // namespace fastfisher

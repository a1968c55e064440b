// What the kernels share: element types, and an exponential that compilers vectorise.
//
// Included only by files that are compiled once per SIMD level (FASTFISHER_SIMD names it), so everything here
// is static inline in that level's namespace, and nothing of the standard library is used: a shared inline
// function would be kept once, in whichever level the linker met first, and could then run on a processor
// that lacks the level.
#pragma once

#include <cstdint>

#include "kernels.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#ifndef FASTFISHER_SIMD
#error "compile through CMake, which sets FASTFISHER_SIMD"
#endif

namespace fastfisher::FASTFISHER_SIMD {
namespace {

constexpr float kInfinity = __builtin_inff();

// 64 bytes of the compute type. GCC and Clang lower it to whatever the level has: one register, two or four.
template <class Compute>
struct Vector;

template <>
struct Vector<float> {
  typedef float Value __attribute__((vector_size(64)));
  typedef float Unaligned __attribute__((vector_size(64), aligned(4)));
  typedef uint32_t Bits __attribute__((vector_size(64)));
  static constexpr int64_t lanes = 16;
};

template <>
struct Vector<double> {
  typedef double Value __attribute__((vector_size(64)));
  typedef double Unaligned __attribute__((vector_size(64), aligned(8)));
  typedef uint64_t Bits __attribute__((vector_size(64)));
  static constexpr int64_t lanes = 8;
};

using Floats = Vector<float>::Value;
using Doubles = Vector<double>::Value;

template <class Value>
using BitsOf = typename Vector<decltype(+Value{}[0])>::Bits;

// All bits of the lanes in which a < b, and a where all bits are set, else b. GCC takes `a < b ? c : d` apart, lane
// after lane, where vectors are wider than the level's registers; these it does not.
template <class Value>
static inline BitsOf<Value> less(Value a, Value b) {
#ifdef __AVX512F__
  return (BitsOf<Value>)(a < b);
#else
  BitsOf<Value> result;
  constexpr int lanes = sizeof(Value) / sizeof(a[0]);
#pragma omp simd
  for (int k = 0; k < lanes; ++k) result[k] = a[k] < b[k] ? ~decltype(+result[0])(0) : 0;
  return result;
#endif
}

template <class Value>
static inline Value select(BitsOf<Value> mask, Value a, Value b) {
  return (Value)((mask & (BitsOf<Value>)a) | (~mask & (BitsOf<Value>)b));
}

template <class Value>
static inline Value maximum(Value a, Value b) {
  return a > b ? a : b;  // drops a NaN in a, which callers find in the sum of the exponentials
}

// The sum of the lanes in float64, halving the vector each time: short chains, so that it costs a dozen cycles.
static inline double horizontal_sum(Doubles v) {
  typedef double Four __attribute__((vector_size(32)));
  typedef double Two __attribute__((vector_size(16)));
  const Four four = __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  const Two two = __builtin_shufflevector(four, four, 0, 1) + __builtin_shufflevector(four, four, 2, 3);
  return two[0] + two[1];
}

// The lanes in float64, pairs of them added: to go on summing without float32's rounding.
static inline Doubles folded(Doubles v) { return v; }
static inline Doubles folded(Floats v) {
  typedef float Eight __attribute__((vector_size(32)));
  const Eight low = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
  const Eight high = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_convertvector(low, Doubles) + __builtin_convertvector(high, Doubles);
}

static inline double horizontal_sum(Floats v) { return horizontal_sum(folded(v)); }

// Lane k of the result is the sum of lanes 0 to k.
static inline Floats running_sum(Floats v) {
  const Floats zero = {};
  v += __builtin_shufflevector(zero, v, 0, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30);
  v += __builtin_shufflevector(zero, v, 0, 1, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29);
  v += __builtin_shufflevector(zero, v, 0, 1, 2, 3, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27);
  v += __builtin_shufflevector(zero, v, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  return v;
}

static inline Doubles running_sum(Doubles v) {
  const Doubles zero = {};
  v += __builtin_shufflevector(zero, v, 0, 8, 9, 10, 11, 12, 13, 14);
  v += __builtin_shufflevector(zero, v, 0, 1, 8, 9, 10, 11, 12, 13);
  v += __builtin_shufflevector(zero, v, 0, 1, 2, 3, 8, 9, 10, 11);
  return v;
}

// How many lanes of a comparison hold.
#ifdef __AVX512F__
static inline int64_t count(decltype(Floats{} < Floats{}) mask) {
  return __builtin_popcount(_mm512_movepi32_mask((__m512i)mask));
}
static inline int64_t count(decltype(Doubles{} < Doubles{}) mask) {
  return __builtin_popcount(_mm512_movepi64_mask((__m512i)mask));
}
#else
template <class Mask>
static inline int64_t count(Mask mask) {
  int64_t result = 0;
  for (uint64_t k = 0; k < sizeof(Mask) / sizeof(mask[0]); ++k) result -= mask[k];
  return result;
}
#endif

// Whether any bit is set.
template <class Bits>
static inline bool any(Bits bits) {
  decltype(+bits[0]) all = 0;
#pragma omp simd reduction(| : all)
  for (uint64_t k = 0; k < sizeof(Bits) / sizeof(bits[0]); ++k) all |= bits[k];
  return all != 0;
}

// The largest lane; a lane with NaN may be dropped.
static inline double horizontal_maximum(Doubles v) {
  typedef double Four __attribute__((vector_size(32)));
  typedef double Two __attribute__((vector_size(16)));
  const Four low = __builtin_shufflevector(v, v, 0, 1, 2, 3), high = __builtin_shufflevector(v, v, 4, 5, 6, 7);
  const Four four = maximum(low, high);
  const Two two =
      maximum(Two(__builtin_shufflevector(four, four, 0, 1)), Two(__builtin_shufflevector(four, four, 2, 3)));
  return two[0] > two[1] ? two[0] : two[1];
}

static inline float horizontal_maximum(Floats v) {
  typedef float Eight __attribute__((vector_size(32)));
  const Eight low = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
  const Eight high = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  return static_cast<float>(horizontal_maximum(__builtin_convertvector(maximum(low, high), Doubles)));
}

// exp(x) for x <= 0; results below the smallest normal number may be flushed to 0. exp(-inf) = 0, NaN stays
// NaN.
#ifdef __AVX512F__
// 2^(n + k/32 + r) with the power from the exponent, 2^(k/32) from a table in two registers, and a polynomial
// of degree 2 in |r| <= 1/64 whose error (minimax) is 5e-8, below half an ulp: eleven instructions, over all
// pipes.
static inline Floats exp_nonpositive(Floats x) {
  const __m512 low = {1.0f,        1.02189715f, 1.04427378f, 1.06714040f, 1.09050773f, 1.11438674f,
                      1.13878863f, 1.16372486f, 1.18920712f, 1.21524736f, 1.24185781f, 1.26905096f,
                      1.29683955f, 1.32523664f, 1.35425555f, 1.38390988f};
  const __m512 high = {1.41421356f, 1.44518081f, 1.47682615f, 1.50916443f, 1.54221083f, 1.57598085f,
                       1.61049033f, 1.64575548f, 1.68179283f, 1.71861930f, 1.75625216f, 1.79470907f,
                       1.83400809f, 1.87416763f, 1.91520656f, 1.95714412f};
  // Clamped (NaN passes: it is the second operand), -inf leaves no NaN below, and 2^-100000 is 0 all the same.
  const __m512 t = _mm512_max_ps(_mm512_set1_ps(-100000.0f), _mm512_mul_ps((__m512)x, _mm512_set1_ps(1.44269504f)));
  const __m512 magic = _mm512_set1_ps(393216.0f);  // 1.5 * 2^18: one ulp of the sum is 1/32
  const __m512 shifted = _mm512_add_ps(t, magic);
  const __m512 whole = _mm512_sub_ps(shifted, magic);
  const __m512 r = _mm512_sub_ps(t, whole);
  const __m512 power = _mm512_permutex2var_ps(low, _mm512_castps_si512(shifted), high);
  const __m512 slope = _mm512_fmadd_ps(r, _mm512_set1_ps(0.240226507f), _mm512_set1_ps(0.693157345f));
  return (Floats)_mm512_scalef_ps(_mm512_fmadd_ps(_mm512_mul_ps(power, r), slope, power), whole);
}
#else
// Cody-Waite reduction to |r| <= ln(2) / 2, Cephes' polynomial (below 1 ulp), the power added to the
// exponent.
static inline Floats exp_nonpositive(Floats x) {
  using Bits = Vector<float>::Bits;
  const Floats lowest = Floats{} - 87.3365448f;
  const BitsOf<Floats> below = less(x, lowest);
  const Floats clamped = select(below, lowest, x);
  const Floats shifted = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const Floats n = shifted - 12582912.0f;
  Floats r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Floats result = (Floats)((Bits)p + ((Bits)shifted << 23));
  return select(below, Floats{}, result);
}
#endif

// The same to 2 ulp however far below 0, for what stands alone: in a sum like softmax's the large exponentials count.
#ifdef __AVX512F__
// Above, x log2(e) is rounded, which alone costs up to |x| / 2 ulp. What 2 was not raised to, x less that power times
// ln(2) in two parts, is put back to first order. From -200 down exp is 0; the remainder of -inf would be NaN.
static inline Floats exp_far(Floats x) {
  const __m512 clamped = _mm512_max_ps(_mm512_set1_ps(-200.0f), (__m512)x);
  const __m512 result = (__m512)exp_nonpositive((Floats)clamped);
  const __m512 power = _mm512_mul_ps(clamped, _mm512_set1_ps(1.44269504f));
  const __m512 most = _mm512_fnmadd_ps(power, _mm512_set1_ps(0x1.62e43p-1f), clamped);
  const __m512 rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(-0x1.05c61p-29f), most);
  return (Floats)_mm512_fmadd_ps(result, rest, result);
}
#else
static inline Floats exp_far(Floats x) { return exp_nonpositive(x); }
#endif

// The same in float64: Taylor to degree 13, whose remainder at |r| = ln(2) / 2 is 4e-18.
static inline Doubles exp_nonpositive(Doubles x) {
  using Bits = Vector<double>::Bits;
  const Doubles lowest = Doubles{} - 708.39641853226408;
  const BitsOf<Doubles> below = less(x, lowest);
  const Doubles clamped = select(below, lowest, x);
  const Doubles shifted = clamped * 1.4426950408889634074 + 6755399441055744.0;  // 1.5 * 2^52
  const Doubles n = shifted - 6755399441055744.0;
  Doubles r = clamped - n * 6.93145751953125e-1;
  r = r - n * 1.42860682030941723212e-6;
  Doubles p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * (r * r) + r + 1.0;
  const Doubles result = (Doubles)((Bits)p + ((Bits)shifted << 52));
  return select(below, Doubles{}, result);
}

static inline Doubles exp_far(Doubles x) { return exp_nonpositive(x); }

// How each dtype is stored, and the type its arithmetic is done in.
struct F32 {
  using Storage = float;
  using Compute = float;
  static inline float load(float x) { return x; }
  static inline float store(float x) { return x; }
  static inline Floats load(const float* x) { return *(const Vector<float>::Unaligned*)x; }
  static inline void store(float* target, Floats x) { *(Vector<float>::Unaligned*)target = x; }
};

struct F64 {
  using Storage = double;
  using Compute = double;
  static inline double load(double x) { return x; }
  static inline double store(double x) { return x; }
  static inline Doubles load(const double* x) { return *(const Vector<double>::Unaligned*)x; }
  static inline void store(double* target, Doubles x) { *(Vector<double>::Unaligned*)target = x; }
};

// The tag of a compute type itself.
template <class Compute>
struct Same;
template <>
struct Same<float> {
  using Type = F32;
};
template <>
struct Same<double> {
  using Type = F64;
};

// A vector of a 16-bit type, element by element: the loops have no branch and become a few vector
// instructions.
template <class T>
static inline Floats load_halves(const uint16_t* x) {
  Floats result;
#pragma omp simd
  for (int k = 0; k < 16; ++k) result[k] = T::load(x[k]);
  return result;
}

template <class T>
static inline void store_halves(uint16_t* target, Floats x) {
#pragma omp simd
  for (int k = 0; k < 16; ++k) target[k] = T::store(x[k]);
}

struct BF16 {
  using Storage = uint16_t;
  using Compute = float;
  static inline float load(uint16_t x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x) << 16); }
  static inline uint16_t store(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    return static_cast<uint16_t>(x != x ? 0x7FC0u : rounded);
  }
  static inline Floats load(const uint16_t* x) { return load_halves<BF16>(x); }
  static inline void store(uint16_t* target, Floats x) { store_halves<BF16>(target, x); }
};

struct F16 {
  using Storage = uint16_t;
  using Compute = float;
  static inline float load(uint16_t x) {
    // The exponent is rebased by a multiplication, which also makes subnormals right.
    const float magnitude = __builtin_bit_cast(float, static_cast<uint32_t>(x & 0x7FFFu) << 13) * 0x1p112f;
    const uint32_t bits = __builtin_bit_cast(uint32_t, magnitude);
    const uint32_t special = (x & 0x7C00u) == 0x7C00u ? 0x7F800000u : 0u;
    return __builtin_bit_cast(float, bits | special | (static_cast<uint32_t>(x & 0x8000u) << 16));
  }
  static inline uint16_t store(float x) {
    // Adding 2^(exponent + 13) lets the adder round to 10 mantissa bits, subnormals included.
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t twice = bits + bits;
    const uint32_t bias = (twice & 0xFF000000u) < 0x71000000u ? 0x71000000u : (twice & 0xFF000000u);
    const float base = __builtin_bit_cast(float, bits & 0x7FFFFFFFu) * 0x1p112f * 0x1p-110f;
    const float sum = __builtin_bit_cast(float, (bias >> 1) + 0x07800000u) + base;
    const uint32_t sum_bits = __builtin_bit_cast(uint32_t, sum);
    const uint32_t half = ((sum_bits >> 13) & 0x7C00u) + (sum_bits & 0x0FFFu);
    return static_cast<uint16_t>(sign | (twice > 0xFF000000u ? 0x7E00u : half));
  }
  static inline Floats load(const uint16_t* x) { return load_halves<F16>(x); }
  static inline void store(uint16_t* target, Floats x) { store_halves<F16>(target, x); }
};

// The first n lanes from memory, -infinity beyond, and the first n lanes to memory.
template <class T>
static inline auto load_some(const typename T::Storage* x, int64_t n) {
  using Lanes = Vector<typename T::Compute>;
  typename Lanes::Value result = typename Lanes::Value{} - kInfinity;
  for (int64_t k = 0; k < n; ++k) result[k] = T::load(x[k]);
  return result;
}

template <class T>
static inline void store_some(typename T::Storage* target, typename Vector<typename T::Compute>::Value x, int64_t n) {
  for (int64_t k = 0; k < n; ++k) target[k] = T::store(x[k]);
}

#ifdef __AVX512F__
template <>
inline auto load_some<F32>(const float* x, int64_t n) {
  return (Floats)_mm512_mask_loadu_ps(_mm512_set1_ps(-kInfinity), static_cast<__mmask16>((1u << n) - 1), x);
}
template <>
inline void store_some<F32>(float* target, Floats x, int64_t n) {
  _mm512_mask_storeu_ps(target, static_cast<__mmask16>((1u << n) - 1), (__m512)x);
}
#endif

// The gates of a range of elements: `gates(v, j)` is element j's value v (or a vector of them, from j on) where the
// gate is open, else 0.
template <class T>
struct Ungated {
  template <class Value>
  inline Value operator()(Value v, int64_t) const {
    return v;
  }
};

// Element j's gate is bit `first` + j of the words.
template <class T>
struct Gated {
  using Compute = typename T::Compute;
  using Value = typename Vector<Compute>::Value;
  using Bits = typename Vector<Compute>::Bits;
  static constexpr int64_t lanes = Vector<Compute>::lanes;
  const uint32_t* words;
  int64_t first;
  inline Compute operator()(Compute v, int64_t j) const {
    const int64_t bit = first + j;
    return (words[bit / 32] >> (bit % 32)) & 1u ? v : Compute(0);
  }
  inline Value operator()(Value v, int64_t j) const {
    const int64_t word = (first + j) / 32, shift = (first + j) % 32;
    uint32_t bits = words[word] >> shift;
    if (shift + lanes > 32) bits |= words[word + 1] << (32 - shift);
    Bits lane = {};
    for (int64_t k = 0; k < lanes; ++k) lane[k] = uint64_t(1) << k;
    return ((Bits{} + bits) & lane) != 0 ? v : Value{};
  }
};

struct ChannelSums {
  double products, sums;
};

// The sums of (x - center) g and of g: four vectors at a time in the compute type, and those sums in float64.
template <class T, class Gates>
static inline ChannelSums channel_sums(const typename T::Storage* x, const typename T::Storage* g,
                                       typename T::Compute center, int64_t size, Gates gates) {
  using Compute = typename T::Compute;
  using Value = typename Vector<Compute>::Value;
  constexpr int64_t lanes = Vector<Compute>::lanes;
  Doubles products = {}, sums = {};
  int64_t j = 0;
  const auto add = [&](int64_t vectors) {
    Value product = {}, sum = {};
    for (int64_t k = 0; k < vectors; ++k, j += lanes) {
      const Value v = gates(Value(T::load(g + j)), j);
      product += (Value(T::load(x + j)) - center) * v;
      sum += v;
    }
    products += folded(product);
    sums += folded(sum);
  };
  while (j + 4 * lanes <= size) add(4);
  while (j + lanes <= size) add(1);
  ChannelSums result{horizontal_sum(products), horizontal_sum(sums)};
  for (; j < size; ++j) {
    const Compute v = gates(T::load(g[j]), j);
    result.products += static_cast<double>((T::load(x[j]) - center) * v);
    result.sums += static_cast<double>(v);
  }
  return result;
}

// Calls f with the tag of `type`.
template <class Function>
static inline auto dispatch(Type type, Function f) {
  switch (type) {
    case Type::f32:
      return f(F32{});
    case Type::f64:
      return f(F64{});
    case Type::bf16:
      return f(BF16{});
    default:
      return f(F16{});
  }
}

}  // namespace
}  // namespace fastfisher::FASTFISHER_SIMD

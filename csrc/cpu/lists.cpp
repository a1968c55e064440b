// Operators on lists of tensors, one tensor's range at a time: the differences and norms of whole sets of gradients,
// and Hutchinson's probes. All are bound by memory, the floor being a copy of the tensors.
//
// A probe z, standard normal numbers or signs, is a function of the key and the element's index over the whole list of
// tensors, whatever the threads and the split; it exists only in a tile in the L1 cache, where it is used. Sixteen
// Philox calls run side by side and serve 64 normal numbers or 2,048 signs: element e of such a group belongs to call e
// % 16 (see reference.py, which defines it), so that nothing has to be transposed.
#include "philox_calls.h"
#include "simd.h"

namespace fastfisher::FASTFISHER_SIMD {

// ---- differences and sums of squares --------------------------------------------------------------------------------

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

// ---- probes ---------------------------------------------------------------------------------------------------------

namespace {

constexpr int64_t kNormals = 4 * kCalls;
constexpr int64_t kSigns = 128 * kCalls;  // also the elements of a tile

typedef int32_t Signed __attribute__((vector_size(64)));

// sqrt(-2 log u) with u = (word + 1/2) / 2^32, to 2 ulp. Above sqrt(1/2) the distance to 1 is taken from the
// word's complement, so that no digit is lost there.
static inline Floats radius(Integers word) {
  const auto near_one = word >= 0xB504F334u;
  const Floats x = __builtin_convertvector(word, Floats) + 0.5f;
  const Signed shifted = (Signed)x - 0x3F3504F3;
  const Floats mantissa = (Floats)((shifted & 0x7FFFFF) + 0x3F3504F3);  // in [sqrt(1/2), sqrt(2))
  const Floats distance = (__builtin_convertvector(~word, Floats) + 0.5f) * -0x1p-32f;
  const Floats f = near_one ? distance : mantissa - 1.0f;
  const Floats exponent = near_one ? Floats{} : __builtin_convertvector((shifted >> 23) - 32, Floats);
  Floats p = f * 7.0376836292e-2f - 1.1514610310e-1f;  // Cephes' logf
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Floats square = f * f;
  const Floats tail = p * f * square + exponent * -2.12194440e-4f - 0.5f * square;
  const Floats log = tail + f + exponent * 0.693359375f;
  Floats result;
#pragma omp simd
  for (int k = 0; k < 16; ++k) result[k] = __builtin_sqrtf(-2.0f * log[k]);
  return result;
}

// Box and Muller: two normal numbers from two words.
static inline void normal_pair(Integers first, Integers second, float* cosines, float* sines) {
  const Integers quadrant = (second + 0x20000000u) >> 30;  // rounded, modulo 4
  const Floats angle = __builtin_convertvector((Signed)(second - (quadrant << 30)), Floats) * 0x1.921fb6p-30f;
  const Floats square = angle * angle;
  const Floats sine =
      ((square * -1.9515295891e-4f + 8.3321608736e-3f) * square - 1.6666654611e-1f) * square * angle + angle;
  const Floats cosine =
      ((square * 2.443315711809948e-5f - 1.388731625493765e-3f) * square + 4.166664568298827e-2f) * (square * square) -
      0.5f * square + 1.0f;
  const auto odd = (quadrant & 1u) != 0u;
  const Integers cosine_sign = ((quadrant + 1u) & 2u) << 30, sine_sign = (quadrant & 2u) << 30;
  const Floats r = radius(first);
  F32::store(cosines, (Floats)((Integers)(r * (odd ? sine : cosine)) ^ cosine_sign));
  F32::store(sines, (Floats)((Integers)(r * (odd ? cosine : sine)) ^ sine_sign));
}

// The elements of a tile that a range wants, and where they come to lie; some before and after them too.
struct Probes {
  alignas(64) float z[kSigns];

  void fill(Distribution distribution, Key key, uint64_t tile, int64_t begin, int64_t end) {
    Integers words[4];
    if (distribution == Distribution::gaussian) {
      constexpr uint64_t groups = kSigns / kNormals;
      for (int64_t g = begin / kNormals; g * kNormals < end; ++g) {
        philox_calls(key, tile * groups + static_cast<uint64_t>(g), words);
        float* target = z + g * kNormals;
        normal_pair(words[0], words[1], target, target + kCalls);
        normal_pair(words[2], words[3], target + 2 * kCalls, target + 3 * kCalls);
      }
      return;
    }
    philox_calls(key, tile, words);
    for (int64_t row = begin / kCalls; row * kCalls < end; ++row) {
      const Integers sign = (words[row / 32] >> static_cast<uint32_t>(row % 32)) << 31;
      F32::store(z + row * kCalls, (Floats)(sign | 0x3F800000u));
    }
  }
};

// Calls use(z, j, count) for runs of elements j .. j + count of [begin, end), z pointing at the first one's probe.
template <class Function>
static inline void for_each_run(Distribution distribution, Key key, uint64_t first, int64_t begin, int64_t end,
                                Function use) {
  Probes probes;
  for (int64_t j = begin; j < end;) {
    const uint64_t element = first + static_cast<uint64_t>(j);
    const int64_t from = static_cast<int64_t>(element % kSigns);
    const int64_t count = end - j < kSigns - from ? end - j : kSigns - from;
    probes.fill(distribution, key, element / kSigns, from, from + count);
    use(probes.z + from, j, count);
    j += count;
  }
}

}  // namespace

double probe_dot(Type type, const void* x, Key key, Distribution distribution, uint64_t first, int64_t begin,
                 int64_t end) {
  return dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    const auto* source = static_cast<const typename T::Storage*>(x);
    double sums[kLanes] = {};
    for_each_run(distribution, key, first, begin, end, [&](const float* z, int64_t start, int64_t count) {
      int64_t j = 0;
      for (; j + kLanes <= count; j += kLanes) {
#pragma omp simd
        for (int64_t k = 0; k < kLanes; ++k)
          sums[k] += static_cast<double>(T::load(source[start + j + k])) * static_cast<double>(z[j + k]);
      }
      for (; j < count; ++j) sums[0] += static_cast<double>(T::load(source[start + j])) * static_cast<double>(z[j]);
    });
    double sum = 0;
    for (const double lane : sums) sum += lane;
    return sum;
  });
}

void perturb(Type type, void* out, const void* x, Key key, double eps, Distribution distribution, uint64_t first,
             int64_t begin, int64_t end) {
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    using Compute = typename T::Compute;
    auto* target = static_cast<typename T::Storage*>(out);
    const auto* source = static_cast<const typename T::Storage*>(x);
    const Compute factor = static_cast<Compute>(eps);
    for_each_run(distribution, key, first, begin, end, [&](const float* z, int64_t start, int64_t count) {
      auto* written = target + start;
      if (source == nullptr) {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) written[j] = T::store(factor * static_cast<Compute>(z[j]));
        return;
      }
      const auto* read = source + start;
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) written[j] = T::store(T::load(read[j]) + factor * static_cast<Compute>(z[j]));
    });
  });
}

}  // namespace fastfisher::FASTFISHER_SIMD

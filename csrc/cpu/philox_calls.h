// Philox for neighbouring elements: sixteen calls side by side, so that their words come out in vectors.
//
// Sixteen calls serve a group of elements, of which element e belongs to call e % 16 (see reference.py): nothing has to
// be transposed.
#pragma once

#include <cstdint>

#include "../philox.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace fastfisher::FASTFISHER_SIMD {
namespace {

constexpr int64_t kCalls = 16;

typedef uint32_t Integers __attribute__((vector_size(64)));
typedef uint64_t Longs __attribute__((vector_size(64)));

// Philox of the elements group * 16 + 0 .. 15.
#ifdef __AVX512F__
// The product of the lower halves of eight 64-bit lanes and a constant; what the upper halves hold is ignored.
static inline Longs multiply(Longs a, uint32_t constant) {
  return (Longs)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(constant));
}

// The even elements and the odd ones in vectors of their own.
static inline void philox_calls(Key key, uint64_t group, Integers words[4]) {
  const uint64_t first = group * kCalls;  // a multiple of 16: the upper word is one for all
  const Longs even = {0, 2, 4, 6, 8, 10, 12, 14};
  Longs c[2][4];
  for (int half = 0; half < 2; ++half) {
    c[half][0] = even + ((first & 0xFFFFFFFFu) + half);
    c[half][1] = Longs{} + (first >> 32);
    c[half][2] = Longs{} + (key.offset & 0xFFFFFFFFu);
    c[half][3] = Longs{} + (key.offset >> 32);
  }
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (auto& s : c) {
      const Longs product0 = multiply(s[0], 0xD2511F53u), product1 = multiply(s[2], 0xCD9E8D57u);
      s[0] = (product1 >> 32) ^ s[1] ^ k0;
      s[1] = product1;
      s[2] = (product0 >> 32) ^ s[3] ^ k1;
      s[3] = product0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int w = 0; w < 4; ++w) words[w] = (Integers)((c[0][w] & 0xFFFFFFFFu) | (c[1][w] << 32));
}
#else
static inline void philox_calls(Key key, uint64_t group, Integers words[4]) {
  alignas(64) uint32_t found[4][kCalls];
#pragma omp simd
  for (int64_t call = 0; call < kCalls; ++call) {
    const Words four = philox(key, group * kCalls + static_cast<uint64_t>(call));
    for (int w = 0; w < 4; ++w) found[w][call] = four.w[w];
  }
  for (int w = 0; w < 4; ++w) words[w] = *(const Integers*)found[w];
}
#endif

}  // namespace
}  // namespace fastfisher::FASTFISHER_SIMD

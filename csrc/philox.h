// Philox4x32-10 (Salmon et al., 2011), the counter-based generator that every backend shares.
//
// A draw is a pure function of (seed, offset, element index), so the same key gives the same labels and
// probes on the CPU, in Triton and in CUDA, whatever the number of threads, blocks or splits. The counter is
// (element index, offset), 64 bits each, low word first; the 128-bit result is four independent words.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTFISHER_HOST_DEVICE __host__ __device__
#else
#define FASTFISHER_HOST_DEVICE
#endif

namespace fastfisher {

struct Key {
  uint64_t seed;
  uint64_t offset;
};

struct Words {
  uint32_t w[4];
};

FASTFISHER_HOST_DEVICE static inline Words philox(Key key, uint64_t element) {
  uint32_t c0 = static_cast<uint32_t>(element), c1 = static_cast<uint32_t>(element >> 32);
  uint32_t c2 = static_cast<uint32_t>(key.offset), c3 = static_cast<uint32_t>(key.offset >> 32);
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// A uniform on [0, 1) with 32 bits, exact in float64.
FASTFISHER_HOST_DEVICE static inline double uniform(uint32_t word) { return word * (1.0 / 4294967296.0); }

}  // namespace fastfisher

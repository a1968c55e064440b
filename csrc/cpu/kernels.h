// The CPU kernels, on raw pointers: no torch here, so each file compiles in a second and can be compiled once
// per SIMD level. Every function takes a range [begin, end) of its parallel dimension; the functions in csrc/host
// split the range over torch's own thread pool. Results never depend on the split.
#pragma once

#include <cstdint>

#include "../philox.h"

namespace fastfisher {

// Columns in one tile of the inverse-CDF search. Part of the definition of the draw (see reference.py): the
// first Philox word picks a tile by the tiles' sums, the second an element within it.
constexpr int64_t kTile = 1024;

// The widest row the sampling kernels take: its tiles' sums live on the stack.
constexpr int64_t kMaxColumns = 262144;

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

// The kernels of one SIMD level: a pointer for each prototype in kernels.inc.
struct Kernels {
  const char* level;
#define KERNEL(Result, name, ...) Result (*name)(__VA_ARGS__);
#include "kernels.inc"
#undef KERNEL
};

// The widest kernels that this processor can run.
const Kernels& kernels();

}  // namespace fastfisher

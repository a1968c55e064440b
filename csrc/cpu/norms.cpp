// Squared norms of per-example weight gradients, which never exist as a whole.
//
// One micro-kernel does all of it: out[tap][lane] = sum over positions of x[tap, position] * y[position, lane], a tile
// of 12 taps by 32 lanes held in registers. A convolution's gradient is such a product of shifted inputs (read where
// they lie in a padded copy of the example: no unfolding) and output gradients with the channels as lanes; its tiles
// are squared as they are made. The Gram form takes the inner products of all pairs of positions instead, which are the
// same product with channels as positions, and multiplies those of the inputs with those of the output gradients.
#include "simd.h"

namespace fastfisher::FASTFISHER_SIMD {
namespace {

// Accumulators of one tile: as many as the registers hold beside two operands.
#if defined(__AVX512F__)
constexpr int kTaps = 12, kVectors = 2;
#elif defined(__AVX2__)
constexpr int kTaps = 6, kVectors = 1;
#else
constexpr int kTaps = 2, kVectors = 1;
#endif

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Positions in three nested dimensions: how many, and how far x moves with each.
struct Positions {
  int64_t count[3], step[3];
};

template <class Compute, int TAPS, int VECTORS>
static void tile(const Compute* const* taps, const Positions& positions, const Compute* y, int64_t y_step,
                 Compute* out) {
  using Value = typename Vector<Compute>::Value;
  using Unaligned = typename Vector<Compute>::Unaligned;
  constexpr int64_t lanes = Vector<Compute>::lanes;
  Value sum[TAPS][VECTORS] = {};
  const Compute* x[TAPS];
  for (int k = 0; k < TAPS; ++k) x[k] = taps[k];
  for (int64_t i = 0; i < positions.count[0]; ++i) {
    for (int64_t j = 0; j < positions.count[1]; ++j) {
      int64_t offset = i * positions.step[0] + j * positions.step[1];
      for (int64_t k = 0; k < positions.count[2]; ++k) {
        Value v[VECTORS];
#pragma GCC unroll 2
        for (int n = 0; n < VECTORS; ++n) v[n] = *(const Unaligned*)(y + n * lanes);
#pragma GCC unroll 12
        for (int m = 0; m < TAPS; ++m) {
#pragma GCC unroll 2
          for (int n = 0; n < VECTORS; ++n) sum[m][n] += v[n] * x[m][offset];
        }
        offset += positions.step[2];
        y += y_step;
      }
    }
  }
  for (int m = 0; m < TAPS; ++m)
    for (int n = 0; n < VECTORS; ++n) *(Unaligned*)(out + (m * VECTORS + n) * lanes) = sum[m][n];
}

template <class Compute, int TAPS>
static void tile_of(int taps, int vectors, const Compute* const* x, const Positions& positions, const Compute* y,
                    int64_t y_step, Compute* out) {
  if constexpr (TAPS > 1) {
    if (taps < TAPS) return tile_of<Compute, TAPS - 1>(taps, vectors, x, positions, y, y_step, out);
  }
  if (vectors == 1) return tile<Compute, TAPS, 1>(x, positions, y, y_step, out);
  tile<Compute, TAPS, kVectors>(x, positions, y, y_step, out);
}

// Calls f(tap, lane, vectors, values) for every tile of the product; values is [taps of the tile][vectors][lanes].
// tap_at(k) is where tap k has position 0. With `upper`, tiles wholly left of the diagonal are left out.
template <class Compute, class TapAt, class Function>
static inline void product(int64_t taps, TapAt tap_at, int64_t width, const Positions& positions, const Compute* y,
                           int64_t y_step, bool upper, Function f) {
  constexpr int64_t lanes = Vector<Compute>::lanes;
  alignas(64) Compute out[kTaps * kVectors * lanes];
  const Compute* x[kTaps];
  for (int64_t tap = 0; tap < taps; tap += kTaps) {
    const int count = static_cast<int>(smaller(kTaps, taps - tap));
    for (int k = 0; k < count; ++k) x[k] = tap_at(tap + k);
    for (int64_t lane = 0; lane < width;) {
      const int vectors = width - lane > lanes ? kVectors : 1;
      const int64_t next = lane + vectors * lanes;
      if (!upper || next > tap) {
        tile_of<Compute, kTaps>(count, vectors, x, positions, y + lane, y_step, out);
        f(tap, count, lane, vectors, out);
      }
      lane = next;
    }
  }
}

template <class Compute>
static inline double sum_of_squares(const Compute* values, int64_t count) {
  using Value = typename Vector<Compute>::Value;
  Value sum = {};
  for (int64_t k = 0; k < count; k += Vector<Compute>::lanes) {
    const Value v = *(const Value*)(values + k);
    sum += v * v;
  }
  return horizontal_sum(sum);
}

template <int... J>
struct Lanes {};
template <int N, int... J>
struct Count : Count<N - 1, N - 1, J...> {};
template <int... J>
struct Count<0, J...> {
  using type = Lanes<J...>;
};

// One step of a transposition: swaps blocks of W lanes with blocks of W rows.
template <int W, class Value, int... J>
static inline void swap_blocks(Value& a, Value& b, Lanes<J...>) {
  constexpr int lanes = sizeof...(J);
  const Value low = __builtin_shufflevector(a, b, ((J & W) ? lanes + J - W : J)...);
  b = __builtin_shufflevector(a, b, ((J & W) ? lanes + J : J + W)...);
  a = low;
}

template <class Compute, int W>
static inline void transpose(typename Vector<Compute>::Value* rows) {
  constexpr int lanes = Vector<Compute>::lanes;
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i)
    if (!(i & W)) swap_blocks<W>(rows[i], rows[i + W], typename Count<lanes>::type{});
  if constexpr (W > 1) transpose<Compute, W / 2>(rows);
}

// to[column][padded rows] = from[row][column], zeros in the padding.
template <class T>
static void pack_transposed(const typename T::Storage* from, int64_t rows, int64_t columns, typename T::Compute* to,
                            int64_t padded) {
  using Compute = typename T::Compute;
  using Value = typename Vector<Compute>::Value;
  using Unaligned = typename Vector<Compute>::Unaligned;
  constexpr int64_t lanes = Vector<Compute>::lanes;
  for (int64_t row = 0; row < padded; row += lanes) {
    int64_t column = 0;
    if (row + lanes <= rows) {
      for (; column + lanes <= columns; column += lanes) {
        Value block[lanes];
        for (int64_t k = 0; k < lanes; ++k) block[k] = T::load(from + (row + k) * columns + column);
        transpose<Compute, lanes / 2>(block);
        for (int64_t k = 0; k < lanes; ++k) *(Unaligned*)(to + (column + k) * padded + row) = block[k];
      }
    }
    for (; column < columns; ++column)
      for (int64_t k = 0; k < lanes; ++k)
        to[column * padded + row + k] = row + k < rows ? T::load(from[(row + k) * columns + column]) : Compute(0);
  }
}

// to[row][padded] = from[row][column], zeros in the padding.
template <class T>
static void pack(const typename T::Storage* from, int64_t rows, int64_t columns, typename T::Compute* to,
                 int64_t padded) {
  using Unaligned = typename Vector<typename T::Compute>::Unaligned;
  constexpr int64_t lanes = Vector<typename T::Compute>::lanes;
  for (int64_t row = 0; row < rows; ++row, from += columns, to += padded) {
    int64_t k = 0;
    for (; k + lanes <= columns; k += lanes) *(Unaligned*)(to + k) = T::load(from + k);
    for (; k < columns; ++k) to[k] = T::load(from[k]);
    for (; k < padded; ++k) to[k] = 0;
  }
}

// gram[p][padded] = sum over rows of x[row][p] x[row][q], for q >= p (some of the rest too).
template <class Compute>
static void gram(const Compute* x, int64_t rows, int64_t columns, int64_t padded, Compute* out) {
  constexpr int64_t lanes = Vector<Compute>::lanes;
  const Positions positions = {{1, 1, rows}, {0, 0, padded}};
  product(
      columns, [&](int64_t k) { return x + k; }, padded, positions, x, padded, true,
      [&](int64_t tap, int count, int64_t lane, int vectors, const Compute* values) {
        for (int m = 0; m < count; ++m)
          for (int64_t n = 0; n < vectors * lanes; ++n)
            out[(tap + m) * padded + lane + n] = values[m * vectors * lanes + n];
      });
}

// ---- convolutions ----------------------------------------------------------------------------------------

// The example's channels of one group with their padding, [channels][needed[0]][needed[1]][needed[2]].
template <class T>
static void pad(const Convolution& c, const typename T::Storage* x, typename T::Compute* to) {
  using Compute = typename T::Compute;
  const int64_t plane = c.input[1] * c.input[2];
  for (int64_t channel = 0; channel < c.channels; ++channel, x += c.input[0] * plane)
    for (int64_t i = 0; i < c.needed[0]; ++i)
      for (int64_t j = 0; j < c.needed[1]; ++j, to += c.needed[2]) {
        const int64_t from_i = i - c.padding[0], from_j = j - c.padding[1];
        const bool inside = from_i >= 0 && from_i < c.input[0] && from_j >= 0 && from_j < c.input[1];
        const int64_t begin = inside ? smaller(c.padding[2], c.needed[2]) : c.needed[2];
        const int64_t end = inside ? smaller(c.padding[2] + c.input[2], c.needed[2]) : c.needed[2];
        const typename T::Storage* row = x + from_i * plane + from_j * c.input[2] - c.padding[2];
        for (int64_t k = 0; k < begin; ++k) to[k] = 0;
#pragma omp simd
        for (int64_t k = begin; k < end; ++k) to[k] = T::load(row[k]);
        for (int64_t k = larger(begin, end); k < c.needed[2]; ++k) to[k] = Compute(0);
      }
}

template <class Compute>
static double bias_squares(const Compute* d, int64_t positions, int64_t padded) {
  using Value = typename Vector<Compute>::Value;
  using Unaligned = typename Vector<Compute>::Unaligned;
  constexpr int64_t lanes = Vector<Compute>::lanes, block = 64;
  double total = 0;
  for (int64_t lane = 0; lane < padded; lane += lanes) {
    double sums[lanes] = {};
    for (int64_t begin = 0; begin < positions; begin += block) {
      Value sum = {};
      for (int64_t t = begin; t < smaller(begin + block, positions); ++t)
        sum += *(const Unaligned*)(d + t * padded + lane);
      for (int64_t k = 0; k < lanes; ++k) sums[k] += static_cast<double>(sum[k]);
    }
    for (int64_t k = 0; k < lanes; ++k) total += sums[k] * sums[k];
  }
  return total;
}

// Where the sum of the products of inner products is so far below their diagonal, they cancelled, and the rounding of
// the inner products shows: the tiles of the gradient are taken instead.
constexpr double kCancellation = 16;

template <class T>
static double direct(const Convolution& c, const typename T::Storage* x, const typename T::Storage* d,
                     typename T::Compute* scratch, double* bias) {
  using Compute = typename T::Compute;
  constexpr int64_t lanes = Vector<Compute>::lanes;
  const int64_t positions = c.output[0] * c.output[1] * c.output[2];
  const int64_t padded = (c.outputs + lanes - 1) / lanes * lanes;
  const int64_t row = c.needed[2], plane = c.needed[1] * row, volume = c.needed[0] * plane;
  const int64_t kernel = c.kernel[0] * c.kernel[1] * c.kernel[2];
  Compute* packed = scratch;
  Compute* input = scratch + positions * padded;
  pack_transposed<T>(d, c.outputs, positions, packed, padded);
  pad<T>(c, x, input);
  *bias += bias_squares(packed, positions, padded);
  const Positions walk = {{c.output[0], c.output[1], c.output[2]},
                          {c.stride[0] * plane, c.stride[1] * row, c.stride[2]}};
  const auto tap_at = [&](int64_t tap) {
    const int64_t channel = tap / kernel, k = tap % kernel;
    const int64_t k2 = k % c.kernel[2], k1 = k / c.kernel[2] % c.kernel[1], k0 = k / c.kernel[2] / c.kernel[1];
    return input + channel * volume + k0 * c.dilation[0] * plane + k1 * c.dilation[1] * row + k2 * c.dilation[2];
  };
  double total = 0;
  product(c.channels * kernel, tap_at, padded, walk, (const Compute*)packed, padded, false,
          [&](int64_t, int count, int64_t, int vectors, const Compute* values) {
            total += sum_of_squares(values, count * vectors * lanes);
          });
  return total;
}

// The outputs of one dimension that see the input through tap k: [begin, end).
struct Range {
  int64_t begin, end;
};

static inline Range valid(const Convolution& c, int dim, int64_t k) {
  const int64_t shift = c.padding[dim] - k * c.dilation[dim];  // input = output * stride - shift
  const int64_t stride = c.stride[dim];
  const int64_t begin = shift > 0 ? (shift + stride - 1) / stride : 0;
  const int64_t last = c.input[dim] - 1 + shift;
  const int64_t end = last < 0 ? 0 : smaller(c.output[dim], last / stride + 1);
  return {begin, larger(begin, end)};
}

template <class T>
static double by_gram(const Convolution& c, const typename T::Storage* x, const typename T::Storage* d,
                      typename T::Compute* scratch, double* bias) {
  using Compute = typename T::Compute;
  constexpr int64_t lanes = Vector<Compute>::lanes;
  const int64_t pixels = c.input[0] * c.input[1] * c.input[2];
  const int64_t positions = c.output[0] * c.output[1] * c.output[2];
  const int64_t x_padded = (pixels + lanes - 1) / lanes * lanes, d_padded = (positions + lanes - 1) / lanes * lanes;
  Compute* x_rows = scratch;
  Compute* d_rows = x_rows + c.channels * x_padded;
  Compute* x_gram = d_rows + c.outputs * d_padded;
  Compute* d_gram = x_gram + pixels * x_padded;
  pack<T>(x, c.channels, pixels, x_rows, x_padded);
  pack<T>(d, c.outputs, positions, d_rows, d_padded);
  gram(x_rows, c.channels, pixels, x_padded, x_gram);
  gram(d_rows, c.outputs, positions, d_padded, d_gram);
  double bias_sum = 0;
  for (int64_t o = 0; o < c.outputs; ++o) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t t = 0; t < positions; ++t) sum += static_cast<double>(d_rows[o * d_padded + t]);
    bias_sum += sum * sum;
  }

  double diagonal = 0, above = 0;
  const int64_t plane = c.input[1] * c.input[2];
  for (int64_t k0 = 0; k0 < c.kernel[0]; ++k0)
    for (int64_t k1 = 0; k1 < c.kernel[1]; ++k1)
      for (int64_t k2 = 0; k2 < c.kernel[2]; ++k2) {
        const Range r0 = valid(c, 0, k0), r1 = valid(c, 1, k1), r2 = valid(c, 2, k2);
        const int64_t s0 = k0 * c.dilation[0] - c.padding[0], s1 = k1 * c.dilation[1] - c.padding[1],
                      s2 = k2 * c.dilation[2] - c.padding[2], step = c.stride[2];
        // Where a row of outputs begins: among the positions and among the pixels.
        const auto position = [&](int64_t i, int64_t j) { return (i * c.output[1] + j) * c.output[2]; };
        const auto pixel = [&](int64_t i, int64_t j) {
          return (i * c.stride[0] + s0) * plane + (j * c.stride[1] + s1) * c.input[2] + s2;
        };
        for (int64_t i = r0.begin; i < r0.end; ++i)
          for (int64_t j = r1.begin; j < r1.end; ++j)
            for (int64_t k = r2.begin; k < r2.end; ++k) {
              const Compute* dg = d_gram + (position(i, j) + k) * d_padded;
              const Compute* xg = x_gram + (pixel(i, j) + k * step) * x_padded;
              diagonal += static_cast<double>(dg[position(i, j) + k]) * static_cast<double>(xg[pixel(i, j) + k * step]);
              Compute sum = 0;
              int64_t first = k + 1, j2 = j;
              for (int64_t i2 = i; i2 < r0.end; ++i2, j2 = r1.begin)
                for (; j2 < r1.end; ++j2, first = r2.begin) {
                  const Compute* d_row = dg + position(i2, j2);
                  const Compute* x_row = xg + pixel(i2, j2);
                  if (step == 1) {
#pragma omp simd reduction(+ : sum)
                    for (int64_t n = first; n < r2.end; ++n) sum += d_row[n] * x_row[n];
                  } else {
                    for (int64_t n = first; n < r2.end; ++n) sum += d_row[n] * x_row[n * step];
                  }
                }
              above += static_cast<double>(sum);
            }
      }
  const double total = diagonal + 2 * above;
  if (total * kCancellation < diagonal) return direct<T>(c, x, d, scratch, bias);
  *bias += bias_sum;
  return total;
}

}  // namespace

void grad_sqnorm_conv(Type type, const Convolution& c, bool use_gram, const void* x, const void* d, double* weight,
                      double* bias, void* scratch, int64_t begin, int64_t end) {
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    using Storage = typename T::Storage;
    auto* work = static_cast<typename T::Compute*>(scratch);
    const int64_t pixels = c.channels * c.input[0] * c.input[1] * c.input[2];
    const int64_t positions = c.outputs * c.output[0] * c.output[1] * c.output[2];
    for (int64_t i = begin; i < end; ++i) {
      double squares = 0, bias_sum = 0;
      for (int64_t g = i * c.groups; g < (i + 1) * c.groups; ++g) {
        const auto* input = static_cast<const Storage*>(x) + g * pixels;
        const auto* gradient = static_cast<const Storage*>(d) + g * positions;
        squares +=
            use_gram ? by_gram<T>(c, input, gradient, work, &bias_sum) : direct<T>(c, input, gradient, work, &bias_sum);
      }
      weight[i] = squares;
      bias[i] = bias_sum;
    }
  });
}

void channel_products(Type type, const void* a, const void* d, const void* center, int64_t channels, int64_t width,
                      double* products, double* sums, int64_t begin, int64_t end) {
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    using Storage = typename T::Storage;
    for (int64_t i = begin; i < end; ++i) {
      const auto middle = T::load(static_cast<const Storage*>(center)[i % channels]);
      const ChannelSums found =
          channel_sums<T>(static_cast<const Storage*>(a) + i * width, static_cast<const Storage*>(d) + i * width,
                          middle, width, Ungated<T>{});
      products[i] = found.products;
      sums[i] = found.sums;
    }
  });
}

void grad_sqnorm_linear(Type type, int64_t positions, int64_t inputs, int64_t outputs, bool use_gram, const void* a,
                        const void* d, double* weight, void* scratch, int64_t begin, int64_t end) {
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    using Storage = typename T::Storage;
    using Compute = typename T::Compute;
    constexpr int64_t lanes = Vector<Compute>::lanes;
    auto* first = static_cast<Compute*>(scratch);
    for (int64_t i = begin; i < end; ++i) {
      const auto* x = static_cast<const Storage*>(a) + i * positions * inputs;
      const auto* y = static_cast<const Storage*>(d) + i * positions * outputs;
      double total = 0, diagonal = 0;
      if (use_gram) {
        const int64_t padded = (positions + lanes - 1) / lanes * lanes;
        Compute* second = first + larger(inputs, outputs) * padded;
        Compute* third = second + positions * padded;
        pack_transposed<T>(x, positions, inputs, first, padded);
        gram(first, inputs, positions, padded, second);
        pack_transposed<T>(y, positions, outputs, first, padded);
        gram(first, outputs, positions, padded, third);
        for (int64_t t = 0; t < positions; ++t) {
          Compute sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t s = t + 1; s < positions; ++s) sum += second[t * padded + s] * third[t * padded + s];
          total += 2 * static_cast<double>(sum);
          diagonal += static_cast<double>(second[t * padded + t]) * static_cast<double>(third[t * padded + t]);
        }
        total += diagonal;
      }
      if (!use_gram || total * kCancellation < diagonal) {
        const int64_t padded = (outputs + lanes - 1) / lanes * lanes;
        Compute* second = first + positions * padded;
        pack<T>(y, positions, outputs, first, padded);
        pack<T>(x, positions, inputs, second, inputs);
        const Positions walk = {{1, 1, positions}, {0, 0, inputs}};
        total = 0;
        product(
            inputs, [&](int64_t k) { return (const Compute*)second + k; }, padded, walk, (const Compute*)first, padded,
            false,
            [&](int64_t, int count, int64_t, int vectors, const Compute* values) {
              total += sum_of_squares(values, count * vectors * lanes);
            });
      }
      weight[i] = total;
    }
  });
}

}  // namespace fastfisher::FASTFISHER_SIMD

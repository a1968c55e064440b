// Cross-entropy against labels drawn from the softmax itself, with its gradient, in one visit to each row.
//
// At the least, the logits are read once from memory and the gradient is written once. A row of up to one tile
// (1,024 columns) lives in an L1 buffer: maximum, exponentials and their sum, the draw; its gradient is written
// while the next row's exponentials are computed, so that memory and arithmetic overlap. A longer row is read tile by
// tile, keeping each tile's maximum and sum, then read again (from L2, where it still lies) to write the gradient. The
// exponential is computed twice there: it costs less than a cycle per element, storing it and reading it back costs as
// much cache traffic as the row itself.
//
// The draw is an inverse CDF with two uniforms: u0 picks a tile by the tiles' sums, u1 an element inside it.
// One 32-bit uniform per decision reaches every class of a 262,144-class row; a Gumbel argmax would need a
// random number per logit.
#include "philox_calls.h"
#include "simd.h"

namespace fastfisher::FASTFISHER_SIMD {
namespace {

constexpr int64_t kMaxTiles = kMaxColumns / kTile;

// The search inside a tile goes by chunks of 256, whose sums cost one addition per vector to keep.
constexpr int64_t kChunk = 256;

template <class Value>
static inline Value square_root(Value x) {
  constexpr int lanes = sizeof(Value) / sizeof(x[0]);
#pragma omp simd
  for (int k = 0; k < lanes; ++k) x[k] = sizeof(x[0]) == 4 ? __builtin_sqrtf(x[k]) : __builtin_sqrt(x[k]);
  return x;
}

template <class T>
struct Row {
  using Storage = typename T::Storage;
  using Compute = typename T::Compute;
  using Value = typename Vector<Compute>::Value;
  static constexpr int64_t kLanes = Vector<Compute>::lanes;

  alignas(64) Compute buffers[2][kTile];  // exponentials of one tile, zero beyond its width, and of the row before
  Compute* e = buffers[0];
  double chunk_sum[kTile / kChunk];
  double tile_sum[kMaxTiles];
  Compute tile_max[kMaxTiles];

  // The vector of a tile at column j, with -inf beyond the tile's width.
  static Value load(const Storage* x, int64_t j, int64_t width) {
    return j + kLanes <= width ? Value(T::load(x + j)) : Value(load_some<T>(x + j, width - j));
  }

  static Compute maximum_of(const Storage* x, int64_t width) {
    Value running = load(x, 0, width);
    Value other = running;
    int64_t j = kLanes;
    for (; j + 2 * kLanes <= width; j += 2 * kLanes) {
      running = maximum(Value(T::load(x + j)), running);
      other = maximum(Value(T::load(x + j + kLanes)), other);
    }
    for (; j < width; j += kLanes) running = maximum(load(x, j, width), running);
    return horizontal_maximum(maximum(running, other));
  }

  // A tile that is masked altogether has no maximum to subtract; against 0 its exponentials are 0.
  static Compute finite(Compute maximum) { return maximum == -kInfinity ? 0 : maximum; }

  static double sum_exp(const Storage* x, int64_t width, Compute reference) {
    Value running = {}, other = {};
    int64_t j = 0;
    for (; j + 2 * kLanes <= width; j += 2 * kLanes) {
      running += exp_nonpositive(T::load(x + j) - reference);
      other += exp_nonpositive(T::load(x + j + kLanes) - reference);
    }
    for (; j < width; j += kLanes) running += exp_nonpositive(load(x, j, width) - reference);
    return horizontal_sum(running + other);
  }

  // The gradient of a row that is still to be written: e * factor, less scale at the label.
  struct Pending {
    const Compute* e;
    Compute factor, scale;
    Storage* gradient = nullptr;
    int64_t columns, drawn;

    inline void write(int64_t j) const { T::store(gradient + j, *(const Value*)(e + j) * factor); }
    // What is left from column j on, and the label.
    inline void finish(int64_t j) const {
      if (j < columns) store_some<T>(gradient + j, *(const Value*)(e + j) * factor, columns - j);
      gradient[drawn] = T::store(e[drawn] * factor - scale);
    }
  };
  Pending pending;

  // Writes the row that is pending, if one is.
  void flush() {
    if (!pending.gradient) return;
    int64_t j = 0;
    for (; j + kLanes <= pending.columns; j += kLanes) pending.write(j);
    pending.finish(j);
    pending.gradient = nullptr;
  }

  // Fills e and the chunks' sums for one tile; returns the tile's sum. With `writing`, the pending row, of the same
  // width, is written in the same loop: its stores wait for memory while the exponentials keep the adders busy.
  template <bool writing = false>
  double exp_tile(const Storage* x, int64_t width, Compute reference) {
    double total = 0;
    for (int64_t c = 0; c * kChunk < width; ++c) {
      const int64_t stop = width < (c + 1) * kChunk ? width : (c + 1) * kChunk;
      Value running = {};
      int64_t j = c * kChunk;
      for (; j + kLanes <= stop; j += kLanes) {
        const Value value = exp_nonpositive(T::load(x + j) - reference);
        *(Value*)(e + j) = value;
        running += value;
        if (writing) pending.write(j);
      }
      if (j < stop) {
        const Value value = exp_nonpositive(load(x, j, width) - reference);
        *(Value*)(e + j) = value;
        running += value;
      }
      chunk_sum[c] = horizontal_sum(running);
      total += chunk_sum[c];
    }
    if (writing) {
      pending.finish(width - width % kLanes);
      pending.gradient = nullptr;
    }
    return total;
  }

  // The lane of `weights` in which before + their running sum passes target, and in `before` the sum up to it;
  // kLanes if there is none. Without branches: where a draw falls cannot be predicted, and this way the next row can
  // begin meanwhile.
  static inline int64_t locate(Value weights, double target, double& before) {
    const Value sums = running_sum(weights);
    const int64_t lane = count(sums <= static_cast<Compute>(target - before));
    alignas(64) Compute up_to[kLanes + 1];
    up_to[0] = 0;
    *(typename Vector<Compute>::Unaligned*)(up_to + 1) = sums;
    before += static_cast<double>(up_to[lane]);
    return lane;
  }

  // The first element of the tile in e whose running sum exceeds u * total: chunk, then vector, then element.
  // Only an element of positive weight can be returned; where rounding leaves nothing above the target, it is
  // the last such element.
  int64_t draw(int64_t width, double total, double u) const {
    const double target = u * total;
    double before = 0, running = 0;
    int64_t chunk = 0;
    const int64_t chunks = (width + kChunk - 1) / kChunk;
    for (int64_t c = 0; c < chunks; ++c) {
      running += chunk_sum[c];
      chunk += running <= target;
      before = running <= target ? running : before;
    }
    if (chunk == chunks) return last_positive(width);
    const int64_t start = chunk * kChunk, stop = width < start + kChunk ? width : start + kChunk;
    if (stop - start <= kLanes) return element_of(start, target, before);
    alignas(64) Compute sums[kChunk / kLanes] = {};
    for (int64_t j = start; j < stop; j += kLanes)
      sums[(j - start) / kLanes] = static_cast<Compute>(horizontal_sum(*(const Value*)(e + j)));
    int64_t vector = 0, lane = kLanes;
    for (; vector < kChunk / kLanes && lane == kLanes; vector += lane)
      lane = locate(*(const Value*)(sums + vector), target, before);
    const int64_t first = start + vector * kLanes;
    return lane == kLanes || first >= stop ? last_positive(stop) : element_of(first, target, before);
  }

  // The element drawn from the vector that begins at `first`. The lanes' running sums add up in different orders, so
  // one of weight 0, a masked class or a lane beyond the row, may pass the target by rounding where the one before does
  // not.
  int64_t element_of(int64_t first, double target, double before) const {
    const int64_t lane = locate(*(const Value*)(e + first), target, before);
    const int64_t drawn = first + (lane == kLanes ? kLanes - 1 : lane);
    return e[drawn] > 0 ? drawn : last_positive(drawn);
  }

  // The last element of positive weight before `end`. Needed only where rounding leaves no running sum above the
  // target.
  int64_t last_positive(int64_t end) const {
    int64_t j = end - 1;
    while (j > 0 && !(e[j] > 0)) --j;
    return j;
  }

  // Draws; writes the loss, the label and the gradient, the latter of a row of one tile with the next row or `flush`.
  // False for a row without a softmax.
  bool run(const Storage* x, int64_t columns, uint32_t tile_word, uint32_t element_word, Compute scale, Compute* nll,
           int64_t* label, Storage* gradient) {
    return columns <= kTile ? one_tile(x, columns, element_word, scale, nll, label, gradient)
                            : many_tiles(x, columns, tile_word, element_word, scale, nll, label, gradient);
  }

  bool one_tile(const Storage* x, int64_t columns, uint32_t element_word, Compute scale, Compute* nll, int64_t* label,
                Storage* gradient) {
    const Compute maximum = maximum_of(x, columns);
    e = e == buffers[0] ? buffers[1] : buffers[0];
    const double total =
        pending.gradient ? exp_tile<true>(x, columns, finite(maximum)) : exp_tile(x, columns, finite(maximum));
    if (!has_softmax(maximum, total)) return false;
    const int64_t drawn = draw(columns, total, uniform(element_word));
    const Compute logit = T::load(x[drawn]);
    pending = {e, static_cast<Compute>(static_cast<double>(scale) / total), scale, gradient, columns, drawn};
    *label = drawn;
    *nll = loss(maximum, total, logit);
    return true;
  }

  bool many_tiles(const Storage* x, int64_t columns, uint32_t tile_word, uint32_t element_word, Compute scale,
                  Compute* nll, int64_t* label, Storage* gradient) {
    const int64_t tiles = (columns + kTile - 1) / kTile;
    Compute maximum = -kInfinity;
    for (int64_t t = 0; t < tiles; ++t) {
      tile_max[t] = maximum_of(x + t * kTile, width(columns, t));
      tile_sum[t] = sum_exp(x + t * kTile, width(columns, t), finite(tile_max[t]));
      maximum = tile_max[t] > maximum ? tile_max[t] : maximum;
    }
    double total = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      // A masked tile's sum is 0, and -inf - maximum has exponential 0; a NaN in the sum stays.
      tile_sum[t] *= __builtin_exp(static_cast<double>(tile_max[t]) - static_cast<double>(maximum));
      total += tile_sum[t];
    }
    if (!has_softmax(maximum, total)) return false;

    const double target = uniform(tile_word) * total;
    double running = 0;
    int64_t chosen = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      if (tile_sum[t] > 0) chosen = t;
      running += tile_sum[t];
      if (running > target) break;
    }
    const int64_t chosen_width = width(columns, chosen);
    const double chosen_sum = exp_tile(x + chosen * kTile, chosen_width, finite(tile_max[chosen]));
    const int64_t drawn = chosen * kTile + draw(chosen_width, chosen_sum, uniform(element_word));
    const Compute logit = T::load(x[drawn]);

    const Compute factor = static_cast<Compute>(static_cast<double>(scale) / total);
    int64_t j = 0;
    for (; j + 2 * kLanes <= columns; j += 2 * kLanes) {
      const Value first = exp_nonpositive(T::load(x + j) - maximum) * factor;
      const Value second = exp_nonpositive(T::load(x + j + kLanes) - maximum) * factor;
      T::store(gradient + j, first);
      T::store(gradient + j + kLanes, second);
    }
    for (; j < columns; j += kLanes) {
      const Value last = exp_nonpositive(load(x, j, columns) - maximum) * factor;
      for (int64_t k = 0; k < kLanes && j + k < columns; ++k) gradient[j + k] = T::store(last[k]);
    }
    const Value at_label = exp_nonpositive(Value{} + (logit - maximum)) * factor;
    gradient[drawn] = T::store(at_label[0] - scale);
    *label = drawn;
    *nll = loss(maximum, total, logit);
    return true;
  }

  // Writes (sqrt(p) * e - p (sqrt(p) . e)) * scale, e the signs that the key has for the row. In a first pass every
  // tile's sums are against its own maximum, as in many_tiles; the root of an exponential scales by half the exponent.
  bool rademacher(const Storage* x, int64_t columns, Key key, uint64_t row, Compute scale, Storage* out) {
    const int64_t tiles = (columns + kTile - 1) / kTile;
    const uint64_t first_block = row * static_cast<uint64_t>((columns + 127) / 128);
    double root_sum[kMaxTiles];
    Compute maximum = -kInfinity;
    for (int64_t t = 0; t < tiles; ++t) {
      const Storage* tile = x + t * kTile;
      tile_max[t] = maximum_of(tile, width(columns, t));
      maximum = tile_max[t] > maximum ? tile_max[t] : maximum;
      Value sum = {}, roots = {};
      for_signs(key, first_block, t, width(columns, t), [&](int64_t j, Value signs) {
        const Value value = exp_nonpositive(load(tile, j, width(columns, t)) - finite(tile_max[t]));
        sum += value;
        roots += square_root(value) * signs;
      });
      tile_sum[t] = horizontal_sum(sum);
      root_sum[t] = horizontal_sum(roots);
    }
    double total = 0, dot = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      const double root = __builtin_exp((static_cast<double>(tile_max[t]) - static_cast<double>(maximum)) / 2);
      total += tile_sum[t] * root * root;
      dot += root_sum[t] * root;
    }
    if (!has_softmax(maximum, total)) return false;
    const Compute factor = static_cast<Compute>(1 / total);
    const Compute mean = static_cast<Compute>(dot / __builtin_sqrt(total));
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t stop = width(columns, t);
      for_signs(key, first_block, t, stop, [&](int64_t j, Value signs) {
        const Value p = exp_nonpositive(load(x + t * kTile, j, stop) - maximum) * factor;
        const Value value = (square_root(p) * signs - p * mean) * scale;
        Storage* target = out + t * kTile + j;
        if (j + kLanes <= stop) return T::store(target, value);
        for (int64_t k = 0; k < stop - j; ++k) target[k] = T::store(value[k]);
      });
    }
    return true;
  }

  // Calls f(column in the tile, signs of the lanes) for each vector of a tile.
  template <class Function>
  static void for_signs(Key key, uint64_t first_block, int64_t tile, int64_t width, Function f) {
    using Bits = typename Vector<Compute>::Bits;
    Bits lane;
    for (int64_t k = 0; k < kLanes; ++k) lane[k] = static_cast<uint32_t>(k);
    for (int64_t block = 0; block < width; block += 128) {
      const Words words = philox(key, first_block + static_cast<uint64_t>((tile * kTile + block) / 128));
      for (int64_t j = block; j < block + 128 && j < width; j += kLanes) {
        const uint32_t bits = words.w[(j - block) / 32] >> ((j - block) % 32);
        const Bits negative = ((Bits{} + bits) >> lane) << (sizeof(Compute) * 8 - 1);
        f(j, (Value)(negative | (Bits)(Value{} + Compute(1))));
      }
    }
  }

  static int64_t width(int64_t columns, int64_t t) {
    const int64_t rest = columns - t * kTile;
    return rest < kTile ? rest : kTile;
  }

  // NaN reaches the total through the exponential; +inf and an empty row show in the maximum.
  static bool has_softmax(Compute maximum, double total) {
    return maximum > -kInfinity && maximum < kInfinity && total == total;
  }

  static Compute loss(Compute maximum, double total, Compute logit) {
    return static_cast<Compute>(__builtin_log(total) + (static_cast<double>(maximum) - static_cast<double>(logit)));
  }
};

}  // namespace

int64_t rademacher_cotangent(Type type, const void* logits, int64_t columns, Key key, uint64_t first, double scale,
                             void* out, int64_t begin, int64_t end) {
  return dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    using Storage = typename T::Storage;
    Row<T> row;
    int64_t first_bad = -1;
    for (int64_t i = begin; i < end; ++i) {
      Storage* target = static_cast<Storage*>(out) + i * columns;
      if (row.rademacher(static_cast<const Storage*>(logits) + i * columns, columns, key,
                         first + static_cast<uint64_t>(i), static_cast<typename T::Compute>(scale), target))
        continue;
      for (int64_t j = 0; j < columns; ++j) target[j] = T::store(__builtin_nanf(""));
      if (first_bad < 0) first_bad = i;
    }
    return first_bad;
  });
}

int64_t sample_cross_entropy(Type type, const void* logits, int64_t columns, Key key, uint64_t first, double scale,
                             void* nll, int64_t* labels, void* dlogits, int64_t begin, int64_t end) {
  return dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    using Storage = typename T::Storage;
    using Compute = typename T::Compute;
    Row<T> row;
    int64_t first_bad = -1;
    constexpr int64_t block = 16;
    uint32_t tile_words[block], element_words[block];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = (i - begin) % block;
      if (k == 0) {  // the random words of the next rows, all lanes at once
#pragma omp simd
        for (int64_t row = 0; row < block; ++row) {
          const Words words = philox(key, first + static_cast<uint64_t>(i + row));
          tile_words[row] = words.w[0];
          element_words[row] = words.w[1];
        }
      }
      Storage* gradient = static_cast<Storage*>(dlogits) + i * columns;
      Compute* loss = static_cast<Compute*>(nll) + i;
      if (row.run(static_cast<const Storage*>(logits) + i * columns, columns, tile_words[k], element_words[k],
                  static_cast<Compute>(scale), loss, labels + i, gradient))
        continue;
      *loss = __builtin_nanf("");
      labels[i] = -1;
      for (int64_t j = 0; j < columns; ++j) gradient[j] = T::store(__builtin_nanf(""));
      if (first_bad < 0) first_bad = i;
    }
    row.flush();
    return first_bad;
  });
}

void softmax_hessian_product(Type type, const void* dlogits, const int64_t* labels, const void* vector, int64_t columns,
                             double scale, void* out, int64_t begin, int64_t end) {
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    using Storage = typename T::Storage;
    using Compute = typename T::Compute;
    for (int64_t i = begin; i < end; ++i) {
      const Storage* d = static_cast<const Storage*>(dlogits) + i * columns;
      const Storage* v = static_cast<const Storage*>(vector) + i * columns;
      Storage* result = static_cast<Storage*>(out) + i * columns;
      // With d = (p - onehot) scale:  scale (p . v) = d . v + scale v[label].
      double dot = 0;
      for (int64_t j = 0; j < columns; j += kTile) {
        const int64_t stop = columns < j + kTile ? columns : j + kTile;
        Compute partial = 0;
#pragma omp simd reduction(+ : partial)
        for (int64_t k = j; k < stop; ++k) partial += T::load(d[k]) * T::load(v[k]);
        dot += static_cast<double>(partial);
      }
      const int64_t label = labels[i];
      const double drawn = static_cast<double>(T::load(v[label]));
      const Compute mean = static_cast<Compute>(dot / scale + drawn);
      const Compute at_label = static_cast<Compute>((static_cast<double>(T::load(d[label])) + scale) * (drawn - mean));
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) result[j] = T::store(T::load(d[j]) * (T::load(v[j]) - mean));
      result[label] = T::store(at_label);
    }
  });
}

// ---- labels 0 and 1: every element of the logits is a row of its own ------------------------------------------------

namespace {

// The elements that sixteen Philox calls serve, a word each.
constexpr int64_t kGroup = 4 * kCalls;

// log(1 + t) for t from 0 to 1, to 1 ulp: t - t^2 / 2 + ..., a minimax polynomial whose error is 5e-9.
static inline Floats log1p_unit(Floats t) {
  Floats q = t * -3.244024701e-3f + 1.985145919e-2f;
  q = q * t - 5.695952848e-2f;
  q = q * t + 1.060365438e-1f;
  q = q * t - 1.530559212e-1f;
  q = q * t + 1.967593879e-1f;
  q = q * t - 2.495413423e-1f;
  q = q * t + 3.332996368e-1f;
  q = q * t - 4.999990165e-1f;
  return q * t * t + t;
}

// The same in float64: 2 atanh(s) with (1 + s) / (1 - s) = 1 + t, or half of it from sqrt(2) on, so that |s| <= 0.172;
// what is left out of the series is below 1e-17.
static inline Doubles log1p_unit(Doubles t) {
  const BitsOf<Doubles> large = less(Doubles{} + 0.41421356237309505, t);
  const Doubles s = select(large, t - 1.0, t) / select(large, t + 3.0, t + 2.0);
  const Doubles square = s * s;
  Doubles p = square * (1.0 / 21) + 1.0 / 19;
  p = p * square + 1.0 / 17;
  p = p * square + 1.0 / 15;
  p = p * square + 1.0 / 13;
  p = p * square + 1.0 / 11;
  p = p * square + 1.0 / 9;
  p = p * square + 1.0 / 7;
  p = p * square + 1.0 / 5;
  p = p * square + 1.0 / 3;
  const Doubles twice = s + s;
  return select(large, Doubles{} + 0.693147180559945309, Doubles{}) + (p * square * twice + twice);
}

// The words of a vector of elements as integers of its lanes' width, and those as numbers.
static inline void take(Integers words, int64_t, Integers& lanes) { lanes = words; }
static inline void take(Integers words, int64_t half, Longs& lanes) {
  typedef uint32_t Eight __attribute__((vector_size(32)));
  const Eight low = __builtin_shufflevector(words, words, 0, 1, 2, 3, 4, 5, 6, 7);
  const Eight high = __builtin_shufflevector(words, words, 8, 9, 10, 11, 12, 13, 14, 15);
  lanes = __builtin_convertvector(half == 0 ? low : high, Longs);
}
// The words plus 1/2 as numbers. With the exponent of 2^23, or 2^52, the last bit of a number counts the units.
static inline Floats numbers(Integers words) {
  const Floats high = (Floats)(words >> 16 | 0x4B000000u) - 8388608.0f;
  const Floats low = (Floats)((words & 0xFFFFu) | 0x4B000000u) - 8388607.5f;
  return high * 65536.0f + low;  // rounded once: the product and its terms are exact
}
static inline Doubles numbers(Longs words) { return (Doubles)(words | 0x4330000000000000u) - 4503599627370496.0 + 0.5; }

template <class T>
struct Bernoulli {
  using Storage = typename T::Storage;
  using Compute = typename T::Compute;
  using Value = typename Vector<Compute>::Value;
  using Bits = typename Vector<Compute>::Bits;
  static constexpr int64_t kLanes = Vector<Compute>::lanes;

  Key key;
  Compute scale;

  // One whole group. True where a logit is NaN: so are then its loss and gradient, and its label is -1.
  //
  // Of the two labels one has probability 1 / (1 + t), t = exp(-|z|), and the other, the rare one, t / (1 + t): nothing
  // is lost by subtracting. The same holds of the draw, for which a word and its complement are alike.
  bool run(uint64_t group, const Storage* logits, Compute* nll, Storage* labels, Storage* gradient) const {
    Integers words[4];
    philox_calls(key, group, words);
    Bits bad = {};
    for (int64_t j = 0; j < kGroup; j += kLanes) {
      const Value z = T::load(logits + j);
      const Bits negative = less(z, Value{});
      const Value size = select(negative, -z, z);
      const Value t = exp_far(-size);
      const Value common_p = Compute(1) / (t + Compute(1));
      const Value rare_p = t * common_p;
      Bits word;
      take(words[j / kCalls], j % kCalls / kLanes, word);
      word ^= ~negative & 0xFFFFFFFFu;
      const Bits rare = less(numbers(word), rare_p * Compute(4294967296.0));
      const Bits one = ~(negative ^ rare);
      const Value loss = log1p_unit(t) + (Value)(rare & (Bits)size);
      const Value amount = select(rare, common_p, rare_p) * scale;
      const Bits nan = ~less(-size, Value{} + 1);  // no number is above its size
      bad |= nan;
      Same<Compute>::Type::store(nll + j, loss);
      T::store(labels + j, select(nan, Value{} - 1, (Value)(one & (Bits)(Value{} + 1))));
      T::store(gradient + j, select(one, -amount, amount));
    }
    return any(bad);
  }

  // A group of which only the elements from `from` up to `to` are there, at these addresses.
  bool run_some(uint64_t group, int64_t from, int64_t to, const Storage* logits, Compute* nll, Storage* labels,
                Storage* gradient) const {
    Storage z[kGroup] = {}, drawn[kGroup], derivative[kGroup];
    Compute loss[kGroup];
    for (int64_t j = from; j < to; ++j) z[j] = logits[j - from];
    const bool bad = run(group, z, loss, drawn, derivative);
    for (int64_t j = from; j < to; ++j) {
      nll[j - from] = loss[j];
      labels[j - from] = drawn[j];
      gradient[j - from] = derivative[j];
    }
    return bad;
  }
};

}  // namespace

int64_t sample_binary_cross_entropy(Type type, const void* logits, Key key, uint64_t first, double scale, void* nll,
                                    void* labels, void* dlogits, int64_t begin, int64_t end) {
  return dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    using Storage = typename T::Storage;
    const auto* source = static_cast<const Storage*>(logits);
    auto* losses = static_cast<typename T::Compute*>(nll);
    auto *drawn = static_cast<Storage*>(labels), *gradient = static_cast<Storage*>(dlogits);
    const Bernoulli<T> bernoulli{key, static_cast<typename T::Compute>(scale)};
    int64_t first_bad = -1;
    for (int64_t j = begin; j < end;) {
      const uint64_t element = first + static_cast<uint64_t>(j);
      const int64_t from = static_cast<int64_t>(element % kGroup);
      const int64_t to = kGroup - from < end - j ? kGroup : from + end - j;
      const bool bad =
          to - from == kGroup
              ? bernoulli.run(element / kGroup, source + j, losses + j, drawn + j, gradient + j)
              : bernoulli.run_some(element / kGroup, from, to, source + j, losses + j, drawn + j, gradient + j);
      if (bad && first_bad < 0) {
        first_bad = j;
        while (losses[first_bad] == losses[first_bad]) ++first_bad;
      }
      j += to - from;
    }
    return first_bad;
  });
}

}  // namespace fastfisher::FASTFISHER_SIMD

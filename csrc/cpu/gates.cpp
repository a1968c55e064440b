// ReLU, leaky or not, and max-pool, with what their backward and their replay need: a ReLU's gates, one bit per element
// (1/32 of a float32 activation), and a max-pool's choices, 32 bits per output. At given gates either is a linear map,
// and so is its backward. Each function visits its input once.
#include "simd.h"

namespace fastfisher::FASTFISHER_SIMD {
namespace {
constexpr int64_t kBits = 32;

// What a closed gate makes of an element: 0 in a ReLU, a multiple in a leaky one. Open is x > 0, and of a ReLU NaN,
// which passes there, as in PyTorch.
template <class T>
struct Shut {
  typename T::Storage operator()(typename T::Storage) const { return typename T::Storage(0); }
  bool open(typename T::Compute x) const { return !(x <= 0); }
};
template <class T>
struct Leaking {
  typename T::Compute slope;
  typename T::Storage operator()(typename T::Storage x) const { return T::store(T::load(x) * slope); }
  bool open(typename T::Compute x) const { return x > 0; }
};

// Calls `run` with the type of the elements and what closed gates do.
template <class F>
void with_gates(Type type, const double* slope, F&& run) {
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    if (slope == nullptr)
      run(tag, Shut<T>{});
    else
      run(tag, Leaking<T>{static_cast<typename T::Compute>(*slope)});
  });
}

}  // namespace

void gate_relu(Type type, const void* x, int64_t numel, const double* slope, void* out, uint32_t* bits, int64_t begin,
               int64_t end) {
  with_gates(type, slope, [&](auto tag, auto closed) {
    using T = decltype(tag);
    using Storage = typename T::Storage;
    const auto* source = static_cast<const Storage*>(x);
    auto* target = static_cast<Storage*>(out);
    for (int64_t word = begin; word < end; ++word) {
      const int64_t first = word * kBits;
      uint32_t packed = 0;
      const auto gate = [&](int64_t k) {
        const Storage element = source[first + k];
        const bool open = closed.open(T::load(element));
        target[first + k] = open ? element : closed(element);
        packed |= static_cast<uint32_t>(open) << k;
      };
      if (first + kBits <= numel) {
#pragma omp simd reduction(| : packed)
        for (int k = 0; k < kBits; ++k) gate(k);
      } else {
        for (int k = 0; k < numel - first; ++k) gate(k);
      }
      bits[word] = packed;
    }
  });
}

void gate_apply(Type type, const void* x, int64_t numel, const uint32_t* bits, const double* slope, void* out,
                int64_t begin, int64_t end) {
  with_gates(type, slope, [&](auto tag, auto closed) {
    using Storage = typename decltype(tag)::Storage;
    const auto* source = static_cast<const Storage*>(x);
    auto* target = static_cast<Storage*>(out);
    for (int64_t word = begin; word < end; ++word) {
      const uint32_t packed = bits[word];
      const int64_t first = word * kBits;
      const auto gate = [&](int64_t k) {
        const Storage element = source[first + k];
        target[first + k] = (packed >> k) & 1u ? element : closed(element);
      };
      if (first + kBits <= numel) {
#pragma omp simd
        for (int k = 0; k < kBits; ++k) gate(k);
      } else {
        for (int k = 0; k < numel - first; ++k) gate(k);
      }
    }
  });
}

namespace {

// The largest element of one window and its place in the plane: the first of equals; NaN spreads, as in PyTorch.
template <class T>
inline void pool_window(const typename T::Storage* x, int64_t width, int64_t first, const Pool& pool, bool gated,
                        typename T::Storage* value_out, int32_t* index_out) {
  auto largest = T::load(x[first]);
  int64_t chosen = first;
  for (int64_t i = 0; i < pool.height; ++i) {
    for (int64_t j = 0; j < pool.width; ++j) {
      const int64_t position = first + i * width + j;
      const auto value = T::load(x[position]);
      const bool larger = (value > largest) | (value != value);
      largest = larger ? value : largest;
      chosen = larger ? position : chosen;
    }
  }
  *value_out = T::store(largest);
  *index_out = gated && largest <= 0 ? -1 : static_cast<int32_t>(chosen);
}

inline Vector<float>::Value even(Vector<float>::Value a, Vector<float>::Value b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
inline Vector<float>::Value odd(Vector<float>::Value a, Vector<float>::Value b) {
  return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
inline Vector<double>::Value even(Vector<double>::Value a, Vector<double>::Value b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
}
inline Vector<double>::Value odd(Vector<double>::Value a, Vector<double>::Value b) {
  return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
}

// One plane of windows 2 x 2 side by side. A whole vector of outputs is written even where the row is shorter: what
// spills over is overwritten by the rows that follow, and the last outputs of the plane are made one by one.
template <class T>
inline void pool_plane_2x2(const typename T::Storage* x, int64_t height, int64_t width, bool gated,
                           typename T::Storage* values, int32_t* indices) {
  using Lanes = Vector<typename T::Compute>;
  using Value = typename Lanes::Value;
  using Places = decltype(Value{} > Value{});
  typedef int32_t Narrow __attribute__((vector_size(4 * Lanes::lanes), aligned(4)));
  const int64_t out_height = height / 2, out_width = width / 2;
  Places steps = {};
  for (int64_t k = 0; k < Lanes::lanes; ++k) steps[k] = 2 * k;
  for (int64_t row = 0; row < out_height; ++row) {
    for (int64_t column = 0; column < out_width; column += Lanes::lanes) {
      const int64_t first = 2 * (row * width + column), output = row * out_width + column;
      const bool inside = first + width + 2 * Lanes::lanes <= height * width;
      if (!inside || output + Lanes::lanes > out_height * out_width) {
        for (int64_t k = 0; k < Lanes::lanes && column + k < out_width; ++k)
          pool_window<T>(x, width, first + 2 * k, {2, 2, 2, 2}, gated, values + output + k, indices + output + k);
        continue;
      }
      const auto* top = x + first;
      const auto* bottom = top + width;
      const Value top_left = T::load(top), top_right = T::load(top + Lanes::lanes);
      const Value bottom_left = T::load(bottom), bottom_right = T::load(bottom + Lanes::lanes);
      Value largest = even(top_left, top_right);
      Places chosen = steps + static_cast<int32_t>(first);
      const auto challenge = [&](Value value, int64_t offset) {
        const Places larger = (value > largest) | (value != value);
        largest = larger ? value : largest;
        chosen = larger ? steps + static_cast<int32_t>(first + offset) : chosen;
      };
      challenge(odd(top_left, top_right), 1);
      challenge(even(bottom_left, bottom_right), width);
      challenge(odd(bottom_left, bottom_right), width + 1);
      if (gated) chosen |= largest <= 0;  // true is -1
      T::store(values + output, largest);
      *(Narrow*)(indices + output) = __builtin_convertvector(chosen, Narrow);
    }
  }
}

}  // namespace

void gate_max_pool(Type type, const void* x, int64_t height, int64_t width, const Pool& pool, bool gated, void* values,
                   int32_t* indices, int64_t begin, int64_t end) {
  const int64_t out_height = (height - pool.height) / pool.stride_height + 1;
  const int64_t out_width = (width - pool.width) / pool.stride_width + 1;
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    using Storage = typename T::Storage;
    for (int64_t plane = begin; plane < end; ++plane) {
      const auto* source = static_cast<const Storage*>(x) + plane * height * width;
      auto* target = static_cast<Storage*>(values) + plane * out_height * out_width;
      auto* index = indices + plane * out_height * out_width;
      if (pool.height == 2 && pool.width == 2 && pool.stride_height == 2 && pool.stride_width == 2) {
        pool_plane_2x2<T>(source, height, width, gated, target, index);
        continue;
      }
      for (int64_t row = 0; row < out_height; ++row)
        for (int64_t column = 0; column < out_width; ++column)
          pool_window<T>(source, width, row * pool.stride_height * width + column * pool.stride_width, pool, gated,
                         target + row * out_width + column, index + row * out_width + column);
    }
  });
}

namespace {

template <int64_t bytes>
struct Unsigned;
template <>
struct Unsigned<2> {
  using Type = uint16_t;
};
template <>
struct Unsigned<4> {
  using Type = uint32_t;
};
template <>
struct Unsigned<8> {
  using Type = uint64_t;
};

// x where index >= 0, else 0. By arithmetic on bits, since a branch would be mispredicted half of the time.
template <class Storage>
inline Storage where_open(Storage x, int32_t index) {
  using Bits = typename Unsigned<sizeof(Storage)>::Type;
  const Bits open = static_cast<Bits>(~(static_cast<int64_t>(index) >> 63));
  return __builtin_bit_cast(Storage, static_cast<Bits>(__builtin_bit_cast(Bits, x) & open));
}

// Index -1 reads or writes element 0, masked.
inline int64_t place_of(int32_t index) { return index & ~(index >> 31); }

}  // namespace

void gate_take(Type type, const void* x, int64_t elements, const int32_t* indices, int64_t outputs, void* out,
               int64_t begin, int64_t end) {
  dispatch(type, [&](auto tag) {
    using Storage = typename decltype(tag)::Storage;
    for (int64_t plane = begin; plane < end; ++plane) {
      const auto* source = static_cast<const Storage*>(x) + plane * elements;
      const auto* index = indices + plane * outputs;
      auto* target = static_cast<Storage*>(out) + plane * outputs;
      for (int64_t k = 0; k < outputs; ++k) target[k] = where_open(source[place_of(index[k])], index[k]);
    }
  });
}

void gate_put(Type type, const void* y, int64_t outputs, const int32_t* indices, int64_t elements, void* out,
              int64_t begin, int64_t end) {
  dispatch(type, [&](auto tag) {
    using T = decltype(tag);
    using Storage = typename T::Storage;
    for (int64_t plane = begin; plane < end; ++plane) {
      const auto* source = static_cast<const Storage*>(y) + plane * outputs;
      const auto* index = indices + plane * outputs;
      auto* target = static_cast<Storage*>(out) + plane * elements;
      for (int64_t j = 0; j < elements; ++j) target[j] = Storage(0);
      for (int64_t k = 0; k < outputs; ++k) {
        auto* place = target + place_of(index[k]);
        *place = T::store(T::load(*place) + T::load(where_open(source[k], index[k])));
      }
    }
  });
}

}  // namespace fastfisher::FASTFISHER_SIMD

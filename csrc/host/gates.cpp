// ReLU, leaky or not, and max-pool with the gates that they leave, and the maps at given gates.
#include "checks.h"

namespace fastfisher {
namespace {

// ---- gate_relu, gate_relu_ ------------------------------------------------------------------------------------------

// The slope below 0 of a leaky ReLU; null for a ReLU, whose value there is 0 whatever x is.
const double* slope_of(const std::optional<double>& negative_slope) {
  return negative_slope.has_value() ? &*negative_slope : nullptr;
}

// Writes the ReLU of x to out, which may be x, and returns its gates.
Tensor relu_into(const Tensor& x, const Tensor& out, const std::optional<double>& negative_slope) {
  check(x.is_contiguous(), "x: expected a contiguous tensor");
  const Type type = type_of(x, "x");
  const int64_t numel = x.numel(), words = words_for(numel);
  Tensor bits = empty({words}, ScalarType::Int);
  const void* source = read(x);
  void* target = write(out);
  auto* gates = write<uint32_t>(bits);
  const double* slope = slope_of(negative_slope);
  parallel_for(0, words, kGrain / 32, [&](int64_t begin, int64_t end) {
    kernels().gate_relu(type, source, numel, slope, target, gates, begin, end);
  });
  return bits;
}

std::tuple<Tensor, Tensor> gate_relu(const Tensor& x, std::optional<double> negative_slope) {
  Tensor out = torch::stable::empty_like(x);
  Tensor bits = relu_into(x, out, negative_slope);
  return {out, bits};
}

Tensor gate_relu_(const Tensor& x, std::optional<double> negative_slope) { return relu_into(x, x, negative_slope); }

OPERATOR(gate_relu, "(Tensor x, float? negative_slope=None) -> (Tensor out, Tensor bits)")
OPERATOR(gate_relu_, "(Tensor(a!) x, float? negative_slope=None) -> Tensor bits")

// ---- gate_apply -----------------------------------------------------------------------------------------------------

Tensor gate_apply(const Tensor& x, const Tensor& bits, std::optional<double> negative_slope) {
  check(x.is_contiguous(), "x: expected a contiguous tensor");
  const Type type = type_of(x, "x");
  const int64_t numel = x.numel();
  const auto* gates = gates_of(bits, numel);
  Tensor out = torch::stable::empty_like(x);
  const void* source = read(x);
  void* target = write(out);
  const double* slope = slope_of(negative_slope);
  parallel_for(0, words_for(numel), kGrain / 32, [&](int64_t begin, int64_t end) {
    kernels().gate_apply(type, source, numel, gates, slope, target, begin, end);
  });
  return out;
}

OPERATOR(gate_apply, "(Tensor x, Tensor bits, float? negative_slope=None) -> Tensor")

// ---- gate_max_pool --------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> gate_max_pool(const Tensor& x, int64_t height, int64_t width, int64_t stride_height,
                                         int64_t stride_width, bool gated) {
  check(x.dim() == 3 && x.is_contiguous(), "x: expected a contiguous tensor (planes, height, width)");
  check(height >= 1 && width >= 1 && stride_height >= 1 && stride_width >= 1,
        "height, width and strides: expected >= 1");
  const int64_t planes = x.size(0), rows = x.size(1), columns = x.size(2);
  check(rows >= height && columns >= width, "x: expected planes of at least ", height, " x ", width, ", got ", rows,
        " x ", columns);
  check(rows * columns <= INT32_MAX, "x: expected planes of at most 2^31 - 1 elements");
  const Type type = type_of(x, "x");
  const int64_t outputs = ((rows - height) / stride_height + 1) * ((columns - width) / stride_width + 1);
  Tensor values = empty({planes, outputs}, x.scalar_type());
  Tensor indices = empty({planes, outputs}, ScalarType::Int);
  const Pool pool{height, width, stride_height, stride_width};
  const void* source = read(x);
  void* target = write(values);
  auto* index = write<int32_t>(indices);
  parallel_for(0, planes, rows_per_task(rows * columns), [&](int64_t begin, int64_t end) {
    kernels().gate_max_pool(type, source, rows, columns, pool, gated, target, index, begin, end);
  });
  return {values, indices};
}

OPERATOR(gate_max_pool,
         "(Tensor x, int height, int width, int stride_height, int stride_width, bool gated) -> "
         "(Tensor values, Tensor indices)")

// ---- gate_take, gate_put --------------------------------------------------------------------------------------------

// Checks x[planes, width] and indices[planes, outputs], both contiguous, every index in [-1, elements).
void check_planes(const Tensor& x, const char* name, const Tensor& indices, int64_t elements) {
  check(x.dim() == 2 && x.is_contiguous(), name, ": expected a contiguous tensor (planes, elements)");
  check(indices.dim() == 2 && indices.size(0) == x.size(0) && indices.scalar_type() == ScalarType::Int &&
            indices.is_contiguous(),
        "indices: expected a contiguous int32 tensor (planes, outputs) with ", x.size(0), " planes");
  const auto* index = read<int32_t>(indices);
  const int64_t numel = indices.numel();
  uint32_t largest = 0;  // of index + 1: as unsigned numbers, those below -1 are large
  for (int64_t k = 0; k < numel; ++k) largest = std::max(largest, static_cast<uint32_t>(index[k]) + 1u);
  check(largest <= static_cast<uint64_t>(elements), "indices: expected -1 to ", elements - 1);
}

Tensor gate_take(const Tensor& x, const Tensor& indices) {
  const Type type = type_of(x, "x");
  check_planes(x, "x", indices, x.size(1));
  const int64_t planes = x.size(0), elements = x.size(1), outputs = indices.size(1);
  Tensor out = empty({planes, outputs}, x.scalar_type());
  const void* source = read(x);
  const auto* index = read<int32_t>(indices);
  void* target = write(out);
  parallel_for(0, planes, rows_per_task(elements), [&](int64_t begin, int64_t end) {
    kernels().gate_take(type, source, elements, index, outputs, target, begin, end);
  });
  return out;
}

Tensor gate_put(const Tensor& y, const Tensor& indices, int64_t elements) {
  const Type type = type_of(y, "y");
  check_planes(y, "y", indices, elements);
  check(y.size(1) == indices.size(1), "y and indices: expected one shape");
  const int64_t planes = y.size(0), outputs = y.size(1);
  Tensor out = empty({planes, elements}, y.scalar_type());
  const void* source = read(y);
  const auto* index = read<int32_t>(indices);
  void* target = write(out);
  parallel_for(0, planes, rows_per_task(elements), [&](int64_t begin, int64_t end) {
    kernels().gate_put(type, source, outputs, index, elements, target, begin, end);
  });
  return out;
}

OPERATOR(gate_take, "(Tensor x, Tensor indices) -> Tensor")
OPERATOR(gate_put, "(Tensor y, Tensor indices, int elements) -> Tensor")

}  // namespace
}  // namespace fastfisher

// The schema of every operator (the one list) and the CPU registrations: shapes and dtypes are checked here,
// the range is split over torch's thread pool, and the kernels in csrc/cpu see raw pointers.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"

namespace {

using fastfisher::kernels;
using fastfisher::Key;
using fastfisher::Type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The elements that are worth a task of their own.
constexpr int64_t kGrain = 1 << 14;

template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

Type type_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Type::f32;
    case ScalarType::Double:
      return Type::f64;
    case ScalarType::BFloat16:
      return Type::bf16;
    case ScalarType::Half:
      return Type::f16;
    default:
      check(false, name, ": expected float32, float64, bfloat16 or float16, got ",
            torch::headeronly::toString(tensor.scalar_type()));
      return Type::f32;
  }
}

Key key_of(const Tensor& key) {
  check(key.scalar_type() == ScalarType::Long && key.numel() == 2 && key.is_contiguous(),
        "key: expected a contiguous int64 tensor of 2 elements (seed, offset)");
  const auto* words = static_cast<const int64_t*>(key.const_data_ptr());
  return {static_cast<uint64_t>(words[0]), static_cast<uint64_t>(words[1])};
}

void check_same(const Tensor& a, const char* a_name, const Tensor& b, const char* b_name) {
  check(a.numel() == b.numel() && a.scalar_type() == b.scalar_type(), a_name, " and ", b_name,
        ": expected the same size and dtype, got ", a.numel(), " ", torch::headeronly::toString(a.scalar_type()),
        " and ", b.numel(), " ", torch::headeronly::toString(b.scalar_type()));
}

// An uninitialised contiguous CPU tensor, straight from the C shim: the dispatcher's new_empty costs a
// microsecond more, which counts at 128 rows of 10. STABLE_TORCH_ERROR_CODE_CHECK came with torch 2.13; for the
// version that CMakeLists.txt targets it is this macro, which every torch from 2.11 on has.
Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t strides[2] = {1, 1};
  if (sizes.size() == 2) strides[0] = std::max<int64_t>(1, sizes.begin()[1]);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// The tensor itself where it is contiguous already: asking the dispatcher would cost a microsecond here too.
Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

int64_t rows_per_task(int64_t columns) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns)); }

std::tuple<Tensor, Tensor, Tensor> sample_cross_entropy(const Tensor& logits, const Tensor& key, double scale,
                                                        int64_t first) {
  check(logits.dim() == 2, "logits: expected 2 dimensions (N, C), got ", logits.dim());
  const int64_t rows = logits.size(0), columns = logits.size(1);
  check(columns >= 1 && columns <= fastfisher::kMaxColumns, "logits: expected 1 to ", fastfisher::kMaxColumns,
        " classes, got ", columns);
  check(scale != 0, "scale: expected a number other than 0");
  const Type type = type_of(logits, "logits");
  const Key seed = key_of(key);
  const Tensor x = dense(logits);
  const auto loss_type = type == Type::f64 ? ScalarType::Double : ScalarType::Float;
  Tensor nll = empty({rows}, loss_type);
  Tensor labels = empty({rows}, ScalarType::Long);
  Tensor dlogits = empty({rows, columns}, x.scalar_type());

  const void* source = x.const_data_ptr();
  void* nll_data = nll.mutable_data_ptr();
  auto* label_data = static_cast<int64_t*>(labels.mutable_data_ptr());
  void* gradient = dlogits.mutable_data_ptr();
  std::atomic<int64_t> first_bad{rows};
  torch::stable::parallel_for(0, rows, rows_per_task(columns), [&](int64_t begin, int64_t end) {
    const int64_t bad = kernels().sample_cross_entropy(type, source, columns, seed, static_cast<uint64_t>(first), scale,
                                                       nll_data, label_data, gradient, begin, end);
    if (bad < 0) return;
    int64_t seen = first_bad.load();
    while (bad < seen && !first_bad.compare_exchange_weak(seen, bad)) {
    }
  });
  check(first_bad.load() == rows, "logits: row ", first_bad.load(),
        " has no softmax (it holds NaN or +inf, or nothing above -inf)");
  return {nll, labels, dlogits};
}

Tensor softmax_hessian_product(const Tensor& dlogits, const Tensor& labels, const Tensor& vector, double scale) {
  check(dlogits.dim() == 2, "dlogits: expected 2 dimensions (N, C), got ", dlogits.dim());
  check_same(dlogits, "dlogits", vector, "vector");
  check(labels.scalar_type() == ScalarType::Long && labels.numel() == dlogits.size(0),
        "labels: expected one int64 label per row");
  const Type type = type_of(dlogits, "dlogits");
  const int64_t rows = dlogits.size(0), columns = dlogits.size(1);
  const Tensor d = dense(dlogits), v = dense(vector), l = dense(labels);
  const auto* label_data = static_cast<const int64_t*>(l.const_data_ptr());
  for (int64_t i = 0; i < rows; ++i)
    check(label_data[i] >= 0 && label_data[i] < columns, "labels: row ", i, " holds ", label_data[i],
          ", expected 0 to ", columns - 1);
  Tensor out = empty({rows, columns}, d.scalar_type());
  const void* d_data = d.const_data_ptr();
  const void* v_data = v.const_data_ptr();
  void* out_data = out.mutable_data_ptr();
  torch::stable::parallel_for(0, rows, rows_per_task(columns), [&](int64_t begin, int64_t end) {
    kernels().softmax_hessian_product(type, d_data, label_data, v_data, columns, scale, out_data, begin, end);
  });
  return out;
}

// Writes the ReLU of x to out, which may be x, and returns its gates.
Tensor relu_into(const Tensor& x, const Tensor& out) {
  check(x.is_contiguous(), "x: expected a contiguous tensor");
  const Type type = type_of(x, "x");
  const int64_t numel = x.numel(), words = (numel + 31) / 32;
  Tensor bits = empty({words}, ScalarType::Int);
  const void* source = x.const_data_ptr();
  void* target = out.mutable_data_ptr();
  auto* gates = static_cast<uint32_t*>(bits.mutable_data_ptr());
  torch::stable::parallel_for(0, words, kGrain / 32, [&](int64_t begin, int64_t end) {
    kernels().gate_relu(type, source, numel, target, gates, begin, end);
  });
  return bits;
}

std::tuple<Tensor, Tensor> gate_relu(const Tensor& x) {
  Tensor out = torch::stable::empty_like(x);
  Tensor bits = relu_into(x, out);
  return {out, bits};
}

Tensor gate_relu_(const Tensor& x) { return relu_into(x, x); }

const uint32_t* checked_bits(const Tensor& bits, int64_t numel) {
  const int64_t words = (numel + 31) / 32;
  check(bits.scalar_type() == ScalarType::Int && bits.numel() == words && bits.is_contiguous(),
        "bits: expected a contiguous int32 tensor of ", words, " words, got ", bits.numel());
  return static_cast<const uint32_t*>(bits.const_data_ptr());
}

Tensor gate_apply(const Tensor& x, const Tensor& bits) {
  check(x.is_contiguous(), "x: expected a contiguous tensor");
  const Type type = type_of(x, "x");
  const auto* gates = checked_bits(bits, x.numel());
  Tensor out = torch::stable::empty_like(x);
  const void* source = x.const_data_ptr();
  void* target = out.mutable_data_ptr();
  const int64_t numel = x.numel();
  torch::stable::parallel_for(0, (numel + 31) / 32, kGrain / 32, [&](int64_t begin, int64_t end) {
    kernels().gate_apply(type, source, numel, gates, target, begin, end);
  });
  return out;
}

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
  const fastfisher::Pool pool{height, width, stride_height, stride_width};
  const void* source = x.const_data_ptr();
  void* target = values.mutable_data_ptr();
  auto* index = static_cast<int32_t*>(indices.mutable_data_ptr());
  torch::stable::parallel_for(0, planes, rows_per_task(rows * columns), [&](int64_t begin, int64_t end) {
    kernels().gate_max_pool(type, source, rows, columns, pool, gated, target, index, begin, end);
  });
  return {values, indices};
}

// Checks x[planes, width] and indices[planes, outputs], both contiguous, every index in [-1, elements).
void check_planes(const Tensor& x, const char* name, const Tensor& indices, int64_t elements) {
  check(x.dim() == 2 && x.is_contiguous(), name, ": expected a contiguous tensor (planes, elements)");
  check(indices.dim() == 2 && indices.size(0) == x.size(0) && indices.scalar_type() == ScalarType::Int &&
            indices.is_contiguous(),
        "indices: expected a contiguous int32 tensor (planes, outputs) with ", x.size(0), " planes");
  const auto* index = static_cast<const int32_t*>(indices.const_data_ptr());
  const int64_t numel = indices.numel();
  uint32_t largest = 0;  // of index + 1: what lies below -1 is large
  for (int64_t k = 0; k < numel; ++k) largest = std::max(largest, static_cast<uint32_t>(index[k]) + 1u);
  check(largest <= static_cast<uint64_t>(elements), "indices: expected -1 to ", elements - 1);
}

Tensor gate_take(const Tensor& x, const Tensor& indices) {
  const Type type = type_of(x, "x");
  check_planes(x, "x", indices, x.size(1));
  const int64_t planes = x.size(0), elements = x.size(1), outputs = indices.size(1);
  Tensor out = empty({planes, outputs}, x.scalar_type());
  const void* source = x.const_data_ptr();
  const auto* index = static_cast<const int32_t*>(indices.const_data_ptr());
  void* target = out.mutable_data_ptr();
  torch::stable::parallel_for(0, planes, rows_per_task(elements), [&](int64_t begin, int64_t end) {
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
  const void* source = y.const_data_ptr();
  const auto* index = static_cast<const int32_t*>(indices.const_data_ptr());
  void* target = out.mutable_data_ptr();
  torch::stable::parallel_for(0, planes, rows_per_task(elements), [&](int64_t begin, int64_t end) {
    kernels().gate_put(type, source, outputs, index, elements, target, begin, end);
  });
  return out;
}

// A piece of one tensor of a list, so that one parallel loop covers them all.
struct Piece {
  size_t tensor;
  int64_t begin, end;
};

std::vector<Piece> pieces_of(const std::vector<Tensor>& tensors) {
  std::vector<Piece> pieces;
  for (size_t i = 0; i < tensors.size(); ++i)
    for (int64_t begin = 0; begin < tensors[i].numel(); begin += fastfisher::kReductionChunk)
      pieces.push_back({i, begin, std::min(tensors[i].numel(), begin + fastfisher::kReductionChunk)});
  return pieces;
}

// Sums what each piece gives, in the order of the pieces: the same bits for any number of threads.
template <class Function>
Tensor reduce(const std::vector<Piece>& pieces, Function piece_sum) {
  std::vector<double> partial(pieces.size());
  torch::stable::parallel_for(0, pieces.size(), 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) partial[p] = piece_sum(pieces[p]);
  });
  Tensor out = empty({}, ScalarType::Double);
  double sum = 0;
  for (const double value : partial) sum += value;
  *static_cast<double*>(out.mutable_data_ptr()) = sum;
  return out;
}

Tensor axpy_diff(const std::vector<Tensor>& out, const std::vector<Tensor>& a, const std::vector<Tensor>& b,
                 const Tensor& scale) {
  check(scale.numel() == 1 && scale.scalar_type() == ScalarType::Double, "scale: expected a float64 scalar");
  const double factor = *static_cast<const double*>(scale.const_data_ptr());
  check(out.size() == a.size() && out.size() == b.size(), "out, a and b: expected lists of one length, got ",
        out.size(), ", ", a.size(), " and ", b.size());
  // Everything is checked before anything is written.
  for (size_t i = 0; i < out.size(); ++i) {
    check_same(out[i], "out", a[i], "a");
    check_same(out[i], "out", b[i], "b");
    type_of(out[i], "out");
    check(out[i].is_contiguous() && a[i].is_contiguous() && b[i].is_contiguous(),
          "out, a and b: expected contiguous tensors, tensor ", i, " is not");
  }
  return reduce(pieces_of(out), [&](const Piece& piece) {
    const auto& [i, begin, end] = piece;
    return kernels().axpy_diff(type_of(out[i], "out"), out[i].mutable_data_ptr(), a[i].const_data_ptr(),
                               b[i].const_data_ptr(), factor, begin, end);
  });
}

Tensor sum_squares(const std::vector<Tensor>& tensors) {
  check(!tensors.empty(), "tensors: expected at least one tensor");
  std::vector<Tensor> parts;
  for (const auto& tensor : tensors) {
    type_of(tensor, "tensors");
    parts.push_back(dense(tensor));
  }
  return reduce(pieces_of(parts), [&](const Piece& piece) {
    const auto& [i, begin, end] = piece;
    return kernels().sum_squares(type_of(parts[i], "tensors"), parts[i].const_data_ptr(), begin, end);
  });
}

// Checks x[examples, channels, size] and per-channel tensors beside it.
fastfisher::BatchShape batch_shape(const Tensor& x, const std::optional<Tensor>& weight) {
  check(x.dim() == 3 && x.is_contiguous(), "x: expected a contiguous tensor (examples, channels, size)");
  check(
      !weight || (weight->is_contiguous() && weight->numel() == x.size(1) && weight->scalar_type() == x.scalar_type()),
      "weight: expected one contiguous value per channel, in the dtype of x");
  return {x.size(0), x.size(1), x.size(2)};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm(const Tensor& x, const std::optional<Tensor>& weight,
                                              const std::optional<Tensor>& bias, double eps) {
  const auto shape = batch_shape(x, weight);
  check(!bias || (bias->is_contiguous() && bias->numel() == shape.channels && bias->scalar_type() == x.scalar_type()),
        "bias: expected one contiguous value per channel, in the dtype of x");
  check(shape.examples * shape.size > 0, "x: expected at least one value per channel");
  const Type type = type_of(x, "x");
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = empty({shape.channels}, ScalarType::Double), variance = empty({shape.channels}, ScalarType::Double);
  const void* source = x.const_data_ptr();
  const void* weights = weight ? weight->const_data_ptr() : nullptr;
  const void* biases = bias ? bias->const_data_ptr() : nullptr;
  void* target = y.mutable_data_ptr();
  auto* means = static_cast<double*>(mean.mutable_data_ptr());
  auto* variances = static_cast<double*>(variance.mutable_data_ptr());
  torch::stable::parallel_for(
      0, shape.channels, rows_per_task(shape.examples * shape.size), [&](int64_t begin, int64_t end) {
        kernels().batch_norm(type, source, shape, weights, biases, eps, target, means, variances, begin, end);
      });
  return {y, mean, variance};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad, const std::optional<Tensor>& bits,
                                                       const Tensor& x, const std::optional<Tensor>& weight,
                                                       const Tensor& mean, const Tensor& variance, double eps) {
  const auto shape = batch_shape(x, weight);
  check_same(grad, "grad", x, "x");
  check(grad.is_contiguous(), "grad: expected a contiguous tensor");
  const uint32_t* gates = bits ? checked_bits(*bits, x.numel()) : nullptr;
  for (const Tensor* statistic : {&mean, &variance})
    check(statistic->is_contiguous() && statistic->numel() == shape.channels &&
              statistic->scalar_type() == ScalarType::Double,
          "mean and variance: expected one contiguous float64 value per channel");
  const Type type = type_of(x, "x");
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_weight = empty({shape.channels}, x.scalar_type()), grad_bias = empty({shape.channels}, x.scalar_type());
  const void *g = grad.const_data_ptr(), *source = x.const_data_ptr();
  const void* weights = weight ? weight->const_data_ptr() : nullptr;
  const auto* means = static_cast<const double*>(mean.const_data_ptr());
  const auto* variances = static_cast<const double*>(variance.const_data_ptr());
  void *x_out = grad_x.mutable_data_ptr(), *weight_out = grad_weight.mutable_data_ptr();
  void* bias_out = grad_bias.mutable_data_ptr();
  torch::stable::parallel_for(0, shape.channels, rows_per_task(shape.examples * shape.size),
                              [&](int64_t begin, int64_t end) {
                                kernels().batch_norm_backward(type, g, gates, source, shape, weights, means, variances,
                                                              eps, x_out, weight_out, bias_out, begin, end);
                              });
  return {grad_x, grad_weight, grad_bias};
}

Tensor rademacher_cotangent(const Tensor& logits, const Tensor& key, double scale, int64_t first) {
  check(logits.dim() == 2, "logits: expected 2 dimensions (N, C), got ", logits.dim());
  const int64_t rows = logits.size(0), columns = logits.size(1);
  check(columns >= 1 && columns <= fastfisher::kMaxColumns, "logits: expected 1 to ", fastfisher::kMaxColumns,
        " classes, got ", columns);
  const Type type = type_of(logits, "logits");
  const Key seed = key_of(key);
  const Tensor x = dense(logits);
  Tensor out = empty({rows, columns}, x.scalar_type());
  const void* source = x.const_data_ptr();
  void* target = out.mutable_data_ptr();
  std::atomic<int64_t> first_bad{rows};
  torch::stable::parallel_for(0, rows, rows_per_task(columns), [&](int64_t begin, int64_t end) {
    const int64_t bad = kernels().rademacher_cotangent(type, source, columns, seed, static_cast<uint64_t>(first), scale,
                                                       target, begin, end);
    if (bad < 0) return;
    int64_t seen = first_bad.load();
    while (bad < seen && !first_bad.compare_exchange_weak(seen, bad)) {
    }
  });
  check(first_bad.load() == rows, "logits: row ", first_bad.load(),
        " has no softmax (it holds NaN or +inf, or nothing above -inf)");
  return out;
}

// Work of one thread, in bytes, aligned to a cache line.
struct Scratch {
  explicit Scratch(int64_t elements, Type type) : bytes(64 + elements * (type == Type::f64 ? 8 : 4)) {}
  void* data() {
    const auto address = reinterpret_cast<uintptr_t>(bytes.data());
    return reinterpret_cast<void*>((address + 63) / 64 * 64);
  }
  std::vector<char> bytes;
};

int64_t to_vectors(int64_t elements) { return (elements + 15) / 16 * 16; }

Tensor grad_sqnorm_linear(const Tensor& a, const Tensor& d, bool gram) {
  check(a.dim() == 3 && d.dim() == 3, "a and d: expected 3 dimensions (N, positions, features), got ", a.dim(), " and ",
        d.dim());
  check(a.size(0) == d.size(0) && a.size(1) == d.size(1) && a.scalar_type() == d.scalar_type(),
        "a and d: expected the same examples, positions and dtype");
  const Type type = type_of(a, "a");
  const int64_t examples = a.size(0), positions = a.size(1), inputs = a.size(2), outputs = d.size(2);
  const Tensor x = dense(a), y = dense(d);
  Tensor weight = empty({examples}, ScalarType::Double);
  const void* x_data = x.const_data_ptr();
  const void* y_data = y.const_data_ptr();
  auto* out = static_cast<double*>(weight.mutable_data_ptr());
  const int64_t tiles = positions * (to_vectors(outputs) + inputs);  // the Gram form may fall back to them
  const int64_t pairs = to_vectors(positions) * (std::max(inputs, outputs) + 2 * positions);
  const int64_t work = gram ? std::max(pairs, tiles) : tiles;
  torch::stable::parallel_for(0, examples, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(work, type);
    kernels().grad_sqnorm_linear(type, positions, inputs, outputs, gram, x_data, y_data, out, scratch.data(), begin,
                                 end);
  });
  return weight;
}

std::tuple<Tensor, Tensor> grad_sqnorm_conv(const Tensor& a, const Tensor& d, const std::vector<int64_t>& kernel,
                                            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                            const std::vector<int64_t>& dilation, int64_t groups, bool gram) {
  const auto dims = static_cast<int64_t>(kernel.size());
  check(dims >= 1 && dims <= 3 && static_cast<int64_t>(stride.size()) == dims &&
            static_cast<int64_t>(padding.size()) == dims && static_cast<int64_t>(dilation.size()) == dims,
        "kernel, stride, padding and dilation: expected 1 to 3 numbers each, all as many");
  check(a.dim() == dims + 2 && d.dim() == dims + 2, "a and d: expected ", dims + 2, " dimensions, got ", a.dim(),
        " and ", d.dim());
  check(a.size(0) == d.size(0) && a.scalar_type() == d.scalar_type(), "a and d: expected the same examples and dtype");
  check(groups >= 1 && a.size(1) % groups == 0 && d.size(1) % groups == 0,
        "groups: expected a divisor of the channels, got ", groups);
  const Type type = type_of(a, "a");
  fastfisher::Convolution c{a.size(1) / groups, d.size(1) / groups, groups, {}, {}, {}, {}, {}, {}, {}};
  int64_t pixels = 1, positions = 1, volume = 1;
  for (int64_t k = 0; k < 3; ++k) {
    const int64_t dim = k - (3 - dims);
    const bool real = dim >= 0;
    c.input[k] = real ? a.size(2 + dim) : 1;
    c.output[k] = real ? d.size(2 + dim) : 1;
    c.kernel[k] = real ? kernel[dim] : 1;
    c.stride[k] = real ? stride[dim] : 1;
    c.padding[k] = real ? padding[dim] : 0;
    c.dilation[k] = real ? dilation[dim] : 1;
    c.needed[k] = (c.output[k] - 1) * c.stride[k] + (c.kernel[k] - 1) * c.dilation[k] + 1;
    check(c.kernel[k] >= 1 && c.stride[k] >= 1 && c.padding[k] >= 0 && c.dilation[k] >= 1 && c.output[k] >= 1 &&
              c.needed[k] <= c.input[k] + 2 * c.padding[k],
          "d: its size does not fit the input, kernel, stride, padding and dilation");
    pixels *= c.input[k];
    positions *= c.output[k];
    volume *= c.needed[k];
  }
  const Tensor x = dense(a), y = dense(d);
  const int64_t examples = a.size(0);
  Tensor weight = empty({examples}, ScalarType::Double), bias = empty({examples}, ScalarType::Double);
  const void* x_data = x.const_data_ptr();
  const void* y_data = y.const_data_ptr();
  auto* weight_data = static_cast<double*>(weight.mutable_data_ptr());
  auto* bias_data = static_cast<double*>(bias.mutable_data_ptr());
  const int64_t tiles = positions * to_vectors(c.outputs) + c.channels * volume;  // the Gram form may fall back to them
  const int64_t pairs = (c.channels + pixels) * to_vectors(pixels) + (c.outputs + positions) * to_vectors(positions);
  const int64_t work = gram ? std::max(pairs, tiles) : tiles;
  torch::stable::parallel_for(0, examples, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(work, type);
    kernels().grad_sqnorm_conv(type, c, gram, x_data, y_data, weight_data, bias_data, scratch.data(), begin, end);
  });
  return {weight, bias};
}

std::tuple<Tensor, Tensor> channel_products(const Tensor& a, const Tensor& d, const Tensor& center) {
  check(a.dim() == 3, "a: expected 3 dimensions (N, channels, positions), got ", a.dim());
  check_same(a, "a", d, "d");
  check(center.numel() == a.size(1) && center.scalar_type() == a.scalar_type(), "center: expected ", a.size(1),
        " numbers of the dtype of a, got ", center.numel());
  const Type type = type_of(a, "a");
  const int64_t rows = a.size(0) * a.size(1), channels = a.size(1), width = a.size(2);
  const Tensor x = dense(a), y = dense(d), middle = dense(center);
  Tensor products = empty({a.size(0), channels}, ScalarType::Double);
  Tensor sums = empty({a.size(0), channels}, ScalarType::Double);
  const void* x_data = x.const_data_ptr();
  const void* y_data = y.const_data_ptr();
  const void* middle_data = middle.const_data_ptr();
  auto* product_data = static_cast<double*>(products.mutable_data_ptr());
  auto* sum_data = static_cast<double*>(sums.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, rows_per_task(width), [&](int64_t begin, int64_t end) {
    kernels().channel_products(type, x_data, y_data, middle_data, channels, width, product_data, sum_data, begin, end);
  });
  return {products, sums};
}

fastfisher::Distribution distribution_of(const std::string& name) {
  check(name == "gaussian" || name == "rademacher", "distribution: expected \"gaussian\" or \"rademacher\", got \"",
        name, "\"");
  return name == "gaussian" ? fastfisher::Distribution::gaussian : fastfisher::Distribution::rademacher;
}

// The index over the whole list of each tensor's first element.
std::vector<uint64_t> offsets_of(const std::vector<Tensor>& tensors, int64_t first) {
  check(first >= 0, "first: expected 0 or more, got ", first);
  std::vector<uint64_t> offsets;
  uint64_t next = static_cast<uint64_t>(first);
  for (const auto& tensor : tensors) {
    offsets.push_back(next);
    next += static_cast<uint64_t>(tensor.numel());
  }
  return offsets;
}

Tensor probe_dot(const std::vector<Tensor>& tensors, const Tensor& key, std::string distribution, int64_t first) {
  const auto kind = distribution_of(distribution);
  const Key seed = key_of(key);
  const auto offsets = offsets_of(tensors, first);
  std::vector<Tensor> parts;
  for (const auto& tensor : tensors) {
    type_of(tensor, "tensors");
    parts.push_back(dense(tensor));
  }
  return reduce(pieces_of(parts), [&](const Piece& piece) {
    const auto& [i, begin, end] = piece;
    return kernels().probe_dot(type_of(parts[i], "tensors"), parts[i].const_data_ptr(), seed, kind, offsets[i], begin,
                               end);
  });
}

void perturb(const std::vector<Tensor>& out, const std::vector<Tensor>& tensors, const Tensor& key, double eps,
             std::string distribution, int64_t first) {
  const auto kind = distribution_of(distribution);
  const Key seed = key_of(key);
  check(tensors.empty() || tensors.size() == out.size(), "out and tensors: expected lists of one length, got ",
        out.size(), " and ", tensors.size());
  for (size_t i = 0; i < out.size(); ++i) {  // everything is checked before anything is written
    type_of(out[i], "out");
    check(out[i].is_contiguous(), "out: expected contiguous tensors, tensor ", i, " is not");
    if (tensors.empty()) continue;
    check_same(out[i], "out", tensors[i], "tensors");
    check(tensors[i].is_contiguous(), "tensors: expected contiguous tensors, tensor ", i, " is not");
  }
  const auto offsets = offsets_of(out, first);
  const auto pieces = pieces_of(out);
  torch::stable::parallel_for(0, pieces.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const auto& [i, from, to] = pieces[p];
      const void* source = tensors.empty() ? nullptr : tensors[i].const_data_ptr();
      kernels().perturb(type_of(out[i], "out"), out[i].mutable_data_ptr(), source, seed, eps, kind, offsets[i], from,
                        to);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(fastfisher, m) {
  m.def(
      "sample_cross_entropy(Tensor logits, Tensor key, float scale, int first=0) -> (Tensor nll, Tensor labels, Tensor "
      "dlogits)");
  m.def("softmax_hessian_product(Tensor dlogits, Tensor labels, Tensor vector, float scale) -> Tensor");
  m.def("gate_relu(Tensor x) -> (Tensor out, Tensor bits)");
  m.def("gate_relu_(Tensor(a!) x) -> Tensor bits");
  m.def("gate_apply(Tensor x, Tensor bits) -> Tensor");
  m.def(
      "gate_max_pool(Tensor x, int height, int width, int stride_height, int stride_width, bool gated) -> (Tensor "
      "values, Tensor indices)");
  m.def("gate_take(Tensor x, Tensor indices) -> Tensor");
  m.def("gate_put(Tensor y, Tensor indices, int elements) -> Tensor");
  m.def("axpy_diff(Tensor(a!)[] out, Tensor[] a, Tensor[] b, Tensor scale) -> Tensor");
  m.def("sum_squares(Tensor[] tensors) -> Tensor");
  m.def("batch_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor variance)");
  m.def(
      "batch_norm_backward(Tensor grad, Tensor? bits, Tensor x, Tensor? weight, Tensor mean, Tensor variance, float "
      "eps) -> (Tensor "
      "grad_x, Tensor grad_weight, Tensor grad_bias)");
  m.def("rademacher_cotangent(Tensor logits, Tensor key, float scale, int first=0) -> Tensor");
  m.def("grad_sqnorm_linear(Tensor a, Tensor d, bool gram) -> Tensor");
  m.def(
      "grad_sqnorm_conv(Tensor a, Tensor d, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, "
      "bool gram) -> (Tensor weight, Tensor bias)");
  m.def("channel_products(Tensor a, Tensor d, Tensor center) -> (Tensor products, Tensor sums)");
  m.def("probe_dot(Tensor[] tensors, Tensor key, str distribution, int first=0) -> Tensor");
  m.def("perturb(Tensor(a!)[] out, Tensor[] tensors, Tensor key, float eps, str distribution, int first=0) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastfisher, CPU, m) {
  m.impl("sample_cross_entropy", TORCH_BOX(&sample_cross_entropy));
  m.impl("softmax_hessian_product", TORCH_BOX(&softmax_hessian_product));
  m.impl("gate_relu", TORCH_BOX(&gate_relu));
  m.impl("gate_relu_", TORCH_BOX(&gate_relu_));
  m.impl("gate_apply", TORCH_BOX(&gate_apply));
  m.impl("gate_max_pool", TORCH_BOX(&gate_max_pool));
  m.impl("gate_take", TORCH_BOX(&gate_take));
  m.impl("gate_put", TORCH_BOX(&gate_put));
  m.impl("axpy_diff", TORCH_BOX(&axpy_diff));
  m.impl("sum_squares", TORCH_BOX(&sum_squares));
  m.impl("batch_norm", TORCH_BOX(&batch_norm));
  m.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward));
  m.impl("rademacher_cotangent", TORCH_BOX(&rademacher_cotangent));
  m.impl("grad_sqnorm_linear", TORCH_BOX(&grad_sqnorm_linear));
  m.impl("grad_sqnorm_conv", TORCH_BOX(&grad_sqnorm_conv));
  m.impl("channel_products", TORCH_BOX(&channel_products));
  m.impl("probe_dot", TORCH_BOX(&probe_dot));
  m.impl("perturb", TORCH_BOX(&perturb));
}

// Squared norms of per-example gradients, and the sums that a batch norm's gradients are made of.
#include "checks.h"

namespace fastfisher {
namespace {

// Memory that one thread works in, aligned to a cache line.
struct Scratch {
  explicit Scratch(int64_t elements, Type type) : bytes(64 + elements * (type == Type::f64 ? 8 : 4)) {}
  void* data() {
    const auto address = reinterpret_cast<uintptr_t>(bytes.data());
    return reinterpret_cast<void*>((address + 63) / 64 * 64);
  }
  std::vector<char> bytes;
};

int64_t to_vectors(int64_t elements) { return (elements + 15) / 16 * 16; }

// The elements of scratch that an example takes: the Gram form, of pairs of positions, may fall back to the tiles of
// the direct form.
int64_t scratch_for(bool gram, int64_t pairs, int64_t tiles) { return gram ? std::max(pairs, tiles) : tiles; }

// ---- grad_sqnorm_linear ---------------------------------------------------------------------------------------------

Tensor grad_sqnorm_linear(const Tensor& a, const Tensor& d, bool gram) {
  check(a.dim() == 3 && d.dim() == 3, "a and d: expected 3 dimensions (N, positions, features), got ", a.dim(), " and ",
        d.dim());
  check(a.size(0) == d.size(0) && a.size(1) == d.size(1) && a.scalar_type() == d.scalar_type(),
        "a and d: expected the same examples, positions and dtype");
  const Type type = type_of(a, "a");
  const int64_t examples = a.size(0), positions = a.size(1), inputs = a.size(2), outputs = d.size(2);
  const Tensor x = dense(a), y = dense(d);
  Tensor weight = empty({examples}, ScalarType::Double);
  const void *input = read(x), *gradient = read(y);
  auto* squares = write<double>(weight);
  const int64_t work = scratch_for(gram, to_vectors(positions) * (std::max(inputs, outputs) + 2 * positions),
                                   positions * (to_vectors(outputs) + inputs));
  parallel_for(0, examples, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(work, type);
    kernels().grad_sqnorm_linear(type, positions, inputs, outputs, gram, input, gradient, squares, scratch.data(),
                                 begin, end);
  });
  return weight;
}

OPERATOR(grad_sqnorm_linear, "(Tensor a, Tensor d, bool gram) -> Tensor")

// ---- grad_sqnorm_conv -----------------------------------------------------------------------------------------------

using Numbers = std::vector<int64_t>;

Convolution convolution_of(const Tensor& a, const Tensor& d, const Numbers& kernel, const Numbers& stride,
                           const Numbers& padding, const Numbers& dilation, int64_t groups) {
  const auto dims = static_cast<int64_t>(kernel.size());
  check(dims >= 1 && dims <= 3 && static_cast<int64_t>(stride.size()) == dims &&
            static_cast<int64_t>(padding.size()) == dims && static_cast<int64_t>(dilation.size()) == dims,
        "kernel, stride, padding and dilation: expected 1 to 3 numbers each, all as many");
  check(a.dim() == dims + 2 && d.dim() == dims + 2, "a and d: expected ", dims + 2, " dimensions, got ", a.dim(),
        " and ", d.dim());
  check(a.size(0) == d.size(0) && a.scalar_type() == d.scalar_type(), "a and d: expected the same examples and dtype");
  check(groups >= 1 && a.size(1) % groups == 0 && d.size(1) % groups == 0,
        "groups: expected a divisor of the channels, got ", groups);
  Convolution c = {};
  c.channels = a.size(1) / groups;
  c.outputs = d.size(1) / groups;
  c.groups = groups;
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
  }
  return c;
}

int64_t volume(const int64_t (&sizes)[3]) { return sizes[0] * sizes[1] * sizes[2]; }

std::tuple<Tensor, Tensor> grad_sqnorm_conv(const Tensor& a, const Tensor& d, const Numbers& kernel,
                                            const Numbers& stride, const Numbers& padding, const Numbers& dilation,
                                            int64_t groups, bool gram) {
  const Convolution c = convolution_of(a, d, kernel, stride, padding, dilation, groups);
  const Type type = type_of(a, "a");
  const Tensor x = dense(a), y = dense(d);
  const int64_t examples = a.size(0), pixels = volume(c.input), positions = volume(c.output);
  Tensor weight = empty({examples}, ScalarType::Double), bias = empty({examples}, ScalarType::Double);
  const void *input = read(x), *gradient = read(y);
  double *squares = write<double>(weight), *bias_squares = write<double>(bias);
  const int64_t work =
      scratch_for(gram, (c.channels + pixels) * to_vectors(pixels) + (c.outputs + positions) * to_vectors(positions),
                  positions * to_vectors(c.outputs) + c.channels * volume(c.needed));
  parallel_for(0, examples, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(work, type);
    kernels().grad_sqnorm_conv(type, c, gram, input, gradient, squares, bias_squares, scratch.data(), begin, end);
  });
  return {weight, bias};
}

OPERATOR(grad_sqnorm_conv,
         "(Tensor a, Tensor d, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, bool gram) -> "
         "(Tensor weight, Tensor bias)")

// ---- channel_products -----------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> channel_products(const Tensor& a, const Tensor& d, const Tensor& center) {
  check(a.dim() == 3, "a: expected 3 dimensions (N, channels, positions), got ", a.dim());
  check_same(a, "a", d, "d");
  check(center.numel() == a.size(1) && center.scalar_type() == a.scalar_type(), "center: expected ", a.size(1),
        " numbers of the dtype of a, got ", center.numel());
  const Type type = type_of(a, "a");
  const int64_t examples = a.size(0), channels = a.size(1), width = a.size(2);
  const Tensor x = dense(a), y = dense(d), middle = dense(center);
  Tensor products = empty({examples, channels}, ScalarType::Double);
  Tensor sums = empty({examples, channels}, ScalarType::Double);
  const void *input = read(x), *gradient = read(y), *means = read(middle);
  double *product = write<double>(products), *sum = write<double>(sums);
  parallel_for(0, examples * channels, rows_per_task(width), [&](int64_t begin, int64_t end) {
    kernels().channel_products(type, input, gradient, means, channels, width, product, sum, begin, end);
  });
  return {products, sums};
}

OPERATOR(channel_products, "(Tensor a, Tensor d, Tensor center) -> (Tensor products, Tensor sums)")

}  // namespace
}  // namespace fastfisher

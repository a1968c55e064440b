// Batch normalisation in train mode, of x[examples, channels, size].
#include "checks.h"

namespace fastfisher {
namespace {

const void* per_channel(const std::optional<Tensor>& values, const char* name, const Tensor& x) {
  if (!values) return nullptr;
  check(values->is_contiguous() && values->numel() == x.size(1) && values->scalar_type() == x.scalar_type(), name,
        ": expected one contiguous value per channel, in the dtype of x");
  return read(*values);
}

BatchShape shape_of(const Tensor& x) {
  check(x.dim() == 3 && x.is_contiguous(), "x: expected a contiguous tensor (examples, channels, size)");
  return {x.size(0), x.size(1), x.size(2)};
}

// ---- batch_norm -----------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> batch_norm(const Tensor& x, const std::optional<Tensor>& weight,
                                              const std::optional<Tensor>& bias, double eps) {
  const auto shape = shape_of(x);
  const void *weights = per_channel(weight, "weight", x), *biases = per_channel(bias, "bias", x);
  check(shape.examples * shape.size > 0, "x: expected at least one value per channel");
  const Type type = type_of(x, "x");
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = empty({shape.channels}, ScalarType::Double), variance = empty({shape.channels}, ScalarType::Double);
  const void* source = read(x);
  void* target = write(y);
  double *means = write<double>(mean), *variances = write<double>(variance);
  parallel_for(0, shape.channels, rows_per_task(shape.examples * shape.size), [&](int64_t begin, int64_t end) {
    kernels().batch_norm(type, source, shape, weights, biases, eps, target, means, variances, begin, end);
  });
  return {y, mean, variance};
}

OPERATOR(batch_norm, "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor variance)")

// ---- batch_norm_backward --------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad, const std::optional<Tensor>& bits,
                                                       const Tensor& x, const std::optional<Tensor>& weight,
                                                       const Tensor& mean, const Tensor& variance, double eps) {
  const auto shape = shape_of(x);
  const void* weights = per_channel(weight, "weight", x);
  check_same(grad, "grad", x, "x");
  check(grad.is_contiguous(), "grad: expected a contiguous tensor");
  const uint32_t* gates = bits ? gates_of(*bits, x.numel()) : nullptr;
  for (const Tensor* statistic : {&mean, &variance})
    check(statistic->is_contiguous() && statistic->numel() == shape.channels &&
              statistic->scalar_type() == ScalarType::Double,
          "mean and variance: expected one contiguous float64 value per channel");
  const Type type = type_of(x, "x");
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_weight = empty({shape.channels}, x.scalar_type()), grad_bias = empty({shape.channels}, x.scalar_type());
  const void *g = read(grad), *source = read(x);
  const double *means = read<double>(mean), *variances = read<double>(variance);
  void *x_out = write(grad_x), *weight_out = write(grad_weight), *bias_out = write(grad_bias);
  parallel_for(0, shape.channels, rows_per_task(shape.examples * shape.size), [&](int64_t begin, int64_t end) {
    kernels().batch_norm_backward(type, g, gates, source, shape, weights, means, variances, eps, x_out, weight_out,
                                  bias_out, begin, end);
  });
  return {grad_x, grad_weight, grad_bias};
}

OPERATOR(batch_norm_backward,
         "(Tensor grad, Tensor? bits, Tensor x, Tensor? weight, Tensor mean, Tensor variance, float eps) -> "
         "(Tensor grad_x, Tensor grad_weight, Tensor grad_bias)")

}  // namespace
}  // namespace fastfisher

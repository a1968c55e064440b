// Which of the compiled SIMD levels this processor runs. FASTFISHER_SIMD_LEVEL=baseline|avx2 in the
// environment lowers it (never raises it), so that tests can run every level.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace fastfisher {

#define FASTFISHER_LEVEL(LEVEL)                                                                               \
  Kernels {                                                                                                   \
    #LEVEL, LEVEL::sample_cross_entropy, LEVEL::softmax_hessian_product, LEVEL::gate_relu, LEVEL::gate_apply, \
        LEVEL::gate_max_pool, LEVEL::gate_take, LEVEL::gate_put, LEVEL::axpy_diff, LEVEL::sum_squares,        \
        LEVEL::batch_norm, LEVEL::batch_norm_backward, LEVEL::grad_sqnorm_conv, LEVEL::grad_sqnorm_linear,    \
        LEVEL::channel_products, LEVEL::rademacher_cotangent, LEVEL::probe_dot, LEVEL::perturb                \
  }

static Kernels choose() {
#if defined(__x86_64__)
  const char* limit = std::getenv("FASTFISHER_SIMD_LEVEL");
  const bool baseline_only = limit != nullptr && std::strcmp(limit, "baseline") == 0;
  const bool no_avx512 = baseline_only || (limit != nullptr && std::strcmp(limit, "avx2") == 0);
  __builtin_cpu_init();
  if (!no_avx512 && __builtin_cpu_supports("x86-64-v4")) return FASTFISHER_LEVEL(avx512);
  if (!baseline_only && __builtin_cpu_supports("x86-64-v3")) return FASTFISHER_LEVEL(avx2);
#endif
  return FASTFISHER_LEVEL(baseline);
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace fastfisher

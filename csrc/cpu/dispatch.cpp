// Which of the compiled SIMD levels this processor runs. FASTFISHER_SIMD_LEVEL=baseline|avx2 in the
// environment lowers it (never raises it), so that tests can run every level.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace fastfisher {

// See table.cpp, which is compiled once for each.
namespace baseline {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}

static const Kernels& choose() {
#if defined(__x86_64__)
  const char* limit = std::getenv("FASTFISHER_SIMD_LEVEL");
  const bool baseline_only = limit != nullptr && std::strcmp(limit, "baseline") == 0;
  const bool no_avx512 = baseline_only || (limit != nullptr && std::strcmp(limit, "avx2") == 0);
  __builtin_cpu_init();
  if (!no_avx512 && __builtin_cpu_supports("x86-64-v4")) return avx512::table;
  if (!baseline_only && __builtin_cpu_supports("x86-64-v3")) return avx2::table;
#endif
  return baseline::table;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace fastfisher

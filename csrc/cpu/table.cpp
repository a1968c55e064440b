// The kernels of the SIMD level that this file is compiled for, as one table.
#include "kernels.h"

namespace fastfisher::FASTFISHER_SIMD {

#define KERNEL(Result, name, ...) Result name(__VA_ARGS__);
#include "kernels.inc"
#undef KERNEL

#define TEXT(name) #name
#define TEXT_OF(macro) TEXT(macro)
extern const Kernels table = {
    TEXT_OF(FASTFISHER_SIMD),
#define KERNEL(Result, name, ...) name,
#include "kernels.inc"
#undef KERNEL
};

}  // namespace fastfisher::FASTFISHER_SIMD

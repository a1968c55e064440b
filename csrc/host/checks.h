// What the host functions of all families share: how an operator is registered, checked and given memory. A host
// function checks shapes and dtypes, splits the range over torch's thread pool, and hands raw pointers to the kernels
// in csrc/cpu.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/kernels.h"

// Declares the operator fastfisher::name with this schema, and registers the function `name` for CPU tensors.
#define OPERATOR(name, schema)                                                      \
  STABLE_TORCH_LIBRARY_FRAGMENT(fastfisher, library) { library.def(#name schema); } \
  STABLE_TORCH_LIBRARY_IMPL(fastfisher, CPU, library) { library.impl(#name, TORCH_BOX(&name)); }

namespace fastfisher {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

// ---- checks ---------------------------------------------------------------------------------------------------------

// Raises ValueError with the parts as its message unless the condition holds.
template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline Type type_of(const Tensor& tensor, const char* name) {
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

inline void check_same(const Tensor& a, const char* a_name, const Tensor& b, const char* b_name) {
  check(a.numel() == b.numel() && a.scalar_type() == b.scalar_type(), a_name, " and ", b_name,
        ": expected the same size and dtype, got ", a.numel(), " ", torch::headeronly::toString(a.scalar_type()),
        " and ", b.numel(), " ", torch::headeronly::toString(b.scalar_type()));
}

// ---- memory ---------------------------------------------------------------------------------------------------------

template <class T = void>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T = void>
T* write(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// An uninitialised contiguous CPU tensor, straight from the C shim: the dispatcher's new_empty costs a
// microsecond more, which counts at 128 rows of 10. STABLE_TORCH_ERROR_CODE_CHECK came with torch 2.13; for the
// version that CMakeLists.txt targets it is this macro, which every torch from 2.11 on has.
inline Tensor empty(int64_t dimensions, const int64_t* sizes, const int64_t* strides, ScalarType dtype) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dimensions, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t strides[2] = {1, 1};
  if (sizes.size() == 2) strides[0] = std::max<int64_t>(1, sizes.begin()[1]);
  return empty(static_cast<int64_t>(sizes.size()), sizes.begin(), strides, dtype);
}

// The same in the shape of another tensor.
inline Tensor empty_like(const Tensor& tensor, ScalarType dtype) {
  std::vector<int64_t> strides(tensor.dim());
  int64_t next = 1;
  for (int64_t d = tensor.dim() - 1; d >= 0; --d) {
    strides[d] = next;
    next *= std::max<int64_t>(1, tensor.size(d));
  }
  return empty(tensor.dim(), tensor.sizes().data(), strides.data(), dtype);
}

// The tensor itself where it is contiguous already: asking the dispatcher would cost a microsecond here too.
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// ---- arguments that several families take ---------------------------------------------------------------------------

inline Key key_of(const Tensor& key) {
  check(key.scalar_type() == ScalarType::Long && key.numel() == 2 && key.is_contiguous(),
        "key: expected a contiguous int64 tensor of 2 elements (seed, offset)");
  const auto* words = read<int64_t>(key);
  return {static_cast<uint64_t>(words[0]), static_cast<uint64_t>(words[1])};
}

// The 32-bit words that hold a gate for each of so many elements.
inline int64_t words_for(int64_t numel) { return (numel + 31) / 32; }

inline const uint32_t* gates_of(const Tensor& bits, int64_t numel) {
  const int64_t words = words_for(numel);
  check(bits.scalar_type() == ScalarType::Int && bits.numel() == words && bits.is_contiguous(),
        "bits: expected a contiguous int32 tensor of ", words, " words, got ", bits.numel());
  return read<uint32_t>(bits);
}

// ---- parallel loops -------------------------------------------------------------------------------------------------

// The elements that are worth a task of their own.
constexpr int64_t kGrain = 1 << 14;

inline int64_t rows_per_task(int64_t columns) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns)); }

}  // namespace fastfisher

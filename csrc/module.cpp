// Build facts, and the random stream as the host computes it, for the tests of every backend. No tensors
// here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cpu/kernels.h"

PYBIND11_MODULE(_native, m) {
  m.doc() = "Build facts of fastfisher and its reference random stream.";
  m.def("compiler", [] { return FASTFISHER_COMPILER; }, "The compiler that built the kernels.");
  m.def("simd_level", [] { return fastfisher::kernels().level; }, "The SIMD level in use on this processor.");
  m.def(
      "philox",
      [](uint64_t seed, uint64_t offset, uint64_t element) {
        const auto words = fastfisher::philox({seed, offset}, element);
        return std::array<uint32_t, 4>{words.w[0], words.w[1], words.w[2], words.w[3]};
      },
      pybind11::arg("seed"), pybind11::arg("offset"), pybind11::arg("element"),
      "The four 32-bit words of Philox4x32-10 at counter (element, offset) under the key seed.");
}

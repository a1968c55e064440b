"""Philox4x32-10 inside a kernel: the words of csrc/philox.h and of ``reference.philox``, bit for bit.

A key is two int64 on the device, (seed, offset). Kernels read it themselves: a key passed by value would stall the
stream to fetch it, and a CUDA graph would freeze it.
"""

import triton
import triton.language as tl


@triton.jit
def philox(key, elements):
    """The four words (uint32) at counter (element, offset) under the key (seed, offset) that ``key`` points to."""
    seed, offset = tl.load(key), tl.load(key + 1)
    element = elements.to(tl.int64)
    return tl.philox_impl(
        element.to(tl.uint32), (element >> 32).to(tl.uint32),
        (offset + tl.zeros_like(element)).to(tl.uint32), ((offset + tl.zeros_like(element)) >> 32).to(tl.uint32),
        seed.to(tl.uint32), (seed >> 32).to(tl.uint32),
    )  # fmt: skip


@triton.jit
def uniform(word, dtype: tl.constexpr):
    """A word as a number of [0, 1]; in float32 the last words round to 1."""
    return word.to(dtype) * 2.3283064365386963e-10  # 2⁻³²

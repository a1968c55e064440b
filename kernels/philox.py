"""Philox4x32-10 inside a kernel: the words of csrc/philox.h and of ``reference.philox``, bit for bit.

A key is two int64 on the device, (seed, offset). Kernels read it themselves: to pass it by value would stall the stream
to fetch it, and a CUDA graph would freeze it.
"""

import triton
import triton.language as tl


@triton.jit
def philox(key, elements):
    """The four words (uint32) at counters (element, offset) under the key (seed, offset) that ``key`` points to."""
    elements = elements.to(tl.int64)
    seed, offset = tl.load(key), tl.load(key + 1) + tl.zeros_like(elements)
    return tl.philox_impl(
        elements.to(tl.uint32),
        (elements >> 32).to(tl.uint32),
        offset.to(tl.uint32),
        (offset >> 32).to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )


@triton.jit
def uniform(word, dtype: tl.constexpr):
    """A word as a number from 0 to 1; 1 itself only where float32 rounds the largest words up."""
    return word.to(dtype) * 2.3283064365386963e-10  # 2⁻³²

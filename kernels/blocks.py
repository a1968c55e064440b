"""Reading and writing a block in 16-byte words where nothing of it is masked.

A mask that may end within a word makes Triton read one element at a time. Most blocks of a long tensor are whole, so
they are asked for once, by a branch that all threads of a program take alike.
"""

import triton
import triton.language as tl


@triton.jit
def load_block(pointers, mask, whole, other, EVICTION: tl.constexpr):
    """What the mask lets through, ``other`` elsewhere; ``whole`` says that it lets all through."""
    if whole:
        block = tl.load(pointers, eviction_policy=EVICTION)
    else:
        block = tl.load(pointers, mask=mask, other=other, eviction_policy=EVICTION)
    return block


@triton.jit
def store_block(pointers, block, mask, whole, EVICTION: tl.constexpr):
    """Writes what the mask lets through; ``whole`` says that it lets all through."""
    if whole:
        tl.store(pointers, block, eviction_policy=EVICTION)
    else:
        tl.store(pointers, block, mask=mask, eviction_policy=EVICTION)

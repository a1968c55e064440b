"""Activation checkpointing (``torch.utils.checkpoint``) inside a forward that is watched.

A checkpoint keeps nothing and runs its function once more in the backward. By then the forward's modes have ended and
the model has its own parameters again, so that what is recomputed is not what was recorded. Within a watched forward
:func:`keep_saved_tensors` therefore makes checkpoints keep what they would recompute, at the price of the memory that
they would save. What cannot be kept is refused by :func:`refuse_recomputed`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_autograd: Any = torch._C._autograd  # the stack of default hooks, one for each thread
_MODULE = "torch.utils.checkpoint"

REENTRANT = (
    "model: expected activation checkpointing with use_reentrant=False, got use_reentrant=True, which runs the layers "
    "without a graph and again in the backward, where they cannot be seen; pass use_reentrant=False to "
    'torch.utils.checkpoint.checkpoint (in Transformers, gradient_checkpointing_kwargs={"use_reentrant": False})'
)
"""Why the older kind of checkpoint is refused, and the way out."""


def keep_saved_tensors() -> bool:
    """Makes the checkpoint that the caller is in, if any, keep what it saves from here on.

    To be called before each call of a watched forward; costs 0.1 µs. The hooks that PyTorch applies to whatever is
    saved are a stack, and a checkpoint puts its own on top while its function runs. They are replaced by ones that do
    nothing, and the checkpoint takes those away when it ends. Other hooks, such as ``save_on_cpu``, stay.
    """
    if not in_checkpoint():
        return False
    _autograd._pop_saved_tensors_default_hooks()
    _autograd._push_saved_tensors_default_hooks(_same, _same)
    return True


def in_checkpoint() -> bool:
    """Whether the function of a checkpoint runs now, for the first time."""
    hooks = _autograd._top_saved_tensors_default_hooks(False)
    if hooks is None:
        return False
    pack = hooks[0]
    # The hooks of a recomputation, from the same module, stay: a gradient taken within the forward needs them.
    return getattr(pack, "__module__", "") == _MODULE and pack.__qualname__.startswith("_checkpoint_hook.")


def _same(tensor: Tensor) -> Tensor:
    return tensor


def graph_nodes(*outputs: Tensor) -> Iterator[Any]:
    """The nodes of the autograd graph of ``outputs``, each once; the leaves are nodes with a ``variable``."""
    seen: set[Any] = set()
    stack = [out.grad_fn for out in outputs]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(edge for edge, _ in node.next_functions)


def refuse_reentrant(node: Any) -> None:
    """Raises NotImplementedError where a node of a graph is a checkpoint with ``use_reentrant=True``."""
    if type(node).__name__ == "CheckpointFunctionBackward":
        raise NotImplementedError(REENTRANT)


def refuse_recomputed(node: Any) -> None:
    """Raises where the backward of a node of a graph recomputes a checkpoint.

    Raises:
        NotImplementedError: the node is a checkpoint with ``use_reentrant=True``, or a custom autograd.Function in a
            checkpoint in which no function of torch was seen, so that :func:`keep_saved_tensors` never came.
    """
    refuse_reentrant(node)
    for saved in getattr(node, "_raw_saved_tensors", ()):
        if type(saved.data).__module__ == _MODULE:
            raise NotImplementedError(
                f"model: {type(node).__name__}, a custom autograd.Function within a checkpoint, saves what only the "
                "checkpoint brings back; call it outside of torch.utils.checkpoint"
            )

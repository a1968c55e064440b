"""Second derivatives by autograd: forwards that have them, and gradients that cannot be differentiated refused.

Some of PyTorch's functions have a first derivative only (fused attention, embedding bags), or a second one that is
wrong (``torch._weight_norm`` on the CPU). :func:`twice_differentiable` computes these by formulas of plain operations.
Others lose the second derivative without a word: a gradient that a custom ``autograd.Function`` marks as
``once_differentiable``, or detaches, counts as a constant. :func:`differentiable_gradients` finds them in what ran.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastfisher.engine.calls import opened
from fastfisher.engine.checkpointing import graph_nodes, keep_saved_tensors, refuse_recomputed

# ---- forwards --------------------------------------------------------------------------------------------------------


class twice_differentiable(TorchFunctionMode):
    """Within, functions of PyTorch without a right second derivative are computed by formulas that have one.

    The values are the same up to rounding. It is of the thread that enters it, and no switch of the process is touched.

    Example:
        >>> with twice_differentiable():
        ...     loss = F.cross_entropy(model(inputs), targets)
        >>> gradients = differentiable_gradients(loss, parameters)
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        formula = _FORMULAS.get(func)
        if formula is not None:
            keep_saved_tensors()
            return formula(*args, **(kwargs or {}))
        within = _opened(func)
        if within is not None:
            with self:
                return within(*args, **(kwargs or {}))
        keep_saved_tensors()
        return func(*args, **(kwargs or {}))


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """``scaled_dot_product_attention`` by its products and softmax: the fused kernels have no second derivative."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        zeros = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device)
        attn_mask = zeros.masked_fill(~attn_mask, -torch.inf)
    found = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return found[0]  # type: ignore[no-any-return]


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``torch._weight_norm``, v·g/‖v‖ with one norm for each index of ``dim``, or one of all where that is −1."""
    others = [d for d in range(v.dim()) if d != dim % v.dim()] if dim != -1 else list(range(v.dim()))
    return v * (g / v.square().sum(others, keepdim=True).sqrt())


def embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Tensor:  # fmt: skip
    """``F.embedding`` with a dense gradient.

    Raises:
        NotImplementedError: a call that changes the weights, or whose gradient is not the true one.
    """
    if max_norm is not None or scale_grad_by_freq:
        raise NotImplementedError(_EMBEDDINGS)
    return torch.embedding(weight, input, -1 if padding_idx is None else padding_idx % len(weight))


_EMBEDDINGS = (
    "there is no second derivative of an embedding with max_norm, which changes the weights, or scale_grad_by_freq, "
    "whose gradient is not the true one"
)


def embedding_bag(
    input: Tensor, weight: Tensor, offsets: Tensor | None = None, max_norm: float | None = None, norm_type: float = 2,
    scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False,
    per_sample_weights: Tensor | None = None, include_last_offset: bool = False, padding_idx: int | None = None,
) -> Tensor:  # fmt: skip
    """``F.embedding_bag``: rows of ``weight`` side by side, one line for each bag, and their sum, mean or maximum.

    Raises:
        NotImplementedError: a call that changes the weights, or whose gradient is not the true one.
    """
    if input.is_nested:
        raise NotImplementedError("there is no second derivative of embedding_bag with nested inputs")
    if max_norm is not None or scale_grad_by_freq:
        raise NotImplementedError(_EMBEDDINGS)
    if input.dim() == 1:
        if offsets is None:
            raise ValueError("offsets has to be a 1D Tensor but got None")
        ends = offsets[1:] if include_last_offset else torch.cat([offsets[1:], offsets.new_full((1,), len(input))])
        starts = offsets[: len(ends)]
        column = torch.arange(int((ends - starts).max()) if len(ends) else 0, device=input.device)
        place = starts[:, None] + column
        inside = place < ends[:, None]
        place = place.clamp(max=max(len(input) - 1, 0))
        input = input[place]
        per_sample_weights = None if per_sample_weights is None else per_sample_weights[place]
    else:
        inside = torch.ones(input.shape, dtype=torch.bool, device=input.device)
    if padding_idx is not None:
        inside = inside & (input != padding_idx % len(weight))
    rows = F.embedding(input, weight)
    kept = inside.unsqueeze(-1)
    if mode == "max":
        if rows.shape[1] == 0:
            return rows.sum(1)
        return torch.where(kept.any(1), rows.masked_fill(~kept, -torch.inf).max(1)[0], 0.0)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    total = torch.where(kept, rows, 0.0).sum(1)
    return total / kept.sum(1).clamp(min=1) if mode == "mean" else total


def linear_cross_entropy(*args: Any, options: Any = None, **kwargs: Any) -> Tensor:
    """``F.linear_cross_entropy`` in one piece: in chunks its gradient is made in the forward, and is a constant."""
    function = opened(F.linear_cross_entropy)
    assert function is not None
    return function(*args, **kwargs)  # type: ignore[no-any-return]


_FORMULAS: dict[Any, Callable[..., Tensor]] = {
    F.scaled_dot_product_attention: attention,
    torch._weight_norm: weight_norm,
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
}
if hasattr(F, "linear_cross_entropy"):
    _FORMULAS[F.linear_cross_entropy] = linear_cross_entropy
_NAMES = frozenset(function.__name__ for function in _FORMULAS)


@cache
def _opened(func: Any) -> Any:
    """A function of torch that calls one of the above, such that the call is seen; None for one that calls none."""
    code = getattr(func, "__code__", None)
    return opened(func) if code is not None and _NAMES.intersection(code.co_names) else None


# ---- gradients -------------------------------------------------------------------------------------------------------

ERROR_NODE = "torch::autograd::Error"
"""What PyTorch puts behind a gradient that a Function marks as ``once_differentiable``."""


def differentiable_gradients(
    output: Tensor, inputs: Sequence[Tensor], *, way_out: str = 'method="finite_difference"'
) -> tuple[Tensor | None, ...]:
    """The gradients of a scalar with their graph, None for an input that has no part in it.

    Args:
        output: the scalar.
        inputs: what to differentiate by.
        way_out: for the error message: which option of the caller takes no second derivative.

    Raises:
        NotImplementedError: a custom ``autograd.Function`` gave a gradient that cannot be differentiated again. Further
            derivatives would leave its part out without a word, because ``torch.autograd.grad(inputs=...)`` does not
            go to the node of PyTorch that would raise. Or it runs layers again (a reentrant checkpoint).
    """
    custom = [node for node in graph_nodes(output) if hasattr(type(node), "_forward_cls")]
    for node in custom:
        refuse_recomputed(node)
    handles = [node.register_hook(partial(_check_custom, type(node)._forward_cls, way_out)) for node in custom]
    try:
        gradients = torch.autograd.grad(output, list(inputs), create_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    if custom:
        refuse_once_differentiable(gradients, way_out=way_out)
    return gradients


def refuse_once_differentiable(
    gradients: Sequence[Tensor | None], *, way_out: str = 'method="finite_difference"'
) -> None:
    """Refuses gradients in whose graph there is one that a custom Function marks as ``once_differentiable``.

    Raises:
        NotImplementedError: there is one; the Function is named where it is in the graph, too.
    """
    nodes = list(graph_nodes(*[g for g in gradients if g is not None]))
    if any(node.name() == ERROR_NODE for node in nodes):
        functions = [type(node)._forward_cls for node in nodes if hasattr(type(node), "_forward_cls")]
        names = [function.__name__ for function in functions if _is_once_differentiable(function)]
        raise NotImplementedError(_refusal(names[0] if names else None, "is once_differentiable", way_out))


@contextmanager
def second_derivatives(way_out: str) -> Iterator[None]:
    """Where PyTorch has no second derivative of something, its error names the way out.

    Raises:
        NotImplementedError: what PyTorch said, and ``way_out``.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # NotImplementedError is one
        said = str(error).split("\n")[0]
        if re.search(r"derivative|double.?back|differentiate|incompatible with .*\.grad\(\)", said, re.IGNORECASE):
            if isinstance(error, NotImplementedError) and way_out in said:
                raise
            raise NotImplementedError(f"a second derivative is not there: {said.rstrip('.')}; use {way_out}") from error
        raise


def _check_custom(function: Any, way_out: str, grad_inputs: Sequence[Any], grad_outputs: Sequence[Any]) -> None:
    """A hook after a custom Function's backward: looks at how its gradients depend on those that it was given."""
    given = [g for g in grad_inputs if isinstance(g, Tensor)]
    if not given:
        return
    if _is_once_differentiable(function) or any(g.grad_fn and g.grad_fn.name() == ERROR_NODE for g in given):
        raise NotImplementedError(_refusal(function.__name__, "is once_differentiable", way_out))
    graphless = not any(g.requires_grad for g in given) and any(bool((g != 0).any()) for g in given)
    if graphless and any(isinstance(g, Tensor) and g.requires_grad for g in grad_outputs):
        raise NotImplementedError(_refusal(function.__name__, "gives gradients without a graph", way_out))


def _refusal(name: str | None, reason: str, way_out: str) -> str:
    which = "a custom autograd.Function" if name is None else f"the autograd.Function {name}"
    return (
        f"the backward of {which} {reason}, and second derivatives would leave its part out: use {way_out}, or "
        "write its backward in differentiable operations"
    )


_ONCE = [constant for constant in once_differentiable.__code__.co_consts if isinstance(constant, types.CodeType)]


def _is_once_differentiable(function: Any) -> bool:
    """Whether the backward of a Function is what the decorator ``once_differentiable`` gives."""
    return getattr(getattr(function, "backward", None), "__code__", None) in _ONCE

"""PyTorch's losses in functions that have a rule: a loss of the caller's is followed like the rest of the forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfisher.engine.taylor.registry import RULES, NoRule, rule_for, written
from fastfisher.engine.taylor.tape import Tape

_REDUCED: dict[Any, Callable[[Tensor], Tensor]] = {0: lambda x: x, 1: torch.mean, 2: torch.sum}
"""By PyTorch's own number of a reduction."""


def _squares(input: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    return _REDUCED[reduction]((input - target).square())


def _binary(
    input: Tensor, target: Tensor, weight: Tensor | None = None, pos_weight: Tensor | None = None, reduction: int = 1
) -> Tensor:
    log_weight = 1 if pos_weight is None else 1 + (pos_weight - 1) * target
    losses = (1 - target) * input + log_weight * F.softplus(-input)
    return _REDUCED[reduction](losses if weight is None else losses * weight)


def _counts(input: Tensor, target: Tensor, log_input: bool, full: bool, eps: float, reduction: int = 1) -> Tensor:
    losses = input.exp() - target * input if log_input else input - target * (input + eps).log()
    if full:
        stirling = target * target.log() - target + 0.5 * (2 * torch.pi * target).log()
        losses = losses + stirling.masked_fill(target <= 1, 0)
    return _REDUCED[reduction](losses)


def _huber(input: Tensor, target: Tensor, reduction: int = 1, delta: float = 1.0) -> Tensor:
    away = input - target
    near = away.clamp(-delta, delta)
    return _REDUCED[reduction](near * (away - 0.5 * near))


def _smooth_l1(input: Tensor, target: Tensor, reduction: int = 1, beta: float = 1.0) -> Tensor:
    if beta == 0:
        return _REDUCED[reduction]((input - target).abs())
    return _huber(input, target, reduction, beta) / beta


def _broadcast(*tensors: Any) -> list[Tensor]:
    tensors = tuple(tensors[0]) if len(tensors) == 1 and not isinstance(tensors[0], Tensor) else tensors
    shape = torch.Size(torch.broadcast_shapes(*(x.shape for x in tensors)))  # type: ignore[no-untyped-call]
    return [x.expand(shape) for x in tensors]


_WRITTEN: dict[Any, Callable[..., Any]] = {
    torch.broadcast_tensors: _broadcast,
    torch.functional.broadcast_tensors: _broadcast,
    torch._C._nn.mse_loss: _squares,
    torch.binary_cross_entropy_with_logits: _binary,
    torch.poisson_nll_loss: _counts,
    torch._C._nn.huber_loss: _huber,
    torch._C._nn.smooth_l1_loss: _smooth_l1,
}


RULES.update({function: (written(write), False) for function, write in _WRITTEN.items()})


@rule_for("cross_entropy")
def _cross_entropy(
    tape: Tape, func: Any, input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: Any = None,
    ignore_index: int = -100, reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    dim = 0 if input.dim() == 1 else 1
    if size_average is not None or reduce is not None:
        raise NoRule("cross_entropy has no rule for size_average= and reduce=")
    shape = [-1 if d == dim else 1 for d in range(input.dim())]
    weights = None if weight is None else weight.view(shape)
    with tape:
        log_p = torch.log_softmax(input, dim)
        if target.is_floating_point():
            target = target * (1 - label_smoothing) + label_smoothing / log_p.shape[dim]
            losses = -(log_p * (target if weights is None else target * weights)).sum(dim)
            return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / max(1, losses.numel())}[reduction]
        hard = F.nll_loss(log_p, target, weight, ignore_index=ignore_index, reduction=reduction)
        if not label_smoothing:
            return hard
        counts = target != ignore_index
        losses = -(log_p if weights is None else log_p * weights).sum(dim).masked_fill(~counts, 0)
        divisor = counts.sum() if weight is None else weight[target.clamp(min=0)].masked_fill(~counts, 0).sum()
        even = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / divisor}[reduction]
        return (1 - label_smoothing) * hard + (label_smoothing / log_p.shape[dim]) * even

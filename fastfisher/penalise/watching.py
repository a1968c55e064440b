"""A penalty on a forward of the caller's: for loops that make the loss themselves, such as those of a framework."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastfisher.distributed.single import Single
from fastfisher.engine.gates import Gates
from fastfisher.inputs import Call
from fastfisher.model import copy_buffers, logits_of
from fastfisher.penalise.point import Sampling
from fastfisher.targets import IGNORED


@dataclass
class WatchedForward:
    """A forward of the caller's that :meth:`FisherPenalty.watching` saw: its arguments, and its logits as they are.

    Attributes:
        inputs, logits: what the model was called with, and what came of it, with its graph.
        gates: what the forward did; None where R is taken of another one.
        buffers: those that the other one begins with.
        calls: how often the model was called.
    """

    inputs: Call | None = None
    logits: Tensor | None = None
    gates: Gates | None = None
    buffers: dict[str, Tensor] | None = None
    calls: int = 0


@contextmanager
def watched(
    model: nn.Module, sampling: Sampling, class_dim: int | None, due: bool, world: Single
) -> Iterator[WatchedForward]:
    """Watches the one forward of the model that the caller runs within; records what R needs where it is ``due``.

    What is raised within one process ends the step of the others, too, when they come to their term.
    """
    forward, recording = WatchedForward(), ExitStack()

    def before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        forward.calls += 1
        if forward.calls == 1:
            forward.inputs = Call(args, kwargs, class_dim)  # labels too: a decoder starts from them
            if due:
                own = sampling.in_full_precision()
                forward.buffers = copy_buffers(model) if own else None
                forward.gates = None if own else recording.enter_context(sampling.recording())

    def after(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        recording.close()
        forward.logits = logits_of(output, -1)

    hooks = [
        model.register_forward_pre_hook(
            before, with_kwargs=True, prepend=True
        ),  # the arguments as the caller gave them
        model.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        with world.failing_together():
            yield forward
    finally:
        recording.close()
        for hook in hooks:
            hook.remove()


class _Term(torch.autograd.Function):
    """A scalar of value 0 whose backward adds gradients that are there already."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], alpha: float, *parameters: Tensor) -> Tensor:
        ctx.gradients, ctx.alpha = gradients, alpha
        return torch.zeros((), dtype=gradients[0].dtype, device=gradients[0].device)  # whole, of shards too

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        scale = grad * ctx.alpha
        return (None, None, *(g * scale.to(g.dtype) for g in ctx.gradients))


def term(gradients: dict[str, Tensor], alpha: float, trainable: dict[str, Tensor]) -> Tensor:
    """A scalar of value 0 whose gradient is α times the gradients by name, times whatever it is multiplied by."""
    parameters = [trainable[name] for name in gradients]
    return _Term.apply(list(gradients.values()), alpha, *parameters)  # type: ignore[no-any-return, no-untyped-call]


def finished(forward: WatchedForward) -> Tensor:
    """The logits of a forward that was watched to its end.

    Raises:
        ValueError: the model was not called exactly once.
    """
    if forward.calls != 1 or forward.logits is None or forward.inputs is None:
        raise ValueError(f"forward: expected one finished call of the model, saw {forward.calls}")
    return forward.logits


def none_counts(targets: Tensor | None) -> bool:
    """Whether all targets are of rows that do not count: a micro-batch of prompts."""
    return targets is not None and not targets.is_floating_point() and not bool((targets != IGNORED).any())

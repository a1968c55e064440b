"""A penalty on a forward of the caller's: for loops that make the loss themselves, such as those of a framework."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastfisher.distributed.single import Single
from fastfisher.engine.gates import Gates
from fastfisher.inputs import Call
from fastfisher.likelihoods.base import Likelihood
from fastfisher.model import copy_buffers
from fastfisher.outputs import Output
from fastfisher.penalise.point import Sampling


@dataclass
class WatchedForward:
    """A forward of the caller's that :meth:`FisherPenalty.watching` saw: its arguments, and its logits as they are.

    Attributes:
        call: the number of the call that R is taken of, from 0; None: the only one.
        inputs, logits: what the model was called with, and what came of it, with its graph.
        without: why there are no logits in what came of it.
        gates: what the forward did; None where R is taken of another one.
        buffers: those that the other one begins with.
        calls: how often the model was called. Calls without gradients, as those of a reference model are, do not count.
    """

    call: int | None = None
    inputs: Call | None = None
    logits: Tensor | None = None
    without: TypeError | None = None
    gates: Gates | None = None
    buffers: dict[str, Tensor] | None = None
    calls: int = 0

    @property
    def is_watched(self) -> bool:
        """Whether the call that began last is the one that R is taken of."""
        return torch.is_grad_enabled() and self.calls - 1 == (self.call or 0)

    @property
    def is_finished(self) -> bool:
        """Whether that one has come to its end, and was the only one where it had to be."""
        ended = self.inputs is not None and (self.logits is not None or self.without is not None)
        return ended and (self.call is not None or self.calls == 1)

    def check(self) -> None:
        """Raises ValueError where it is not finished."""
        if not self.is_finished:
            expected = "one finished call" if self.call is None else f"more than {self.call} finished calls"
            way_out = (
                "where it is called several times in a step, FisherPenalty.watching(call=0) takes the first"
                if self.calls
                else "make FisherPenalty of the module that the loop calls with gradients, or of the "
                "DistributedDataParallel itself, without a wrapper around it"
            )
            raise ValueError(f"forward: expected {expected} of the model, saw {self.calls}; {way_out}")


@contextmanager
def watched(
    model: nn.Module, sampling: Sampling, reading: Output, due: bool, world: Single, call: int | None = None
) -> Iterator[WatchedForward]:
    """Watches the one forward of the model that the caller runs within; records what R needs where it is ``due``.

    What is raised within one process ends the step of the others, too, when they come to their term.
    """
    forward, recording = WatchedForward(call), ExitStack()

    def before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        forward.calls += torch.is_grad_enabled()
        if forward.is_watched:
            forward.inputs = Call(args, kwargs, reading)  # labels too: a decoder starts from them
            if due and not sampling.meets_no_logits:
                own = sampling.in_full_precision()
                forward.buffers = copy_buffers(model) if own else None
                forward.gates = None if own else recording.enter_context(sampling.recording())

    def after(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if forward.is_watched:
            recording.close()
            try:
                forward.logits = reading.tensor(output)
            except TypeError as error:  # which FisherPenalty.term raises, unless it is given other inputs
                forward.without = error
                sampling.meets_no_logits = True

    try:
        with world.failing_together(), _around_calls(model, before, after):
            yield forward
    finally:
        recording.close()


@contextmanager
def _around_calls(model: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> Iterator[None]:
    """Within, ``before`` and ``after`` are called around each call of the model, as its hooks would be."""
    compiled = getattr(model, "_compiled_call_impl", None)
    if compiled is None:
        hooks = [
            # Before other hooks, of fully_shard and of the caller: they act on the second forward's arguments, too.
            model.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
            model.register_forward_hook(after, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        return

    def call(*args: Any, **kwargs: Any) -> Any:  # what Module.compile compiled has the hooks in it
        before(model, args, kwargs)
        output = compiled(*args, **kwargs)
        after(model, args, kwargs, output)
        return output

    model._compiled_call_impl = call
    try:
        yield
    finally:
        model._compiled_call_impl = compiled


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


def none_counts(targets: Tensor | None, likelihood: Likelihood) -> bool:
    """Whether all targets are of rows that do not count: a micro-batch of prompts."""
    return targets is not None and not targets.is_floating_point() and not bool(likelihood.counting(targets).any())

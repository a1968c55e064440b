"""L(θ), the mean loss over labelled data, whose second derivatives are measured: its batches, forwards and products."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastfisher.data import Batches, Pair
from fastfisher.engine.random_state import RandomState
from fastfisher.engine.taylor import Tape
from fastfisher.engine.twice import differentiable_gradients, second_derivatives, twice_differentiable
from fastfisher.inputs import Call, count_examples, take_rows
from fastfisher.likelihoods.subject import Subject
from fastfisher.model import (
    call_copy,
    chosen_names,
    eval_mode,
    reached_leaves,
    trainable_parameters,
    uncompiled,
    unhooked,
)
from fastfisher.outputs import Reading, map_output


class Labelled:
    """Inputs with their targets, as often as they are iterated; where ``counted``, without the targets −100."""

    def __init__(self, batches: Batches, subject: Subject, *, counted: bool = False) -> None:
        self.batches, self.subject, self.counted = batches, subject, counted

    @classmethod
    def of(cls, model: nn.Module, data: Any, targets: Any, batch_size: int | None, subject: Subject) -> Labelled:
        """``data`` with the targets in it, or beside it, on the device of the model's parameters."""
        if targets is not None:
            if not isinstance(targets, Tensor) and not subject.is_loss:
                raise ValueError(f"targets: expected a tensor or None, got {type(targets).__name__}")
            data = (data, targets)
        device = next(iter(trainable_parameters(model).values())).device
        batches = Batches(model, data, device, reading=subject.reading, batch_size=batch_size, keep=True)
        return cls(batches, subject)

    def __iter__(self) -> Iterator[tuple[Call, Any]]:
        likelihood = self.subject.likelihood
        for inputs, targets in self.batches:
            if targets is None and likelihood.needs_targets:
                raise ValueError("targets: expected labels beside the inputs, got None")
            by_example = self.counted and isinstance(targets, Tensor) and targets.dim() == 1
            kept = likelihood.counting(targets) if by_example else None
            if kept is None or kept.all():
                yield inputs, targets
            elif kept.any():
                yield take_rows(inputs, kept), targets[kept]

    def first(self) -> Pair:
        """The first batch.

        Raises:
            ValueError: there is none.
        """
        for batch in self:
            if count_examples(batch[0]):
                return batch
        raise ValueError("data: expected at least one example, got none")

    def losses(self, parameters: dict[str, Tensor]) -> Iterator[BatchLoss]:
        """The mean loss of each batch that has rows that count, as a function of these parameters."""
        for inputs, targets in self:
            loss = BatchLoss(self.batches.model, parameters, inputs, targets, self.subject)
            if loss.rows:
                yield loss


@dataclass(frozen=True)
class BatchLoss:
    """The mean loss of one batch; the model and its buffers stay as they are, however many forwards there are."""

    model: nn.Module
    parameters: dict[str, Tensor]
    inputs: Call
    targets: Any
    subject: Subject

    @functools.cached_property
    def rows(self) -> float:
        """How much the mean is over: rows, or examples where it is a loss of the caller's."""
        if self.subject.is_loss:
            return self.examples
        return self.subject.likelihood.counted_targets(self.targets, self.inputs.class_dim)

    @property
    def examples(self) -> int:
        """How many examples there are."""
        return count_examples(self.inputs)

    def fitting(self, logits: Tensor) -> Any:
        """The targets as :meth:`at` takes them."""
        return self.subject.fit(logits, self.targets, model=self.model)

    def at(self, logits: Tensor, targets: Any) -> Tensor:
        """The loss at these logits."""
        return self.subject.likelihood.loss(logits, targets)

    def outputs(self) -> tuple[list[Tensor], Tensor]:
        """Of a forward that can be differentiated twice, the tensors that the model returns, and what is read of them:
        the first are what the Gauss-Newton matrix linearises. One may be made of another, as logits are of hidden
        states: the loss gets a view of each, so that its derivative in one is not that by way of the other."""
        found: list[Tensor] = []

        def apart(x: Tensor) -> Tensor:
            if not (x.requires_grad and x.is_floating_point()):
                return x
            found.append(x.view_as(x))
            return found[-1]

        reading = self.inputs.reading
        inputs = dataclasses.replace(self.inputs, reading=_Apart(reading, apart))
        logits = forward(self.model, inputs, twice_differentiable())
        self._check_ways(logits, found)
        if not found:
            raise ValueError("model: expected it to return tensors that depend on the parameters, got none")
        return found, logits

    def _check_ways(self, losses: Tensor, outputs: list[Tensor]) -> None:
        """Raises ValueError where the losses depend on a parameter by another way than the outputs."""
        named = {id(p): name for name, p in self.parameters.items()}
        leaves = reached_leaves([losses], {x.grad_fn for x in outputs})
        beside = [named[id(x)] for x in leaves if id(x) in named]
        if beside:
            raise ValueError(
                'loss: expected one that depends on the parameters by what the model returns, with method="ggn", got '
                f"one that depends on {beside[0]} in another way: a term of the parameters, another call of it, or "
                "a tensor within an object that is not looked into (tuples, lists, mappings and attributes are)"
            )

    def hessian_product(self, *, way_out: str) -> Callable[[Sequence[Tensor]], Sequence[Tensor | None]]:
        """The function z ↦ Hz, both by parameter, None where it is 0 whatever z is.

        The graph of the gradient is made once and kept for all z.

        Raises:
            NotImplementedError: something has no second derivative; ``way_out`` is what the message recommends.
        """
        leaves = list(self.parameters.values())
        with torch.enable_grad(), second_derivatives(way_out):
            logits = forward(self.model, self.inputs, twice_differentiable())
            found = differentiable_gradients(self.at(logits, self.fitting(logits)), leaves, way_out=way_out)
        curved = [(g, i) for i, g in enumerate(found) if g is not None and g.requires_grad]

        def product(z: Sequence[Tensor]) -> Sequence[Tensor | None]:
            if not curved:
                return [None] * len(z)
            outputs, directions = [g for g, _ in curved], [z[i] for _, i in curved]
            with second_derivatives(way_out):
                return torch.autograd.grad(outputs, leaves, directions, retain_graph=True, allow_unused=True)

        return product


@dataclass(frozen=True)
class _Apart(Reading):
    """What another reading reads, of tensors that a function has put in the place of those that the model returns."""

    of: Reading
    function: Callable[[Tensor], Tensor]

    @property
    def takes_targets(self) -> bool:  # type: ignore[override]
        """See :class:`.Reading`."""
        return self.of.takes_targets

    def read(self, output: Any, targets: Any, examples: int) -> Tensor:
        """See :meth:`.Reading.read`."""
        if self.of.takes_targets:
            return self.of.read(map_output(output, self.function), targets, examples)
        return self.function(self.of.read(output, targets, examples))


def forward(model: nn.Module, inputs: Call, watch: TorchFunctionMode | None = None) -> Tensor:
    """The logits with their graph, of a forward that ``watch`` sees, with copies of the model's buffers.

    Raises:
        ValueError, NotImplementedError: as the check of :func:`check_after`.
    """
    check = check_after(model)
    with torch.enable_grad(), watch or nullcontext():
        logits = call_copy(model, {}, inputs)
    return check(watch.current(logits) if isinstance(watch, Tape) else logits)


def check_after(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """To be called before a forward: gives the function that checks it afterwards, and passes its logits on.

    That function raises a ValueError where logits are NaN or +inf (−inf is a class that is ruled out), and a
    NotImplementedError where the forward has changed a parameter.
    """
    writes = [p._version for p in model.parameters()]

    def check(logits: Tensor) -> Tensor:
        for (name, parameter), before in zip(model.named_parameters(), writes, strict=True):
            if parameter._version != before:
                raise NotImplementedError(
                    f"model: expected a forward that leaves the parameters as they are, got one that changes {name} in "
                    "place (as max_norm of an embedding does); constrain it after the optimiser's step instead"
                )
        unusable = ~(logits.detach() < math.inf)
        if bool(unusable.any()):
            rows = unusable if unusable.dim() == 1 else unusable.any(-1)
            raise ValueError(
                f"model: expected logits that are numbers, got NaN or inf in {int(rows.sum())} of {rows.numel()} "
                "rows; look at the parameters and inputs (isfinite().all()), or at overflow in a low precision"
            )
        return logits

    return check


@contextmanager
def measuring(model: nn.Module, params: Iterable[Tensor] | None, mode: str) -> Iterator[dict[str, Tensor]]:
    """The wanted parameters, alone in requiring a gradient; the model in the wanted mode; all put back afterwards.

    Hooks of the parameters rest: they are meant for the gradients of training.

    Raises:
        NotImplementedError: a wanted parameter is complex.
    """
    trainable = trainable_parameters(model)
    chosen = chosen_names(trainable, params)
    for name in chosen:
        if trainable[name].is_complex():
            raise NotImplementedError(
                f"params: expected real parameters, got {name} of {trainable[name].dtype}, for which there is no "
                "Hessian here; hold its real view (torch.view_as_real) as the parameter, or leave it out by params="
            )
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = frozenset(p.device.index for p in trainable.values() if p.device.type == "cuda")
    random = RandomState.current(devices)
    with torch.inference_mode(False), unhooked(trainable.values()):
        try:
            for name, parameter in trainable.items():
                parameter.requires_grad_(name in chosen)
            with uncompiled(model, "the measurement"), eval_mode(model) if mode == "eval" else nullcontext():
                yield {name: parameter for name, parameter in trainable.items() if name in chosen}
        finally:
            for parameter in trainable.values():
                parameter.requires_grad_(True)
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            random.restore()

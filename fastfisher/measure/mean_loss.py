"""L(θ), the mean loss over labelled data, whose second derivatives are measured: its batches, forwards and products."""

from __future__ import annotations

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
from fastfisher.inputs import Call, take_rows
from fastfisher.likelihoods import CATEGORICAL, Likelihood
from fastfisher.model import call_copy, chosen_names, eval_mode, trainable_parameters, uncompiled, unhooked


class Labelled:
    """Inputs with their targets, as often as they are iterated; where ``counted``, without the targets −100."""

    def __init__(self, batches: Batches, *, counted: bool = False) -> None:
        self.batches, self.counted = batches, counted

    @classmethod
    def of(cls, model: nn.Module, data: Any, targets: Any, batch_size: int | None, class_dim: int | None) -> Labelled:
        """``data`` with the targets in it, or beside it, on the device of the model's parameters."""
        if targets is not None:
            if not isinstance(targets, Tensor):
                raise ValueError(f"targets: expected a tensor or None, got {type(targets).__name__}")
            data = (data, targets)
        device = next(iter(trainable_parameters(model).values())).device
        return cls(Batches(model, data, device, class_dim=class_dim, batch_size=batch_size, keep=True))

    def __iter__(self) -> Iterator[tuple[Call, Tensor]]:
        for inputs, targets in self.batches:
            if targets is None:
                raise ValueError("targets: expected labels beside the inputs, got None")
            kept = targets != -100 if self.counted and targets.dim() == 1 else None
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
            if len(batch[1]):
                return batch
        raise ValueError("data: expected at least one example, got none")

    def losses(self, parameters: dict[str, Tensor]) -> Iterator[BatchLoss]:
        """The mean loss of each batch that has rows that count, as a function of these parameters."""
        for inputs, targets in self:
            loss = BatchLoss(self.batches.model, parameters, inputs, targets)
            if loss.rows:
                yield loss


@dataclass(frozen=True)
class BatchLoss:
    """The mean loss of one batch; the model and its buffers stay as they are, however many forwards there are."""

    model: nn.Module
    parameters: dict[str, Tensor]
    inputs: Call
    targets: Tensor
    likelihood: Likelihood = CATEGORICAL

    @functools.cached_property
    def rows(self) -> int:
        """How many rows the mean is over."""
        return self.likelihood.counted_targets(self.targets, self.inputs.class_dim)

    def fitting(self, logits: Tensor) -> Tensor:
        """The targets as :meth:`at` takes them."""
        return self.likelihood.fit(logits, self.targets, class_dim=self.inputs.class_dim, model=self.model)

    def at(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss at these logits."""
        return self.likelihood.loss(logits, targets)

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
            rows = int(unusable.any(-1).sum())
            raise ValueError(
                f"model: expected logits that are numbers, got NaN or inf in {rows} of {unusable[..., 0].numel()} "
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

"""What one step computes, and how it comes into ``.grad``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastfisher.engine.gradients import Differentiate, dense, sum_squares
from fastfisher.inputs import Inputs
from fastfisher.lists import add_
from fastfisher.penalise.graphs import Capture, CapturedSteps
from fastfisher.penalise.shift import Gradients


@dataclass
class Outcome:
    """What one step computes: the training loss and its logits, the gradient for the optimiser, and of a step that
    recomputes the penalty R, the rows of logits it is the mean over, and R's gradient where it is to be reused."""

    loss: Tensor
    logits: Tensor
    total: Gradients
    value: Tensor | None = None
    rows: int | Tensor | None = None
    reused: Gradients | None = None

    @property
    def finite(self) -> bool:
        """Whether R and the gradients are: that for the optimiser, and that for reuse. The host waits for them."""
        kept = [] if self.value is None else [self.value]
        for gradients in (self.total, self.reused or {}):
            values = [g.coalesce().values() if g.is_sparse else g for g in gradients.values()]
            kept += [sum_squares(values, self.loss.device)] if values else []
        return all(bool(x.isfinite()) for x in kept)


Step = Callable[[Inputs, Any], Outcome]


class Eager:
    """Runs a step."""

    def run(self, kind: Callable[[], Any], step: Step, inputs: Inputs, targets: Any) -> Outcome:
        """What the step computes."""
        return step(inputs, targets)


class Captured(Eager):
    """Runs a step by its captured graph, if there is one by now; see :mod:`.graphs`."""

    def __init__(self, model: nn.Module, capture: Capture) -> None:
        self.model, self.steps = model, CapturedSteps[Outcome](model, capture)

    def run(self, kind: Callable[[], Any], step: Step, inputs: Inputs, targets: Any) -> Outcome:
        """See :meth:`Eager.run`; ``kind`` is what the step depends on beside its batch, hashable."""
        handed_out = {id(g) for captured in self.steps.captured.values() for g in captured.result.total.values()}
        for parameter in self.model.parameters():
            if id(parameter.grad) in handed_out:  # kept by the caller, to accumulate: the replay would overwrite it
                parameter.grad = None if parameter.grad is None else parameter.grad.clone()
        modes = tuple(module.training for module in self.model.modules())
        outcome = self.steps.run((kind(), modes), step, inputs, targets)
        # What is handed out here and kept by the caller stays as it is when the next replay writes its own.
        value = None if outcome.value is None else outcome.value.clone()
        rows = outcome.rows.clone() if isinstance(outcome.rows, Tensor) else outcome.rows
        return dataclasses.replace(outcome, loss=outcome.loss.clone(), value=value, rows=rows)


class DenseGradients:
    """∂loss/∂source by ``differentiate``, dense, and which of them autograd had made sparse.

    ``.grad`` is then sparse, too, as optimisers of sparse embeddings need it.
    """

    def __init__(self, differentiate: Differentiate) -> None:
        self.differentiate = differentiate
        self.sparse: set[int] = set()  # by id

    def __call__(self, loss: Tensor, sources: Sequence[Tensor], retain_graph: bool) -> list[Tensor | None]:
        """The gradients."""
        found = self.differentiate(loss, sources, retain_graph)
        self.sparse |= {id(x) for x, g in zip(sources, found, strict=True) if g is not None and g.is_sparse}
        return dense(found)

    def laid_out(self, gradients: Gradients, trainable: Gradients) -> Gradients:
        """The gradients, each in memory as ``Tensor.backward`` leaves it: as its parameter is, because fused optimisers
        read element by element without a look at strides; or the rows that are not 0, where it is sparse."""

        def laid_out(g: Tensor, parameter: Tensor) -> Tensor:
            if id(parameter) in self.sparse:
                return g.to_sparse(1)
            return g if g.stride() == parameter.stride() else torch.empty_like(parameter).copy_(g)

        return {name: laid_out(g, trainable[name]) for name, g in gradients.items()}


def add(total: Gradients, gradients: Gradients, weight: float | Tensor) -> None:
    """total += weight·gradients, by name."""
    both = [name for name in gradients if name in total]
    add_([total[name] for name in both], weight, [gradients[name] for name in both])
    for name in gradients.keys() - total.keys():
        total[name] = gradients[name] * weight


def add_to_grads(total: Gradients, trainable: Gradients) -> Gradients:
    """Adds the gradients to the ``.grad`` that are there, as the hooks on parameters (``Tensor.register_hook``) make
    them; :func:`settle` does the rest, which nothing undoes. Returns the gradients as the hooks made them."""
    total = {name: _hooked(trainable[name], g) for name, g in total.items()}
    found = {name: g for name in total if (g := trainable[name].grad) is not None}
    with torch.no_grad():
        if found:  # in one call, which adds to all of them or to none
            torch._foreach_add_(list(found.values()), [total[name] for name in found])
    return total


def settle(total: Gradients, trainable: Gradients) -> None:
    """Makes the gradients the ``.grad`` of parameters that had none, and runs the hooks that wait for it."""
    for name, g in total.items():
        if trainable[name].grad is None:
            trainable[name].grad = g
    for name in total:
        for hook in (trainable[name]._post_accumulate_grad_hooks or {}).values():
            hook(trainable[name])


def _hooked(parameter: Tensor, gradient: Tensor) -> Tensor:
    for hook in (parameter._backward_hooks or {}).values():
        changed = hook(gradient)
        gradient = gradient if changed is None else changed
    return gradient

"""How the labels of a batch lie to the logits of a model that makes its own loss of them: which row predicts which.

A causal language model compares the logits at a position with the next label, a masked one with the label there, a
prompt puts rows in front that predict nothing. The class of a model does not say which (adapters wrap it, subclasses
replace its loss); the loss does: its gradient in a row of logits is exactly 0 where the row has no part in it. No two
of these arrangements leave out the same rows, so the rows say which it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfisher.engine.random_state import RandomState
from fastfisher.inputs import Call, known_of, map_inputs
from fastfisher.model import call_copy
from fastfisher.outputs import class_last, logits_of
from fastfisher.targets import IGNORED

WAY_OUT = "state the targets of the logits yourself"


@dataclass(frozen=True)
class Alignment:
    """Row t of an example's logits predicts label t + ``shift``; rows more than labels come in front of them.

    Attributes:
        shift: 1 where a model predicts what comes next, else 0.
    """

    shift: int = 0

    def targets(self, labels: Tensor, rows: torch.Size) -> Tensor:
        """The target of each row of logits, as class indices of shape ``rows`` = logits.shape[:-1]; −100 for none.

        Raises:
            ValueError: there are more labels than rows, or not as many dimensions.
        """
        if labels.numel() == rows.numel():  # labels (N, 1) for rows (N,), or (N·T,) for (N, T)
            labels = labels.reshape(rows)
        if labels.dim() != len(rows) or labels.shape[:-1] != rows[:-1] or labels.shape[-1] > rows[-1]:
            raise ValueError(
                f"labels: expected at most one for each of the rows {tuple(rows)} of logits, got shape "
                f"{tuple(labels.shape)}; {WAY_OUT}"
            )
        labels = F.pad(labels, (rows[-1] - labels.shape[-1], 0), value=IGNORED)
        return labels if self.shift == 0 else F.pad(labels[..., self.shift :], (0, self.shift), value=IGNORED)


def labels_in(batch: Any) -> Tensor | None:
    """The labels within a batch of keyword arguments, those of the next position where it has them; None: it has none.

    Raises:
        TypeError: what is called labels is no tensor.
    """
    if not isinstance(batch, Mapping):
        return None
    found = batch.get("shift_labels")
    found = batch.get("labels") if found is None else found
    if not (found is None or isinstance(found, Tensor)):
        raise TypeError(f"labels: expected a tensor, got {type(found).__name__}; {WAY_OUT}")
    return found


def alignment_of(loss: Tensor, logits: Tensor, labels: Tensor | None, class_dim: int | None = None) -> Alignment:
    """How the labels lie to the logits of which the loss was made, told by ∂loss/∂logits; both need their graph.

    Costs the backward from the loss to the logits. The graph is kept.

    Args:
        loss: the loss that is trained, a scalar.
        logits: those from which it was made, as the model returned them.
        labels: class indices, at most as many as there are rows of logits; class probabilities of the logits' shape; or
            None, where every row counts.
        class_dim: the dimension of the logits that holds the classes; None where it was not said.

    Raises:
        ValueError: the loss is no function of the softmax of these logits (as those of regression and of several labels
            at once are none), or no arrangement leaves out the rows that it leaves out.
    """
    grad = class_last(_gradient(loss, logits), class_dim)
    logits = class_last(logits.detach(), class_dim)
    _check_softmax(grad)
    used = grad.ne(0).any(-1)
    if labels is not None and labels.is_floating_point():
        _check_probabilities(labels, logits)
        labels = None
    # A row whose probability rounds to 1 at its label has a gradient of 0 although it counts.
    sure = logits.float().softmax(-1).amax(-1) == 1
    every = torch.ones_like(used)
    for alignment in (Alignment(0), Alignment(1)):
        counts = every if labels is None else alignment.targets(labels, used.shape) != IGNORED
        if bool(((used == counts) | (counts & sure)).all()):
            return alignment
        if labels is None or used.dim() < 2:
            break
    raise ValueError(
        f"loss: expected a mean over the rows of logits whose label is not {IGNORED}, or whose next label is not; this "
        f"one is made of {int(used.sum())} of {used.numel()} rows, which are neither; {WAY_OUT}"
    )


class Alignments:
    """The targets of logits, batch after batch: the loss is asked once for each kind of batch.

    Args:
        class_dim: the dimension of the logits that holds the classes; None where it was not said.
    """

    def __init__(self, class_dim: int | None = None) -> None:
        self.class_dim = class_dim
        self._known: dict[Any, Alignment] = {}

    def targets(self, loss: Tensor, logits: Tensor, labels: Tensor | None) -> Tensor | None:
        """The targets of the rows of logits; None where there are no labels, so that all rows count.

        Raises:
            ValueError: as :func:`alignment_of`, and :meth:`Alignment.targets`.
        """
        rows = class_last(logits.detach(), self.class_dim).shape[:-1]
        lying = None if labels is None else (labels.dim(), labels.dtype, labels.shape[-1:] == rows[-1:])
        kind = len(rows), lying
        if kind not in self._known and (labels is None or bool((labels != IGNORED).any())):
            self._known[kind] = alignment_of(loss, logits, labels, self.class_dim)
        if labels is None or labels.is_floating_point():
            return labels
        return self._known.get(kind, Alignment()).targets(labels, rows)


def targets_within(model: nn.Module, call: Call, labels: Tensor) -> Tensor:
    """The targets of the logits that a model makes of a call with class indices as labels among its arguments.

    A model that returns no loss takes the labels as they are: one for each row. Of another the loss is asked once for
    each kind of call, by a forward that leaves buffers and random generators as they were.

    Raises:
        ValueError: as :func:`alignment_of`, and :meth:`Alignment.targets`.
        TypeError: the model returns no logits.
    """
    kind = "labels", tuple(sorted(call.kwargs)), labels.dim()
    known = known_of(model)
    if labels.dim() < 2 or not bool((labels != IGNORED).any()):  # one label for each example, or none that counts
        return labels
    if kind not in known:
        device = next(model.parameters()).device
        there = map_inputs(call, lambda x: x.to(device))
        logits, loss = _forward(model, there)
        rows = class_last(logits.detach(), call.class_dim).shape[1:-1]
        asked = isinstance(loss, Tensor) and loss.requires_grad
        found = alignment_of(loss, logits, labels.to(device), call.class_dim) if asked else Alignment()
        known[kind] = found, rows[-1] - labels.shape[-1] if rows else 0
    alignment: Alignment
    alignment, front = known[kind]
    rows = torch.Size((*labels.shape[:-1], labels.shape[-1] + front))
    return alignment.targets(labels, rows)


def _forward(model: nn.Module, call: Call) -> tuple[Tensor, Any]:
    """The logits of a model as it returns them and its own loss, None where it has none."""
    own: list[tuple[Tensor, Any]] = []

    def see(output: Any, logits: Tensor) -> None:
        own.append((logits_of(output), getattr(output, "loss", None)))

    random = RandomState.on_devices_of(model.parameters())
    try:
        with torch.enable_grad():
            call_copy(model, {}, dataclasses.replace(call, see=see))
    except IndexError as error:
        raise ValueError(f"labels: expected class indices, or -100 where a row does not count: {error}") from error
    finally:
        random.restore()
    return own[0]


def _gradient(loss: Tensor, logits: Tensor) -> Tensor:
    """∂loss/∂logits, times the number of rows: of a mean it is then about 1 at a label."""
    rows = float(max(1, min(logits[..., 0].numel(), 1 << 15)))  # no larger than float16 can hold
    at: Any = logits
    while True:
        (grad,) = torch.autograd.grad(loss, at, torch.full_like(loss, rows), retain_graph=True, allow_unused=True)
        node = logits.grad_fn if at is logits else at.node
        if grad is not None or node is None or "ToCopy" not in node.name():
            break
        # The caller has the logits in another dtype than the loss was made of (mixed precision of Accelerate).
        at = torch.autograd.graph.GradientEdge(*node.next_functions[0])
    if grad is None:
        raise ValueError(f"loss: expected one that is made of the model's logits, got one that is not; {WAY_OUT}")
    found: Tensor = grad.detach()
    if not bool(found.isfinite().all()):
        raise ValueError("loss: expected a finite gradient in the logits, got NaN or inf")
    return found


def _check_softmax(grad: Tensor) -> None:
    """Raises ValueError where the loss changes with a constant added to the logits of a row, which no softmax sees."""
    sums, sizes = grad.sum(-1, dtype=torch.float32).abs().sum(), grad.abs().sum(dtype=torch.float32)
    rounding = grad[..., 0].numel() * grad.shape[-1] ** 0.5 * torch.finfo(torch.float32).eps
    tolerance = max(1e-4, 16 * torch.finfo(grad.dtype).eps)
    if bool(sums > tolerance * sizes + rounding):
        raise ValueError(
            "loss: expected a cross-entropy of the softmax of the model's logits, got one that changes when a constant "
            "is added to all logits of a row, as that of a regression or of several labels at once does: such a model "
            f"has no distribution over classes to draw a label from. If the logits are those of a softmax, {WAY_OUT}"
        )


def _check_probabilities(labels: Tensor, logits: Tensor) -> None:
    fits = labels.shape == logits.shape and bool((labels >= 0).all())
    if not (fits and bool(((labels.sum(-1, dtype=torch.float32) - 1).abs() < 1e-2).all())):
        raise ValueError(
            f"labels: expected class indices, or probabilities of the logits' shape {tuple(logits.shape)}, got "
            f"{labels.dtype} of shape {tuple(labels.shape)} that are none, as those of a regression or of several "
            f"labels at once; {WAY_OUT}"
        )

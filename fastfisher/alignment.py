"""How the labels of a batch lie to the logits of a model that makes its own loss of them: which row predicts which.

A causal language model compares the logits at a position with the next label, a masked one with the label there, a
prompt puts rows in front that predict nothing. The class of a model does not say which (adapters wrap it, subclasses
replace its loss); the loss does: its gradient in a row of logits is exactly 0 where the row has no part in it. No two
of these arrangements leave out the same rows, so the rows say which it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfisher.labels import IGNORED
from fastfisher.model import call_model, eval_mode, map_inputs

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
        if labels.numel() == rows.numel():  # (N, 1) for (N,), (N·T,) for (N, T)
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


def alignment_of(loss: Tensor, logits: Tensor, labels: Tensor | None) -> Alignment:
    """How the labels lie to the logits of which the loss was made, told by ∂loss/∂logits; both need their graph.

    Costs the backward from the loss to the logits. The graph is kept.

    Args:
        loss: the loss that is trained, a scalar.
        logits: (..., C), from which it was made.
        labels: class indices, at most as many as there are rows of logits; class probabilities of the logits' shape; or
            None, where every row counts.

    Raises:
        ValueError: the loss is no function of the softmax of these logits (as those of regression and of several labels
            at once are none), or no arrangement leaves out the rows that it leaves out.
    """
    grad = _gradient(loss, logits)
    _check_softmax(grad)
    used = grad.ne(0).any(-1)
    if labels is not None and labels.is_floating_point():
        _check_probabilities(labels, logits)
        labels = None
    # A row that is sure of its label may have a gradient of 0, by rounding.
    sure = logits.detach().float().softmax(-1).amax(-1) == 1
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
    """The targets of logits, batch after batch: the loss is asked once for each kind of batch."""

    def __init__(self) -> None:
        self._known: dict[Any, Alignment] = {}

    def targets(self, loss: Tensor, logits: Tensor, labels: Tensor | None) -> Tensor | None:
        """The targets of the rows of logits; None where there are no labels, so that all rows count.

        Raises:
            ValueError: as :func:`alignment_of`, and :meth:`Alignment.targets`.
        """
        lying = None if labels is None else (labels.dim(), labels.dtype, labels.shape[-1:] == logits.shape[-2:-1])
        kind = logits.dim(), lying
        if kind not in self._known and (labels is None or bool((labels != IGNORED).any())):
            self._known[kind] = alignment_of(loss, logits, labels)
        if labels is None or labels.is_floating_point():
            return labels
        return self._known.get(kind, Alignment()).targets(labels, logits.shape[:-1])


def targets_within(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
    """The targets of the logits that a model makes of keyword arguments with labels among them; None: without labels.

    The model is asked by its own loss of one example, in eval mode. A model that returns none takes the labels as they
    are: one for each row.

    Raises:
        ValueError: as :func:`alignment_of`, and :meth:`Alignment.targets`.
        TypeError: the labels are no tensor, or the model returns no logits.
    """
    labels = labels_in(inputs)
    if labels is None or labels.is_floating_point():
        return labels
    counting = (labels.reshape(len(labels), -1) != IGNORED).any(-1)
    example = int(counting.float().argmax())
    asked = map_inputs(dict(inputs), lambda x: x[example : example + 1] if x.dim() and len(x) == len(labels) else x)
    with eval_mode(model), torch.enable_grad():
        found: dict[str, Any] = {}

        def note(module: nn.Module, args: Any, output: Any) -> None:
            found["loss"] = getattr(output, "loss", None)

        hook = model.register_forward_hook(note)
        try:
            logits = call_model(model, asked)
        finally:
            hook.remove()
    loss = found["loss"]
    own = labels_in(asked)
    alignment = Alignment()
    if isinstance(loss, Tensor) and loss.requires_grad and bool(counting.any()):
        alignment = alignment_of(loss, logits, own)
    return alignment.targets(labels, torch.Size((len(labels), *logits.shape[1:-1])))


def _gradient(loss: Tensor, logits: Tensor) -> Tensor:
    """∂loss/∂logits, times the number of rows: of a mean it is then about 1 at a label."""
    rows = float(max(1, min(logits[..., 0].numel(), 1 << 15)))  # within float16
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

"""Which targets the rows of logits have, asked of the loss."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfisher.alignment import Alignment, Alignments, alignment_of, labels_in
from fastfisher.data import split

BATCH, LENGTH, CLASSES = 3, 5, 7


def logits(*shape: int) -> Tensor:
    source = torch.Generator().manual_seed(0)
    return torch.randn(*(shape or (BATCH, LENGTH, CLASSES)), generator=source).requires_grad_()


def labels() -> Tensor:
    found = torch.randint(CLASSES, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    found[0, 3:], found[2, :2] = -100, -100
    return found


def mean(z: Tensor, y: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(z.reshape(-1, z.shape[-1]), y.reshape(-1), **options)


def following(y: Tensor) -> Tensor:
    return F.pad(y[:, 1:], (0, 1), value=-100)


LOSSES = {
    "mean": mean,
    "summed": lambda z, y: mean(z, y, reduction="sum") / 40,
    "smoothed": lambda z, y: mean(z, y, label_smoothing=0.2),
    "weighted": lambda z, y: mean(z, y, weight=torch.arange(1.0, CLASSES + 1)),
    "with another term": lambda z, y: mean(z, y) + 3.0,
    "focal": lambda z, y: ((1 - (-mean(z, y, reduction="none")).exp()) ** 2 * mean(z, y, reduction="none")).sum(),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_the_rows_say_whether_labels_are_shifted(name: str, dtype: torch.dtype) -> None:
    y = labels()
    for shift, targets in ((0, y), (1, following(y))):
        z = logits().detach().to(dtype).requires_grad_()
        assert alignment_of(LOSSES[name](z.float(), targets), z, y) == Alignment(shift)
    assert torch.equal(Alignment(0).targets(y, z.shape[:-1]), y)
    assert torch.equal(Alignment(1).targets(y, z.shape[:-1]), following(y))


@pytest.mark.parametrize("shift", [0, 1])
def test_rows_in_front_of_the_labels_count_for_nothing(shift: int) -> None:
    z, y = logits(BATCH, LENGTH + 2, CLASSES), labels()
    whole = F.pad(y, (2, 0), value=-100)
    expected = following(whole) if shift else whole
    found = alignment_of(mean(z, expected), z, y)
    assert found == Alignment(shift) and torch.equal(found.targets(y, z.shape[:-1]), expected)


def test_sure_rows_and_copies_in_another_precision() -> None:
    z, y = logits(), labels()
    with torch.no_grad():
        z[1, 1, y[1, 1]] = 1e4  # its gradient is exactly 0
    assert alignment_of(mean(z, y), z, y) == Alignment(0)
    low = (z * 1).bfloat16()
    assert alignment_of(mean(low.float(), following(y)), low.float(), y) == Alignment(1)


def test_classification_and_probabilities() -> None:
    z, y = logits(BATCH, CLASSES), torch.tensor([2, -100, 0])
    assert alignment_of(mean(z, y), z, y) == Alignment(0)
    assert torch.equal(Alignment(0).targets(y[:, None], z.shape[:-1]), y)
    soft = torch.rand(BATCH, CLASSES).softmax(-1)
    assert alignment_of(F.cross_entropy(z, soft), z, soft) == Alignment(0)
    assert alignment_of(F.cross_entropy(z, soft), z, None) == Alignment(0)


@pytest.mark.parametrize(
    ("loss", "y"),
    [
        (lambda z, y: F.mse_loss(z[:, 0, 0], y), torch.randn(BATCH)),
        (lambda z, y: F.mse_loss(z[:, 0], y), torch.randn(BATCH, CLASSES)),
        (lambda z, y: F.binary_cross_entropy_with_logits(z[:, 0], y), torch.randint(2, (BATCH, CLASSES)).float()),
        (lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, CLASSES).float()), labels().clamp(min=0)),
        (lambda z, y: mean(z, y) + 0.1 * z.logsumexp(-1).square().mean(), labels()),
    ],
)
def test_a_loss_without_a_softmax_is_refused(loss: Any, y: Tensor) -> None:
    z = logits()
    with pytest.raises(ValueError, match=r"loss: expected a cross-entropy of the softmax .* state the targets"):
        alignment_of(loss(z, y), z, y)


def test_what_no_arrangement_fits_is_refused() -> None:
    z, y = logits(), labels()
    for targets in (following(following(y)), torch.where(y == y[1, 1], -100, y)):
        with pytest.raises(ValueError, match=r"loss: expected a mean over the rows .* of 15 rows"):
            alignment_of(mean(z, targets), z, y)
    with pytest.raises(ValueError, match="loss: expected a mean over the rows"):  # nothing says which do not count
        alignment_of(mean(z, y), z, None)
    with pytest.raises(ValueError, match="made of the model's logits"):
        alignment_of(mean(logits(), y), z, y)
    with pytest.raises(ValueError, match="NaN"):
        alignment_of(mean(z, y) * torch.nan, z, y)
    with pytest.raises(ValueError, match=r"labels: expected at most one .* got shape \(3, 6\)"):
        alignment_of(mean(z, y), z, F.pad(y, (0, 1)))
    with pytest.raises(ValueError, match="labels: expected class indices, or probabilities"):
        alignment_of(mean(z, y), z, torch.rand(BATCH, LENGTH, CLASSES))


def test_each_kind_of_batch_is_asked_once() -> None:
    asked = Alignments()
    z, y = logits(), labels()
    empty = torch.full_like(y, -100)
    assert torch.equal(asked.targets(mean(z, y), z, empty), empty)  # which says nothing
    assert torch.equal(asked.targets(mean(z, following(y)), z, y), following(y))
    assert torch.equal(asked.targets(torch.zeros(()), z, y), following(y))
    one = logits(BATCH, CLASSES)
    assert torch.equal(asked.targets(mean(one, y[:, 2]), one, y[:, 2]), y[:, 2])
    assert asked.targets(mean(one, y[:, 2].clamp(min=0)), one, None) is None


class Model(nn.Module):
    """A language model with a loss of its own, or without one."""

    def __init__(self, loss: Any, rows_in_front: int = 0) -> None:
        super().__init__()
        self.embed, self.head, self.loss, self.front = (
            nn.Embedding(CLASSES, 4),
            nn.Linear(4, CLASSES),
            loss,
            rows_in_front,
        )

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        z = F.pad(self.head(self.embed(input_ids)), (0, 0, self.front, 0))
        made = (
            {}
            if self.loss is None or labels is None
            else {"loss": self.loss(z, F.pad(labels, (self.front, 0), value=-100))}
        )
        return SimpleNamespace(logits=z, **made)


@pytest.mark.parametrize("front", [0, 2])
@pytest.mark.parametrize(("loss", "shift"), [(mean, 0), (lambda z, y: mean(z, following(y)), 1), (None, 0)])
def test_labels_within_a_batch(loss: Any, shift: int, front: int) -> None:
    model, y = Model(loss, front).train(), labels()
    y[0] = -100  # the first example says nothing
    batch = {"input_ids": y.clamp(min=0), "labels": y}
    expected = Alignment(shift).targets(y, torch.Size((BATCH, LENGTH + front)))
    for given in (batch, UserDict(batch)):
        call, found = split(model, given)
        assert torch.equal(found, expected) and call.kwargs["labels"] is y
    assert split(model, {"input_ids": y.clamp(min=0)})[1] is None and split(model, [batch, y])[1] is y


def test_where_labels_are() -> None:
    y = labels()
    assert labels_in(UserDict(labels=y)) is y and labels_in({"labels": None}) is None and labels_in((y, y)) is None
    assert labels_in({"labels": y, "shift_labels": y[0]}).shape == y[0].shape
    with pytest.raises(TypeError, match="labels: expected a tensor, got list"):
        labels_in({"labels": [1, 2]})

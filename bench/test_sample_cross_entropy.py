"""``sample_cross_entropy`` and ``sample_binary_cross_entropy``: loss, labels and logit gradient against eager PyTorch,
torch.compile, and one copy.

First what users call, ``fastfisher.sample_cross_entropy(logits)`` with its backward, a key drawn and arguments checked;
then the operator alone, which gives loss, labels and gradient at once.

The floor is to read the logits once and write the gradient once: one ``clone``, which like the operator allocates its
result. Eager is what one writes without this package: softmax, multinomial, cross-entropy, autograd. The compiled rival
draws its labels by Gumbel argmax, because multinomial does not fuse.

The binary loss has a loss and a label for each logit: it reads one array and writes three, which is two copies.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastfisher
from bench.conftest import Bar
from fastfisher import ops

SIZES = [(128, 10), (128, 100), (128, 1000), (4096, 1000), (512, 50257), (256, 128256)]
BINARY_SIZES = [(128, 10), (128, 1000), (4096, 1000)]
KEY = torch.tensor([1, 2])


def eager(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sampled labels, mean loss and gradient by PyTorch's own functions."""
    logits = logits.detach().requires_grad_()
    labels = torch.multinomial(logits.detach().softmax(1), 1).squeeze(1)
    loss = F.cross_entropy(logits, labels)
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), labels, gradient


def gumbel(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by Gumbel argmax and the softmax's gradient written out: what torch.compile fuses best."""
    labels = (logits - torch.empty_like(logits).exponential_().log()).argmax(1)
    log_p = logits.log_softmax(1)
    loss = -log_p.gather(1, labels[:, None]).mean()
    gradient = (log_p.exp() - F.one_hot(labels, logits.shape[1])) / logits.shape[0]
    return loss, labels, gradient


def times(logits: Tensor) -> dict[str, int]:
    """How often a call is measured, and how many calls at once: the more, the shorter it is."""
    small = logits.numel() < 2**18
    return {"rounds": 21 if small else 9, "repeat": 50 if small else 2}


@pytest.mark.parametrize(("rows", "classes"), SIZES, ids=str)
def test_public_call(rows: int, classes: int, compare: Any) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(rows, classes).requires_grad_(), torch.randint(classes, (rows,))

    def ours() -> None:
        loss, _ = fastfisher.sample_cross_entropy(logits)
        torch.autograd.grad(loss, logits)

    compare(
        "sample_cross_entropy, the public call, forward and backward",
        f"{rows}x{classes}",
        ours,
        {
            "eager": (lambda: eager(logits), Bar({10: 2.5, 1000: 8}.get(classes) if rows == 128 else None, True)),
            "cross-entropy with given labels": (
                lambda: torch.autograd.grad(F.cross_entropy(logits, targets), logits),
                Bar(None, True),
            ),
        },
        **times(logits),
    )


@pytest.mark.parametrize(("rows", "classes"), SIZES, ids=str)
def test_sample_cross_entropy(rows: int, classes: int, compare: Any) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    logits = torch.randn(rows, classes)
    compiled = torch.compile(gumbel, dynamic=False)
    compare(
        "sample_cross_entropy, the operator",
        f"{rows}x{classes}",
        lambda: ops.sample_cross_entropy(logits, KEY, 1 / rows),
        {
            "eager": (lambda: eager(logits), Bar(10, True)),
            "torch.compile": (lambda: compiled(logits), Bar(3 if classes == 10 else 4, True)),
            "one copy": (logits.clone, Bar(1.5 if rows * classes >= 2**21 else None, False)),
        },
        **times(logits),
    )


def eager_binary(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sampled labels 0 and 1, mean loss and gradient by PyTorch's own functions."""
    logits = logits.detach().requires_grad_()
    labels = torch.bernoulli(torch.sigmoid(logits.detach()))
    loss = F.binary_cross_entropy_with_logits(logits, labels)
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), labels, gradient


def written_out_binary(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the gradient written out, which torch.compile fuses."""
    p = logits.sigmoid()
    labels = (torch.rand_like(p) < p).to(p.dtype)
    loss = F.binary_cross_entropy_with_logits(logits, labels)
    return loss, labels, (p - labels) / logits.numel()


@pytest.mark.parametrize(("rows", "columns"), BINARY_SIZES, ids=str)
def test_public_binary_call(rows: int, columns: int, compare: Any) -> None:
    torch.manual_seed(0)
    logits = torch.randn(rows, columns).requires_grad_()
    targets = torch.rand(rows, columns).round()

    def ours() -> None:
        loss, _ = fastfisher.sample_binary_cross_entropy(logits)
        torch.autograd.grad(loss, logits)

    compare(
        "sample_binary_cross_entropy, the public call, forward and backward",
        f"{rows}x{columns}",
        ours,
        {
            "eager": (lambda: eager_binary(logits), Bar(5 if rows == 4096 else None, True)),
            "the loss with given labels": (
                lambda: torch.autograd.grad(F.binary_cross_entropy_with_logits(logits, targets), logits),
                Bar(None, True),
            ),
        },
        **times(logits),
    )


@pytest.mark.parametrize(("rows", "columns"), BINARY_SIZES, ids=str)
def test_sample_binary_cross_entropy(rows: int, columns: int, compare: Any) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    logits = torch.randn(rows, columns)
    compiled = torch.compile(written_out_binary, dynamic=False)
    compare(
        "sample_binary_cross_entropy, the operator",
        f"{rows}x{columns}",
        lambda: ops.sample_binary_cross_entropy(logits, KEY, 1 / logits.numel()),
        {
            "eager": (lambda: eager_binary(logits), Bar(None, True)),
            "torch.compile": (lambda: compiled(logits), Bar(None, True)),
            "one copy": (logits.clone, Bar(None, False)),
        },
        **times(logits),
    )

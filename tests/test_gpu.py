"""What needs a GPU: the penalty and the draws on CUDA tensors agree with the CPU (``make gpu``)."""

from __future__ import annotations

import copy

import pytest
import torch

import fastfisher
from fastfisher.training.networks import build_network
from tests.networks import flat, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore::fastfisher.SlowPathWarning"),
]


def test_labels_equal_those_of_the_cpu() -> None:
    logits, key = torch.randn(500, 1000), torch.tensor([3, 4])
    _, expected = fastfisher.sample_cross_entropy(logits, key=key)
    _, found = fastfisher.sample_cross_entropy(logits.cuda(), key=key.cuda())
    assert (found.cpu() != expected).float().mean() < 0.01


def test_a_row_without_a_softmax_is_marked() -> None:
    logits = torch.randn(5, 10)
    logits[2] = float("nan")
    nll, labels = fastfisher.sample_cross_entropy(logits.cuda(), reduction="none")
    assert labels[2] == -1 and nll[2].isnan() and nll[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("method", ["double_backprop", "finite_difference"])
def test_the_penalty_equals_that_of_the_cpu(method: str) -> None:
    torch.manual_seed(0)
    model = build_network("simple_cnn", in_channels=3, image_size=32, classes=10).double()
    x, labels = torch.randn(8, 3, 32, 32, dtype=torch.float64), torch.randint(10, (8,))
    twin = copy.deepcopy(model).cuda()
    exact = fastfisher.penalty(model, x, labels=labels)
    found = fastfisher.penalty(twin, x.cuda(), labels=labels.cuda(), method=method, difference="central")
    expected = flat(list(torch.autograd.grad(exact, list(model.parameters()))))
    assert relative_error(flat(list(torch.autograd.grad(found, list(twin.parameters())))).cpu(), expected) < 1e-5

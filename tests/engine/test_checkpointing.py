"""Checkpoints within a watched forward: nothing is recomputed, and what would be is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from fastfisher.engine.checkpointing import graph_nodes, keep_saved_tensors, refuse_recomputed


class Keeping(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keep_saved_tensors()
        return func(*args, **(kwargs or {}))


class Counted(nn.Module):
    """Counts its calls; within, another checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner, self.calls = nn.Linear(3, 3), nn.Linear(3, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return checkpoint(self.inner, self.outer(x).tanh(), use_reentrant=False).tanh()


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


def top_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(False)  # type: ignore[attr-defined]


def test_a_watched_checkpoint_recomputes_nothing() -> None:
    torch.manual_seed(0)
    model, x = Counted(), torch.randn(4, 3, requires_grad=True)
    (plain,) = torch.autograd.grad(model(x).sum(), x)
    with Keeping():
        y = checkpoint(model, x, use_reentrant=False).sum()
    assert top_hooks() is None
    model.calls = 0
    (found,) = torch.autograd.grad(y, x)
    assert model.calls == 0 and torch.equal(found, plain)
    (again,) = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).sum(), x)
    assert model.calls == 2 and torch.equal(again, plain)  # where nothing watches, checkpoints are as they were


def test_what_a_custom_function_saves_is_kept_too() -> None:
    x = torch.randn(3, requires_grad=True)
    with Keeping():
        y = checkpoint(Cube.apply, x, use_reentrant=False).sum()
    for node in graph_nodes(y):
        refuse_recomputed(node)
    torch.testing.assert_close(torch.autograd.grad(y, x)[0], 3 * x.detach() ** 2)


def test_hooks_of_others_stay() -> None:
    x, packed = torch.randn(3, requires_grad=True), []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t

    with Keeping(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        (x.exp() * x).sum()
        assert packed and top_hooks()[0] is pack


def test_a_gradient_within_the_forward_recomputes_as_usual() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), torch.randn(3, requires_grad=True)
    y = checkpoint(model, x, use_reentrant=False).sum()
    (plain,) = torch.autograd.grad(model(x).sum(), x)
    with Keeping():
        (found,) = torch.autograd.grad(y, x)
    assert torch.equal(found, plain)


def test_what_would_be_recomputed_is_refused() -> None:
    x = torch.randn(3, requires_grad=True)

    def unseen(x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return Cube.apply(x)

    for make, message in (
        (lambda: checkpoint(torch.exp, x, use_reentrant=True), "use_reentrant=False"),
        (lambda: checkpoint(unseen, x, use_reentrant=False), "Cube.*call it outside"),
    ):
        with Keeping():
            y = make().sum()
        with pytest.raises(NotImplementedError, match=message):
            for node in graph_nodes(y):
                refuse_recomputed(node)

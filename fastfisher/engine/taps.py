"""The nodes after the layers of a captured forward, which hand over the gradients of their outputs in the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastfisher.engine.layers import Layer, Recurrence

Receive = Callable[[Layer, Tensor], None]
"""Takes a layer and the gradient of its output."""


class Receiver:
    """What the nodes of a forward hand their gradients to.

    They hold this and not the capture: the capture holds the logits, the logits their nodes, and Python's garbage
    collector cannot see a cycle that goes through autograd's nodes, so that it would never be freed.

    Attributes:
        function: who receives during :meth:`Capture.backward`.
        retain: whether another backward may follow.
        strayed: whether a gradient came at another time, because the forward takes one itself.
    """

    def __init__(self) -> None:
        self.function: Receive | None = None
        self.retain, self.strayed = True, False

    def __call__(self, layer: Layer, grad: Tensor) -> None:
        """Called by the node after a layer."""
        if self.function is None:
            self.strayed = True
            return
        layer.check_unchanged()
        self.function(layer, grad)
        if not self.retain:
            layer.release()


class Tap(torch.autograd.Function):
    """The identity, in place; its backward hands the gradient of the layer's output over."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, anchor: Tensor, receiver: Receiver, layer: Layer) -> Tensor:
        ctx.receiver, ctx.layer = receiver, layer
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is not None:
            ctx.receiver(ctx.layer, grad)
        return grad if ctx.needs_input_grad[0] else None, None, None, None


class Own(torch.autograd.Function):
    """A layer's own forward and backward, which also hands the gradient of the output over.

    Without an operand the output is a copy of a parameter for each example.
    """

    @staticmethod
    def forward(ctx: Any, operand: Tensor | None, anchor: Tensor, receiver: Receiver, layer: Layer) -> Tensor:
        ctx.receiver, ctx.layer = receiver, layer
        ctx.set_materialize_grads(False)
        return layer.output()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is not None:
            ctx.receiver(ctx.layer, grad)
            grad = ctx.layer.pull_back(grad) if ctx.needs_input_grad[0] else None
        return grad, None, None, None


class TapOfRecurrence(torch.autograd.Function):
    """A recurrent layer: its backward hands over the gradients of the products of all time steps, layer by layer."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, h: Tensor, c: Tensor | None, anchor: Tensor, receiver: Receiver, recurrence: Recurrence
    ) -> Any:
        ctx.receiver, ctx.recurrence = receiver, recurrence
        return recurrence.forward(rows, h, c)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        with torch.no_grad():
            found, states = ctx.recurrence.backward(*grads)
            inputs = ctx.recurrence.inputs(found[0][1]) if ctx.needs_input_grad[0] else None
            for layer, grad in found:
                ctx.receiver(layer, grad)
        return inputs, *states, None, None, None

"""RNN, LSTM and GRU: the products of all time steps are linear layers, one on the inputs and one on the states.

PyTorch runs a whole recurrent network in one call. It is written out here, layer by layer and direction by direction,
without autograd inside a layer: in the backward the gradients of the gates come out one step after the other, and
those of all steps are what the formula of a linear layer needs. The rows of all time steps lie one behind the other as
in a packed sequence (a batch of equal lengths is one, too): ``sizes[t]`` rows of step t, those of the longest sequences
first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfisher.layers.base import Layer, Layout
from fastfisher.layers.linear import Linear

Tracked = Callable[[Tensor], bool]


class Recurrence:
    """One layer in one direction.

    Attributes:
        layers: the linear layers that it consists of: on its inputs, on its states, and the projection of an LSTM.
    """

    gates = 1

    def __init__(
        self, rows: Tensor, weights: Sequence[Tensor], biases: bool, sizes: Sequence[int], reverse: bool,
        tracked: Tracked,
    ) -> None:  # fmt: skip
        names = ["input", "hidden", *(["input_bias", "hidden_bias"] if biases else []), "projection"]
        found = dict(zip(names, weights, strict=False))
        detached = {name: weight.detach() for name, weight in found.items()}
        self.w_input, self.w_hidden = detached["input"], detached["hidden"]
        self.b_input, self.b_hidden = detached.get("input_bias"), detached.get("hidden_bias")
        self.projection = detached.get("projection")
        ends = torch.tensor(sizes).cumsum(0).tolist()
        self.steps = [(end - size, end, size) for end, size in zip(ends, sizes, strict=True)]
        self.order = self.steps[::-1] if reverse else self.steps

        def linear(weight: str, bias: str) -> Linear:
            slots = {slot: found[n] for slot, n in (("weight", weight), ("bias", bias)) if n in found}
            slots = {slot: t for slot, t in slots.items() if tracked(t)}
            return Linear(rows.detach(), found[weight], found.get(bias), slots)

        self.layers = [linear("input", "input_bias"), linear("hidden", "hidden_bias")]
        if self.projection is not None:
            self.layers.append(linear("projection", "none"))
        self.shape = rows.shape

    def forward(self, rows: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, ...]:
        """The states of all steps, [rows, features], and the last one of each sequence (with the cells of an LSTM)."""
        raise NotImplementedError

    def backward(self, *grads: Tensor) -> tuple[list[tuple[Layer, Tensor]], list[Tensor | None]]:
        """The gradients of the outputs of :attr:`layers`, first that of the inputs, and those of the initial states."""
        raise NotImplementedError

    def keep(self, layer: int, rows: Tensor) -> None:
        """Notes the inputs of a linear layer, in the shape in which the rows of this recurrence came."""
        operand = rows.view(*self.shape[:-1], rows.shape[-1])
        self.layers[layer].operand, self.layers[layer]._version = operand, operand._version

    def gates_of(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """What the inputs of all steps add to the gates."""
        return F.linear(rows.reshape(-1, rows.shape[-1]), self.w_input, bias)

    def inputs(self, gates: Tensor) -> Tensor:
        """The gradient of the inputs of all steps."""
        return (gates @ self.w_input).view(self.shape)

    def bias(self) -> Tensor | None:
        """Both biases together, where they are added."""
        return None if self.b_input is None or self.b_hidden is None else self.b_input + self.b_hidden


class Elman(Recurrence):
    """h' = tanh or ReLU of W x + b + U h + c."""

    def __init__(self, relu: bool, *args: Any) -> None:
        super().__init__(*args)
        self.relu = relu

    def forward(self, rows: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, ...]:
        a, h = self.gates_of(rows, self.bias()), h.clone()
        before, w = a.new_empty(len(a), h.shape[1]), self.w_hidden.mT
        for start, end, size in self.order:
            before[start:end] = h[:size]
            a[start:end].addmm_(h[:size], w)
            (torch.relu_ if self.relu else torch.tanh_)(a[start:end])
            h[:size] = a[start:end]
        self.states = a
        self.keep(1, before)
        return a.clone(), h

    def backward(self, *grads: Tensor) -> tuple[list[tuple[Layer, Tensor]], list[Tensor | None]]:
        out, dh = grads[0], grads[1].clone()
        slope = (self.states > 0).to(out.dtype) if self.relu else 1 - self.states.square()
        d = torch.empty_like(slope)
        for start, end, size in reversed(self.order):
            torch.add(dh[:size], out[start:end], out=d[start:end])
            d[start:end] *= slope[start:end]
            torch.mm(d[start:end], self.w_hidden, out=dh[:size])
        return [(layer, d) for layer in self.layers], [dh, None]


class Lstm(Recurrence):
    """Gates i, f, g, o: c' = σ(f) c + σ(i) tanh(g), h' = σ(o) tanh(c'), with a projection P h' of it in some."""

    def forward(self, rows: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, ...]:
        assert c is not None
        a, h, c = self.gates_of(rows, self.bias()), h.clone(), c.clone()
        width, w = c.shape[1], self.w_hidden.mT
        before, cells = a.new_empty(len(a), h.shape[1]), a.new_empty(len(a), width)
        tanhs, states = torch.empty_like(cells), torch.empty_like(cells)
        outputs = states if self.projection is None else a.new_empty(len(a), h.shape[1])
        for start, end, size in self.order:
            gates = a[start:end]
            before[start:end] = h[:size]
            gates.addmm_(h[:size], w)
            gates[:, : 2 * width].sigmoid_()
            gates[:, 2 * width : 3 * width].tanh_()
            gates[:, 3 * width :].sigmoid_()
            i, f, g, o = gates.chunk(4, 1)
            cells[start:end] = c[:size]  # those before this step
            c[:size].mul_(f).addcmul_(i, g)
            torch.tanh(c[:size], out=tanhs[start:end])
            torch.mul(o, tanhs[start:end], out=states[start:end])
            if self.projection is not None:
                torch.mm(states[start:end], self.projection.mT, out=outputs[start:end])
            h[:size] = outputs[start:end]
        self.activations, self.cells, self.tanhs = a, cells, tanhs
        self.keep(1, before)
        if self.projection is not None:
            self.keep(2, states)
        return outputs, h, c

    def backward(self, *grads: Tensor) -> tuple[list[tuple[Layer, Tensor]], list[Tensor | None]]:
        out, dh, dc = grads[0], grads[1].clone(), grads[2].clone()
        i, f, g, o = self.activations.chunk(4, 1)
        width = i.shape[1]
        # The gradient of each gate is that of the cell, or of the state, times a factor known beforehand.
        factors = torch.cat([g * i * (1 - i), self.cells * f * (1 - f), i * (1 - g * g), self.tanhs * o * (1 - o)], 1)
        to_cell = o * (1 - self.tanhs.square())
        d = torch.empty_like(factors)
        projected = torch.empty_like(out) if self.projection is not None else None
        for start, end, size in reversed(self.order):
            state = dh[:size] + out[start:end]
            if self.projection is not None and projected is not None:
                projected[start:end] = state
                state = state @ self.projection
            cell = dc[:size].addcmul_(state, to_cell[start:end])
            rows, known = d[start:end], factors[start:end]
            torch.mul(
                known[:, : 3 * width].view(size, 3, width), cell[:, None], out=rows[:, : 3 * width].view(size, 3, width)
            )
            torch.mul(known[:, 3 * width :], state, out=rows[:, 3 * width :])
            cell.mul_(f[start:end])
            torch.mm(rows, self.w_hidden, out=dh[:size])
        found: list[tuple[Layer, Tensor]] = [(self.layers[0], d), (self.layers[1], d)]
        if projected is not None:
            found.append((self.layers[2], projected))
        return found, [dh, dc]


class Gru(Recurrence):
    """Gates r, z, n: n = tanh(W x + b + σ(r) (U h + c)), h' = (1 − σ(z)) n + σ(z) h."""

    def forward(self, rows: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, ...]:
        a, h = self.gates_of(rows, self.b_input), h.clone()
        width, w = h.shape[1], self.w_hidden.mT
        before, candidates = a.new_empty(len(a), width), a.new_empty(len(a), width)
        outputs = torch.empty_like(before)
        for start, end, size in self.order:
            gates = a[start:end]
            before[start:end] = h[:size]
            hidden = h[:size] @ w if self.b_hidden is None else torch.addmm(self.b_hidden, h[:size], w)
            gates[:, : 2 * width].add_(hidden[:, : 2 * width]).sigmoid_()
            r, z, n = gates.chunk(3, 1)
            candidates[start:end] = hidden[:, 2 * width :]
            n.addcmul_(r, candidates[start:end]).tanh_()
            torch.lerp(n, h[:size], z, out=outputs[start:end])
            h[:size] = outputs[start:end]
        self.activations, self.candidates, self.before = a, candidates, before
        self.keep(1, before)
        return outputs, h

    def backward(self, *grads: Tensor) -> tuple[list[tuple[Layer, Tensor]], list[Tensor | None]]:
        out, dh = grads[0], grads[1].clone()
        r, z, n = self.activations.chunk(3, 1)
        width = r.shape[1]
        to_n = (1 - z) * (1 - n * n)
        # Of the state: the gradients of r, z and of the state's part of n, in the order of the gates.
        factors = torch.cat([to_n * self.candidates * r * (1 - r), (self.before - n) * z * (1 - z), to_n * r], 1)
        hidden = torch.empty_like(factors)
        states = torch.empty_like(self.before)
        for start, end, size in reversed(self.order):
            state = torch.add(dh[:size], out[start:end], out=states[start:end])
            torch.mul(
                factors[start:end].view(size, 3, width), state[:, None], out=hidden[start:end].view(size, 3, width)
            )
            torch.addmm(state * z[start:end], hidden[start:end], self.w_hidden, out=dh[:size])
        d = torch.cat([hidden[:, : 2 * width], to_n * states], 1)
        return [(self.layers[0], d), (self.layers[1], hidden)], [dh, None]


# ---- calls -----------------------------------------------------------------------------------------------------------

Run = Callable[[Recurrence, Tensor, Tensor, Tensor | None], Any]


@dataclass
class Unrolled:
    """A call of a recurrent network, taken apart.

    Attributes:
        operand: the inputs, as they were given.
        packed: whether they are the rows of a packed sequence.
    """

    kind: str
    operand: Tensor
    packed: bool
    sizes: list[int]
    states: list[Tensor]
    weights: Sequence[Tensor]
    biases: bool
    levels: int
    dropout: float
    train: bool
    bidirectional: bool
    batch_first: bool
    cell: bool
    tracked: Tracked

    @property
    def products(self) -> int:
        """How many linear layers it consists of."""
        return sum(weight.dim() == 2 for weight in self.weights)

    def layout(self, layout: Layout) -> Layout | None:
        """That of the rows, [steps, sequences, features], given that of the operand."""
        dim = 0 if self.batch_first or self.cell else 1
        return replace(layout, dim=1) if layout.dim == dim or layout.examples == 1 else None

    def run(self, run: Run) -> Any:
        """What the call gives, where ``run`` runs the forward of one layer in one direction."""
        x = self.operand
        if self.cell:
            x = x[None]
        elif self.batch_first:
            x = x.transpose(0, 1)
        directions = 2 if self.bidirectional else 1
        each = len(self.weights) // (self.levels * directions)
        last: list[list[Tensor]] = []
        for level in range(self.levels):
            found = []
            for direction in range(directions):
                number = level * directions + direction
                weights = self.weights[number * each : (number + 1) * each]
                recurrence = self._recurrence(x, weights, direction == 1)
                h, *rest = (state[number] for state in self.states)
                out, *ends = run(recurrence, x, h, rest[0] if rest else None)
                found.append(out)
                last.append(ends)
            x = found[0] if directions == 1 else torch.cat(found, -1)
            x = x if self.packed else x.view(len(self.sizes), self.sizes[0], -1)
            if self.dropout and self.train and level < self.levels - 1:
                x = F.dropout(x, self.dropout, True)
        if self.cell:
            ends = last[0]
            return ends[0] if len(ends) == 1 else tuple(ends)
        stacked = [torch.stack(states) for states in zip(*last, strict=True)]
        return (x.transpose(0, 1) if self.batch_first else x, *stacked)

    def _recurrence(self, x: Tensor, weights: Sequence[Tensor], reverse: bool) -> Recurrence:
        rest = (x, weights, self.biases, self.sizes, reverse, self.tracked)
        if self.kind == "lstm":
            return Lstm(*rest)
        return Gru(*rest) if self.kind == "gru" else Elman(self.kind == "rnn_relu", *rest)


_NETWORKS = {getattr(torch, name): name for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")}
_CELLS = {getattr(torch, f"{name}_cell"): name for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")}


def unrolled(func: Any, args: Any, kwargs: Any, tracked: Tracked) -> Unrolled | None:
    """A call of a recurrent network or cell taken apart; None for other calls, and for what is not served here."""
    if not (func in _NETWORKS or func in _CELLS) or kwargs:
        return None
    x = args[0]
    if tracked(x) or x.is_complex() or torch.is_autocast_enabled(x.device.type):
        return None
    if func in _CELLS:
        states = [args[1]] if isinstance(args[1], Tensor) else list(args[1])
        weights = [w for w in args[2:] if w is not None]
        if x.dim() != 2:
            return None
        return Unrolled(
            _CELLS[func], x, False, [len(x)], [state[None] for state in states], weights, len(weights) == 4, 1, 0.0,
            False, False, False, True, tracked,
        )  # fmt: skip
    packed = not isinstance(args[3], bool)
    sizes: list[int]
    if packed:
        _, batch_sizes, hx, weights, biases, levels, dropout, train, bidirectional = args
        sizes, batch_first = batch_sizes.tolist(), False
    else:
        _, hx, weights, biases, levels, dropout, train, bidirectional, batch_first = args
        if x.dim() != 3:
            return None
        steps, batch = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
        sizes = [batch] * steps
    states = [hx] if isinstance(hx, Tensor) else list(hx)
    if not sizes:
        return None
    return Unrolled(
        _NETWORKS[func], x, packed, sizes, states, weights, biases, levels, dropout, train, bidirectional,
        batch_first, False, tracked,
    )  # fmt: skip

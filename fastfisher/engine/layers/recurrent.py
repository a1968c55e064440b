"""RNN, LSTM and GRU: the products of all time steps are linear layers, one on the inputs and one on the states.

PyTorch runs a whole recurrent network in one call. It is written out here, layer by layer and direction by direction,
without autograd inside a layer: in the backward the gradients of the gates come out one step after the other, and
those of all steps are what the formula of a linear layer needs. The rows of all time steps lie one behind the other as
in a packed sequence (a batch of equal lengths is one, too): ``sizes[t]`` rows of step t, those of the longest sequences
first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfisher.autocast import autocast_dtype
from fastfisher.engine.layers.base import Layer, Layout, Tracked
from fastfisher.engine.layers.linear import Linear


class Recurrence:
    """One layer in one direction.

    Attributes:
        layers: the linear layers that it consists of: on its inputs, on its states, and the projection of an LSTM.
    """

    def __init__(
        self, rows: Tensor, weights: Sequence[Tensor], biases: bool, sizes: list[int], reverse: bool, tracked: Tracked
    ) -> None:
        names = ["input", "hidden", *(["input_bias", "hidden_bias"] if biases else []), "projection"]
        found = dict(zip(names, weights, strict=False))
        detached = {name: weight.detach() for name, weight in found.items()}
        self.w_input, self.w_hidden = detached["input"], detached["hidden"]
        self.b_input, self.b_hidden = detached.get("input_bias"), detached.get("hidden_bias")
        self.projection = detached.get("projection")
        self.sizes, self.reverse = sizes, reverse
        self.shape = rows.shape
        rows = rows.detach()

        def linear(weight: str, bias: str) -> Linear:
            slots = {slot: found[n] for slot, n in (("weight", weight), ("bias", bias)) if n in found}
            slots = {slot: t for slot, t in slots.items() if tracked(t)}
            return Linear(rows, found[weight], found.get(bias), slots)

        self.layers = [linear("input", "input_bias"), linear("hidden", "hidden_bias")]
        if self.projection is not None:
            self.layers.append(linear("projection", "none"))

    def forward(self, rows: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, ...]:
        """The states of all steps, [rows, features], and the last one of each sequence (with the cells of an LSTM)."""
        raise NotImplementedError

    def backward(self, *grads: Tensor) -> tuple[list[tuple[Layer, Tensor]], list[Tensor | None]]:
        """The gradients of the outputs of :attr:`layers`, first that of the inputs, and those of the initial states."""
        raise NotImplementedError

    def inputs(self, gates: Tensor) -> Tensor:
        """The gradient of the inputs of all steps."""
        return (gates @ self.w_input).view(self.shape)

    def _steps(self, *tensors: Tensor, backward: bool = False) -> Iterator[tuple[Tensor, ...]]:
        """The rows of one step after the other, as views."""
        steps = list(zip(*(x.split_with_sizes(self.sizes) for x in tensors), strict=True))
        return iter(steps if self.reverse == backward else steps[::-1])

    def _keep(self, layer: int, rows: Tensor) -> None:
        """Notes the inputs of a linear layer, in the shape in which the rows of this recurrence came."""
        operand = rows.view(*self.shape[:-1], rows.shape[-1])
        self.layers[layer].operand, self.layers[layer]._version = operand, operand._version

    def _gates(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """What the inputs of all steps add to the gates."""
        return F.linear(rows.reshape(-1, rows.shape[-1]), self.w_input, bias)

    def _bias(self) -> Tensor | None:
        """Both biases together, where they are added."""
        return None if self.b_input is None or self.b_hidden is None else self.b_input + self.b_hidden


class _State:
    """The states of the sequences from step to step: those that have ended, or not yet begun, keep theirs."""

    def __init__(self, initial: Tensor, sizes: list[int]) -> None:
        self.uniform = len(set(sizes)) == 1
        self.now = initial if self.uniform else initial.clone()
        self.seen: list[Tensor] = []

    def before(self, rows: Tensor) -> Tensor:
        """The states of the sequences that have a row in this step."""
        state = self.now if self.uniform else self.now[: len(rows)].clone()
        self.seen.append(state)
        return state

    def after(self, state: Tensor) -> None:
        """Takes the new ones."""
        if self.uniform:
            self.now = state
        else:
            self.now[: len(state)] = state

    def all_before(self, reverse: bool) -> Tensor:
        """What :meth:`before` gave, in the order of the rows."""
        return torch.cat(self.seen[::-1] if reverse else self.seen)

    def last(self) -> Tensor:
        """The last state of each sequence."""
        return self.now.clone() if self.uniform else self.now


class Elman(Recurrence):
    """h' = tanh or ReLU of W x + b + U h + c."""

    def __init__(self, relu: bool, *args: Any) -> None:
        super().__init__(*args)
        self.relu = relu

    def forward(self, rows: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, ...]:
        gates, state = self._gates(rows, self._bias()), _State(h, self.sizes)
        w = self.w_hidden.mT
        function = torch.relu_ if self.relu else torch.tanh_
        for (a,) in self._steps(gates):
            state.after(function(a.addmm_(state.before(a), w)))
        self.states = gates
        self._keep(1, state.all_before(self.reverse))
        return gates.clone(), state.last()

    def backward(self, *grads: Tensor) -> tuple[list[tuple[Layer, Tensor]], list[Tensor | None]]:
        out, dh = grads[0], grads[1].clone()
        slope = (self.states > 0).to(out.dtype) if self.relu else 1 - self.states.square()
        gates = torch.empty_like(slope)
        for d, o, s in self._steps(gates, out, slope, backward=True):
            state = dh[: len(d)]
            torch.mul(state.add_(o), s, out=d)
            torch.mm(d, self.w_hidden, out=state)
        return [(layer, gates) for layer in self.layers], [dh, None]


class Lstm(Recurrence):
    """Gates i, f, g, o: c' = σ(f) c + σ(i) tanh(g), h' = σ(o) tanh(c'), with a projection P h' of it in some."""

    def forward(self, rows: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, ...]:
        assert c is not None
        gates, state, cell = self._gates(rows, self._bias()), _State(h, self.sizes), _State(c, self.sizes)
        width, w = c.shape[1], self.w_hidden.mT
        cells = gates.new_empty(len(gates), width)
        tanhs, states = torch.empty_like(cells), torch.empty_like(cells)
        outputs = states if self.projection is None else gates.new_empty(len(gates), h.shape[1])
        i, f, g, o = gates.chunk(4, 1)
        for a, k, t, s, u, i_f, it, ft, gt, ot in self._steps(
            gates, cells, tanhs, states, outputs, gates[:, : 2 * width], i, f, g, o
        ):
            a.addmm_(state.before(a), w)
            i_f.sigmoid_()
            gt.tanh_()
            ot.sigmoid_()
            torch.mul(cell.before(k), ft, out=k).addcmul_(it, gt)
            torch.mul(ot, torch.tanh(k, out=t), out=s)
            if self.projection is not None:
                torch.mm(s, self.projection.mT, out=u)
            state.after(u)
            cell.after(k)
        self.activations, self.cells, self.tanhs = gates, cell.all_before(self.reverse), tanhs
        self._keep(1, state.all_before(self.reverse))
        if self.projection is not None:
            self._keep(2, states)
        return outputs, state.last(), cell.last()

    def backward(self, *grads: Tensor) -> tuple[list[tuple[Layer, Tensor]], list[Tensor | None]]:
        out, dh, dc = grads[0], grads[1].clone(), grads[2].clone()
        i, f, g, o = self.activations.chunk(4, 1)
        width = i.shape[1]
        # The gradient of each gate is that of the cell, or of the state, times a factor known beforehand.
        factors = torch.cat([g * i * (1 - i), self.cells * f * (1 - f), i * (1 - g * g), self.tanhs * o * (1 - o)], 1)
        to_cell = o * (1 - self.tanhs.square())
        gates = torch.empty_like(factors)
        parts = [x[:, : 3 * width].view(len(x), 3, width) for x in (gates, factors)]
        rest = [x[:, 3 * width :] for x in (gates, factors)]
        projected = torch.empty_like(out) if self.projection is not None else out
        for d, u, p, tc, ft, dcell, fcell, dstate, fstate in self._steps(
            gates, out, projected, to_cell, f, *parts, *rest, backward=True
        ):
            total, cell = dh[: len(d)], dc[: len(d)]
            total.add_(u)
            if self.projection is not None:
                p.copy_(total)
                state = p @ self.projection
            else:
                state = total
            cell.addcmul_(state, tc)
            torch.mul(fcell, cell[:, None], out=dcell)
            torch.mul(fstate, state, out=dstate)
            cell.mul_(ft)
            torch.mm(d, self.w_hidden, out=total)
        found: list[tuple[Layer, Tensor]] = [(self.layers[0], gates), (self.layers[1], gates)]
        if self.projection is not None:
            found.append((self.layers[2], projected))
        return found, [dh, dc]


class Gru(Recurrence):
    """Gates r, z, n: n = tanh(W x + b + σ(r) (U h + c)), h' = (1 − σ(z)) n + σ(z) h."""

    def forward(self, rows: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, ...]:
        gates, state = self._gates(rows, self.b_input), _State(h, self.sizes)
        width, w = h.shape[1], self.w_hidden.mT
        candidates = gates.new_empty(len(gates), width)
        outputs = torch.empty_like(candidates)
        r, z, n = gates.chunk(3, 1)
        for k, u, r_z, rt, zt, nt in self._steps(candidates, outputs, gates[:, : 2 * width], r, z, n):
            before = state.before(k)
            hidden = before @ w if self.b_hidden is None else torch.addmm(self.b_hidden, before, w)
            r_z.add_(hidden[:, : 2 * width]).sigmoid_()
            k.copy_(hidden[:, 2 * width :])
            nt.addcmul_(rt, k).tanh_()
            state.after(torch.lerp(nt, before, zt, out=u))
        self.activations, self.candidates, self.before = gates, candidates, state.all_before(self.reverse)
        self._keep(1, self.before)
        return outputs, state.last()

    def backward(self, *grads: Tensor) -> tuple[list[tuple[Layer, Tensor]], list[Tensor | None]]:
        out, dh = grads[0], grads[1].clone()
        r, z, n = self.activations.chunk(3, 1)
        width = r.shape[1]
        to_n = (1 - z) * (1 - n * n)
        # Gradients of r, of z and of the hidden part of n, as multiples of the state's gradient.
        factors = torch.cat([to_n * self.candidates * r * (1 - r), (self.before - n) * z * (1 - z), to_n * r], 1)
        hidden = torch.empty_like(factors)
        states = torch.empty_like(self.before)
        parts, known = hidden.view(len(hidden), 3, width), factors.view(len(factors), 3, width)
        for d, u, s, zt, p, k in self._steps(hidden, out, states, z, parts, known, backward=True):
            total = dh[: len(d)]
            torch.add(total, u, out=s)
            torch.mul(k, s[:, None], out=p)
            torch.mul(s, zt, out=total).addmm_(d, self.w_hidden)
        gates = torch.cat([hidden[:, : 2 * width], to_n * states], 1)
        return [(self.layers[0], gates), (self.layers[1], hidden)], [dh, None]


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
        if layout.examples == 1:  # every sequence belongs to the one example
            return Layout(1, 1, self.sizes[0])
        return replace(layout, dim=1) if layout.dim == dim else None

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
    if tracked(x) or x.is_complex() or autocast_dtype(x.device.type) is not None:
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

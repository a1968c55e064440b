"""Recurrent layers and cells in every form against one backward per example, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import rnn

from tests.measure.test_traces import check

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS: dict[str, Callable[..., nn.Module]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *args, **options: nn.RNN(*args, nonlinearity="relu", **options),
}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two layers": {"num_layers": 2},
    "both directions": {"bidirectional": True, "num_layers": 2},
    "no biases": {"bias": False},
    "dropout": {"num_layers": 2, "dropout": 0.5},
}


class Network(nn.Module):
    """A recurrent network that reads all states, the last ones and, where it is told to, starts from learned ones."""

    def __init__(self, recurrent: nn.Module, batch_first: bool = True, learned: bool = False) -> None:
        super().__init__()
        self.stem, self.recurrent, self.batch_first = nn.Linear(3, 4), recurrent, batch_first
        self.head, self.states = nn.LazyLinear(4), nn.ParameterList()
        if learned:
            shape = (recurrent.num_layers * (2 if recurrent.bidirectional else 1), 1, recurrent.hidden_size)
            self.states = nn.ParameterList(torch.randn(shape) for _ in range(2 if recurrent.mode == "LSTM" else 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = x if self.batch_first else x.transpose(0, 1)
        states = tuple(state.expand(-1, x.shape[0 if self.batch_first else 1], -1) for state in self.states)
        out, last = self.recurrent(x, states if len(states) == 2 else states[0] if states else None)
        last = torch.cat(last, -1) if isinstance(last, tuple) else last
        return self.head(torch.cat([out.mean(1 if self.batch_first else 0), last.transpose(0, 1).flatten(1)], 1))


def batch(examples: int = 5, steps: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, steps, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (examples,), generator=generator)


def built(make: Callable[[], nn.Module], *inputs: Tensor) -> nn.Module:
    torch.manual_seed(1)
    model = make()
    model(*(x.float() if x.is_floating_point() else x for x in inputs))
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_form(kind: str, form: str, dtype: torch.dtype) -> None:
    x, y = batch()
    options = FORMS[form]
    check(built(lambda: Network(KINDS[kind](4, 3, batch_first=True, **options)), x), x, y, dtype)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("examples", [1, 2, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_time_first_and_states_that_are_learned(kind: str, examples: int, learned: bool) -> None:
    x, y = batch(examples)  # as many examples as steps, too
    check(built(lambda: Network(KINDS[kind](4, 3), False, learned), x), x, y)


def test_projections() -> None:
    x, y = batch()
    lstm = nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True, proj_size=3)
    check(built(lambda: Network(lstm), x), x, y)


class Packed(nn.Module):
    """Sequences of their own lengths, packed in PyTorch's ways or sorted by hand."""

    def __init__(self, kind: str, how: str) -> None:
        super().__init__()
        self.stem, self.how = nn.Linear(3, 4), how
        self.recurrent = KINDS[kind](4, 3, 2, batch_first=True, bidirectional=True)
        self.within, self.head = nn.Linear(6, 6), nn.LazyLinear(4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        order = lengths.argsort(descending=True)
        if self.how == "sorted by hand":
            x, lengths = x[order], lengths[order]
        x = torch.tanh(self.stem(x))
        packed = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=self.how == "sorted by hand")
        out, last = self.recurrent(packed)
        if self.how == "a layer within":
            out = out._replace(data=torch.tanh(self.within(out.data)))
        summed = rnn.pad_packed_sequence(out, batch_first=True)[0].sum(1)
        last = last[0] if isinstance(last, tuple) else last
        found = self.head(torch.cat([summed, last.transpose(0, 1).flatten(1)], 1))
        return found[order.argsort()] if self.how == "sorted by hand" else found


@pytest.mark.parametrize("how", ["unsorted", "sorted by hand", "a layer within"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(kind: str, how: str) -> None:
    x, y = batch()
    lengths = torch.tensor([2, 6, 1, 4, 4])
    model = built(lambda: Packed(kind, how), x, lengths)
    if how != "a layer within":
        model.within.requires_grad_(False)
    check(model, (x, lengths), y)


class Cells(nn.Module):
    """A cell that is called at every time step."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize(
    "make", [nn.LSTMCell, nn.GRUCell, nn.RNNCell, lambda *a, **k: nn.RNNCell(*a, nonlinearity="relu", **k)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_cells(make: Callable[..., nn.Module], bias: bool) -> None:
    x, y = batch()
    check(built(lambda: Cells(make(3, 5, bias=bias)), x), x, y)


def test_weights_that_are_computed_and_a_part_of_the_parameters() -> None:
    x, y = batch()

    def make() -> nn.Module:
        lstm = nn.LSTM(4, 3, batch_first=True)
        nn.utils.parametrizations.weight_norm(lstm, "weight_hh_l0")
        lstm.bias_ih_l0.requires_grad_(False)
        return Network(lstm)

    check(built(make, x), x, y)


def test_an_unbatched_call_for_each_example() -> None:
    class Unbatched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent, self.head = nn.GRU(3, 5), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.stack([self.recurrent(one)[0][-1] for one in x]))

    x, y = batch()
    check(built(Unbatched, x), x, y)

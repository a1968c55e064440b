"""Captured steps without a GPU: a stand-in for CUDA's graphs, which freezes what they freeze, and tensors without
values, which show that no step waits for one. ``tests/test_gpu.py`` has the real graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F

from fastfisher import AdaptiveStep, Categorical, FisherPenalty, GradientPenalty, SlowPathWarning, host, ops
from fastfisher.inputs import known_of
from fastfisher.model import trainable_parameters
from fastfisher.penalise.derivative import Differences
from fastfisher.penalise.graphs import KINDS, WARM_UP, CudaCapture
from fastfisher.penalise.outcome import Captured, Outcome
from fastfisher.penalise.steps import Weights
from fastfisher.penalise.training import TrainingPenalty
from fastfisher.training.networks import build_network
from tests.support.cpu_graphs import capture
from tests.support.launches import Launches

pytestmark = pytest.mark.usefixtures("one_thread", "host_that_waits")

LAUNCHES = {"plain": 35, "recomputing": 125, "reusing": 36}
"""By a step of SimpleCNN, with R recomputed every tenth step, and gradients kept apart for reuse."""

X, Y = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 10


@pytest.fixture
def host_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a look at a value stalls the stream, and stops a capture."""
    monkeypatch.setattr(host, "HOST", "none")


class Counted:
    """The stand-in for a capture, and how often it was asked."""

    def __init__(self) -> None:
        self.captures = 0

    def __call__(self, function: Callable[[], Any]) -> tuple[Any, Any]:
        self.captures += 1
        return capture(function)


def in_graphs(penalty: TrainingPenalty) -> Counted:
    """Has the penalty capture its steps, by the stand-in."""
    counted = Counted()
    penalty._runner = Captured(penalty.model, counted)
    penalty._steps.sampling.rewind, penalty._memory.in_place = False, True
    return counted


def penalised(penalty: FisherPenalty, x: Tensor, y: Tensor) -> Outcome:
    """The step that recomputes R, by itself."""
    return penalty._steps.penalised(x, y, trainable_parameters(penalty.model), Weights(penalty.alpha))


def plain(penalty: FisherPenalty, x: Tensor, y: Tensor) -> Outcome:
    """The step that reuses it."""
    return penalty._steps.plain(x, y, trainable_parameters(penalty.model), Weights(penalty.alpha))


class Small(nn.Module):
    """Two convolutions, a batch normalisation, ReLU, max-pool and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 3, padding=1),
        )
        self.linear = nn.Linear(4 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        return self.linear(F.max_pool2d(x + self.second(x).relu(), 2).flatten(1))


class Dropping(nn.Module):
    """Dropout of elements and of channels, a batch normalisation, ReLU and max-pool."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6 * 9, 10)
        self.channels, self.elements = nn.Dropout2d(0.3), nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.norm(self.channels(self.conv(x))).relu(), 2)
        return self.linear(F.dropout(self.elements(x), 0.1, self.training, True).flatten(1))


OPTIONS: list[dict[str, Any]] = [
    {"every": 1},
    {"every": 4, "start": 1},
    {"every": 3, "labels": "uniform"},
    {"every": 2, "labels": "rademacher"},
    {"every": 1, "labels": "true"},
    {"every": 1, "labels": "true", "wrt": "inputs"},
    {"every": 1, "mixed": True},
    {"every": 2, "difference": "central"},
    {"every": 1, "gates": "free"},
    {"every": 2, "examples": 5},
    {"every": 2, "method": "double_backprop"},
    {"every": 2, "of": "norm"},
    {"every": 1, "of": torch.log1p, "labels": "true", "wrt": "inputs"},
    {"every": 1, "likelihood": Categorical(torch.linspace(0.5, 2, 10), ignore_index=3), "labels": "true"},
]


def name_of(options: dict[str, Any]) -> str:
    """The same in each process that collects the tests: an address is not."""
    return ", ".join(name if name in ("of", "likelihood") else f"{name} {value}" for name, value in options.items())


def train(penalty: TrainingPenalty, steps: int, targets: Tensor = Y) -> list[Tensor]:
    """Parameters, buffers, and what every step said."""
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(penalty.model.parameters(), 0.05, momentum=0.9)
    said = []
    for i in range(steps):
        rows = torch.arange(8) + i % 4
        optimizer.zero_grad()
        said.append(penalty.backward(X[rows], targets[rows]))
        optimizer.step()
        said.append(torch.zeros(()) if penalty.value is None else penalty.value)
    return [*said, *penalty.model.parameters(), *penalty.model.buffers()]


@pytest.mark.parametrize("network", [Small, Dropping])
@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_replayed_steps_are_the_steps(options: dict[str, Any], network: type[nn.Module]) -> None:
    if network is Dropping and options.get("gates") == "free":
        pytest.skip("refused, see below")
    torch.manual_seed(0)
    model = network().train()
    plain = FisherPenalty(model, 0.2, generator=torch.Generator().manual_seed(1), **copy.deepcopy(options))
    twin = FisherPenalty(copy.deepcopy(model), 0.2, generator=torch.Generator().manual_seed(1), **options)
    counted = in_graphs(twin)
    steps = (WARM_UP + 2) * plain.every + plain.start
    for expected, found in zip(train(plain, steps), train(twin, steps), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    kinds = 1 if plain.every == 1 else 2  # with a new penalty, and without
    assert counted.captures == kinds


@pytest.mark.parametrize("name", ["bernoulli", "gaussian", "poisson", "a loss"])
def test_replayed_steps_of_other_likelihoods_and_losses_are_the_steps(name: str) -> None:
    model = Small().train()
    targets = torch.randint(2, (12, 10), generator=torch.Generator().manual_seed(2)).float()

    def penalty_of(model: nn.Module) -> TrainingPenalty:
        if name == "a loss":
            return GradientPenalty(model, lambda z, y: (z - y).abs().sum(1), 0.2, wrt="inputs", of="norm", every=2)
        return FisherPenalty(model, 0.2, every=2, likelihood=name, generator=torch.Generator().manual_seed(1))  # type: ignore[arg-type]

    plain, twin = penalty_of(model), penalty_of(copy.deepcopy(model))
    counted = in_graphs(twin)
    for expected, found in zip(
        train(plain, 2 * WARM_UP + 4, targets), train(twin, 2 * WARM_UP + 4, targets), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert counted.captures == 2


def test_gradients_that_the_caller_accumulates_are_kept() -> None:
    torch.manual_seed(0)
    model = Small().eval()
    penalty = FisherPenalty(model, 0.0)
    in_graphs(penalty)
    for _ in range(WARM_UP):
        penalty.backward(X, Y)
    model.zero_grad()
    losses = [penalty.backward(x, Y[:6]) for x in (X[:6], X[6:])]
    for _ in range(2 * WARM_UP):
        model.zero_grad()
        losses = [penalty.backward(x, Y[:6]) for x in (X[:6], X[6:])]
    found = [p.grad for p in model.parameters()]
    wanted = [F.cross_entropy(model(x), Y[:6]) for x in (X[:6], X[6:])]
    for a, b in zip(losses, wanted, strict=True):
        torch.testing.assert_close(a, b.detach())
    for a, b in zip(found, torch.autograd.grad(sum(wanted), list(model.parameters())), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(a, b)


def test_what_a_step_depends_on_is_captured_anew() -> None:
    model = Small()
    penalty = FisherPenalty(model, 0.1, every=1)
    counted = in_graphs(penalty)
    changes: list[Callable[[], Any]] = [
        lambda: None,
        model.eval,
        lambda: setattr(penalty, "alpha", 0.2),
        lambda: next(model.parameters()).requires_grad_(False),
        model.double,
    ]
    for number, change in enumerate(changes, start=1):
        change()
        x = X.to(next(model.parameters()).dtype)
        for _ in range(WARM_UP + 2):
            penalty.backward(x, Y)
        assert counted.captures == number
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(WARM_UP + 1):
            penalty.backward(x, Y)
    assert counted.captures == len(changes) + 1


class Random(nn.Module):
    """A forward that draws numbers."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.draw = nn.Linear(4, 3), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.draw(x))


@pytest.mark.parametrize(
    ("name", "gates", "draw"),
    [
        ("rand_like", "frozen", lambda x: x + torch.rand_like(x)),
        ("bernoulli", "free", lambda x: x * torch.bernoulli(torch.full_like(x, 0.5))),
        ("dropout", "free", lambda x: F.dropout(x)),
        ("alpha_dropout", "frozen", lambda x: F.alpha_dropout(x, training=True)),
        ("dropout1d", "frozen", lambda x: F.dropout1d(x)),
        ("scaled_dot_product_attention", "frozen", lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1)),
    ],
)
def test_other_random_functions_are_refused_by_name(name: str, gates: Any, draw: Any) -> None:
    penalty = FisherPenalty(Random(draw), 0.1, gates=gates)
    penalty.backward(torch.randn(5, 4), torch.arange(5) % 3)
    in_graphs(penalty)
    penalty.steps = 0
    with pytest.raises(ValueError, match=f"graphs: {name} draws"):
        penalty.backward(torch.randn(5, 4), torch.arange(5) % 3)


def test_graphs_need_a_gpu() -> None:
    with pytest.raises(ValueError, match="graphs: expected False with a model on cpu"):
        FisherPenalty(nn.Linear(2, 2), 0.1, graphs=True)


# A tensor that an option holds is no tensor without values.
@pytest.mark.parametrize("options", [o for o in OPTIONS if "likelihood" not in o], ids=name_of)
def test_no_step_waits_for_a_value(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values: a step that reads one raises."""
    monkeypatch.setattr(Differences, "_follow", lambda *_: None)  # on a GPU it looks at the first penalty alone
    with FakeTensorMode():
        model, x, y = Small(), torch.randn(8, 3, 8, 8), torch.randint(10, (8,))
        fp = FisherPenalty(model, 0.1, **options)
        in_graphs(fp)
        for step in (penalised, plain):
            outcome = step(fp, x, y)
            assert {n for n, _ in model.named_parameters()} == set(outcome.total)
            fp._memory.reused = outcome.reused or fp._memory.reused
        if fp.settings.method == "finite_difference":  # whether the forward can be repeated is read a step later
            with pytest.raises(DataDependentOutputException):
                penalised(fp, x, y)
        known_of(model).clear()
        penalised(fp, x, y)
        with pytest.raises(DataDependentOutputException):
            float(outcome.loss)


def test_a_state_that_is_loaded_is_what_the_graphs_go_on_from() -> None:
    def steps(penalty: FisherPenalty, loaded: dict[str, Any] | None = None) -> list[Tensor]:
        first = train(penalty, 5)
        if loaded is not None:
            penalty.load_state_dict(loaded)
        return first + train(penalty, 9)

    model = Small().eval()
    state = FisherPenalty(copy.deepcopy(model), 0.2, every=3, generator=torch.Generator().manual_seed(7))
    train(state, 4)
    found = []
    for graphs in (False, True):
        penalty = FisherPenalty(copy.deepcopy(model), 0.2, every=3, generator=torch.Generator().manual_seed(1))
        counted = in_graphs(penalty) if graphs else None
        train(penalty, 3 * (WARM_UP + 1))
        found.append(steps(penalty, state.state_dict()))
        assert counted is None or counted.captures == 2  # none was made anew
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_an_adaptive_step_that_is_set_is_the_one_that_is_taken() -> None:
    model = Small().eval()
    found = []
    for graphs in (False, True):
        step = AdaptiveStep(rho=0.1)
        penalty = FisherPenalty(copy.deepcopy(model), 0.2, every=1, gates="free", step=step, labels="true")
        counted = in_graphs(penalty) if graphs else None
        train(penalty, WARM_UP + 1)
        step.rho = 0.5
        found.append([*train(penalty, 2), torch.tensor(step.rho)])
        assert counted is None or counted.captures == 1
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_weights_are_converted_anew_within_one_autocast_block() -> None:
    model, found = Small().eval(), []
    for graphs in (False, True):
        penalty = FisherPenalty(copy.deepcopy(model), 0.0)
        if graphs:
            in_graphs(penalty)
        optimizer = torch.optim.SGD(penalty.model.parameters(), 0.1)
        for _ in range(WARM_UP):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                penalty.backward(X, Y)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            penalty.model(X)  # keeps the converted weights
            for _ in range(3):
                optimizer.zero_grad()
                penalty.backward(X, Y)
                optimizer.step()
                torch.clear_autocast_cache()  # as leaving the block does
        found.append(list(penalty.model.parameters()))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_what_was_handed_out_stays_as_it_was() -> None:
    penalty = FisherPenalty(Small(), 0.1, every=1)
    in_graphs(penalty)
    for _ in range(WARM_UP + 1):
        penalty.backward(X, Y)
    padded = Y.masked_fill(torch.arange(12) > 5, -100)
    kept = []
    for targets in (Y, padded, Y):
        penalty.backward(X, targets)
        assert penalty.trace_estimate is not None
        kept.append((penalty.trace_estimate, float(penalty.trace_estimate), penalty._memory.rows, targets))
    for estimate, before, rows, targets in kept:
        assert float(estimate) == before
        assert float(rows) == (targets != -100).sum()  # type: ignore[arg-type]


class WithFrozen(nn.Module):
    """A frozen layer, a buffer that scales, and a layer that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.linear = nn.Linear(4, 6).requires_grad_(False), nn.Linear(6, 3)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.frozen(x)) * self.scale)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "scale", torch.tensor(0.5)),
        lambda m: setattr(m, "frozen", nn.Linear(4, 6).requires_grad_(False)),
        lambda m: setattr(m.frozen, "weight", nn.Parameter(torch.ones(6, 4), requires_grad=False)),
        lambda m: m.frozen.requires_grad_(True),
        lambda m: m.linear.bias.requires_grad_(False),
    ],
    ids=["a buffer", "a frozen layer", "a frozen weight", "thawed", "frozen"],
)
@pytest.mark.parametrize("every", [1, 3])
def test_what_is_replaced_or_frozen_between_steps(change: Callable[[WithFrozen], Any], every: int) -> None:
    torch.manual_seed(0)
    model, x, y, found = WithFrozen(), torch.randn(5, 4), torch.arange(5) % 3, []
    for graphs in (False, True):
        own = copy.deepcopy(model)
        penalty = FisherPenalty(own, 0.3, every=every, generator=torch.Generator().manual_seed(1))
        if graphs:
            in_graphs(penalty)
        gradients: list[Tensor] = []
        for step in range(6 * (WARM_UP + 2)):
            if step == 3 * (WARM_UP + 1) + 1:
                torch.manual_seed(3)
                change(own)
            own.zero_grad()
            penalty.backward(x * (1 + step), y)
            gradients += [p.grad.clone() for p in own.parameters() if p.grad is not None]
        found.append(gradients)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


class Unrepeatable(nn.Module):
    """A forward that no graph can repeat."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = Inner(forward)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.inner(x))


class Inner(nn.Module):
    """What one layer does, with a buffer."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def reads(module: nn.Module, x: Tensor) -> Tensor:
    return x / float(x.detach().abs().max())


def replaces(module: nn.Module, x: Tensor) -> Tensor:
    module.seen = module.seen * 0.9 + x.detach().mean(0)
    return x - module.seen


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: Unrepeatable(reads), r"reads no value on the host.* in 'inner' \(Inner\)"),
        (lambda: Unrepeatable(replaces), r"graphs: .*in the place of the buffer 'inner.seen'"),
        (
            lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=None)),
            r"reads no value on the host.* in '1' \(BatchNorm1d\)",
        ),
    ],
    ids=["reads", "replaces", "momentum=None"],
)
@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_what_no_graph_can_repeat_is_refused_by_name(
    model: Callable[[], nn.Module], message: str, alpha: float
) -> None:
    penalty = FisherPenalty(model(), alpha, every=1, gates="free", step=0.1)
    in_graphs(penalty)
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    with pytest.raises(ValueError, match=message):
        for _ in range(WARM_UP + 2):  # the first step makes the key of the labels, and is of a kind of its own
            before = [b.clone() for b in penalty.model.buffers()]
            penalty.backward(x, y)
    torch.testing.assert_close(list(penalty.model.buffers()), before)


def test_a_capture_is_made_on_the_device_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is the current one, on a stream of its own, and beside threads that use the device."""
    current, seen = [torch.device("cuda:0")], []

    @contextmanager
    def device(given: torch.device) -> Iterator[None]:
        before, current[0] = current[0], given
        yield
        current[0] = before

    class Graph:
        def replay(self) -> None:
            seen.append(("replay", current[0]))

        def pool(self) -> str:
            return "pool"

    @contextmanager
    def graph(made: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        seen.append(("capture", current[0], pool, stream, capture_error_mode))
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda on: ("stream", on, current[0]))
    second = torch.device("cuda:1")
    capture_on = CudaCapture(second)
    for pool in (None, "pool"):
        captured, result = capture_on(lambda: current[0])
        assert result == second
        captured.replay()
        assert seen[-2:] == [
            ("capture", second, pool, ("stream", second, second), "thread_local"),
            ("replay", second),
        ]
    assert current == [torch.device("cuda:0")]


def scanned(model: nn.Module, x: Tensor, y: Tensor, monkeypatch: pytest.MonkeyPatch) -> dict[str, Launches]:
    """What a plain step, one that recomputes the penalty and one that reuses it launch, with a kernel for each of our
    operators."""
    monkeypatch.setattr(ops.served, "compiled", lambda name, device: True)
    monkeypatch.setattr(Differences, "_follow", lambda *_: None)  # on a GPU it looks at the first penalty alone
    penalty = FisherPenalty(model, 0.1, every=10, verify=False)
    penalised(penalty, x, y)  # the first one makes the key

    def ordinary() -> None:
        F.cross_entropy(model(x), y).backward()

    found = {}
    for name, step in (
        ("plain", ordinary),
        ("recomputing", lambda: penalised(penalty, x, y)),
        ("reusing", lambda: plain(penalty, x, y)),
    ):
        model.zero_grad()
        with Launches() as found[name]:
            outcome = step()
        if name == "recomputing":
            penalty._memory.reused = outcome.reused
    return found


def test_what_a_step_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = build_network("simple_cnn", in_channels=3, image_size=32, classes=10)
        x, y = torch.empty(128, 3, 32, 32), torch.empty(128, dtype=torch.int64)
    found = scanned(model, x, y, monkeypatch)
    assert {name: launches.kernels.total() for name, launches in found.items()} == LAUNCHES, found
    assert all(not launches.copies for launches in found.values())


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        type(module).__name__: module
        for module in (
            *(nn.ReLU6(), nn.Hardtanh(-0.5, 0.7), nn.Hardsigmoid(), nn.Hardswish(), nn.LeakyReLU(), nn.ELU(alpha=1.3)),
            *(nn.Threshold(0.1, 0.2), nn.Softshrink(), nn.Hardshrink(), nn.PReLU(6), nn.RReLU(), nn.CELU(1.2)),
            *(nn.Dropout(0.3), nn.MaxPool1d(2, 1, 0), nn.GELU(), nn.SiLU(), nn.Softmax(1)),
        )
    },
    "clamp": lambda x: x.clamp(-1, 1),
    "clamp, below": lambda x: x.clamp(min=0.1),
    "clip, above": lambda x: x.clip(max=2),
    "abs": lambda x: x.abs(),
    "maximum": lambda x: x.maximum(x * 0.5),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "masked_fill": lambda x: x.masked_fill(x < 0, 0.0),
    "comparison": lambda x: x * (x > 0),
    "normalize": lambda x: F.normalize(x, p=1),
    "sort": lambda x: x.sort(1)[0],
    "sign": lambda x: x.sign() * x,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_is_copied_from_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph would go on reading the host's memory, whatever has become of it."""
    function = copy.deepcopy(FUNCTIONS[name])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.LazyLinear(3, device="cpu")
            self.last(function(self.first(torch.randn(2, 4))))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(function(self.first(x)))

    model = Model()
    function = function.to("meta") if isinstance(function, nn.Module) else function
    found = scanned(
        model.to("meta"),
        torch.empty(8, 4, device="meta"),
        torch.empty(8, dtype=torch.int64, device="meta"),
        monkeypatch,
    )
    plain = found["plain"].copies
    assert found["recomputing"].copies.keys() <= plain.keys()
    assert found["reusing"].copies == plain


@pytest.mark.parametrize("every", [1, 3])
def test_a_step_that_leaves_the_domain_adds_nothing_though_nobody_looks(every: int) -> None:
    class Rooted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return (4 + self.linear(x)).sqrt()

    torch.manual_seed(0)
    model, x, y = Rooted(), torch.randn(6, 4), torch.arange(6) % 3
    penalty = FisherPenalty(model, 10.0, every=every, step=1e4, labels="true", verify=False)
    penalty.backward(x, y)
    expected = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected), rtol=0, atol=0)


def test_steps_of_ever_new_kinds_say_that_they_are_not_captured() -> None:
    penalty = FisherPenalty(WithFrozen(), 0.0)
    counted = in_graphs(penalty)
    with pytest.warns(SlowPathWarning, match="none of the steps could be captured") as warned:
        for rows in range(2, KINDS + 4):
            penalty.backward(torch.randn(rows, 4), torch.arange(rows) % 3)
    assert len(warned) == 1 and counted.captures == 0

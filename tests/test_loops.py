"""FisherPenalty in the loops that people write: accumulation, clipping, AMP, torch.compile, channels-last memory,
parameter groups, frozen backbones, adapters, averaged weights. Each test says what has to equal what."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastfisher
from fastfisher import FisherPenalty, SlowPathWarning
from tests.support.networks import flat, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

X, Y = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10


class Network(nn.Module):
    """A convolution, batch normalisation, ReLU, max-pool, dropout and two layers; ``features`` is the backbone."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU()
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(72, 16), nn.ReLU(), nn.Linear(16, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def network(dropout: float = 0.0) -> Network:
    torch.manual_seed(3)
    return Network(dropout)


def seeded(model: nn.Module, alpha: float = 0.3, **options: Any) -> FisherPenalty:
    return FisherPenalty(model, alpha, **{"every": 1, "generator": torch.Generator().manual_seed(9), **options})


def gradients(model: nn.Module) -> Tensor:
    return flat([p.grad for p in model.parameters()])


def exact(model: nn.Module, x: Tensor, y: Tensor, alpha: float = 0.3, **options: Any) -> Tensor:
    """The gradient of loss + α·R by double backprop, at the labels that :func:`seeded` draws first."""
    generator = torch.Generator().manual_seed(9)
    value = F.cross_entropy(model(x), y) + alpha * fastfisher.penalty(model, x, generator=generator, **options)
    return flat(list(torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad], allow_unused=True)))


# ---- accumulation and clipping ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"every": 3}, {"mixed": True}, {"method": "double_backprop"}], ids=str)
def test_micro_batches_accumulate_what_each_alone_gives(options: dict[str, Any]) -> None:
    """.grad after 4 micro-batches equals the sum of what each of them gives alone; with weight=1/4, their mean."""
    model = network().double().eval()
    together = seeded(model, **options)
    alone = seeded(model, **options)
    weighted = seeded(model, **options)
    micro = list(zip(X.double().split(4), Y.split(4), strict=True))
    parts = []
    for x, y in micro:
        model.zero_grad()
        alone.backward(x, y)
        parts.append(gradients(model))
    model.zero_grad()
    for x, y in micro:
        together.backward(x, y)
    torch.testing.assert_close(gradients(model), sum(parts))
    model.zero_grad()
    for x, y in micro:
        loss = weighted.backward(x, y, weight=1 / 4)
    # a weighted loss moves the rounding, which finite differences divide by their step (1e-7 in float64)
    assert relative_error(gradients(model), sum(parts) / 4) < 1e-6
    torch.testing.assert_close(loss, F.cross_entropy(model(x), y).detach())  # without the weight
    assert weighted.value is not None and alone.value is not None
    torch.testing.assert_close(weighted.value, alone.value)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_named(weight: float) -> None:
    penalty = seeded(network())
    with pytest.raises(ValueError, match="weight: expected a finite number > 0"):
        penalty.backward(X, Y, weight=weight)
    assert penalty.steps == 0


def test_clipping_sees_the_penalty() -> None:
    """Clipped to a norm of 0.1, .grad is the gradient of loss + α·R, scaled to that norm."""
    model = network().double().eval()
    seeded(model, difference="central").backward(X.double(), Y)
    expected = exact(model, X.double(), Y)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    assert abs(float(norm) - float(expected.norm())) < 1e-6 * float(expected.norm())
    assert relative_error(gradients(model), 0.1 * expected / expected.norm()) < 1e-5


# ---- mixed precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"every": 3}, {"mixed": True}, {"method": "double_backprop"}], ids=str)
def test_a_scaler_leaves_scaled_gradients_and_unscaling_gives_those_without_it(options: dict[str, Any]) -> None:
    """Three steps with a GradScaler of 2¹⁶ end at the parameters of three steps without (float64: no underflow)."""

    def train(scaler: torch.amp.GradScaler | None) -> tuple[Tensor, FisherPenalty]:
        model = network().double()
        penalty = seeded(model, scaler=scaler, **options)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(3):
            optimizer.zero_grad()
            penalty.backward(X.double(), Y)
            if scaler is None:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
            else:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                scaler.step(optimizer)
                scaler.update()
        return flat(list(model.parameters())), penalty

    start = flat(list(network().parameters()))
    plain, without = train(None)
    scaled, with_scaler = train(torch.amp.GradScaler("cpu", init_scale=2.0**16))
    disabled, _ = train(torch.amp.GradScaler("cpu", enabled=False))
    # A power of two moves no rounding; double backprop's loss is scaled after it was added up, too.
    assert relative_error(scaled - start, plain - start) < 1e-12
    assert torch.equal(disabled, plain)
    assert with_scaler.value is not None and without.value is not None
    torch.testing.assert_close(with_scaler.value, without.value)


@pytest.mark.parametrize("options", [{}, {"gates": "free"}, {"every": 3}, {"method": "double_backprop"}], ids=str)
def test_a_step_that_overflows_is_skipped_and_leaves_the_penalty_as_it_was(options: dict[str, Any]) -> None:
    """A scale at which float16 overflows: no parameter moves, no state of the penalty does, and training goes on."""
    model = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
    penalty = seeded(model, scaler=scaler, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            penalty.backward(X, Y)
        scaler.step(optimizer)
        scaler.update()

    before = flat(list(model.parameters()))
    step()
    assert scaler.get_scale() == 2.0**10, "it overflowed"
    assert torch.equal(flat(list(model.parameters())), before)
    assert penalty.steps == 0 and penalty.value is None and penalty._memory.reused is None
    for _ in range(4):
        step()
    assert penalty.steps == 4 and penalty.value is not None and bool(penalty.value.isfinite())
    assert scaler.get_scale() == 2.0**10, "no further step overflowed"
    after = flat(list(model.parameters()))
    assert bool(after.isfinite().all()) and not torch.equal(after, before)
    rho = penalty.state_dict()["rho"]
    assert rho is None or 0 < rho < 10


def test_a_scaler_with_graphs_is_refused() -> None:
    with pytest.raises(ValueError, match="scaler: expected None with graphs=True"):
        FisherPenalty(network(), 0.1, graphs=True, scaler=torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["around", "within"])
def test_autocast_is_close_to_float32(dtype: torch.dtype, where: str) -> None:
    """The penalty's gradient within 0.3 of that in float32, that of test_function.py, and ``.grad`` in float32;
    wherever the autocast is: around the step, or in the model's own forward, where its caller cannot see it."""
    model = network().eval()
    expected = exact(model, X, Y, alpha=1e6)  # so large that the training loss is nothing beside it
    if where == "within":
        model.forward = torch.autocast("cpu", dtype=dtype)(model.forward)  # type: ignore[method-assign]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=dtype == torch.float16)
    penalty = seeded(model, 1e6, scaler=scaler)
    with torch.autocast("cpu", dtype=dtype, enabled=where == "around"):
        penalty.backward(X, Y)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert penalty.logits is not None and penalty.logits.dtype == dtype
    assert relative_error(gradients(model) / scaler.get_scale(), expected) < 0.3


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def dynamo() -> Iterator[Callable[[], tuple[int, int]]]:
    """Graphs compiled and graph breaks since the test began."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))
    torch._dynamo.reset()


def compiled(model: nn.Module, how: str) -> nn.Module:
    if how == "in place":
        model.compile(backend="aot_eager")
        return model
    return torch.compile(model, backend="aot_eager", dynamic=False)  # type: ignore[return-value]


@pytest.mark.parametrize("how", ["wrapped", "in place"])
@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        ({"every": 5}, 1),
        # the shifted forward has other tensors than nn.Parameters for its parameters, hence a graph of its own
        ({"every": 5, "gates": "free", "step": 0.5}, 2),
        ({"every": 5, "method": "double_backprop"}, 1),
    ],
    ids=str,
)
def test_a_compiled_model_compiles_once(
    options: dict[str, Any], graphs: int, how: str, dynamo: Callable[[], tuple[int, int]]
) -> None:
    """Ten steps end where those of the uncompiled model end, with one compilation and no graph break."""

    def train(model: nn.Module, penalty: FisherPenalty) -> Tensor:
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(10):
            optimizer.zero_grad()
            penalty.backward(X, Y)
            optimizer.step()
        return flat(list(model.parameters()))

    model = network()
    start = flat(list(model.parameters()))
    plain = train(model, seeded(model, **options))
    subject = compiled(network(), how)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = train(subject, seeded(subject, **options))
    assert relative_error(found - start, plain - start) < 1e-4
    assert dynamo() == (graphs, 0)
    slow = [str(w.message) for w in said if isinstance(w.message, SlowPathWarning)]
    if "gates" in options:
        assert not slow
    else:
        name = 'method="double_backprop"' if "method" in options else 'gates="frozen", unlike gates="free",'
        beginning = f"{name} runs module '(the model itself)' without torch.compile"
        assert slow and all(said.startswith(beginning) for said in slow)


def test_measurements_of_a_compiled_model_are_those_of_the_model() -> None:
    model = network().eval()
    subject = compiled(model, "wrapped")
    ways: list[Callable[[nn.Module], Any]] = [
        lambda m: fastfisher.per_example_grad_norms(m, X, Y, labels="true"),
        lambda m: fastfisher.trace_hessian(m, X, Y, method="fisher").value,
        lambda m: float(fastfisher.top_eigenvalues(m, X, Y, generator=torch.Generator().manual_seed(0))),
    ]
    for way in ways:
        with pytest.warns(SlowPathWarning, match="the measurement runs module '.the model itself.' without"):
            found = way(subject)
        torch.testing.assert_close(found, way(model))


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"mixed": True}, {"every": 3}, {"gates": "free", "step": 0.5}], ids=str)
def test_channels_last_keeps_the_format_and_the_values(options: dict[str, Any]) -> None:
    """The gradient is that of row-major memory; gradients lie in memory as their parameters do, and no layer of either
    forward gets another format than in a plain forward."""
    x = X.double()
    rows = network().double()
    seeded(rows, **options).backward(x, Y)
    model = network().double().to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    formats: list[list[bool]] = []

    def watch(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if module is model.features[0]:
            formats.append([])
        formats[-1].append(arguments[0].is_contiguous(memory_format=torch.channels_last))

    for layer in model.features:
        layer.register_forward_pre_hook(watch)  # type: ignore[arg-type]
    penalty = seeded(model, **options)
    penalty.backward(x, Y)
    penalty.backward(x, Y)
    assert all(formats) and all(all(row) for row in formats), formats
    assert all(p.grad is not None and p.grad.stride() == p.stride() for p in model.parameters())
    model.zero_grad()
    model.load_state_dict(network().double().state_dict())
    seeded(model, **options).backward(x, Y)
    assert relative_error(gradients(model), gradients(rows)) < 1e-6


@pytest.mark.parametrize(
    "options", [{}, {"every": 2}, {"mixed": True}, {"labels": "true"}, {"method": "double_backprop"}], ids=str
)
def test_gradients_lie_in_memory_as_their_parameters_whatever_the_inputs_do(options: dict[str, Any]) -> None:
    """Convolutions of a batch with channels last give gradients with channels last. ``Tensor.backward`` puts those into
    the order of the parameters, and a fused optimiser reads them in that order without a look at strides."""
    x = X.contiguous(memory_format=torch.channels_last)
    model = network()
    plain = torch.autograd.grad(F.cross_entropy(model(x), Y), list(model.parameters()))
    assert any(g.stride() != p.stride() for g, p in zip(plain, model.parameters(), strict=True)), "nothing to put right"
    trained = []
    for fused in (False, True):
        model = network()
        penalty = seeded(model, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
        for _ in range(4):
            optimizer.zero_grad()
            penalty.backward(x, Y)
            assert all(p.grad is not None and p.grad.stride() == p.stride() for p in model.parameters())
            optimizer.step()
        trained.append(flat(list(model.parameters())))
    torch.testing.assert_close(*trained)


# ---- which parameters ------------------------------------------------------------------------------------------------


def test_parameter_groups_are_the_optimiser_s_business() -> None:
    """Each group takes its own step along the gradient of loss + α·R."""
    model = network().double().eval()
    groups = [
        {"params": list(model.features.parameters()), "lr": 0.01},
        {"params": list(model.head.parameters()), "lr": 0.1, "weight_decay": 0.5},
    ]
    optimizer = torch.optim.SGD(groups)
    before = [copy.deepcopy(list(part.parameters())) for part in (model.features, model.head)]
    expected = exact(model, X.double(), Y)
    seeded(model, difference="central").backward(X.double(), Y)
    optimizer.step()
    features, head = (flat(list(part.parameters())) for part in (model.features, model.head))
    split = len(features)
    old_features, old_head = (flat(part) for part in before)  # type: ignore[arg-type]
    assert relative_error(old_features - features, 0.01 * expected[:split]) < 1e-5
    assert relative_error(old_head - head, 0.1 * (expected[split:] + 0.5 * old_head)) < 1e-5


@pytest.mark.parametrize("options", [{}, {"every": 3}, {"mixed": True}, {"method": "double_backprop"}], ids=str)
def test_a_frozen_backbone_gets_no_gradient_and_no_backward(options: dict[str, Any]) -> None:
    """Only the head gets a gradient, that of loss + α·R; nothing of the backbone has a graph."""
    model = network().double().eval()
    model.features.requires_grad_(False)
    graphs: list[Any] = []
    model.features.register_forward_hook(lambda module, arguments, out: graphs.append(out.grad_fn))
    if "mixed" in options:  # which takes the training gradient at the shifted point
        seeded(model, **options).backward(X.double(), Y)
    else:
        seeded(model, difference="central", **options).backward(X.double(), Y)
    assert graphs and all(node is None for node in graphs)
    assert all(p.grad is None for p in model.features.parameters())
    found = gradients(model)
    assert relative_error(found, exact(model, X.double(), Y)) < 1e-5
    # what the frozen part gives can be kept: the penalty of the head on features is the penalty of the model
    with torch.no_grad():
        features = model.features(X.double())
    model.zero_grad()
    seeded(model.head, **options).backward(features, Y)
    assert relative_error(gradients(model), found) < 1e-5


class Adapted(nn.Module):
    """A linear layer with an adapter of low rank beside it, as in LoRA (Hu et al., 2021)."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.randn(base.out_features, rank) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("method", ["finite_difference", "double_backprop"])
@pytest.mark.parametrize("frozen", [True, False])
def test_an_adapter_alone_is_penalised(frozen: bool, method: Any) -> None:
    """R is the squared norm of the adapters' gradient; what is frozen gets no gradient, all else that of loss + α·R."""
    model = network().double().eval()
    model.head[2] = Adapted(model.head[2]).double()
    model.head[4] = Adapted(model.head[4]).double()
    adapters = [p for n, p in model.named_parameters() if n.endswith((".down", ".up"))]
    assert len(adapters) == 4
    if frozen:
        model.requires_grad_(False)
        for p in adapters:
            p.requires_grad_(True)
    options = {} if method == "double_backprop" else {"difference": "central"}
    penalty = seeded(model, params=adapters, method=method, **options)
    penalty.backward(X.double(), Y)
    assert relative_error(gradients(model), exact(model, X.double(), Y, params=adapters)) < 1e-5
    assert [n for n, p in model.named_parameters() if p.grad is None] == [
        n for n, p in model.named_parameters() if not p.requires_grad
    ]
    labels = fastfisher.sample_cross_entropy(model(X.double()), generator=torch.Generator().manual_seed(9))[1]
    g = torch.autograd.grad(F.cross_entropy(model(X.double()), labels), adapters)
    assert penalty.value is not None and float(penalty.value) == pytest.approx(float(flat(list(g)).square().sum()))


def test_adapters_of_peft() -> None:
    """The penalty over the adapters that peft puts into a model, which it names and freezes around itself."""
    peft = pytest.importorskip("peft", reason="pip install peft")
    model = network().double().eval()
    config = peft.LoraConfig(r=2, target_modules=["head.2", "head.4"], init_lora_weights=False, lora_dropout=0.0)
    adapted = peft.get_peft_model(model, config).eval().double()
    adapters = [p for n, p in adapted.named_parameters() if p.requires_grad]
    assert len(adapters) == 4
    seeded(adapted, difference="central").backward(X.double(), Y)
    assert relative_error(gradients(adapted), exact(adapted, X.double(), Y)) < 1e-5


# ---- averaged weights ------------------------------------------------------------------------------------------------


def test_averaged_weights_are_the_average_of_what_was_trained() -> None:
    """The average of an AveragedModel is that of the parameters after each step, and it can be measured."""
    model = network()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    penalty = seeded(model, every=2)
    expected = None
    for _ in range(4):
        optimizer.zero_grad()
        penalty.backward(X, Y)
        optimizer.step()
        average.update_parameters(model)
        now = flat(list(model.parameters()))
        expected = now if expected is None else 0.5 * expected + 0.5 * now
    torch.testing.assert_close(flat(list(average.parameters())), expected, rtol=1e-5, atol=1e-7)
    assert all(p.grad is None for p in average.parameters())
    average.module.load_state_dict(model.state_dict())
    exact_trace = fastfisher.trace_fisher(model, X, labels="exact").value
    assert fastfisher.trace_fisher(average, X, labels="exact").value == pytest.approx(exact_trace)

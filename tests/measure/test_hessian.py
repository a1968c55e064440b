"""trace_hessian against the explicit Hessian of small networks; when Tr(H) = Tr(F); error bars; what is put back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastfisher
from fastfisher import SlowPathWarning, TraceEstimate, trace_hessian
from fastfisher.inputs import Call, as_call
from fastfisher.likelihoods.categorical import CATEGORICAL
from fastfisher.measure.logits_form import LogitsForm, agreed_form, logits_form
from tests.support.networks import Hostile, OnceDifferentiable, Shared

SIGNIFICANCE = 1e-4


pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.tensor([0, 3, 2, 2, 1, 0])


class SkipInit(nn.Module):
    """Residual branches scaled by a gain of their own, no normalisation (De and Smith, 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.gain * self.second(self.first(x).relu())
        return self.head(x.relu().mean((2, 3)))


class Fixup(nn.Module):
    """Scalar biases around each convolution and a scalar multiplier in the branch (Zhang et al., 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = (nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(3))
        self.biases = nn.ParameterList([nn.Parameter(0.1 * torch.randn(1)) for _ in range(4)])
        self.scale = nn.Parameter(torch.tensor([0.7]))
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = self.biases
        x = self.stem(x).relu()
        y = self.second((self.first(x + a) + b).relu() + c) * self.scale + d
        x = (y + x).relu()
        return self.head(x.mean((2, 3)))


class Residual(nn.Module):
    """BatchNorm as in a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = F.relu(self.norm(self.first(x)) + x, inplace=True)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def simple_cnn(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), activation(), nn.Conv2d(4, 4, 3), activation(), nn.MaxPool2d(2), nn.Dropout(0.0),
        nn.Flatten(), nn.Linear(36, 6), activation(), nn.Linear(6, 4),
    )  # fmt: skip


def vgg() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(True),
        nn.Conv2d(5, 5, 3, padding=1), nn.LeakyReLU(0.1), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(5, 4),
    )  # fmt: skip


class Gated(nn.Module):
    """A product of two branches with a common parameter below them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(192, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x.flatten(1))
        return self.left(h).relu() * self.right(h)


PIECEWISE_LINEAR = {
    "SimpleCNN": simple_cnn,
    "VGG": vgg,
    "SkipInit": SkipInit,
    "Fixup": Fixup,
    "eval BatchNorm": Residual,
}
CURVED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tanh": (lambda: simple_cnn(nn.Tanh), "tanh is not piecewise linear"),
    "GELU": (lambda: simple_cnn(nn.GELU), "gelu is not piecewise linear"),
    "softplus": (lambda: simple_cnn(nn.Softplus), "softplus is not piecewise linear"),
    "shared weights": (lambda: Shared(192, 4), "layer.weight reaches both factors of a linear"),
    "product of branches": (Gated, "stem.weight reaches both factors of a mul"),
    "LayerNorm": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.LayerNorm(4), nn.Linear(4, 4)),
                  "layer_norm is not piecewise linear"),
    "softmax": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Softmax(1)),
                "softmax is not piecewise linear"),
    "unknown": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Mish()),
                "mish has no rule"),
}  # fmt: skip


def build(make: Callable[[], nn.Module]) -> nn.Module:
    """A network in float64 whose BatchNorm has statistics, and which is away from its initialisation."""
    torch.manual_seed(2)
    model = make().double()
    with torch.no_grad():
        for _ in range(3):
            model(IMAGES)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES), LABELS).backward()
        optimizer.step()
    return model


def explicit_trace(model: nn.Module, parameters: list[Tensor] | None = None) -> float:
    """The trace of the Hessian of the mean loss, row by row."""
    parameters = parameters if parameters is not None else list(model.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(model(IMAGES), LABELS), parameters, create_graph=True)
    total = 0.0
    for g, p in zip(gradients, parameters, strict=True):
        for i, element in enumerate(g.flatten()):
            (row,) = torch.autograd.grad(element, p, retain_graph=True, materialize_grads=True)
            total += float(row.flatten()[i])
    return total


def exact_fisher(model: nn.Module, data: Any, **options: Any) -> TraceEstimate:
    """Tr(F) over all labels from per-example gradients: mean over x of Σ_y p(y) ‖∇ log p(y)‖²."""
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def log_p(state: dict[str, Tensor], x: Tensor, y: int) -> Tensor:
        return torch.func.functional_call(model, state, (x[None],)).log_softmax(1)[0, y]

    total, samples = 0.0, 0
    for given, _ in data:
        (inputs,) = as_call(model, given).args
        p = model(inputs).detach().softmax(1)
        for y in range(p.shape[1]):
            gradients = torch.func.vmap(torch.func.grad(log_p), (None, 0, None))(state, inputs, y)
            norms = sum(g.reshape(len(g), -1).square().sum(1) for g in gradients.values())
            total += float((p[:, y] * norms).sum())
        samples += len(inputs)
    return TraceEstimate(total / samples, 0.0, samples, 0, f"fisher, labels={options['labels']}")


@pytest.fixture
def reference_fisher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The trace of the Fisher matrix from vmap(grad), so that this file tests the identity and not trace_fisher."""
    monkeypatch.setattr("fastfisher.measure.hessian.trace_fisher", exact_fisher)
    yield


# ---- Tr(H) = Tr(F) -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
@pytest.mark.usefixtures("reference_fisher")
def test_trace_is_that_of_the_fisher_matrix(name: str) -> None:
    model = build(PIECEWISE_LINEAR[name])
    estimate = trace_hessian(model, IMAGES, LABELS, batch_size=4)
    model.eval()
    assert estimate.value == pytest.approx(explicit_trace(model), rel=1e-10)
    assert estimate.method == "fisher, labels=exact" and estimate.standard_error == 0 and estimate.samples == 6


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_trace_fisher_gives_it(name: str) -> None:
    model = build(PIECEWISE_LINEAR[name])
    estimate = trace_hessian(model, IMAGES, LABELS, batch_size=4)
    model.eval()
    assert estimate.value == pytest.approx(explicit_trace(model), rel=1e-10)
    assert sum(estimate.per_parameter.values()) == pytest.approx(estimate.value, rel=1e-12)


@pytest.mark.parametrize("name", CURVED)
def test_a_network_that_is_not_piecewise_linear_is_not_sent_there(name: str) -> None:
    make, reason = CURVED[name]
    model = build(make).eval()
    form = logits_form(model, dict(model.named_parameters()), IMAGES, CATEGORICAL)
    assert form.curved == reason and form.coupled is None and form.columns == 3
    assert form.unknown == (name == "unknown")
    truth, fisher = explicit_trace(model), exact_fisher(model, [(IMAGES, LABELS)], labels="exact").value
    assert abs(fisher - truth) > 1e-3 * abs(truth), "the identity holds here: the test shows nothing"


@pytest.mark.usefixtures("reference_fisher")
def test_batch_norm_in_train_mode_is_not_sent_there() -> None:
    model = build(Residual).train()
    form = logits_form(model, dict(model.named_parameters()), IMAGES, CATEGORICAL)
    assert form.curved == "batch_norm in train mode is not piecewise linear" and "train mode" in str(form.coupled)
    kept = trace_hessian(model, IMAGES, LABELS, mode="keep", probes=400)
    assert kept.method == "reduced hutchinson, gaussian probes"
    assert within(kept, explicit_trace(model))
    assert trace_hessian(model, IMAGES, LABELS).method == "fisher, labels=exact"


@pytest.mark.usefixtures("reference_fisher")
def test_fisher_where_it_is_not_exact_warns() -> None:
    model = build(lambda: simple_cnn(nn.Tanh))
    with pytest.warns(UserWarning, match="may differ from Tr.H. here, because tanh is not piecewise linear"):
        assert trace_hessian(model, IMAGES, LABELS, method="fisher").method == "fisher, labels=exact"


@pytest.mark.parametrize("ignored", [0, 3])
def test_of_several_rows_an_example_the_mean_is_over_the_rows_that_count(ignored: int) -> None:
    model, x, targets = nn.Linear(3, 4).double(), torch.randn(2, 5, 3).double(), torch.randint(4, (2, 5))
    targets[0, :ignored] = -100
    form = logits_form(model.eval(), dict(model.named_parameters()), Call((x,), {}), CATEGORICAL)
    assert form.coupled is None and (form.rows, form.columns) == (5, 15)
    estimate = trace_hessian(model, x, targets)
    p = model(x).detach().softmax(-1)  # of a linear model the Hessian is the mean of S ⊗ (x, 1)(x, 1)ᵀ
    exact = ((1 - p.square().sum(-1)) * (x.square().sum(-1) + 1))[targets != -100].mean()
    assert estimate.method == "fisher, labels=exact"
    torch.testing.assert_close(estimate.value, float(exact))
    torch.testing.assert_close(sum(estimate.per_parameter.values()), estimate.value)


@pytest.mark.parametrize(("classes", "expected"), [(16, ("exact", 1)), (17, ("rademacher", 2))])
def test_labels_by_the_number_of_classes(
    classes: int, expected: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = lambda model, data, **options: (options["labels"], options["draws"])  # noqa: E731
    monkeypatch.setattr("fastfisher.measure.hessian.trace_fisher", chosen)
    assert trace_hessian(nn.Linear(3, classes), torch.randn(2, 3), torch.zeros(2).long()) == expected


@pytest.mark.usefixtures("reference_fisher")
def test_ignored_examples_count_nowhere() -> None:
    model = build(simple_cnn)
    ignored = torch.where(torch.arange(6) % 3 == 1, -100, LABELS)
    kept = ignored != -100
    found = trace_hessian(model, IMAGES, ignored, batch_size=2)
    expected = trace_hessian(model, IMAGES[kept], LABELS[kept])
    assert found.value == pytest.approx(expected.value, rel=1e-12) and found.samples == 4


# ---- Hutchinson ------------------------------------------------------------------------------------------------------


def within(estimate: TraceEstimate, truth: float) -> bool:
    """Student's t test at the stated significance; where nothing is left to the probes, equality."""
    if estimate.standard_error < 1e-10:
        return abs(estimate.value - truth) < 1e-9
    t = (estimate.value - truth) / estimate.standard_error
    return 2 * scipy.stats.t.sf(abs(t), estimate.draws - 1) > SIGNIFICANCE


@pytest.mark.usefixtures("reference_fisher")
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("method", ["hutchinson", "reduced", "split"])
@pytest.mark.parametrize("name", ["SimpleCNN", "eval BatchNorm", "tanh", "GELU", "shared weights", "LayerNorm"])
def test_unbiased(name: str, method: Any, distribution: Any) -> None:
    model = build(PIECEWISE_LINEAR.get(name) or CURVED[name][0]).eval()
    generator = torch.Generator().manual_seed(11)
    options = {"method": method, "distribution": distribution, "generator": generator, "probes": 200}
    estimate = trace_hessian(model, IMAGES, LABELS, batch_size=4, **options)
    assert within(estimate, explicit_trace(model))
    assert estimate.draws == 200 and estimate.samples == 6


ONE_CURVED_LAYER: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.Tanh(), nn.Linear(3, 4)),
    "no bias": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 3, bias=False), nn.GELU(), nn.Linear(3, 4)),
    "convolution": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3), nn.GELU(), nn.Flatten(), nn.Linear(96, 4)
    ),
    "BatchNorm": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.SiLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 4)
    ),
    "ReLU afterwards": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(192, 3), nn.Tanh(), nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4)
    ),
}


@pytest.mark.parametrize("chosen", ["all", "no weight", "no bias"])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("name", ONE_CURVED_LAYER)
def test_of_one_curved_layer_after_the_inputs_nothing_is_random(name: str, distribution: Any, chosen: str) -> None:
    if (name, chosen) == ("no bias", "no weight"):
        pytest.skip("nothing that moves goes through the curved function")
    model = build(ONE_CURVED_LAYER[name]).eval()
    resting = {"all": "-", "no weight": "0.weight 1.weight", "no bias": "0.bias 1.bias"}[chosen].split()
    wanted = [p for name, p in model.named_parameters() if name not in resting]
    options: Any = {"params": wanted, "distribution": distribution, "batch_size": 4, "probes": 2}
    first, second = (trace_hessian(model, IMAGES, LABELS, **options) for _ in range(2))
    truth = explicit_trace(model, wanted)
    assert first.method.startswith("fisher, labels=exact + reduced hutchinson")
    assert first.value == second.value == pytest.approx(truth, rel=1e-10) and first.standard_error == 0
    generator = torch.Generator().manual_seed(11)
    options = {"params": wanted, "distribution": distribution, "probes": 100, "generator": generator}
    reduced = trace_hessian(model, IMAGES, LABELS, method="reduced", **options)
    assert within(reduced, truth) and reduced.standard_error > 0  # the Gauss-Newton part is left to the probes there


@pytest.mark.parametrize("method", ["split", "reduced", "hutchinson"])
def test_a_forward_under_autocast(method: Any) -> None:
    """To bfloat16's precision of 2^-8, with the same probes."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.on = build(lambda: simple_cnn(nn.GELU)).float(), True

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.on):
                return self.inner(x).float()

    def value() -> float:
        generator = torch.Generator().manual_seed(3)
        return trace_hessian(model, IMAGES.float(), LABELS, method=method, probes=20, generator=generator).value

    model = Mixed()
    mixed, model.on = value(), False
    assert mixed == pytest.approx(value(), rel=0.1)


@pytest.mark.parametrize("name", ["SimpleCNN", "eval BatchNorm", "tanh", "shared weights"])
def test_the_ways_to_the_quadratic_form_agree(name: str) -> None:
    model = build(PIECEWISE_LINEAR.get(name) or CURVED[name][0]).eval()

    def estimate(hvp: Any) -> TraceEstimate:
        generator = torch.Generator().manual_seed(5)
        return trace_hessian(
            model, IMAGES, LABELS, method="hutchinson", hvp=hvp, probes=4, generator=generator, batch_size=4
        )

    taylor, autograd, difference = estimate("taylor"), estimate("autograd"), estimate("finite_difference")
    assert taylor.value == pytest.approx(autograd.value, rel=1e-10)
    # truncation and rounding balance where both are the precision to the power 2/3
    assert difference.value == pytest.approx(taylor.value, rel=1e-7)
    assert taylor.standard_error == pytest.approx(autograd.standard_error, rel=1e-9)
    assert (taylor.method, autograd.method) == (
        "hutchinson, gaussian probes, hvp=taylor",
        "hutchinson, gaussian probes, hvp=autograd",
    )


@pytest.mark.usefixtures("reference_fisher")
@pytest.mark.parametrize("method", ["hutchinson", "reduced", "split"])
def test_the_standard_error_is_calibrated(method: Any) -> None:
    model = build(lambda: simple_cnn(nn.GELU)).eval()
    truth = explicit_trace(model)
    covered = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        estimate = trace_hessian(model, IMAGES, LABELS, method=method, generator=generator)
        covered += abs(estimate.value - truth) <= 1.96 * estimate.standard_error
    assert 180 <= covered <= 198


@pytest.mark.usefixtures("reference_fisher")
def test_what_is_left_to_the_probes_varies_less() -> None:
    model = build(lambda: simple_cnn(nn.GELU))
    full, reduced, split = (
        trace_hessian(model, IMAGES, LABELS, method=method, probes=200).standard_error
        for method in ("hutchinson", "reduced", "auto")
    )
    assert reduced < 0.8 * full and split < reduced


def test_tolerance_is_kept() -> None:
    model = build(lambda: simple_cnn(nn.GELU))
    rough = trace_hessian(model, IMAGES, LABELS, method="hutchinson", probes=20)
    tolerance = rough.standard_error / abs(rough.value) / 3
    fine = trace_hessian(model, iter([(IMAGES, LABELS)]), method="hutchinson", probes=20, tolerance=tolerance)
    assert fine.standard_error <= tolerance * abs(fine.value) and fine.draws > 20 and fine.draws % 20 == 0


def test_a_single_probe_has_no_error_bar() -> None:
    assert trace_hessian(build(simple_cnn), IMAGES, LABELS, method="reduced", probes=1).standard_error == math.inf


def test_some_parameters_only() -> None:
    model = build(lambda: simple_cnn(nn.GELU)).eval()
    chosen = [model[2].weight, model[9].bias]  # type: ignore[index]
    for method in ("hutchinson", "reduced"):
        estimate = trace_hessian(model, IMAGES, LABELS, method=method, params=chosen, probes=400)
        assert within(estimate, explicit_trace(model, chosen))
    assert all(p.requires_grad for p in model.parameters())


# ---- right or refused ------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two layers of the inputs, joined by a function of both, and a head."""

    def __init__(self, join: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.head, self.join = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 4), join
        self.gain = nn.Parameter(torch.randn(8))
        self.register_buffer("scale", torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.join(self, x))


POINTS = torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def two(join: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(1)
    return Two(join).double().eval()


def trace_of(model: nn.Module, inputs: Tensor = POINTS, targets: Tensor = LABELS) -> float:
    """The trace of the Hessian, row by row, of a model whose second derivatives PyTorch has."""
    parameters = list(model.parameters())
    loss = F.cross_entropy(model(inputs), targets)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    rows = [(g.flatten(), p) for g, p in zip(gradients, parameters, strict=True) if g.requires_grad]
    return sum(
        float(torch.autograd.grad(g[i], p, retain_graph=True, materialize_grads=True)[0].flatten()[i])
        for g, p in rows
        for i in range(len(g))
    )


def slice_assigned(m: Any, x: Tensor) -> Tensor:
    h, g = m.first(x), m.second(x)
    g[:, :4] = h[:, :4]
    return g * h


def written_column_by_column(m: Any, x: Tensor) -> Tensor:
    out, h, g = x.new_zeros(len(x), 8), m.first(x), m.second(x)
    for i in range(8):
        out[:, i] = h[:, i] * (g[:, 7 - i] if i % 2 else 1)
    return out * h


def view_written(m: Any, x: Tensor) -> Tensor:
    h = m.first(x)
    h[:, :4].mul_(m.gain[:4])
    return h * m.gain


def copied(m: Any, x: Tensor) -> Tensor:
    h, g = m.first(x), m.second(x) * 1
    g.copy_(h)
    return g * h


def written_behind(m: Any, x: Tensor) -> Tensor:
    h = m.first(x)
    g = h * m.gain
    h.data.copy_(m.second(x).data)
    return g + h * m.gain.square()


def cached(m: Any, x: Tensor) -> Tensor:
    cache, h = x.new_empty(2, len(x), 8), m.first(x)
    cache[0], cache[1] = h, m.second(x)
    return cache[0] * cache[1] * h


COUPLING = {
    "mean over the batch": lambda m, x: m.first(x) - m.first(x).mean(0),
    "sums over earlier examples": lambda m, x: m.first(x).cumsum(0),
    "attention over the batch": lambda m, x: (x @ x.T).softmax(1) @ m.first(x),
    "batch statistics in eval mode": lambda m, x: F.batch_norm(m.first(x), None, None, training=True),
}
WRITING = {f.__name__: f for f in (slice_assigned, written_column_by_column, view_written, copied, cached)}


@pytest.mark.filterwarnings("ignore::fastfisher.SlowPathWarning")
@pytest.mark.parametrize("case", [*WRITING, *COUPLING])
def test_writes_in_place_and_coupled_examples_are_seen(case: str) -> None:
    model = two((WRITING | COUPLING)[case])
    truth = trace_of(model)
    estimate = trace_hessian(model, POINTS, LABELS, probes=400, generator=torch.Generator().manual_seed(3))
    assert within(estimate, truth)
    assert estimate.standard_error > 0  # Tr(F) is another number
    fisher = exact_fisher(model, [(POINTS, LABELS)], labels="exact").value if case in WRITING else 0.0
    assert abs(fisher - truth) > 1e-3 * abs(truth), "the identity holds here: the test shows nothing"


class Others:
    """Processes that found the examples coupled, as far as the method asks."""

    size = 2

    def gather(self, mine: Tensor) -> Tensor:
        return torch.cat([mine, torch.tensor([1.0, 1.0, 0.0], dtype=mine.dtype)])


def test_processes_go_the_same_way_whatever_each_found() -> None:
    mine = LogitsForm(3, 1, None, None, False)
    agreed = agreed_form(mine, Others(), torch.device("cpu"))  # type: ignore[arg-type]
    assert agreed == LogitsForm(3, 1, "another process found so", "another process found so", False)


@pytest.mark.parametrize("case", COUPLING)
def test_coupled_examples_are_named(case: str) -> None:
    model = two(COUPLING[case])
    form = logits_form(model, dict(model.named_parameters()), POINTS, CATEGORICAL)
    assert form.coupled == "the logits of an example are not the same in another batch"


def test_a_write_behind_autograds_back_is_as_autograd_has_it() -> None:
    model = two(written_behind)
    with pytest.warns(SlowPathWarning, match="writes into a tensor that was used before"):
        estimate = trace_hessian(model, POINTS, LABELS, probes=400, generator=torch.Generator().manual_seed(3))
    assert within(estimate, trace_of(model))


@pytest.mark.parametrize("options", [{}, {"method": "hutchinson"}, {"hvp": "autograd"}, {"hvp": "finite_difference"}])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_named(bad: float, options: Any) -> None:
    model = two(lambda m, x: m.first(x).tanh())
    with torch.no_grad():
        model.head.bias[1] = bad
    with pytest.raises(ValueError, match="model: expected logits that are numbers, got NaN or inf in 6 of 6 rows"):
        trace_hessian(model, POINTS, LABELS, **options)


def test_a_class_that_is_ruled_out_is_no_error() -> None:
    model = two(lambda m, x: m.first(x).tanh())
    ruled = torch.tensor([0.0, 0.0, 0.0, -math.inf], dtype=torch.float64)
    wide, narrow = Then(model, lambda z: z + ruled), Then(model, lambda z: z[:, :3])
    labels = LABELS % 3
    for hvp in ("taylor", "autograd"):
        a, b = (
            trace_hessian(m, POINTS, labels, hvp=hvp, probes=5, generator=torch.Generator().manual_seed(3))
            for m in (wide, narrow)
        )
        assert a.value == pytest.approx(b.value, rel=1e-10)


class Then(nn.Module):
    def __init__(self, model: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.model(x))


@pytest.mark.parametrize("hvp", ["taylor", "autograd", "finite_difference"])
def test_hooks_and_the_callers_modes_play_no_part(hvp: Any) -> None:
    model = two(lambda m, x: m.first(x).tanh())

    def value() -> float:
        generator = torch.Generator().manual_seed(3)
        return trace_hessian(model, POINTS, LABELS, method="hutchinson", hvp=hvp, probes=3, generator=generator).value

    right, called = value(), []
    for parameter in model.parameters():
        parameter.register_hook(lambda g: called.append(1) or 7 * g)
    assert value() == right and not called
    with torch.inference_mode():
        assert value() == right
        inside = POINTS + 0
    assert trace_hessian(model, inside, LABELS, probes=3).samples == 6
    with torch.no_grad():
        assert value() == right
    F.cross_entropy(model(POINTS), LABELS).backward()
    assert called


@pytest.mark.parametrize("hvp", ["taylor", "autograd", "finite_difference"])
@pytest.mark.parametrize("kind", ["max_norm", "clamped", "assigned"])
def test_a_forward_that_changes_parameters_is_refused(kind: str, hvp: Any) -> None:
    class Clamped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.clamp_(-9, 9)  # leaves the values, as they are, alone
            return super().forward(x)

    class Assigned(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight[0] = self.weight[0].clone()  # the values that are there
            return super().forward(x)

    first = (
        {"clamped": Clamped, "assigned": Assigned}[kind](6, 6)
        if kind != "max_norm"
        else nn.Embedding(6, 6, max_norm=9.0)
    )
    model = nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(6, 4)).double()
    inputs = LABELS if kind == "max_norm" else POINTS
    with pytest.raises(NotImplementedError, match="max_norm"):
        trace_hessian(model, inputs, LABELS, hvp=hvp, method="hutchinson")


def test_complex_parameters_are_named() -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.randn(4, dtype=torch.cdouble)), nn.Linear(6, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.fft.irfft(torch.fft.rfft(x, dim=1) * self.weight, n=6, dim=1))

    model = Spectral()
    with pytest.raises(NotImplementedError, match="params: expected real parameters, got weight of"):
        trace_hessian(model, POINTS, LABELS)
    found = trace_hessian(model, POINTS, LABELS, params=model.head.parameters())
    x = torch.fft.irfft(torch.fft.rfft(POINTS, dim=1) * model.weight.detach(), n=6, dim=1)
    p = model(POINTS).detach().softmax(1)
    exact = float(((1 - p.square().sum(1)) * (x.square().sum(1) + 1)).mean())
    assert found.value == pytest.approx(exact, rel=1e-10)


@pytest.mark.filterwarnings("ignore::fastfisher.SlowPathWarning")
def test_a_function_without_a_second_derivative_is_refused_with_the_way_out() -> None:
    model, smooth = two(lambda m, x: OnceDifferentiable.apply(m.first(x))), two(lambda m, x: m.first(x) ** 3)
    for hvp in ("taylor", "autograd"):
        with pytest.raises(
            NotImplementedError, match=r'OnceDifferentiable is once_differentiable.*use hvp="finite_difference"'
        ):
            trace_hessian(model, POINTS, LABELS, hvp=hvp)
    options: Any = {"method": "hutchinson", "probes": 4}
    a, b = (
        trace_hessian(m, POINTS, LABELS, hvp=hvp, generator=torch.Generator().manual_seed(3), **options).value
        for m, hvp in ((model, "finite_difference"), (smooth, "taylor"))
    )
    assert a == pytest.approx(b, rel=1e-6)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "EmbeddingBag": lambda: nn.EmbeddingBag(9, 6),
    "EmbeddingBag max": lambda: nn.EmbeddingBag(9, 6, mode="max", padding_idx=2),
    "sparse Embedding": lambda: nn.Sequential(nn.Embedding(9, 2, sparse=True), nn.Flatten()),
    "LSTM": lambda: nn.Sequential(nn.Embedding(9, 3), Last(nn.LSTM(3, 6, batch_first=True))),
    "GRU": lambda: nn.Sequential(nn.Embedding(9, 3), Last(nn.GRU(3, 6, batch_first=True))),
    "RNN": lambda: nn.Sequential(nn.Embedding(9, 3), Last(nn.RNN(3, 6, batch_first=True))),
    "Bilinear": lambda: nn.Sequential(nn.Embedding(9, 2), nn.Flatten(), With(nn.Bilinear(6, 6, 6))),
    "attention": lambda: nn.Sequential(
        nn.Embedding(9, 4), nn.TransformerEncoderLayer(4, 2, 5, 0.0, batch_first=True), nn.Flatten(), nn.Linear(12, 6)
    ),
    "weight norm": lambda: nn.Sequential(
        nn.Embedding(9, 2), nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    ),
    "spectral norm": lambda: nn.Sequential(
        nn.Embedding(9, 2), nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
    ),
}


class Last(nn.Module):
    """What a recurrent layer gives at the last step."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0][:, -1]


class With(nn.Module):
    """A layer of two inputs, which gets one twice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.tanh())


def difference_of_gradients(model: nn.Module, inputs: Tensor, step: float = 1e-5) -> float:
    """Tr(H) from first derivatives alone."""
    total = 0.0
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for i in range(len(flat)):
            slopes = []
            for sign in (1, -1):
                flat[i] += sign * step
                (g,) = torch.autograd.grad(F.cross_entropy(model(inputs), LABELS), parameter)
                slopes.append(float((g.to_dense() if g.is_sparse else g).flatten()[i]))
                flat[i] -= sign * step
            total += (slopes[0] - slopes[1]) / (2 * step)
    return total


@pytest.mark.filterwarnings("ignore::fastfisher.SlowPathWarning", "ignore:per-example gradients")
@pytest.mark.parametrize("name", LAYERS)
def test_layers_without_a_second_derivative_in_pytorch_or_with_a_wrong_one(name: str) -> None:
    torch.manual_seed(4)
    model = nn.Sequential(LAYERS[name](), nn.Tanh(), nn.Linear(6, 4)).double().eval()
    words = torch.randint(9, (6, 3), generator=torch.Generator().manual_seed(1))
    truth = difference_of_gradients(model, words)
    for hvp in ("taylor", "autograd"):
        generator = torch.Generator().manual_seed(3)
        estimate = trace_hessian(
            model,
            words,
            LABELS,
            method="hutchinson",
            hvp=hvp,
            probes=300,
            distribution="rademacher",
            generator=generator,
        )
        assert within(estimate, truth)


class Checkpointed(nn.Module):
    """A block whose activations are computed again in the backward."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.block, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.reentrant is None:
            return self.head(self.inside(h))
        return self.head(checkpoint(self.inside, h, use_reentrant=self.reentrant))

    def inside(self, h: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.block(h).tanh(), h, h).relu()  # over the batch of six: no Tr(F)


@pytest.mark.parametrize("options", [{"hvp": "taylor"}, {"hvp": "autograd"}, {"hvp": "finite_difference"}])
def test_checkpointing_changes_nothing(options: Any) -> None:
    values = []
    for reentrant in (None, False):
        torch.manual_seed(0)
        model = Checkpointed(reentrant).double()
        options |= {"method": "hutchinson", "probes": 3, "generator": torch.Generator().manual_seed(3)}
        values.append(trace_hessian(model, POINTS, LABELS, **options).value)
        values.append(float(fastfisher.top_eigenvalues(model, POINTS, LABELS, tolerance=1e-8)))
    assert values[:2] == pytest.approx(values[2:], rel=1e-7)


@pytest.mark.filterwarnings("ignore::fastfisher.SlowPathWarning")
def test_a_reentrant_checkpoint_is_refused_by_name() -> None:
    model = Checkpointed(True).double()
    for hvp in ("taylor", "autograd", "finite_difference"):
        with pytest.raises(NotImplementedError, match="use_reentrant=False"):
            trace_hessian(model, POINTS, LABELS, hvp=hvp)
    with pytest.raises(NotImplementedError, match="use_reentrant=False"):
        fastfisher.top_eigenvalues(model, POINTS, LABELS)


def test_in_train_mode_every_forward_starts_from_the_same_buffers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 4)).double()
    before = {name: b.clone() for name, b in model.named_buffers()}
    options: Any = {"mode": "keep", "method": "hutchinson", "distribution": "rademacher", "probes": 300}
    estimate = trace_hessian(model, POINTS, LABELS, batch_size=3, generator=torch.Generator().manual_seed(3), **options)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    halves = []
    for rows in (slice(0, 3), slice(3, 6)):
        model.load_state_dict(before, strict=False)
        halves.append(trace_of(model, POINTS[rows], LABELS[rows]))
    assert within(estimate, sum(halves) / 2)


# ---- data ------------------------------------------------------------------------------------------------------------


def test_data_in_all_its_forms() -> None:
    model = build(lambda: simple_cnn(nn.GELU)).eval()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES, LABELS), batch_size=4)

    def value(*data: Any, **options: Any) -> float:
        generator = torch.Generator().manual_seed(5)
        return trace_hessian(model, *data, method="hutchinson", probes=3, generator=generator, **options).value

    whole = value(IMAGES, LABELS)
    assert value((IMAGES, LABELS)) == whole
    assert value([(IMAGES, LABELS)]) == whole
    assert value({"input": IMAGES}, LABELS) == whole
    assert value(IMAGES, F.one_hot(LABELS, 4).double()) == pytest.approx(whole, rel=1e-12)
    in_batches = value(IMAGES, LABELS, batch_size=4)
    assert value(loader) == in_batches and value(iter(loader)) == in_batches
    ignored = torch.cat([LABELS, torch.tensor([-100, -100])])
    assert value(torch.cat([IMAGES, IMAGES[:2]]), ignored) == pytest.approx(whole, rel=1e-12)


def test_the_same_seed_gives_the_same_bits() -> None:
    model = build(lambda: simple_cnn(nn.GELU)).float().eval()
    values = []
    for _ in range(2):
        torch.manual_seed(3)
        values.append(trace_hessian(model, IMAGES.float(), LABELS, method="reduced", probes=3).value)
    assert values[0] == values[1]
    assert trace_hessian(model, IMAGES.float(), LABELS, method="reduced", probes=3).value != values[0]


# ---- what is said, and what is put back ------------------------------------------------------------------------------


def test_an_operation_without_a_rule_is_named() -> None:
    model = build(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Mish()))
    for method in ("auto", "hutchinson", "reduced"):
        with pytest.warns(SlowPathWarning, match="mish has no rule"):
            estimate = trace_hessian(model, IMAGES, LABELS, method=method, probes=3)
        assert estimate.method == "hutchinson, gaussian probes, hvp=autograd"
        assert "mish has no rule" in estimate.fallbacks["hvp"]


def snapshot(model: nn.Module) -> list[Any]:
    tensors = [t for p in model.parameters() for t in (p.detach().clone(), p.grad.clone())]  # type: ignore[union-attr]
    tensors += [b.clone() for b in model.buffers()]
    flags = [p.requires_grad for p in model.parameters()] + [m.training for m in model.modules()]
    return [*tensors, torch.get_rng_state(), torch.tensor(flags)]


@pytest.mark.parametrize("hvp", ["taylor", "autograd", "finite_difference"])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), ValueError("in the model")])
def test_everything_is_put_back(error: BaseException | None, hvp: Any) -> None:
    inner = build(Residual).train()
    next(inner.parameters()).requires_grad_(True)
    inner.head.bias.requires_grad_(False)
    model = nn.Sequential(inner, nn.Dropout(0.3))
    subject = model if error is None else Hostile(model, error)
    before = snapshot(subject)
    generator = torch.Generator().manual_seed(1)
    call = lambda: trace_hessian(  # noqa: E731
        subject, IMAGES, LABELS, method="hutchinson", hvp=hvp, probes=2, batch_size=3, generator=generator
    )
    if error is None:
        call()
    else:
        with pytest.raises(type(error)):
            call()
    after = snapshot(subject)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "exact"},
            'method: expected "auto" or "fisher" or "split" or "reduced" or "hutchinson" or "ggn", got \'exact\'',
        ),
        ({"distribution": "uniform"}, "distribution: expected"),
        ({"hvp": "jvp"}, "hvp: expected"),
        ({"hvp": "autograd", "method": "reduced"}, 'hvp: expected "taylor" with method="reduced"'),
        ({"probes": 0}, "probes: expected an integer >= 1, got 0"),
        ({"batch_size": 1.5}, "batch_size: expected an integer >= 1 or None, got 1.5"),
        ({"tolerance": 0.0}, "tolerance: expected a positive number, got 0.0"),
        ({"mode": "train"}, "mode: expected"),
        ({"params": [torch.zeros(2)]}, "params: item 0"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace_hessian(nn.Linear(3, 4), torch.randn(2, 3), torch.zeros(2).long(), **options)


def test_no_data_is_an_error() -> None:
    model = nn.Linear(3, 4)
    for method in ("auto", "hutchinson"):
        with pytest.raises(ValueError, match="data: expected at least one example"):
            trace_hessian(model, torch.randn(0, 3), torch.zeros(0).long(), method=method)
    with pytest.raises(ValueError, match="targets: expected labels beside the inputs"):
        trace_hessian(model, torch.randn(2, 3))


def test_it_is_public() -> None:
    assert fastfisher.trace_hessian is trace_hessian

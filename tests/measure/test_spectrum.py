"""top_eigenvalues and gradient_covariance against explicit matrices of small networks; what is put back and refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastfisher
from fastfisher import gradient_covariance, top_eigenvalues
from fastfisher.engine.layers import base
from fastfisher.measure import spectrum
from fastfisher.measure.covariance import _spectrum
from tests.support.networks import Hostile, OnceDifferentiable, Shared

IMAGES = torch.randn(7, 4, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.tensor([0, 2, 1, 1, 0, 2, 2])


pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Bare(nn.Module):
    """A gain and a bias that belong to no layer, a weight used as it is, and one that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gain, self.bias = (
            nn.Linear(144, 5),
            nn.Parameter(torch.tensor(0.6)),
            nn.Parameter(torch.randn(5)),
        )
        self.weight, self.unused = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return (self.gain * self.layer(x.flatten(1)) + self.bias).tanh() @ self.weight


class Words(nn.Module):
    """Two tokens made from an image, some of them repeated, and a layer that is larger than its pairs of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(9, 8), nn.Linear(8, 40), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x[:, 0, 0, :2].abs() * 3).long().clamp(max=8)
        return self.head(self.layer(self.embedding(tokens)).tanh().mean(1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(144, 3), nn.GELU(), nn.Linear(3, 3)),
    "linear on positions": lambda: nn.Sequential(nn.Linear(6, 2), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)),
    "conv, stride and groups": lambda: nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.Softplus(), nn.Conv2d(6, 5, 2, padding=1), nn.Flatten(),
        nn.Linear(45, 3),
    ),
    "BatchNorm": lambda: nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 6),
        nn.LayerNorm(6), nn.Linear(6, 3),
    ),
    "shared weights": lambda: Shared(144, 3),
    "bare parameters": Bare,
    "embedding": Words,
}  # fmt: skip


def build(name: str) -> nn.Module:
    torch.manual_seed(3)
    model = NETWORKS[name]().double()
    if name == "BatchNorm":
        model(2 * IMAGES + 1)  # statistics that are neither the batch's nor the initial ones
    return model


def explicit_hessian(model: nn.Module, labels: Tensor = LABELS, params: list[Tensor] | None = None) -> Tensor:
    """By a double backward for each row, in the mode that the model is in."""
    parameters = params if params is not None else list(model.parameters())
    loss = F.cross_entropy(model(IMAGES), labels)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    flat = torch.cat([g.reshape(-1) for g in gradients])
    if not flat.requires_grad:
        return torch.zeros(len(flat), len(flat), dtype=flat.dtype)
    rows = [
        torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True) if g.requires_grad else None
        for g in flat
    ]
    zero = [torch.zeros_like(p) for p in parameters]
    return torch.stack([torch.cat([h.reshape(-1) for h in (row or zero)]) for row in rows])


def largest(matrix: Tensor, k: int) -> list[float]:
    return torch.linalg.eigvalsh(matrix).flip(0)[:k].tolist()


def explicit_gradients(model: nn.Module, batch_size: int = 1, labels: Tensor = LABELS) -> Tensor:
    """The flat gradients of the mean loss of every ``batch_size`` examples, in eval mode."""
    model.eval()
    rows = []
    for x, y in zip(IMAGES.split(batch_size), labels.split(batch_size), strict=True):
        loss = F.cross_entropy(model(x), y, reduction="sum") / batch_size
        gradients = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in gradients]))
    return torch.stack(rows)


def check_covariance(found: fastfisher.GradientCovariance, gradients: Tensor) -> None:
    """Against the covariance matrix itself: its trace, and all eigenvalues of a rank of at most n − 1."""
    centred = gradients - gradients.mean(0)
    matrix = centred.mT @ centred / len(gradients)
    assert found.gradients == len(gradients)
    assert found.trace == pytest.approx(float(matrix.trace()), rel=1e-10)
    rank = int(torch.linalg.matrix_rank(centred, rtol=1e-10))
    assert len(found.eigenvalues) == rank
    assert found.eigenvalues == pytest.approx(largest(matrix, rank), rel=1e-8)
    assert found.largest == found.eigenvalues[0] and found.smallest_nonzero == found.eigenvalues[-1]
    assert found.conditioning == found.smallest_nonzero / found.largest


# ---- the largest eigenvalues of the Hessian --------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_eigenvalues_are_those_of_the_hessian(name: str, batch_size: int | None) -> None:
    model = build(name)
    found = top_eigenvalues(
        model, IMAGES, LABELS, k=3, tolerance=1e-8, batch_size=batch_size, generator=generator(), max_iterations=400
    )
    expected = largest(explicit_hessian(model.eval()), 3)
    assert found.converged and found.samples == 7
    assert found.values == pytest.approx(expected, rel=1e-8)
    assert float(found) == found.values[0]


def test_error_bounds_hold_when_it_stops_early() -> None:
    model = build("linear").eval()
    every = torch.linalg.eigvalsh(explicit_hessian(model))
    for iterations in (2, 4, 8, 16):
        with pytest.warns(UserWarning, match=f"not converged after {iterations} products"):
            found = top_eigenvalues(
                model, IMAGES, LABELS, k=2, tolerance=1e-15, max_iterations=iterations, generator=generator()
            )
        assert not found.converged and found.iterations == iterations
        for value, bound in zip(found.values, found.error_bounds, strict=True):
            assert bound > 0 and float((every - value).abs().min()) <= bound * (1 + 1e-9)


class Diagonal:
    """Stands for a Hessian; keeps what it was multiplied with."""

    def __init__(self, diagonal: Tensor) -> None:
        self.diagonal, self.sizes, self.vector = diagonal, [len(diagonal)], diagonal[:0]
        self.seen: list[Tensor] = []

    def __call__(self, z: Tensor) -> Tensor:
        self.seen.append(z.clone())
        return self.diagonal * z


def lanczos(diagonal: Tensor, k: int, tolerance: float, max_iterations: int) -> tuple[Any, list[Tensor]]:
    hessian: Any = Diagonal(diagonal)
    return spectrum._lanczos(hessian, torch.tensor([1, 2]), k, tolerance, max_iterations), hessian.seen


def test_error_bounds_are_the_residuals() -> None:
    """Against the Ritz vectors of the Krylov space of the same start."""
    diagonal = torch.linspace(-2, 3, 40, dtype=torch.float64)
    (values, bounds, _, _), (start, *_) = lanczos(diagonal, 2, 1e-12, 5)
    space, _ = torch.linalg.qr(torch.stack([diagonal**power * start for power in range(5)], 1))
    ritz, mixing = torch.linalg.eigh(space.mT @ (diagonal[:, None] * space))
    vectors = space @ mixing.flip(1)[:, :2]
    residuals = (diagonal[:, None] * vectors - vectors * ritz.flip(0)[:2]).norm(dim=0)
    assert values == pytest.approx(ritz.flip(0)[:2].tolist(), rel=1e-8)
    assert bounds == pytest.approx(residuals.tolist(), rel=1e-8)


def test_what_is_orthogonalised_is_orthogonal() -> None:
    """Also where hardly anything is left of it."""
    basis = torch.linalg.qr(torch.randn(50, 9, generator=generator(), dtype=torch.float64))[0].mT
    lengths = torch.arange(9.0, dtype=torch.float64)
    vector = lengths @ basis + 1e-9 * torch.randn(50, generator=generator(1), dtype=torch.float64)
    found = spectrum._orthogonalise(vector, basis)
    assert 1e-9 < vector.norm() < 1e-8
    assert float((basis @ vector).abs().max() / vector.norm()) < 1e-14
    assert found.tolist() == pytest.approx(lengths.tolist(), abs=1e-8)


def test_tolerance_is_kept() -> None:
    model = build("conv, stride and groups").eval()
    exact = largest(explicit_hessian(model), 2)
    rough, fine = (
        top_eigenvalues(model, IMAGES, LABELS, k=2, tolerance=tolerance, generator=generator())
        for tolerance in (1e-1, 1e-6)
    )
    for found, tolerance in ((rough, 1e-1), (fine, 1e-6)):
        assert found.converged
        for value, bound, truth in zip(found.values, found.error_bounds, exact, strict=True):
            assert bound <= tolerance * value and abs(value - truth) <= tolerance * truth
    assert rough.iterations < fine.iterations


def test_a_basis_that_is_too_small_starts_anew() -> None:
    """A spectrum without gaps needs more than the 30 vectors that are kept."""
    diagonal = torch.linspace(-1, 1, 400, dtype=torch.float64) ** 3
    (values, bounds, converged, iterations), _ = lanczos(diagonal, 4, 1e-9, 500)
    assert converged and iterations > 2 * 30
    assert values == pytest.approx(diagonal.flip(0)[:4].tolist(), rel=1e-9)
    assert max(bounds) <= 1e-9


@pytest.mark.parametrize("diagonal", [[5.0, 5.0, 1.0, -7.0], [0.0, 0.0, 0.0], [-2.0, -3.0, -3.0], [4.0]])
@pytest.mark.parametrize("k", [1, 2, 9])
def test_small_matrices_have_all_their_eigenvalues(diagonal: list[float], k: int) -> None:
    """Multiple eigenvalues, all the same, all negative, a single one; k beyond the dimension gives what there is."""
    (values, _, converged, _), _ = lanczos(torch.tensor(diagonal, dtype=torch.float64), k, 1e-6, 50)
    assert converged
    assert values == pytest.approx(sorted(diagonal, reverse=True)[:k], rel=1e-12, abs=1e-14)


def test_a_model_that_is_linear_has_a_hessian_of_low_rank() -> None:
    """One example and 3 classes: two eigenvalues above 0, and many that are 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 3)).double()
    found = top_eigenvalues(model, IMAGES[:1], LABELS[:1], k=4, generator=generator())
    p = model(IMAGES[:1]).detach().softmax(1)[0]
    squared = IMAGES[0].square().sum() + 1
    expected = [*largest((p.diag() - p.outer(p)) * squared, 2), 0, 0]
    assert found.converged
    assert found.values == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_some_parameters_only() -> None:
    model = build("linear").eval()
    chosen = [model[1].bias, model[3].weight]  # type: ignore[index]
    found = top_eigenvalues(model, IMAGES, LABELS, params=chosen, tolerance=1e-8, generator=generator())
    assert found.values == pytest.approx(largest(explicit_hessian(model, params=chosen), 1), rel=1e-10)


def test_a_parameter_without_curvature_is_no_trouble() -> None:
    class Offset(nn.Module):
        """The logits are shifted alike: the loss does not depend on the parameter."""

        def __init__(self) -> None:
            super().__init__()
            self.offset = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :3, 0, 0] + self.offset

    found = top_eigenvalues(Offset(), IMAGES, LABELS)
    assert found.values == pytest.approx([0.0], abs=1e-14) and found.converged


def test_ignored_examples_count_nowhere() -> None:
    model = build("linear").eval()
    ignored = torch.where(torch.arange(7) % 3 == 1, -100, LABELS)
    found = top_eigenvalues(model, IMAGES, ignored, batch_size=2, tolerance=1e-8, generator=generator())
    assert found.values == pytest.approx(largest(explicit_hessian(model, ignored), 1), rel=1e-10)


def test_train_mode_is_kept_when_asked() -> None:
    model = build("BatchNorm").train()
    buffers = [buffer.clone() for buffer in model.buffers()]
    found = top_eigenvalues(model, IMAGES, LABELS, mode="keep", tolerance=1e-8, generator=generator())
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert found.values == pytest.approx(largest(explicit_hessian(model), 1), rel=1e-9)
    assert found.values != pytest.approx(largest(explicit_hessian(model.eval()), 1), rel=1e-3)


def test_every_product_sees_the_same_dropout() -> None:
    """Else the products are of no one matrix, and nothing converges to so small a tolerance."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 5), nn.Dropout(0.5), nn.GELU(), nn.Linear(5, 3)).double()
    found = top_eigenvalues(model, IMAGES, LABELS, mode="keep", batch_size=3, tolerance=1e-9, generator=generator())
    assert found.converged


def test_float32_errs_by_its_rounding() -> None:
    model = build("conv, stride and groups")
    exact = largest(explicit_hessian(model.eval()), 2)
    found = top_eigenvalues(model.float(), IMAGES.float(), LABELS, k=2, tolerance=1e-4, generator=generator())
    assert found.converged
    assert found.values == pytest.approx(exact, rel=1e-4)


class Root(nn.Module):
    """Its derivative at 0 is not finite."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs().sqrt()


def test_what_is_not_finite_is_nan() -> None:
    root = nn.Sequential(nn.Flatten(), nn.Linear(144, 3, dtype=torch.float64), Root())
    nn.init.zeros_(root[1].weight)
    nn.init.zeros_(root[1].bias)
    found = top_eigenvalues(root, IMAGES, LABELS, k=2)
    assert not found.converged
    assert all(math.isnan(value) for value in found.values) and found.error_bounds == (math.inf, math.inf)
    model = build("linear")
    with torch.no_grad():
        model[1].weight.fill_(math.nan)  # type: ignore[index]
    with pytest.raises(ValueError, match="model: expected logits that are numbers"):
        top_eigenvalues(model, IMAGES, LABELS, k=2)
    covariance = gradient_covariance(model, (IMAGES, LABELS))
    assert math.isnan(covariance.trace) and math.isnan(covariance.largest)


class Through(nn.Module):
    """A function between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(144, 3), nn.Linear(3, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x.flatten(1))))


def test_a_function_without_a_second_derivative_is_refused_with_the_way_out() -> None:
    torch.manual_seed(0)
    model = Through(OnceDifferentiable.apply).double()
    with pytest.raises(
        NotImplementedError, match=r"OnceDifferentiable is once_differentiable.*use params= with the parameters of"
    ):
        top_eigenvalues(model, IMAGES, LABELS)
    after = [*model.second.parameters()]
    found = top_eigenvalues(model, IMAGES, LABELS, params=after, tolerance=1e-8)
    assert found.values == pytest.approx(largest(explicit_hessian(model, params=after), 1), rel=1e-8)


@pytest.mark.parametrize("k", [1, 2])
def test_layers_whose_second_derivative_pytorch_lacks_or_has_wrong(k: int) -> None:
    torch.manual_seed(0)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(144, 3)).double()
    model = nn.Sequential(nn.Flatten(), normed, nn.Tanh(), nn.Linear(3, 3).double())
    leaves = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [p.numel() for p in leaves.values()]

    def gradient(theta: Tensor) -> Tensor:
        state = {name: part.view_as(p) for (name, p), part in zip(leaves.items(), theta.split(sizes), strict=True)}
        loss = F.cross_entropy(torch.func.functional_call(model, state, (IMAGES,)), LABELS)
        return torch.autograd.grad(loss, theta)[0]

    theta = torch.cat([p.reshape(-1) for p in leaves.values()])
    rows = [
        gradient((theta + 1e-5 * e).requires_grad_()) - gradient((theta - 1e-5 * e).requires_grad_())
        for e in torch.eye(len(theta), dtype=theta.dtype)
    ]
    found = top_eigenvalues(model, IMAGES, LABELS, k=k, tolerance=1e-8)
    assert found.values == pytest.approx(largest(torch.stack(rows) / 2e-5, k), rel=1e-6)


# ---- the covariance of gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [128, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_covariance_of_examples(name: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastfisher.measure.covariance.EXAMPLES_AT_ONCE", at_once)
    model = build(name)
    found = gradient_covariance(model, (IMAGES, LABELS))
    check_covariance(found, explicit_gradients(model))
    assert found.batch_size == 1 and found.fallbacks == {}


@pytest.mark.parametrize("elements", [1 << 26, 2000, 1])
@pytest.mark.parametrize("name", NETWORKS)
def test_covariance_of_mini_batches(name: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All gradients at once, some, one at a time; the seventh example is left out."""
    monkeypatch.setattr("fastfisher.measure.covariance.GRADIENT_ELEMENTS", elements)
    model = build(name)
    found = gradient_covariance(model, (IMAGES, LABELS), batch_size=2)
    check_covariance(found, explicit_gradients(model, 2)[:3])
    assert found.batch_size == 2


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_made_a_few_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", 50)
    monkeypatch.setattr(base, "GRAM_ELEMENTS", 500)
    model = build(name)
    check_covariance(gradient_covariance(model, (IMAGES, LABELS)), explicit_gradients(model))


def test_a_parameter_on_the_slow_path_is_named() -> None:
    class Curious(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.weight = nn.Linear(144, 3), nn.Parameter(torch.randn(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cdist(self.layer(x.flatten(1)).tanh(), self.weight)

    torch.manual_seed(0)
    model = Curious().double()
    with pytest.warns(fastfisher.SlowPathWarning, match="weight"):
        found = gradient_covariance(model, (IMAGES, LABELS))
    assert set(found.fallbacks) == {"weight"}
    check_covariance(found, explicit_gradients(model))


def test_sampled_labels_are_drawn_once_from_the_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastfisher.measure.covariance.EXAMPLES_AT_ONCE", 3)  # gradients are taken again
    model = build("linear")
    found = gradient_covariance(model, IMAGES, labels="sampled", generator=generator(4))
    same = generator(4)
    model.eval()
    drawn = [fastfisher.sample_cross_entropy(model(x).detach(), generator=same)[1] for x in IMAGES.split(3)]
    check_covariance(found, explicit_gradients(model, labels=torch.cat(drawn)))


def test_some_examples_and_some_parameters() -> None:
    model = build("linear").eval()
    found = gradient_covariance(model, (IMAGES, LABELS), samples=4, params=[model[3].bias], generator=generator(2))  # type: ignore[index]
    chosen = torch.randperm(7, generator=generator(2))[:4]
    check_covariance(found, (model(IMAGES).detach().softmax(1) - F.one_hot(LABELS, 3))[chosen])


def test_data_in_all_its_forms() -> None:
    model = build("linear")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES, LABELS), batch_size=2)
    whole, each = gradient_covariance(model, (IMAGES, LABELS), batch_size=2), explicit_gradients(model)
    assert gradient_covariance(model, loader, batch_size=2) == whole
    assert gradient_covariance(model, iter(loader), batch_size=2) == whole
    check_covariance(gradient_covariance(model, loader), each)
    check_covariance(gradient_covariance(model, (IMAGES, F.one_hot(LABELS, 3).double())), each)
    check_covariance(gradient_covariance(model, (IMAGES, LABELS), batch_size=1), each)
    values = [
        top_eigenvalues(model, *data, batch_size=2, generator=generator())
        for data in ((IMAGES, LABELS), ((IMAGES, LABELS),), (loader,), (iter(loader),))
    ]
    assert all(value == values[0] for value in values)


@pytest.mark.parametrize("count", [1, 4])
def test_gradients_that_do_not_vary(count: int) -> None:
    """One example; the same example several times."""
    found = gradient_covariance(build("linear"), (IMAGES[:1].expand(count, -1, -1, -1), LABELS[:1].expand(count)))
    assert found.trace == pytest.approx(0.0, abs=1e-12) and found.eigenvalues == () and found.gradients == count
    assert found.largest == 0.0 and math.isnan(found.smallest_nonzero) and math.isnan(found.conditioning)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_example_given_twice_adds_no_eigenvalue(dtype: torch.dtype) -> None:
    model = build("conv, stride and groups").to(dtype)
    twice = torch.tensor([0, 1, 2, 3, 4, 0, 3])
    found = gradient_covariance(model, (IMAGES[twice].to(dtype), LABELS[twice]))
    centred = explicit_gradients(model.double())[twice]
    centred = centred - centred.mean(0)
    expected = largest(centred @ centred.mT / 7, 4)
    assert found.eigenvalues == pytest.approx(expected, rel=1e-8 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 5), (torch.float64, 6)])
def test_the_rounding_of_gradients_is_no_eigenvalue(dtype: torch.dtype, count: int) -> None:
    gradients = torch.randn(7, 50, generator=generator(), dtype=torch.float64)
    gradients[6] = gradients[0] * (1 + 1e-6 * torch.randn(50, generator=generator(1), dtype=torch.float64))
    trace, eigenvalues = _spectrum(gradients @ gradients.mT, torch.finfo(dtype).eps)
    assert len(eigenvalues) == count
    assert trace == pytest.approx(float((gradients - gradients.mean(0)).square().sum()) / 7, rel=1e-12)


# ---- what is put back, repeated and refused --------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [top_eigenvalues, gradient_covariance])
def test_the_same_seed_gives_the_same_bits(measure: Callable[..., Any]) -> None:
    model = build("BatchNorm").float()
    options: dict[str, Any] = {"k": 3} if measure is top_eigenvalues else {"labels": "sampled", "samples": 5}
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(measure(model, (IMAGES.float(), LABELS), **options))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("measure", [top_eigenvalues, gradient_covariance])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), ValueError("in the model")])
def test_everything_is_put_back(error: BaseException | None, measure: Callable[..., Any]) -> None:
    inner = build("BatchNorm").train()
    inner[-1].bias.requires_grad_(False)  # type: ignore[index]
    subject = inner if error is None else Hostile(inner, error)
    inner[1].eval()  # type: ignore[index]
    state = {name: value.clone() for name, value in subject.state_dict().items()}
    modes = [module.training for module in subject.modules()]
    random = torch.get_rng_state()
    if error is None:
        measure(subject, (IMAGES, LABELS), batch_size=3, generator=generator())
    else:
        with pytest.raises(type(error)):
            measure(subject, (IMAGES, LABELS), batch_size=3, generator=generator())
    assert all(torch.equal(value, state[name]) for name, value in subject.state_dict().items())
    assert [module.training for module in subject.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert [p.requires_grad for p in inner.parameters()] == [True] * (len(list(inner.parameters())) - 1) + [False]
    assert all(p.grad is None for p in inner.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k: expected an integer >= 1, got 0"),
        ({"max_iterations": 1.5}, "max_iterations: expected an integer >= 1, got 1.5"),
        ({"batch_size": 0}, "batch_size: expected an integer >= 1 or None, got 0"),
        ({"tolerance": 0.0}, "tolerance: expected a positive number, got 0.0"),
        ({"mode": "train"}, 'mode: expected "eval" or "keep", got \'train\''),
        ({"params": [torch.zeros(2)]}, "params: item 0"),
    ],
)
def test_bad_options_of_top_eigenvalues(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_eigenvalues(build("linear"), IMAGES, LABELS, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected an integer >= 1"),
        ({"batch_size": 8}, "batch_size: expected at most as many as there are examples, got 8"),
        ({"samples": 0}, "samples: expected an integer >= 1"),
        ({"labels": "uniform"}, 'labels: expected "true" or "sampled", got \'uniform\''),
        ({"params": []}, "params: expected at least one parameter"),
    ],
)
def test_bad_options_of_gradient_covariance(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gradient_covariance(build("linear"), (IMAGES, LABELS), **options)


def test_bad_data_are_named() -> None:
    model = build("linear")
    for measure in (top_eigenvalues, gradient_covariance):
        with pytest.raises(ValueError, match="data: expected at least one example, got none"):
            measure(model, (IMAGES[:0], LABELS[:0]))
        with pytest.raises(ValueError, match="targets"):
            measure(model, IMAGES)
    with pytest.raises(ValueError, match="batch_size: expected that of the batches of data, 3, got 2"):
        gradient_covariance(model, [(IMAGES[:3], LABELS[:3]), (IMAGES[:2], LABELS[:2])], batch_size=2)


def test_they_are_public() -> None:
    assert fastfisher.top_eigenvalues is top_eigenvalues and fastfisher.gradient_covariance is gradient_covariance

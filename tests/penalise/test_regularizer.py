"""FisherPenalty in a loop: the right gradient for every option, each invariant, and a resumed run that is the same."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastfisher
from fastfisher import FisherPenalty
from fastfisher.engine.fused.forward import fused_forward
from fastfisher.penalise.difference import FiniteDifference
from fastfisher.training.networks import build_network
from tests.support.networks import Hostile, SmallResNet, flat, relative_error

X, Y = torch.randn(24, 1, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 10


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(4)
    return build_network("small_cnn", in_channels=1, image_size=16, classes=10).to(dtype)


def gradients(model: nn.Module) -> Tensor:
    return flat([p.grad for p in model.parameters()])


def seeded(**options: Any) -> dict[str, Any]:
    return {"generator": torch.Generator().manual_seed(9), **options}


OPTIONS: list[dict[str, Any]] = [
    {},
    {"labels": "true"},
    {"labels": "uniform"},
    {"labels": "rademacher"},
    {"labels": "true", "wrt": "inputs"},
    {"reduction": "first"},
    {"examples": 7},
    {"examples": 100},
]


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("method", ["double_backprop", "finite_difference"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_gradient_is_that_of_loss_plus_penalty(options: dict[str, Any], method: str, every: int) -> None:
    model, x = network(), X.double()
    penalty = FisherPenalty(model, 0.3, every=every, method=method, difference="central", **seeded(**options))
    loss = penalty.backward(x, Y)
    torch.testing.assert_close(loss, F.cross_entropy(model(x), Y).detach())
    examples = min(options.get("examples", 24), 24)
    arguments = {k: v for k, v in options.items() if k != "examples"}
    expected = F.cross_entropy(model(x), Y) + 0.3 * examples / 24 * fastfisher.penalty(
        model, x[:examples], Y[:examples], **seeded(**arguments)
    )
    exact = flat(list(torch.autograd.grad(expected, list(model.parameters()))))
    assert relative_error(gradients(model), exact) < 1e-6
    assert penalty.value is not None and penalty.logits is not None and penalty.logits.shape == (24, 10)
    # as Tensor.backward, it adds
    before = gradients(model)
    FisherPenalty(model, 0.3, every=every, method=method, difference="central", **seeded(**options)).backward(x, Y)
    torch.testing.assert_close(gradients(model), 2 * before)


@pytest.mark.parametrize("labels", ["sampled", "true"])
def test_mixed_takes_the_training_gradient_at_the_shifted_point(labels: Any) -> None:
    model = network()
    plain = FisherPenalty(model, 0.3, every=1, **seeded(labels=labels))
    plain.backward(X.double(), Y)
    expected = gradients(model)
    model.zero_grad()
    FisherPenalty(model, 0.3, every=1, mixed=True, **seeded(labels=labels)).backward(X.double(), Y)
    assert 0 < relative_error(gradients(model), expected) < 1e-5


def test_reuse_between_recomputations_and_a_late_start() -> None:
    model = network()
    penalty = FisherPenalty(model, 0.3, every=3, start=2, **seeded())

    def step() -> Tensor:
        model.zero_grad()
        penalty.backward(X.double(), Y)
        loss = F.cross_entropy(model(X.double()), Y)
        return gradients(model) - flat(list(torch.autograd.grad(loss, list(model.parameters()))))

    parts = [step() for _ in range(7)]
    assert parts[0].norm() == 0 and parts[1].norm() == 0, "plain before start"
    assert parts[2].norm() > 0 and torch.allclose(parts[2], parts[3]) and torch.allclose(parts[3], parts[4])
    assert not torch.allclose(parts[4], parts[5]) and torch.allclose(parts[5], parts[6])


def test_a_plain_step_is_a_plain_step() -> None:
    model, reference = network(torch.float32), network(torch.float32)
    FisherPenalty(model, 0.0).backward(X, Y)
    F.cross_entropy(reference(X), Y).backward()
    assert torch.equal(gradients(model), gradients(reference))


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("gates", ["frozen", "free"])
@pytest.mark.parametrize("every", [1, 4])
def test_a_resumed_run_is_the_same_run(gates: Any, every: int, own_generator: bool) -> None:
    def run(model: nn.Module, penalty: FisherPenalty, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            penalty.backward(X, Y)
            optimizer.step()

    def fresh() -> tuple[nn.Module, FisherPenalty, torch.optim.Optimizer]:
        model = network(torch.float32)
        generator = torch.Generator().manual_seed(2) if own_generator else None
        penalty = FisherPenalty(model, 0.1, every=every, gates=gates, generator=generator)
        return model, penalty, torch.optim.SGD(model.parameters(), 0.05)

    model, penalty, optimizer = fresh()
    torch.manual_seed(0)
    run(model, penalty, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), penalty.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    run(model, penalty, optimizer, 4)
    other, resumed, other_optimizer = fresh()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    other_optimizer.load_state_dict(saved[2])
    torch.set_rng_state(saved[3])
    run(other, resumed, other_optimizer, 4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_state_that_does_not_fit_restores_nothing() -> None:
    penalty = FisherPenalty(network(), 0.1, every=2)
    penalty.backward(X.double(), Y)
    state = penalty.state_dict()
    other = FisherPenalty(nn.Linear(3, 3), 0.1)
    with pytest.raises(ValueError, match="does not fit a parameter"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="state: expected the keys"):
        other.load_state_dict({"steps": 1})
    assert other.steps == 0 and other.value is None


@pytest.mark.parametrize(
    "options", [{}, {"gates": "free"}, {"method": "double_backprop"}, {"mixed": True}, {"examples": 3}]
)
def test_batchnorm_moves_once_dropout_and_random_state_as_in_a_plain_step(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fastfisher.engine.fused.forward.FUSED_ELEMENTS", 0
    )  # the same kernels, whether gates are recorded or not
    torch.manual_seed(0)
    model = nn.Sequential(SmallResNet(), nn.Dropout(0.5), nn.Linear(10, 10))
    reference = copy.deepcopy(model)
    x = torch.randn(8, 3, 10, 10)
    penalty = FisherPenalty(model, 0.1, every=1, generator=torch.Generator().manual_seed(1), **options)
    torch.manual_seed(5)
    loss = penalty.backward(x, Y[:8])
    state = torch.get_rng_state()
    torch.manual_seed(5)
    with fused_forward(reference):
        expected = F.cross_entropy(reference(x), Y[:8])
    if "examples" not in options:  # which runs a second forward of its own, with masks of its own
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loss, expected.detach()), "the same dropout masks"
    for (name, a), b in zip(model.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(a, b), f"{name} moved once"


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
@pytest.mark.parametrize("every", [1, 10])
def test_an_exception_in_the_middle(error: BaseException, every: int) -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(SmallResNet(), nn.Dropout(0.5))
    model, plain = Hostile(inner, error), copy.deepcopy(inner)
    hooks = inner.register_forward_hook(lambda *_: None)
    x = torch.randn(4, 3, 8, 8)
    penalty = FisherPenalty(model, 0.1, every=every, generator=torch.Generator().manual_seed(1))
    before = copy.deepcopy(dict(model.named_parameters()))
    state = torch.get_rng_state()
    with pytest.raises(type(error)):
        penalty.backward(x, Y[:4])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(inner.buffers(), plain.buffers(), strict=True))
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters()) and hooks.id in inner._forward_hooks
    assert penalty.steps == 0 and penalty.value is None
    model.calls = -10
    penalty.backward(x, Y[:4])
    assert penalty.steps == 1


@pytest.mark.parametrize(("gates", "mixed"), [("frozen", False), ("frozen", True), ("free", False)])
def test_the_shifted_parameters_are_freed_with_the_step(
    gates: Any, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not later, when the garbage collector happens to run: they are a copy of the model."""
    model = SimpleNetwork()
    seen: list[weakref.ref[Tensor]] = []
    shifted = FiniteDifference.shifted

    @contextmanager
    def watched(self: FiniteDifference, *arguments: Any) -> Any:
        with shifted(self, *arguments) as (loss, leaves):
            seen.extend(weakref.ref(leaf) for leaf in leaves.values())
            yield loss, leaves
            del loss, leaves

    monkeypatch.setattr(FiniteDifference, "shifted", watched)
    penalty = FisherPenalty(model, 0.1, every=1, gates=gates, mixed=mixed, verify=False)
    gc.collect()
    gc.disable()
    try:
        penalty.backward(X, Y)
        assert len(seen) == 4 and not any(leaf() is not None for leaf in seen)
    finally:
        gc.enable()


class SimpleNetwork(nn.Sequential):
    """One parameter large enough for a hook of its own, and three small ones."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(256, 300), nn.ReLU(), nn.Linear(300, 10))


def test_the_trace_estimate_is_the_batch_times_the_value() -> None:
    model = network()
    penalty = FisherPenalty(model, 0.1, examples=6, **seeded())
    assert penalty.trace_estimate is None
    penalty.backward(X.double(), Y)
    assert penalty.value is not None and penalty.trace_estimate is not None
    torch.testing.assert_close(penalty.trace_estimate, 6 * penalty.value)
    other = FisherPenalty(model, 0.1, labels="true")
    other.backward(X.double(), Y)
    assert other.trace_estimate is None


def test_a_loss_of_one_s_own() -> None:
    model = network()
    pair, weight = (Y, Y.flip(0)), 0.3

    def mixup(logits: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        return weight * F.cross_entropy(logits, targets[0]) + (1 - weight) * F.cross_entropy(logits, targets[1])

    penalty = FisherPenalty(model, 0.3, loss=mixup, every=1, difference="central", **seeded())  # type: ignore[arg-type]
    penalty.backward(X.double(), pair)  # type: ignore[arg-type]
    expected = mixup(model(X.double()), pair) + 0.3 * fastfisher.penalty(model, X.double(), **seeded())
    exact = flat(list(torch.autograd.grad(expected, list(model.parameters()))))
    assert relative_error(gradients(model), exact) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "alpha: expected"),
        ({"alpha": float("nan")}, "alpha: expected"),
        ({"every": 0}, "every: expected"),
        ({"start": -1}, "start: expected"),
        ({"examples": 0}, "examples: expected"),
        ({"examples": 2, "reduction": "first"}, "examples: expected None"),
        ({"mixed": True}, "mixed: expected every=1"),
        ({"mixed": True, "every": 1, "method": "double_backprop"}, "mixed: expected"),
        ({"mixed": True, "every": 1, "gates": "free"}, "step: expected a number"),
        ({"labels": torch.zeros(3)}, "labels: expected"),
        ({"step": 0.0}, "step: expected"),
        ({"params": [nn.Parameter(torch.zeros(1))]}, "params: item 0"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FisherPenalty(nn.Linear(3, 3), **{"alpha": 0.1, **options})


def test_true_labels_need_targets() -> None:
    penalty = FisherPenalty(nn.Linear(3, 3), 0.1, labels="true", loss=lambda logits, _: logits.sum())
    with pytest.raises(ValueError, match="targets: expected the true labels"):
        penalty.backward(torch.zeros(2, 3), None)  # type: ignore[arg-type]


# ---- what a loop of one's own does to the gradient -------------------------------------------------------------------

RNG = torch.Generator().manual_seed(0)
X20, Y4 = torch.randn(64, 20, generator=RNG), torch.arange(64) % 4


def mlp(act: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(20, 32), act(), nn.Linear(32, 4))


def total_gradient(model: nn.Module, alpha: float = 1.0) -> dict[str, Tensor]:
    """∇(L + α‖∇L‖²) by PyTorch alone."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = F.cross_entropy(model(X20), Y4)
    found = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    squares: Tensor = sum(g.square().sum() for g in found)  # type: ignore[assignment]
    return dict(zip(parameters, torch.autograd.grad(loss + alpha * squares, list(parameters.values())), strict=True))


WAYS: dict[str, dict[str, Any]] = {
    "GP": {"labels": "true"},
    "apart": {"labels": "true", "loss": lambda z, y: F.cross_entropy(z, y)},
    "every 2": {"labels": "true", "every": 2},
    "mixed": {"labels": "true", "mixed": True},
    "double backprop": {"labels": "true", "method": "double_backprop"},
}


@pytest.mark.parametrize("way", [*WAYS, "term"])
def test_hooks_on_parameters_act_once_on_the_whole_gradient(way: str) -> None:
    exact = total_gradient(mlp())
    model, seen, order = mlp(), [], []
    mask = (torch.rand(32, 20, generator=torch.Generator().manual_seed(1)) < 0.5).float()

    def masked(grad: Tensor) -> Tensor:
        seen.append(grad)
        return grad * mask

    def done(parameter: Tensor) -> None:
        assert parameter.grad is not None
        order.append(parameter)

    model[0].weight.register_hook(masked)
    model[0].weight.register_hook(lambda grad: 3 * grad)
    handles = [p.register_post_accumulate_grad_hook(done) for p in model.parameters()]
    if way == "term":
        penalty = FisherPenalty(model, 1.0, every=1, labels="true")
        with penalty.watching() as forward:
            loss = F.cross_entropy(model(X20), Y4)
        (loss + penalty.term(forward, Y4)).backward()
    else:
        FisherPenalty(model, 1.0, **{"every": 1, **WAYS[way]}).backward(X20, Y4)
    assert len(seen) == 1, "once"
    assert len(order) == 4 and {id(p) for p in order} == {id(p) for p in model.parameters()}
    assert model[0].weight._backward_hooks is not None and len(model[0].weight._backward_hooks) == 2
    expected = {**exact, "0.weight": 3 * mask * exact["0.weight"]}
    found = {name: p.grad for name, p in model.named_parameters()}
    tolerance = 5e-3 if way == "mixed" else 2e-3
    assert relative_error(flat(list(found.values())), flat(list(expected.values()))) < tolerance
    assert torch.equal(found["0.weight"] == 0, 3 * mask * exact["0.weight"] == 0)
    for handle in handles:
        handle.remove()


def test_an_optimizer_in_the_backward_steps() -> None:
    model, twin = mlp(), mlp()
    optimizers = {p: torch.optim.SGD([p], 0.1) for p in model.parameters()}

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    generator = torch.Generator
    together = torch.optim.SGD(twin.parameters(), 0.1)
    first, second = (FisherPenalty(m, 0.1, every=2, generator=generator().manual_seed(2)) for m in (model, twin))
    for _ in range(5):
        first.backward(X20, Y4)
        together.zero_grad()
        second.backward(X20, Y4)
        together.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"every": 1}, {"method": "double_backprop", "every": 3}], ids=str)
@pytest.mark.parametrize("params", [False, True])
def test_layers_are_frozen_and_thawed_between_steps(options: dict[str, Any], params: bool) -> None:
    model = mlp()
    chosen = list(model.parameters()) if params else None
    penalty = FisherPenalty(model, 0.5, params=chosen, **options)
    for step in range(8):
        model[0].requires_grad_(step not in (2, 3, 4))
        model.zero_grad(set_to_none=True)
        penalty.backward(X20, Y4)
        assert (model[0].weight.grad is None) == (step in (2, 3, 4))
        assert model[2].weight.grad is not None
    assert penalty.steps == 8


@pytest.mark.parametrize("every", [1, 3])
def test_where_all_of_params_are_frozen_the_training_loss_is_left(every: int) -> None:
    model = mlp().double()
    penalty = FisherPenalty(model, 0.5, params=model[0].parameters(), method="double_backprop", every=every)
    model[0].requires_grad_(False)
    penalty.backward(X20.double(), Y4)
    (expected,) = torch.autograd.grad(F.cross_entropy(model(X20.double()), Y4), model[2].weight)
    torch.testing.assert_close(model[2].weight.grad, expected)
    assert penalty.value == 0 and model[0].weight.grad is None


class Sparse(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.bag = nn.Embedding(40, 6, sparse=sparse), nn.EmbeddingBag(40, 6, sparse=sparse, mode="sum")
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(tokens)).mean(1) + torch.tanh(self.bag(tokens)))


@pytest.mark.parametrize("way", ["GP", "apart", "every 2", "mixed"])
def test_sparse_gradients_stay_sparse(way: str) -> None:
    tokens, targets = torch.randint(10, (6, 4), generator=RNG), torch.arange(6) % 3
    found = []
    for sparse in (False, True):
        model = Sparse(sparse).double()
        penalty = FisherPenalty(model, 0.5, **{"every": 1, **WAYS[way]})
        for _ in range(2):  # a gradient that accumulates, too
            penalty.backward(tokens, targets)
        assert model.table.weight.grad.is_sparse == sparse and model.bag.weight.grad.is_sparse == sparse
        assert not model.head.weight.grad.is_sparse
        found.append([p.grad.to_dense() for p in model.parameters()])
        if sparse:
            assert model.table.weight.grad.coalesce().indices().max() < 10
            torch.optim.SparseAdam([model.table.weight, model.bag.weight]).step()
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


class Pooled(nn.Sequential):
    """A max-pool over neighbouring features."""

    def __init__(self) -> None:
        super().__init__(nn.Unflatten(1, (1, 64)), nn.MaxPool1d(3, 1, 1), nn.Flatten())


class Checkpointed(nn.Module):
    """A block whose activations are computed again in the backward."""

    def __init__(self, act: type[nn.Module], checkpointed: bool, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.last, self.checkpointed = nn.Linear(20, 64), nn.Linear(64, 4), checkpointed
        self.block = nn.Sequential(
            nn.Linear(64, 64), act(), nn.Dropout(dropout), nn.BatchNorm1d(64), nn.Linear(64, 64), act()
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        if self.checkpointed:
            x = torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)
        else:
            x = self.block(x)
        return self.last(x)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU, nn.Hardswish, Pooled])
@pytest.mark.parametrize("way", [*WAYS, "plain", "term"])
def test_activation_checkpointing_changes_nothing(way: str, act: type[nn.Module], dropout: float) -> None:
    options = {"start": 9} if way == "plain" else WAYS.get(way, {"labels": "true"})
    found = []
    for checkpointed in (False, True):
        model = Checkpointed(act, checkpointed, dropout)
        penalty = FisherPenalty(model, 0.5, **{"every": 1, **options})
        torch.manual_seed(4)
        for _ in range(2):
            if way == "term":
                with penalty.watching() as forward:
                    loss = F.cross_entropy(model(X20), Y4)
                (loss + penalty.term(forward, Y4)).backward()
            else:
                penalty.backward(X20, Y4)
        found.append(flat([p.grad for p in model.parameters()]))
    assert relative_error(found[1], found[0]) < 2e-3


def test_reentrant_checkpointing_is_refused_with_the_way_out() -> None:
    class Reentrant(Checkpointed):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.utils.checkpoint.checkpoint(self.block, torch.tanh(self.first(x)), use_reentrant=True)
            return self.last(x)

    model = Reentrant(nn.ReLU, True)
    for options in ({"every": 1}, {"start": 5}, {"every": 1, "method": "double_backprop"}):
        with pytest.raises(NotImplementedError, match="use_reentrant=False"):
            FisherPenalty(model, 0.1, **options).backward(X20, Y4)
    assert all(p.grad is None for p in model.parameters())


def test_threads_share_nothing() -> None:
    def make() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 3),
        )  # fmt: skip

    x, targets = torch.randn(16, 1, 8, 8, generator=RNG), torch.arange(16) % 3

    def work(model: nn.Module, found: list[Tensor]) -> None:
        penalty = FisherPenalty(model, 1.0, every=1, generator=torch.Generator().manual_seed(0))
        for _ in range(40):
            model.zero_grad()
            penalty.backward(x, targets)
            found.append(flat([p.grad for p in model.parameters()]))

    expected: list[Tensor] = []
    work(make(), expected)
    found: list[list[Tensor]] = [[] for _ in range(4)]
    threads = [threading.Thread(target=work, args=(make(), one)) for one in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found:
        assert len(one) == 40 and all(map(torch.equal, one, expected))


def test_the_random_numbers_of_other_threads_are_their_own() -> None:
    model, stop, drawn = mlp(nn.ReLU), threading.Event(), []

    def draw() -> None:
        while not stop.is_set():
            drawn.append(float(torch.rand((), dtype=torch.float64)))

    penalty = FisherPenalty(model, 0.1, every=1)
    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for _ in range(30):
            penalty.backward(X20, Y4)
    finally:
        stop.set()
        thread.join()
    assert len(set(drawn)) == len(drawn)


class Keeping(nn.Module):
    """Puts new tensors in the places of its buffers, one of them empty before; then something fails."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.mean: torch.Tensor
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("late", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z: torch.Tensor = self.layer(x)
        self.mean, self.late = self.mean + z.detach().mean(0), z.detach().std(0)
        raise RuntimeError("out of luck")


@pytest.mark.parametrize("measure", ["backward", "penalty", "norms"])
def test_buffers_that_a_forward_replaced_are_put_back(measure: str) -> None:
    model, x = Keeping(), torch.randn(4, 5)
    mean = model.mean
    calls = {
        "backward": lambda: FisherPenalty(model, 1.0, every=1).backward(x, torch.arange(4) % 3),
        "penalty": lambda: fastfisher.penalty(model, x),
        "norms": lambda: fastfisher.per_example_grad_norms(model, x),
    }
    with pytest.raises(RuntimeError, match="out of luck"):
        calls[measure]()
    assert model.mean is mean
    assert not mean.any()
    assert model.late is None


def test_what_later_steps_do_not_read_anew_stays_as_it_was_given() -> None:
    penalty = FisherPenalty(network(), 0.1, examples=4)
    for name, value in (("examples", 2), ("mixed", True), ("class_dim", 1), ("scope", "local"), ("params", None)):
        before = getattr(penalty, name)
        with pytest.raises(AttributeError, match=f"{name}: expected to stay as it was given"):
            setattr(penalty, name, value)
        assert getattr(penalty, name) is before


def test_what_may_change_between_steps_does() -> None:
    """α, the interval and the training loss are those of the step, as if the penalty had been made with them."""
    model = network().double()
    changed, made = (FisherPenalty(model, alpha, every=every, labels="true") for alpha, every in ((0.1, 10), (0.3, 1)))
    changed.alpha, changed.every = 0.3, 1
    changed.loss = made.loss = lambda logits, y: 2 * F.cross_entropy(logits, y)
    found = []
    for penalty in (changed, made):
        model.zero_grad()
        for _ in range(2):
            penalty.backward(X.double(), Y)
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*found, rtol=0, atol=0)

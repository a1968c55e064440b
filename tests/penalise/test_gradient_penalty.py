"""Penalties of the gradient of a loss of one's own, beside double backpropagation written by hand."""

from __future__ import annotations

import warnings
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastfisher
from fastfisher import GradientPenalty

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
Y = torch.randn(6, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

ONE_SIDED = lambda norms: (norms - 1).square()  # noqa: E731
NORMS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "squared norm": ("squared_norm", torch.square),
    "norm": ("norm", lambda n: n),
    "one-sided": (ONE_SIDED, ONE_SIDED),
    "log": (torch.log1p, torch.log1p),
}


def network(outputs: int = 3, act: type[nn.Module] = nn.ReLU) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), act(), nn.Linear(8, outputs)).double()


def each(output: Tensor, targets: Tensor) -> Tensor:
    """One loss for each example, with a kink of its own."""
    return (output - targets).abs().mul(0.5).square().sum(1) + F.relu(output[:, 0])


def by_hand(model: nn.Module, x: Tensor, y: Any, loss: Callable[..., Tensor], wrt: str, of: Any) -> tuple[Tensor, Any]:
    """R, and the gradient of L + 0.3 R, by autograd."""
    x = x.detach().requires_grad_(wrt == "inputs")
    parameters = list(model.parameters())
    losses = loss(model(x), y)
    if wrt == "inputs":
        (g,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
        value = of(g.flatten(1).norm(dim=1)).mean()
    else:
        found = torch.autograd.grad(losses.mean(), parameters, create_graph=True)
        value = of(torch.cat([g.flatten() for g in found]).norm())
    return value.detach(), torch.autograd.grad(losses.mean() + 0.3 * value, parameters, materialize_grads=True)


def flat(gradients: Any) -> Tensor:
    return torch.cat([g.flatten() for g in gradients])


def error(found: Any, expected: Any) -> float:
    return float((flat(found) - flat(expected)).norm() / flat(expected).norm())


def grads_of(model: nn.Module) -> list[Tensor]:
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("options", [{}, {"difference": "central"}, {"method": "double_backprop"}], ids=str)
@pytest.mark.parametrize("wrt", ["parameters", "inputs"])
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh])
def test_the_gradient_is_that_of_double_backpropagation(
    act: type[nn.Module], name: str, wrt: Any, options: dict[str, Any]
) -> None:
    model, (of, function) = network(act=act), NORMS[name]
    value, expected = by_hand(model, X, Y, each, wrt, function)
    penalty = GradientPenalty(model, each, 0.3, wrt=wrt, of=of, **options)
    loss = penalty.backward(X, Y)
    torch.testing.assert_close(loss, each(model(X), Y).mean().detach())
    found = grads_of(model)
    assert error(found, expected) < 2e-6
    assert penalty.value is not None
    torch.testing.assert_close(penalty.value, value, rtol=1e-9, atol=1e-12)
    total = each(model(X), Y).mean() + 0.3 * fastfisher.penalty(
        model, X, Y, labels="true", loss=each, wrt=wrt, of=of, **{"method": "finite_difference", **options}
    )
    total.backward()
    assert error(grads_of(model), expected) < 2e-6


def test_every_few_steps_the_gradient_is_reused() -> None:
    model = network()
    penalty = GradientPenalty(model, each, 0.3, every=3, start=1)
    plain = torch.autograd.grad(each(model(X), Y).mean(), list(model.parameters()))
    _, expected = by_hand(model, X, Y, each, "parameters", torch.square)
    for step in range(5):
        penalty.backward(X, Y)
        assert error(grads_of(model), plain if step == 0 else expected) < 2e-6
    other = GradientPenalty(model, each, 0.3, every=3, start=1)
    other.load_state_dict(penalty.state_dict())
    penalty.backward(X, Y)
    first = grads_of(model)
    other.backward(X, Y)
    assert all(torch.equal(a, b) for a, b in zip(first, grads_of(model), strict=True))


def test_a_scalar_loss_is_the_mean_of_its_examples() -> None:
    model = network()
    GradientPenalty(model, F.mse_loss, 0.3).backward(X, Y)
    _, expected = by_hand(model, X, Y, lambda z, y: (z - y).square().mean(1), "parameters", torch.square)
    assert error(grads_of(model), expected) < 2e-6
    for options in ({"wrt": "inputs"}, {"examples": 3}):
        with pytest.raises(
            ValueError, match=r"loss: expected one value per example \(\d,\), of which R is taken one by"
        ):
            GradientPenalty(model, F.mse_loss, 0.3, **options).backward(X, Y)  # type: ignore[arg-type]


def test_of_some_examples() -> None:
    model = network()
    GradientPenalty(model, each, 0.3, examples=2).backward(X, Y)
    found = grads_of(model)
    parameters = list(model.parameters())
    g = torch.autograd.grad(each(model(X[:2]), Y[:2]).mean(), parameters, create_graph=True)
    total = each(model(X), Y).mean() + 0.3 * (2 / 6) * sum(x.square().sum() for x in g)
    assert error(found, torch.autograd.grad(total, parameters)) < 2e-6


class Heads(nn.Module):
    """Returns a tuple, a dict or an object of two heads."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.body, self.how = network(4), how

    def forward(self, x: Tensor) -> Any:
        z = self.body(x)
        first, second = z[:, :3], z[:, 3:]
        if self.how == "dict":
            return {"first": first, "rest": [second]}
        return (first, second) if self.how == "tuple" else Pair(first, second)


Pair = namedtuple("Pair", "first second")


def both(output: Any, targets: Any) -> Tensor:
    first, second = (output["first"], output["rest"][0]) if isinstance(output, dict) else output
    return (first - targets["y"]).square().sum(1) + second[:, 0].square() * targets["weight"]


@pytest.mark.parametrize("how", ["tuple", "dict", "named"])
def test_outputs_and_targets_of_any_kind(how: str) -> None:
    """In the penalty and in every measurement that takes a loss."""
    model, plain = Heads(how), Heads("tuple")
    targets = {"y": Y, "weight": torch.linspace(0, 1, 6, dtype=torch.float64)}
    _, expected = by_hand(plain, X, targets, both, "parameters", torch.square)
    for options in ({}, {"mixed": True, "step": 1e-7}, {"examples": 6}):
        GradientPenalty(model, both, 0.3, **options).backward(X, targets)  # type: ignore[arg-type]
        assert error(grads_of(model), expected) < (1e-5 if options else 2e-6)
    norms = fastfisher.per_example_grad_norms(model, X, targets, labels="true", loss=both)  # type: ignore[arg-type]
    for i in range(6):
        one = {name: x[i : i + 1] for name, x in targets.items()}
        g = torch.autograd.grad(both(plain(X[i : i + 1]), one).sum(), list(plain.parameters()))
        assert float(norms[i]) == pytest.approx(float(sum(x.square().sum() for x in g)), rel=1e-9)
    inner = fastfisher.grad_inner_products(model, (X, targets), (X, targets), loss=both)
    torch.testing.assert_close(inner.per_example, norms)
    covariance = fastfisher.gradient_covariance(model, (X, targets), loss=both)
    assert covariance.trace == pytest.approx(float(norms.mean()) - inner.mean, rel=1e-9)
    in_batches = fastfisher.gradient_covariance(
        model, [(X[:4], first := {n: t[:4] for n, t in targets.items()})], loss=both
    )
    assert in_batches.gradients == len(first["y"])
    parameters = dict(plain.named_parameters())

    def of(vector: Tensor) -> Tensor:
        parts = torch.split(vector, [p.numel() for p in parameters.values()])
        state = {name: part.view_as(p) for part, (name, p) in zip(parts, parameters.items(), strict=True)}
        return both(torch.func.functional_call(plain, state, (X,)), targets).mean()

    here = flat([p.detach() for p in parameters.values()])
    matrix: Tensor = torch.autograd.functional.hessian(of, here)  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    found = fastfisher.trace_hessian(model, X, targets, loss=both, probes=200)  # type: ignore[arg-type]
    assert abs(found.value - float(matrix.trace())) < 4.5 * found.standard_error + 1e-9
    top = fastfisher.top_eigenvalues(model, X, targets, loss=both, tolerance=1e-6)  # type: ignore[arg-type]
    assert float(top) == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-4)


def test_the_gauss_newton_trace_of_a_loss_that_is_no_likelihood() -> None:
    model = network(act=nn.Tanh)
    loss = lambda z, y: (1 + (z - y).square()).log().sum(1)  # noqa: E731  # Cauchy's, which is not convex
    parameters = list(model.parameters())
    rows, hessians = [], []
    for x, t in zip(X, Y, strict=True):
        out = model(x)
        rows.append(torch.stack([flat(torch.autograd.grad(o, parameters, retain_graph=True)) for o in out]))
        of_output = lambda z, t=t: loss(z[None], t[None])[0]  # noqa: E731
        hessians.append(torch.autograd.functional.hessian(of_output, out.detach()))  # type: ignore[no-untyped-call]
    jacobian = torch.stack(rows)
    exact = float((jacobian.mT @ torch.stack(hessians) @ jacobian).diagonal(dim1=1, dim2=2).sum(1).mean())
    torch.manual_seed(0)
    found = fastfisher.trace_hessian(model, X, Y, loss=loss, method="ggn", probes=400)
    assert abs(found.value - exact) < 4.5 * found.standard_error and "ggn" in found.method
    with pytest.warns(UserWarning, match="loss: it is linear in what the model returns, so that its Gauss-Newton"):
        assert fastfisher.trace_hessian(model, X, Y, loss=lambda z, y: z.mean(), method="ggn", probes=2).value == 0
    decayed = lambda z, y: loss(z, y) + 0.1 * model[0].weight.square().sum()  # noqa: E731
    with pytest.raises(
        ValueError, match=r"loss: expected one that .*, got one that depends on 0.weight in another way"
    ):
        fastfisher.trace_hessian(model, X, Y, loss=decayed, method="ggn", probes=2)
    for method in ("fisher", "split"):
        with pytest.raises(ValueError, match=r"Tr\(F\) is an expectation over labels drawn from a distribution"):
            fastfisher.trace_hessian(model, X, Y, loss=loss, method=method)  # type: ignore[arg-type]


def test_the_gauss_newton_trace_of_outputs_that_are_made_of_one_another() -> None:
    """Logits beside the hidden states that they are made of, as models of Transformers return them: a loss of the
    logits alone has the Gauss-Newton matrix of a model that returns nothing else."""

    class WithHidden(nn.Module):
        def __init__(self, logits: nn.Sequential) -> None:
            super().__init__()
            self.logits = logits

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            hidden = self.logits[:-1](x)
            return {"hidden": hidden, "logits": self.logits[-1](hidden)}

    plain, labels = network(act=nn.Tanh), torch.tensor([0, 2, 1, 1, 0, 2])
    exact = fastfisher.trace_hessian(plain, X, labels, method="ggn")
    torch.manual_seed(0)
    found = fastfisher.trace_hessian(
        WithHidden(plain),
        X,
        labels,
        loss=lambda o, y: F.cross_entropy(o["logits"], y),
        method="ggn",
        probes=400,
    )
    assert exact.standard_error == 0
    assert abs(found.value - exact.value) < 4.5 * found.standard_error


# ---- loops that make their loss themselves ---------------------------------------------------------------------------


def test_a_step_of_a_loss_that_the_loop_makes() -> None:
    """Several calls of the model, a frozen reference, a clipped ratio: a policy gradient."""
    policy, reference = network(act=nn.Tanh), network(act=nn.Tanh).requires_grad_(False)
    with torch.no_grad():
        policy[0].weight.mul_(1.3)
    actions, advantage = torch.tensor([0, 2, 1, 1, 0, 2]), Y[:, 0]

    def loss() -> Tensor:
        ours = policy(X).log_softmax(-1).gather(1, actions[:, None])[:, 0]
        theirs = reference(X).log_softmax(-1).gather(1, actions[:, None])[:, 0]
        ratio = (ours - theirs).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        return -surrogate.mean() + 0.1 * policy(X + 1).square().mean()

    parameters = list(policy.parameters())
    g = torch.autograd.grad(loss(), parameters, create_graph=True)
    expected = torch.autograd.grad(loss() + 0.3 * sum(x.square().sum() for x in g), parameters)
    penalty = GradientPenalty(policy, None, 0.3)
    assert penalty.step(loss) == loss().detach()
    assert error(grads_of(policy), expected) < 2e-6
    before = [p.clone() for p in parameters]
    GradientPenalty(policy, None, 0.3, method="double_backprop").step(loss)
    assert error(grads_of(policy), expected) < 1e-12
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


def test_random_numbers_of_a_closure_are_the_same_each_time() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 1)).double()
    draw = lambda: model(X + torch.randn_like(X)).square().mean()  # noqa: E731
    found = {}
    for method in ("double_backprop", "finite_difference"):
        torch.manual_seed(5)
        GradientPenalty(model, None, 0.3, method=method).step(draw)  # type: ignore[arg-type]
        found[method] = grads_of(model)
    assert error(found["finite_difference"], found["double_backprop"]) < 2e-6


@pytest.mark.parametrize("every", [1, 2])
def test_the_critic_of_a_gan(every: int) -> None:
    """WGAN-GP: the trained loss is of real and generated examples, the penalised gradient of what lies between."""
    critic, between = network(1), X.flip(0) * 0.5
    penalty = GradientPenalty(critic, lambda score, _: score[:, 0], 10.0, wrt="inputs", of=ONE_SIDED, every=every)
    for step in range(3):
        loss = critic(X).mean() - critic(X + 1).mean() + penalty.term(between)
        loss.backward()
        found = grads_of(critic)
        x = between.clone().requires_grad_()
        (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        by_double = critic(X).mean() - critic(X + 1).mean() + 10 * ONE_SIDED(g.norm(dim=1)).mean()
        torch.testing.assert_close(loss.detach(), (critic(X).mean() - critic(X + 1).mean()).detach())
        expected = torch.autograd.grad(by_double, list(critic.parameters()), materialize_grads=True)
        assert error(found, expected) < 2e-6
        assert penalty.steps == step + 1
    assert penalty.value is not None
    torch.testing.assert_close(penalty.value, ONE_SIDED(g.norm(dim=1)).mean().detach())


def test_running_statistics_move_once() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1)).double().train()
    GradientPenalty(model, lambda z, _: z[:, 0], 0.3).backward(X)
    GradientPenalty(model, None, 0.3).step(lambda: model(X).mean())
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm1d) and norm.num_batches_tracked is not None
    assert int(norm.num_batches_tracked) == 2
    GradientPenalty(model, lambda z, _: z[:, 0], 0.3).term(X)
    assert int(norm.num_batches_tracked) == 2


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_a_loss_that_compares_examples_is_not_taken_in_parts() -> None:
    def compared(z: Tensor, y: Any) -> Tensor:
        return F.cross_entropy(z @ z.mT, torch.arange(len(z)), reduction="none")

    model = network(act=nn.Tanh)
    with pytest.raises(ValueError, match="examples: expected None with a loss that compares examples"):
        GradientPenalty(model, compared, 0.1, examples=2).backward(X, None)
    GradientPenalty(model, each, 0.1, examples=2).backward(X, Y)
    first = fastfisher.penalty(model, X, Y, labels="true", loss=compared, reduction="first")
    g = torch.autograd.grad(compared(model(X), None)[0], list(model.parameters()))
    assert float(first.detach()) == pytest.approx(float(flat(g).square().sum()), rel=1e-9)


def test_targets_that_cannot_be_taken_apart_are_refused() -> None:
    """A list stays whole where some examples are taken out, and a loss that goes through both would take the wrong."""
    model, words = network(), ["a", "b", "a", "a", "b", "b"]

    def by_word(z: Tensor, words: Any) -> Tensor:
        return torch.stack(
            [row.square().sum() * (1 if word == "a" else 3) for row, word in zip(z, words, strict=False)]
        )

    assert len(fastfisher.per_example_grad_norms(model, X, words, labels="true", loss=by_word)) == 6  # type: ignore[arg-type]
    for call in (
        lambda: GradientPenalty(model, by_word, 0.1, examples=2).backward(X, words),
        lambda: fastfisher.trace_hessian(model, X, words, loss=by_word, batch_size=4),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match="targets: expected tensors where some examples are taken out"):
            call()


def test_a_function_of_the_norm_that_is_none_is_named() -> None:
    model = network(act=nn.Tanh)
    for of, message in {
        lambda n: n - n.mean(): "of: expected a function of each norm by itself",
        lambda n: n.detach(): "of: expected a function that depends on the norm",
    }.items():
        for method in ("finite_difference", "double_backprop"):
            with pytest.raises(ValueError, match=message):
                GradientPenalty(model, each, 0.1, wrt="inputs", of=of, method=method).backward(X, Y)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loss: expected one that depends on parameters of the model"):
        GradientPenalty(model, None, 0.1).step(lambda: X.clone().requires_grad_().sum())


def test_each_closure_is_looked_at() -> None:
    """Whether it can be repeated is found out of each, not of the first one of a model."""
    model, calls = network(act=nn.Tanh), []

    def once_more() -> Tensor:
        calls.append(1)
        return F.mse_loss(model(X), Y) * len(calls)

    GradientPenalty(model, None, 0.1).step(lambda: F.mse_loss(model(X), Y))
    with pytest.raises(ValueError, match="its forward cannot be repeated"):
        GradientPenalty(model, None, 0.1).step(once_more)


def test_a_closure_that_has_no_gradient_or_takes_it_is_named() -> None:
    model = network()
    penalty = GradientPenalty(model, None, 0.1)

    def takes_it() -> Tensor:
        loss = F.mse_loss(model(X), Y)
        loss.backward()
        return loss

    for closure, message in {
        lambda: F.mse_loss(model(X), Y).detach(): "closure: expected a loss that depends on the parameters",
        takes_it: "closure: expected a function that returns the loss and calls no backward",
    }.items():
        with pytest.raises(ValueError, match=message):
            penalty.step(closure)
        assert penalty.steps == 0 and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_parameters_that_are_not_those_of_the_model_are_said(alpha: float) -> None:
    """Of a head in the loss, or of a network that made the inputs: they get no gradient, and that is said once."""
    model, head, encoder = network(), nn.Linear(3, 2).double(), nn.Linear(5, 5).double()
    labels = torch.tensor([0, 1, 1, 1, 0, 0])

    def loss(z: Tensor, y: Any) -> Tensor:
        return F.cross_entropy(head(z), labels)

    def steps() -> dict[str, Callable[[], Any]]:
        own, loops = GradientPenalty(model, loss, alpha), GradientPenalty(model, None, alpha)
        plain, fisher = GradientPenalty(model, F.mse_loss, alpha), fastfisher.FisherPenalty(model, alpha, loss=loss)
        return {
            "backward": lambda: own.backward(X, None),
            "step": lambda: loops.step(lambda: loss(model(X), None)),
            "inputs": lambda: plain.backward(encoder(X), Y),
            "FisherPenalty": lambda: fisher.backward(X, None),
        }

    for name, step in steps().items():
        with pytest.warns(UserWarning, match=r"loss: it depends on 2 parameters beside those of the model") as seen:
            step()
            step()
        assert len(seen) == 1, name
    encoder.requires_grad_(False)
    head.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in steps().values():
            step()
        GradientPenalty(model, F.mse_loss, alpha).backward(X.clone().requires_grad_(), Y)


def test_what_cannot_be_is_refused_before_anything_has_changed() -> None:
    model, total = network(), lambda z, y: z.detach().sum()
    number: Any = lambda z, y: 3  # noqa: E731
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("of: expected .* got 'cube'", lambda: GradientPenalty(model, each, 0.1, of="cube")),  # type: ignore[arg-type]
        ("loss: expected a function or None", lambda: GradientPenalty(model, 3, 0.1)),  # type: ignore[arg-type]
        ("loss: expected one for backward", lambda: GradientPenalty(model, None, 0.1).backward(X, Y)),
        ("loss: expected one for term", lambda: GradientPenalty(model, None, 0.1).term(X, Y)),
        ("loss: expected a floating-point tensor", lambda: GradientPenalty(model, number, 1).backward(X, Y)),
        ("closure: expected a function that returns the loss", lambda: GradientPenalty(model, None, 0.1).step(3)),  # type: ignore[arg-type]
        ("closure: .* a scalar loss, got", lambda: GradientPenalty(model, None, 0.1).step(lambda: model(X))),
        ("wrt: not with step", lambda: GradientPenalty(model, each, 0.1, wrt="inputs").step(lambda: model(X).sum())),
        ("examples: not with step", lambda: GradientPenalty(model, each, 0.1, examples=2).step(lambda: model(X).sum())),
        ("mixed: not with term", lambda: GradientPenalty(model, each, 0.1, mixed=True).term(X, Y)),
        ("loss: expected a floating-point tensor", lambda: GradientPenalty(model, lambda z, y: 3, 0.1).backward(X, Y)),  # type: ignore[arg-type, return-value]
        ("loss: expected a tensor that depends", lambda: GradientPenalty(model, total, 0.1).backward(X, Y)),
        ("loss: expected a scalar, or one value", lambda: GradientPenalty(model, lambda z, y: z, 0.1).backward(X, Y)),
        ("loss: expected None with labels='sampled'", lambda: fastfisher.penalty(model, X, Y, loss=each)),
    ]  # fmt: skip
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
    assert all(p.grad is None for p in model.parameters())
    penalty = GradientPenalty(model, each, 0.1)
    with pytest.raises(AttributeError, match="model: expected to stay as it was given; make another GradientPenalty"):
        penalty.model = model
    shared = {"x": X, "shift": torch.zeros(1, 5, dtype=torch.float64)}

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor, shift: Tensor) -> Any:
            return self.body(x + shift)

    with pytest.raises(ValueError, match=r"of: expected inputs of which each example has its own, got input 1"):
        GradientPenalty(Shifted(), each, 0.1, wrt="inputs", of="norm").backward(shared, Y)

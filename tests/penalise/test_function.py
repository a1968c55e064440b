"""The penalty by both methods: agreement with double backprop, meaning, and that nothing of the caller's moves."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastfisher
from bench.problems import digits, gradient, noise, trained
from fastfisher import AdaptiveStep
from fastfisher.ops import reference
from fastfisher.ops.sampled import new_key
from fastfisher.training.networks import build_network
from tests.support.networks import Hostile, SmallResNet, flat, relative_error, smooth_network


@pytest.mark.parametrize("steps", [0, 50])
@pytest.mark.parametrize("data", [digits, noise])
@pytest.mark.parametrize("network", ["simple_cnn", "small_vgg11"])
def test_frozen_gates_agree_with_double_backprop(network: str, data: Any, steps: int) -> None:
    images, targets = data()
    model = trained(network, images, targets, steps)
    x = images[:16]
    labels = fastfisher.sample_cross_entropy(model(x))[1]
    # The oracle in float32 has the gates of the forward in float32. In float64 a unit within rounding of 0 may have the
    # other gate, which alone is an error of up to 1e-3 (VGG-11 at initialisation on noise), whatever the method.
    exact = gradient(model, fastfisher.penalty(model, x, labels=labels))
    options: dict[str, Any] = {"labels": labels, "method": "finite_difference", "verify": False}  # which takes as long
    for difference, bar in (("forward", 5e-3), ("central", 5e-4)):
        value = fastfisher.penalty(model, x, difference=difference, **options)
        assert relative_error(gradient(model, value), exact) <= bar
    exact_model = copy.deepcopy(model).double()
    exact = gradient(exact_model, fastfisher.penalty(exact_model, x.double(), labels=labels))
    value = fastfisher.penalty(exact_model, x.double(), difference="central", **options)
    assert relative_error(gradient(exact_model, value), exact) <= 1e-5


def test_free_gates_agree_on_a_smooth_network() -> None:
    torch.manual_seed(0)
    model, x = smooth_network(), torch.randn(16, 3, 8, 8)
    labels = fastfisher.sample_cross_entropy(model(x))[1]
    exact = gradient(model, fastfisher.penalty(model, x, labels=labels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a step this short is right here, where there is no kink
        value = fastfisher.penalty(model, x, labels=labels, method="finite_difference", gates="free", step=1e-3)
        assert relative_error(gradient(model, value), exact) <= 5e-3


def test_free_gates_do_not_converge_on_a_relu_network_and_a_short_step_warns() -> None:
    images, targets = noise()
    model = trained("simple_cnn", images, targets, 0).double()
    x = images[:16].double()
    labels = fastfisher.sample_cross_entropy(model(x))[1]
    exact = gradient(model, fastfisher.penalty(model, x, labels=labels))
    with pytest.warns(UserWarning, match="noise of single kinks"):
        value = fastfisher.penalty(model, x, labels=labels, method="finite_difference", gates="free", step=1e-5)
        assert relative_error(gradient(model, value), exact) > 0.4


def test_free_gates_find_the_step_that_changes_the_gradient_by_half() -> None:
    images, targets = noise()
    model, x = trained("simple_cnn", images, targets, 0), images[:16]
    # without memory, the function searches; with an AdaptiveStep, it adapts from call to call
    fastfisher.penalty(model, x, method="finite_difference", gates="free").backward()
    adaptive = AdaptiveStep()
    generator = torch.Generator()
    lengths = []
    for _ in range(8):
        generator.manual_seed(0)
        fastfisher.penalty(
            model, x, method="finite_difference", gates="free", step=adaptive, generator=generator
        ).backward()
        lengths.append(adaptive.rho)
    assert lengths[-1] == pytest.approx(lengths[-2], rel=0.3) and lengths[-1] != lengths[0]
    parameters = dict(model.named_parameters())
    generator.manual_seed(0)
    loss, labels = fastfisher.sample_cross_entropy(model(x), generator=generator)
    g = torch.autograd.grad(loss, list(parameters.values()))
    norm = flat(list(g)).norm().float()
    shifted = {n: p + adaptive.rho * d / norm for (n, p), d in zip(parameters.items(), g, strict=True)}
    loss = F.cross_entropy(torch.func.functional_call(model, shifted, (x,)), labels)
    change = relative_error(flat(list(torch.autograd.grad(loss, list(shifted.values())))), flat(list(g)))
    assert 0.3 < change < 0.8


@pytest.mark.parametrize("method", ["double_backprop", "finite_difference"])
def test_what_each_variant_means(method: str) -> None:
    torch.manual_seed(0)
    model = build_network("small_cnn", in_channels=1, image_size=16, classes=10).double()
    x, y = torch.randn(6, 1, 16, 16, dtype=torch.float64), torch.randint(10, (6,))
    parameters = list(model.parameters())

    def squared(loss: Tensor, sources: list[Tensor]) -> Tensor:
        return torch.stack([g.square().sum() for g in torch.autograd.grad(loss, sources, create_graph=True)]).sum()

    def check(value: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(value.double(), expected, rtol=1e-9, atol=0)
        assert relative_error(gradient(model, value), gradient(model, expected)) < 1e-4

    def penalty(**options: Any) -> Tensor:
        return fastfisher.penalty(model, x, method=method, difference="central", **options)

    check(penalty(targets=y, labels="true"), squared(F.cross_entropy(model(x), y), parameters))
    check(penalty(labels=y), squared(F.cross_entropy(model(x), y), parameters))
    check(penalty(labels=y, reduction="first"), squared(F.cross_entropy(model(x[:1]), y[:1]), parameters))
    check(penalty(labels=y, params=parameters[-2:]), squared(F.cross_entropy(model(x), y), parameters[-2:]))
    g = torch.Generator().manual_seed(3)
    drawn = fastfisher.sample_cross_entropy(model(x), generator=torch.Generator().manual_seed(3))[1]
    check(penalty(generator=g), squared(F.cross_entropy(model(x), drawn), parameters))
    flat_logits = torch.zeros(6, 10, dtype=torch.float64)
    _, uniform = fastfisher.sample_cross_entropy(flat_logits, generator=torch.Generator().manual_seed(3))
    check(
        penalty(labels="uniform", generator=torch.Generator().manual_seed(3)),
        squared(F.cross_entropy(model(x), uniform), parameters),
    )
    signs = reference.rademacher_signs(6, 10, new_key(torch.Generator().manual_seed(3), x.device))
    check(
        penalty(labels="rademacher", generator=torch.Generator().manual_seed(3)),
        squared((2 * model(x).softmax(1).sqrt() * signs).sum(1).mean(), parameters),
    )
    leaf = x.clone().requires_grad_()
    each = torch.stack([squared(F.cross_entropy(model(leaf)[i : i + 1], y[i : i + 1]), [leaf]) for i in range(6)])
    check(penalty(targets=y, labels="true", wrt="inputs"), each.mean())
    # class probabilities as targets
    soft = torch.rand(6, 10, dtype=torch.float64).softmax(1)
    check(penalty(targets=soft, labels="true"), squared(F.cross_entropy(model(x), soft), parameters))


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_structured_inputs(kind: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.linear(a).relu() + b

    model, a, b = Two(), torch.randn(5, 4), torch.randn(5, 3)
    inputs: Any = (a, b) if kind == "tuple" else {"a": a, "b": b}
    labels = torch.randint(3, (5,))
    exact = fastfisher.penalty(model, inputs, labels=labels)
    finite = fastfisher.penalty(model, inputs, labels=labels, method="finite_difference")
    assert relative_error(gradient(model, finite), gradient(model, exact)) < 5e-3


def test_the_caller_s_forward_is_shared() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(SmallResNet(), nn.Dropout(0.3))
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    x, labels = torch.randn(8, 3, 12, 12), torch.randint(10, (8,))
    with fastfisher.record_gates(model) as gates:
        logits = model(x)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    calls.clear()
    options = {"labels": labels, "logits": logits, "gates": gates, "method": "finite_difference"}
    shared = fastfisher.penalty(model, x, **options)
    assert len(calls) == 5, "once for this kind of batch: can the forward be repeated, and is half of the step as good?"
    calls.clear()
    shared = fastfisher.penalty(model, x, **options)
    assert not calls
    (F.cross_entropy(logits, labels) + 0.5 * shared).backward(retain_graph=True)
    assert len(calls) == 1, "one shifted forward"
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    # the same masks and batch statistics by double backprop: through the very same forward
    exact = F.cross_entropy(logits, labels) + 0.5 * fastfisher.penalty(model, x, labels=labels, logits=logits)
    assert relative_error(flat([p.grad for p in model.parameters()]), gradient(model, exact)) < 5e-3
    with torch.no_grad():
        logits = model(x)
    with pytest.warns(fastfisher.SlowPathWarning, match="runs the forward again"):
        fastfisher.penalty(model, x, logits=logits, method="finite_difference")
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastfisher.SlowPathWarning)
        with pytest.raises(fastfisher.SlowPathWarning):
            fastfisher.penalty(model, x, logits=logits, method="finite_difference")


@pytest.mark.parametrize("gates", ["frozen", "free"])
@pytest.mark.parametrize("method", ["double_backprop", "finite_difference"])
def test_batchnorm_and_dropout_agree_and_nothing_moves(method: str, gates: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(SmallResNet(), nn.Dropout(0.5), nn.Linear(10, 10)).double()
    model[2].bias.requires_grad_(False)
    x, labels = torch.randn(8, 3, 12, 12, dtype=torch.float64), torch.randint(10, (8,))
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(11)
    value = fastfisher.penalty(model, x, labels=labels, method=method, gates=gates, step=1e-5, difference="central")
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value.backward()
    assert torch.equal(torch.get_rng_state(), state), "the shifted forward draws nothing from the caller's stream"
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert model[2].bias.grad is None and not model[2].bias.requires_grad
    found = flat([p.grad for p in model.parameters()])
    torch.manual_seed(11)
    exact = gradient(model, fastfisher.penalty(model, x, labels=labels))
    if gates == "frozen":
        assert relative_error(found, exact) < 1e-5


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_an_exception_in_the_shifted_forward_leaves_everything(error: BaseException) -> None:
    model = Hostile(nn.Sequential(SmallResNet(), nn.Dropout(0.5)), error)
    x = torch.randn(4, 3, 8, 8)
    value = fastfisher.penalty(model, x, method="finite_difference", verify=False)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    identities = [id(p) for p in model.parameters()]
    with pytest.raises(type(error)):
        value.backward()
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert identities == [id(p) for p in model.parameters()] and all(p.grad is None for p in model.parameters())
    model.calls = 0
    fastfisher.penalty(model.model, x, method="finite_difference").backward()


@pytest.mark.parametrize("wrt", ["parameters", "inputs"])
def test_nothing_is_added_to_the_gradient_of_inputs(wrt: Any) -> None:
    model, x, labels = nn.Linear(4, 3), torch.randn(5, 4, requires_grad=True), torch.arange(5) % 3
    fastfisher.FisherPenalty(model, 0.1, every=1, labels="true", wrt=wrt).backward(x, labels)
    value = fastfisher.penalty(model, x, labels, labels="true", method="finite_difference", wrt=wrt)
    torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    assert x.grad is None


def test_tied_unused_and_frozen_parameters() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.unused = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight
            self.first.bias.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    torch.manual_seed(0)
    model, x, labels = Tied().double(), torch.randn(5, 6, dtype=torch.float64), torch.randint(6, (5,))
    exact = fastfisher.penalty(model, x, labels=labels)
    finite = fastfisher.penalty(model, x, labels=labels, method="finite_difference", difference="central")
    assert relative_error(gradient(model, finite), gradient(model, exact)) < 1e-6


def test_the_expected_penalty_is_the_trace_over_the_batch() -> None:
    # E‖g‖² = Tr(F)/B because E_ŷ[g_i] = 0: checked against the exact trace, over all labels, within 4 standard errors.
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(16, 5)
    p = model(x).softmax(1).detach()
    trace = 0.0
    for i in range(16):
        for y in range(3):
            g = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), torch.tensor([y])), list(model.parameters()))
            trace += float(p[i, y] * flat(list(g)).square().sum()) / 16
    values = torch.stack([16 * fastfisher.penalty(model, x).detach() for _ in range(1500)])
    assert abs(float(values.mean()) - trace) < 4 * float(values.std()) / 1500**0.5


def test_bf16_autocast_reaches_the_shifted_forward() -> None:
    torch.manual_seed(0)
    model = build_network("small_cnn", in_channels=1, image_size=16, classes=10)
    x, labels = torch.randn(16, 1, 16, 16), torch.randint(10, (16,))
    exact = gradient(model, fastfisher.penalty(model, x, labels=labels))
    seen = []
    model.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    for step, dtype, tolerance in ((5e-2, torch.bfloat16, 0.3), ("auto", torch.float32, 1e-2)):
        seen.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = fastfisher.penalty(model, x, labels=labels, method="finite_difference", step=step, verify=False)
        found = gradient(model, value)  # outside autocast, as a backward usually is
        assert seen == [dtype, dtype]
        assert relative_error(found, exact) < tolerance


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "fisher"}, 'labels: expected "sampled"'),
        ({"labels": "true"}, "targets: expected the true labels"),
        ({"method": "exact"}, 'method: expected "double_backprop" or "finite_difference", got \'exact\''),
        ({"gates": "shut"}, "gates: expected"),
        ({"wrt": "weights"}, "wrt: expected"),
        ({"reduction": "mean"}, "reduction: expected"),
        ({"difference": "backward"}, "difference: expected"),
        ({"step": -1.0}, "step: expected a positive number"),
        ({"step": "big"}, "step: expected a positive number"),
        ({"params": []}, "params: expected at least one parameter"),
        ({"params": [torch.zeros(3)]}, "params: item 0 .* is no trainable parameter"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastfisher.penalty(nn.Linear(3, 3), torch.zeros(2, 3), **options)


def test_bad_models_and_inputs_are_named() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(TypeError, match="inputs: expected a tensor, a tuple, a list or a dict"):
        fastfisher.penalty(model, "x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="inputs: expected"):
        fastfisher.penalty(model, ())
    with pytest.raises(ValueError, match="model: expected at least one parameter"):
        fastfisher.penalty(model.requires_grad_(False), torch.zeros(2, 3))


# ---- the second forward: what may and what may not differ from the first ---------------------------------------------

X20, Y4 = torch.randn(64, 20, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 4


class Between(nn.Module):
    """A function between two linear layers."""

    def __init__(self, function: Any, width: int = 16) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(20, width), nn.Linear(width, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def both_ways(make: Any, x: Tensor = X20, **options: Any) -> tuple[Tensor, Tensor]:
    """∇R at the targets by finite differences and by double backprop, of the same fresh model."""
    found = []
    for method in ("finite_difference", "double_backprop"):
        torch.manual_seed(7)
        model = make()
        more = options if method == "finite_difference" else {}
        found.append(gradient(model, fastfisher.penalty(model, x, labels=Y4, method=method, **more)))
    return found[0], found[1]


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3 / 3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x * x * grad


def running_mean(z: Tensor) -> Tensor:
    with torch.no_grad():
        scale = z.abs().mean()
        scale += z.square().mean()
    return torch.tanh(z / scale)


HELD: dict[str, Any] = {
    "detach": lambda z: z * torch.sigmoid(z.detach()),
    "data": lambda z: z * torch.sigmoid(z.data),
    "no_grad": running_mean,
    "item": lambda z: z.tanh() * float(z.abs().max()),
    "a straight-through sign": lambda z: torch.tanh(z) + (torch.sign(z) - torch.tanh(z)).detach(),
    "a custom Function": Cube.apply,
    "a quantiser": lambda z: z + ((z * 8).round() / 8 - z).detach(),
    "a top-k mask": lambda z: z * torch.zeros_like(z).scatter(1, z.topk(4, 1).indices, 1.0),
    "an if": lambda z: z.tanh() if z.sum() > 0 else z.sigmoid(),
}


@pytest.mark.parametrize("name", HELD)
def test_what_autograd_holds_fixed_is_replayed(name: str) -> None:
    found, exact = both_ways(lambda: Between(HELD[name]).double(), X20.double(), difference="central")
    assert relative_error(found, exact) < 1e-6


GUARDS: dict[str, Any] = {
    "log of a clamp": lambda z: z.clamp(min=1e-6).log(),
    "log of a relu": lambda z: torch.log(z.relu() + 1e-6),
    "root of a relu": lambda z: (z.relu() + 1e-6).sqrt(),
    "power of a relu": lambda z: (z.relu() + 1e-5) ** 0.7,
    "logit": lambda z: torch.logit(z.clamp(1e-6, 1 - 1e-6)),
}


@pytest.mark.parametrize("difference", ["forward", "central"])
@pytest.mark.parametrize("name", GUARDS)
def test_a_guard_lets_no_nan_through(name: str, difference: Any) -> None:
    torch.manual_seed(7)
    model = nn.Sequential(Between(GUARDS[name], 512))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        penalty = fastfisher.FisherPenalty(model, 1.0, every=1, labels="true", difference=difference)
        penalty.backward(X20, Y4)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    if not any(issubclass(w.category, fastfisher.AccuracyWarning) for w in said):
        plain = copy.deepcopy(model)
        plain.zero_grad()
        F.cross_entropy(plain(X20), Y4).backward()
        found = flat([p.grad - q.grad for p, q in zip(model.parameters(), plain.parameters(), strict=True)])
        exact = gradient(plain, fastfisher.penalty(plain, X20, labels=Y4))
        assert relative_error(found, exact) < 0.15  # of a whole step, where half of it may be off by 5 %


def test_a_domain_that_every_step_leaves_is_said() -> None:
    class Edge(nn.Module):
        """Its logits are finite at θ alone."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight + torch.log(1 - ((self.weight - 1) * 1e30) ** 2)

    model = Edge()
    with pytest.warns(fastfisher.AccuracyWarning, match="this step has no penalty"):
        fastfisher.FisherPenalty(model, 1.0, every=1, labels="true").backward(X20[:, :4], Y4)
    assert model.weight.grad is not None and bool(model.weight.grad.isfinite())


class Low(nn.Module):
    def __init__(self, low: torch.dtype | None) -> None:
        super().__init__()
        self.first, self.middle, self.last, self.low = nn.Linear(20, 64), nn.Linear(64, 64), nn.Linear(64, 4), low

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        low = x.dtype if self.low is None else self.low
        hidden = F.linear(x.to(low), self.middle.weight.to(low), self.middle.bias.to(low))
        return self.last(hidden.to(x.dtype).tanh())


@pytest.mark.parametrize(
    ("low", "dtype", "tolerance"),
    [(torch.bfloat16, torch.float32, 0.25), (torch.float16, torch.float32, 0.05), (torch.float32, torch.float64, 5e-3)],
)
def test_the_step_is_that_of_the_coarsest_layer(low: torch.dtype, dtype: torch.dtype, tolerance: float) -> None:
    x = X20.to(dtype)
    torch.manual_seed(7)
    model = Low(low).to(dtype)
    same = Low(None).to(dtype)
    same.load_state_dict(model.state_dict())
    exact = gradient(same, fastfisher.penalty(same, x, labels=Y4))
    found = gradient(model, fastfisher.penalty(model, x, labels=Y4, method="finite_difference"))
    assert relative_error(found, exact) < tolerance


def test_a_step_that_moves_the_logits_far_is_shortened() -> None:
    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(20 if i == 0 else 64, 64) for i in range(4))
            self.last = nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
                x = 3 * x + x.gather(1, x.argmax(1, keepdim=True))
            return self.last(x)

    for difference, tolerance in (("forward", 3e-2), ("central", 5e-3)):
        found, exact = both_ways(Steep, difference=difference)
        assert relative_error(found, exact) < tolerance


def test_tied_embeddings_with_a_padding_index() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Embedding(11, 16, padding_idx=0), nn.Linear(16, 16)
            nn.init.normal_(self.table.weight)  # a padding row that is not 0

        def forward(self, tokens: Tensor) -> Tensor:
            return torch.tanh(self.layer(self.table(tokens))).mean(1) @ self.table.weight.T

    tokens, labels = torch.randint(11, (24, 5)), torch.arange(24) % 11
    tokens[:, 3:] = 0
    model = Tied().double()
    exact = gradient(model, fastfisher.penalty(model, tokens, labels=labels))
    options: dict[str, Any] = {"method": "finite_difference", "difference": "central"}
    assert relative_error(gradient(model, fastfisher.penalty(model, tokens, labels=labels, **options)), exact) < 1e-6


def test_complex_parameters_count_by_their_absolute_value() -> None:
    class Fourier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filter, self.last = nn.Parameter(torch.randn(11, dtype=torch.cdouble)), nn.Linear(20, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(torch.fft.irfft(torch.fft.rfft(x, dim=1) * self.filter, n=20, dim=1)))

    torch.manual_seed(0)
    model, x = Fourier(), X20.double()
    grads = torch.autograd.grad(F.cross_entropy(model(x), Y4), list(model.parameters()), create_graph=True)
    squared = sum(torch.view_as_real(g).square().sum() if g.is_complex() else g.square().sum() for g in grads)
    exact = torch.autograd.grad(squared, list(model.parameters()))
    for options in ({}, {"method": "finite_difference", "difference": "central"}):
        value = fastfisher.penalty(model, x, labels=Y4, **options)
        assert not value.is_complex() and float(value) == pytest.approx(float(squared))
        for g, h in zip(torch.autograd.grad(value, list(model.parameters())), exact, strict=True):
            assert float((g - h).abs().max()) < 1e-6 * float(h.abs().max())


def test_a_module_with_two_names_keeps_its_parameters() -> None:
    """As a wrapper has it that holds a module beside what it made of it; with the values of one name."""

    class TwoNames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4)).double()
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.second(x)
            return out

    x, y = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 4
    model, plain = TwoNames(), TwoNames().first
    parameters, buffers = list(model.parameters()), list(model.buffers())
    for each in (model, plain):
        fastfisher.FisherPenalty(each, 0.3, every=1, labels="true").backward(x, y)
        fastfisher.penalty(each, x, y, labels="true", method="finite_difference").backward()
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None
        torch.testing.assert_close(mine.grad, other.grad)
    for options in (
        {},
        {"loss": lambda logits, targets: nn.functional.cross_entropy(logits, targets, reduction="none")},
    ):
        norms = [fastfisher.per_example_grad_norms(each, x, y, labels="true", **options) for each in (model, plain)]
        torch.testing.assert_close(*norms)
    traces = [
        fastfisher.trace_hessian(
            each, x, y, method="hutchinson", hvp="finite_difference", generator=torch.Generator().manual_seed(0)
        ).value
        for each in (model, plain)
    ]
    assert traces[0] == pytest.approx(traces[1], rel=1e-12)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))


def test_what_is_computed_after_the_logits_has_no_part_in_the_precision() -> None:
    class OwnLoss(nn.Module):
        """Makes a loss of its own in float32, as models of Transformers do."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 4))

        def forward(self, x: Tensor) -> Any:
            logits = self.layers(x)
            loss = F.cross_entropy(logits.float(), Y4)
            return type("Output", (), {"logits": logits, "loss": loss})()

    found, exact = both_ways(lambda: OwnLoss().double(), X20.double())
    assert relative_error(found, exact) < 1e-5


@pytest.mark.parametrize("method", ["double_backprop", "finite_difference"])
def test_whatever_the_callers_grad_mode(method: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 4))
    with torch.inference_mode():
        x, labels = X20.clone(), Y4.clone()
    expected = fastfisher.penalty(model, X20, labels=Y4, method=method)
    plain = copy.deepcopy(model)
    fastfisher.FisherPenalty(plain, 0.1, every=1, labels="true", method=method).backward(X20, Y4)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            value = fastfisher.penalty(model, x, labels=labels, method=method)
            assert value.requires_grad == (mode is torch.enable_grad)
            torch.testing.assert_close(value.clone(), expected.detach(), check_device=False)
            model.zero_grad(set_to_none=True)
            fastfisher.FisherPenalty(model, 0.1, every=1, labels="true", method=method).backward(x, labels)
        assert torch.equal(flat([p.grad for p in model.parameters()]), flat([p.grad for p in plain.parameters()]))
        assert not any(p.grad.is_inference() for p in model.parameters() if p.grad is not None)


def test_parameters_made_in_inference_mode_are_named() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(20, 4))
    for call in (fastfisher.penalty, fastfisher.trace_fisher):
        with pytest.raises(ValueError, match=r"got 0\.weight, which was made within torch\.inference_mode"):
            call(model, X20)
    with pytest.raises(ValueError, match=r"got 0\.weight"):
        fastfisher.FisherPenalty(model, 0.1, every=1).backward(X20, Y4)


def test_lazy_modules_are_named() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(4))
    for call in (
        lambda: fastfisher.penalty(model, X20),
        lambda: fastfisher.trace_fisher(model, X20),
        lambda: fastfisher.trace_hessian(model, X20, Y4),
        lambda: fastfisher.FisherPenalty(model, 0.1).backward(X20, Y4),
    ):
        with pytest.raises(ValueError, match=r"got 0\.weight of a lazy module.*call the model once"):
            call()
    model(X20)
    fastfisher.FisherPenalty(model, 0.1).backward(X20, Y4)


class Looked(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(10, 8, **options), nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(tokens))).mean(1)


TOKENS = torch.randint(10, (16, 3), generator=torch.Generator().manual_seed(0))


def test_a_forward_that_changes_its_parameters_is_refused() -> None:
    model, targets = Looked(max_norm=0.5), torch.arange(16) % 4
    before = copy.deepcopy(model.state_dict())
    pair = (TOKENS, targets)
    for measure in (
        lambda: fastfisher.penalty(model, TOKENS, method="finite_difference"),
        lambda: fastfisher.trace_fisher(model, TOKENS),
        lambda: fastfisher.per_example_grad_norms(model, TOKENS, targets, labels="true"),
        lambda: fastfisher.trace_hessian(model, TOKENS, targets),
        lambda: fastfisher.grad_inner_products(model, pair, pair),
        lambda: fastfisher.gradient_covariance(model, pair),
    ):
        with pytest.raises(NotImplementedError, match=r"table\.weight"):
            measure()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(NotImplementedError, match=r"changes the parameter 'table\.weight'"):
        fastfisher.FisherPenalty(model, 0.1, every=1).backward(TOKENS, targets)
    assert model.head.weight.grad is None
    fastfisher.FisherPenalty(model, 0.1, start=5).backward(TOKENS, targets)  # a plain step may


def test_a_parameter_that_follows_another_may_be_changed() -> None:
    class Momentum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.head = nn.Linear(20, 8), nn.Linear(20, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                for mine, other in zip(self.key.parameters(), self.query.parameters(), strict=True):
                    mine.mul_(0.9).add_(other, alpha=0.1)
                key = self.key(x)
            return self.head(torch.tanh(self.query(x)) * key)

    found = []
    for options in ({"difference": "central"}, {"method": "double_backprop"}):
        torch.manual_seed(0)
        model = Momentum().double()
        fastfisher.FisherPenalty(model, 5.0, every=1, labels="true", **options).backward(X20.double(), Y4)
        found.append(flat([p.grad for p in model.parameters()]))
    assert relative_error(found[0], found[1]) < 1e-6


def test_a_gradient_that_is_of_no_function_is_refused() -> None:
    model = Looked(scale_grad_by_freq=True)
    with pytest.raises(NotImplementedError, match="scale_grad_by_freq"):
        fastfisher.FisherPenalty(model, 0.1, every=1).backward(TOKENS, torch.arange(16) % 4)


class Reverse(torch.autograd.Function):
    """Gives its input, and the negative of its gradient, as domain-adversarial networks do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate = torch.sigmoid(x)
        return grad * gate * (1 + x * (1 - gate))


@pytest.mark.parametrize("options", [{}, {"reduction": "first"}, {"difference": "central"}, {"wrt": "inputs"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_that_is_no_derivative_of_the_loss_is_said(dtype: torch.dtype, options: dict[str, Any]) -> None:
    for function, said in ((Reverse.apply, True), (Swish.apply, False)):
        torch.manual_seed(0)
        model = Between(function).to(dtype)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", fastfisher.AccuracyWarning)
            fastfisher.penalty(model, X20.to(dtype), labels=Y4, method="finite_difference", **options)
        assert any("along its gradient" in str(w.message) for w in seen) == said


@pytest.mark.parametrize("place", ["activation", "module", "module, before"])
def test_hooks_that_change_gradients_within_the_model_are_refused(place: str) -> None:
    def tuple_of(found: Any) -> Any:
        return None if found is None else (found,)

    def hooked(act: Any) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 4)).double()
        if place == "activation":
            model[0].register_forward_hook(lambda module, args, out: out.register_hook(act) and None)
        elif place == "module":
            model[1].register_full_backward_hook(lambda module, given, out: tuple_of(act(given[0])))
        else:
            model[1].register_full_backward_pre_hook(lambda module, out: tuple_of(act(out[0])))
        return model

    x, options = X20.double(), {"every": 1, "labels": "true"}
    model = hooked(lambda grad: 0.3 * grad)
    own = [list(hooks.items()) for m in model.modules() for hooks in (m._backward_hooks, m._backward_pre_hooks)]
    with pytest.raises(NotImplementedError, match=r"the hook .*lambda.* changes a gradient .*double_backprop"):
        fastfisher.FisherPenalty(model, 1.0, **options).backward(x, Y4)
    assert all(p.grad is None for p in model.parameters())
    assert own == [list(hooks.items()) for m in model.modules() for hooks in (m._backward_hooks, m._backward_pre_hooks)]
    fastfisher.FisherPenalty(model, 1.0, method="double_backprop", **options).backward(x, Y4)

    seen: list[Any] = []
    grads = []
    for act in (seen.append, lambda grad: grad.clone(), lambda grad: None):
        model = hooked(act)
        fastfisher.FisherPenalty(model, 1.0, **options).backward(x, Y4)
        grads.append(flat([p.grad for p in model.parameters()]))
    assert seen, "a hook that looks is called"
    assert torch.equal(grads[0], grads[2])
    assert torch.equal(grads[1], grads[2])


def test_data_that_are_fitted_to_the_rounding_of_the_softmax_are_said() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 4))
    x, y = X20[:8], Y4[:8]
    with torch.no_grad():
        h = torch.cat([model[1](model[0](x)), torch.ones(8, 1)], 1)
        solved = torch.linalg.pinv(h) @ (16 * F.one_hot(y, 4).float())  # margins of 16: a loss of 3e-7
        model[2].weight.copy_(solved[:-1].T)
        model[2].bias.copy_(solved[-1])
    with pytest.warns(fastfisher.AccuracyWarning, match="the rounding of the softmax hides"):
        gradient(model, fastfisher.penalty(model, x, labels=y, method="finite_difference", verify=False))
    model, x = model.double(), x.double()
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastfisher.AccuracyWarning)
        options: dict[str, Any] = {"method": "finite_difference", "difference": "central"}
        found = gradient(model, fastfisher.penalty(model, x, labels=y, **options))
    assert relative_error(found, gradient(model, fastfisher.penalty(model, x, labels=y))) < 1e-4


def test_one_model_in_two_threads_is_refused_and_keeps_its_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 4))
    before, refused, done = list(model.parameters()), [], []

    def work() -> None:
        for _ in range(40):
            try:
                fastfisher.penalty(model, X20, labels=Y4, method="finite_difference")
                done.append(1)
            except ValueError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(p is q for p, q in zip(model.parameters(), before, strict=True))
    assert done and len(done) + len(refused) == 120
    assert all("no other thread is using" in message for message in refused)

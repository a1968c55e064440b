"""How a model is called and what it is made of."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastfisher
from fastfisher import FisherPenalty
from fastfisher.inputs import Call, as_call, input_tensors, map_inputs, signature_of, take_rows
from fastfisher.model import check_heads, heads_beside, unhooked
from fastfisher.outputs import as_given, class_last

pytestmark = pytest.mark.usefixtures("one_thread")


def test_hooks_of_parameters_rest_and_come_back():
    p, called = torch.nn.Parameter(torch.ones(2)), []
    handle = p.register_hook(lambda g: called.append("old"))
    with unhooked([p]):
        torch.autograd.grad((p * p).sum(), p)
        (p * p).sum().backward()
        assert called == []
        p.register_hook(lambda g: called.append("new"))
    (p * p).sum().backward()
    assert sorted(called) == ["new", "old"]
    handle.remove()
    (p * p).sum().backward()
    assert called.count("old") == 1 and called.count("new") == 2


class Twice(nn.Module):
    """An embedding under two names, and tied to the head."""

    def __init__(self, tied):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.same = self.embed
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.same(x).tanh())


@pytest.mark.parametrize("tied", [True, False])
def test_a_module_under_two_names_keeps_its_parameters(tied):
    model, expected, x, y = Twice(tied).double(), Twice(tied).double(), torch.arange(5), torch.arange(5)
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    fastfisher.FisherPenalty(model, 0.5, every=1, labels="true", difference="central").backward(x, y)
    fastfisher.trace_fisher(model, (x, y))
    fastfisher.trace_hessian(model, (x, y))
    after = dict(model.named_parameters())
    assert all(after[name] is p and torch.equal(p, value) for name, (p, value) in before.items())
    assert after.keys() == before.keys() and (model.head.weight is model.embed.weight) == tied
    parameters = list(expected.parameters())
    loss = nn.functional.cross_entropy(expected(x), y)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    (loss + 0.5 * sum(g.square().sum() for g in gradients)).backward()
    for found, exact in zip(model.parameters(), parameters, strict=True):
        torch.testing.assert_close(found.grad, exact.grad, rtol=1e-6, atol=1e-8)


# ---- logits, and heads beside them -----------------------------------------------------------------------------------


class Returning(nn.Module):
    """Two heads of one trunk; what it returns is asked of ``how(logits, other, hidden)``."""

    def __init__(self, how: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.trunk, self.head, self.other = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        hidden = self.trunk(x).tanh()
        return self.how(self.head(hidden), self.other(hidden), hidden)


class Outputs(OrderedDict[str, Any]):
    """Like a ModelOutput of Transformers: a dict with attributes."""

    __getattr__ = OrderedDict.__getitem__


@dataclass
class Bare:
    """Like an output that is a class of the user's own."""

    logits: Tensor
    rest: Any = None


Named = namedtuple("Named", "logits rest")
X, Y = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])

HEADS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "a namedtuple": lambda z, c, h: Named(z, c),
    "a ModelOutput": lambda z, c, h: Outputs(loss=None, logits=z, auxiliary=c),
    "an object": lambda z, c, h: Bare(z, c),
    "lists of heads": lambda z, c, h: Named(z, (h, [{"deep": c}])),
    "a loss of another head": lambda z, c, h: Outputs(loss=c.square().mean(), logits=z),
}
NO_HEADS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "logits alone": lambda z, c, h: z,
    "nothing else": lambda z, c, h: Bare(z),
    "hidden states": lambda z, c, h: Outputs(loss=None, logits=z, hidden_states=(h, z), attentions=None),
    "a loss of the logits": lambda z, c, h: Outputs(loss=z.square().mean(), logits=z),
    "another head that is detached": lambda z, c, h: Named(z, c.detach()),
    "a cache": lambda z, c, h: Outputs(logits=z, past_key_values=((h, h.detach()), (h, z))),
    "numbers and strings": lambda z, c, h: Outputs(logits=z, steps=3, name="x"),
}


def trained(how: Callable[..., Any], **options: Any) -> FisherPenalty:
    return FisherPenalty(Returning(how), 0.1, **options)


@pytest.mark.parametrize("options", [{}, {"alpha": 0.0}, {"examples": 2}, {"method": "double_backprop"}], ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_another_head_is_refused_before_anything_has_changed(name: str, options: dict[str, Any]) -> None:
    penalty = FisherPenalty(Returning(HEADS[name]), **{"alpha": 0.1, **options})
    for _ in range(2):  # what was refused is refused again
        with pytest.raises(ValueError, match=r"model: .*parameters of their own \(other\.weight, other\.bias\)"):
            penalty.backward(X, Y)
    assert all(p.grad is None for p in penalty.model.parameters()) and penalty.steps == 0


@pytest.mark.parametrize("name", NO_HEADS)
def test_what_models_return_beside_logits_is_no_head(name: str) -> None:
    penalty, expected = trained(NO_HEADS[name]), trained(NO_HEADS["logits alone"])
    for _ in range(2):
        assert penalty.backward(X, Y) == expected.backward(X, Y)


@pytest.mark.parametrize("name", HEADS)
def test_a_loss_of_the_callers_may_be_of_the_logits_alone(name: str) -> None:
    of_logits = lambda output, y: F.cross_entropy(output.logits, y)  # noqa: E731
    penalty, expected = trained(HEADS[name], loss=of_logits), trained(NO_HEADS["logits alone"])
    assert penalty.backward(X, Y) == expected.backward(X, Y)
    assert penalty.model.other.weight.grad is None
    model = penalty.model  # the penalty and the measurements are of the logits
    assert float(fastfisher.penalty(model, X, Y, labels="true").detach()) > 0
    assert fastfisher.trace_fisher(model, X).value > 0


def test_a_loss_of_the_callers_gets_what_the_model_returns() -> None:
    """So that another head has its part in it; what takes a tensor alone says so."""
    both = lambda output, y: F.cross_entropy(output.logits, y) + F.cross_entropy(output.rest, y)  # noqa: E731
    penalty = trained(HEADS["a namedtuple"], loss=both, every=1)
    loss = penalty.backward(X, Y)
    found = {name: p.grad for name, p in penalty.model.named_parameters()}
    model = Returning(HEADS["a namedtuple"])
    total = both(model(X), Y)
    assert loss == total.detach()
    gradients = torch.autograd.grad(total, list(model.parameters()), materialize_grads=True)
    r = fastfisher.penalty(model, X, labels="sampled", generator=torch.Generator().manual_seed(0))
    assert found["other.weight"] is not None
    torch.testing.assert_close(found["other.weight"], dict(zip(found, gradients, strict=True))["other.weight"])
    assert float(r.detach()) > 0
    with pytest.raises(
        TypeError, match=r"loss: it gets what the model returns, a Named, .* loss=lambda output, targets"
    ):
        trained(HEADS["a namedtuple"], loss=F.cross_entropy).backward(X, Y)


def test_a_loss_gets_the_output_of_its_own_step_after_one_that_raised() -> None:
    both = lambda output, y: F.cross_entropy(output.logits, y) + output.rest.square().mean()  # noqa: E731
    penalty = trained(HEADS["a namedtuple"], loss=both, labels="true", every=1)
    with pytest.raises(ValueError, match="targets: expected class indices"):
        penalty.backward(X, Y + 7)  # after the forward
    x = X.flip(0) * 2
    loss = penalty.backward(x, Y)
    torch.testing.assert_close(loss, both(penalty.model(x), Y).detach())


def test_a_head_is_looked_for_once_and_again_where_it_thaws() -> None:
    penalty = trained(HEADS["a namedtuple"], every=1)
    penalty.model.other.requires_grad_(False)
    penalty.backward(X, Y)
    before = [p.grad.clone() for p in penalty.model.trunk.parameters() if p.grad is not None]
    call = as_call(penalty.model, X)
    assert check_heads(penalty.model, call, 4) is call  # known: nothing is looked for
    penalty.model.other.requires_grad_(True)
    with pytest.raises(ValueError, match="which would not be trained"):
        penalty.backward(X, Y)
    assert penalty.steps == 1
    for p, g in zip(penalty.model.trunk.parameters(), before, strict=True):
        assert p.grad is not None and torch.equal(p.grad, g)
    penalty.model.eval()  # where the other head is returned in training alone
    penalty.model.how = lambda z, c, h: Named(z, c) if c.requires_grad and penalty.model.training else z
    penalty.backward(X, Y)
    penalty.model.train()
    with pytest.raises(ValueError, match="which would not be trained"):
        penalty.backward(X, Y)


def test_heads_beside() -> None:
    model = Returning(HEADS["a namedtuple"])
    output = model(X)
    assert heads_beside(model, output, output.logits) == ["other.weight", "other.bias"]
    scale = nn.Parameter(torch.ones(()))
    model.register_parameter("scale", scale)
    assert heads_beside(model, Named(output.logits, scale), output.logits) == ["scale"]  # the parameter itself


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            lambda z, c, h: (z, c),
            "got tuple of 2 items; say where they are, logits_of=lambda output: ..., or wrap the model in a module",
        ),
        (lambda z, c, h: {"logits": z}, r"got dict with the keys \['logits'\]; say where"),
        (lambda z, c, h: None, "got NoneType; say where"),
        (lambda z, c, h: Bare(None), "got Bare; say where"),  # type: ignore[arg-type]
    ],
)
def test_outputs_without_logits_are_refused_with_the_way_out(how: Callable[..., Any], message: str) -> None:
    for call in (
        lambda: trained(how).backward(X, Y),
        lambda: fastfisher.penalty(Returning(how), X),
        lambda: fastfisher.trace_fisher(Returning(how), X),
        lambda: fastfisher.trace_hessian(Returning(how), X, Y),
        lambda: fastfisher.top_eigenvalues(Returning(how), X, Y),
    ):
        with pytest.raises(TypeError, match=f"model: expected it to return logits .*{message}"):
            call()


def test_classes_are_put_last_and_back() -> None:
    logits = torch.randn(2, 3, 4, 5)
    for dim in (1, 2, 3, -1, -3):
        last = class_last(logits, dim)
        assert last.shape[-1] == logits.shape[dim] and last._is_view() == (dim not in (3, -1))
        assert torch.equal(as_given(last, dim), logits)


# ---- what inputs mean -----------------------------------------------------------------------------------------------


class Takes(nn.Module):
    """Only its signature is looked at."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = forward  # type: ignore[method-assign, assignment]


PAIR, NAMES = (1, 2), {"x": 1, "w": 2}


@pytest.mark.parametrize(
    ("forward", "inputs", "args", "kwargs"),
    [
        (lambda x, w: 0, PAIR, PAIR, {}),
        (lambda x, w: 0, [1, 2], PAIR, {}),
        (lambda x, w: 0, NAMES, (), NAMES),
        (lambda x, w=None: 0, PAIR, PAIR, {}),
        (lambda x, w=None: 0, {"x": 1}, (), {"x": 1}),
        (lambda x: 0, PAIR, (PAIR,), {}),
        (lambda x: 0, [1, 2], ([1, 2],), {}),
        (lambda x: 0, (1,), (1,), {}),
        (lambda x: 0, {"x": 1}, (), {"x": 1}),
        (lambda batch: 0, NAMES, (NAMES,), {}),
        (lambda batch: 0, {1: "a"}, ({1: "a"},), {}),
        (lambda batch, **kwargs: 0, NAMES, (NAMES,), {}),
        (lambda *args: 0, PAIR, PAIR, {}),
        (lambda *args: 0, NAMES, (NAMES,), {}),
        (lambda **kwargs: 0, NAMES, (), NAMES),
        (lambda *args, **kwargs: 0, NAMES, (), NAMES),
        (lambda x, /: 0, {"x": 1}, ({"x": 1},), {}),
        (lambda x, *, w: 0, NAMES, (), NAMES),
    ],
)
def test_the_signature_decides(forward: Callable[..., Any], inputs: Any, args: Any, kwargs: Any) -> None:
    call = as_call(Takes(forward), inputs)
    assert (call.args, call.kwargs) == (args, kwargs)
    assert as_call(Takes(forward), call) is call


@pytest.mark.parametrize(
    ("forward", "inputs", "message"),
    [
        (lambda x, w: 0, (1, 2, 3), "got 3 of them"),
        (lambda x, w: 0, {"x": 1, "v": 2}, r"got \['v'\], which it does not take"),
        (lambda x, w: 0, {"x": 1}, r"needs, got \['x'\]"),
        (lambda x, w: 0, torch.ones(2), "got one tensor"),
        (lambda: 0, torch.ones(2), "got one tensor"),
    ],
)
def test_what_a_model_cannot_be_called_with_is_refused(forward: Callable[..., Any], inputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"inputs: .*{message}"):
        as_call(Takes(forward), inputs)


def test_a_compiled_model_has_the_signature_of_its_own() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return x + w

    assert list(signature_of(torch.compile(Two())).parameters) == ["x", "w"]  # type: ignore[union-attr, arg-type]


def test_tensors_at_any_depth() -> None:
    inputs = Call((X, [Y, ("s", {"k": X, "n": None})]), {"m": UserDict(a=Y), "i": 3})
    assert [id(x) for x in input_tensors(inputs)] == [id(X), id(Y), id(X), id(Y)]
    doubled = map_inputs(inputs, lambda x: 2 * x)
    assert torch.equal(doubled.args[1][1][1]["k"], 2 * X) and torch.equal(doubled.kwargs["m"]["a"], 2 * Y)
    assert doubled.args[1][1][0] == "s" and doubled.args[1][1][1]["n"] is None and doubled.kwargs["i"] == 3
    assert torch.equal(inputs.kwargs["m"]["a"], Y)
    rows = take_rows(inputs, torch.tensor([4, 1]))
    assert torch.equal(rows.args[0], X[[4, 1]]) and torch.equal(rows.kwargs["m"]["a"], Y[[4, 1]])

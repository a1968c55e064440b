"""How a model is called and what it is made of."""

import pytest
import torch
from torch import nn

import fastfisher
from fastfisher.model import unhooked


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

"""How a model is called and what it is made of."""

import torch

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

"""Other ways to per-example gradient norms: what people use today, each as its own documentation has it.

Each function takes a network, images and labels and returns a call that gives ‖∇ℓ(x_i, y_i)‖² of each example, or their
sum where the peer forms no more than that: what ``fastfisher.per_example_grad_norms(..., labels="true")`` gives.
They come with the extra ``peers``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Norms = Callable[..., Tensor]


def loop(model: nn.Module, x: Tensor, y: Tensor) -> Norms:
    """A forward and backward for each example."""
    parameters = list(model.parameters())

    def one(i: int) -> Tensor:
        grads = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), parameters)
        return torch.stack([g.square().sum() for g in grads]).sum()

    return lambda: torch.stack([one(i) for i in range(len(x))])


def vmap(
    model: nn.Module, x: Tensor, y: Tensor, chunk: int = 8, transform: Callable[[Norms], Norms] = lambda norms: norms
) -> Norms:
    """``torch.func.vmap(grad)`` in chunks of 8 examples, which were the fastest on a CPU.

    Args:
        transform: what is made of the function of a chunk, as in ``torch.compile``.
    """
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, p, (x[None],)), y[None])

    def norm(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([g.square().sum() for g in torch.func.grad(loss)(p, x, y).values()]).sum()

    norms = transform(torch.func.vmap(norm, in_dims=(None, 0, 0)))
    return lambda: torch.cat([norms(parameters, *part) for part in zip(x.split(chunk), y.split(chunk), strict=True)])


def backpack(model: nn.Module, x: Tensor, y: Tensor) -> Norms:
    """BackPACK's BatchL2Grad (Dangel et al., 2020)."""
    from backpack import backpack as extended  # type: ignore[import-not-found, unused-ignore]
    from backpack import extend
    from backpack.extensions import BatchL2Grad  # type: ignore[import-not-found, unused-ignore]

    model = extend(copy.deepcopy(model))
    loss = extend(nn.CrossEntropyLoss(reduction="sum"))

    def run() -> Tensor:
        model.zero_grad()
        with extended(BatchL2Grad()):
            loss(model(x), y).backward()
        return torch.stack([p.batch_l2 for p in model.parameters()]).sum(0)

    return run


def opacus(model: nn.Module, x: Tensor, y: Tensor) -> Norms:
    """The norms of Opacus' ghost clipping (Yousefpour et al., 2021), which works in train mode only."""
    from opacus.grad_sample import (  # type: ignore[import-not-found, unused-ignore]
        GradSampleModuleFastGradientClipping,
    )

    hooked = GradSampleModuleFastGradientClipping(copy.deepcopy(model).train(), loss_reduction="sum")

    def run() -> Tensor:
        hooked.zero_grad()
        F.cross_entropy(hooked(x), y, reduction="sum").backward()
        norms: Tensor = hooked.get_norm_sample().square()
        return norms

    return run


def nngeometry(model: nn.Module, x: Tensor, y: Tensor) -> Norms:
    """The trace of NNGeometry's PMatDiag (George, 2021), of the gradient for the labels given."""
    from nngeometry.backend import TorchHooksJacobianBackend  # type: ignore[import-not-found, unused-ignore]
    from nngeometry.object import PMatDiag  # type: ignore[import-not-found, unused-ignore]

    def log_probability(x: Tensor, y: Tensor) -> Tensor:
        return model(x).log_softmax(1).gather(1, y[:, None])

    jacobian = TorchHooksJacobianBackend(model=model, function=log_probability)
    return lambda: PMatDiag(generator=jacobian, examples=(x.clone(), y)).trace() * len(x)


def asdl(model: nn.Module, x: Tensor, y: Tensor) -> Norms:
    """The trace of ASDL's diagonal empirical Fisher (Osawa et al., 2023)."""
    from asdl import FISHER_EMP, SHAPE_DIAG, FisherConfig, get_fisher_maker  # type: ignore[import-not-found, unused-ignore]

    model = copy.deepcopy(model)
    maker = get_fisher_maker(model, FisherConfig(fisher_type=FISHER_EMP, fisher_shapes=[SHAPE_DIAG], data_size=1))

    def run() -> Tensor:
        model.zero_grad()
        logits = maker.setup_model_call(model, x)
        maker.setup_loss_call(F.cross_entropy, logits, y, reduction="sum")
        maker.forward_and_backward()
        diagonals = [m.fisher.diag for m in model.modules() if hasattr(m, "fisher")]
        parts = [d for diagonal in diagonals for d in (diagonal.weight, diagonal.bias) if d is not None]
        return torch.stack([p.sum() for p in parts]).sum()

    return run

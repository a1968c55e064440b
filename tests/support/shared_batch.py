"""A batch and a network that several processes share, and the comparison with one process that has all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastfisher import Categorical, FisherPenalty
from tests.support.networks import SmallResNet

X, Y = torch.randn(24, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 10
IMAGES = torch.randn(24, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
"""For :func:`small_resnet`."""
ALPHA = 0.3


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(4)
    layers = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 17), nn.ReLU(), nn.Linear(17, 10)
    )
    return layers.to(dtype)


def small_resnet() -> SmallResNet:
    """With batch normalisation."""
    torch.manual_seed(2)
    return SmallResNet().double()


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for child in model.children():
        if next(child.parameters(), None) is not None:
            fully_shard(child, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def sizes(equal: bool = True) -> list[int]:
    return (
        {2: [12, 12], 4: [6] * 4}[dist.get_world_size()]
        if equal
        else {2: [15, 9], 4: [9, 3, 7, 5]}[dist.get_world_size()]
    )


def rows_of(rank: int, equal: bool = True) -> slice:
    start = sum(sizes(equal)[:rank])
    return slice(start, start + sizes(equal)[rank])


def own(equal: bool = True) -> slice:
    return rows_of(dist.get_rank(), equal)


def seeded(**options: Any) -> dict[str, Any]:
    return {"generator": torch.Generator().manual_seed(9), **options}


def gradients(model: nn.Module) -> Tensor:
    """All gradients as one float64 vector; those of a sharded model are gathered."""
    grads = [p.grad for p in model.parameters()]
    whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]  # type: ignore[union-attr]
    return torch.cat([g.double().flatten() for g in whole if g is not None])


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def compare(
    wrap: Callable[[nn.Module], nn.Module],
    *,
    equal: bool = True,
    steps: int = 2,
    order: Tensor | None = None,
    make: Callable[[], nn.Module] = network,
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> FisherPenalty:
    """Steps of SGD of all processes, each beside one of a single process on the whole batch: gradients and values."""
    whole, parts = make(), wrap(make())
    alone = FisherPenalty(whole, ALPHA, **seeded(**options))
    shared = FisherPenalty(parts, ALPHA, process_group=group, **seeded(**options))
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (whole, parts)]
    rows, x = own(equal), X.to(next(whole.parameters()).dtype)
    order = torch.arange(24) if order is None else order
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        alone.backward(x[order], Y[order])
        shared.backward(x[rows], Y[rows])
        assert error(gradients(parts), gradients(whole)) < 1e-5, error(gradients(parts), gradients(whole))
        torch.testing.assert_close(shared.value, alone.value, rtol=1e-5, atol=0)
        torch.testing.assert_close(shared.trace_estimate, alone.trace_estimate, rtol=1e-5, atol=0)
        for optimizer in optimizers:
            optimizer.step()
    return shared


METHODS: dict[str, dict[str, Any]] = {
    "fp": {},
    "gp": {"labels": "true"},
    "gp_r": {"labels": "uniform"},
    "rademacher": {"labels": "rademacher"},
    "gp_x": {"labels": "true", "wrt": "inputs"},
}


def options_are_those_of_one_process(wrap: Callable[[nn.Module], nn.Module]) -> None:
    for options in METHODS.values():
        compare(wrap, every=1, steps=1, **options)
        compare(wrap, every=10, **options)
    compare(wrap, every=1, steps=1, labels="true", difference="central")
    compare(wrap, every=1, steps=1, mixed=True)
    compare(wrap, every=1, steps=1, reduction="first")
    compare(wrap, every=1, steps=1, of="norm")
    compare(wrap, every=2, steps=1, of=torch.log1p, labels="true", wrt="inputs")
    weight = torch.linspace(0.2, 2, 10, dtype=torch.float64)
    compare(wrap, every=1, steps=1, likelihood=Categorical(weight, 0.1), equal=False)
    compare(wrap, every=1, steps=1, likelihood=Categorical(weight, 0.1), labels="true", equal=False)
    compare(wrap, every=1, steps=1, likelihood=Categorical(weight), labels="true", equal=False, mixed=True)
    compare(wrap, every=1, steps=3, gates="free")
    compare(wrap, every=2, steps=3, gates="free")

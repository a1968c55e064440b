"""Which processes share a model is read off it: what is looked through, and what is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable import replicate
from torch.distributed._composable.replicate_with_fsdp import replicate as replicate_with_fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastfisher
from fastfisher import FisherPenalty
from tests.support.processes import in_processes
from tests.support.shared_batch import ALPHA, X, Y, compare, ddp, network, own, seeded, sharded


class Engine(nn.Module):
    """A wrapper as training engines have it: what it does to inputs and outputs counts."""

    def __init__(self, module: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.module, self.scale, self.calls = module, scale, 0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        out: Tensor = self.module(*args, **kwargs)
        return out * self.scale


@in_processes(2)
def test_wrappers_are_looked_through() -> None:
    """Each around DDP gives what one process does on the whole batch, with a factor of the wrapper's own in it."""

    def within(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
        def wrapped(engine: nn.Module) -> nn.Module:
            engine.module = wrap(engine.module)
            return engine

        return wrapped

    def scaled_network() -> nn.Module:
        return Engine(network(), 3.0)

    ways: list[tuple[Callable[[nn.Module], nn.Module], Callable[[], nn.Module]]] = [
        (lambda m: torch.compile(ddp(m)), network),
        (lambda m: Engine(Engine(ddp(m))), network),
        (lambda m: torch.compile(Engine(ddp(m))), network),
        (lambda m: Engine(torch.compile(ddp(m))), network),
        (within(ddp), scaled_network),
        (within(within(ddp)), lambda: Engine(Engine(network(), 0.5), 3.0)),
    ]
    for wrap, make in ways:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fastfisher.SlowPathWarning)
            compare(wrap, make=make, every=2)
            found = fastfisher.trace_fisher(wrap(make()), X.double()[own()], **seeded())
            value = fastfisher.trace_fisher(make(), X.double(), **seeded()).value
            assert abs(found.value - value) < 1e-10 * value
            curvature = fastfisher.trace_hessian(wrap(make()), X.double()[own()], Y[own()], probes=2, **seeded())
            one = fastfisher.trace_hessian(make(), X.double(), Y, probes=2, **seeded())
            assert abs(curvature.value - one.value) < 1e-9 * abs(one.value)
            norms = fastfisher.per_example_grad_norms(wrap(make()), X.double()[own()], Y[own()], labels="true")
            torch.testing.assert_close(
                norms, fastfisher.per_example_grad_norms(make(), X.double(), Y, labels="true")[own()]
            )
    engine = Engine(ddp(network()))
    FisherPenalty(engine, ALPHA, every=1).backward(X.double()[own()], Y[own()])
    assert engine.calls > 0 and "forward" not in engine.module.__dict__
    with pytest.warns(fastfisher.SlowPathWarning, match="torch.compile around DistributedDataParallel"):
        FisherPenalty(torch.compile(ddp(network())), ALPHA)
    engine = Engine(ddp(network()))
    engine.eval()
    FisherPenalty(engine, ALPHA).model.train()
    assert engine.training and engine.module.module.training


def calls_of(model: nn.Module) -> dict[str, Callable[[], Any]]:
    """Every public function, on a model."""
    x, y = X.to(next(model.parameters()).dtype)[own()], Y[own()]
    return {
        "FisherPenalty": lambda: FisherPenalty(model, ALPHA).backward(x, y),
        "trace_fisher": lambda: fastfisher.trace_fisher(model, x),
        "trace_hessian": lambda: fastfisher.trace_hessian(model, x, y, probes=1),
        "penalty": lambda: fastfisher.penalty(model, x),
        "top_eigenvalues": lambda: fastfisher.top_eigenvalues(model, x, y),
        "gradient_covariance": lambda: fastfisher.gradient_covariance(model, (x, y)),
        "grad_inner_products": lambda: fastfisher.grad_inner_products(model, (x, y), (x, y)),
        "per_example_grad_norms": lambda: fastfisher.per_example_grad_norms(model, x),
    }


ALONE = ("penalty", "top_eigenvalues", "gradient_covariance", "grad_inner_products")


def refused(model: nn.Module, message: str, but: tuple[str, ...] = ()) -> None:
    """By every public function, with nothing moved."""
    state = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    for name, call in calls_of(model).items():
        if name in but:
            continue
        with pytest.raises(ValueError, match=message):
            call()
        assert all(p.grad is None for p in model.parameters()) and torch.equal(torch.get_rng_state(), random), name
    for name, t in model.state_dict().items():
        assert torch.equal(_own_part(t), _own_part(state[name])), name


def _own_part(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


@in_processes(2)
def test_a_module_within_ddp_is_refused() -> None:
    inner = network()
    penalty = FisherPenalty(inner, ALPHA)
    penalty.backward(X.double(), Y)
    inner.zero_grad()
    model = ddp(inner)
    norms = ("per_example_grad_norms",)  # of examples, not of a batch
    with pytest.raises(ValueError, match="model: expected the DistributedDataParallel itself"):
        penalty.backward(X.double(), Y)
    refused(inner, "model: expected the DistributedDataParallel itself", norms)
    with pytest.raises(ValueError, match="model: expected the DistributedDataParallel itself"):
        FisherPenalty(nn.Sequential(inner[:4], nn.Linear(24, 10).double()), ALPHA)
    sharing = ("FisherPenalty", "trace_fisher", "trace_hessian", *norms)
    refused(model, "model: expected that of one process for", sharing)
    refused(Engine(model), "model: expected that of one process for", sharing)
    found = fastfisher.trace_fisher(inner, X.double()[own()], process_group=dist.group.WORLD, **seeded()).value
    expected = fastfisher.trace_fisher(network(), X.double(), **seeded()).value
    assert abs(found - expected) < 1e-10 * expected
    for call in calls_of(copy.deepcopy(inner)).values():  # the way out
        call()
    del model
    for call in calls_of(inner).values():  # it is this process's alone again
        call()


@in_processes(2, 4)
def test_other_ways_to_share_are_refused() -> None:
    mesh, size = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_world_size()
    refused(nn.Sequential(ddp(network()), nn.Linear(10, 10).double()), "every trainable parameter within")
    refused(nn.Sequential(ddp(network()), ddp(nn.Linear(10, 10).double())), "at most one DistributedDataParallel")
    refused(nn.DataParallel(network()), "expected no DataParallel")
    refused(Engine(nn.DataParallel(network())), "expected no DataParallel, found it at 'module'")
    refused(replicate(network()), "expected no replicate")
    refused(Engine(replicate(network())), "expected no replicate")
    refused(replicate_with_fsdp(network(), mesh=mesh), "expected no replicate")
    for original in (True, False):
        inner = network()
        whole = FullyShardedDataParallel(inner, use_orig_params=original, device_id=torch.device("cpu"))
        refused(whole, r"expected no FullyShardedDataParallel \(FSDP1\)")
        refused(inner, "got a module within FullyShardedDataParallel")
    wide = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 12)).double()
    refused(parallelize_module(wide, mesh, {"1": ColwiseParallel(), "3": RowwiseParallel()}), "as a DTensor")
    model = sharded(network())
    spread = (*ALONE, "per_example_grad_norms")
    refused(model, "as a DTensor", tuple(name for name in calls_of(model) if name not in spread))
    refused(model, "expected all parameters in each process", ("FisherPenalty", *spread))
    FisherPenalty(model, ALPHA).backward(X.double()[own()], Y[own()])  # the outermost is known from now on
    model.zero_grad()
    with pytest.raises(ValueError, match="a part of it, whose parameters"):
        FisherPenalty(model[4], ALPHA)
    with pytest.raises(
        ValueError, match="process_group: expected None or the processes that the model is sharded over"
    ):
        FisherPenalty(model, ALPHA, process_group=dist.new_group([dist.get_rank()], use_local_synchronization=True))
    ignoring = network()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(ignoring, ["0.weight"])
    refused(ddp(ignoring), "leaves '0.weight' to each process")

    class Doubling(DistributedDataParallel):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)  # type: ignore[no-any-return]

    refused(Doubling(network()), "expected DistributedDataParallel's own forward")
    for group, message in ((mesh, "expected a torch.distributed.ProcessGroup"), (-100, "this process is not in")):
        with pytest.raises(ValueError, match=f"process_group: .*{message}"):
            FisherPenalty(network(), ALPHA, process_group=group)  # type: ignore[arg-type]
    assert size > 1

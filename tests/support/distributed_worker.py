"""What tests/distributed runs in each of several processes: every case beside one process on the whole batch.

torchrun --nproc-per-node N -m tests.support.distributed_worker results.json
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable import replicate
from torch.distributed._composable.replicate_with_fsdp import replicate as replicate_with_fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastfisher
from fastfisher import FisherPenalty, RankFailure
from fastfisher.distributed import messages
from tests.support.networks import SmallResNet

RNG = torch.Generator().manual_seed(0)
X, Y = torch.randn(24, 1, 6, 6, generator=RNG), torch.arange(24) % 10
ALPHA = 0.3


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(4)
    layers = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 17), nn.ReLU(), nn.Linear(17, 10)
    )
    return layers.to(dtype)


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
    compare(wrap, every=1, steps=3, gates="free")
    compare(wrap, every=2, steps=3, gates="free")


def ddp_finite_difference() -> None:
    options_are_those_of_one_process(ddp)


def ddp_double_backprop() -> None:
    for options in (*METHODS.values(), {"reduction": "first"}):
        for every in (1, 10):
            compare(ddp, every=every, steps=every // 10 + 1, method="double_backprop", **options)


def a_plain_model_with_a_group() -> None:
    compare(lambda model: model, group=dist.group.WORLD, every=1)
    one = FisherPenalty(network(), ALPHA, every=1, **seeded())
    assert one._world.alone, "a plain model alone stays alone"


def ddp_unequal_batches() -> None:
    for options in METHODS.values():
        compare(ddp, every=1, steps=1, equal=False, **options)
        compare(ddp, every=10, equal=False, method="double_backprop", **options)


def weighted_parts_of_a_batch() -> None:
    """Three steps that accumulate at a weight, one that recomputes R among them, beside one process; the same R."""
    for wrap in (ddp, sharded):
        for options in (
            {"every": 1},
            {"every": 2},
            {"every": 1, "gates": "free"},
            {"every": 1, "mixed": True},
            {"every": 2, "labels": "true", "wrt": "inputs"},
            *([{"every": every, "method": "double_backprop"} for every in (1, 2)] if wrap is ddp else []),
        ):
            whole, parts = network(), wrap(network())
            alone, shared = (FisherPenalty(model, ALPHA, **seeded(**options)) for model in (whole, parts))
            for weight in (0.25, 0.5, 3.0):
                alone.backward(X.double(), Y, weight=weight)
                shared.backward(X.double()[own()], Y[own()], weight=weight)
                assert error(gradients(parts), gradients(whole)) < 1e-5, (options, weight)
                torch.testing.assert_close(shared.value, alone.value, rtol=1e-5, atol=0)
    model, twice = network(), network()
    for one, weight in ((model, 1.0), (twice, 2.0)):
        local = FisherPenalty(ddp(one), ALPHA, every=1, scope="local", **seeded())
        local.backward(X.double()[own()], Y[own()], weight=weight)
    assert error(gradients(twice), 2 * gradients(model)) < 1e-5
    for every in (1, 2):
        penalty = FisherPenalty(ddp(model), ALPHA, every=every, **seeded())
        for _ in range(every):  # where R is recomputed, and where it is not
            with pytest.raises(ValueError, match=r"weight: expected the same in each process, got 1\.0, 2\.0"):
                penalty.backward(X.double()[own()], Y[own()], weight=1.0 + dist.get_rank())
            penalty.backward(X.double()[own()], Y[own()])
    for wrap in (ddp, sharded):
        with pytest.raises(ValueError, match="scaler: expected None where several processes share a batch"):
            FisherPenalty(wrap(network()), ALPHA, scaler=torch.amp.GradScaler("cpu"))


def ddp_examples() -> None:
    """The first of each process, and in one process the same ones first."""
    few = [rows_of(rank).start + i for rank in range(dist.get_world_size()) for i in range(8 // dist.get_world_size())]
    order = torch.tensor(few + [i for i in range(24) if i not in few])
    for every in (1, 10):
        compare(ddp, every=every, examples=8, order=order)
    compare(ddp, every=1, examples=8, order=order, labels="true", method="double_backprop")
    with pytest.raises(ValueError, match="examples: expected at least one for each"):
        FisherPenalty(ddp(network()), 0.1, examples=1)


def one_example_in_each_process() -> None:
    """R on that of rank 0: the other processes' are all that they have, and do not count for it."""
    x, y = X.double()[: dist.get_world_size()], Y[: dist.get_world_size()]
    mine = slice(dist.get_rank(), dist.get_rank() + 1)
    for wrap in (ddp, sharded):
        whole, parts = network(), wrap(network())
        for every in (1, 2):
            options: dict[str, Any] = {"every": every, "labels": "true", "reduction": "first"}
            FisherPenalty(whole, ALPHA, **options).backward(x, y)
            FisherPenalty(parts, ALPHA, **options).backward(x[mine], y[mine])
            assert error(gradients(parts), gradients(whole)) < 1e-5


def ddp_chosen_parameters_and_unused_ones() -> None:
    """A parameter that one process alone uses, one that none uses, and a norm of some only."""

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.extra, self.never = network(), nn.Linear(36, 10).double(), nn.Linear(2, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layers(x)
            return out + self.extra(x.flatten(1)) if float(x[0, 0, 0, 0]) == float(X[0, 0, 0, 0]) else out

    torch.manual_seed(1)
    model = Sometimes()
    shared = FisherPenalty(ddp(model), ALPHA, every=1, params=model.layers.parameters(), **seeded())
    shared.backward(X.double()[own()], Y[own()])
    assert model.never.weight.grad is None and model.extra.weight.grad is not None
    everyone = [torch.empty_like(model.extra.weight) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, model.extra.weight.grad)
    assert all(torch.equal(other, everyone[0]) for other in everyone) and float(everyone[0].norm()) > 0


def ddp_float32() -> None:
    """By double backprop to 1e-5; by finite differences the error is at most twice that of one process, plus 1e-5."""
    for options in METHODS.values():
        compare(ddp, every=1, steps=1, method="double_backprop", make=lambda: network(torch.float32), **options)
        exact_model, whole, parts = network(), network(torch.float32), ddp(network(torch.float32))
        FisherPenalty(exact_model, ALPHA, every=1, method="double_backprop", **seeded(**options)).backward(
            X.double(), Y
        )
        FisherPenalty(whole, ALPHA, every=1, **seeded(**options)).backward(X, Y)
        FisherPenalty(parts, ALPHA, every=1, **seeded(**options)).backward(X[own()], Y[own()])
        exact = gradients(exact_model)
        assert error(gradients(parts), exact) < 2 * error(gradients(whole), exact) + 1e-5


def ddp_batchnorm() -> None:
    """Each process has the statistics of its own part, as DDP has it: the penalty of the mean of those gradients."""
    torch.manual_seed(2)
    model = SmallResNet().double()
    x = torch.randn(24, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    start = {name: t.clone() for name, t in model.state_dict().items()}
    shared = FisherPenalty(ddp(model), ALPHA, every=1, labels="true", difference="central")
    shared.backward(x[own()], Y[own()])
    other = SmallResNet().double()
    other.load_state_dict(start)
    parts = [rows_of(rank) for rank in range(dist.get_world_size())]
    first = None
    losses = []
    for part in parts:
        losses.append(nn.functional.cross_entropy(other(x[part]), Y[part]))
        first = first or {name: buffer.clone() for name, buffer in other.named_buffers()}
    loss = torch.stack(losses).mean()
    grads = torch.autograd.grad(loss, list(other.parameters()), create_graph=True)
    (loss + ALPHA * torch.stack([g.square().sum() for g in grads]).sum()).backward()
    assert error(gradients(model), gradients(other)) < 1e-5
    for name, buffer in model.named_buffers():  # those of rank 0, moved once, everywhere
        torch.testing.assert_close(buffer, first[name])


def ddp_local_scope() -> None:
    """The mean over the processes of what each computes alone, and the same labels on no two of them."""
    for every in (1, 2):
        model, x = network(), X.double()
        local = FisherPenalty(ddp(model), ALPHA, every=every, scope="local", **seeded())
        local.backward(x[own()], Y[own()])
        expected = []
        for rank in range(dist.get_world_size()):
            other, rows = network(), rows_of(rank)
            alone = FisherPenalty(other, ALPHA, every=every, **seeded())
            alone.load_state_dict(
                {**alone.state_dict(), "key": local.state_dict()["key"] + torch.tensor([rank - dist.get_rank(), -1])}
            )
            alone.backward(x[rows], Y[rows])
            expected.append(gradients(other))
        assert error(gradients(model), torch.stack(expected).mean(0)) < 1e-12


def resumed() -> None:
    """From the state of rank 0, in as many processes or in one."""
    options: dict[str, Any] = {"every": 3}
    for wrap in (ddp, sharded):
        shared = compare(wrap, steps=2, **options)
        state = shared.state_dict()
        if wrap is ddp:
            states = [state]
            dist.broadcast_object_list(states, 0)
            state = states[0]
        model, again = wrap(network()), wrap(network())
        for one in (model, again):
            one.load_state_dict(
                shared.model.state_dict()
                if wrap is sharded
                else {"module." + n: t for n, t in shared.model.state_dict().items()}
            )
        other = FisherPenalty(model, ALPHA, **options)
        other.load_state_dict(state)
        for _ in range(3):
            shared.model.zero_grad()
            model.zero_grad()
            for penalty in (shared, other):
                penalty.backward(X.double()[own()], Y[own()])
            assert torch.equal(gradients(shared.model), gradients(model))
        if wrap is ddp:
            alone = FisherPenalty(network(), ALPHA, **options)
            alone.model.load_state_dict(model.module.state_dict())  # type: ignore[operator, union-attr]
            alone.load_state_dict(state)
            for _ in range(3):
                alone.model.zero_grad()
                alone.backward(X.double(), Y)
            assert error(gradients(model), gradients(alone.model)) < 1e-5


def fsdp_finite_difference() -> None:
    options_are_those_of_one_process(sharded)
    compare(sharded, every=1, equal=False)
    compare(sharded, every=10, equal=False, labels="true", wrt="inputs")


def fsdp_examples_and_a_forward_before() -> None:
    few = [rows_of(rank).start + i for rank in range(dist.get_world_size()) for i in range(8 // dist.get_world_size())]
    order = torch.tensor(few + [i for i in range(24) if i not in few])
    compare(sharded, every=1, examples=8, order=order)

    def used(model: nn.Module) -> nn.Module:
        model = sharded(model)
        with torch.no_grad():
            model(X.double()[own()])
        return model

    compare(used, every=1)


def fsdp_puts_the_parameters_back() -> None:
    """Bits of the shards and buffers after a step, and after an exception at the shifted point."""
    torch.manual_seed(2)
    inner = SmallResNet().double()
    model = sharded(inner)
    x = torch.randn(24, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))[own()]
    before = {name: p.detach().to_local().clone() for name, p in model.named_parameters()}
    penalty = FisherPenalty(model, ALPHA, every=1, **seeded())
    penalty.backward(x, Y[own()])
    assert int(inner.norm.num_batches_tracked) == 1
    buffers = {name: buffer.clone() for name, buffer in inner.named_buffers()}
    calls = []

    def hostile(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("stop")

    handle = inner.head.register_forward_pre_hook(hostile)
    with pytest.raises(RuntimeError):
        penalty.backward(x, Y[own()])
    handle.remove()
    assert penalty.steps == 1 and int(inner.norm.num_batches_tracked) == 1, "a step that fails has not been"
    for name, buffer in inner.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    for name, p in dict(model.named_parameters()).items():
        assert torch.equal(p.detach().to_local(), before[name]), name


def fsdp_says_what_it_cannot() -> None:
    model = sharded(network())
    for options, message in (
        ({"method": "double_backprop"}, "method: expected"),
        ({"scope": "local"}, "scope: expected"),
        ({"graphs": True}, "graphs: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            FisherPenalty(model, 0.1, **options)  # type: ignore[arg-type]
    low = sharded(network(torch.float32), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="step: expected a number"):
        FisherPenalty(low, 0.1)
    with pytest.raises(ValueError, match="model: expected all parameters"):
        fastfisher.trace_fisher(model, X.double())
    half = network()
    fully_shard(half[6], mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    with pytest.raises(ValueError, match="model: expected every parameter"):
        FisherPenalty(half, 0.1)
    assert isinstance(half[6], FSDPModule)


@contextmanager
def counting() -> Iterator[list[tuple[str, int]]]:
    """The collectives that the package starts, with the bytes that this process puts in."""
    sent: list[tuple[str, int]] = []
    patch = pytest.MonkeyPatch()
    for name in ("all_gather", "all_reduce", "broadcast"):
        whole = getattr(dist, name)

        def counted(*args: Any, name: str = name, whole: Any = whole, **kwargs: Any) -> Any:
            x = args[1] if name == "all_gather" else args[0]
            sent.append((name, x.numel() * x.element_size()))
            return whole(*args, **kwargs)

        patch.setattr(messages.dist, name, counted)
    gather = messages.Messages.gather

    def told(messages: Any, mine: Tensor) -> list[Tensor]:
        sent.append(("told", mine.numel() * mine.element_size()))
        return gather(messages, mine)

    patch.setattr(messages.Messages, "gather", told)
    try:
        yield sent
    finally:
        patch.undo()


def messages_and_bytes() -> None:
    """As in docs/distributed.md: told, a message of 88 bytes; then the data."""
    size = sum(p.numel() * p.element_size() for p in network().parameters())
    told = ("told", 88)

    def step(*, wrap: Any = ddp, second: bool = False, **options: Any) -> list[tuple[str, int]]:
        model = wrap(network())
        penalty = FisherPenalty(model, ALPHA, **options)
        if second:
            penalty.backward(X.double()[own()], Y[own()])
        with counting() as sent:
            penalty.backward(X.double()[own()], Y[own()])
        return sent

    def data(*factors: float) -> list[tuple[str, int]]:
        messages = [told]
        for factor in factors:
            messages += [told, ("all_reduce", int(factor * size))]
        return messages

    assert step(every=1) == data(1, 1)
    assert step(every=10) == data(1, 2)
    assert step(every=10, second=True) == data(1)
    assert step(every=1, mixed=True) == data(1, 1)
    assert step(every=1, gates="free") == data(1, 2)
    assert step(every=1, method="double_backprop") == data(1, 1)
    squares = [told, ("all_reduce", 8)]
    # Of the gradient in the inputs, and of the inputs, whose size the step has.
    assert step(every=1, labels="true", wrt="inputs") == [told, *squares, *squares, told, ("all_reduce", size)]
    for every in (1, 10):
        assert step(every=every, scope="local") == [told, ("all_reduce", size)]
    # Of the gradient, and of its change.
    assert step(every=1, wrap=sharded) == [told, told, told, *squares, *squares, told]
    with counting() as sent:
        fastfisher.trace_fisher(ddp(network()), X.double()[own()], batch_size=3, draws=2)
    batches = len(X[own()]) // 3
    names, examples = 6, len(X[own()])
    vectors = [told, ("all_gather", 16 * examples), told, ("all_gather", 8 * names)]
    assert sent == [told] + batches * [told] * 3 + [told] + vectors + [told, ("all_gather", 16)]
    with counting() as sent:
        fastfisher.trace_hessian(ddp(network()), X.double()[own()], Y[own()], method="hutchinson", probes=5)
    assert sent == [told, told, told, ("all_gather", 8 * (5 + 3))]


def traces() -> None:
    """Equal to one process whose batches are those of all, also where one process has less data."""
    model, x = network(), X.double()

    def batches(equal: bool, rank: int | None, size: int) -> list[tuple[Tensor, Tensor]]:
        """The batches of one rank, or of one process with all of them in order."""
        ranks = [rows_of(r, equal) for r in ([rank] if rank is not None else range(dist.get_world_size()))]
        found = []
        for b in range(24):
            rows = [
                i for part in ranks for i in range(part.start + b * size, min(part.stop, part.start + (b + 1) * size))
            ]
            if rows:
                found.append((x[rows], Y[rows]))
        return found

    for equal in (True, False):
        mine, whole = batches(equal, dist.get_rank(), 3), batches(equal, None, 3)
        for options in (
            {},
            {"labels": "sampled", "draws": 3},
            {"labels": "exact"},
            {"labels": "true"},
            {"tolerance": 0.1},
        ):
            found = fastfisher.trace_fisher(ddp(network()), mine, **seeded(**options))
            expected = fastfisher.trace_fisher(model, whole, **seeded(**options))
            assert (found.samples, found.draws, found.method) == (expected.samples, expected.draws, expected.method)
            for name in ("value", "standard_error"):
                assert abs(getattr(found, name) - getattr(expected, name)) <= 1e-10 * expected.value, (name, options)
            torch.testing.assert_close(found.per_parameter, expected.per_parameter, rtol=1e-10, atol=0)
        for options in ({}, {"method": "split"}, {"method": "hutchinson", "tolerance": 1.0}):
            with_probes = {"probes": 4, **options}
            found = fastfisher.trace_hessian(ddp(network()), mine, **seeded(**with_probes))
            expected = fastfisher.trace_hessian(model, whole, **seeded(**with_probes))
            assert (found.samples, found.draws, found.method) == (expected.samples, expected.draws, expected.method)
            for name in ("value", "standard_error"):
                scale = abs(expected.value) + expected.standard_error
                assert abs(getattr(found, name) - getattr(expected, name)) <= 1e-10 * scale, (name, options)
    with pytest.raises(ValueError, match="minibatch: expected False"):
        fastfisher.trace_fisher(ddp(network()), x[own()], minibatch=True)


def a_rank_that_fails() -> None:
    """All raise in the same step, wherever it fails, nothing is written, and the next step is a step."""
    for position in (1, 2):  # in the forward at θ, in the shifted one
        model = network()
        calls = [0]

        def hostile(*_: Any, calls: list[int] = calls, position: int = position) -> None:
            calls[0] += 1
            if calls[0] == position and dist.get_rank() == 1:
                raise ArithmeticError("stop")

        model.register_forward_pre_hook(hostile)
        penalty = FisherPenalty(ddp(model), ALPHA, every=1, **seeded())
        expected, message = (ArithmeticError, "stop") if dist.get_rank() == 1 else (RankFailure, "rank 1 failed")
        with pytest.raises(expected, match=message):
            penalty.backward(X.double()[own()], Y[own()])
        assert penalty.steps == 0 and all(p.grad is None for p in model.parameters())
        penalty.backward(X.double()[own()], Y[own()])
        assert penalty.steps == 1
    penalty = FisherPenalty(ddp(network()), ALPHA, **seeded())
    few = Y[own()].masked_fill(torch.tensor(dist.get_rank() == 1), -100)
    with pytest.raises(ValueError if dist.get_rank() == 1 else RankFailure, match=r"targets: expected|rank 1 failed"):
        penalty.backward(X.double()[own()], few)
    bad = X.double()[own()].clone()
    if dist.get_rank() == 1:
        bad[0] = float("nan")
    for measure in (
        lambda: fastfisher.trace_fisher(ddp(network()), bad),
        lambda: fastfisher.trace_hessian(ddp(network()), bad, Y[own()] if dist.get_rank() != 1 else None),
    ):
        with pytest.raises(ValueError if dist.get_rank() == 1 else RankFailure):
            measure()


def a_rank_that_fails_leaves_all_as_before() -> None:
    """Key, adaptive step, buffers, generators and gradients, on all, after a failure at the shifted point of one."""
    torch.manual_seed(2)
    inner, calls = SmallResNet().double(), [0]
    x = torch.randn(24, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))[own()]
    penalty = FisherPenalty(ddp(inner), ALPHA, every=1, gates="free", **seeded())
    assert penalty.generator is not None

    def state() -> list[Any]:
        kept = {n: x.clone() if isinstance(x, Tensor) else x for n, x in penalty.state_dict().items()}
        buffers = [buffer.clone() for buffer in inner.buffers()]
        return [kept, buffers, gradients(inner), torch.get_rng_state(), penalty.generator.get_state()]  # type: ignore[union-attr]

    def hostile(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == 2 and dist.get_rank() == 1:
            raise ArithmeticError("stop")

    penalty.backward(x, Y[own()])
    before = state()
    handle = inner.head.register_forward_pre_hook(hostile)
    with pytest.raises(ArithmeticError if dist.get_rank() == 1 else RankFailure):
        penalty.backward(x, Y[own()])
    handle.remove()
    torch.testing.assert_close(state(), before, rtol=0, atol=0)


class Engine(nn.Module):
    """A wrapper as training engines have it: what it does to inputs and outputs counts."""

    def __init__(self, module: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.module, self.scale, self.calls = module, scale, 0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        out: Tensor = self.module(*args, **kwargs)
        return out * self.scale


def wrappers_are_looked_through() -> None:
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


def a_module_within_ddp_is_refused() -> None:
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


def other_ways_to_share_are_refused() -> None:
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


def fsdp_reductions_of_its_own_are_refused() -> None:
    """And what they leave behind; once they are undone a step is that of one process."""
    model = sharded(network())
    penalty = FisherPenalty(model, ALPHA, every=1, **seeded())
    x, y = X.double()[own()], Y[own()]

    def hook(_: Tensor) -> None:
        pass

    settings: list[tuple[str, Callable[[], None], Callable[[], None]]] = [
        (
            r"set_requires_gradient_sync\(False\)",
            lambda: model.set_requires_gradient_sync(False),  # type: ignore[operator]
            lambda: model.set_requires_gradient_sync(True),  # type: ignore[operator]
        ),
        (
            r"set_reshard_after_backward\(False\)",
            lambda: model.set_reshard_after_backward(False),  # type: ignore[operator]
            lambda: model.set_reshard_after_backward(True),  # type: ignore[operator]
        ),
        (
            "set_gradient_divide_factor",
            lambda: model[4].set_gradient_divide_factor(1.0),  # type: ignore[operator, index]
            lambda: model[4].set_gradient_divide_factor(None),  # type: ignore[operator, index]
        ),
        (
            "set_all_reduce_hook",
            lambda: model[6].set_all_reduce_hook(hook),  # type: ignore[operator, index]
            lambda: model[6].set_all_reduce_hook(None),  # type: ignore[operator, index]
        ),
    ]
    for message, change, undo in settings:
        change()
        with pytest.raises(ValueError, match=f"a mean at each backward, got {message}"):
            penalty.backward(x, y)
        undo()
    if dist.get_rank() == 1:
        model.set_requires_gradient_sync(False)  # type: ignore[operator]
    with pytest.raises(ValueError if dist.get_rank() == 1 else RankFailure):
        penalty.backward(x, y)
    model.set_requires_gradient_sync(False)  # type: ignore[operator]
    nn.functional.cross_entropy(model(x), y).backward()
    model.set_requires_gradient_sync(True)  # type: ignore[operator]
    with pytest.raises(ValueError, match="expected every gradient reduced, got one of a backward before"):
        penalty.backward(x, y)
    nn.functional.cross_entropy(model(x), y).backward()  # reduces both
    whole = network()
    loss = nn.functional.cross_entropy(whole(X.double()), Y)
    (2 * loss).backward()
    penalty.backward(x, y)
    FisherPenalty(whole, ALPHA, every=1, **seeded()).backward(X.double(), Y)
    assert error(gradients(model), gradients(whole)) < 1e-5


def ranks_out_of_step() -> None:
    """All raise the same, say what differs, and are as before; then a step of all is a step."""
    first = dist.get_rank() == 0
    for wrap in (ddp, sharded):

        def differing(pattern: str, options: dict[str, Any], wrap: Any = wrap, **others: Any) -> None:
            model = wrap(network())
            mine = FisherPenalty(model, ALPHA, **{**others, **(options if first else {})})
            with pytest.raises(ValueError, match=pattern):
                mine.backward(X.double()[own()], Y[own()])
            assert all(p.grad is None for p in model.parameters()) and mine.steps == 0
            model = mine.model
            FisherPenalty(model if wrap is sharded else ddp(model), ALPHA).backward(X.double()[own()], Y[own()])

        differing("every: expected the same in each process, got 3, 10", {"every": 3})
        differing("start: expected", {"start": 5})
        differing("labels: expected the same in each process, got true, sampled", {"labels": "true"})
        differing("gates: expected", {"gates": "free", "step": 0.1}, step=0.1)
        differing("step: .*difference: expected", {"difference": "central", "step": 1e-3})
        differing("mixed: expected", {"mixed": True}, every=1)
        differing("loss: expected the same", {"loss": nn.functional.cross_entropy})
        model = wrap(network())
        penalty = FisherPenalty(model, ALPHA, every=3, **seeded())
        x, y = X.double()[own()], Y[own()]
        penalty.backward(x, y)
        grads = gradients(model)
        penalty.steps += first
        with pytest.raises(ValueError, match=r"^steps: expected the same in each process, got 2, 1"):
            penalty.backward(x, y)
        penalty.steps, penalty.alpha = 3, 0.1 + first  # as a schedule of each process has it, where R is due
        with pytest.raises(ValueError, match=r"^alpha: expected the same in each process, got 1\.1, 0\.1"):
            penalty.backward(x, y)
        penalty.alpha = ALPHA
        penalty.model[3].train(not first)  # type: ignore[index]
        with pytest.raises(ValueError, match=r"^training: expected the same in each process"):
            penalty.backward(x, y)
        penalty.model.train()
        frozen = penalty.model[6].bias.requires_grad_(not first)  # type: ignore[index, union-attr]
        with pytest.raises(ValueError, match="trainable parameters: expected the same"):
            penalty.backward(x, y)
        frozen.requires_grad_()
        assert torch.equal(gradients(model), grads)
        penalty.backward(x, y)
        assert penalty.steps == 4
    model = ddp(network())
    penalty = FisherPenalty(model, ALPHA, scope="local")
    with pytest.raises(ValueError, match=r"^call: expected .*got FisherPenalty.backward, trace_fisher"):
        penalty.backward(x, y) if first else fastfisher.trace_fisher(model, x)
    with pytest.raises(ValueError, match="draws: expected the same in each process, got 2, 1"):
        fastfisher.trace_fisher(model, x, draws=1 + first)
    with pytest.raises(ValueError, match="probes: expected the same in each process"):
        fastfisher.trace_hessian(model, x, y, method="hutchinson", probes=1 + first)
    penalty.alpha += first
    with pytest.raises(ValueError, match="alpha: expected the same"):
        penalty.backward(x, y)


def ranks_with_other_parameters() -> None:
    """A plain model with a group, of which each process has drawn parameters of its own."""
    model = network()
    with torch.no_grad():
        model[0].weight += dist.get_rank()  # type: ignore[index, operator]
    group = dist.group.WORLD
    penalty = FisherPenalty(model, ALPHA, process_group=group)
    with pytest.raises(ValueError, match=r"model: expected the same in each process.*parameters of its own"):
        penalty.backward(X.double()[own()], Y[own()])
    with pytest.raises(ValueError, match="model: expected the same in each process"):
        fastfisher.trace_fisher(model, X.double()[own()], process_group=group)


def a_micro_batch_before() -> None:
    """A native one, reduced or not, and one of ours; DDP's own reduction after ours."""
    x, y = X.double()[own()], Y[own()]
    for scope in ("global", "local"):
        model = ddp(network())
        penalty = FisherPenalty(model, ALPHA, scope=scope, **seeded())  # type: ignore[arg-type]
        with model.no_sync():  # type: ignore[operator]
            nn.functional.cross_entropy(model(x), y).backward()
        before = gradients(model)
        with pytest.raises(ValueError, match=r"\.grad: expected the same in each process.*no_sync"):
            penalty.backward(x, y)
        assert torch.equal(gradients(model), before) and penalty.steps == 0
    whole = network()
    for reduced_first in (True, False):
        model = ddp(network())
        penalty = FisherPenalty(model, ALPHA, **seeded())
        whole.zero_grad()
        nn.functional.cross_entropy(whole(X.double()), Y).backward()
        FisherPenalty(whole, ALPHA, **seeded()).backward(X.double(), Y)
        if not reduced_first:
            penalty.backward(x, y)
        nn.functional.cross_entropy(model(x), y).backward()
        if reduced_first:
            penalty.backward(x, y)
        assert error(gradients(model), gradients(whole)) < 1e-5


def measured_on_the_buffers_of_rank_0() -> None:
    """As a forward of DDP has them, where a training forward has moved those of each process by its part."""
    torch.manual_seed(2)
    x = torch.randn(24, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    inner = SmallResNet().double()
    model = ddp(inner)
    nn.functional.cross_entropy(model(x[own()]), Y[own()]).backward()
    buffers = [buffer.clone() for buffer in inner.buffers()]
    alone = copy.deepcopy(inner)
    for buffer in alone.buffers():
        dist.broadcast(buffer, 0)
    expected = fastfisher.trace_fisher(alone, x, **seeded()).value
    found = fastfisher.trace_fisher(model, x[own()], **seeded()).value
    assert abs(found - expected) < 1e-10 * expected
    assert all(torch.equal(a, b) for a, b in zip(inner.buffers(), buffers, strict=True)), "each has its own back"


def groups_with_members_of_others() -> None:
    """Groups that overlap, made by those who are in them alone, in another order by each, and two of the same members;
    whatever groups each process has been in before."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for _ in range(rank):
        dist.new_group([rank], use_local_synchronization=True)  # other processes know nothing of it
    groups = [dist.new_group([0, 1]), dist.new_group([0, size - 1]), dist.new_group([0, 1]), dist.group.WORLD]
    for group in groups:
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            continue
        assert group is not None
        members = dist.get_process_group_ranks(group)
        parts = [rows_of(member) for member in members]
        rows = [i for part in parts for i in range(part.start, part.stop)]
        found = fastfisher.trace_fisher(network(), X.double()[own()], process_group=group, **seeded()).value
        expected = fastfisher.trace_fisher(network(), X.double()[rows], **seeded()).value
        assert abs(found - expected) < 1e-10 * expected


def a_rank_that_hangs() -> None:
    """Before the first message and after some; the next step of the same penalty, and another penalty, then work."""
    model = network()
    whole = FisherPenalty(network(), ALPHA, every=1, **seeded())
    whole.backward(X.double(), Y)
    for steps in (0, 1):
        penalty = FisherPenalty(ddp(model), ALPHA, every=1, timeout=1.0, **seeded())
        for _ in range(steps):
            penalty.backward(X.double()[own()], Y[own()])
        before = penalty.state_dict()
        if dist.get_rank() == 1:
            time.sleep(1.5)
        start = time.monotonic()
        with pytest.raises(RankFailure, match="did not come within 1 s"):
            penalty.backward(X.double()[own()], Y[own()])
        assert time.monotonic() - start < 30.0
        torch.testing.assert_close(penalty.state_dict(), before, rtol=0, atol=0)
        dist.barrier()
        penalty.backward(X.double()[own()], Y[own()])
        model.zero_grad()
        FisherPenalty(ddp(model), ALPHA, every=1, timeout=1.0, **seeded()).backward(X.double()[own()], Y[own()])
        assert error(gradients(model), gradients(whole.model)) < 1e-5


def a_rank_that_ends() -> None:
    """The last case: nothing can be sent after it. Those who wait are told by the connections, before the timeout."""
    penalty = FisherPenalty(ddp(network()), ALPHA, every=1, timeout=60.0)
    penalty.backward(X.double()[own()], Y[own()])
    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(0)
    start = time.monotonic()
    with pytest.raises(RankFailure, match="one of them ended"):
        penalty.backward(X.double()[own()], Y[own()])
    assert time.monotonic() - start < 30.0


CASES: dict[str, Callable[[], None]] = {
    case.__name__: case
    for case in (
        a_plain_model_with_a_group, ddp_finite_difference, ddp_double_backprop, ddp_unequal_batches,
        weighted_parts_of_a_batch, ddp_examples, one_example_in_each_process,
        ddp_chosen_parameters_and_unused_ones, ddp_float32, ddp_batchnorm, ddp_local_scope, resumed,
        fsdp_finite_difference, fsdp_examples_and_a_forward_before, fsdp_puts_the_parameters_back,
        fsdp_says_what_it_cannot, messages_and_bytes, traces, a_rank_that_fails,
        a_rank_that_fails_leaves_all_as_before, wrappers_are_looked_through, a_module_within_ddp_is_refused,
        other_ways_to_share_are_refused, fsdp_reductions_of_its_own_are_refused, ranks_out_of_step,
        ranks_with_other_parameters, a_micro_batch_before, measured_on_the_buffers_of_rank_0,
        groups_with_members_of_others, a_rank_that_hangs, a_rank_that_ends,
    )
}  # fmt: skip


OF_TWO = (wrappers_are_looked_through, a_module_within_ddp_is_refused, ranks_out_of_step, a_rank_that_hangs)
"""What more than two processes would only take longer for."""


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    of_two = dist.get_world_size() == 2
    chosen = sys.argv[2:] or [name for name, case in CASES.items() if of_two or case not in OF_TWO]
    path = Path(f"{sys.argv[1]}.{dist.get_rank()}")
    results: dict[str, str] = {}
    for name in chosen:
        start = time.monotonic()
        try:
            CASES[name]()
            results[name] = "passed"
        except BaseException:
            results[name] = traceback.format_exc()
        print(f"rank {dist.get_rank()}: {name} {time.monotonic() - start:.1f} s", flush=True)
        path.write_text(json.dumps(results))
    os._exit(0)  # a process has ended in the last case: there is no group left to leave


if __name__ == "__main__":
    main()

"""A penalty on a forward of the caller's, whose own backward reduces the gradients: equal to one process's."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fastfisher import FisherPenalty, RankFailure
from tests.support.processes import in_processes
from tests.support.shared_batch import (
    ALPHA,
    IMAGES,
    METHODS,
    X,
    Y,
    ddp,
    error,
    gradients,
    network,
    own,
    rows_of,
    seeded,
    sharded,
    small_resnet,
)

Wrap = Callable[[nn.Module], nn.Module]


def summed(logits: Tensor, targets: Tensor, all_of_them: Tensor) -> Tensor:
    """A loss whose mean over the processes is the mean over the rows of all of them."""
    share = dist.get_world_size() / int((all_of_them != -100).sum())
    return share * F.cross_entropy(logits, targets, reduction="sum")


def step(penalty: FisherPenalty, model: nn.Module, x: Tensor, y: Tensor, weight: float = 1.0, of: Any = None) -> None:
    """One forward of the caller's, with the penalty as a term of its loss."""
    with penalty.watching() as forward:
        logits = model(x)
        loss = F.cross_entropy(logits, y) if of is None else summed(logits, y, of)
    (weight * (loss + penalty.term(forward, y))).backward()


def compare_terms(
    wrap: Wrap, *, equal: bool = True, steps: int = 2, targets: Tensor = Y, make: Any = network, **options: Any
) -> FisherPenalty:
    """Steps of SGD of all processes, each beside one of a single process on the whole batch: gradients and values."""
    whole, parts = make(), wrap(make())
    alone = FisherPenalty(whole, ALPHA, **seeded(**options))
    shared = FisherPenalty(parts, ALPHA, **seeded(**options))
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (whole, parts)]
    rows, x = own(equal), X.to(next(whole.parameters()).dtype)
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        step(alone, whole, x, targets)
        step(shared, parts, x[rows], targets[rows], of=targets)
        assert error(gradients(parts), gradients(whole)) < 1e-5, (options, error(gradients(parts), gradients(whole)))
        torch.testing.assert_close(shared.value, alone.value, rtol=1e-5, atol=0)
        torch.testing.assert_close(shared.trace_estimate, alone.trace_estimate, rtol=1e-5, atol=0)
        for optimizer in optimizers:
            optimizer.step()
    return shared


OPTIONS: tuple[dict[str, Any], ...] = (
    *({"every": every, **METHODS[kind]} for kind in ("fp", "gp", "rademacher") for every in (1, 2)),
    {"every": 1, "labels": "true", "difference": "central"},
    {"every": 1, "reduction": "first"},
    {"every": 1, "gates": "free"},
    {"every": 2, "gates": "free"},
)


@in_processes(2, 4)
def test_terms_of_ddp() -> None:
    for options in OPTIONS:
        compare_terms(ddp, steps=3, **options)
        compare_terms(ddp, equal=False, **options)
    for every in (1, 2):
        compare_terms(ddp, every=every, method="double_backprop", equal=False)


@in_processes(2, 4)
def test_terms_of_fully_shard() -> None:
    for options in OPTIONS:
        compare_terms(sharded, steps=3, **options)
        compare_terms(sharded, equal=False, **options)


@in_processes(2, 4)
def test_rows_that_do_not_count() -> None:
    """Some in each process, all of one process's, all of every process's."""
    some, of_one = Y.clone(), Y.clone()
    some[::3] = -100
    of_one[rows_of(1)] = -100
    for wrap in (ddp, sharded):
        for labels in ("sampled", "true"):
            for targets in (some, of_one):
                compare_terms(wrap, every=1, labels=labels, targets=targets)
        model = wrap(network())
        penalty = FisherPenalty(model, ALPHA, every=1, **seeded())
        with penalty.watching() as forward:
            logits = model(X.double()[own()])
        term = penalty.term(forward, torch.full_like(Y[own()], -100))
        assert float(term) == 0 and not term.requires_grad and penalty.value is None and penalty.steps == 1
        F.cross_entropy(logits, Y[own()]).backward()


@in_processes(2)
def test_terms_of_micro_batches_that_accumulate() -> None:
    """Under ``no_sync``, where .grad differs between the processes until the last of them."""
    x = X.double()
    for every, wrap in itertools.product((1, 2, 3), (ddp, sharded)):
        whole, parts = network(), wrap(network())
        alone, shared = (FisherPenalty(model, ALPHA, **seeded(every=every)) for model in (whole, parts))
        for number in range(3):
            of_all = torch.cat([torch.arange(24)[rows_of(rank)][4 * number : 4 * number + 4] for rank in range(2)])
            mine = of_all[4 * dist.get_rank() : 4 * dist.get_rank() + 4]
            step(alone, whole, x[of_all], Y[of_all], 1 / 3)
            if wrap is sharded:
                parts.set_requires_gradient_sync(number == 2)  # type: ignore[operator]
            with parts.no_sync() if wrap is ddp and number < 2 else nullcontext():  # type: ignore[operator]
                step(shared, parts, x[mine], Y[mine], 1 / 3)
        assert error(gradients(parts), gradients(whole)) < 1e-5


@in_processes(2)
def test_terms_of_each_process_alone() -> None:
    """scope="local": the mean of those of the parts."""
    x = X.double()
    for every in (1, 2):
        model = ddp(network())
        penalty = FisherPenalty(model, ALPHA, scope="local", labels="true", every=every)
        other = network()
        for _ in range(2):
            model.zero_grad()
            other.zero_grad()
            step(penalty, model, x[own()], Y[own()])
            if penalty.steps == 1 or every == 1:
                for rank in range(2):
                    step(FisherPenalty(other, ALPHA, labels="true"), other, x[rows_of(rank)], Y[rows_of(rank)], 0.5)
                assert error(gradients(model), gradients(other)) < 1e-5


@in_processes(2)
def test_terms_leave_the_caller_s_graph_and_hooks_alone() -> None:
    """Each of DDP's reductions is of the caller's backward: one for each bucket, with the penalty in it; batch norm's
    buffers move once."""
    model = DistributedDataParallel(small_resnet(), bucket_cap_mb=1e-4)
    reduced: list[int] = []

    def count(state: Any, bucket: Any) -> Any:
        reduced.append(bucket.index())
        return dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda f: f.value()[0])

    # DDP compares the annotations, which are strings here
    count.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}
    model.register_comm_hook(None, count)
    penalty = FisherPenalty(model, ALPHA, every=1, labels="true")
    x = IMAGES[own()]
    for _ in range(2):
        reduced.clear()
        with penalty.watching() as forward:
            loss = F.cross_entropy(model(x), Y[own()])
        term = penalty.term(forward, Y[own()])
        assert not reduced and all(p.grad is None for p in model.parameters())
        (loss + term).backward()
        assert reduced and len(set(reduced)) == len(reduced)
        model.zero_grad()
    assert int(model.module.norm.num_batches_tracked) == 2


@in_processes(2)
def test_terms_of_a_process_that_fails() -> None:
    """In its forward, or by its targets: all raise in the same step, and the next step is one of all."""
    x, y = X.double()[own()], Y[own()]
    first = dist.get_rank() == 0
    for wrap in (ddp, sharded):
        model = wrap(network())
        penalty = FisherPenalty(model, ALPHA, every=1, **seeded())
        with pytest.raises(RankFailure if first else ArithmeticError):
            with penalty.watching() as forward:
                logits = model(x)
                if not first:
                    raise ArithmeticError("stop")
            penalty.term(forward, y)
        with pytest.raises(RankFailure if first else ValueError), penalty.watching() as forward:
            logits = model(x)
            penalty.term(forward, y if first else y[:3])
        if wrap is ddp:  # a forward of a sharded model is one of all
            with pytest.raises(RankFailure if first else ValueError, match="rank 1 failed" if first else "saw 2"):
                with penalty.watching() as forward:
                    for _ in range(1 if first else 2):
                        model(x)
                penalty.term(forward, y)
        assert penalty.steps == 0
        with penalty.watching() as forward:
            logits = model(x)
        penalty.alpha = ALPHA + first
        with pytest.raises(ValueError, match="alpha: expected the same in each process"):
            penalty.term(forward, y)
        penalty.alpha = ALPHA
        term = penalty.term(forward, y)
        (F.cross_entropy(logits, y) + term).backward()
        whole = network()
        alone = FisherPenalty(whole, ALPHA, every=1, labels="true")
        step(alone, whole, X.double(), Y)
        model.zero_grad()
        step(FisherPenalty(model, ALPHA, every=1, labels="true"), model, x, y)
        assert error(gradients(model), gradients(whole)) < 1e-5


@in_processes(2)
def test_terms_of_a_module_within_ddp_are_refused() -> None:
    inner = network()
    penalty = FisherPenalty(inner, ALPHA)
    model = ddp(inner)
    with pytest.raises(ValueError, match="model: expected the DistributedDataParallel itself"):
        step(penalty, model, X.double()[own()], Y[own()])


@in_processes(2)
def test_terms_of_a_wrapper_around_ddp_are_refused() -> None:
    """The penalty looks through it, so that the calls of the loop are not those that it could share."""
    model = nn.Sequential(ddp(network()))
    with pytest.raises(ValueError, match="saw 0; make FisherPenalty of the module that the loop calls"):
        step(FisherPenalty(model, ALPHA), model, X.double()[own()], Y[own()])

"""A process that fails, hangs, ends or does something else: all of them say so, and are as before."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastfisher
from fastfisher import FisherPenalty, RankFailure
from tests.support.processes import in_processes
from tests.support.shared_batch import (
    ALPHA,
    IMAGES,
    X,
    Y,
    ddp,
    error,
    gradients,
    network,
    own,
    seeded,
    sharded,
    small_resnet,
)


@in_processes(2, 4)
def test_a_rank_that_fails() -> None:
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


@in_processes(2, 4)
def test_a_rank_that_fails_leaves_all_as_before() -> None:
    """Key, adaptive step, buffers, generators and gradients, on all, after a failure at the shifted point of one."""
    inner, calls = small_resnet(), [0]
    x = IMAGES[own()]
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


@in_processes(2)
def test_a_rank_that_hangs() -> None:
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


@in_processes(2, 4, last_rank_ends=True)
def test_a_rank_that_ends() -> None:
    """The last case: nothing can be sent after it. Those who wait are told by the connections, before the timeout."""
    penalty = FisherPenalty(ddp(network()), ALPHA, every=1, timeout=60.0)
    penalty.backward(X.double()[own()], Y[own()])
    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(0)
    start = time.monotonic()
    with pytest.raises(RankFailure, match="one of them ended"):
        penalty.backward(X.double()[own()], Y[own()])
    assert time.monotonic() - start < 30.0


@in_processes(2)
def test_ranks_out_of_step() -> None:
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


@in_processes(2, 4)
def test_ranks_with_other_parameters() -> None:
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

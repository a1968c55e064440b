"""Steps of several processes beside one process on the whole batch: gradients and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastfisher import FisherPenalty, GradientPenalty
from tests.support.processes import in_processes
from tests.support.shared_batch import (
    ALPHA,
    IMAGES,
    METHODS,
    X,
    Y,
    compare,
    ddp,
    error,
    gradients,
    network,
    options_are_those_of_one_process,
    own,
    rows_of,
    seeded,
    sharded,
    small_resnet,
)


@in_processes(2, 4)
def test_ddp_finite_difference() -> None:
    options_are_those_of_one_process(ddp)


@in_processes(2, 4)
def test_ddp_double_backprop() -> None:
    for options in (*METHODS.values(), {"reduction": "first"}):
        for every in (1, 10):
            compare(ddp, every=every, steps=every // 10 + 1, method="double_backprop", **options)


@in_processes(2, 4)
def test_a_gradient_penalty() -> None:
    """Of a loss for each example, and of a scalar that stands for as many examples as a process has."""
    x = X.double()
    one_by_one = lambda z, y: (z - y[:, None] / 2).abs().sum(1)  # noqa: E731
    together = lambda z, y: (z - y[:, None] / 2).square().mean()  # noqa: E731
    inputs = {"wrt": "inputs", "of": lambda n: (n - 1).square()}
    for wrap in (ddp, sharded):
        for loss, options in (
            (one_by_one, {}),
            (together, {"of": "norm", "every": 2}),
            (one_by_one, inputs),
            (one_by_one, {"mixed": True}),
            *([(one_by_one, {**inputs, "method": "double_backprop"})] if wrap is ddp else []),
            *([(together, {"of": torch.log1p, "method": "double_backprop"})] if wrap is ddp else []),
        ):
            whole, parts = network(), wrap(network())
            rows = own(equal=False)
            alone, shared = (GradientPenalty(m, loss, ALPHA, **options) for m in (whole, parts))
            first, second = alone.backward(x, Y), shared.backward(x[rows], Y[rows])
            assert error(gradients(parts), gradients(whole)) < 1e-5
            torch.testing.assert_close(shared.value, alone.value, rtol=1e-6, atol=0)
            assert first.shape == second.shape == ()
        for options in ({}, inputs, {"every": 2}):
            whole, parts = network(), wrap(network())
            alone, shared = (GradientPenalty(m, one_by_one, ALPHA, **options) for m in (whole, parts))
            for _ in range(2):  # of a loss of the loop's, which the loop's own backward averages
                whole.zero_grad()
                parts.zero_grad()
                (whole(x).square().mean() + alone.term(x, Y)).backward()
                (parts(x[own()]).square().mean() + shared.term(x[own()], Y[own()])).backward()
                assert error(gradients(parts), gradients(whole)) < 1e-5
        for options in ({}, {"of": "norm", "every": 2}):
            whole, parts = network(), wrap(network())
            alone, shared = (GradientPenalty(m, None, ALPHA, **options) for m in (whole, parts))
            alone.step(lambda model=whole: one_by_one(model(x), Y).mean())
            shared.step(lambda model=shared.model: one_by_one(model(x[own()]), Y[own()]).mean())
            assert error(gradients(parts), gradients(whole)) < 1e-5
            torch.testing.assert_close(shared.value, alone.value, rtol=1e-6, atol=0)


@in_processes(2, 4)
def test_ddp_float32() -> None:
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


@in_processes(2, 4)
def test_ddp_unequal_batches() -> None:
    for options in METHODS.values():
        compare(ddp, every=1, steps=1, equal=False, **options)
        compare(ddp, every=10, equal=False, method="double_backprop", **options)


@in_processes(2, 4)
def test_weighted_parts_of_a_batch() -> None:
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


@in_processes(2, 4)
def test_weights_that_differ_and_scalers_are_refused() -> None:
    for every in (1, 2):
        penalty = FisherPenalty(ddp(network()), ALPHA, every=every, **seeded())
        for _ in range(every):  # where R is recomputed, and where it is not
            with pytest.raises(ValueError, match=r"weight: expected the same in each process, got 1\.0, 2\.0"):
                penalty.backward(X.double()[own()], Y[own()], weight=1.0 + dist.get_rank())
            penalty.backward(X.double()[own()], Y[own()])
    for wrap in (ddp, sharded):
        with pytest.raises(ValueError, match="scaler: expected None where several processes share a batch"):
            FisherPenalty(wrap(network()), ALPHA, scaler=torch.amp.GradScaler("cpu"))


@in_processes(2, 4)
def test_ddp_examples() -> None:
    """The first of each process, and in one process the same ones first."""
    few = [rows_of(rank).start + i for rank in range(dist.get_world_size()) for i in range(8 // dist.get_world_size())]
    order = torch.tensor(few + [i for i in range(24) if i not in few])
    for every in (1, 10):
        compare(ddp, every=every, examples=8, order=order)
    compare(ddp, every=1, examples=8, order=order, labels="true", method="double_backprop")
    with pytest.raises(ValueError, match="examples: expected at least one for each"):
        FisherPenalty(ddp(network()), 0.1, examples=1)


@in_processes(2, 4)
def test_one_example_in_each_process() -> None:
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


@in_processes(2, 4)
def test_ddp_chosen_parameters_and_unused_ones() -> None:
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


@in_processes(2, 4)
def test_ddp_batchnorm() -> None:
    """Each process has the statistics of its own part, as DDP has it: the penalty of the mean of those gradients."""
    model = small_resnet()
    x = IMAGES
    start = {name: t.clone() for name, t in model.state_dict().items()}
    shared = FisherPenalty(ddp(model), ALPHA, every=1, labels="true", difference="central")
    shared.backward(x[own()], Y[own()])
    other = small_resnet()
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


@in_processes(2, 4)
def test_a_micro_batch_before() -> None:
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


@in_processes(2, 4)
def test_a_plain_model_with_a_group() -> None:
    compare(lambda model: model, group=dist.group.WORLD, every=1)
    one = FisherPenalty(network(), ALPHA, every=1, **seeded())
    assert one._world.alone, "a plain model alone stays alone"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"scope": "all"}, "scope: expected"), ({"timeout": 0.0}, "timeout: expected a number of seconds > 0")],
)
def test_bad_arguments_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FisherPenalty(nn.Linear(3, 3), 0.1, **options)  # type: ignore[arg-type]

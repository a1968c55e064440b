"""Steps of a model that ``fully_shard`` has cut, beside one process with all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

import fastfisher
from fastfisher import FisherPenalty, RankFailure
from tests.support.processes import in_processes
from tests.support.shared_batch import (
    ALPHA,
    IMAGES,
    X,
    Y,
    compare,
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
def test_fsdp_finite_difference() -> None:
    options_are_those_of_one_process(sharded)
    compare(sharded, every=1, equal=False)
    compare(sharded, every=10, equal=False, labels="true", wrt="inputs")


@in_processes(2, 4)
def test_fsdp_examples_and_a_forward_before() -> None:
    few = [rows_of(rank).start + i for rank in range(dist.get_world_size()) for i in range(8 // dist.get_world_size())]
    order = torch.tensor(few + [i for i in range(24) if i not in few])
    compare(sharded, every=1, examples=8, order=order)

    def used(model: nn.Module) -> nn.Module:
        model = sharded(model)
        with torch.no_grad():
            model(X.double()[own()])
        return model

    compare(used, every=1)


@in_processes(2, 4)
def test_fsdp_puts_the_parameters_back() -> None:
    """Bits of the shards and buffers after a step, and after an exception at the shifted point."""
    inner = small_resnet()
    model = sharded(inner)
    x = IMAGES[own()]
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


@in_processes(2, 4)
def test_fsdp_says_what_it_cannot() -> None:
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


@in_processes(2, 4)
def test_fsdp_reductions_of_its_own_are_refused() -> None:
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

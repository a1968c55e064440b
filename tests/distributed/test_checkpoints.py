"""Penalties that go on from a state, in the same processes and in new ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from fastfisher import FisherPenalty
from tests.support.processes import in_processes, launch
from tests.support.shared_batch import ALPHA, X, Y, compare, ddp, error, gradients, network, own, sharded

if TYPE_CHECKING:  # the processes do without what pytest needs
    from tests.conftest import Once


@in_processes(2, 4)
def test_resumed() -> None:
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


@pytest.fixture(scope="module")
def saved(once: Once) -> Path:
    """Checkpoints of two processes."""

    def make(folder: Path) -> None:
        ran = launch(2, "tests.support.checkpoint_worker", "save", folder)
        assert ran.returncode == 0, ran.stderr

    return once("checkpoint", make)


@pytest.mark.parametrize("processes", [1, 3])
def test_a_checkpoint_is_resumed_by_new_processes(saved: Path, processes: int) -> None:
    ran = launch(processes, "tests.support.checkpoint_worker", "load", saved)
    assert ran.returncode == 0, ran.stderr


def test_process_groups_that_end(tmp_path: Path) -> None:
    ran = launch(2, "tests.support.checkpoint_worker", "regroup", tmp_path)
    assert ran.returncode == 0, ran.stderr

"""What tests/distributed/test_checkpoints.py runs in processes of its own, which find nothing but a folder.

torchrun --nproc-per-node N -m tests.support.checkpoint_worker save|load|regroup folder
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from fastfisher import FisherPenalty
from fastfisher.distributed.sharded import placed_like
from tests.support.shared_batch import X, Y, ddp, error, gradients, network, sharded

OPTIONS: dict[str, Any] = {"every": 3, "gates": "free"}  # with a gradient that is reused, a key and an adaptive step
WRAPS = {"sharded": sharded, "ddp": ddp}


def part() -> slice:
    """Rows of 24 for each of 1, 2, 3 or 4 processes."""
    each = len(X) // dist.get_world_size()
    return slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)


def steps(penalty: FisherPenalty, model: nn.Module, count: int) -> list[Tensor]:
    found = []
    for _ in range(count):
        model.zero_grad()
        penalty.backward(X.double()[part()], Y[part()])
        found.append(gradients(model))
        with torch.no_grad():
            for p in model.parameters():
                assert p.grad is not None
                p -= 0.1 * p.grad
    return found


def save(folder: Path, kind: str) -> None:
    """Two steps, a checkpoint of both ways to write one, and the gradients of three more."""
    model = WRAPS[kind](network())
    penalty = FisherPenalty(model, 0.3, generator=torch.Generator().manual_seed(9), **OPTIONS)
    steps(penalty, model, 2)
    dcp.save({"model": get_model_state_dict(model), "penalty": penalty}, checkpoint_id=folder / "checkpoint")
    state = penalty.state_dict()
    whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in state["reused"].items()}
    weights = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in get_model_state_dict(model).items()}
    if dist.get_rank() == 0:
        torch.save({"penalty": {**state, "reused": whole}, "model": weights}, folder / "whole.pt")
    found = steps(penalty, model, 3)
    if dist.get_rank() == 0:
        torch.save(found, folder / "expected.pt")


def load(folder: Path, kind: str) -> None:
    """A penalty that has not taken a step goes on as the one that was saved, from either file, whole or in shards."""
    expected = torch.load(folder / "expected.pt")
    wholes: dict[str, Any] = torch.load(folder / "whole.pt", weights_only=True)
    alone = dist.get_world_size() == 1
    for form in ("checkpoint", "whole"):
        model = network() if alone and kind == "ddp" else WRAPS[kind](network())
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        penalty = FisherPenalty(model, 0.3, **OPTIONS)
        if form == "checkpoint":
            weights = get_model_state_dict(model)
            dcp.load({"model": weights, "penalty": penalty}, checkpoint_id=folder / "checkpoint")
            set_model_state_dict(model, weights)
        else:
            penalty.load_state_dict(wholes["penalty"])
            weights = get_model_state_dict(model)
            for name, p in weights.items():
                p.copy_(placed_like(wholes["model"][name], p))
        assert penalty.steps == 2
        for found, right in zip(steps(penalty, model, 3), expected, strict=True):
            assert error(found, right) < 1e-6, (form, error(found, right))


def regroup(folder: Path, kind: str) -> None:
    """Process groups that end: what was made for them says so, and what is made for new ones works."""
    model = WRAPS[kind](network())
    penalty = FisherPenalty(model, 0.3, generator=torch.Generator().manual_seed(9), **OPTIONS)
    expected = steps(penalty, model, 1)[0]
    dist.destroy_process_group()
    before = gradients_of_this_process(model)
    with pytest.raises(ValueError, match="expected a live group, got one that destroy_process_group has ended"):
        penalty.backward(X.double()[:12], Y[:12])
    assert torch.equal(gradients_of_this_process(model), before) and penalty.steps == 1
    inner = network()
    FisherPenalty(inner, 0.3, **OPTIONS).backward(X.double(), Y)  # one process
    again = f"file://{folder}/again"  # in torchrun's store lie the addresses of the groups that have ended
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=again, rank=rank, world_size=size)
    with pytest.raises(ValueError, match="expected a live group"):
        penalty.backward(X.double()[:12], Y[:12])
    model = WRAPS[kind](network())
    penalty = FisherPenalty(model, 0.3, generator=torch.Generator().manual_seed(9), **OPTIONS)
    assert torch.equal(steps(penalty, model, 1)[0], expected)


def gradients_of_this_process(model: nn.Module) -> Tensor:
    grads = [p.grad for p in model.parameters()]
    return torch.cat([(g.to_local() if hasattr(g, "to_local") else g).flatten() for g in grads if g is not None])


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    verb, folder = sys.argv[1:]
    for kind in WRAPS:
        inner = Path(folder, kind)
        inner.mkdir(exist_ok=True)
        {"save": save, "load": load, "regroup": regroup}[verb](inner, kind)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

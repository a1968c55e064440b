"""Trainers of frameworks in two processes beside one process by hand, on the batches of both."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.networks import flat, relative_error
from tests.support.processes import in_processes
from tests.support.transformer_models import data_of, model_of, penalised

ALPHA = 0.5


@contextmanager
def frameworks(*names: str) -> Iterator[Path]:
    """With the packages imported beside a CPU build of torch, a folder that the processes share."""
    from bench.problems import torchvision_operators

    with torchvision_operators(), tempfile.TemporaryDirectory() as folder:
        for name in names:
            pytest.importorskip(name)
        shared = [folder]
        dist.broadcast_object_list(shared)
        yield Path(shared[0])
        dist.barrier()


def key() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def following(labels: Tensor) -> Tensor:
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def of_all(noted: list[Any]) -> list[Any]:
    """What each process noted of its micro-batches, one after the other by rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, noted)
    return [
        {name: torch.cat([part[name] for part in parts]) for name in parts[0]} for parts in zip(*everyone, strict=True)
    ]


def trainer_of(
    model: Any, folder: Path, kind: Any = None, data: Any = None, options: Any = None, **arguments: Any
) -> Any:
    from transformers import TrainingArguments

    from fastfisher.integrations.transformers import FisherPenaltyTrainer

    settings = {
        "per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 0.3, "lr_scheduler_type": "constant",
        "optim": "sgd", "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
        "max_grad_norm": 0.2, "logging_steps": 1, "ddp_backend": "gloo",
    }  # fmt: skip
    given = {name: arguments.pop(name) for name in ("model_init", "compute_loss_func") if name in arguments}
    return noting(kind or FisherPenaltyTrainer)(
        model=model, args=TrainingArguments(str(folder), **{**settings, **arguments}),
        train_dataset=data or data_of("gpt2", 16), alpha=ALPHA,
        penalty_options={"every": 1, "generator": key(), **(options or {})}, **given,
    )  # fmt: skip


def noting(mixin_trainer: Any) -> Any:
    class Noting(mixin_trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.noted.append({name: x.clone() for name, x in inputs.items()})
            return super().compute_loss(model, inputs, *args, **kwargs)

    Noting.noted = []
    return Noting


def by_hand(
    trainer: Any, model: Any, accumulate: int = 1, every: int = 1, context: Callable[[], Any] = nullcontext
) -> None:
    """SGD of one process with clipping on the mean loss over the tokens of all + α·R, by double backprop."""
    from fastfisher.ops.sampled import new_key

    optimizer, drawn = torch.optim.SGD(model.parameters(), lr=0.3), new_key(key(), torch.device("cpu"))
    noted, step, reused = of_all(trainer.noted), 0, None
    for start in range(0, len(noted), accumulate):
        optimizer.zero_grad()
        group = noted[start : start + accumulate]
        items = sum(int((following(batch["labels"]) != -100).sum()) for batch in group)
        for batch in group:
            targets = following(batch["labels"])
            with context():
                logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / items
            loss.backward(retain_graph=True)
            if step % every == 0:
                nothing = 0 * loss
                total, _ = penalised(nothing, logits, targets, model, ALPHA, drawn)
                reused = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
                drawn[1] += 1
            for p, g in zip(model.parameters(), reused or (), strict=True):
                if g is not None:
                    p.grad += g / accumulate
            step += 1
        nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimizer.step()


def moved_alike(found: Any, expected: Any, start: Any, tolerance: float) -> None:
    def whole(model: Any) -> Tensor:
        return flat([p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()])

    error = relative_error(whole(found) - whole(start), whole(expected) - whole(start))
    assert error < tolerance, error


@in_processes(2)
def test_the_trainer_with_ddp() -> None:
    with frameworks("transformers") as folder:
        for accumulate, every in ((1, 1), (2, 1), (2, 3)):
            for options in ({"method": "double_backprop"}, {"difference": "central", "step": 1e-5}):
                model, expected = model_of("gpt2"), model_of("gpt2")
                trainer = trainer_of(
                    model, folder, options={**options, "every": every}, gradient_accumulation_steps=accumulate
                )
                trainer.train()
                assert trainer.args.world_size == 2 and trainer.penalty.steps == 2 * accumulate
                assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
                by_hand(trainer, expected, accumulate, every)
                moved_alike(model, expected, model_of("gpt2"), 1e-5)

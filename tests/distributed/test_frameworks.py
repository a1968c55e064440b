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
        expected = model_of("gpt2")
        trainer = trainer_of(None, folder, model_init=lambda: model_of("gpt2"), options={"method": "double_backprop"})
        trainer.train()
        by_hand(trainer, expected)
        moved_alike(trainer.model, expected, model_of("gpt2"), 1e-5)


# ---- Lightning -------------------------------------------------------------------------------------------------------

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(24) % 3


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()


def lightning_module(model: nn.Module, configure: Callable[[Any], None] = lambda module: None) -> Any:
    import pytorch_lightning

    class Module(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def configure_model(self) -> None:
            configure(self)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.3)

    return Module()


def fit(module: Any, callbacks: list[Any], folder: Path, strategy: Any = "ddp", **options: Any) -> None:
    import pytorch_lightning

    settings = {
        "logger": False, "max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "devices": 2,
        "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": folder,
        "use_distributed_sampler": False,
    }  # fmt: skip
    trainer = pytorch_lightning.Trainer(callbacks=callbacks, strategy=strategy, **{**settings, **options})
    mine = torch.arange(24).view(6, 2, 2)[:, dist.get_rank()].flatten()  # of each four examples, two
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X[mine], Y[mine]), batch_size=2)
    trainer.fit(module, batches)


def lightning_by_hand(model: nn.Module, accumulate: int, clip: float = 0.2, **options: Any) -> None:
    from fastfisher import FisherPenalty

    penalty = FisherPenalty(model, ALPHA, generator=key(), **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for number, (x, y) in enumerate(zip(X.split(4), Y.split(4), strict=True)):
        penalty.backward(x, y, weight=1 / accumulate)
        if (number + 1) % accumulate == 0:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


@in_processes(2)
def test_lightning_with_ddp() -> None:
    with frameworks("pytorch_lightning") as folder:
        from fastfisher.integrations.lightning import FisherPenaltyCallback, FisherTraceMonitor

        for strategy in ("ddp", "ddp_find_unused_parameters_true"):
            for accumulate, every in ((1, 1), (2, 3)):
                model, expected = network(), network()
                callback = FisherPenaltyCallback(ALPHA, network="model", every=every, generator=key())
                monitor = FisherTraceMonitor(2, network="model")
                fit(
                    lightning_module(model), [callback, monitor], folder, strategy, accumulate_grad_batches=accumulate,
                    gradient_clip_val=0.2,
                )  # fmt: skip
                assert callback.penalty is not None and callback.penalty.steps == 6
                lightning_by_hand(expected, accumulate, every=every)
                moved_alike(model, expected, network(), 1e-6)
        with pytest.raises(ValueError, match="model: expected DistributedDataParallel without static_graph"):
            from pytorch_lightning.strategies import DDPStrategy

            callback = FisherPenaltyCallback(ALPHA, network="model")
            fit(lightning_module(network()), [callback], folder, DDPStrategy(static_graph=True))


@in_processes(2)
def test_lightning_with_fully_shard() -> None:
    with frameworks("pytorch_lightning") as folder:
        from pytorch_lightning.strategies import ModelParallelStrategy

        from fastfisher.integrations.lightning import FisherPenaltyCallback
        from tests.support.shared_batch import sharded

        def configure(module: Any) -> None:
            sharded(module.model)

        for accumulate, every in ((1, 1), (2, 3)):
            expected = network()
            callback = FisherPenaltyCallback(ALPHA, network="model", every=every, generator=key())
            module = lightning_module(network(), configure)
            fit(module, [callback], folder, ModelParallelStrategy(), accumulate_grad_batches=accumulate)
            assert callback.penalty is not None and callback.penalty._world.sharded
            lightning_by_hand(expected, accumulate, 1e9, every=every)
            moved_alike(module.model, expected, network(), 1e-6)


# ---- Trainers of Transformers once more ------------------------------------------------------------------------------


@in_processes(2)
def test_the_trainer_with_fully_shard() -> None:
    """Of a model in shards from the beginning, or as the training starts: on a CPU, Accelerate shards none itself."""
    with frameworks("transformers") as folder:
        from fastfisher.integrations.transformers import FisherPenaltyTrainer
        from tests.support.shared_batch import sharded

        class Around(nn.Module):
            """What keeps Accelerate from wrapping the model itself."""

            def __init__(self, model: Any) -> None:
                super().__init__()
                self.inner = model

            def forward(self, **inputs: Any) -> Any:
                return self.inner(**inputs)

        class Sharding(FisherPenaltyTrainer):
            def _wrap_model(self, model: Any, *args: Any, **kwargs: Any) -> Any:
                if isinstance(model, Around):
                    return model
                if not hasattr(model, "set_requires_gradient_sync"):  # when the training starts, as Accelerate does
                    sharded(model)
                    self.optimizer = None
                    self.create_optimizer()
                return Around(model)

        for accumulate, every in ((1, 1), (2, 3)):
            model, expected = model_of("gpt2"), model_of("gpt2")
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
            expected.lm_head.weight = nn.Parameter(expected.lm_head.weight.detach().clone())
            start = [p.detach().clone() for p in expected.parameters()]
            if every == 1:
                sharded(model)
            trainer = trainer_of(
                model, folder, Sharding, options={"every": every, "difference": "central", "step": 1e-5},
                gradient_accumulation_steps=accumulate,
            )  # fmt: skip
            trainer.train()
            assert trainer.penalty._world.sharded
            by_hand(trainer, expected, accumulate, every)
            found = flat([p.full_tensor() for p in model.parameters()]) - flat(start)
            assert relative_error(found, flat(list(expected.parameters())) - flat(start)) < 1e-5
            state = trainer.penalty.state_dict(whole=True)
            assert not any(hasattr(g, "full_tensor") for g in (state["reused"] or {}).values())
            trainer.penalty.load_state_dict(state)


@in_processes(2)
def test_the_trainer_with_ddp_in_bfloat16() -> None:
    with frameworks("transformers") as folder:
        model, expected = model_of("gpt2").float(), model_of("gpt2").float()
        trainer = trainer_of(model, folder, bf16=True)
        trainer.train()
        by_hand(trainer, expected, context=lambda: torch.autocast("cpu", torch.bfloat16))
        moved_alike(model, expected, model_of("gpt2").float(), 0.05)


@in_processes(2)
def test_the_trainer_with_ddp_resumes() -> None:
    with frameworks("transformers") as folder:
        saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        for scope, files in (
            ("global", ["fisher_penalty.pt"]),
            ("local", ["fisher_penalty_0.pt", "fisher_penalty_1.pt"]),
        ):
            whole, second = model_of("gpt2"), model_of("gpt2")
            options = {"every": 3, "scope": scope}
            trainer_of(whole, folder / scope, options=options, **saving).train()
            dist.barrier()
            checkpoint = folder / scope / "checkpoint-2"
            assert sorted(file.name for file in checkpoint.glob("fisher_penalty*")) == files
            resumed = trainer_of(second, folder / scope, options=options, **saving)
            resumed.train(resume_from_checkpoint=str(checkpoint))
            assert resumed.penalty.steps == 4
            assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


@in_processes(2)
def test_a_trainer_of_which_one_process_fails() -> None:
    """In its loss: the other raises, too, and does not wait for it."""
    from fastfisher import RankFailure

    with frameworks("transformers") as folder:
        from fastfisher.integrations.transformers import FisherPenaltyTrainer

        class Failing(FisherPenaltyTrainer):
            def penalty_targets(self, inputs: Any) -> Any:
                if dist.get_rank() == 1:
                    raise ArithmeticError("stop")

        with pytest.raises(ArithmeticError if dist.get_rank() == 1 else RankFailure):
            trainer_of(model_of("gpt2"), folder, Failing).train()

"""The callbacks and trainers: the parameters are those of FisherPenalty in a loop by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfisher import FisherPenalty, trace_fisher
from tests.test_package import python

pytestmark = [
    pytest.mark.usefixtures("torchvision", "one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(24) % 3


def key(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()


def by_hand(model: nn.Module, batches: list[Any], accumulate: int, clip: float, **options: Any) -> None:
    """SGD with accumulation and clipping on loss + α·R, each a mean over the micro-batches."""
    penalty = FisherPenalty(model, 0.5, generator=key(), **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for start in range(0, len(batches), accumulate):
        optimizer.zero_grad()
        for x, y in batches[start : start + accumulate]:
            penalty.backward(x, y)
        for p in model.parameters():
            p.grad /= accumulate
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


# ---- Lightning -------------------------------------------------------------------------------------------------------


def lightning_module(model: nn.Module, calls: str = "model") -> Any:
    import pytorch_lightning

    class Module(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if calls == "twice":
                self.model(batch[0])
            loss = F.cross_entropy(self.model(batch[0]), batch[1])
            self.log("train_loss", loss)
            return {"loss": loss} if calls == "dict" else loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.3)

    return Module()


def fit(module: Any, callbacks: list[Any], tmp_path: Path, checkpoint: Any = None, **options: Any) -> Any:
    import pytorch_lightning

    settings = {
        "logger": False, "max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": tmp_path,
    }  # fmt: skip
    trainer = pytorch_lightning.Trainer(callbacks=callbacks, **{**settings, **options})
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=4)
    trainer.fit(module, batches, ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize(("accumulate", "every"), [(1, 1), (2, 3)])
@pytest.mark.parametrize("calls", ["model", "dict"])
def test_lightning_trains_as_by_hand(calls: str, accumulate: int, every: int, tmp_path: Path) -> None:
    from fastfisher.integrations.lightning import FisherPenaltyCallback

    model, expected = network(), network()
    callback = FisherPenaltyCallback(0.5, network="model", every=every, generator=key())
    module = lightning_module(model, calls)
    trainer = fit(module, [callback], tmp_path, accumulate_grad_batches=accumulate, gradient_clip_val=0.2)
    batches = list(zip(X.split(4), Y.split(4), strict=True))
    by_hand(expected, batches, accumulate, 0.2, every=every)
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)
    assert "training_step" not in vars(module) and callback.penalty is not None and callback.penalty.steps == 6
    assert trainer.callback_metrics["train_loss"] < 2


def test_lightning_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    from fastfisher.integrations.lightning import FisherPenaltyCallback

    def callback() -> Any:
        return FisherPenaltyCallback(0.5, network="model", every=4, generator=key())

    whole, first, second = network(), network(), network()
    fit(lightning_module(whole), [callback()], tmp_path, max_epochs=2)
    trainer = fit(lightning_module(first), [callback()], tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed = callback()
    fit(lightning_module(second), [resumed], tmp_path, tmp_path / "one.ckpt", max_epochs=2)
    assert resumed.penalty is not None and resumed.penalty.steps == 12
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_the_monitor_logs_to_every_logger(tmp_path: Path) -> None:
    from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger

    from fastfisher.integrations.lightning import FisherTraceMonitor

    class Stub(Logger):
        """A remote logger, as that of Weights & Biases is."""

        name, version = "stub", 0

        def __init__(self) -> None:
            super().__init__()
            self.metrics: list[tuple[int, dict[str, float]]] = []

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.metrics.append((step or 0, dict(metrics)))

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            pass

    stub, csv = Stub(), CSVLogger(tmp_path)
    loggers = [stub, csv, TensorBoardLogger(tmp_path)]
    model = network()
    monitor = FisherTraceMonitor(2, (X, Y), network="model", draws=2)
    torch.manual_seed(4)
    fit(lightning_module(model), [monitor], tmp_path, logger=loggers, accumulate_grad_batches=2)
    with_monitor = torch.get_rng_state()
    without = lightning_module(network())
    torch.manual_seed(4)
    fit(without, [], tmp_path, logger=CSVLogger(tmp_path), accumulate_grad_batches=2)
    assert torch.equal(torch.get_rng_state(), with_monitor)
    traces = [(step, metrics["fisher_trace"]) for step, metrics in stub.metrics if "fisher_trace" in metrics]
    assert [step for step, _ in traces] == [2]
    assert "fisher_trace" in (Path(csv.log_dir) / "metrics.csv").read_text()
    assert list(tmp_path.rglob("events.out.tfevents*"))
    assert traces[0][1] > 0


@pytest.mark.parametrize(
    ("options", "calls", "named"),
    [
        ({"network": "body"}, "model", "network: .*'body'"),
        ({}, "model", "network: .*0 times"),
        ({"network": "model"}, "twice", "network: .*2 times"),
        ({"network": "model", "examples": 2}, "model", "examples"),
    ],
)
def test_lightning_errors_name_the_argument(options: Any, calls: str, named: str, tmp_path: Path) -> None:
    from fastfisher.integrations.lightning import FisherPenaltyCallback, FisherTraceMonitor

    module = lightning_module(network(), calls)
    with pytest.raises(ValueError, match=named):
        fit(module, [FisherPenaltyCallback(0.5, **options)], tmp_path)
    assert "training_step" not in vars(module)
    with pytest.raises(ValueError, match="every_n_steps: expected an integer >= 1, got 0"):
        FisherTraceMonitor(0)


# ---- Transformers ----------------------------------------------------------------------------------------------------

TOKENS = torch.randint(11, (12, 6), generator=torch.Generator().manual_seed(2))
LABELS = TOKENS.clone()
LABELS[1, 3:], LABELS[6, 2:] = -100, -100


def gpt2() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=6, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).double()
    model.loss_type = "ForCausalLM"  # without it the Trainer divides by the number of labels before the shift
    return model


def trainer_of(
    model: Any, tmp_path: Path, alpha: float = 0.5, every: int = 1, callbacks: Any = None, **args: Any
) -> Any:
    from transformers import TrainingArguments

    from fastfisher.integrations.transformers import FisherPenaltyTrainer

    settings = {
        "per_device_train_batch_size": 3, "max_steps": 2, "learning_rate": 0.3, "lr_scheduler_type": "constant",
        "optim": "sgd", "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
        "max_grad_norm": 0.2, "logging_steps": 1,
    }  # fmt: skip
    data = [{"input_ids": t, "labels": y} for t, y in zip(TOKENS, LABELS, strict=True)]
    return FisherPenaltyTrainer(
        model=model, args=TrainingArguments(str(tmp_path), **{**settings, **args}), train_dataset=data, alpha=alpha,
        penalty_options={"every": every, "generator": key()}, callbacks=callbacks,
    )  # fmt: skip


@pytest.mark.parametrize(("accumulate", "every", "smoothing"), [(1, 1, 0.0), (2, 1, 0.0), (2, 3, 0.0), (2, 1, 0.1)])
def test_transformers_trains_as_by_hand(accumulate: int, every: int, smoothing: float, tmp_path: Path) -> None:
    model, expected = gpt2(), gpt2()
    order: list[Tensor] = []
    trainer = trainer_of(
        model, tmp_path, every=every, gradient_accumulation_steps=accumulate, label_smoothing_factor=smoothing
    )
    inner = trainer.penalty.term

    def noting(forward: Any, targets: Tensor) -> Tensor:
        order.append((forward.inputs["input_ids"], targets))
        return inner(forward, targets)

    trainer.penalty.term = noting
    trainer.train()
    assert len(order) == 2 * accumulate == trainer.penalty.steps
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.3)
    penalty = FisherPenalty(expected, 0.5, every=every, generator=key())
    for start in range(0, len(order), accumulate):
        optimizer.zero_grad()
        group = order[start : start + accumulate]
        items = sum(int((y != -100).sum()) for _, y in group)
        for x, y in group:
            share = int((y != -100).sum()) / items
            penalty.loss = lambda logits, y, share=share: (
                accumulate * share * F.cross_entropy(logits.flatten(0, 1), y.flatten(), label_smoothing=smoothing)
            )
            penalty.backward(x, y)
        for p in expected.parameters():
            p.grad /= accumulate
        nn.utils.clip_grad_norm_(expected.parameters(), 0.2)
        optimizer.step()
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2 and logged[-1]["fisher_penalty"] > 0 and logged[-1]["fisher_trace_estimate"] > 0


def test_transformers_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole, second = gpt2(), gpt2()
    trainer_of(whole, tmp_path, every=3, **saving).train()
    resumed = trainer_of(second, tmp_path, every=3, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.penalty.steps == 4
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))
    (tmp_path / "checkpoint-2" / "fisher_penalty.pt").unlink()
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .*fisher_penalty\.pt"):
        trainer_of(gpt2(), tmp_path, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_evaluation_has_no_penalty_and_the_trace_is_noted(tmp_path: Path) -> None:
    from fastfisher.integrations.transformers import FisherTraceCallback

    targets = F.pad(LABELS[:, 1:], (0, 1), value=-100)
    model = gpt2()
    first = trace_fisher(copy.deepcopy(model), (TOKENS, targets), generator=key(0)).value
    trainer = trainer_of(model, tmp_path, callbacks=[FisherTraceCallback(2, (TOKENS, targets))])
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "fisher_trace" in entry]
    assert [entry["step"] for entry in entries] == [0, 2]
    assert entries[0]["fisher_trace"] == pytest.approx(first)
    steps = trainer.penalty.steps
    assert "eval_loss" in trainer.evaluate(trainer.train_dataset) and trainer.penalty.steps == steps
    with pytest.raises(ValueError, match="every_n_steps: expected an integer >= 1, got 0"):
        FisherTraceCallback(0, TOKENS)


@pytest.mark.parametrize(("extra", "modules"), [("lightning", "pytorch_lightning lightning"), ("transformers",) * 2])
def test_without_the_extra_the_error_names_it(extra: str, modules: str) -> None:
    hidden = "".join(f"sys.modules[{name!r}] = None; " for name in modules.split())
    run = python(f"import sys; {hidden}import fastfisher; import fastfisher.integrations.{extra}")
    assert f"ModuleNotFoundError: fastfisher.integrations.{extra} needs" in run.stderr
    assert f"pip install fastfisher[{extra}]" in run.stderr

"""The callbacks and trainers: the parameters are those of FisherPenalty in a loop by hand."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfisher import FisherPenalty, trace_fisher
from fastfisher.ops.sampled import new_key
from tests.support.networks import flat, relative_error
from tests.support.transformer_models import KINDS, batch_of, data_of, model_of, penalised, targets_of
from tests.test_package import python

pytestmark = [
    pytest.mark.usefixtures("torchvision", "one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(24) % 3


TOKENS = torch.randint(11, (12, 6), generator=torch.Generator().manual_seed(2))
STEP: dict[str, Any] = {"difference": "central", "step": 1e-5}
"""That of float64; the loss within the forward of these models is in float32, which the default goes by."""
LABELS = TOKENS.clone()
LABELS[1, 3:], LABELS[6, 2:] = -100, -100


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
            if calls == "every other" and batch_idx % 2:
                return None
            if calls == "twice":
                self.model(batch[0])
            loss = F.cross_entropy(self.model(batch[0]), batch[1])
            self.log("train_loss", loss)
            return {"loss": loss} if calls == "dict" else loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.3)

    return Module()


def fit(
    module: Any, callbacks: list[Any], tmp_path: Path, checkpoint: Any = None, loader: Any = None, **options: Any
) -> Any:
    import pytorch_lightning

    settings = {
        "logger": False, "max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": tmp_path,
    }  # fmt: skip
    trainer = pytorch_lightning.Trainer(callbacks=callbacks, **{**settings, **options})
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=4)
    trainer.fit(module, loader or batches, ckpt_path=checkpoint)
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


def noting_logger() -> Any:
    from pytorch_lightning.loggers import Logger

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

    return Stub()


def test_the_monitor_logs_to_every_logger(tmp_path: Path) -> None:
    from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

    from fastfisher.integrations.lightning import FisherTraceMonitor

    stub, csv = noting_logger(), CSVLogger(tmp_path)
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


class Dictionary(torch.utils.data.Dataset):
    """Batches as dicts, with labels of which some do not count."""

    def __len__(self) -> int:
        return len(TOKENS)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"tokens": TOKENS[i], "labels": LABELS[i]}


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).tanh())


def reading(model: nn.Module, loss: Any) -> Any:
    """A LightningModule whose training_step takes no index of the batch."""
    import pytorch_lightning

    class Module(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any) -> Any:
            return loss(self.model(batch["tokens"]), batch["labels"])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.3)

    return Module()


def mean(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def of_next(logits: Tensor, labels: Tensor) -> Tensor:
    return mean(logits[:, :-1], labels[:, 1:])


def following(labels: Tensor) -> Tensor:
    return F.pad(labels[:, 1:], (0, 1), value=-100)


@pytest.mark.parametrize(("loss", "aligned"), [(mean, lambda y: y), (of_next, following)])
def test_lightning_leaves_out_what_the_loss_leaves_out(loss: Any, aligned: Any, tmp_path: Path) -> None:
    from pytorch_lightning.loggers import CSVLogger

    from fastfisher.integrations.lightning import FisherPenaltyCallback, FisherTraceMonitor

    model, expected = Reader().double(), Reader().double()
    callback = FisherPenaltyCallback(0.5, network="model", every=1, generator=key())
    monitor = FisherTraceMonitor(3, network="model", generator=key(7))
    logger, loader = CSVLogger(tmp_path), torch.utils.data.DataLoader(Dictionary(), batch_size=4)
    fit(reading(model, loss), [callback, monitor], tmp_path, loader=loader, logger=logger)
    generator, optimizer = key(), torch.optim.SGD(expected.parameters(), lr=0.3)
    drawn = new_key(generator, torch.device("cpu"))
    for x, y in zip(TOKENS.split(4), LABELS.split(4), strict=True):
        logits = expected(x)
        total, _ = penalised(loss(logits, y), logits, aligned(y), expected, 0.5, drawn)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        drawn[1] += 1
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    seed = int(torch.randint(1 << 62, (), generator=key(7)))
    right = trace_fisher(expected, (TOKENS[8:], aligned(LABELS[8:])), generator=key(seed + 3)).value
    logger.save()
    assert f"{right:.5f}"[:6] in (Path(logger.log_dir) / "metrics.csv").read_text()


@pytest.mark.parametrize(
    "loss", [lambda z, y: F.mse_loss(z, F.one_hot(y.clamp(min=0), 11).double()), lambda z, y: mean(z[:, 2:], y[:, 2:])]
)
def test_lightning_refuses_a_loss_that_does_not_say_what_counts(loss: Any, tmp_path: Path) -> None:
    from fastfisher.integrations.lightning import FisherPenaltyCallback, FisherTraceMonitor

    loader = torch.utils.data.DataLoader(Dictionary(), batch_size=4)
    for callback in (FisherPenaltyCallback(0.5, network="model"), FisherTraceMonitor(1, network="model")):
        module = reading(Reader().double(), loss)
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(ValueError, match=r"loss: expected .* state the targets of the logits yourself by targets="):
            fit(module, [callback], tmp_path, loader=loader)
        assert "training_step" not in vars(module) and not module.model._forward_hooks
        assert all(torch.equal(before[name], x) for name, x in module.state_dict().items())
    stated = FisherPenaltyCallback(0.5, network="model", targets=lambda batch: batch["labels"])
    fit(reading(Reader().double(), loss), [stated], tmp_path, loader=loader)
    assert stated.penalty is not None and stated.penalty.steps == 3


def test_lightning_steps_that_are_left_out_and_optimisers_that_call_again(tmp_path: Path) -> None:
    from fastfisher.integrations.lightning import FisherPenaltyCallback

    model, expected = network(), network()
    module = lightning_module(model, "every other")
    callback = FisherPenaltyCallback(0.5, network="model", every=1, generator=key())
    fit(module, [callback], tmp_path, gradient_clip_val=0.2)
    batches = list(zip(X.split(4), Y.split(4), strict=True))
    by_hand(expected, batches[::2], 1, 0.2, every=1)
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)

    module = lightning_module(network())
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters(), max_iter=3)
    with pytest.raises(ValueError, match="optimizer: expected one that calls training_step once"):
        fit(module, [FisherPenaltyCallback(0.5, network="model")], tmp_path)


@pytest.mark.filterwarnings("ignore::fastfisher.SlowPathWarning")
@pytest.mark.parametrize("what", ["compiled", "bf16-mixed"])
def test_lightning_with_a_compiled_network_and_in_bfloat16(what: str, tmp_path: Path) -> None:
    from fastfisher.integrations.lightning import FisherPenaltyCallback

    low = what == "bf16-mixed"
    made = [network().float() if low else network() for _ in range(3)]
    found = made[0] if low else torch.compile(made[0], backend="eager")
    callback = FisherPenaltyCallback(0.5, network="model", every=1, labels="true", method="double_backprop")
    x = X.float() if low else X
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, Y), batch_size=4)
    precision = {"precision": "bf16-mixed"} if low else {}
    fit(lightning_module(found), [callback], tmp_path, loader=loader, **precision)
    penalty, optimizer = FisherPenalty(made[1], 0.5, every=1, labels="true"), torch.optim.SGD(made[1].parameters(), 0.3)
    for inputs, targets in zip(x.split(4), Y.split(4), strict=True):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            penalty.backward(inputs, targets)
        optimizer.step()
    start = flat(list(made[2].parameters()))
    moved = [flat(list(m.parameters())) - start for m in made[:2]]
    assert relative_error(*moved) < (0.05 if low else 1e-5)


def test_lightning_one_callback_after_another(tmp_path: Path) -> None:
    """Twice in one trainer is refused by Lightning; in one trainer after the other each training is its own."""
    from fastfisher.integrations.lightning import FisherPenaltyCallback

    def callback() -> Any:
        return FisherPenaltyCallback(0.5, network="model", every=3, generator=key())

    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        fit(lightning_module(network()), [callback(), callback()], tmp_path)
    both, models = callback(), (network(), network())
    for model in models:
        fit(lightning_module(model), [both], tmp_path)
        assert both.penalty is not None and both.penalty.model is model and both.penalty.steps == 6


def test_lightning_gives_back_a_training_step_of_the_instance(tmp_path: Path) -> None:
    from fastfisher.integrations.lightning import FisherPenaltyCallback

    module = lightning_module(network())
    inner = module.training_step
    module.training_step = lambda batch, batch_idx: inner(batch, batch_idx)
    replaced = module.training_step
    fit(module, [FisherPenaltyCallback(0.5, network="model")], tmp_path)
    assert vars(module)["training_step"] is replaced


@pytest.mark.parametrize(
    ("trainer", "module", "named"),
    [
        ({}, {"automatic_optimization": False}, "pl_module: expected automatic"),
        (
            {"world_size": 2, "strategy": SimpleNamespace(model=nn.Linear(2, 2))},
            {},
            "trainer: expected DistributedDataParallel or fully_shard in 2 processes, got SimpleNamespace with a",
        ),
        ({"scaler": object(), "precision": "16-mixed"}, {}, "precision: .* '16-mixed'"),
        ({}, {"_compiler_ctx": {}}, "pl_module: .*compiled"),
    ],
)
def test_lightning_refuses_what_does_not_go_with_a_penalty(trainer: Any, module: Any, named: str) -> None:
    from fastfisher.integrations.lightning import FisherPenaltyCallback

    given = lightning_module(network())
    for name, value in module.items():
        setattr(given, name, value)
    running = SimpleNamespace(**{"world_size": 1, "scaler": None, **trainer})
    with pytest.raises(ValueError, match=named):
        FisherPenaltyCallback(0.5, network="model").on_train_start(running, given)
    assert "training_step" not in vars(given)


def test_the_monitor_resumes_with_the_draws_of_an_uninterrupted_run(tmp_path: Path) -> None:
    from fastfisher.integrations.lightning import FisherTraceMonitor

    def run(epochs: int, model: nn.Module, checkpoint: Any = None) -> tuple[Any, list[tuple[int, float]]]:
        logger = noting_logger()
        monitor = FisherTraceMonitor(2, network="model", generator=key(5))
        options = {"logger": logger, "max_epochs": epochs, "accumulate_grad_batches": 2}
        trainer = fit(lightning_module(model), [monitor], tmp_path, checkpoint, **options)
        return trainer, [(step, m["fisher_trace"]) for step, m in logger.metrics if "fisher_trace" in m]

    _, whole = run(4, network())
    trainer, first = run(2, network())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    _, second = run(4, network(), tmp_path / "two.ckpt")
    assert [step for step, _ in whole] == [2, 4, 6, 8, 10, 12] and first + second == whole
    assert len({value for _, value in whole}) == 6


# ---- Transformers ----------------------------------------------------------------------------------------------------


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
        penalty_options={"every": every, "generator": key(), **STEP}, callbacks=callbacks,
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
        order.append((forward.inputs.kwargs["input_ids"], targets))
        return inner(forward, targets)

    trainer.penalty.term = noting
    trainer.train()
    assert len(order) == 2 * accumulate == trainer.penalty.steps
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.3)
    penalty = FisherPenalty(expected, 0.5, every=every, generator=key(), **STEP)
    for start in range(0, len(order), accumulate):
        optimizer.zero_grad()
        group = order[start : start + accumulate]
        items = sum(int((y != -100).sum()) for _, y in group)
        for x, y in group:
            share = int((y != -100).sum()) / items
            penalty.loss = lambda out, y, share=share: (
                accumulate * share * F.cross_entropy(out.logits.flatten(0, 1), y.flatten(), label_smoothing=smoothing)
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
    fresh = trainer_of(gpt2(), tmp_path, **saving)
    with pytest.warns(
        UserWarning, match=r"resume_from_checkpoint: .*no state of a penalty .*fisher_penalty\.pt"
    ) as told:
        fresh.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert fresh.penalty.steps == 2 and sum("no state of a penalty" in str(w.message) for w in told) == 1


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


def noting(mixin_trainer: Any) -> Any:
    """The same Trainer with a note of each micro-batch: what compute_loss got."""

    class Noting(mixin_trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if model.training:
                items = kwargs.get("num_items_in_batch")
                self.noted.append(({k: v.clone() for k, v in inputs.items()}, items))
            return super().compute_loss(model, inputs, *args, **kwargs)

    Noting.noted = []
    return Noting


def fisher_trainer(
    model: Any, data: Any, tmp_path: Path, kind: Any = None, alpha: float = 0.5, options: Any = None, **arguments: Any
) -> Any:
    from transformers import TrainingArguments

    from fastfisher.integrations.transformers import FisherPenaltyTrainer

    given = {
        name: arguments.pop(name) for name in ("callbacks", "compute_loss_func", "model_init") if name in arguments
    }
    settings = {
        "per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 0.3, "lr_scheduler_type": "constant",
        "optim": "sgd", "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
        "max_grad_norm": 0.2, "logging_steps": 1,
    }  # fmt: skip
    return (kind or FisherPenaltyTrainer)(
        model=model, args=TrainingArguments(str(tmp_path), **{**settings, **arguments}), train_dataset=data,
        alpha=alpha, penalty_options={"every": 1, "generator": key(), **(options or {})}, **given,
    )  # fmt: skip


def double_backprop_of(trainer: Any, model: Any, accumulate: int, targets: Any, context: Any = nullcontext) -> None:
    """The training of a noting Trainer again: SGD with clipping on the model's own loss + α·R, by double backprop."""
    optimizer, drawn = torch.optim.SGD(model.parameters(), lr=0.3), new_key(key(), torch.device("cpu"))
    for start in range(0, len(trainer.noted), accumulate):
        optimizer.zero_grad()
        for inputs, items in trainer.noted[start : start + accumulate]:
            scaled = trainer.model_accepts_loss_kwargs and items is not None
            with context():
                output = model(**inputs, **({"num_items_in_batch": items} if scaled else {}))
            loss = output.loss * (accumulate if scaled else 1)
            total, _ = penalised(loss, output.logits, targets(inputs["labels"]), model, 0.5, drawn)
            (total / accumulate).backward()
            drawn[1] += 1
        nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimizer.step()


def assert_same(found: Any, wanted: Any, tolerance: float) -> None:
    moved = [flat(list(model.parameters())) for model in (found, wanted)]
    assert relative_error(*moved) < tolerance


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_models_of_transformers_train_as_by_hand(kind: str, accumulate: int, tmp_path: Path) -> None:
    from fastfisher.integrations.transformers import FisherPenaltyTrainer

    model, expected = model_of(kind), model_of(kind)
    trainer = fisher_trainer(
        model, data_of(kind, 8), tmp_path, noting(FisherPenaltyTrainer), options={"method": "double_backprop"},
        gradient_accumulation_steps=accumulate,
    )  # fmt: skip
    trainer.train()
    double_backprop_of(trainer, expected, accumulate, lambda labels: targets_of(kind, labels))
    assert trainer.penalty.steps == 2 * accumulate
    assert_same(model, expected, 1e-6)  # of a float64 model; some norms in it are in float32


class Wrapped(nn.Module):
    """An adapter as PEFT makes it: the base model within, low-rank updates, and any arguments handed on."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model, self.config = model.requires_grad_(False), model.config
        layer = model.transformer.h[0].attn.c_attn
        source = torch.Generator().manual_seed(4)
        self.down = nn.Parameter(torch.randn(8, 2, generator=source, dtype=torch.float64))
        self.up = nn.Parameter(torch.randn(2, 24, generator=source, dtype=torch.float64))
        layer.register_forward_hook(lambda _, args, output: output + args[0] @ self.down @ self.up)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


class Prompted(Wrapped):
    """Prompt tuning: rows of logits in front of those of the labels."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        source = torch.Generator().manual_seed(6)
        self.prompt = nn.Parameter(torch.randn(3, 8, generator=source, dtype=torch.float64))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        embedded = self.base_model.transformer.wte(input_ids)
        embedded = torch.cat([self.prompt.expand(len(embedded), -1, -1), embedded], 1)
        return self.base_model(
            inputs_embeds=embedded, attention_mask=F.pad(attention_mask, (3, 0), value=1),
            labels=F.pad(labels, (3, 0), value=-100), **kwargs,
        )  # fmt: skip


def subclass(model: Any) -> Any:
    model.__class__ = type("Mine", (type(model),), {})
    return model


def peft(method: str) -> Any:
    def make(model: Any) -> Any:
        package = pytest.importorskip("peft")
        configurations = {
            "lora": package.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], init_lora_weights=False),
            "prompt": package.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
            "prefix": package.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        }
        torch.manual_seed(0)
        return package.get_peft_model(model, configurations[method]).double()

    return make


@pytest.mark.parametrize(
    ("wrap", "front"),
    [(subclass, 0), (Wrapped, 0), (Prompted, 3), (peft("lora"), 0), (peft("prompt"), 3), (peft("prefix"), 0)],
)
def test_adapters_and_subclasses_shift_as_their_loss_does(wrap: Any, front: int, tmp_path: Path) -> None:
    from fastfisher.integrations.transformers import FisherPenaltyTrainer

    model, expected = wrap(model_of("gpt2")).train(), wrap(model_of("gpt2")).train()
    trainer = fisher_trainer(
        model, data_of("gpt2"), tmp_path, noting(FisherPenaltyTrainer), remove_unused_columns=False,
        options=STEP,
    )  # fmt: skip
    before = flat([p.detach().clone() for p in model.parameters()])
    trainer.train()
    double_backprop_of(trainer, expected, 1, lambda labels: following(F.pad(labels, (front, 0), value=-100)))
    moved = [flat(list(m.parameters())) - before for m in (model, expected)]
    assert relative_error(*moved) < 1e-4


def test_a_loss_without_the_penalty_is_an_error(tmp_path: Path) -> None:
    from transformers import Trainer

    from fastfisher.integrations.transformers import FisherPenaltyMixin, FisherPenaltyTrainer

    class Own(FisherPenaltyTrainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    class Behind(Trainer):
        compute_loss = Own.compute_loss

    class Dropped(FisherPenaltyTrainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            _, outputs = super().compute_loss(model, inputs, True)
            return outputs.loss

    class Stepping(FisherPenaltyTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            loss = model(**inputs).loss
            loss.backward()
            return loss.detach()

    class Order(Behind, FisherPenaltyMixin):
        pass

    never = "compute_loss: expected that of FisherPenaltyMixin to make the loss, but {} never calls it"
    dropped = "compute_loss: expected the loss that Dropped trains .* 1 of the 1 penalties"
    for kind, message in ((Own, never), (Stepping, never), (Dropped, dropped)):
        model = model_of("gpt2")
        trainer = fisher_trainer(model, data_of("gpt2"), tmp_path, kind)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message.format(kind.__name__)):
            trainer.train()
        assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
        assert kind is not Own or all(p.grad is None for p in model.parameters())
    with pytest.raises(TypeError):  # the Trainer's __init__ does not know of alpha
        fisher_trainer(model_of("gpt2"), data_of("gpt2"), tmp_path, Order)


def by_sum_of_squares(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return outputs.logits.square().mean()


def by_next(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return mean(outputs.logits, following(labels))


@pytest.mark.parametrize(
    ("kind", "function"), [("bert regression", None), ("bert multi-label", None), ("gpt2", by_sum_of_squares)]
)
def test_a_loss_without_a_softmax_is_an_error(kind: str, function: Any, tmp_path: Path) -> None:
    model = model_of(kind)
    trainer = fisher_trainer(model, data_of(kind), tmp_path, compute_loss_func=function)
    with pytest.raises(ValueError, match=r"loss: expected a cross-entropy of the softmax .*override penalty_targets"):
        trainer.train()
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_function_of_the_user_s_says_what_counts(tmp_path: Path) -> None:
    from fastfisher.integrations.transformers import FisherPenaltyTrainer

    class Stating(FisherPenaltyTrainer):
        def penalty_targets(self, inputs: Any) -> Tensor:
            return following(inputs["labels"])

    models = [model_of("gpt2") for _ in range(2)]
    fisher_trainer(models[0], data_of("gpt2"), tmp_path, compute_loss_func=by_next).train()
    fisher_trainer(models[1], data_of("gpt2"), tmp_path, Stating, compute_loss_func=by_next).train()
    assert_same(*models, 1e-12)


def test_a_micro_batch_in_which_nothing_counts(tmp_path: Path) -> None:
    data = data_of("gpt2", 4)
    for example in data[:2]:
        example["labels"] = torch.full_like(example["labels"], -100)
    model = model_of("gpt2")
    trainer = fisher_trainer(model, data, tmp_path, gradient_accumulation_steps=4, per_device_train_batch_size=1)
    trainer.train()
    assert trainer.penalty.steps == 8 and all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("method", ["double_backprop", "finite_difference"])
@pytest.mark.filterwarnings("ignore:under autocast:fastfisher.SlowPathWarning")
def test_bfloat16_by_the_trainer(method: str, tmp_path: Path) -> None:
    """Accelerate runs the forward in autocast and hands the logits out in float32, a copy of what the loss has."""
    from fastfisher.integrations.transformers import FisherPenaltyTrainer

    model, expected = model_of("gpt2").float(), model_of("gpt2").float()
    trainer = fisher_trainer(
        model, data_of("gpt2"), tmp_path, noting(FisherPenaltyTrainer), options={"method": method}, bf16=True
    )
    trainer.train()
    double_backprop_of(trainer, expected, 1, following, lambda: torch.autocast("cpu", torch.bfloat16))
    before = flat(list(model_of("gpt2").float().parameters()))
    moved = [flat(list(m.parameters())) - before for m in (model, expected)]
    assert relative_error(*moved) < 0.05


@pytest.mark.parametrize("options", [{"method": "double_backprop"}, STEP])
def test_gradient_checkpointing_by_the_trainer(options: Any, tmp_path: Path) -> None:
    from fastfisher.integrations.transformers import FisherPenaltyTrainer

    model, expected = model_of("gpt2"), model_of("gpt2")
    trainer = fisher_trainer(
        model, data_of("gpt2"), tmp_path, noting(FisherPenaltyTrainer), options=options, gradient_checkpointing=True
    )
    trainer.train()
    assert model.is_gradient_checkpointing
    double_backprop_of(trainer, expected, 1, following)
    assert_same(model, expected, 1e-5)


@pytest.mark.filterwarnings("ignore::fastfisher.SlowPathWarning")
def test_a_compiled_model(tmp_path: Path) -> None:
    model, expected = model_of("gpt2"), model_of("gpt2")
    for m in (torch.compile(model, backend="eager"), expected):
        fisher_trainer(m, data_of("gpt2"), tmp_path, options={"every": 2, **STEP}, remove_unused_columns=False).train()
    assert_same(model, expected, 1e-9)


def test_some_parameters_frozen_and_some_penalised(tmp_path: Path) -> None:
    model, expected = model_of("bert classifier"), model_of("bert classifier")
    for m in (model, expected):
        m.bert.embeddings.requires_grad_(False)
    options = {"params": [*model.classifier.parameters()], "labels": "true", **STEP}
    trainer = fisher_trainer(
        model, data_of("bert classifier"), tmp_path, options=options, max_steps=1, max_grad_norm=1e9
    )
    order: list[Any] = []
    inner = trainer.penalty.term

    def noting_term(forward: Any, targets: Any) -> Tensor:
        order.append((forward.inputs.kwargs, targets))
        return inner(forward, targets)

    trainer.penalty.term = noting_term
    trainer.train()
    ((inputs, targets),) = order
    loss = F.cross_entropy(expected(**inputs).logits, targets)
    gradients = torch.autograd.grad(loss, list(expected.classifier.parameters()), create_graph=True)
    (loss + 0.5 * sum(g.square().sum() for g in gradients)).backward()
    torch.optim.SGD(expected.parameters(), lr=0.3).step()
    assert_same(model, expected, 1e-6)


def test_the_penalty_is_of_the_model_that_is_trained(tmp_path: Path) -> None:
    trainer = fisher_trainer(None, data_of("gpt2"), tmp_path, model_init=lambda: model_of("gpt2"))
    trainer.train()
    assert trainer.penalty.model is trainer.model and trainer.penalty.steps == 2
    other = fisher_trainer(model_of("gpt2"), data_of("gpt2"), tmp_path)
    other.penalty = trainer.penalty
    with pytest.raises(ValueError, match="penalty: expected one of the model that this Trainer trains"):
        other.train()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"world_size": 2}, "args: expected the processes of torch.distributed, got 2 of another kind"),
        ({"n_gpu": 2}, "args: expected at most one GPU for each process, got 2"),
        ({"fp16": True}, "args.fp16"),
        ({"torch_compile": True}, "args.torch_compile"),
        ({"is_deepspeed_enabled": True}, "args.deepspeed"),
        ({"is_fsdp_enabled": True}, "args.fsdp: expected FSDP2"),
    ],
)
def test_transformers_refuses_what_does_not_go_with_a_penalty(arguments: Any, named: str) -> None:
    from fastfisher.integrations.transformers import FisherPenaltyMixin

    given = {"world_size": 1, "n_gpu": 0, "fp16": False, "torch_compile": False, **arguments}

    class Base:
        def __init__(self, **_: Any) -> None:
            self.args, self.model = SimpleNamespace(**given), network()
            self.is_deepspeed_enabled = self.is_fsdp_enabled = False
            vars(self).update({name: value for name, value in arguments.items() if name.startswith("is_")})

    with pytest.raises(ValueError, match=named):
        type("Mine", (FisherPenaltyMixin, Base), {})(alpha=0.1)


class Recorder:
    """Made a TrainerCallback where Transformers is there: what is logged, as TensorBoard's callback sees it."""

    def __new__(cls) -> Any:
        from transformers import TrainerCallback

        class Recording(TrainerCallback):
            logs: list[tuple[int, dict[str, float]]] = []  # noqa: RUF012

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                self.logs.append((state.global_step, dict(logs)))

        return Recording()


@pytest.mark.parametrize("first", [True, False])
def test_the_trace_is_logged_to_all_and_resumes_with_the_same_draws(first: bool, tmp_path: Path) -> None:
    from transformers import Trainer

    from fastfisher.integrations.transformers import FisherTraceCallback

    batch = batch_of("gpt2")
    data = {"input_ids": batch["input_ids"]}, following(batch["labels"])

    class Plain(Trainer):  # the callback needs no trainer of ours
        def __init__(self, *args: Any, alpha: float, penalty_options: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    def run(steps: int, checkpoint: Any = None) -> tuple[Any, Any]:
        recorder, trace = Recorder(), FisherTraceCallback(2, batch, generator=key(5), draws=2)
        callbacks = [recorder, trace] if first else [trace, recorder]
        trainer = fisher_trainer(
            model_of("gpt2"), data_of("gpt2"), tmp_path, Plain, callbacks=callbacks, max_steps=steps, save_steps=2,
            save_strategy="steps",
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer, [(step, entry) for step, entry in recorder.logs if "fisher_trace" in entry]

    trainer, whole = run(6)
    assert [step for step, _ in whole] == [0, 2, 4, 6]
    noted = [entry for entry in trainer.state.log_history if "fisher_trace" in entry]
    assert [(e["step"], e["fisher_trace"]) for e in noted] == [(step, e["fisher_trace"]) for step, e in whole]
    assert sum("loss" in entry for entry in trainer.state.log_history) == 6  # the losses are still logged
    seed = int(torch.randint(1 << 62, (), generator=key(5)))
    right = trace_fisher(model_of("gpt2"), data, generator=key(seed), draws=2)
    assert whole[0][1]["fisher_trace"] == right.value
    _, resumed = run(6, str(tmp_path / "checkpoint-2"))
    assert resumed == whole[2:]


@pytest.mark.parametrize(("extra", "modules"), [("lightning", "pytorch_lightning lightning"), ("transformers",) * 2])
def test_without_the_extra_the_error_names_it(extra: str, modules: str) -> None:
    hidden = "".join(f"sys.modules[{name!r}] = None; " for name in modules.split())
    run = python(f"import sys; {hidden}import fastfisher; import fastfisher.integrations.{extra}")
    assert f"ModuleNotFoundError: fastfisher.integrations.{extra} needs" in run.stderr
    assert f"pip install fastfisher[{extra}]" in run.stderr

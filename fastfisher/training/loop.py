"""The training loop: SGD with or without a gradient penalty, measured, saved and resumed every epoch."""

from __future__ import annotations

import hashlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from fastfisher import FisherPenalty, trace_fisher
from fastfisher.capture import eval_mode
from fastfisher.training.config import TrainConfig, resolve
from fastfisher.training.data import Batches, Data, load_data
from fastfisher.training.folder import RunFolder
from fastfisher.training.measurements import accuracies
from fastfisher.training.networks import build_network

# What each method of the paper (section 4) penalises.
PENALTIES: dict[str, dict[str, Any]] = {
    "FP": {"labels": "sampled"},
    "GP": {"labels": "true"},
    "GP_r": {"labels": "uniform"},
    "GP_x": {"labels": "true", "wrt": "inputs"},
}

Outcome = Literal["finished", "interrupted", "already finished"]


class TrainingDivergedError(RuntimeError):
    """The loss or the logits are no longer finite numbers."""


def train(config: TrainConfig) -> Outcome:
    """Run or resume the training that ``config`` describes, writing to ``config.out``.

    Everything is checked, the data read and the network built before the output folder is created. Ctrl-C
    finishes the step it finds, saves a checkpoint and returns ``"interrupted"``; a second one raises
    KeyboardInterrupt. On the CPU a resumed run computes the same bits as an uninterrupted one.

    Sets PyTorch's global seed, and its number of threads if ``config.threads`` is not 0.

    Raises:
        ConfigError: for an option that cannot be used; nothing has been written.
        TrainingDivergedError: if the loss or the logits are no longer finite; the last checkpoint stays.
    """
    config = resolve(config)
    folder = RunFolder(config.out)
    folder.check(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    run = Run(config)
    if not config.resume:
        folder.create(config)
    elif checkpoint := folder.load_checkpoint():
        run.load_state_dict(checkpoint)
    if run.epoch == config.epochs:
        return "already finished"
    folder.truncate_metrics(run.epoch)
    total = config.epochs * len(run.batches)
    with (
        catch_interrupt() as interrupted,
        SummaryWriter(str(folder.events), purge_step=run.epoch + 1) as writer,
        tqdm(total=total, initial=run.steps, unit="step", disable=None) as bar,
    ):
        while run.steps < total:
            run.step()
            bar.update()
            if run.epoch_complete:
                record = run.finish_epoch()
                folder.append_metrics(record)
                for name, value in record.items():
                    if value is not None:
                        writer.add_scalar(name, value, run.epoch)
                tqdm.write(describe(record, config.epochs))
                folder.save_checkpoint(run.state_dict())
            elif interrupted():
                folder.save_checkpoint(run.state_dict())
            if interrupted() and run.steps < total:
                return "interrupted"
    return "finished"


class Run:
    """The state of a run between two steps: all that a checkpoint holds, and nothing of the disk."""

    def __init__(self, config: TrainConfig) -> None:
        """Read the data and build network, optimiser and penalty; ``config`` has been resolved."""
        assert config.image_size is not None and config.noise_seed is not None
        self.config = config
        self.device = torch.device(config.device)
        self.data: Data = load_data(
            config.data,
            data_dir=config.data_dir,
            image_size=config.image_size,
            label_noise=config.label_noise,
            noise_seed=config.noise_seed,
            device=config.device,
        )
        self.batches = Batches(
            self.data.inputs,
            self.data.labels,
            batch_size=config.batch_size,
            augment=config.augment,
            seed=_seed(config.seed, "batches"),
        )
        torch.manual_seed(_seed(config.seed, "network"))
        self.model = build_network(
            config.network,
            in_channels=self.data.inputs.shape[1],
            image_size=config.image_size,
            classes=self.data.classes,
        ).to(self.device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.penalty = self._build_penalty()
        self.steps = 0
        self.epoch = 0
        self.train_seconds = 0.0
        # Sums over the steps of this epoch, kept on the device so that a step waits for nothing:
        # loss, penalty, the number of steps with a penalty, and the penalty's estimate of Tr(F).
        self.sums = torch.zeros(4, dtype=torch.float64, device=self.device)

    def _build_penalty(self) -> FisherPenalty | None:
        config = self.config
        if config.method == "baseline":
            return None
        options: dict[str, Any] = {
            **PENALTIES[config.method],
            "every": config.penalty_every,
            "start": config.penalty_start * len(self.batches),
            "reduction": config.penalty_reduction,
            "method": config.penalty_method,
            "gates": config.gates,
            "mixed": config.mixed,
            "examples": config.penalty_examples,
            "generator": torch.Generator(self.device).manual_seed(_seed(config.seed, "labels")),
        }
        return FisherPenalty(self.model, config.alpha, **options)

    @property
    def epoch_complete(self) -> bool:
        """Whether all steps of the current epoch have been taken."""
        return self.steps == (self.epoch + 1) * len(self.batches)

    def step(self) -> None:
        """Take one optimiser step on the next batch."""
        started = time.perf_counter()
        config = self.config
        self.model.train()
        drops = sum(self.epoch >= milestone for milestone in config.lr_milestones)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * config.lr_decay**drops
        inputs, labels = self.batches.next()
        self.optimizer.zero_grad()
        if self.penalty is None:
            loss = F.cross_entropy(self.model(inputs), labels)
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            try:
                loss = self.penalty.backward(inputs, labels)
            except ValueError:
                # No label can be drawn from logits that are not finite.
                self._check_finite(inputs)
                raise
            if self.penalty.value is not None:
                self.sums[1] += self.penalty.value
                self.sums[2] += 1
            if self.penalty.trace_estimate is not None:
                self.sums[3] += self.penalty.trace_estimate
        self.sums[0] += loss.detach()
        self.optimizer.step()
        self.steps += 1
        self.train_seconds += time.perf_counter() - started

    def finish_epoch(self) -> dict[str, float | int | None]:
        """Measure the model, start the next epoch and return the record of the one that ended.

        ``train_loss``, ``penalty`` (‖g‖²) and ``penalty_trace_estimate`` (for FP B‖g‖², an estimate of Tr(F))
        are means over the epoch's steps; the rest is measured at its end, see ``accuracies`` and
        ``trace_fisher``. What does not exist, such as the penalty of a baseline, is None.

        Raises:
            TrainingDivergedError: if the loss or the logits are not finite.
        """
        waiting = time.perf_counter()
        loss, penalty, penalised, trace_estimate = self.sums.tolist()
        started = time.perf_counter()
        self._check_finite(self.data.inputs[: self.config.batch_size], loss)
        self.epoch += 1
        record: dict[str, float | int | None] = {
            "epoch": self.epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": loss / len(self.batches),
            **accuracies(self.model, self.data),
            "trace_fisher": self._trace_fisher(),
            "penalty": penalty / penalised if penalised else None,
            "penalty_trace_estimate": trace_estimate / penalised if trace_estimate else None,
            # On a GPU the steps only end when their sums arrive.
            "train_seconds": self.train_seconds + started - waiting,
            "measure_seconds": time.perf_counter() - started,
        }
        self.sums.zero_()
        self.train_seconds = 0.0
        return record

    def _check_finite(self, inputs: Tensor, loss: float = 0.0) -> None:
        with eval_mode(self.model), torch.no_grad():
            finite = self.model(inputs).isfinite().all().item()
        if not (finite and math.isfinite(loss)):
            remedy = "a lower --lr" if self.penalty is None else "a lower --lr or --alpha"
            raise TrainingDivergedError(f"training diverged in epoch {self.epoch + 1}: try {remedy}")

    def _trace_fisher(self) -> float:
        # A new generator for each epoch: measuring changes nothing in training and needs no checkpoint.
        generator = torch.Generator(self.device).manual_seed(_seed(self.config.seed, f"trace {self.epoch}"))
        order = torch.randperm(len(self.data.labels), generator=generator, device=self.device)
        chosen = order[: self.config.trace_samples]
        return trace_fisher(self.model, self.data.inputs[chosen], labels="sampled", generator=generator).value

    def state_dict(self) -> dict[str, Any]:
        """Return everything the next steps depend on, as tensors and plain Python values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "penalty": None if self.penalty is None else self.penalty.state_dict(),
            "batches": self.batches.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "steps": self.steps,
            "epoch": self.epoch,
            "train_seconds": self.train_seconds,
            "sums": self.sums,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.penalty is not None:
            self.penalty.load_state_dict(state["penalty"])
        self.batches.load_state_dict(state["batches"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.steps = state["steps"]
        self.epoch = state["epoch"]
        self.train_seconds = state["train_seconds"]
        self.sums.copy_(state["sums"])


def _seed(seed: int, purpose: str) -> int:
    """Return a seed of its own for each purpose, so that no two of them share a random stream."""
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def describe(record: dict[str, float | int | None], epochs: int) -> str:
    """Return the line that is printed after an epoch."""

    def percent(name: str) -> str:
        value = record[name]
        return "-" if value is None else f"{100 * value:.1f} %"

    return (
        f"epoch {record['epoch']}/{epochs}  loss {record['train_loss']:.4g}  "
        f"train clean {percent('clean_accuracy')} noisy {percent('noisy_accuracy')}  "
        f"validation {percent('validation_accuracy')}  test {percent('test_accuracy')}  "
        f"Tr(F) {record['trace_fisher']:.3g}  "
        f"{record['train_seconds']:.3g} s + {record['measure_seconds']:.2g} s measuring"
    )


@contextmanager
def catch_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag that the yielded function reads; the second raises as usual.

    The previous handler is back afterwards. Outside the main thread, where Python delivers no signals, the
    flag is never set.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    caught = threading.Event()
    previous = signal.getsignal(signal.SIGINT)

    def first(number: int, frame: FrameType | None) -> None:
        caught.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, first)
    try:
        yield caught.is_set
    finally:
        signal.signal(signal.SIGINT, previous)

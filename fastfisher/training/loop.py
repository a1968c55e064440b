"""The training loop: SGD with or without a gradient penalty, measured on the way, saved every epoch, resumable."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from fastfisher import FisherPenalty
from fastfisher.model import eval_mode
from fastfisher.training.config import (
    NORMALISED_NETWORKS,
    ConfigError,
    TrainConfig,
    measurements,
    resolve,
    steps_between_measurements,
)
from fastfisher.training.data import Batches, Data, Mixup, load_data
from fastfisher.training.endings import TrainingDivergedError, catch_interrupt
from fastfisher.training.folder import RunFolder
from fastfisher.training.measurements import (
    ACCURACIES,
    BELOW,
    MEASURE,
    VERIFY,
    Examples,
    Record,
    accuracies,
    averaged_batch_statistics,
    describe,
    predict_probabilities,
)
from fastfisher.training.networks import build_network

# What each method of the paper (section 4) penalises.
PENALTIES: dict[str, dict[str, Any]] = {
    "FP": {"labels": "sampled"},
    "GP": {"labels": "true"},
    "GP_r": {"labels": "uniform"},
    "GP_x": {"labels": "true", "wrt": "inputs"},
}

Outcome = Literal["finished", "interrupted", "already finished"]


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
    elif (checkpoint := folder.load_checkpoint()) is not None:
        try:
            run.load_state_dict(checkpoint)
        except Exception as error:  # whatever a checkpoint of something else raises
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            raise ConfigError(f"{folder.checkpoint}: not a checkpoint of the run in config.json ({reason})") from error
    if run.epoch == config.epochs:
        return "already finished"
    folder.truncate_metrics(run.steps)
    total = config.epochs * len(run.batches)
    with (
        catch_interrupt() as interrupted,
        SummaryWriter(str(folder.events), purge_step=run.steps + 1) as writer,
        tqdm(total=total, initial=run.steps, unit="step", disable=None) as bar,
    ):
        while run.steps < total:
            run.step()
            bar.update()
            if record := run.finish_step():
                if config.save_predictions and run.measurement_due:
                    folder.save_predictions(run.steps, run.predictions().numpy())
                folder.append_metrics(record)
                for name, value in record.items():
                    if isinstance(value, (int, float)):
                        writer.add_scalar(name, value, run.steps)
                tqdm.write(describe(record, config.epochs))
            if "epoch" in record or interrupted():
                folder.save_checkpoint(run.state_dict())
            if interrupted() and run.steps < total:
                return "interrupted"
    return "finished"


class Run:
    """The state of a run between two steps: all that a checkpoint holds, and nothing of the disk."""

    def __init__(self, config: TrainConfig) -> None:
        """Read the data and build network, optimiser and penalty; ``config`` has been resolved.

        With ``config.start_from`` the weights are those of the run there, which is not looked at where ``config.out``
        has a checkpoint of its own to continue from.
        """
        assert config.image_size is not None and config.noise_seed is not None
        self.config, self.device = config, torch.device(config.device)
        self.data: Data = load_data(
            config.data,
            data_dir=config.data_dir,
            image_size=config.image_size,
            download=config.download,
            examples=config.examples,
            evaluate=config.evaluate,
            label_noise=config.label_noise,
            noise_seed=config.noise_seed,
            device=config.device,
        )
        self.batches = self._batches("batches")
        torch.manual_seed(_seed(config.seed, "network"))
        shape = {"in_channels": self.data.inputs.shape[1], "classes": self.data.classes}
        self.model = build_network(config.network, image_size=config.image_size, **shape).to(self.device)
        if config.start_from is not None and not RunFolder(config.out).checkpoint.exists():
            RunFolder(config.start_from).load_weights(self.model, config.network)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=True if self.device.type == "cpu" else None,  # of a small network's step 5 % of the time less
        )
        self.penalty = self._build_penalty()
        # Without a penalty, an object for one of weight 0 captures and replays the plain steps.
        captured = self.penalty is None and config.graphs == "on"
        self.plain = FisherPenalty(self.model, 0.0, graphs=True) if captured else None
        self.steps_between_measurements = steps_between_measurements(config, len(self.batches))
        self.steps = self.epoch = 0
        self.train_seconds, self.lowest_loss = 0.0, math.inf  # the lowest of the epochs' means
        # Sums over the steps of this epoch, kept on the device so that a step waits for nothing:
        # loss, penalty, the number of steps with a penalty, and the penalty's estimate of Tr(F).
        self.sums = torch.zeros(4, dtype=torch.float64, device=self.device)

    def _batches(self, purpose: str) -> Batches:
        """Return training batches; runs that differ in mixup alone have the same ones before mixing."""
        config = self.config
        mixup = None
        if config.mixup is not None:
            mixup = Mixup(config.mixup, classes=self.data.classes, seed=_seed(config.seed, f"{purpose} mixup"))
        return Batches(
            self.data.inputs,
            self.data.labels,
            batch_size=config.batch_size,
            augment=config.augment,
            seed=_seed(config.seed, purpose),
            mixup=mixup,
        )

    def _build_penalty(self) -> FisherPenalty | None:
        config = self.config
        if config.method == "baseline":
            return None
        return FisherPenalty(
            self.model,
            config.alpha,
            **PENALTIES[config.method],
            every=config.penalty_every,
            start=config.penalty_start * len(self.batches),
            reduction=config.penalty_reduction,  # type: ignore[arg-type]
            method=config.penalty_method,  # type: ignore[arg-type]
            gates=config.gates,  # type: ignore[arg-type]
            mixed=config.mixed,
            examples=config.penalty_examples,
            generator=torch.Generator(self.device).manual_seed(_seed(config.seed, "labels")),
            graphs=config.graphs == "on",
            verify=VERIFY,
        )

    @property
    def epoch_complete(self) -> bool:
        """Whether all steps of the current epoch have been taken."""
        return self.steps == (self.epoch + 1) * len(self.batches)

    @property
    def measurement_due(self) -> bool:
        """Whether ``config.measure_every`` asks for a measurement after the step just taken."""
        return self.config.measure != "none" and self.steps % self.steps_between_measurements == 0

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
        if self.plain is not None:
            loss = self.plain.backward(inputs, labels)
        elif self.penalty is None:
            loss = F.cross_entropy(self.model(inputs), labels)
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            try:
                loss = self.penalty.backward(inputs, labels)
            except ValueError:
                # No label can be drawn from logits that are not finite.
                self._check_logits(inputs)
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

    def finish_step(self) -> Record:
        """Return the record of the step just taken; empty unless it ends an epoch or a measurement is due.

        ``step`` is the number of steps taken so far, ``measure_seconds`` the time the whole record took; the rest is
        described at :meth:`finish_epoch`, :meth:`measure` and :meth:`measure_at_thresholds`.

        Raises:
            TrainingDivergedError: if the loss, the logits or a measurement are not finite.
        """
        due = self.measurement_due
        if not (due or self.epoch_complete):
            return {}
        waiting = time.perf_counter()
        self.sums.tolist()  # on a GPU the steps only end when their sums arrive
        started = time.perf_counter()
        self.train_seconds += started - waiting
        measured = self.measure(measurements(self.config.measure)) if due else {}
        ended: Record = {}
        if self.epoch_complete:
            measured |= self.measure_at_thresholds(measured)
            ended = self.finish_epoch()
        return {"step": self.steps, **ended, **measured, "measure_seconds": time.perf_counter() - started}

    def finish_epoch(self) -> Record:
        """Start the next epoch and return the record of the one that ended.

        ``train_loss``, ``penalty`` (‖g‖²) and ``penalty_trace_estimate`` (for FP B‖g‖², an estimate of Tr(F)) are
        means over the epoch's steps, ``train_seconds`` is the time of the steps alone; the accuracies are those at its
        end, see ``accuracies``, with the statistics of batch normalisation averaged over ``config.bn_batches``. What
        does not exist, such as the penalty of a baseline, is None, and so are the accuracies between two tests.

        Raises:
            TrainingDivergedError: if the loss or the logits are not finite.
        """
        loss, penalty, penalised, trace_estimate = self.sums.tolist()
        self._check(math.isfinite(loss))
        self._check_logits(self.data.inputs[: self.config.batch_size])
        self.epoch += 1
        tested: dict[str, float | None] = dict.fromkeys(ACCURACIES)
        if self.epoch % self.config.test_every == 0 or self.epoch == self.config.epochs:
            with self._testing():
                tested = accuracies(self.model, self.data)
        record: Record = {
            "epoch": self.epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": loss / len(self.batches),
            **tested,
            "penalty": penalty / penalised if penalised else None,
            "penalty_trace_estimate": trace_estimate / penalised if trace_estimate else None,
            "train_seconds": self.train_seconds,
        }
        self.sums.zero_()
        self.train_seconds = 0.0
        return record

    @contextmanager
    def _testing(self) -> Iterator[None]:
        """Let batch normalisation, where there is any, use statistics over batches made as training's are."""
        count = self.config.bn_batches
        if self.config.network not in NORMALISED_NETWORKS or count == 0:
            yield
            return
        batches = self._batches(f"batch statistics {self.steps}")
        with averaged_batch_statistics(self.model, (batches.next()[0] for _ in range(count))):
            yield

    def predictions(self) -> Tensor:
        """Return the probabilities p(y|x) of the test examples, float16 ``[N, classes]``, on the CPU.

        They are those of the network as it is tested, see :meth:`finish_epoch`.
        """
        with self._testing():
            return predict_probabilities(self.model, self.data.test_inputs).cpu()

    def _check_logits(self, inputs: Tensor) -> None:
        with eval_mode(self.model), torch.no_grad():
            self._check(all(bool(self.model(part).isfinite().all()) for part in torch.split(inputs, 500)))

    def _check(self, finite: bool) -> None:
        if not finite:
            remedy = "a lower --lr" if self.penalty is None else "a lower --lr or --alpha"
            raise TrainingDivergedError(f"training diverged in epoch {self.epoch + 1}: try {remedy}")

    def measure_at_thresholds(self, measured: Record) -> Record:
        """Return Tr(F) for each of ``config.trace_thresholds`` that this epoch's mean loss is the first to be below.

        ``trace_fisher_below_<threshold>`` and its standard error: what the paper calls Tr(F_i). It is what was
        ``measured`` at this step, if Tr(F) was.

        Raises:
            TrainingDivergedError: if the logits or the trace are not finite.
        """
        loss = self.sums[0].item() / len(self.batches)
        crossed = [each for each in self.config.trace_thresholds if loss < each <= self.lowest_loss]
        self.lowest_loss = min(self.lowest_loss, loss)
        if not crossed:
            return {}
        trace = measured if "trace_fisher" in measured else self.measure(("trace_fisher",))
        ends = ("", "_standard_error")
        return {f"{BELOW}{threshold}{end}": trace[f"trace_fisher{end}"] for threshold in crossed for end in ends}

    def measure(self, names: Sequence[str]) -> Record:
        """Take the measurements with these names, all on the same ``trace_samples`` random training examples.

        See ``fastfisher.training.measurements``; ``<measurement>_seconds`` is the time of each. Their generators are
        seeded anew each time, from the run's seed, the step and the measurement's name: measuring changes nothing in
        training, no measurement changes another, and a resumed run needs nothing from the checkpoint.

        Raises:
            TrainingDivergedError: if the logits or a measurement are not finite.
        """

        def generator(purpose: str) -> torch.Generator:
            return torch.Generator(self.device).manual_seed(_seed(self.config.seed, f"{purpose} {self.steps}"))

        order = torch.randperm(len(self.data.labels), generator=generator("examples"), device=self.device)
        chosen = order[: self.config.trace_samples]
        data = self.data
        examples = Examples(data.inputs[chosen], data.labels[chosen], data.noisy[chosen], self.config.batch_size)
        record: Record = {}
        for name in names:
            started = time.perf_counter()
            try:
                found = MEASURE[name](self.model, examples, generator(name))
            except ValueError:
                self._check_logits(examples.inputs)
                raise
            self._check(all(math.isfinite(value) for value in found.values() if isinstance(value, float)))
            record |= found
            record[f"{name}_seconds"] = time.perf_counter() - started
        return record

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
            "lowest_loss": self.lowest_loss,
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
        self.steps, self.epoch, self.train_seconds = (state[name] for name in ("steps", "epoch", "train_seconds"))
        self.sums.copy_(state["sums"])
        # Checkpoints made before there were thresholds do not have it, nor need it.
        self.lowest_loss = state.get("lowest_loss", math.inf)


def _seed(seed: int, purpose: str) -> int:
    """Return a seed of its own for each purpose, so that no two of them share a random stream."""
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1

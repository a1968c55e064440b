"""How long a run will take, from a few steps of its network."""

from __future__ import annotations

import time

import torch
from torch.nn import functional as F

from fastfisher.training.config import (
    IMAGE_SIZES,
    NORMALISED_NETWORKS,
    OTHER_IMAGE_SIZE,
    TrainConfig,
    measurements,
    resolve,
    steps_between_measurements,
)
from fastfisher.training.networks import build_network

# Examples for training, validation and testing, channels and classes of each data set.
SHAPES = {
    "digits": (1_097, 200, 500, 1, 10),
    "fashion": (55_000, 5_000, 10_000, 1, 10),
    "cifar10": (45_000, 5_000, 10_000, 3, 10),
    "cifar100": (45_000, 5_000, 10_000, 3, 100),
    "tinyimagenet": (100_000, 0, 10_000, 3, 200),
    "imagenet": (1_281_167, 0, 50_000, 3, 1_000),
}

# Costs in units of a plain step on the same examples; bench/results/ has the measurements that they are taken from.
PENALISED_STEP = 1.7
DOUBLE_BACKPROP = 2.1
INPUT_PENALISED_STEP = 1.0
FORWARD = 0.35
MEASURED = {"trace_hessian": 6.0, "top_eigenvalue": 60.0}
OTHER_MEASURED = 1.2
START = 1.0  # seconds

BATCH = 16
STEPS = 3


class Estimate:
    """Times each network once, on random images of its data set's shape."""

    def __init__(self, device: str) -> None:
        """Estimate for ``device``, as ``--device`` names it."""
        self.device = device
        self.timed: dict[tuple[str, str, int], float] = {}

    def seconds(self, config: TrainConfig) -> float:
        """Return roughly how long a run takes, its measurements and tests included."""
        count, *evaluated = SHAPES[config.data][:3]
        count = min(count, config.examples or count)
        limits = (*config.evaluate, *evaluated[len(config.evaluate) :])
        tested = sum(map(min, evaluated, limits))
        per_example = self._per_example(config)
        steps = count // config.batch_size
        penalised = config.penalty_examples or config.batch_size
        penalty = 0.0
        if config.method != "baseline":
            cost = INPUT_PENALISED_STEP if config.method == "GP_x" else PENALISED_STEP
            cost = DOUBLE_BACKPROP if config.penalty_method == "double_backprop" else cost
            share = max(0, config.epochs - config.penalty_start) / config.epochs
            penalty = cost * penalised * share / config.penalty_every
        training = config.epochs * steps * (config.batch_size + penalty)
        normalised = config.bn_batches * config.batch_size if config.network in NORMALISED_NETWORKS else 0
        testing = FORWARD * config.epochs * (count + tested + normalised)
        measuring = 0.0
        names = measurements(config.measure)
        if names:
            times = config.epochs * steps // steps_between_measurements(config, steps)
            cost = sum(MEASURED.get(name, OTHER_MEASURED) for name in names)
            measuring = times * cost * min(config.trace_samples, count)
        return START + per_example * (training + testing + measuring)

    def _per_example(self, config: TrainConfig) -> float:
        """Return the seconds of a plain step for each of its examples, the least of a few."""
        size = config.image_size or IMAGE_SIZES.get(config.data, OTHER_IMAGE_SIZE)
        key = (config.network, config.data, size)
        if key not in self.timed:
            device = torch.device(resolve(TrainConfig(device=self.device)).device)
            *_, channels, classes = SHAPES[config.data]
            model = build_network(config.network, in_channels=channels, image_size=size, classes=classes).to(device)
            inputs = torch.randn(BATCH, channels, size, size, device=device)
            labels = torch.randint(classes, (BATCH,), device=device)
            times = []
            for _ in range(STEPS):
                started = time.perf_counter()
                F.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times.append(time.perf_counter() - started)
            self.timed[key] = min(times) / BATCH
        return self.timed[key]

"""What a training run is: every option, its default, its help and what it may be."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastfisher.training.rules import (
    AT_LEAST_8,
    AT_LEAST_ONE,
    AT_LEAST_ZERO,
    BELOW_ONE,
    DECREASING,
    FRACTION,
    INCREASING,
    NON_NEGATIVE,
    ONE_OR_TWO,
    POSITIVE,
    SEED,
    Rule,
)

T = TypeVar("T")

METHODS = ("baseline", "FP", "GP", "GP_r", "GP_x")
DATA_SETS = ("digits", "fashion", "cifar10", "cifar100", "tinyimagenet", "imagenet")
DOWNLOADED = ("fashion", "cifar10", "cifar100")
IMAGE_SIZES = {"digits": 16, "fashion": 28, "imagenet": 224}
OTHER_IMAGE_SIZE = 32
NETWORKS = (
    *("small_cnn", "simple_cnn", "vgg11", "densenet40_12", "wresnet44_3", "wresnet44_3_bn"),
    *("resnet26", "resnet32", "resnet50", "resnet52", "resnet56", "fixup_resnet18"),
    *("small_simple_cnn", "small_vgg11", "small_fixup_resnet10"),
    *("densenet7_12", "wresnet8_1", "wresnet8_1_bn", "resnet8", "resnet14"),
)
NORMALISED_NETWORKS = tuple(name for name in NETWORKS if "densenet" in name or name.endswith("_bn"))
AUGMENTATIONS = ("none", "flip", "crop", "crop_flip")
MEASUREMENTS = (
    *("trace_fisher", "trace_hessian", "per_example_grad_norms", "top_eigenvalue", "gradient_covariance"),
    *("noisy_gradients", "trace_fisher_batch", "minibatch_covariance", "accuracy"),
)
INTERVAL = re.compile(r"([1-9][0-9]*)(step|epoch)s?")


class ConfigError(ValueError):
    """An option that cannot be used; the message names the option, the value and what was expected."""


NAMED_MEASUREMENTS = Rule(
    f"none, or some of {', '.join(MEASUREMENTS)}, each once, separated by commas",
    lambda value: sorted(set(measurements(value)) & set(MEASUREMENTS)) == sorted(measurements(value)),
)
AN_INTERVAL = Rule(
    "a number above 0 and its unit, such as 1epoch or 50steps", lambda value: INTERVAL.fullmatch(value) is not None
)


def _option(
    default: T, help: str, *, choices: Sequence[str] | None = None, rule: Rule | None = None, identity: bool = True
) -> T:
    """Return a dataclass field; ``identity=False`` marks options that a resumed run may change."""
    return field(default=default, metadata={"help": help, "choices": choices, "rule": rule, "identity": identity})


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Every field is an option of ``fastfisher train``."""

    out: str = _option("runs/train", "folder the run is written to", identity=False)
    resume: bool = _option(False, "continue the run in --out; options not given are read from there", identity=False)
    data: str = _option("digits", "data set; digits comes with scikit-learn", choices=DATA_SETS)
    data_dir: str = _option("data", "folder that holds the data set's files", identity=False)
    download: bool = _option(
        False,
        f"fetch the data set ({', '.join(DOWNLOADED)}) into --data-dir where it is not there yet, by torchvision and "
        "with its checksums",
        identity=False,
    )
    examples: int | None = _option(
        None,
        "train on only this many of the training examples, spread evenly over the data set's order; all of them "
        "unless given",
        rule=AT_LEAST_ONE,
    )
    evaluate: tuple[int, ...] = _option(
        (),
        "evaluate on this many of the validation examples and, where a second number is given, on that many of the "
        "test examples, spread as those of --examples; all of them unless given",
        rule=ONE_OR_TWO,
    )
    image_size: int | None = _option(
        None,
        "images are resized to this many pixels a side; 16 for digits, 28 for fashion, 224 for imagenet, else 32",
        rule=AT_LEAST_8,
    )
    augment: str = _option(
        "none",
        "flip: horizontal flips; crop: random crops after padding by 4, on images below 32 by an eighth of their size; "
        "crop_flip: both",
        choices=AUGMENTATIONS,
    )
    mixup: float | None = _option(
        None,
        "mix each batch with itself in another order, inputs and labels, with a weight drawn from "
        "Beta(MIXUP, MIXUP); the penalties then see the mixed inputs, GP and GP_x the mixed labels too",
        rule=POSITIVE,
    )
    label_noise: float = _option(0.0, "fraction of the training labels replaced by uniformly drawn ones", rule=FRACTION)
    noise_seed: int | None = _option(None, "seed of the label noise; --seed unless given", rule=SEED)
    network: str = _option(
        "small_cnn",
        "network; DenseNets and those that end in _bn have batch normalisation; the second row of them is for digits",
        choices=NETWORKS,
    )
    start_from: str | None = _option(
        None,
        "folder of a run; begin with the weights in its checkpoint, and nothing else of it, instead of random ones",
    )
    bn_batches: int = _option(
        100,
        "training batches over which the statistics of batch normalisation are averaged before each test; training "
        "keeps its own, which serve in testing too where this is 0",
        rule=AT_LEAST_ZERO,
    )
    test_every: int = _option(
        1,
        "epochs from one test (the accuracies on all parts of the data) to the next; the last epoch is always tested",
        rule=AT_LEAST_ONE,
    )
    method: str = _option(
        "baseline",
        "penalty: FP (sampled labels), GP (true labels), GP_r (uniform labels), GP_x (input gradient)",
        choices=METHODS,
    )
    alpha: float = _option(0.1, "coefficient of the penalty", rule=POSITIVE)
    penalty_every: int = _option(10, "steps between two computations of the penalty's gradient", rule=AT_LEAST_ONE)
    penalty_start: int = _option(0, "epochs trained before the penalty is switched on", rule=AT_LEAST_ZERO)
    penalty_method: str = _option(
        "finite_difference", "how the penalty is differentiated", choices=("finite_difference", "double_backprop")
    )
    gates: str = _option(
        "frozen",
        "finite differences: keep the ReLU and max-pool gates of the first forward, or let them move",
        choices=("frozen", "free"),
    )
    mixed: bool = _option(False, "finite differences: share one backward with the training loss")
    penalty_examples: int | None = _option(
        None, "the penalty uses this many examples of each batch; all of them unless given", rule=AT_LEAST_ONE
    )
    penalty_reduction: str = _option(
        "batch",
        "gradient that is penalised: of the batch's mean loss, or of its first example's (eq. 6)",
        choices=("batch", "first"),
    )
    epochs: int = _option(30, "passes over the training set", rule=AT_LEAST_ONE)
    batch_size: int = _option(128, "examples in a batch; an incomplete last batch is dropped", rule=AT_LEAST_ONE)
    lr: float = _option(0.05, "learning rate", rule=POSITIVE)
    momentum: float = _option(0.9, "momentum", rule=BELOW_ONE)
    weight_decay: float = _option(0.0, "weight decay", rule=NON_NEGATIVE)
    lr_milestones: tuple[int, ...] = _option(
        (), "epochs after which the learning rate is multiplied by --lr-decay", rule=INCREASING
    )
    lr_decay: float = _option(0.1, "factor applied at each of --lr-milestones", rule=POSITIVE)
    measure: str = _option(
        "trace_fisher",
        "what is measured on the way, separated by commas: trace_fisher, trace_hessian, per_example_grad_norms (of "
        "clean and of noisy examples, and how well they tell them apart), top_eigenvalue (of the Hessian), "
        "gradient_covariance (of single examples: trace, largest and smallest eigenvalue), noisy_gradients (norms "
        "of the mean gradients of clean and of noisy examples, and their cosine), trace_fisher_batch (Tr(F_B), of one "
        "batch), minibatch_covariance (of batches' gradients), accuracy (and loss, of what is measured); or none",
        rule=NAMED_MEASUREMENTS,
    )
    measure_every: str = _option("1epoch", "how often: 1epoch, 5epochs, 50steps", rule=AN_INTERVAL)
    trace_samples: int = _option(
        256, "training examples, chosen at random each time, that --measure looks at", rule=AT_LEAST_ONE
    )
    save_predictions: bool = _option(
        False, "with each measurement also write the probabilities of the test examples, to predictions/<step>.npy"
    )
    trace_thresholds: tuple[float, ...] = _option(
        (),
        "also measure Tr(F) after the first epoch whose training loss is below each of these: Tr(F_i) of section 3",
        rule=DECREASING,
    )
    seed: int = _option(0, "seed of the initial weights, the batches and the sampled labels", rule=SEED)
    threads: int = _option(0, "CPU threads; 0 leaves PyTorch's choice", rule=AT_LEAST_ZERO)
    graphs: str = _option(
        "auto", "CUDA graphs: capture a step once and replay it; auto does so on a GPU", choices=("auto", "on", "off")
    )
    device: str = _option("auto", "auto, cpu, cuda or cuda:N; auto takes the GPU where there is one")


def flag(name: str) -> str:
    """Return the option's name on the command line: ``lr_decay`` is ``--lr-decay``."""
    return "--" + name.replace("_", "-")


def measurements(measure: str) -> tuple[str, ...]:
    """Return the names in a value of ``--measure``."""
    return () if measure == "none" else tuple(name.strip() for name in measure.split(","))


def steps_between_measurements(config: TrainConfig, steps_per_epoch: int) -> int:
    """Return ``measure_every`` in steps.

    Raises:
        ConfigError: if the run is over before the first measurement.
    """
    interval = INTERVAL.fullmatch(config.measure_every)
    assert interval is not None
    steps = int(interval[1]) * (steps_per_epoch if interval[2] == "epoch" else 1)
    if steps > config.epochs * steps_per_epoch:
        raise ConfigError(
            f"--measure-every: got {config.measure_every}, expected at most the run's {config.epochs} epochs or "
            f"{config.epochs * steps_per_epoch} steps"
        )
    return steps


def from_values(values: Mapping[str, Any]) -> TrainConfig:
    """Build a configuration from parsed options or from the contents of a config.json.

    Raises:
        ConfigError: for a name that is not an option, or a value of another type than the option's.
    """
    hints = typing.get_type_hints(TrainConfig)
    for name in values:
        if name not in hints:
            raise ConfigError(f"{flag(name)}: unknown option, expected one of {', '.join(map(flag, sorted(hints)))}")
    fields: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in values.items()}
    for name, value in fields.items():
        if not _has_type(value, hints[name]):
            kind = getattr(hints[name], "__name__", str(hints[name]))
            raise ConfigError(f"{flag(name)}: got {value!r}, expected {kind}")
    return TrainConfig(**fields)


def _has_type(value: Any, hint: Any) -> bool:
    """Return whether an option's value is of its type; an integer serves as a float, a boolean as neither."""
    if isinstance(hint, types.UnionType):
        return any(_has_type(value, each) for each in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_has_type(item, typing.get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is hint


def to_values(config: TrainConfig) -> dict[str, Any]:
    """Return every option as a JSON-ready value: what :func:`from_values` takes."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(config).items()
    }


def differences(config: TrainConfig, other: TrainConfig) -> list[str]:
    """Return the names of the options that decide what is computed and are not the same in both."""
    return [
        option.name
        for option in dataclasses.fields(TrainConfig)
        if option.metadata["identity"] and getattr(config, option.name) != getattr(other, option.name)
    ]


def resolve(config: TrainConfig) -> TrainConfig:
    """Check every option and fill in the defaults that depend on another option or on the machine.

    Touches nothing on disk: the data folder and the output folder are only looked at by those who use them.

    Raises:
        ConfigError: naming the option, its value and what was expected.
    """
    for option in dataclasses.fields(config):
        _check_option(option, getattr(config, option.name))
    _check_combinations(config)
    _check_data_dir(config)
    device = _resolve_device(config.device)
    if config.graphs == "on" and not device.startswith("cuda"):
        raise ConfigError(f"--graphs: got on, expected auto or off with --device {device}: graphs are for a GPU")
    return dataclasses.replace(
        config,
        graphs="on" if device.startswith("cuda") and config.graphs != "off" else "off",
        image_size=config.image_size or IMAGE_SIZES.get(config.data, OTHER_IMAGE_SIZE),
        noise_seed=config.seed if config.noise_seed is None else config.noise_seed,
        device=device,
        # --resume compares these as they are written: give each meaning one spelling.
        start_from=None if config.start_from is None else str(Path(config.start_from)),
        measure=",".join(name for name in MEASUREMENTS if name in measurements(config.measure)) or "none",
        measure_every=re.sub("s$", "", config.measure_every),
    )


def _check_data_dir(config: TrainConfig) -> None:
    """Check that there may be data; those who read a data set look for its files."""
    if config.download and config.data not in DOWNLOADED:
        raise ConfigError(
            f"--download: got True, expected it left out with --data {config.data}: torchvision fetches "
            f"{', '.join(DOWNLOADED)} alone"
        )
    # Debian's package has a folder of its own for Fashion-MNIST.
    absent = config.data not in ("digits", "fashion") and not Path(config.data_dir).is_dir()
    if absent and not config.download:
        raise ConfigError(
            f"--data-dir: got {config.data_dir!r}, expected an existing folder with {config.data}"
            + (", or --download to fetch it" if config.data in DOWNLOADED else "")
        )


def _check_option(option: dataclasses.Field[Any], value: Any) -> None:
    choices: Sequence[str] | None = option.metadata["choices"]
    rule: Rule | None = option.metadata["rule"]
    if choices is not None and value not in choices:
        raise ConfigError(f"{flag(option.name)}: got {value!r}, expected one of {', '.join(choices)}")
    if rule is not None and value is not None and not rule.holds(value):
        raise ConfigError(f"{flag(option.name)}: got {value}, expected {rule.expected}")


FINITE_DIFFERENCE_ONLY = ("gates", "mixed")
PENALTY_ONLY = (
    *("alpha", "penalty_every", "penalty_start", "penalty_method", "penalty_examples", "penalty_reduction"),
    *FINITE_DIFFERENCE_ONLY,
)


def _check_combinations(config: TrainConfig) -> None:
    none, first = config.measure == "none", config.penalty_reduction == "first"
    # If the first holds, the options have to be left out, for this reason.
    unused: tuple[tuple[bool, Sequence[str], str], ...] = (
        (none, ("measure_every", "save_predictions"), "--measure none measures nothing"),
        (none and not config.trace_thresholds, ("trace_samples",), "--measure none measures nothing"),
        (
            config.network not in NORMALISED_NETWORKS,
            ("bn_batches",),
            f"--network {config.network} has no batch normalisation",
        ),
        (config.method == "baseline", PENALTY_ONLY, "--method baseline has no penalty"),
        (
            config.penalty_method == "double_backprop",
            FINITE_DIFFERENCE_ONLY,
            "--penalty-method double_backprop takes no finite difference",
        ),
        (first, ("penalty_examples",), "--penalty-reduction first uses one example"),
    )
    defaults = TrainConfig()
    for applies, names, reason in unused:
        for name in names:
            value = getattr(config, name)
            if applies and value != getattr(defaults, name):
                raise ConfigError(f"{flag(name)}: got {value}, expected it left out: {reason}")
    whole_batch = config.penalty_every == 1 and config.penalty_examples is None and not first
    if config.mixed and (not whole_batch or config.method == "GP_x"):
        raise ConfigError(
            "--mixed: got True, expected --penalty-every 1 and the gradient in the parameters (not GP_x) of the "
            "whole batch, because both gradients are taken in one backward"
        )
    if config.mixed and config.gates == "free":
        raise ConfigError("--gates: got free, expected frozen with --mixed, which cannot adapt the step of free gates")
    if config.penalty_examples is not None and config.penalty_examples > config.batch_size:
        raise ConfigError(
            f"--penalty-examples: got {config.penalty_examples}, expected at most --batch-size {config.batch_size}"
        )
    if config.method != "baseline" and config.penalty_start >= config.epochs:
        raise ConfigError(
            f"--penalty-start: got {config.penalty_start}, expected an epoch before --epochs {config.epochs}"
        )


def _resolve_device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device: got {name!r}, expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device: got {name!r}, expected one of the {torch.cuda.device_count()} GPUs present")
    return name

"""The settings that several experiments share, at both scales: section 3, sections I.2 to I.4, and digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastfisher.paper.cases import Case, Key, Scale, Tuned, case, tuned

METHODS = ("GP_x", "GP", "FP", "GP_r")
COLUMNS = ("η*", "baseline", *METHODS)


def logspace(first: float, last: float, count: int) -> tuple[float, ...]:
    """Return values evenly spaced on a logarithmic scale, with four digits."""
    ratio = (last / first) ** (1 / (count - 1))
    return tuple(float(f"{first * ratio**index:.4g}") for index in range(count))


# ---- section 4: learning rates, penalties and noisy labels -----------------------------------------------------------

LEARNING_RATES = logspace(1e-2, 1e0, 5)
COEFFICIENTS = (1e-3, 1e-1)
"""The range of α for FP, GP and GP_r: [0.1 v, 10 v] with v = 0.01."""
GP_X_COEFFICIENTS = (1e-1, 1e1)
"""The paper says of v only that it had to be larger in some experiments: v = 1 is ours."""

DIGITS: Mapping[str, Any] = {
    "data": "digits",
    "examples": 300,
    "label_noise": 0.25,
    "batch_size": 16,
    "epochs": 24,
}
HOW_DIGITS_WERE_CHOSEN = (
    "300 training examples, 200 for validation, 300 for testing, of 8x8 pixels; 12x12 for SimpleCNN and 16x16 for "
    "VGG-11 and the Fixup ResNet, whose poolings need it. A quarter of the training labels is noise, unless another "
    "share is named: clean digits are learnt without memorising any, so that nothing that limits memorising could "
    "show. Batches of 16; 20 epochs, 360 steps, in section 4 and 24, 432 steps, elsewhere, so that everything takes "
    "less than an hour on two cores and nothing more than six minutes; no drops of the learning rate in section 4, "
    "because learning ends with them. Chosen beforehand by validation accuracy on seeds 1000 and 1001, which are in "
    "no report: the learning rates that are tried for η* (of 0.0033 to 0.3), the values of α (for GP_x ten times as "
    "large; without batch normalisation smaller, for there the larger ones keep the networks from learning), and how "
    "many times smaller the small learning rate is: the paper's 10 with batch normalisation, and 1.78 without, where "
    "with a tenth, or a third, the networks do not fit the training examples in so few steps. Moved after first runs,"
    " in which some networks had hardly begun to learn by the end (judged by training accuracy, not by the claims): "
    "the learning rates and batch sizes that figures 2, 6, 7, 14, 19 and 20 compare, and, by validation on those two "
    "seeds, the learning rates tried for η* and the values of α without batch normalisation."
)

# What all of section 4 has in common. Tr(F) is measured on as many examples as a batch has (I.2), at digits on more,
# where a test of all 800 examples costs as much as half an epoch.
COMMON: Mapping[Scale, Mapping[str, Any]] = {
    "paper": {"batch_size": 128, "epochs": 300, "trace_samples": 128},
    "digits": {**DIGITS, "epochs": 20, "trace_samples": 64, "test_every": 3},
}


@dataclass(frozen=True)
class Setting:
    """A row of table 1.

    Attributes:
        name: as in the table.
        paper, digits: options at either scale, beside :data:`COMMON`.
        digits_rates: learning rates that are tried for η* at digits.
        divisor, digits_divisor: how many times smaller than η* the small learning rate is.
        digits_coefficients: values of α that are tried at digits, for GP_x ten times as large.
        coefficients: how many are tried at the paper's scale.
    """

    name: str
    paper: Mapping[str, Any]
    digits: Mapping[str, Any]
    digits_rates: tuple[float, ...]
    divisor: float = 10.0
    digits_divisor: float = 10.0
    digits_coefficients: tuple[float, ...] = (0.01, 0.1)
    coefficients: int = 10

    def base(self, scale: Scale) -> Case:
        """Return the setting without a learning rate."""
        return case({**COMMON[scale], **(self.paper if scale == "paper" else self.digits)})


WRESNET_TINY = Setting(
    "WResNet / TinyImageNet",
    {
        "network": "wresnet44_3_bn",
        "data": "tinyimagenet",
        "augment": "crop_flip",
        "weight_decay": 1e-4,
        "lr_milestones": (150, 225),
    },
    {"network": "wresnet8_1_bn", "image_size": 8, "augment": "crop", "weight_decay": 1e-4, "bn_batches": 10},
    digits_rates=(0.0562, 0.1),
    divisor=30.0,
    coefficients=5,
)
DENSENET = Setting(
    "DenseNet / CIFAR-100",
    {"network": "densenet40_12", "data": "cifar100", "weight_decay": 1e-4, "lr_milestones": (150, 225)},
    {"network": "densenet7_12", "image_size": 8, "weight_decay": 1e-4, "bn_batches": 10},
    digits_rates=(0.0562, 0.1),
)
VGG = Setting(
    "VGG-11 / CIFAR-100",
    {
        "network": "vgg11",
        "data": "cifar100",
        "weight_decay": 1e-4,
        "lr_milestones": (80, 120, 160, 200, 240, 280),
    },
    {"network": "small_vgg11", "image_size": 16, "weight_decay": 1e-4},
    digits_rates=(0.0178, 0.0251),
    digits_divisor=1.778,
    digits_coefficients=(0.001, 0.003),
)
WRESNET = Setting(
    "WResNet / CIFAR-100",
    {"network": "wresnet44_3", "data": "cifar100", "weight_decay": 1e-3, "lr_milestones": (150, 225)},
    {"network": "wresnet8_1", "image_size": 8, "weight_decay": 1e-3},
    digits_rates=(0.0316, 0.0562),
    digits_divisor=1.778,
    digits_coefficients=(0.003, 0.01),
)
SIMPLE_CNN = Setting(
    "SimpleCNN / CIFAR-10",
    {"network": "simple_cnn", "data": "cifar10", "lr_milestones": (150, 225)},
    {"network": "small_simple_cnn", "image_size": 12},
    digits_rates=(0.0178, 0.0316),
    digits_divisor=1.778,
    digits_coefficients=(0.001, 0.003),
)
SETTINGS = (WRESNET_TINY, DENSENET, VGG, WRESNET, SIMPLE_CNN)


def best_rate(setting: Setting, base: Case, scale: Scale) -> Tuned:
    """Return the learning rate η*: the best of a grid without a penalty."""
    return Tuned("lr", LEARNING_RATES if scale == "paper" else setting.digits_rates, base)


def coefficients(setting: Setting, method: str, scale: Scale) -> tuple[float, ...]:
    """Return the values of α that are tried for a method."""
    if scale == "digits":
        return tuple(round(10 * a, 9) if method == "GP_x" else a for a in setting.digits_coefficients)
    return logspace(*(GP_X_COEFFICIENTS if method == "GP_x" else COEFFICIENTS), setting.coefficients)


def table_1(setting: Setting, scale: Scale) -> dict[str, Case]:
    """Return the cases of a row of table 1: η*, the small learning rate, and that with each penalty."""
    base = setting.base(scale)
    optimal = best_rate(setting, base, scale)
    small = base.but(lr=optimal.times(1 / (setting.divisor if scale == "paper" else setting.digits_divisor)))
    penalised = {
        method: tuned("alpha", coefficients(setting, method, scale), small.but(method=method)) for method in METHODS
    }
    return {"η*": base.but(lr=optimal), "baseline": small, **penalised}


def table_1_cases(scale: Scale) -> dict[Key, Case]:
    """Return all of table 1."""
    return {(s.name, column): found for s in SETTINGS for column, found in table_1(s, scale).items()}


def table_1_notes(scale: Scale) -> list[str]:
    """Say how the runs of table 1 are made."""
    if scale == "paper":
        return [
            "η* is the best of 5 learning rates from 0.01 to 1, the small one a tenth of it, on TinyImageNet a "
            "thirtieth; α is the best of 10 values around 0.01, for GP_x around 1 (the paper does not say), on "
            "TinyImageNet of 5. The penalty's gradient is computed every 10 steps.",
            "TinyImageNet has no validation examples in the paper: what is tuned is judged on the test examples.",
        ]
    return [HOW_DIGITS_WERE_CHOSEN, "The penalty's gradient is computed every 10 steps."]


def digits_notes(scale: Scale) -> list[str]:
    """Say how digits were chosen, where that is the scale."""
    return [HOW_DIGITS_WERE_CHOSEN] if scale == "digits" else []


TABLE_2_COLUMNS = ("η*", "FP")


def table_2_cases(scale: Scale) -> dict[Key, Case]:
    """Return table 2: η* tuned with augmentation, and FP with it.

    Digits are cropped and not mirrored: a mirrored digit is another sign.
    """
    found: dict[Key, Case] = {}
    for setting in SETTINGS:
        base = setting.base(scale).but(augment="crop_flip" if scale == "paper" else "crop")
        optimal = base.but(lr=best_rate(setting, base, scale))
        found[setting.name, "η*"] = optimal
        found[setting.name, "FP"] = tuned("alpha", coefficients(setting, "FP", scale), optimal.but(method="FP"))
    return found


def table_2_notes(scale: Scale) -> list[str]:
    """Say how the runs of table 2 are made."""
    return [
        *table_1_notes(scale),
        "η* is tuned anew with augmentation, α at that learning rate."
        + (" Digits are cropped, with a padding of an eighth, not mirrored." if scale == "digits" else ""),
    ]


# ---- section 4.1: noisy labels ---------------------------------------------------------------------------------------

NOISY_METHODS = ("baseline", "mixup", "GP_x", "FP", "GP_r")
NOISE = (0.25, 0.5)
MIXUPS: Mapping[Scale, tuple[float, ...]] = {"paper": (0.4, 0.8, 1.6, 3.2, 6.4), "digits": (0.4, 1.6, 6.4)}
NOISY_FP = (0.01, 0.1, 0.31, 10.0)
NOISY_GP_X: Mapping[Scale, tuple[float, ...]] = {
    "paper": (10.0, 30.0, 100.0, 300.0, 1000.0),
    "digits": (0.1, 1.0, 10.0),
}
NOISY_ALPHAS = (0.01, 0.1, 1.0, 10.0)
"""Of figures 5, 11 and 12, whose captions say from 0.01 to 10."""

# ResNet-52 in table 3, ResNet-50 in figure 11, Wide ResNet in I.3: see build_network.
NOISY_NETWORKS: Mapping[str, Setting] = {"VGG-11 / CIFAR-100": VGG, "ResNet-52 / CIFAR-100": WRESNET}
NOISY_DIGITS = {"VGG-11 / CIFAR-100": (0.001, 0.003, 0.01), "ResNet-52 / CIFAR-100": (0.003, 0.01, 0.03)}
"""α at digits, tuned in table 3, each of them shown in figures 5, 11 and 12."""


def noisy(name: str, noise: float, scale: Scale) -> Case:
    """Return the setting of section 4.1 without a penalty: no weight decay, the learning rate tuned at that noise.

    Augmented at the paper's scale: that is not said, but FP at 25 % noise (60.2 %) is better there than anything in
    table 1 without augmentation (49.9 %), and worse than table 2 with it and clean labels (65.1 %).
    """
    setting = NOISY_NETWORKS[name]
    base = setting.base(scale).without("weight_decay").but(label_noise=noise, measure="trace_fisher,noisy_gradients")
    if scale == "paper":
        network = {"network": "resnet52"} if setting is WRESNET else {}
        base = base.but(augment="crop_flip", trace_samples=1_024, **network)
    else:
        base = base.but(measure_every="2epochs", test_every=2, trace_samples=256)
    return base.but(lr=Tuned("lr", LEARNING_RATES if scale == "paper" else setting.digits_rates, base, "best"))


def table_3_cases(scale: Scale, noises: Sequence[float]) -> dict[Key, Case]:
    """Return the rows of table 3 with some fractions of noise."""
    return {
        (f"{name}, {100 * noise:g} %", column): found
        for noise in noises
        for name in NOISY_NETWORKS
        for column, found in _table_3(name, noise, scale).items()
    }


def _table_3(name: str, noise: float, scale: Scale) -> dict[str, Case]:
    base = noisy(name, noise, scale)
    values = NOISY_FP if scale == "paper" else NOISY_DIGITS[name]
    grids = {"GP_x": NOISY_GP_X[scale], "FP": values, "GP_r": values}
    penalised = {method: tuned("alpha", grid, base.but(method=method), "best") for method, grid in grids.items()}
    found = {"baseline": base, "mixup": tuned("mixup", MIXUPS[scale], base, "best"), **penalised}
    return {column: found[column] for column in NOISY_METHODS}


def noisy_with_coefficients(name: str, scale: Scale, method: str = "FP") -> dict[str, Case]:
    """Return the runs of figures 5, 11 and 12: 25 % noise, without a penalty and with a method at each of several α."""
    base = noisy(name, 0.25, scale)
    values = NOISY_ALPHAS if scale == "paper" else NOISY_DIGITS[name]
    return {"baseline": base, **{f"{method} α={a:g}": base.but(method=method, alpha=a) for a in values}}


def noisy_notes(scale: Scale) -> list[str]:
    """Say how the runs of section 4.1 are made."""
    tuning = "η* is tuned without a penalty at that noise, then α and mixup's β; by the best validation epoch. "
    if scale == "paper":
        return [
            tuning
            + "No weight decay. The paper does not say whether there is augmentation: its numbers suggest it, and "
            "there is. ResNet-52 is a Wide ResNet of depth 50 and width 3 with SkipInit.",
        ]
    return [
        tuning + "No weight decay.",
        HOW_DIGITS_WERE_CHOSEN,
    ]


# ---- sections 3 and 5: ResNets without batch normalisation -----------------------------------------------------------

# By the name of a panel: the options of I.1, those at digits, the values of the paper and those at digits.
IMAGENET = {
    "network": "fixup_resnet18",
    "data": "imagenet",
    "batch_size": 256,
    "epochs": 50,
    "weight_decay": 1e-4,
    "lr_milestones": (29,),
    "trace_samples": 2_500,
    "trace_thresholds": (3.5,),
}
RESNET26 = {
    "network": "resnet26",
    "epochs": 200,
    "weight_decay": 1e-5,
    "lr_milestones": (60, 120, 170),
    "lr_decay": 0.5,
    "trace_samples": 5_000,
}
CIFAR10 = {**RESNET26, "data": "cifar10", "augment": "flip", "trace_thresholds": (1.2,)}
CIFAR100 = {**RESNET26, "data": "cifar100", "trace_thresholds": (3.5,)}
# Three networks stand for the three data sets; ε is where Tr(F) is about its largest.
SWEPT_DIGITS = {**DIGITS, "weight_decay": 1e-5, "lr_milestones": (12, 18), "lr_decay": 0.5, "trace_samples": 300}
DIGITS_NETWORKS: Mapping[str, Mapping[str, Any]] = {
    "imagenet": {**SWEPT_DIGITS, "network": "small_fixup_resnet10", "image_size": 16, "trace_thresholds": (1.8,)},
    "cifar10": {**SWEPT_DIGITS, "network": "resnet8", "image_size": 8, "trace_thresholds": (1.8,)},
    "cifar100": {**SWEPT_DIGITS, "network": "wresnet8_1", "image_size": 8, "trace_thresholds": (1.8,)},
}


def learning_rate_sweep(scale: Scale) -> dict[Key, Case]:
    """Return the runs of figures 2 and 8: three learning rates on each of three data sets, in ascending order."""
    if scale == "paper":
        rows = {
            "Fixup ResNet-18 / ImageNet": (case(IMAGENET), (0.001, 0.01, 0.1)),
            "ResNet-26 / CIFAR-10": (case(CIFAR10, batch_size=256), (0.007, 0.01, 0.05)),
            "ResNet-26 / CIFAR-100": (case(CIFAR100, batch_size=100), (0.001, 0.005, 0.01)),
        }
    else:
        rows = {
            "Fixup ResNet-10": (case(DIGITS_NETWORKS["imagenet"]), (0.0056, 0.01, 0.0178)),
            "ResNet-8": (case(DIGITS_NETWORKS["cifar10"]), (0.01, 0.0178, 0.0316)),
            "WResNet-8": (case(DIGITS_NETWORKS["cifar100"]), (0.0178, 0.0316, 0.0562)),
        }
    return {
        (row, f"lr {rate:g}"): base.but(lr=rate, measure="none")
        for row, (base, rates) in rows.items()
        for rate in rates
    }


def batch_size_sweep(scale: Scale) -> dict[Key, Case]:
    """Return the runs of figures 7 and 9: three batch sizes on each of two data sets, in ascending order."""
    if scale == "paper":
        rows = {
            "ResNet-26 / CIFAR-10": (case(CIFAR10, lr=0.02), (100, 500, 700)),
            "ResNet-26 / CIFAR-100": (case(CIFAR100, lr=0.02), (100, 300, 700)),
        }
    else:
        rows = {
            "ResNet-8": (case(DIGITS_NETWORKS["cifar10"], lr=0.0178), (4, 8, 16)),
            "WResNet-8": (case(DIGITS_NETWORKS["cifar100"], lr=0.0316), (4, 8, 16)),
        }
    return {
        (row, f"batch {size}"): base.but(batch_size=size, measure="none")
        for row, (base, sizes) in rows.items()
        for size in sizes
    }


@dataclass(frozen=True)
class Curvature:
    """The runs of section 5 on a data set: one option varies, from the least regularised to the most.

    Attributes:
        option: lr, or batch_size, of which the larger regularises less.
        levels: the least and the most regularised.
        measure_every: when Tr(H) is measured.
    """

    case: Case
    option: str
    levels: tuple[float, float]
    measure_every: str

    def levels_around(self) -> list[float]:
        """Return three values around each level: figure 14's fine scale."""
        if self.option == "lr":
            return [float(f"{factor * level:.4g}") for level in self.levels for factor in (0.8, 1.0, 1.2)]
        step = 20 if self.levels[-1] >= 100 else 2
        return [level + offset for level in self.levels for offset in (step, 0, -step)]


START_EPOCHS: Mapping[Scale, int] = {"paper": 20, "digits": 8}
CONTINUATIONS: Mapping[Scale, int] = {"paper": 8, "digits": 4}


def curvature(data: str, scale: Scale) -> Curvature:
    """Return the setting of I.4: batch sizes at learning rate 0.02 on CIFAR-10, learning rates on CIFAR-100."""
    if scale == "paper":
        base = case({**(CIFAR10 if data == "cifar10" else CIFAR100), "epochs": 250, "lr_milestones": (80, 150, 200)})
        base = base.without("trace_thresholds")
        if data == "cifar10":
            return Curvature(base.but(lr=0.02), "batch_size", (500, 100), "10epochs")
        return Curvature(base.but(batch_size=100), "lr", (0.001, 0.01), "10epochs")
    base = case(DIGITS_NETWORKS[data], trace_samples=128).without("trace_thresholds")
    if data == "cifar10":
        return Curvature(base.but(lr=0.0178), "batch_size", (20, 8), "2epochs")
    return Curvature(base, "lr", (0.0178, 0.0562), "2epochs")


# ---- supplements C, D, E and F: SimpleCNN ----------------------------------------------------------------------------


def large_rate(scale: Scale) -> Case:
    """Return SimpleCNN at η* on CIFAR-10."""
    return table_1(SIMPLE_CNN, scale)["η*"]


def small_rate(scale: Scale) -> Case:
    """Return SimpleCNN at the small learning rate."""
    return table_1(SIMPLE_CNN, scale)["baseline"]


RECOMPUTED: Mapping[Scale, tuple[float, ...]] = {"paper": logspace(1e-2, 1e0, 10), "digits": logspace(3e-3, 1e-1, 4)}
"""α of figure 16; at digits smaller ones: the small networks bear no more than a tenth."""
FIRST_EXAMPLE: Mapping[Scale, tuple[float, ...]] = {
    "paper": logspace(1e-4, 1e-2, 10),
    "digits": logspace(3e-4, 1e-2, 4),
}
"""α of figure 17, a hundredth of the others: the squared norm of one gradient is larger than that of a mean."""


def every(steps: int, scale: Scale) -> dict[Key, Case]:
    """Return FP at the small learning rate for several α, recomputed every so many steps."""
    base = small_rate(scale).but(method="FP", penalty_every=steps)
    return {(f"every {steps}" if steps > 1 else "every step", f"α={a:g}"): base.but(alpha=a) for a in RECOMPUTED[scale]}

"""The settings and numbers of the paper, copied from its text, beside what the experiments have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from fastfisher.paper.cases import Case, Key, Tuned
from fastfisher.paper.experiments import IDS, load
from fastfisher.training.config import TrainConfig

# ---- section I: what each network is trained with --------------------------------------------------------------------

FIELDS = ("network", "data", "augment", "batch_size", "weight_decay", "epochs", "lr_milestones", "lr_decay")
SETTINGS: dict[str, tuple[Any, ...]] = {
    # I.2, augmented or not as table 1 says.
    "WResNet/Tiny": ("wresnet44_3_bn", "tinyimagenet", "crop_flip", 128, 1e-4, 300, (150, 225), 0.1),
    "DenseNet": ("densenet40_12", "cifar100", "none", 128, 1e-4, 300, (150, 225), 0.1),
    "VGG-11": ("vgg11", "cifar100", "none", 128, 1e-4, 300, (80, 120, 160, 200, 240, 280), 0.1),
    "WResNet": ("wresnet44_3", "cifar100", "none", 128, 1e-3, 300, (150, 225), 0.1),
    "SimpleCNN": ("simple_cnn", "cifar10", "none", 128, 0.0, 300, (150, 225), 0.1),
    # Table 2.
    "DenseNet, augmented": ("densenet40_12", "cifar100", "crop_flip", 128, 1e-4, 300, (150, 225), 0.1),
    "VGG-11, augmented": ("vgg11", "cifar100", "crop_flip", 128, 1e-4, 300, (80, 120, 160, 200, 240, 280), 0.1),
    "WResNet, augmented": ("wresnet44_3", "cifar100", "crop_flip", 128, 1e-3, 300, (150, 225), 0.1),
    "SimpleCNN, augmented": ("simple_cnn", "cifar10", "crop_flip", 128, 0.0, 300, (150, 225), 0.1),
    # I.3: without weight decay. That there is augmentation is our reading.
    "VGG-11, noisy": ("vgg11", "cifar100", "crop_flip", 128, 0.0, 300, (80, 120, 160, 200, 240, 280), 0.1),
    "ResNet-52, noisy": ("resnet52", "cifar100", "crop_flip", 128, 0.0, 300, (150, 225), 0.1),
    # I.1. CIFAR-10 is flipped, the others are not augmented.
    "ImageNet": ("fixup_resnet18", "imagenet", "none", 256, 1e-4, 50, (29,), 0.1),
    **{
        f"ResNet-26/C10, batch {size}": ("resnet26", "cifar10", "flip", size, 1e-5, 200, (60, 120, 170), 0.5)
        for size in (100, 256, 500, 700)
    },
    **{
        f"ResNet-26/C100, batch {size}": ("resnet26", "cifar100", "none", size, 1e-5, 200, (60, 120, 170), 0.5)
        for size in (100, 300, 700)
    },
    # I.4 and A.4; figures 6 and 13 begin with 20 epochs and go on for the rest of the 250.
    **{
        f"curvature/C10, batch {size}": ("resnet26", "cifar10", "flip", size, 1e-5, 250, (80, 150, 200), 0.5)
        for size in (80, 100, 120, 480, 500, 520)
    },
    "curvature/C100": ("resnet26", "cifar100", "none", 100, 1e-5, 250, (80, 150, 200), 0.5),
    "20 epochs/C10, batch 100": ("resnet26", "cifar10", "flip", 100, 1e-5, 20, (), 0.5),
    "20 epochs/C10, batch 500": ("resnet26", "cifar10", "flip", 500, 1e-5, 20, (), 0.5),
    "20 epochs/C100": ("resnet26", "cifar100", "none", 100, 1e-5, 20, (), 0.5),
    "continued/C10": ("resnet26", "cifar10", "flip", 500, 1e-5, 230, (60, 130, 180), 0.5),
    "continued/C100": ("resnet26", "cifar100", "none", 100, 1e-5, 230, (60, 130, 180), 0.5),
    # D and E: the early phase. Batches of ten times 128; the others of figure 19 are our choice.
    **{
        f"every step, batch {size}": ("simple_cnn", "cifar10", "none", size, 0.0, 30, (), 0.1)
        for size in (128, 512, 1280)
    },
    "SimpleCNN, batch 1280": ("simple_cnn", "cifar10", "none", 1280, 0.0, 300, (150, 225), 0.1),
    # F: as CIFAR-10 in section 3, with the batches of the other two networks; the paper does not say.
    "ResNet-56": ("resnet56", "cifar10", "flip", 128, 1e-5, 200, (60, 120, 170), 0.5),
    # The talk gives no settings: these are ours.
    **{f"talk, batch {size}": ("resnet32", "cifar10", "flip", size, 1e-5, 20, (), 0.1) for size in (32, 128, 512)},
    "gradient descent": ("simple_cnn", "cifar10", "none", 5_000, 0.0, 3_000, (), 0.1),
    "SimpleCNN, 10 epochs": ("simple_cnn", "cifar10", "none", 128, 0.0, 10, (), 0.1),
}

TABLE_1 = ("WResNet/Tiny", "DenseNet", "VGG-11", "WResNet", "SimpleCNN")
TABLE_2 = (
    "WResNet/Tiny", "DenseNet, augmented", "VGG-11, augmented", "WResNet, augmented", "SimpleCNN, augmented"
)  # fmt: skip
RATES = ("ImageNet", "ResNet-26/C10, batch 256", "ResNet-26/C100, batch 100")
BATCHES = (
    *(f"ResNet-26/C10, batch {size}" for size in (100, 500, 700)),
    *(f"ResNet-26/C100, batch {size}" for size in (100, 300, 700)),
)
NOISY = ("VGG-11, noisy", "ResNet-52, noisy")
TRAINED: dict[str, tuple[str, ...]] = {
    "fig1": ("WResNet/Tiny",),
    "fig2": RATES,
    "fig3": ("WResNet", "SimpleCNN"),
    "fig4": ("WResNet", "VGG-11"),
    "fig5": ("VGG-11, noisy",),
    "fig6": ("20 epochs/C100", "continued/C100"),
    "fig7": BATCHES,
    "fig8": RATES,
    "fig9": BATCHES,
    "fig10": ("DenseNet", "SimpleCNN"),
    "fig11": ("ResNet-52, noisy",),
    "fig12": ("VGG-11, noisy",),
    "fig13": ("20 epochs/C10, batch 100", "20 epochs/C10, batch 500", "continued/C10"),
    "fig14": (*(f"curvature/C10, batch {size}" for size in (80, 100, 120, 480, 500, 520)), "curvature/C100"),
    "fig15": ("SimpleCNN",),
    "fig16": ("SimpleCNN",),
    "fig17": ("SimpleCNN",),
    "fig18": ("every step, batch 128",),
    "fig19": tuple(f"every step, batch {size}" for size in (128, 512, 1280)),
    "fig20": ("SimpleCNN", "SimpleCNN, batch 1280"),
    "fig21": ("DenseNet", "ResNet-56", "SimpleCNN"),
    "table1": TABLE_1,
    "table2": TABLE_2,
    "table3": NOISY,
    "table4": TABLE_1[1:],
    "table5": TABLE_1,
    "table6": TABLE_1,
    "table7": TABLE_2,
    "table8": NOISY,
    "table9": NOISY,
    "talk1": tuple(f"talk, batch {size}" for size in (32, 128, 512)),
    "talk2": ("gradient descent",),
    "talk3": ("SimpleCNN, 10 epochs",),
}
LABEL_NOISE: dict[str, tuple[float, ...]] = {
    **{name: (0.25,) for name in ("fig5", "fig11", "fig12", "table8", "table9")},
    "table3": (0.25, 0.5),
}


def cases_of(name: str) -> Mapping[Key, Case]:
    return load(name).cases("paper")


def with_tuning(cases: Iterable[Case]) -> set[Case]:
    """Return the cases and those that decide what is tuned in them."""
    waiting, found = list(cases), set()
    while waiting:
        case = waiting.pop()
        if case not in found:
            found.add(case)
            waiting += [each for each in (case.start,) if each is not None]
            waiting += [value.case for _, value in case.options if isinstance(value, Tuned)]
    return found


def config_of(case: Case) -> TrainConfig:
    return TrainConfig(**{name: value for name, value in case.options if not isinstance(value, Tuned)})


def setting_of(case: Case) -> tuple[Any, ...]:
    return tuple(getattr(config_of(case), field) for field in FIELDS)


@pytest.mark.parametrize("name", IDS)
def test_what_is_trained_at_the_papers_scale(name: str) -> None:
    assert set(map(setting_of, cases_of(name).values())) == {SETTINGS[each] for each in TRAINED[name]}
    for case in with_tuning(cases_of(name).values()):
        assert setting_of(case) in SETTINGS.values()
        config = config_of(case)
        # Gradient descent is without; everything else in the paper has 0.9.
        assert config.momentum == (0.0 if name == "talk2" else 0.9)
        assert config.penalty_every == 10 or name in ("fig16", "fig17", "fig20")
        assert config.bn_batches == 100
        assert (config.examples is None) == (name != "talk2")


@pytest.mark.parametrize("scale", ["digits", "paper"])
@pytest.mark.parametrize("name", IDS)
def test_labels_are_noisy_where_they_are_in_the_paper(name: str, scale: Any) -> None:
    cases = with_tuning(load(name).cases(scale).values())
    found = {config_of(case).label_noise for case in cases}
    # At digits a quarter is noise where the paper has none, but under gradient descent; every report says so.
    clean = 0.25 if scale == "digits" and name != "talk2" else 0.0
    assert found == set(LABEL_NOISE.get(name, (clean,)))


@pytest.mark.parametrize("name", IDS)
def test_digits_are_trained_at_their_scale_and_nothing_else_is(name: str) -> None:
    digits, paper = (with_tuning(load(name).cases(scale).values()) for scale in ("digits", "paper"))
    assert {config_of(case).data for case in digits} == {"digits"}
    assert "digits" not in {config_of(case).data for case in paper}
    assert {config_of(case).method for case in digits} == {config_of(case).method for case in paper}


# ---- learning rates, batch sizes and grids ---------------------------------------------------------------------------

ETA = (0.01, 0.03162, 0.1, 0.3162, 1.0)
TENS = (0.001, 0.001668, 0.002783, 0.004642, 0.007743, 0.01292, 0.02154, 0.03594, 0.05995, 0.1)


def times(factor: float, values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(pytest.approx(factor * value, rel=1e-3) for value in values)


def explicit(name: str, option: str, **where: Any) -> list[Any]:
    """Return the values of an option in the order of the cases, each once, where other options are as said."""
    found = [case for case in cases_of(name).values() if all(dict(case.options).get(k) == v for k, v in where.items())]
    values = [dict(case.options)[option] for case in found if option in dict(case.options)]
    return list(dict.fromkeys(value for value in values if not isinstance(value, Tuned)))


def tuned_in(name: str, option: str) -> dict[Key, Tuned]:
    found = {key: dict(case.options).get(option) for key, case in cases_of(name).items()}
    return {key: value for key, value in found.items() if isinstance(value, Tuned)}


@pytest.mark.parametrize(
    ("name", "option", "where", "expected"),
    [
        ("fig1", "lr", {}, [0.0316, 0.001]),
        ("fig2", "lr", {"data": "imagenet"}, [0.001, 0.01, 0.1]),
        ("fig2", "lr", {"data": "cifar10"}, [0.007, 0.01, 0.05]),
        ("fig2", "lr", {"data": "cifar100"}, [0.001, 0.005, 0.01]),
        ("fig2", "trace_thresholds", {"data": "imagenet"}, [(3.5,)]),
        ("fig2", "trace_thresholds", {"data": "cifar10"}, [(1.2,)]),
        ("fig2", "trace_thresholds", {"data": "cifar100"}, [(3.5,)]),
        ("fig2", "trace_samples", {"data": "imagenet"}, [2_500]),
        ("fig2", "trace_samples", {"data": "cifar10"}, [5_000]),
        ("fig2", "trace_samples", {"data": "cifar100"}, [5_000]),
        ("fig7", "lr", {}, [0.02]),
        ("fig7", "batch_size", {"data": "cifar10"}, [100, 500, 700]),
        ("fig7", "batch_size", {"data": "cifar100"}, [100, 300, 700]),
        ("fig7", "trace_thresholds", {"data": "cifar10"}, [(1.2,)]),
        ("fig7", "trace_thresholds", {"data": "cifar100"}, [(3.5,)]),
        ("fig3", "penalty_start", {}, [1, 2, 4, 8, 16, 32, 64, 128]),
        ("fig5", "alpha", {}, [0.01, 0.1, 1.0, 10.0]),
        ("fig13", "lr", {}, [0.02]),
        ("fig14", "lr", {"data": "cifar10"}, [0.02]),
        ("fig14", "lr", {"data": "cifar100"}, [0.0008, 0.001, 0.0012, 0.008, 0.01, 0.012]),
        ("fig14", "measure_every", {}, ["10epochs"]),
        ("fig15", "lr", {}, [0.001, 0.003162, 0.01, 0.03162, 0.1]),
        ("fig16", "alpha", {"penalty_every": 10}, list(times(10, TENS))),
        ("fig16", "alpha", {"penalty_every": 1}, list(times(10, TENS))),
        ("fig17", "alpha", {"penalty_reduction": "first"}, list(times(0.1, TENS))),
        ("fig17", "penalty_every", {"penalty_reduction": "first"}, [1]),
        ("fig18", "trace_samples", {}, [128]),
        ("fig18", "measure_every", {}, ["1step"]),
        ("fig19", "trace_samples", {}, [128]),
        ("fig19", "measure_every", {}, ["1step"]),
        ("fig20", "penalty_examples", {}, [128]),
        ("fig20", "penalty_every", {"method": "FP"}, [1]),
    ],
)
def test_values_that_the_paper_names(name: str, option: str, where: dict[str, Any], expected: list[Any]) -> None:
    assert explicit(name, option, **where) == expected


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "fig16", "fig20"])
def test_the_best_learning_rate_is_one_of_five(name: str) -> None:
    found = tuned_in(name, "lr")
    assert found.keys() == cases_of(name).keys()
    for option in found.values():
        assert option.values == ETA
        assert option.case.options.count(("method", "FP")) == 0


def test_the_small_learning_rate_is_a_tenth_or_on_tinyimagenet_a_thirtieth() -> None:
    for (row, column), option in tuned_in("table1", "lr").items():
        expected = 1 / 30 if "TinyImageNet" in row else 1 / 10
        assert option.factor == (1.0 if column == "η*" else pytest.approx(expected))
    assert [option.factor for option in tuned_in("fig20", "lr").values()] == [1.0, 1.0] + [0.5] * 6


@pytest.mark.parametrize("name", ["table1", "table2"])
def test_alpha_is_one_of_ten_around_a_hundredth_or_on_tinyimagenet_of_five(name: str) -> None:
    found = tuned_in(name, "alpha")
    assert len(found) == {"table1": 5 * 4, "table2": 5}[name]
    for (row, column), option in found.items():
        # The paper says of GP_x that v had to be larger: a hundred times is our choice.
        scale = 100.0 if column == "GP_x" else 1.0
        few = tuple(scale * value for value in (1e-3, 10**-2.5, 1e-2, 10**-1.5, 1e-1))
        expected = times(1, few) if "TinyImageNet" in row else times(scale, TENS)
        assert option.values == expected
        assert option.judged == "final"


def test_the_grids_of_noisy_labels() -> None:
    grids = {"FP": (0.01, 0.1, 0.31, 10.0), "GP_r": (0.01, 0.1, 0.31, 10.0), "GP_x": (10, 30, 100, 300, 1000)}
    found = tuned_in("table3", "alpha")
    assert {key[1] for key in found} == grids.keys()
    for (_, column), option in found.items():
        assert option.values == grids[column]
        assert option.judged == "best"
    mixups = tuned_in("table3", "mixup")
    assert {key[1] for key in mixups} == {"mixup"}
    assert {option.values for option in mixups.values()} == {(0.4, 0.8, 1.6, 3.2, 6.4)}


@pytest.mark.parametrize("name", ["fig6", "fig13"])
def test_two_models_are_continued_eight_times_each_at_low_regularisation(name: str) -> None:
    option = {"fig6": ("lr", 0.01, 0.001), "fig13": ("batch_size", 100, 500)}[name]
    cases = cases_of(name)
    assert len(cases) == 2 * (1 + 8)
    for key, case in cases.items():
        if case.start is None:
            assert case[option[0]] == option[1 if key[0].startswith("high") else 2]
        else:
            assert case[option[0]] == option[2]
            assert case.start == cases[key[0], "start"]
            assert case.start["epochs"] + case["epochs"] == 250
    assert sorted({case.repeat for case in cases.values()}) == list(range(9))


# ---- numbers ---------------------------------------------------------------------------------------------------------

ROWS = (
    "WResNet / TinyImageNet", "DenseNet / CIFAR-100", "VGG-11 / CIFAR-100", "WResNet / CIFAR-100",
    "SimpleCNN / CIFAR-10",
)  # fmt: skip
COLUMNS = ("η*", "baseline", "GP_x", "GP", "FP", "GP_r")
NUMBERS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "table1": (
        ROWS,
        COLUMNS,
        """54.67 52.57 52.79 56.44 56.73 55.41
        66.09 58.51 62.12 64.42 66.41 66.39
        45.86 36.86 45.26 47.35 49.87 48.26
        53.96 46.38 58.68 57.68 57.05 58.15
        76.94 71.32 75.68 75.73 79.66 79.76""",
    ),
    "table2": (ROWS, ("η*", "FP"), "54.70 60.00  74.41 74.19  59.82 65.08  69.48 71.53  87.16 87.52"),
    "table3": (
        (
            "VGG-11 / CIFAR-100, 25 %", "ResNet-52 / CIFAR-100, 25 %",
            "VGG-11 / CIFAR-100, 50 %", "ResNet-52 / CIFAR-100, 50 %",
        ),
        ("baseline", "mixup", "GP_x", "FP", "GP_r"),
        """41.74 52.31 45.94 60.18 58.46
        53.30 61.61 52.70 58.31 57.60
        30.05 39.15 34.26 51.33 50.33
        43.35 51.71 42.99 47.99 50.08""",
    ),
    "table4": (
        ROWS[1:],
        COLUMNS,
        """24.68 98.17 83.64 64.33 66.24 73.66
        50.88 148.19 102.95 58.53 64.93 62.96
        26.21 91.39 41.43 40.94 56.53 39.31
        24.21 52.05 47.96 25.03 19.63 25.35""",
    ),
    "table5": (
        ROWS,
        COLUMNS,
        """214.45 142.69 233.14 143.78 208.62 371.74
        78.88 57.40 77.89 78.66 97.25 75.96
        30.50 35.27 31.54 32.52 43.41 42.40
        49.64 47.99 71.33 61.36 76.93 53.25
        18.64 19.51 26.09 19.91 21.21 20.55""",
    ),
    # The columns of the last two penalties cannot be read for the three networks in the middle.
    "table6": (
        ROWS,
        COLUMNS,
        """99.84 99.96 99.97 93.84 81.05 86.46
        99.98 99.97 99.96 99.91 - -
        99.98 99.98 99.85 99.62 - -
        99.98 99.98 99.97 99.96 - -
        100.00 100.00 97.79 100.00 93.80 94.64""",
    ),
    "table7": (ROWS, ("η*", "FP"), "99.86 93.65  98.75 97.53  98.64 93.06  99.97 99.97  97.52 98.94"),
    "table9": (("VGG-11 / CIFAR-100, 25 %", "ResNet-52 / CIFAR-100, 25 %"), ("baseline",), "99.56 73.67"),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_the_papers_numbers_are_beside_ours(name: str) -> None:
    rows, columns, text = NUMBERS[name]
    values = iter(text.split())
    expected = {(row, column): next(values) for row in rows for column in columns}
    assert next(values, None) is None
    experiment = load(name)
    # The first quantity is the one of the table.
    assert {quantity for _, quantity in experiment.paper} == {experiment.quantities[0].name}
    found = {key: value for (key, _), value in experiment.paper.items()}
    assert found == {key: float(value) for key, value in expected.items() if value != "-"}
    assert found.keys() <= cases_of(name).keys()


def test_the_papers_numbers_of_training_with_a_large_batch() -> None:
    found = {" ".join(key): value for (key, _), value in load("fig20").paper.items()}
    assert found == {"batch as in table 1": 76.94, "large batch": 73.70, "large batch, lr/2": 73.59}
    assert "78.70" in " ".join(load("fig20").notes("paper"))
    normal, large, halved = (cases_of("fig20")[name,] for name in found)
    assert [case["batch_size"] for case in (normal, large, halved)] == [128, 1280, 1280]


@pytest.mark.parametrize("name", sorted(set(IDS) - NUMBERS.keys() - {"fig20"}))
def test_there_are_no_other_numbers_of_the_paper(name: str) -> None:
    assert load(name).paper == {}

import argparse
import dataclasses

import pytest
import torch

from fastfisher.training.arguments import add_arguments
from fastfisher.training.config import (
    ConfigError,
    TrainConfig,
    differences,
    flag,
    from_values,
    resolve,
    steps_between_measurements,
    to_values,
)


def parse(*arguments: str) -> TrainConfig:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return from_values(vars(parser.parse_args(arguments)))


def test_no_options_are_the_defaults() -> None:
    assert parse() == TrainConfig()


def test_options_of_every_kind_are_parsed() -> None:
    config = parse(
        "--lr=0.5",
        "--epochs",
        "7",
        "--lr-milestones",
        "3",
        "5",
        "--mixed",
        "--penalty-examples",
        "4",
        "--data",
        "digits",
        "--mixup=0.4",
        "--trace-thresholds",
        "3.5",
        "1",
    )
    assert config == TrainConfig(
        lr=0.5,
        epochs=7,
        lr_milestones=(3, 5),
        mixed=True,
        penalty_examples=4,
        mixup=0.4,
        trace_thresholds=(3.5, 1.0),
    )


def test_every_option_has_help() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    text = parser.format_help()
    for option in dataclasses.fields(TrainConfig):
        assert flag(option.name) in text
        assert len(option.metadata["help"]) > 5


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data", "mnist"], ["--data", "mnist", "digits"]),
        (["--epochs", "many"], ["--epochs", "many", "int"]),
        (["--learning-rate", "1"], ["--learning-rate"]),
    ],
)
def test_parser_refuses(arguments: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        parse(*arguments)
    assert refused.value.code == 2
    message = capsys.readouterr().err
    assert all(part in message for part in expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lr": 0.0}, ["--lr:", "0.0", "above 0"]),
        ({"lr": float("nan")}, ["--lr:", "nan", "above 0"]),
        ({"lr": float("inf")}, ["--lr:", "inf", "finite"]),
        ({"momentum": 1.0}, ["--momentum:", "1.0", "including, 1"]),
        ({"weight_decay": -1.0}, ["--weight-decay:", "-1.0", "at least 0"]),
        ({"label_noise": 1.5}, ["--label-noise:", "1.5", "from 0 to 1"]),
        ({"network": "densenet40_12", "bn_batches": -1}, ["--bn-batches:", "-1", "at least 0"]),
        ({"bn_batches": 10}, ["--bn-batches:", "10", "small_cnn has no batch normalisation"]),
        ({"trace_thresholds": (1.2, 3.5)}, ["--trace-thresholds:", "(1.2, 3.5)", "decreasing"]),
        ({"trace_thresholds": (0.0,)}, ["--trace-thresholds:", "0.0", "above 0"]),
        ({"mixup": 0.0}, ["--mixup:", "0.0", "above 0"]),
        ({"epochs": 0}, ["--epochs:", "0", "at least 1"]),
        ({"batch_size": 0}, ["--batch-size:", "0", "at least 1"]),
        ({"examples": 0}, ["--examples:", "0", "at least 1"]),
        ({"evaluate": (0,)}, ["--evaluate:", "(0,)", "one or two integers, each at least 1"]),
        ({"evaluate": (5, 0)}, ["--evaluate:", "(5, 0)", "at least 1"]),
        ({"evaluate": (5, 6, 7)}, ["--evaluate:", "(5, 6, 7)", "one or two"]),
        ({"download": True}, ["--download:", "True", "--data digits", "fashion, cifar10, cifar100"]),
        ({"download": True, "data": "imagenet"}, ["--download:", "True", "--data imagenet"]),
        ({"data": "cifar10", "data_dir": "/nowhere"}, ["--data-dir:", "/nowhere", "--download"]),
        ({"image_size": 7}, ["--image-size:", "7", "at least 8"]),
        ({"image_size": 0}, ["--image-size:", "0", "at least 8"]),
        ({"seed": -1}, ["--seed:", "-1", "integer from 0"]),
        ({"measure": "trace_fisher,trace"}, ["--measure:", "trace_fisher,trace", "per_example_grad_norms"]),
        ({"measure": "trace_fisher,trace_fisher"}, ["--measure:", "trace_fisher,trace_fisher", "each once"]),
        ({"measure": "none,trace_fisher"}, ["--measure:", "none,trace_fisher", "none, or some"]),
        ({"measure": ""}, ["--measure:", "none, or some"]),
        ({"measure_every": "0epochs"}, ["--measure-every:", "0epochs", "above 0"]),
        ({"measure_every": "50"}, ["--measure-every:", "50", "its unit"]),
        ({"measure_every": "1.5epochs"}, ["--measure-every:", "1.5epochs", "its unit"]),
        ({"measure_every": "1week"}, ["--measure-every:", "1week", "50steps"]),
        ({"measure": "none", "measure_every": "5steps"}, ["--measure-every:", "5steps", "--measure none"]),
        ({"measure": "none", "save_predictions": True}, ["--save-predictions:", "True", "--measure none"]),
        ({"measure": "none", "trace_samples": 5}, ["--trace-samples:", "5", "--measure none"]),
        ({"lr_milestones": (5, 3)}, ["--lr-milestones:", "(5, 3)", "increasing"]),
        ({"lr_milestones": (0, 3)}, ["--lr-milestones:", "(0, 3)", "at least 1"]),
        ({"network": "lenet"}, ["--network:", "lenet", "small_cnn"]),
        ({"method": "fp"}, ["--method:", "fp", "FP"]),
        ({"graphs": "on", "device": "cpu"}, ["--graphs:", "auto or off", "for a GPU"]),
        ({"device": "tpu"}, ["--device:", "tpu", "cuda:N"]),
        ({"device": "cuda:99"}, ["--device:", "cuda:99", "GPUs present"]),
        ({"data": "cifar10", "data_dir": "/nowhere"}, ["--data-dir:", "/nowhere", "existing folder"]),
        ({"alpha": 0.5}, ["--alpha:", "0.5", "--method baseline"]),
        ({"method": "FP", "alpha": 0.0}, ["--alpha:", "0.0", "above 0"]),
        (
            {"method": "FP", "penalty_method": "double_backprop", "gates": "free"},
            ["--gates:", "free", "double_backprop"],
        ),
        (
            {"method": "FP", "penalty_reduction": "first", "penalty_examples": 4},
            ["--penalty-examples:", "4", "--penalty-reduction first"],
        ),
        ({"method": "FP", "penalty_examples": 256}, ["--penalty-examples:", "256", "--batch-size 128"]),
        ({"method": "FP", "penalty_start": 30}, ["--penalty-start:", "30", "--epochs 30"]),
        ({"method": "FP", "mixed": True}, ["--mixed:", "--penalty-every 1"]),
        ({"method": "FP", "mixed": True, "penalty_every": 1, "gates": "free"}, ["--gates:", "--mixed"]),
    ],
)
def test_resolve_names_the_option_the_value_and_what_was_expected(
    changes: dict[str, object], expected: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve(TrainConfig(**changes))  # type: ignore[arg-type]
    assert all(part in str(refused.value) for part in expected), refused.value


def test_resolve_fills_in_dependent_defaults() -> None:
    config = resolve(TrainConfig(seed=7))
    assert (config.image_size, config.noise_seed) == (16, 7)
    assert config.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve(TrainConfig(seed=7, noise_seed=0)).noise_seed == 0
    assert resolve(TrainConfig(start_from="runs//a/")).start_from == "runs/a"
    assert resolve(config) == config


@pytest.mark.parametrize(("every", "steps"), [("1epoch", 7), ("3epochs", 21), ("3steps", 3), ("210step", 210)])
def test_intervals_between_measurements(every: str, steps: int) -> None:
    assert steps_between_measurements(resolve(TrainConfig(measure_every=every)), 7) == steps


@pytest.mark.parametrize("every", ["31epochs", "211steps"])
def test_a_run_has_at_least_one_measurement(every: str) -> None:
    with pytest.raises(ConfigError, match=f"--measure-every: got {every}, expected at most the run's 30 epochs or 210"):
        steps_between_measurements(TrainConfig(measure_every=every), 7)


def test_image_size_of_photographs_defaults_to_32(tmp_path: pytest.TempPathFactory) -> None:
    assert resolve(TrainConfig(data="cifar10", data_dir=str(tmp_path))).image_size == 32


def test_values_survive_a_round_trip() -> None:
    config = TrainConfig(lr_milestones=(1, 2), penalty_examples=3)
    assert from_values(to_values(config)) == config


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="--learning-rate: unknown option"):
        from_values({"learning_rate": 1})


def test_differences_ignore_where_the_run_lies() -> None:
    config = TrainConfig()
    assert differences(config, dataclasses.replace(config, out="x", data_dir="y", resume=True)) == []
    assert differences(config, dataclasses.replace(config, lr=1.0, epochs=1)) == ["epochs", "lr"]

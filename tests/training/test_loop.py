from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from fastfisher.training import loop
from fastfisher.training.config import MEASUREMENTS, METHODS, ConfigError, TrainConfig
from fastfisher.training.folder import RunFolder
from fastfisher.training.networks import build_network
from tests.training.runs import assert_same_state, interrupt_at, metrics

STEPS = 4  # in an epoch of 1,097 examples in batches of 256
ALL = ",".join(MEASUREMENTS)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        out=str(tmp_path / "run"),
        epochs=3,
        batch_size=256,
        image_size=8,
        label_noise=0.5,
        trace_samples=8,
        device="cpu",
    )


def with_dropout(name: str, **options: Any) -> nn.Sequential:
    network = build_network(name, **options)
    return nn.Sequential(*network[:-1], nn.Dropout(0.3), network[-1])


@pytest.mark.parametrize(
    "changes",
    [
        {"augment": "crop_flip", "lr_milestones": (2,), "measure": ALL, "measure_every": "2epochs"},
        {"method": "FP", "penalty_every": 3, "measure": ALL, "measure_every": "3steps", "save_predictions": True},
        {"method": "FP", "penalty_every": 2, "gates": "free", "penalty_start": 1},
        {"mixup": 0.4, "augment": "flip", "trace_thresholds": (2.31, 2.305, 2.3, 2.295, 2.29)},
        {"method": "GP_r", "penalty_every": 3, "penalty_method": "double_backprop"},
    ],
)
@pytest.mark.parametrize("stops", [(2,), (STEPS,), (STEPS + 1, 2 * STEPS + 3)])
def test_a_resumed_run_computes_the_same_bits(
    changes: dict[str, Any], stops: tuple[int, ...], config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Dropout draws from PyTorch's global generator, which has to continue as well.
    monkeypatch.setattr(loop, "build_network", with_dropout)
    config = dataclasses.replace(config, **changes)
    assert loop.train(config) == "finished"

    other = dataclasses.replace(config, out=config.out + "-interrupted")
    for stop in stops:
        with monkeypatch.context() as context:
            interrupt_at(stop, context)
            assert loop.train(other) == "interrupted"
        assert metrics(other) == [record for record in metrics(config) if record["step"] <= stop]
        torch.rand(7)
        other = dataclasses.replace(other, resume=True)
    assert loop.train(other) == "finished"
    assert metrics(other) == metrics(config)
    assert_same_state(RunFolder(other.out).load_checkpoint(), RunFolder(config.out).load_checkpoint())
    written, again = (
        {path.name: path.read_bytes() for path in RunFolder(each.out).predictions.glob("*")} for each in (config, other)
    )
    assert again == written
    assert bool(written) == config.save_predictions


def test_a_crash_between_metrics_and_checkpoint_leaves_a_run_to_resume(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loop.train(config) == "finished"
    other = dataclasses.replace(config, out=config.out + "-crashed")
    saves = []
    original = RunFolder.save_checkpoint

    def crashing(folder: RunFolder, state: dict[str, Any]) -> None:
        if len(saves) == 1:
            raise OSError("disk full")
        saves.append(original(folder, state))

    with monkeypatch.context() as context, pytest.raises(OSError, match="disk full"):
        context.setattr(RunFolder, "save_checkpoint", crashing)
        loop.train(other)
    assert len(metrics(other)) == 2
    assert loop.train(dataclasses.replace(other, resume=True)) == "finished"
    assert metrics(other) == metrics(config)

    scalars = EventAccumulator(str(RunFolder(other.out).events))
    scalars.Reload()
    assert [event.step for event in scalars.Scalars("test_accuracy")] == [STEPS, 2 * STEPS, 3 * STEPS]


def test_a_second_ctrl_c_raises_and_the_handler_is_restored(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        interrupt_at(STEPS + 2, context, times=2)
        loop.train(config)
    assert signal.getsignal(signal.SIGINT) is before
    checkpoint = RunFolder(config.out).load_checkpoint()
    assert checkpoint is not None
    assert checkpoint["epoch"] == 1
    assert loop.train(dataclasses.replace(config, resume=True)) == "finished"
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_in_the_very_last_step_finishes_the_run(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(config, epochs=1)
    interrupt_at(STEPS, monkeypatch)
    assert loop.train(config) == "finished"


def test_a_finished_run_is_left_alone(config: TrainConfig) -> None:
    config = dataclasses.replace(config, epochs=1)
    loop.train(config)
    files = {path: path.read_bytes() for path in Path(config.out).rglob("*") if path.is_file()}
    assert loop.train(dataclasses.replace(config, resume=True)) == "already finished"
    assert {path: path.read_bytes() for path in Path(config.out).rglob("*") if path.is_file()} == files


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"batch_size": 5_000}, "--batch-size"),
        ({"examples": 100}, "--batch-size: got 256, expected at most the 100 training examples"),
        ({"examples": 1_098}, "--examples: got 1098, expected at most the 1097 training examples"),
        ({"epochs": 0}, "--epochs"),
        ({"measure_every": "13steps"}, "--measure-every: got 13step, expected at most the run's 3 epochs or 12 steps"),
        ({"measure_every": "4epochs"}, "--measure-every: got 4epoch"),
        ({"measure": "trace_hesian"}, "--measure: got trace_hesian, expected none, or some of trace_fisher"),
    ],
)
def test_nothing_is_created_for_a_bad_option(changes: dict[str, Any], expected: str, config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=expected):
        loop.train(dataclasses.replace(config, **changes))
    assert not Path(config.out).exists()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_clean_digits(method: str, config: TrainConfig) -> None:
    penalty = {} if method == "baseline" else {"alpha": 0.01, "penalty_every": 2}
    config = dataclasses.replace(config, method=method, batch_size=64, lr=0.1, label_noise=0.0, **penalty)
    assert loop.train(config) == "finished"
    last = metrics(config)[-1]
    assert last["test_accuracy"] > 0.6
    assert last["noisy_accuracy"] is None
    assert (last["penalty"] is None) == (method == "baseline")
    assert (last["penalty_trace_estimate"] is None) == (method != "FP")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_from_mixed_batches(method: str, config: TrainConfig) -> None:
    penalty = {} if method == "baseline" else {"alpha": 0.01, "penalty_every": 2}
    config = dataclasses.replace(config, method=method, batch_size=64, lr=0.1, label_noise=0.0, mixup=0.4, **penalty)
    assert loop.train(config) == "finished"
    assert metrics(config)[-1]["test_accuracy"] > 0.6


def test_mixup_leaves_initial_weights_and_batches_as_they_were(config: TrainConfig) -> None:
    plain = loop.Run(loop.resolve(config))
    mixed = loop.Run(loop.resolve(dataclasses.replace(config, mixup=1.0)))
    assert_same_state(mixed.model.state_dict(), plain.model.state_dict())
    assert torch.equal(mixed.batches.order, plain.batches.order)
    inputs, _ = plain.batches.next()
    found, _ = mixed.batches.next()
    drawn = mixed.batches.mixup
    assert drawn is not None
    weight, partners = drawn.weights[0], drawn.partners[0]
    torch.testing.assert_close(found, weight * inputs + (1 - weight) * inputs[partners])


def with_batch_norm(name: str, *, in_channels: int, image_size: int, classes: int) -> nn.Sequential:
    """Stands in for a network of the paper that would take long."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, classes),
    )


def test_statistics_for_testing_leave_training_as_it_was(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "build_network", with_batch_norm)
    config = dataclasses.replace(config, network="densenet40_12", method="FP", penalty_every=2, augment="crop_flip")
    own, one, many = (
        dataclasses.replace(config, out=f"{config.out}-{count}", bn_batches=count) for count in (0, 1, 100)
    )
    for each in (own, one, many):
        assert loop.train(each) == "finished"
        assert_same_state(RunFolder(each.out).load_checkpoint(), RunFolder(own.out).load_checkpoint())
    found = [[record["test_accuracy"] for record in metrics(each)] for each in (own, one, many)]
    assert found[0] != found[1] != found[2] != found[0]


def test_the_statistics_for_testing_are_of_as_many_batches_as_asked_for(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "build_network", with_batch_norm)
    seen: list[int] = []

    def counting(model: nn.Module, batches: Any) -> Any:
        seen.extend(len(inputs) for inputs in batches)
        return contextlib.nullcontext()

    monkeypatch.setattr(loop, "averaged_batch_statistics", counting)
    # More than an epoch has.
    loop.train(dataclasses.replace(config, network="wresnet44_3_bn", epochs=1, bn_batches=STEPS + 3))
    assert seen == [256] * (STEPS + 3)


def test_every_second_epoch_and_the_last_are_tested(config: TrainConfig) -> None:
    always = dataclasses.replace(config, out=config.out + "-always")
    config = dataclasses.replace(config, test_every=2)
    assert loop.train(config) == loop.train(always) == "finished"
    assert_same_state(RunFolder(config.out).load_checkpoint(), RunFolder(always.out).load_checkpoint())
    tested = [record["test_accuracy"] for record in metrics(always)]
    assert [record["test_accuracy"] for record in metrics(config)] == [None, *tested[1:]]
    first, second, _ = (loop.describe(record, epochs=3) for record in RunFolder(config.out).read_metrics())
    assert "test" not in first and "  test " in second


def test_a_run_of_some_examples_has_so_many_steps(config: TrainConfig) -> None:
    loop.train(dataclasses.replace(config, examples=600, epochs=1))
    assert [record["step"] for record in metrics(config)] == [2]


def test_the_running_estimate_of_the_trace_is_of_its_size(config: TrainConfig) -> None:
    config = dataclasses.replace(
        config, method="FP", alpha=1e-9, penalty_every=1, lr=1e-9, batch_size=16, trace_samples=1_097, epochs=1
    )
    loop.train(config)
    (record,) = metrics(config)
    assert record["penalty_trace_estimate"] == pytest.approx(16 * record["penalty"], rel=1e-6)
    assert record["penalty_trace_estimate"] == pytest.approx(record["trace_fisher"], rel=0.3)


def test_options_reach_the_penalty(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(loop, "FisherPenalty", lambda *arguments, **options: made.append((arguments, options)))
    config = dataclasses.replace(
        config, method="GP_x", alpha=0.7, penalty_every=4, penalty_start=2, penalty_examples=5, gates="free"
    )
    run = loop.Run(loop.resolve(config))
    ((arguments, options),) = made
    assert arguments == (run.model, 0.7)
    assert isinstance(options.pop("generator"), torch.Generator)
    assert options == {
        "labels": "true",
        "wrt": "inputs",
        "every": 4,
        "start": 2 * STEPS,
        "reduction": "batch",
        "method": "finite_difference",
        "gates": "free",
        "mixed": False,
        "examples": 5,
        "graphs": False,
        "verify": False,
    }


def test_the_penalty_starts_when_it_should(config: TrainConfig) -> None:
    loop.train(config)
    late = dataclasses.replace(
        config, out=config.out + "-late", method="FP", alpha=1.0, penalty_every=1, penalty_start=2
    )
    loop.train(late)
    assert metrics(late)[:2] == metrics(config)[:2]
    assert metrics(late)[2]["penalty"] > 0
    assert metrics(late)[2]["trace_fisher"] != metrics(config)[2]["trace_fisher"]


def test_the_learning_rate_falls_after_each_milestone(config: TrainConfig) -> None:
    config = dataclasses.replace(config, epochs=4, lr=0.5, lr_milestones=(1, 3), lr_decay=0.5)
    loop.train(config)
    assert [record["lr"] for record in metrics(config)] == [0.5, 0.25, 0.25, 0.125]


def test_measuring_does_not_change_training(config: TrainConfig) -> None:
    config = dataclasses.replace(config, method="FP", penalty_every=2)
    more = dataclasses.replace(
        config,
        out=config.out + "-more",
        trace_samples=64,
        measure=ALL,
        measure_every="3steps",
        save_predictions=True,
    )
    none = dataclasses.replace(config, out=config.out + "-none", trace_samples=256, measure="none")
    for each in (config, more, none):
        loop.train(each)
        assert_same_state(RunFolder(each.out).load_checkpoint(), RunFolder(config.out).load_checkpoint())


@pytest.mark.parametrize(
    ("every", "steps"),
    [("1epoch", [4, 8, 12]), ("2epochs", [8]), ("3steps", [3, 6, 9, 12]), ("1step", list(range(1, 13)))],
)
def test_measurements_are_taken_when_they_should(every: str, steps: list[int], config: TrainConfig) -> None:
    config = dataclasses.replace(config, measure=ALL, measure_every=every, trace_samples=64)
    loop.train(config)
    records = RunFolder(config.out).read_metrics()
    assert [record["step"] for record in records if "trace_fisher" in record] == steps
    assert [record["step"] for record in records if "epoch" in record] == [4, 8, 12]
    assert [record["step"] for record in records] == sorted({4, 8, 12, *steps})

    scalars = EventAccumulator(str(RunFolder(config.out).events))
    scalars.Reload()
    names = ("trace_fisher", "trace_hessian", "squared_grad_norm_clean", "squared_grad_norm_noisy", "grad_norm_auc")
    covariance = (f"gradient_covariance_{name}" for name in ("trace", "largest", "smallest"))
    gradients = ("gradient_norm_clean", "gradient_norm_noisy", "noisy_clean_cosine", "trace_fisher_batch")
    accuracy = ("measured_accuracy", "measured_loss")
    without = ("top_eigenvalue", "top_eigenvalue_error_bound", *covariance, *gradients, *accuracy)
    for name in (*names, *(f"{name}_standard_error" for name in names), *without):
        events = scalars.Scalars(name)
        assert [event.step for event in events] == steps
        expected = [record[name] for record in records if name in record]
        assert [event.value for event in events] == pytest.approx(expected, rel=1e-6)
    for record in records:
        spent = [record[f"{name}_seconds"] for name in MEASUREMENTS if f"{name}_seconds" in record]
        assert len(spent) == (len(MEASUREMENTS) if record["step"] in steps else 0)
        assert all(seconds > 0 for seconds in spent)
        assert sum(spent) < record["measure_seconds"]


def test_the_trace_is_taken_when_the_loss_is_first_below_each_threshold(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Means of an epoch: 3, 1, 2, 0.5. A loss that comes back from above counts once; so does one that is equal, never.
    losses = iter([mean for mean in (3.0, 1.0, 2.0, 0.5) for _ in range(STEPS)])
    original = loop.Run.step

    def stepping(run: loop.Run) -> None:
        before = run.sums[0].clone()
        original(run)
        run.sums[0] = before + next(losses)

    monkeypatch.setattr(loop.Run, "step", stepping)
    thresholds = (5.0, 3.0, 2.5, 1.5, 0.5, 0.1)
    config = dataclasses.replace(config, epochs=4, trace_thresholds=thresholds, measure_every="2epochs")
    loop.train(config)
    records = metrics(config)
    found = [{name for name in record if "_below_" in name} for record in records]
    names = [{"trace_fisher_below_5.0"}, {f"trace_fisher_below_{each}" for each in (3.0, 2.5, 1.5)}, set(), set()]
    assert found == [each | {f"{name}_standard_error" for name in each} for each in names]
    assert records[0]["trace_fisher_below_5.0"] > 0
    assert "trace_fisher" not in records[0]
    for name in names[1]:
        assert records[1][name] == records[1]["trace_fisher"]
        assert records[1][f"{name}_standard_error"] == records[1]["trace_fisher_standard_error"]
    assert "Tr(F_i) at 5.0 " in loop.describe(RunFolder(config.out).read_metrics()[0], 4)


def test_thresholds_need_no_other_measurement_and_change_nothing(config: TrainConfig) -> None:
    config = dataclasses.replace(config, epochs=1, trace_samples=16)
    loop.train(config)
    alone = dataclasses.replace(config, out=config.out + "-alone", measure="none", trace_thresholds=(9.0,))
    loop.train(alone)
    assert metrics(alone)[0]["trace_fisher_below_9.0"] == metrics(config)[0]["trace_fisher"]
    assert_same_state(RunFolder(alone.out).load_checkpoint(), RunFolder(config.out).load_checkpoint())


def test_a_run_from_before_an_option_existed_can_be_resumed(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.train(config)
    older = dataclasses.replace(config, out=config.out + "-older")
    with monkeypatch.context() as context:
        interrupt_at(STEPS + 1, context)
        loop.train(older)
    folder = RunFolder(older.out)
    values = json.loads(folder.config.read_text())
    for name in ("mixup", "bn_batches", "trace_thresholds"):
        del values[name]
    folder.config.write_text(json.dumps(values))
    state = folder.load_checkpoint()
    assert state is not None
    del state["lowest_loss"]
    folder.save_checkpoint(state)
    assert loop.train(dataclasses.replace(older, resume=True)) == "finished"
    assert metrics(older) == metrics(config)


def test_predictions_are_written_with_each_measurement(config: TrainConfig) -> None:
    config = dataclasses.replace(config, measure_every="3steps", save_predictions=True)
    loop.train(config)
    found = RunFolder(config.out).read_predictions()
    assert list(found) == [3, 6, 9, 12]
    run = loop.Run(loop.resolve(config))
    checkpoint = RunFolder(config.out).load_checkpoint()
    assert checkpoint is not None
    run.load_state_dict(checkpoint)
    with torch.no_grad():
        expected = run.model(run.data.test_inputs).softmax(1)
    for step, probabilities in found.items():
        assert probabilities.shape == (500, 10)
        # Probabilities up to the rounding of float16, 2^-11 of each.
        assert abs(probabilities.astype("float64").sum(1) - 1).max() < 2**-10
        assert np.allclose(probabilities, expected, rtol=0, atol=2**-10) == (step == 12)


@pytest.mark.parametrize("bn_batches", [0, 1, 100])
def test_predictions_are_those_of_the_network_that_is_tested(
    bn_batches: int, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "build_network", with_batch_norm)
    config = dataclasses.replace(
        config, network="densenet40_12", bn_batches=bn_batches, epochs=1, save_predictions=True
    )
    loop.train(config)
    (probabilities,) = RunFolder(config.out).read_predictions().values()
    labels = loop.Run(loop.resolve(config)).data.test_labels.numpy()
    of_labels = probabilities[np.arange(500), labels]
    others = probabilities.copy()
    others[np.arange(500), labels] = -1
    # Rounded to float16, the two most likely classes of an example may be equal.
    assert (
        (of_labels > others.max(1)).mean() <= metrics(config)[0]["test_accuracy"] <= (of_labels >= others.max(1)).mean()
    )


@pytest.fixture
def trained(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """A run of a network that has buffers too."""
    monkeypatch.setattr(loop, "build_network", with_batch_norm)
    config = dataclasses.replace(config, out=config.out + "-trained", network="densenet40_12", epochs=1)
    loop.train(config)
    return config


def test_a_run_begins_with_the_weights_of_another_and_nothing_else(trained: TrainConfig) -> None:
    plain = dataclasses.replace(trained, out=trained.out + "-continued", seed=7, lr=0.2)
    fresh = loop.Run(loop.resolve(plain))
    run = loop.Run(loop.resolve(dataclasses.replace(plain, start_from=trained.out)))
    checkpoint = RunFolder(trained.out).load_checkpoint()
    assert checkpoint is not None
    state, expected = run.state_dict(), fresh.state_dict()
    assert_same_state(state.pop("model"), checkpoint["model"])
    assert not torch.equal(expected.pop("model")["0.weight"], checkpoint["model"]["0.weight"])
    assert_same_state(state, expected)


def test_a_run_that_began_with_the_weights_of_another_is_resumed_without_it(
    trained: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(trained, out=trained.out + "-continued", seed=7, start_from=trained.out)
    loop.train(config)
    crashed, other = (dataclasses.replace(config, out=f"{config.out}-{name}") for name in ("crashed", "interrupted"))
    # Without a checkpoint of its own it begins again with the same weights.
    with monkeypatch.context() as context, pytest.raises(OSError, match="disk full"):
        context.setattr(RunFolder, "append_metrics", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        loop.train(crashed)
    loop.train(dataclasses.replace(crashed, resume=True))
    with monkeypatch.context() as context:
        interrupt_at(2, context)
        loop.train(other)
    shutil.rmtree(trained.out)
    loop.train(dataclasses.replace(other, resume=True))
    for each in (crashed, other):
        assert metrics(each) == metrics(config)
        assert_same_state(RunFolder(each.out).load_checkpoint(), RunFolder(config.out).load_checkpoint())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "expected the folder of a run that has a checkpoint"),
        ({"checkpoint": "damaged"}, "whose run cannot be read"),
        ({"network": "resnet8"}, "a run of densenet40_12, expected one of --network resnet8"),
        ({"classes": 7}, "whose densenet40_12 has 5.weight of shape (10, 16), expected (7, 16)"),
        ({"layers": 1}, "whose densenet40_12 has 6.weight of shape None, expected (10, 10)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    changes: dict[str, Any], expected: str, trained: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(trained.out)
    if not changes:
        folder.checkpoint.unlink()
    elif "checkpoint" in changes:
        folder.checkpoint.write_bytes(folder.checkpoint.read_bytes()[:100])

    def build(name: str, *, classes: int, **options: Any) -> nn.Sequential:
        more = [nn.Linear(10, 10)] * changes.get("layers", 0)
        return with_batch_norm(name, classes=changes.get("classes", classes), **options).extend(more)

    monkeypatch.setattr(loop, "build_network", build)
    config = dataclasses.replace(
        trained,
        out=trained.out + "-continued",
        start_from=trained.out,
        network=changes.get("network", trained.network),
    )
    with pytest.raises(ConfigError, match="--start-from: got ") as refused:
        loop.train(config)
    assert repr(trained.out) in str(refused.value)
    assert expected in str(refused.value)
    assert not Path(config.out).exists()


def test_no_measurement_changes_another(config: TrainConfig) -> None:
    config = dataclasses.replace(config, epochs=1)
    loop.train(dataclasses.replace(config, measure=ALL))
    (together,) = metrics(config)
    found: set[str] = set()
    for name in MEASUREMENTS:
        alone = dataclasses.replace(config, out=f"{config.out}-{name}", measure=name)
        loop.train(alone)
        (record,) = metrics(alone)
        assert record.items() <= together.items()
        found |= record.keys()
    assert found == together.keys()


def test_a_single_example_has_no_standard_error(config: TrainConfig) -> None:
    loop.train(dataclasses.replace(config, epochs=1, trace_samples=1, measure=ALL))
    (record,) = metrics(config)
    assert record["trace_fisher"] > 0
    assert record["trace_fisher_standard_error"] is None
    assert record["trace_hessian_standard_error"] == 0
    assert (record["squared_grad_norm_clean"] is None) != (record["squared_grad_norm_noisy"] is None)
    assert record["grad_norm_auc"] is None
    assert record["gradient_covariance_trace"] == 0
    assert record["gradient_covariance_smallest"] is None


def test_options_decide_what_may_be_resumed(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(config, measure="per_example_grad_norms, trace_fisher", measure_every="6steps")
    interrupt_at(2, monkeypatch)
    loop.train(config)
    config = dataclasses.replace(config, resume=True)
    with pytest.raises(ConfigError, match="--measure-every 3step \\(was 6step\\)"):
        loop.train(dataclasses.replace(config, measure_every="3steps"))
    # Another spelling of the same.
    same = dataclasses.replace(config, measure="trace_fisher,per_example_grad_norms", measure_every="6step")
    assert loop.train(same) == "finished"


@pytest.mark.parametrize("name", MEASUREMENTS)
@pytest.mark.parametrize(("step", "epoch"), [(1, 1), (STEPS, 1), (STEPS + 1, 2)])
def test_divergence_is_reported_where_it_is_measured(name: str, step: int, epoch: int, config: TrainConfig) -> None:
    samples = 512 if name == "minibatch_covariance" else 8  # at least two batches
    config = dataclasses.replace(config, measure=name, measure_every="1step", trace_samples=samples)
    run = loop.Run(loop.resolve(config))
    for _ in range(step - 1):
        run.step()
        assert f"{name}_seconds" in run.finish_step()
    run.step()
    # The others' float64 holds the squares of 1e30, and logits that are all alike have an ordinary loss.
    in_float32 = ("trace_fisher", "trace_hessian", "per_example_grad_norms", "top_eigenvalue")
    overflow = 1e30 if name in in_float32 else torch.inf
    with torch.no_grad():
        run.model[-1].weight.fill_(overflow if step % 2 else torch.nan)
    with pytest.raises(loop.TrainingDivergedError, match=f"diverged in epoch {epoch}: try a lower --lr"):
        run.finish_step()


@pytest.mark.parametrize("changes", [{}, {"method": "FP", "penalty_every": 1}])
def test_divergence_is_reported_and_leaves_no_bad_checkpoint(changes: dict[str, Any], config: TrainConfig) -> None:
    config = dataclasses.replace(config, lr=1e20, **changes)
    with pytest.raises(loop.TrainingDivergedError, match="diverged in epoch 1: try a lower --lr"):
        loop.train(config)
    assert metrics(config) == []
    assert RunFolder(config.out).load_checkpoint() is None


def test_each_purpose_has_its_own_seed() -> None:
    seeds = {loop._seed(seed, purpose) for seed in range(20) for purpose in ("network", "batches", "labels")}
    assert len(seeds) == 60
    assert all(0 <= seed < 2**63 for seed in seeds)

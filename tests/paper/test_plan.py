from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastfisher.paper.cases import SCALES, Case, Scale, Tuned, tuned
from fastfisher.paper.experiments import IDS, load
from fastfisher.paper.plan import REPEAT, TUNING_SEED, Place, Plan, Run, run_name, write_outcome
from fastfisher.paper.reproduce import Request
from fastfisher.training.config import NORMALISED_NETWORKS, TrainConfig, from_values, resolve, to_values
from fastfisher.training.summary import Metrics
from tests.paper.plans import RememberedPlace, digits, drive, epoch

NOT_COMPUTED = {"out", "resume", "data_dir", "download", "device", "threads", "graphs", "start_from"}


@pytest.fixture
def place() -> RememberedPlace:
    return RememberedPlace(Path("runs"))


def request_of(ids: tuple[str, ...], scale: Scale, place: Place) -> Request:
    return Request({name: load(name) for name in ids}, scale, place)


# ---- names -----------------------------------------------------------------------------------------------------------


def another(config: TrainConfig, name: str) -> TrainConfig:
    """Return the configuration with another value of one option, whatever its type."""
    value = getattr(config, name)
    option = next(field for field in dataclasses.fields(config) if field.name == name)
    if option.metadata["choices"]:
        changed: Any = next(choice for choice in option.metadata["choices"] if choice != value)
    elif value is None:
        changed = "another" if name == "start_from" else 7
    elif isinstance(value, bool):
        changed = not value
    elif isinstance(value, tuple):
        changed = (*value, 3)
    else:
        changed = value + ("2" if isinstance(value, str) else 1)
    return dataclasses.replace(config, **{name: changed})


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TrainConfig)])
def test_a_name_depends_on_what_is_computed_alone(name: str) -> None:
    config = TrainConfig()
    same = run_name(another(config, name), None) == run_name(config, None)
    assert same == (name in NOT_COMPUTED)


def test_a_name_depends_on_the_run_that_it_starts_from() -> None:
    config = TrainConfig()
    names = [run_name(config, start) for start in (None, Run("a", config), Run("b", config))]
    assert len(set(names)) == 3


def test_the_place_is_in_no_name(place: RememberedPlace) -> None:
    elsewhere = RememberedPlace(Path("/elsewhere"), data_dir="other", device="cuda", threads=7)
    start = digits(lr=0.3)
    wanted = [(digits(), 0), (dataclasses.replace(digits(lr=0.2), start=start), 1)]
    plans = [Plan(wanted, each) for each in (place, elsewhere)]
    names = [[run.name for run in drive(plan, plan.place.finish)] for plan in plans]
    assert names[0] == names[1]
    assert len(names[0]) == 3


NAMES = """
from pathlib import Path
from fastfisher.paper.experiments import load
from fastfisher.paper.plan import Place
from fastfisher.paper.reproduce import Request
request = Request({name: load(name) for name in ("table3", "fig2", "fig6")}, "paper", Place(Path("elsewhere")))
print(*(run.name for run in request.plan().ready()), sep="\\n")
"""


def test_names_and_their_order_are_the_same_in_every_process(place: RememberedPlace) -> None:
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    other = subprocess.run(
        [sys.executable, "-c", NAMES],
        env={**os.environ, "PYTHONHASHSEED": seed},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
    )
    expected = [run.name for run in request_of(("table3", "fig2", "fig6"), "paper", place).plan().ready()]
    assert len(set(expected)) == len(expected) > 20
    assert other.stdout.splitlines() == expected


def test_the_options_of_a_run_are_those_of_its_case_and_its_place() -> None:
    place = Place(Path("/there"), data_dir="data", device="cpu", threads=3)
    (run,) = Plan([(digits(lr=0.3, lr_milestones=(3, 5)), 4)], place).ready()
    assert run.config == TrainConfig(
        out=f"/there/runs/{run.name}",
        data="digits",
        network="small_cnn",
        image_size=8,
        lr=0.3,
        lr_milestones=(3, 5),
        seed=4,
        data_dir="data",
        device="cpu",
        threads=3,
    )
    # Through JSON, as it goes to its worker, it stays the same.
    assert from_values(json.loads(json.dumps(to_values(run.config)))) == run.config


# ---- what is planned -------------------------------------------------------------------------------------------------


def test_shared_cases_are_planned_once(place: RememberedPlace) -> None:
    grid = digits()
    same = [tuned("lr", (0.1, 0.2), grid), digits(lr=Tuned("lr", (0.1, 0.2), grid))]
    # The second is the first with a default spelled out.
    plan = Plan([(case, seed) for case in (digits(), digits(momentum=0.9), *same) for seed in (0, 1)], place)
    trained = drive(plan, place.finish)
    assert len({run.name for run in trained}) == len(trained) == 2 + 2 + 2
    assert plan.count() == plan.count_finished() == 6


def test_a_seed_is_a_run_of_its_own_and_so_is_a_repeat(place: RememberedPlace) -> None:
    cases = [digits(), Case(digits().options, repeat=1), Case(digits().options, repeat=2)]
    trained = drive(Plan([(case, seed) for case in cases for seed in (0, 1)], place), place.finish)
    assert [run.config.seed for run in trained] == [0, 1, REPEAT, REPEAT + 1, 2 * REPEAT, 2 * REPEAT + 1]
    assert len({run.name for run in trained}) == 6


def test_a_start_is_trained_first_with_the_same_seed(place: RememberedPlace) -> None:
    start = digits(epochs=2)
    later = [Case(digits(epochs=3).options, start=start, repeat=repeat) for repeat in (1, 2)]
    plan = Plan([(case, seed) for case in (*later, start) for seed in (0, 1)], place)
    first = plan.ready()
    assert [(run.config.epochs, run.config.seed) for run in first] == [(2, 0), (2, 1)]
    place.finish(first[1])
    assert [run.name for run in plan.ready() if run.config.epochs == 2] == [first[0].name]
    second = [run for run in plan.ready() if run.config.epochs == 3]
    assert [run.config.seed for run in second] == [REPEAT + 1, 2 * REPEAT + 1]
    for run in second:
        assert run.start == first[1]
        assert run.config.start_from == str(place.folder(first[1]).path)
    assert len(drive(plan, place.finish)) == 5
    assert plan.count() == plan.count_finished() == 6


def test_what_starts_from_a_diverged_run_has_diverged(place: RememberedPlace) -> None:
    """The checkpoint is that of an epoch before: a continuation of it would be of another model than is said."""
    start = digits(epochs=2)
    later = Case(digits(epochs=3).options, start=start, repeat=1)
    plan = Plan([(later, 0), (later, 1)], place)
    first = plan.ready()
    place.ended[first[0].name] = "diverged", []
    place.finish(first[1])
    (ready,) = plan.ready()
    assert ready.start == first[1]
    diverged = plan.run(later, 0)
    assert diverged is not None
    assert plan.outcome(diverged) == "diverged"
    place.finish(ready)
    assert plan.ready() == []
    assert plan.count() == plan.count_finished() == 4


# ---- tuning ----------------------------------------------------------------------------------------------------------


def tuning(place: Place, values: tuple[float, ...] = (0.1, 0.2, 0.3), **options: Any) -> tuple[Plan, Tuned]:
    wanted = Tuned("lr", values, digits(), **options)
    return Plan([(digits(lr=wanted), 0)], place), wanted


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ((0.5, 0.7, 0.6), 0.2),
        ((0.5, 0.6, 0.7), 0.3),
        ((0.5, 0.7, 0.7), 0.2),
        ((0.5, 0.5, 0.5), 0.1),
        ((0.0, None, None), 0.1),
        ((None, 0.0, None), 0.2),
        ((None, None, None), 0.1),
    ],
)
def test_the_best_value_of_the_grid_is_taken(
    accuracies: tuple[float | None, ...], expected: float, place: RememberedPlace
) -> None:
    """None is a run that diverged."""
    plan, option = tuning(place)
    grid = plan.ready()
    assert [(run.config.lr, run.config.seed) for run in grid] == [(lr, TUNING_SEED) for lr in option.values]
    for run, accuracy in zip(grid, accuracies, strict=True):
        assert option not in plan.tuned_values()
        place.ended[run.name] = ("diverged", []) if accuracy is None else ("finished", [epoch(accuracy)])
        ready = plan.ready()
    assert [(run.config.lr, run.config.seed) for run in ready] == [(expected, 0)]
    assert plan.tuned_values() == {option: expected}


RISING: Metrics = [epoch(0.6, 0.9), epoch(0.7, 0.2)]
FALLING: Metrics = [epoch(0.9, 0.6), epoch(0.5, 0.7)]


@pytest.mark.parametrize(("judged", "expected"), [("final", 0.1), ("best", 0.2)])
@pytest.mark.parametrize("validated", [True, False])
def test_the_last_or_the_best_epoch_decides(
    judged: Any, expected: float, validated: bool, place: RememberedPlace
) -> None:
    """On the validation examples, whatever the test examples say; where there are none on the test examples."""
    plan, _ = tuning(place, (0.1, 0.2), judged=judged)
    if validated:
        metrics = [RISING, FALLING]
    else:
        metrics = [[epoch(None, 0.1), epoch(None, 0.8)], [epoch(None, 0.9), epoch(None, 0.3)]]
    # Measurements between epochs have no accuracy.
    between: dict[str, Any] = {"step": 3, "trace_fisher": 1.0}
    for run, found in zip(plan.ready(), metrics, strict=True):
        place.ended[run.name] = "finished", [found[0], between, found[1], between]
    assert [run.config.lr for run in plan.ready()] == [expected]


def test_a_share_of_the_best_value_is_rounded(place: RememberedPlace) -> None:
    grid = digits()
    option = Tuned("lr", (0.0316, 0.1), grid)
    plan = Plan([(digits(lr=option.times(factor)), 0) for factor in (1 / 3, 0.1, 1.0)], place)
    trained = drive(plan, place.finish)
    # One grid for the three.
    assert [run.config.lr for run in trained] == [0.0316, 0.1, 0.01053, 0.00316, 0.0316]


def test_an_option_is_tuned_where_another_is_at_its_best(place: RememberedPlace) -> None:
    small = digits(lr=Tuned("lr", (0.1, 0.2), digits(), factor=0.5))
    plan = Plan([(tuned("alpha", (0.01, 0.02), small.but(method="FP")), 0)], place)
    trained = drive(plan, lambda run: place.finish(run, run.config.lr + run.config.alpha))
    found = [(run.config.method, run.config.lr, run.config.alpha, run.config.seed) for run in trained]
    default = TrainConfig().alpha
    assert found == [
        ("baseline", 0.1, default, TUNING_SEED),
        ("baseline", 0.2, default, TUNING_SEED),
        ("FP", 0.1, 0.01, TUNING_SEED),
        ("FP", 0.1, 0.02, TUNING_SEED),
        ("FP", 0.1, 0.02, 0),
    ]
    assert plan.count() == 5


# ---- from the first to the last --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("scale", SCALES)
def test_every_run_is_counted_found_and_has_options_that_can_be_used(
    scale: Scale, dry_run: bool, tmp_path: Path
) -> None:
    place = RememberedPlace(tmp_path, data_dir=str(tmp_path), device="cpu", dry_run=dry_run)
    plan = request_of(IDS, scale, place).plan()
    expected, everything = plan.count(), plan.everything()
    assert len(everything) == expected
    assert plan.count_finished() == 0

    def finish(run: Run) -> None:
        resolve(dataclasses.replace(run.config, start_from=None))
        assert run.start is None or place.outcome(run.start) == "finished"
        place.finish(run)

    trained = drive(plan, finish)
    names = {run.name for run in trained}
    assert len(names) == len(trained) == plan.count() == plan.count_finished()
    # At first it is not known that the best α, say, is one of those that a figure asks for by themselves.
    assert len(names) == expected if dry_run else 0.9 * expected < len(names) <= expected
    for at_least in (1, 5, 100):
        # With another order of what finishes first, and with what fails beside, the same runs are found.
        again = RememberedPlace(tmp_path, data_dir=str(tmp_path), device="cpu", dry_run=dry_run)
        assert {run.name for run in drive(request_of(IDS, scale, again).plan(), again.finish, at_least)} == names
    if dry_run:
        for run in trained:
            assert run.config.examples == 2 * run.config.batch_size == 8
            assert (run.config.epochs, run.config.penalty_start) == (1, 0)
            assert run.config.bn_batches == (2 if run.config.network in NORMALISED_NETWORKS else 100)


def test_a_dry_run_has_one_value_of_each_grid(tmp_path: Path) -> None:
    place = RememberedPlace(tmp_path, dry_run=True)
    plan = request_of(("table1",), "digits", place).plan()
    trained = drive(plan, place.finish)
    values = plan.tuned_values()
    # η* and its share, and α of four methods, for each of five settings.
    assert len(values) == 5 * (2 + 4)
    assert all(value == float(f"{option.factor * option.values[0]:.4g}") for option, value in values.items())
    assert sum(run.config.seed == TUNING_SEED for run in trained) == 5 * (1 + 4)


@pytest.mark.parametrize("finish_last", [False, True])
def test_some_of_what_is_ready_is_as_much_as_was_asked_for(finish_last: bool, place: RememberedPlace) -> None:
    ids = ("fig6", "fig20")
    plan = request_of(ids, "digits", place).plan()
    trained = []
    while ready := plan.ready(4):
        whole = Plan(plan.wanted, place).ready()
        assert {run.name for run in ready} <= {run.name for run in whole}
        assert len(ready) >= min(4, len(whole))
        run = ready[-1 if finish_last else 0]
        place.finish(run)
        trained.append(run.name)
    other = RememberedPlace(Path("other"))
    expected = drive(request_of(ids, "digits", other).plan(), other.finish)
    assert sorted(trained) == sorted(run.name for run in expected)


# ---- on disk ---------------------------------------------------------------------------------------------------------


def test_a_place_on_disk_knows_what_is_finished(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (run,) = Plan([(digits(), 0)], place).ready()
    folder = place.folder(run)
    assert place.outcome(run) is None
    folder.create(run.config)
    folder.append_metrics(epoch(0.5))
    assert place.outcome(run) is None
    write_outcome(folder, "finished")
    assert place.outcome(run) == "finished"
    assert place.metrics(run) == [epoch(0.5)]
    assert Plan([(digits(), 0)], place).ready() == []
    assert Plan([(digits(), 0)], dataclasses.replace(place, dry_run=True)).ready() != []

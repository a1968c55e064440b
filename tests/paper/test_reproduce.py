from __future__ import annotations

import csv
import json
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure
from PIL import Image

from fastfisher.cli import main
from fastfisher.paper import reproduce
from fastfisher.paper.cases import Tuned
from fastfisher.paper.claims import CLAIMS
from fastfisher.paper.experiments import IDS, load
from fastfisher.paper.plan import TUNING_SEED, Place, Run
from fastfisher.paper.report import DRY, SCALES
from fastfisher.paper.reproduce import Request, read_outcome, write_reports
from fastfisher.training.folder import RunFolder
from fastfisher.training.pool import Job
from tests.paper import commands
from tests.paper.plans import RememberedPlace

HEADER = ["case", "quantity", "paper", "mean", "standard_deviation", "seeds", "diverged", "by_seed"]
TIMED = ("table5",)
"""Their numbers are seconds, which no two runs share."""


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file, strict=True)
        rows = list(reader)
    assert reader.fieldnames == HEADER
    return rows


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fig22", "fig1", "table10"], f"ID: got fig22, table10, expected some of {', '.join(IDS)}"),
        ([], "ID: got none, expected some, or --all, or --list to see them"),
        (["fig1", "--all"], "--all: got it beside ids, expected one of the two"),
        (["fig1", "--seeds", "0"], "--seeds: got 0, expected an integer, at least 1"),
        (["fig1", "--seeds", str(TUNING_SEED + 1)], "--seeds: got 1001, expected at most 1000: the next is for tuning"),
        (["fig1", "--jobs", "-2"], "--jobs: got -2, expected an integer, at least 1"),
        (["fig1", "--device", "tpu"], "--device: got 'tpu', expected auto, cpu, cuda or cuda:N"),
        (["fig1", "--device", "cuda:99"], "--device: got 'cuda:99', expected one of the"),
        (["fig1", "--scale", "paper", "--data", "no/where"], "--data: got 'no/where', expected an existing folder"),
        (["fig1", "--out", "/dev/null/runs"], "--out: got '/dev/null/runs', but nothing can be written in /dev/null"),
    ],
)
def test_a_bad_option_is_named_and_nothing_is_written(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"fastfisher reproduce: {expected}")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fig1", "--scale", "poster"], "argument --scale: invalid choice: 'poster'"),
        (["fig1", "--seeds", "many"], "argument --seeds: invalid int value: 'many'"),
        (["fig1", "--jobs", "2", "--ray", "local"], "argument --ray: not allowed with argument --jobs"),
        (["fig1", "--dry"], "unrecognized arguments: --dry"),
    ],
)
def test_what_is_no_option_is_refused(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["reproduce", *arguments])
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ids", [(), ("fig15", "table7")])
def test_the_list_says_what_there_is_and_what_it_takes(
    ids: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *ids, "--list", "--seeds", "2"]) == 0
    _, *lines, together, note = capsys.readouterr().out.splitlines()
    counts = {}
    for name, line in zip(ids or IDS, lines, strict=True):
        found = re.fullmatch(rf"{name} +(\d+) +\d+\.\d\d  {re.escape(load(name).title)}", line)
        assert found is not None, line
        counts[name] = int(found[1])
    assert counts["fig15"] == 5 * 2
    # Of five settings η* and FP, and once what tunes them.
    cases = load("table7").cases("digits").values()
    grids = {value for case in cases for _, value in case.options if isinstance(value, Tuned)}
    assert counts["table7"] == 5 * (2 + 2) + sum(len(grid.values) for grid in grids)
    total, hours = int(together.split()[1]), float(together.split()[2])
    assert hours > 0
    assert max(counts.values()) < total <= sum(counts.values())
    assert "estimated" in note
    assert list(tmp_path.iterdir()) == []


# ---- reports ---------------------------------------------------------------------------------------------------------


def dry_request(out: Path, *ids: str) -> Request:
    return Request({name: load(name) for name in ids}, "digits", Place(out, device="cpu", threads=1, dry_run=True))


@pytest.mark.parametrize("name", IDS)
def test_a_report_is_whole(name: str, dry_digits: Path) -> None:
    experiment, cases = load(name), load(name).cases("digits")
    rows = rows_of(dry_digits / f"{name}.csv")
    assert [(row["case"], row["quantity"]) for row in rows] == [
        (" | ".join(key), quantity.name) for key in cases for quantity in experiment.quantities
    ]
    papers = {(" | ".join(key), quantity): str(value) for (key, quantity), value in experiment.paper.items()}
    for row in rows:
        assert row["paper"] == papers.get((row["case"], row["quantity"]), "")
        assert (row["seeds"], row["diverged"], row["standard_deviation"]) in (("1", "0", ""), ("0", "0", ""))
        if row["seeds"] == "1":
            assert row["by_seed"] == f"0:{float(row['mean'])!r}"
        else:
            # In two steps no threshold is crossed, and not everything is measured twice.
            assert row["mean"] == row["by_seed"] == ""
    # Figure 12 shows the first fifth of training, in which a dry run has no measurement.
    assert any(row["mean"] for row in rows) == (name != "fig12")

    text = (dry_digits / f"{name}.md").read_text()
    assert text.startswith(f"# {name}: {experiment.title}\n")
    assert f"[{name}.csv]({name}.csv)" in text
    for value in experiment.paper.values():
        assert f"(paper {value:g})" in text
    with Image.open(dry_digits / f"{name}.png") as image:
        image.load()
        assert min(image.size) > 200
        assert len(image.convert("L").getcolors() or ()) > 1
    assert ElementTree.parse(dry_digits / f"{name}.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert f"![{experiment.title}]({name}.png)" in text


@pytest.mark.parametrize("name", [*IDS, "README"])
def test_digits_are_never_called_the_papers_setting(name: str, dry_digits: Path) -> None:
    text = (dry_digits / f"{name}.md").read_text()
    assert "Scale: **digits**" in text
    assert "Not the paper's setting" in text
    assert DRY in text
    for wrong in (SCALES["paper"], "**paper**", "--scale paper", "--data cifar", "--data tiny", "--data imagenet"):
        assert wrong not in text


def test_the_page_about_everything_has_the_twelve_claims_with_a_line_each(dry_digits: Path) -> None:
    lines = (dry_digits / "README.md").read_text().splitlines()
    for number, statement in CLAIMS.items():
        (line,) = [line for line in lines if line.startswith(f"{number}. ")]
        # With one seed nothing is decided.
        assert line.startswith(f"{number}. {statement} **Undecided.** [")
        assert "one seed" in line or "no seed gives a value" in line
    for name in IDS:
        assert f"- [{name}]({name}.md): {load(name).title}" in lines
    assert "Made by `fastfisher reproduce --all --scale digits --dry-run`" in "\n".join(lines)


def test_writing_again_gives_the_same_bytes(dry_digits: Path) -> None:
    ids = ("fig6", "table1", "talk3")
    files = [dry_digits / f"{name}.{ending}" for name in ids for ending in ("csv", "md", "png", "svg")]
    before = {path: path.read_bytes() for path in files}
    times = {path: path.stat().st_mtime_ns for path in files}
    assert write_reports(dry_request(dry_digits, *ids), everything=False) == []
    assert {path: path.read_bytes() for path in files} == before
    assert all(path.stat().st_mtime_ns > times[path] for path in files)


@pytest.mark.parametrize("diverged", [lambda index: True, lambda index: index % 2, lambda index: index % 2 == 0])
@pytest.mark.parametrize("name", IDS)
def test_what_diverged_is_in_no_number(name: str, diverged: Callable[[int], bool], dry_digits: Path) -> None:
    """All of the runs, or every other one: still there is a drawing and a verdict."""
    experiment = load(name)
    request = dry_request(dry_digits, name)
    there = request.place
    place = RememberedPlace(dry_digits, device="cpu", threads=1, dry_run=True)
    plan = Request(request.experiments, "digits", place).plan()
    index = 0
    while ready := plan.ready():
        for run in ready:
            place.ended[run.name] = ("diverged", []) if diverged(index) else ("finished", there.metrics(run))
            index += 1
    outcome = read_outcome(Request(request.experiments, "digits", place), experiment, plan)
    assert outcome is not None
    for key in outcome.runs:
        assert (outcome.diverged[key] == (0,)) == (outcome.runs[key] == {})
    for check in experiment.checks(outcome):
        assert check.verdict == "undecided"
        assert len(check.values) <= 1
    experiment.draw(Figure(), outcome)


class Failing:
    capacity = 2

    def start(self, run: Run) -> Job:
        return Failed()

    def close(self) -> None:
        pass


class Failed:
    def failure(self) -> str | None:
        return "no luck"


def test_a_missing_run_leaves_its_ids_without_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = reproduce._workers
    command = ["reproduce", "fig18", "fig19", "--dry-run", "--out", str(tmp_path)]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"2 of 2 reports in {tmp_path}, ")
    for path in tmp_path.glob("fig*"):
        path.unlink()
    # η* is used by both, its small share by the first alone.
    request = dry_request(tmp_path, "fig18", "fig19")
    plan = request.plan()
    assert plan.ready() == []
    run = plan.run(load("fig18").cases("digits")["small learning rate",], 0)
    assert run is not None
    outcome = request.place.folder(run).path / "outcome.json"
    outcome.unlink()

    monkeypatch.setattr(reproduce, "_workers", lambda given, scale: Failing())
    assert main(command) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].startswith(f"1 of 2 reports in {tmp_path}, ")
    assert printed.err.splitlines()[-2:] == [
        f"fastfisher reproduce: {run.name} failed: no luck ({run.config.out}.log)",
        "fastfisher reproduce: fig18 has no report: runs are missing",
    ]
    assert sorted(path.name for path in tmp_path.glob("fig*")) == [f"fig19.{e}" for e in ("csv", "md", "png", "svg")]

    monkeypatch.setattr(reproduce, "_workers", real)
    assert main(command) == 0
    assert (tmp_path / "fig18.md").exists()


# ---- kill -9 ---------------------------------------------------------------------------------------------------------


def contents(out: Path) -> dict[str, bytes]:
    """Return every report: tables, texts and drawings, but for those of seconds."""
    files = [path for path in out.iterdir() if path.is_file()]
    return {path.name: path.read_bytes() for path in files if path.stem not in TIMED}


def results(out: Path) -> dict[str, Any]:
    """Return what each run measured, without the seconds."""
    found = {}
    for path in out.glob("runs/*/metrics.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.parent.name] = [
            {name: value for name, value in record.items() if not name.endswith("_seconds")} for record in records
        ]
    return found


def cut_off(
    command: list[str], progress: Callable[[], int], total: int, moment: tuple[int, float], sent: signal.Signals
) -> None:
    """Start the command and end it once so much is done, some of it by itself, and some seconds are over."""
    number, delay = moment
    number = max(number, min(progress() + 1, total))
    process = commands.start(*command)
    reached = f"{number} of {total}"
    commands.wait_until(lambda: progress() >= number or process.poll() is not None, reached, 5 * commands.PATIENCE)
    time.sleep(delay)
    assert process.poll() is None, process.communicate()
    if sent == signal.SIGKILL:
        commands.kill(process)
    else:
        process.send_signal(sent)
        assert "interrupted; continue with the same command\n" in commands.finish(process, expected=130)


def at_random(most: int, count: int, delay: float) -> list[tuple[int, float]]:
    dice = random.SystemRandom()
    moments = [(number, dice.uniform(0, delay)) for number in sorted(dice.sample(range(most), count))]
    print(f"ended when so much was done, and so many seconds later: {moments}")
    return moments


def test_everything_killed_three_times_is_as_if_it_had_not_been(dry_digits: Path, tmp_path: Path) -> None:
    command = ["--all", "--scale", "digits", "--dry-run", "--out", str(tmp_path)]
    # With all runs finished reports are being written.
    total = commands.finished(dry_digits)
    for moment in at_random(total + 1, 3, delay=0.3):
        cut_off(command, lambda: commands.finished(tmp_path), total, moment, signal.SIGKILL)
    commands.finish(commands.start(*command))
    assert results(tmp_path) == results(dry_digits)
    assert contents(tmp_path) == contents(dry_digits)
    for name in TIMED:
        here, there = (rows_of(out / f"{name}.csv") for out in (tmp_path, dry_digits))
        assert [(row["case"], row["paper"]) for row in here] == [(row["case"], row["paper"]) for row in there]


def test_real_runs_that_are_killed_give_the_same_bits(tmp_path: Path) -> None:
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    command = ["fig15", "--scale", "digits", "--seeds", "1", "--jobs", "2", "--out"]
    commands.finish(commands.start(*command, undisturbed))

    def epochs(out: Path) -> int:
        return sum(RunFolder(path.parent).epochs_measured() for path in out.glob("runs/*/metrics.jsonl"))

    total = epochs(undisturbed)
    moments = at_random(total - 8, 3, delay=0.1)
    interrupted = random.SystemRandom().randrange(3)
    print(f"number {interrupted} by Ctrl-C")
    for number, moment in enumerate(moments):
        sent = signal.SIGINT if number == interrupted else signal.SIGKILL
        cut_off([*command, str(disturbed)], lambda: epochs(disturbed), total, moment, sent)
        assert not (disturbed / "fig15.csv").exists()
    commands.finish(commands.start(*command, disturbed))
    assert results(disturbed) == results(undisturbed)
    assert len(results(disturbed)) == 5
    assert contents(disturbed) == contents(undisturbed)
    assert {row["seeds"] for row in rows_of(disturbed / "fig15.csv")} == {"1"}

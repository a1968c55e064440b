from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure
from PIL import Image

from fastfisher.cli import main
from fastfisher.paper import reproduce
from fastfisher.paper.arguments import IDS
from fastfisher.paper.cases import Tuned
from fastfisher.paper.claims import CLAIMS
from fastfisher.paper.experiments import load
from fastfisher.paper.plan import TUNING_SEED, Place, Run
from fastfisher.paper.report import DRY, SCALES
from fastfisher.paper.reproduce import Request, read_outcome, write_reports
from fastfisher.paper.workers import Job
from tests.paper.plans import RememberedPlace

HEADER = ["case", "quantity", "paper", "mean", "standard_deviation", "seeds", "diverged", "by_seed"]


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
        f"fastfisher reproduce: {run.name}: no luck ({run.config.out}.log)",
        "fastfisher reproduce: fig18 has no report: runs are missing",
    ]
    assert sorted(path.name for path in tmp_path.glob("fig*")) == [f"fig19.{e}" for e in ("csv", "md", "png", "svg")]

    monkeypatch.setattr(reproduce, "_workers", real)
    assert main(command) == 0
    assert (tmp_path / "fig18.md").exists()

"""The program that measures on a GPU: all of it in a dry run, and what becomes of cases that fail."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench import readme
from bench.gpu import program
from bench.gpu.bars import BARS, Bar, at_least, at_most
from bench.gpu.report import NOT_AT_HAND, Figure, Report, table
from bench.gpu.timing import CASES, Case, HostTimer, dry_run, faster, race
from fastfisher import ops

pytestmark = pytest.mark.usefixtures("one_thread")


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU machine has: nvidia-smi, which says something, and a checker, which checks nothing."""
    executable(tmp_path / "bin" / "nvidia-smi", "echo '1980 MHz, 2619 MHz, 650.00 W, 60'")
    executable(tmp_path / "bin" / "compute-sanitizer", 'shift 4; exec "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="measured in earnest there")
@pytest.mark.filterwarnings("ignore")  # of operators that are replaced, and of peers
def test_a_dry_run_measures_every_figure(tmp_path: Path, tools: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.root.manager, "disable", logging.DEBUG)  # pytest keeps all that torch.compile says
    kept = Figure("kept", "s", 1, section="of another call")
    Report(tmp_path / "dry-run.json", "dry run", {}, [kept, Figure("old", "s", 1, section="copy")]).write()
    for call in (1, 2, 3, 4):
        assert program.main(["--call", str(call), "--dry-run", "--out", str(tmp_path)], program.here) == 0
    report = Report.read(tmp_path / "dry-run.json")
    assert report.figures[0] == kept and not any(figure.name == "old" for figure in report.figures)
    assert set(report.calls) == {"1", "2", "3", "4"} and report.calls["4"]["torch"] == torch.__version__
    assert {figure.section for figure in report.figures[1:]} == {case.section for case in CASES}
    wanting = [figure for figure in report.figures if figure.value is None]
    # Peers that are not installed, or refuse a network.
    assert all(figure.error.startswith((NOT_AT_HAND, "NotImplementedError")) for figure in wanting), wanting
    assert all("Liger" in figure.unit or "Opacus" in figure.unit for figure in wanting), wanting
    assert {(figure.section, figure.name, figure.unit) for figure in report.figures} >= set(BARS)
    names = [(figure.section, figure.name, figure.unit) for figure in report.figures]
    assert len(names) == len(set(names))
    assert any(figure.gpu == "1980 MHz, 2619 MHz, 650.00 W, 60" for figure in report.figures)
    assert "no CUDA device" in (tmp_path / "tests.log").read_text()
    rows = (tmp_path / "dry-run.md").read_text().splitlines()
    assert len([row for row in rows if row.startswith("| ")]) == len(report.figures) + 1
    # Once more, a section alone: its figures are replaced, the others stay.
    found = len(report.figures)
    assert program.main(["--call", "2", "--dry-run", "--out", str(tmp_path), "copy"], program.here) == 0
    again = Report.read(tmp_path / "dry-run.json").figures
    assert len(again) == found and [figure.section for figure in again].count("copy") == 1


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(ops.GPU_UNAVAILABLE is None, reason="nothing to refuse")
def test_nothing_is_measured_where_the_kernels_do_not_serve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--call", "2", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert str(ops.GPU_UNAVAILABLE) in said and "pip install --no-build-isolation --no-deps -e ." in said
    assert not list(tmp_path.iterdir())


def test_nothing_is_measured_where_the_package_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def version(name: str) -> str:
        raise program.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(program.importlib.metadata, "version", version)
    monkeypatch.setattr(ops, "GPU_UNAVAILABLE", None)
    assert program.main(["--call", "2", "--out", str(tmp_path)]) == 2
    assert "not installed" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_section_of_another_call_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["--call", "2", "--dry-run", "many seeds"])
    assert "unknown: many seeds; call 2 has the sections copy" in capsys.readouterr().err


# ---- cases that fail ------------------------------------------------------------------------------------------------


def good(at: Any) -> Iterator[Figure]:
    yield Figure("good", "s", os.getpid())


def broken(at: Any) -> Iterator[Figure]:
    yield Figure("found before", "s", 1)
    raise RuntimeError("out of\nmemory")


def dies(at: Any) -> Iterator[Figure]:
    yield Figure("sent before", "s", 1)
    time.sleep(0.5)
    os._exit(1)


def hangs(at: Any) -> Iterator[Figure]:
    time.sleep(600)
    yield Figure("never", "s", 1)


def test_a_case_that_fails_dies_or_hangs_costs_no_other(tmp_path: Path) -> None:
    order = [good, good, broken, dies, hangs, good]
    cases = [Case(1, "any", function, {}, 1 if function is hangs else 60) for function in order]
    report = Report(tmp_path / "a.json", "none", {}, [])
    with contextlib.closing(program.Elsewhere()) as elsewhere:
        program.run(report, cases, dry_run(tmp_path), elsewhere)
    found = Report.read(tmp_path / "a.json").figures
    assert [(figure.name, figure.error) for figure in found] == [
        ("good", ""), ("good", ""), ("found before", ""), ("broken", "RuntimeError: out of memory"),
        ("sent before", ""), ("dies", "the process that measured it died"), ("hangs", "given up after 1 s"),
        ("good", ""),
    ]  # fmt: skip
    processes = [figure.value for figure in found if figure.name == "good"]
    assert processes[0] == processes[1] and processes[1] != processes[2]  # another after a failure


def test_every_figure_is_written_before_the_next_and_late_cases_are_left_out(tmp_path: Path) -> None:
    seen = []

    def two(at: Any) -> Iterator[Figure]:
        yield Figure("first", "s", 1)
        seen.append([row["name"] for row in json.loads((tmp_path / "a.json").read_text())["figures"]])
        yield Figure("second", "s", 2)

    case = Case(1, "any", two, {}, 60)
    report = Report(tmp_path / "a.json", "none", {}, [])
    program.run(report, [case], dry_run(tmp_path), program.here)
    assert seen == [["first"]]
    program.run(report, [case], dry_run(tmp_path), program.here, seconds=-1)
    assert [figure.name for figure in report.figures] == ["first", "second", "two"]
    assert "left out" in report.figures[-1].error


# ---- a race ---------------------------------------------------------------------------------------------------------


def test_a_race_alternates_and_a_rival_that_fails_costs_its_own_figure(tmp_path: Path) -> None:
    called: list[str] = []

    def takes(name: str, seconds: float) -> Any:
        def call() -> None:
            called.append(name)
            time.sleep(seconds)

        return call

    def fails() -> None:
        raise ValueError("refused")

    at = dry_run(tmp_path)
    figures = list(race(at, "it", takes("A", 0.02), faster("B", takes("B", 0.06)), faster("C", fails), repeat=1))
    assert called == ["A", "B"] + ["A", "B"] * 2  # once to warm up, then in turn
    by_unit = {figure.unit: figure for figure in figures}
    assert by_unit["times faster than C"].error == "ValueError: refused"
    ratio = by_unit["times faster than B"]
    assert ratio.value is not None and ratio.low is not None and ratio.high is not None
    assert 1 < ratio.low <= ratio.high and ratio.value > 1  # 0.06 s of sleep are more than 0.02, whatever the load
    assert by_unit["ms, launches included"].value >= 20


def test_a_graph_is_captured_before_the_first_repetition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def captured(self: HostTimer, call: Any) -> Any:
        events.append("capture")
        return lambda: events.append("replay")

    monkeypatch.setattr(HostTimer, "captured", captured)
    monkeypatch.setattr(HostTimer, "mark", lambda self: events.append("mark") or 0.0)
    list(race(dry_run(tmp_path), "it", lambda: events.append("call"), graph=True))
    assert events == ["call", "capture"] + ["mark", "replay", "mark"] * 2


# ---- the report -----------------------------------------------------------------------------------------------------


def test_a_bar_is_met_or_not() -> None:
    name = ("Tr(F)", "SimpleCNN, sampled labels", "times a forward and backward")
    assert BARS[name] == at_most(1.1) == Bar("≤", 1.1)
    for value, met in ((1.1, "yes"), (1.2, "**no**")):
        row = table([Figure(*name[1:], value, 1.0, 1.3, section=name[0])]).splitlines()[-1]
        assert row == f"| {name[0]} | {name[1]} | {value} | 1–1.3 | {name[2]} | ≤ 1.1 | {met} |"
    assert at_least(85).met(85) and not at_least(85).met(84.9)
    assert Figure(*name[1:], error="failed", section=name[0]).met is False  # not measured is not met


def test_calls_find_what_earlier_ones_found(tmp_path: Path) -> None:
    here, committed = tmp_path / "here", tmp_path / "committed"
    for folder, name in ((committed, "there"), (here, "here")):
        earlier = Report.begin(folder, "NVIDIA H100 80GB HBM3")
        earlier.add(Figure(name, "s", 1, 0.5, 2, section="copy"))
    names = [
        [figure.name for figure in Report.begin(folder, "NVIDIA H100 80GB HBM3", committed).figures]
        for folder in (tmp_path / "new", here)
    ]
    assert names == [["there"], ["here"]]
    assert Report.begin(here, "NVIDIA H200", committed).figures == []
    assert (here / "nvidia-h100-80gb-hbm3.json").exists()


def test_the_readme_has_what_was_promised_or_says_that_nothing_is_measured(tmp_path: Path) -> None:
    assert readme.gpu(tmp_path) == "GPU figures are not yet measured."
    report = Report.begin(tmp_path, "NVIDIA H200")
    report.calls["3"] = {"torch": "2.11.0+cu130", "on": "2026-01-02"}
    report.add(Figure("SimpleCNN, sampled labels", "times a forward and backward", 0.9, 0.8, 1.0, section="Tr(F)"))
    report.add(Figure("SimpleCNN, sampled labels", "ms", 7, section="Tr(F)"))
    assert readme.gpu(tmp_path).splitlines() == [
        "Measured on NVIDIA H200 by `make gpu`: torch 2.11.0+cu130, on 2026-01-02. "
        "All figures: [bench/results/nvidia-h200.md](../bench/results/nvidia-h200.md).",
        "",
        "| section | what | figure | quartiles | unit | bar | met |",
        "|---|---|---|---|---|---|---|",
        "| Tr(F) | SimpleCNN, sampled labels | 0.9 | 0.8–1 | times a forward and backward | ≤ 1.1 | yes |",
    ]

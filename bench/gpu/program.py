"""The program: which cases there are, in which process they run, and what becomes of those that fail."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib
import importlib.metadata
import multiprocessing
import os
import platform
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

import bench.gpu
from bench.gpu import checks, kernels, networks  # noqa: F401 (their cases)
from bench.gpu.report import NOT_AT_HAND, Figure, Report
from bench.gpu.timing import CASES, Case, Setting, dry_run, on_this_gpu, said
from fastfisher import ops

RESULTS = checks.ROOT / "bench" / "results"
SECONDS = 525.0
"""Of a call. Cases that have not begun by then are left out, and one that is under way is given up."""
INSTALL = "pip install --no-build-isolation --no-deps -e ."

Measure = Callable[[Case, Setting, float], Iterator[Figure]]
"""Gives the figures of a case, each as it is measured, within so many seconds. It raises nothing (:func:`failure`)."""


def refusal(dry: bool) -> str | None:
    """Why nothing is measured: what is not installed would be measured on the PyTorch reference, without a word."""
    try:
        importlib.metadata.version("fastfisher")
    except importlib.metadata.PackageNotFoundError:
        return "the package is not installed"
    return ops.UNAVAILABLE if dry else ops.GPU_UNAVAILABLE


# ---- the process that measures --------------------------------------------------------------------------------------


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """While it lasts, the Triton kernels serve CPU tensors too, in Triton's interpreter."""
    library = torch.library.Library("fastfisher", "IMPL")
    for name, file in ops.GPU_KERNELS.items():
        library.impl(name, getattr(importlib.import_module(f"fastfisher.kernels.{file}"), name), "CPU")
    try:
        yield
    finally:
        library._destroy()


def here(case: Case, at: Setting, limit: float) -> Iterator[Figure]:
    """Measures in this process, without a limit."""
    torch.manual_seed(0)
    try:
        with interpreted() if at.dry and case.call == 2 else contextlib.nullcontext():
            yield from case.figures(at)
    except Exception as error:
        traceback.print_exc()
        yield failure(case, said(error))
    torch._dynamo.reset()
    if not at.dry:
        gc.collect()
        torch.cuda.empty_cache()


def _serve(pipe: Connection) -> None:
    os.setpgrp()  # what this process starts is ended with it
    while True:
        try:
            case, at = pipe.recv()
        except EOFError:
            return
        for figure in here(case, at, 0):
            pipe.send(figure)
        pipe.send(None)


class Elsewhere:
    """Measures in another process: a case that kills it, hangs, or leaves the GPU unusable costs no other case."""

    def __init__(self) -> None:
        self.process: multiprocessing.process.BaseProcess | None = None

    def __call__(self, case: Case, at: Setting, limit: float) -> Iterator[Figure]:
        """Measures in the process of the case before, unless that case failed."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, other = context.Pipe()
            self.process = context.Process(target=_serve, args=(other,))
            self.process.start()
            other.close()  # so that its end is seen when the process has ended
        end, failed = time.monotonic() + limit, False
        self.pipe.send((case, at))
        try:
            while self.pipe.poll(max(0.0, end - time.monotonic())):
                figure = self.pipe.recv()
                if figure is None:
                    break
                failed = failed or is_failure(figure)
                yield figure
            else:
                failed = True
                yield failure(case, f"given up after {limit:.0f} s")
        except EOFError:
            failed = True
            yield failure(case, "the process that measured it died")
        if failed:
            self.close()

    def close(self) -> None:
        """Ends the process and what it has started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid or 0, signal.SIGKILL)
            self.process.kill()
            self.process.join()
            self.process = None


# ---- the program ----------------------------------------------------------------------------------------------------


def failure(case: Case, reason: str) -> Figure:
    """What is reported of a case that failed; it has no unit."""
    return Figure(str(case), "", error=reason)


def is_failure(figure: Figure) -> bool:
    """Whether it is of a case that failed, not of a number."""
    return figure.unit == ""


def run(report: Report, cases: Sequence[Case], at: Setting, measure: Measure, seconds: float = SECONDS) -> None:
    """Measures the cases in order; each figure is written before the next is measured."""
    end = time.monotonic() + seconds
    for case in cases:
        left = end - time.monotonic()
        late = failure(case, f"left out: {seconds:g} s had passed")
        for figure in measure(case, at, min(case.limit, left)) if left > 0 else (late,):
            report.add(replace(figure, section=case.section))
            print(report.figures[-1].line(), flush=True)


def machine() -> dict[str, str]:
    """What the figures of a call depend on, beside the device."""
    versions = {"torch": torch.__version__, "Python": platform.python_version()}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["Triton"] = importlib.metadata.version("triton")
    return {**versions, "on": datetime.date.today().isoformat()}


def main(arguments: Sequence[str] | None = None, measure: Measure | None = None) -> int:
    """Measures a call; 0 where all went well, 1 where a test or a case failed, 2 where nothing was measured."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=bench.gpu.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--call", type=int, choices=(1, 2, 3, 4), required=True)
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: bench/results, or build/dry-run of a dry run"
    )
    parser.add_argument("--dry-run", action="store_true", help="without a GPU, at sizes too small to mean anything")
    parser.add_argument("sections", nargs="*", metavar="section", help="default: all sections of the call")
    chosen = parser.parse_args(arguments)
    reason = refusal(chosen.dry_run)
    if reason is not None:
        print(f"bench.gpu: nothing was measured: {reason}. The package is installed by: {INSTALL}")
        return 2
    cases = [case for case in CASES if case.call == chosen.call]
    sections = list(dict.fromkeys(case.section for case in cases))
    unknown = [name for name in chosen.sections if name not in sections]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; call {chosen.call} has the sections {', '.join(sections)}")
    sections = chosen.sections or sections
    if chosen.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    out = (chosen.out or (checks.ROOT / "build" / "dry-run" if chosen.dry_run else RESULTS)).resolve()
    at = dry_run(out) if chosen.dry_run else on_this_gpu(out)
    report = Report.begin(out, "dry run" if at.dry else torch.cuda.get_device_name(), RESULTS)
    report.drop(sections)
    report.calls[str(chosen.call)] = machine()
    with contextlib.closing(Elsewhere()) as elsewhere:
        run(report, [case for case in cases if case.section in sections], at, measure or elsewhere)
    found = [figure for figure in report.figures if figure.section in sections]
    failed = [figure for figure in found if is_failure(figure) and not figure.error.startswith(NOT_AT_HAND)]
    unmet = [figure for figure in found if figure.section in (checks.TESTS, checks.SANITIZER) and figure.met is False]
    print(f"{len(found)} figures in {report.path}; {len(failed)} cases failed", flush=True)
    return 1 if failed or unmet else 0

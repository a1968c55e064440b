"""Trains the runs of a plan: what is ready, as many at once as there is room for, each retried once."""

from __future__ import annotations

import time
from dataclasses import dataclass

from tqdm import tqdm

from fastfisher.paper.plan import Plan, Run
from fastfisher.paper.workers import Job, Workers
from fastfisher.training.loop import catch_interrupt
from fastfisher.training.replicas import ending_signals

SECONDS_BETWEEN_LOOKS = 0.02
ATTEMPTS = 2


@dataclass(frozen=True)
class Failure:
    """A run that did not end as it should, ``ATTEMPTS`` times, and why the last time."""

    run: Run
    reason: str

    def __str__(self) -> str:
        """Return ``name: why (log)``."""
        return f"{self.run.name}: {self.reason} ({self.run.config.out}.log)"


def train_plan(plan: Plan, workers: Workers) -> list[Failure]:
    """Train what is not finished, and return the runs that failed; what depends on those is not trained.

    A worker that dies loses its own run only. One bar counts the runs, those for tuning too.

    Raises:
        KeyboardInterrupt: after Ctrl-C, SIGTERM or SIGHUP, once the runs under way have saved a checkpoint.
    """
    running: dict[str, tuple[Run, Job]] = {}
    attempts: dict[str, int] = {}
    failures: dict[str, Failure] = {}
    ready = plan.ready()
    with (
        catch_interrupt(ending_signals()) as interrupted,
        tqdm(total=plan.count(), initial=plan.count_finished(), unit="run", disable=None, smoothing=0.05) as bar,
    ):
        try:
            while not interrupted():
                waiting = [run for run in ready if run.name not in running and run.name not in failures]
                if not (waiting or running):
                    break
                for run in waiting[: max(0, workers.capacity - len(running))]:
                    attempts[run.name] = attempts.get(run.name, 0) + 1
                    running[run.name] = run, workers.start(run)
                time.sleep(SECONDS_BETWEEN_LOOKS)
                ended = [(run, reason) for run, job in running.values() if (reason := job.failure()) is not None]
                for run, reason in ended:
                    del running[run.name]
                    if plan.outcome(run) is not None:
                        continue
                    if attempts[run.name] < ATTEMPTS:
                        tqdm.write(f"{run.name}: {reason}; once more")
                    else:
                        failures[run.name] = Failure(run, reason)
                        tqdm.write(str(failures[run.name]))
                if ended:
                    bar.update(plan.count_finished() - bar.n)
                    # Those under way and those that failed are among what the plan still wants.
                    ready = plan.ready(2 * workers.capacity + len(running) + len(failures))
        finally:
            for _, job in running.values():
                job.stop()
            for _, job in running.values():
                job.wait()
        if interrupted():
            raise KeyboardInterrupt
    return list(failures.values())

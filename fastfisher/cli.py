"""The command line: ``fastfisher info``, ``fastfisher train`` and ``fastfisher reproduce``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastfisher.training.replicas import Replicas

TRAIN_EXTRA = ("sklearn", "scipy", "matplotlib", "tqdm", "tensorboard")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    0: done; 1: a run failed or an extra is not installed; 2: an option cannot be used, nothing was written;
    130: interrupted by Ctrl-C, after saving a checkpoint.
    """
    given = vars(_parser().parse_args(arguments))
    command = given.pop("command")
    if command == "info":
        from fastfisher.info import describe

        print(describe())
        return 0
    try:
        if command == "reproduce":
            # Imported here, because it imports matplotlib, which no other command needs.
            from fastfisher.paper.reproduce import main as reproduce

            return reproduce(given)
        return _train(given)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in TRAIN_EXTRA:
            raise
        print(f'fastfisher {command}: {error.name} is not installed: pip install "fastfisher[train]"', file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    from fastfisher.paper.arguments import add_arguments as add_reproduce_arguments
    from fastfisher.training.arguments import add_arguments as add_train_arguments

    parser = argparse.ArgumentParser(
        prog="fastfisher", description="Penalise and measure curvature through the Fisher Information Matrix."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | train | reproduce")
    commands.add_parser("info", help="what was compiled, and which backend serves which device")
    train = commands.add_parser(
        "train",
        help="train a network, with or without a gradient penalty",
        description="Train a network with SGD and, if --method names one, a gradient penalty.",
        allow_abbrev=False,
    )
    add_train_arguments(train)
    seeds = train.add_argument_group("many seeds")
    for name, text in (
        (
            "--seeds",
            "train this many runs, with --seed and the numbers that follow, each in a folder seed-<seed> of --out and "
            "each as it is alone; the label noise has each run's seed unless --noise-seed is given",
        ),
        (
            "--together",
            "how many of --seeds train at the same time, each in a process of its own (default: 1); on a GPU all "
            "use the same device, and each gets its share of the CPU's threads unless --threads is given",
        ),
    ):
        seeds.add_argument(name, type=int, metavar="INT", default=argparse.SUPPRESS, help=text)
    reproduce = commands.add_parser(
        "reproduce",
        help="any table or figure of the paper, by its id",
        description="Train what a table or figure of the paper needs, and write it with a report. Started again with "
        "the same options it goes on where it was.",
        allow_abbrev=False,
    )
    add_reproduce_arguments(reproduce)
    return parser


def _train(given: dict[str, Any]) -> int:
    from fastfisher.training.config import ConfigError, from_values, to_values
    from fastfisher.training.endings import TrainingDivergedError, how_to_continue
    from fastfisher.training.folder import RunFolder
    from fastfisher.training.loop import train
    from fastfisher.training.replicas import asked_for

    try:
        if replicas := asked_for(given):
            return _train_replicas(replicas)
        config = from_values(given)
        if config.resume:
            # What is not on the command line is as it was when the run was started, but for where it lies.
            config = from_values({**to_values(RunFolder(config.out).read_config()), **given, "out": config.out})
        outcome = train(config)
    except ConfigError as error:
        print(f"fastfisher train: {error}", file=sys.stderr)
        return 2
    except TrainingDivergedError as error:
        print(f"fastfisher train: {error}", file=sys.stderr)
        return 1
    if outcome == "interrupted":
        print(how_to_continue(config.out))
        return 130
    print(f"{outcome}: {config.out}")
    return 0


def _train_replicas(replicas: Replicas) -> int:
    from fastfisher.training.endings import how_to_continue
    from fastfisher.training.replicas import train_replicas
    from fastfisher.training.summary import describe_summary

    try:
        summary, failures = train_replicas(replicas)
    except KeyboardInterrupt:
        print(how_to_continue(replicas.config.out))
        return 130
    print(describe_summary(summary))
    for failure in failures:
        print(f"fastfisher train: {failure}", file=sys.stderr)
    return 1 if failures else 0

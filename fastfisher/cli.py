"""The command line: ``fastfisher info`` and ``fastfisher train``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

TRAIN_EXTRA = ("sklearn", "tqdm", "tensorboard")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    0: done; 1: the run failed or an extra is not installed; 2: an option cannot be used, nothing was written;
    130: interrupted by Ctrl-C, after saving a checkpoint.
    """
    parser = argparse.ArgumentParser(
        prog="fastfisher", description="Penalise and measure curvature through the Fisher Information Matrix."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | train")
    commands.add_parser("info", help="what was compiled, and which backend serves which device")
    train_parser = commands.add_parser(
        "train",
        help="train a network, with or without a gradient penalty",
        description="Train a network with SGD and, if --method names one, a gradient penalty.",
        allow_abbrev=False,
    )

    from fastfisher.training.config import add_arguments

    add_arguments(train_parser)
    given = vars(parser.parse_args(arguments))
    if given.pop("command") == "info":
        from fastfisher.info import describe

        print(describe())
        return 0
    try:
        return _train(given)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in TRAIN_EXTRA:
            raise
        print(
            f'fastfisher train: {error.name} is not installed: pip install "fastfisher[train]"',
            file=sys.stderr,
        )
        return 1


def _train(given: dict[str, Any]) -> int:
    from fastfisher.training.config import ConfigError, from_values, to_values
    from fastfisher.training.folder import RunFolder
    from fastfisher.training.loop import TrainingDivergedError, train

    try:
        config = from_values(given)
        if config.resume:
            # What is not on the command line is as it was when the run was started.
            config = from_values({**to_values(RunFolder(config.out).read_config()), **given})
        outcome = train(config)
    except ConfigError as error:
        print(f"fastfisher train: {error}", file=sys.stderr)
        return 2
    except TrainingDivergedError as error:
        print(f"fastfisher train: {error}", file=sys.stderr)
        return 1
    if outcome == "interrupted":
        print(f"interrupted; continue with: fastfisher train --resume --out {shlex.quote(config.out)}")
        return 130
    print(f"{outcome}: {config.out}")
    return 0

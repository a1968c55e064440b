"""The options of ``fastfisher train``: one for each field of a run's configuration."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from typing import Any

from fastfisher.training.config import TrainConfig, flag


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one option per field of :class:`TrainConfig`. Options not given are absent from the namespace."""
    hints = typing.get_type_hints(TrainConfig)
    for option in dataclasses.fields(TrainConfig):
        hint = hints[option.name]
        text = option.metadata["help"]
        if hint is bool:
            parser.add_argument(flag(option.name), action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        if option.default not in (None, ()):
            text += f" (default: {option.default})"
        several = typing.get_origin(hint) is tuple
        parser.add_argument(
            flag(option.name),
            type=_scalar_type(hint),
            nargs="*" if several else None,
            choices=option.metadata["choices"],
            metavar=None if option.metadata["choices"] else _scalar_type(hint).__name__.upper(),
            default=argparse.SUPPRESS,
            help=text,
        )


def _scalar_type(hint: Any) -> type[Any]:
    """Return the type of one value: int for ``int``, ``int | None`` and ``tuple[int, ...]``."""
    return typing.cast("type[Any]", (*typing.get_args(hint), hint)[0])

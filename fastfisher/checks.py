"""Checks of arguments that several functions take; each error names the argument, the value and what was expected."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import nn


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite real number; a boolean is not."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: Any, least: int = 1) -> bool:
    """Whether ``value`` is an integer >= ``least``; a boolean is not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_flags(**flags: Any) -> None:
    """Raises ValueError where one of the arguments, given by name, is no boolean."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}: expected True or False, got {value!r}")


def check_model(model: Any) -> None:
    """Raises TypeError where ``model`` is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def check_generator(generator: Any) -> None:
    """Raises ValueError where ``generator`` is neither a generator nor None."""
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise ValueError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")

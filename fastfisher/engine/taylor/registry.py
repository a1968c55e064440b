"""Which rule serves which function of torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class NoRule(RuntimeError):
    """An operation of the forward that has no rule here; the message names it."""


RULES: dict[Any, tuple[Callable[..., Any], bool]] = {}
"""By function: the rule, and whether the function works in place."""


def rule_for(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a rule for functions of these names in torch, Tensor and torch.nn.functional, and their x_ forms."""

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        for name in " ".join(names).split():
            dunder = name.startswith("__")
            inplace_name = f"__i{name[2:]}" if dunder else f"{name}_"
            for place in (torch, Tensor, F, torch._C._nn, torch.special, torch.linalg):
                if hasattr(place, name):
                    RULES[getattr(place, name)] = (rule, False)
                if hasattr(place, inplace_name):
                    RULES[getattr(place, inplace_name)] = (rule, True)
        return rule

    return register


def written(write: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of a function that is written in functions that have one."""

    @functools.wraps(write)  # with its signature, which tells the keywords that it takes
    def rule(tape: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
        with tape:
            return write(*args, **kwargs)

    return rule

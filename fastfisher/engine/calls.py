"""How a function of torch was called: the one description of its signature, for gates, captures and tapes.

PyTorch takes the same arguments by position, by name, and by NumPy's names (``axis`` for ``dim``, ``keepdims``, ``x``).
A rule that looks at a call should not have to know which: :func:`positional` puts the arguments where the signature has
them. The signatures are PyTorch's own: the schemas of its operators, and those of its functions written in Python.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_ALIASES = {
    "input": "self",
    "x": "self",
    "a": "self",
    "x1": "self",
    "x2": "other",
    "axis": "dim",
    "keepdims": "keepdim",
}
"""The names that PyTorch's argument parser takes for those of the schema."""

_Parameters = tuple[tuple[str, Any], ...]
_MISSING = inspect.Parameter.empty


def positional(func: Callable[..., Any], args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call of ``func`` with the arguments given by name in the positions that the signature has for them.

    Arguments between two that were given get their defaults. What has no position (``alpha`` of ``add``) stays a
    keyword, under the name of the schema; so does everything where the signature is not known.

    >>> positional(torch.amax, (), {"input": x, "axis": 1})
    ((x, 1), {})
    """
    if not kwargs:
        return tuple(args), {}
    for parameters, keyword_only, aliases in _signatures(func):
        named = {aliases.get(name, name): value for name, value in kwargs.items()}
        names = [name for name, _ in parameters]
        rest = set(named) - set(names)
        given = set(names[: len(args)])
        if len(args) > len(names) or rest - keyword_only or given & set(named):
            continue
        filled, left = list(args), dict(named)
        for name, default in parameters[len(args) :]:
            if not left.keys() - rest:
                break
            if name not in left and default is _MISSING:
                break
            filled.append(left.pop(name) if name in left else default)
        if left.keys() - rest:
            continue
        return tuple(filled), left
    return tuple(args), dict(kwargs)


@functools.cache
def _signatures(func: Callable[..., Any]) -> list[tuple[_Parameters, frozenset[str], dict[str, str]]]:
    """Of each way to call ``func``: parameters with a position and their defaults, the others, aliases."""
    try:
        found = inspect.signature(func)
    except (TypeError, ValueError):
        return _schemas(func)
    kinds = inspect.Parameter
    parameters = found.parameters.values()
    by_position = (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    if any(p.kind is kinds.VAR_POSITIONAL for p in parameters):
        return _schemas(func)
    return [
        (
            tuple((p.name, p.default) for p in parameters if p.kind in by_position),
            frozenset(p.name for p in parameters if p.kind is kinds.KEYWORD_ONLY),
            {},
        )
    ]


def _schemas(func: Callable[..., Any]) -> list[tuple[_Parameters, frozenset[str], dict[str, str]]]:
    name = getattr(func, "__name__", "")
    packet = getattr(torch.ops.aten, name, None) if name and not name.startswith("__") else None
    if packet is None:
        return []
    is_method = getattr(Tensor, name, None) is func
    found = []
    for overload in packet.overloads():
        arguments = getattr(packet, overload)._schema.arguments
        if any("Dimname" in str(argument.type) for argument in arguments):
            continue
        placed = [
            (argument.name, argument.default_value if argument.has_default_value() else _MISSING)
            for argument in arguments
            if not argument.kwarg_only
        ]
        if is_method:  # x.where(condition, other): the tensor comes first, wherever the schema has it
            placed.sort(key=lambda parameter: parameter[0] != "self")
        names = {argument.name for argument in arguments}
        aliases = {alias: name for alias, name in _ALIASES.items() if alias not in names}
        found.append(
            (tuple(placed), frozenset(argument.name for argument in arguments if argument.kwarg_only), aliases)
        )
    return found


_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
_FUNCTIONS = ("torch.nn.functional", "torch.functional")


@functools.cache
def opened(func: Callable[..., Any], methods: bool = False) -> Callable[..., Any] | None:
    """A function of ``torch.nn.functional`` written in Python, without its own look for overrides.

    A mode sees a call of such a function as one, and what it calls not at all. Called as this copy within the mode, the
    calls inside are seen one by one. None for everything that is not written in Python. With ``methods``, those of
    tensors are opened too.
    """
    places = (*_FUNCTIONS, "torch._tensor") if methods else _FUNCTIONS
    # By where it was written: F.max_pool2d only chooses one of two functions, which ask for overrides of F.max_pool2d.
    if not (isinstance(func, types.FunctionType) and func.__globals__.get("__name__") in places):
        return None
    scope = {**func.__globals__, **{check: lambda *_: False for check in _CHECKS}}
    for name in func.__code__.co_names:  # a private part of it may ask for overrides of the whole: _meshgrid
        if name.startswith("_") and scope.get(name, func) is not func:
            scope[name] = opened(scope[name], methods) or scope[name]
    copy = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy

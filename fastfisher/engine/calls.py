"""How a function of torch was called: its arguments by the signature, and what it writes into.

Everything that watches the calls of a forward (gates, captures, tapes, rollback) asks here. PyTorch takes the same
argument by position, by name, and by NumPy's names (``axis`` for ``dim``, ``keepdims``, ``x``): :func:`positional`
puts arguments where the signature has them, and :func:`argument` reads one of them. The signatures are PyTorch's own:
the schemas of its operators, and those of its functions written in Python.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import resolve_name

Function = Callable[..., Any]

# ---- arguments -------------------------------------------------------------------------------------------------------

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


def positional(func: Function, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call of ``func`` with the arguments given by name in the positions that the signature has for them.

    Arguments between two that were given get their defaults. What has no position (``alpha`` of ``add``) stays a
    keyword, under the name of the schema; so does everything where the signature is not known.

    >>> positional(torch.amax, (), {"input": x, "axis": 1})
    ((x, 1), {})
    """
    if not kwargs:
        return tuple(args), {}
    found = _placed(func, len(args), tuple(kwargs))
    if found is None:
        return tuple(args), dict(kwargs)
    behind, named = found
    filled = (kwargs[given] if given is not None else default for given, default in behind)
    return (*args, *filled), {name: kwargs[given] for name, given in named}


@functools.cache
def _placed(
    func: Function, count: int, given: tuple[str, ...]
) -> tuple[list[tuple[str | None, Any]], list[tuple[str, str]]] | None:
    """Where the arguments of a call go that gives ``count`` by position and the others by these names.

    Returns:
        For each position behind those the name it was given by, or None and the default; and of the arguments that stay
        keywords their name and the one they were given by. None where no signature of the function fits.
    """
    for parameters, keyword_only, aliases in _signatures(func):
        left = {aliases.get(name, name): name for name in given}
        names = [name for name, _ in parameters]
        rest = left.keys() - set(names)
        if count > len(names) or rest - keyword_only or left.keys() & set(names[:count]):
            continue
        behind: list[tuple[str | None, Any]] = []
        for name, default in parameters[count:]:
            if not left.keys() - rest or (name not in left and default is _MISSING):
                break
            behind.append((left.pop(name), None) if name in left else (None, default))
        if not left.keys() - rest:
            return behind, list(left.items())
    return None


def argument(func: Function, args: Any, kwargs: Any, name: str, default: Any = None) -> Any:
    """One argument of a call, by the name that the signature has for it; its default there, or else ``default``."""
    if name in kwargs:
        return kwargs[name]
    place, own = _place(func, name)
    if place is not None and place < len(args):
        return args[place]
    return default if own is _MISSING else own


def complete(func: Function, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """All arguments of a call in the positions of the signature, with the defaults of those not given."""
    placed, _ = positional(func, args, kwargs)
    parameters = next((found for found, _, _ in _signatures(func) if len(found) >= len(placed)), ())
    return (*placed, *(default for _, default in parameters[len(placed) :]))


@functools.cache
def _place(func: Function, name: str) -> tuple[int | None, Any]:
    """The position of a parameter, in the first signature that has it at one, and its default."""
    for parameters, _, _ in _signatures(func):
        for place, (parameter, default) in enumerate(parameters):
            if parameter == name:
                return place, default
    return None, _MISSING


@functools.cache
def _signatures(func: Function) -> list[tuple[_Parameters, frozenset[str], dict[str, str]]]:
    """Of each way to call ``func``: parameters with a position and their defaults, the others, aliases."""
    try:
        found = inspect.signature(_dispatched(func))
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


def _dispatched(func: Function) -> Function:
    """Of a function that only chooses one of two with the same parameters (``F.max_pool2d``), the first of them."""
    if getattr(func, "__qualname__", "").startswith("boolean_dispatch."):
        return inspect.getclosurevars(func).nonlocals["if_true"]  # type: ignore[no-any-return]
    return func


def _schemas(func: Function) -> list[tuple[_Parameters, frozenset[str], dict[str, str]]]:
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


# ---- what a call writes into -----------------------------------------------------------------------------------------

_OPERATORS = [
    "add", "sub", "mul", "truediv", "div", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift", "matmul",
]  # fmt: skip
_INPLACE_OPERATORS = frozenset(f"__i{name}__" for name in _OPERATORS) | {"__setitem__"}


@functools.cache
def writes_first(func: Function) -> bool:
    """Whether the function's name says that it writes into its first argument."""
    name = getattr(func, "__name__", "")
    return name in _INPLACE_OPERATORS if name.endswith("__") else name.endswith("_")


def written(func: Function, args: Any, kwargs: Any) -> Tensor | None:
    """The tensor that a call writes into by the function's name or by ``out=``; None for one that writes into none."""
    target = kwargs.get("out")
    if target is None and args and writes_first(func):
        target = args[0]
    return target if isinstance(target, Tensor) else None


def split_inplace(func: Function, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """The arguments without ``inplace``, and whether the call works in place."""
    place, _ = _place(func, "inplace")
    inplace = bool(kwargs.get("inplace", False))
    if "inplace" in kwargs:
        kwargs = {name: value for name, value in kwargs.items() if name != "inplace"}
    if place is not None and place < len(args):
        args, inplace = args[:place], args[place]
    return tuple(args), kwargs, inplace or writes_first(func)


def outplace(func: Function) -> Function:
    """The function that returns what ``func`` would write into its first argument."""
    name = getattr(func, "__name__", "")
    if not writes_first(func) or name == "__setitem__":
        return func
    name = f"__{name[3:]}" if name.startswith("__i") else name[:-1]
    return next((getattr(place, name) for place in (torch, F, Tensor) if hasattr(place, name)), func)


# ---- the calls within a call -----------------------------------------------------------------------------------------

_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
_FUNCTIONS = ("torch.nn.functional", "torch.functional")


@functools.cache
def opened(func: Function, methods: bool = False) -> Function | None:
    """A function of ``torch.nn.functional`` written in Python, without its own look for overrides.

    A mode sees a call of such a function as one call, and none of those within. Called as this copy within the mode,
    the calls inside are seen one by one. None for everything that is not written in Python. With ``methods``, those of
    tensors are opened too.
    """
    places = (*_FUNCTIONS, "torch._tensor") if methods else _FUNCTIONS
    # By the module it was written in: F.max_pool2d, made by another, only chooses between two functions that ask for
    # overrides of F.max_pool2d themselves.
    if not (isinstance(func, types.FunctionType) and func.__globals__.get("__name__") in places):
        return None
    scope = {**func.__globals__, **{check: lambda *_: False for check in _CHECKS}}
    for name in func.__code__.co_names:  # a private function may ask for overrides on its behalf, as _meshgrid does
        if name.startswith("_") and scope.get(name, func) is not func:
            scope[name] = opened(scope[name], methods) or scope[name]
    copy = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


# ---- tensors and names -----------------------------------------------------------------------------------------------


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Nested tuples, lists and dicts with ``function`` applied to their tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(map_tensors(function, item) for item in value)
    if type(value) is dict:
        return {name: map_tensors(function, item) for name, item in value.items()}
    return value


def name_of(func: Any) -> str:
    """A function's name for a message."""
    return str(resolve_name(func) or getattr(func, "__name__", repr(func)))

"""Whether a forward can be repeated: the second one of a finite difference has to be the first one moved, no more.

Replayed are the default random number generators of torch, the buffers as they were, and the gates. A model that draws
from elsewhere (NumPy, ``random``, a generator of its own), or keeps a state or a counter outside of its buffers, gives
another network in its second forward, and the difference of the two is no derivative. That is found once for each kind
of batch, by a repetition with a step of length 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastfisher.host import looking_waits
from fastfisher.inputs import Inputs, input_tensors, known_of

ROUNDINGS = 64
"""Logits may differ by so many units of rounding of the largest: on a GPU, sums in another order."""


@dataclass
class _Seen:
    """Of a model: the kinds of batches seen, and values not read yet (on a GPU reading waits), each with its check."""

    kinds: set[Any] = field(default_factory=set)
    pending: list[tuple[Tensor, Callable[[float], None]]] = field(default_factory=list)


def _seen_of(model: nn.Module) -> _Seen:
    found: _Seen = known_of(model).setdefault("repeatable", _Seen())
    return found


def is_new_kind(model: nn.Module, inputs: Inputs, *what: Any) -> bool:
    """Whether it is the first time that this model meets inputs of these shapes and dtypes, in these modes.

    Raises:
        ValueError: what was found out in an earlier step, on a GPU, where no step waits for it.
    """
    seen = _seen_of(model)
    while seen.pending:
        value, look = seen.pending.pop()
        look(float(value))
    kind = (
        *what,
        tuple((x.shape, x.dtype) for x in input_tensors(inputs)),
        hash(tuple(module.training for module in model.modules())),
    )
    if kind in seen.kinds:
        return False
    seen.kinds.add(kind)
    return True


def look_at(model: nn.Module, value: Tensor, look: Callable[[float], None]) -> None:
    """``look(float(value))``: now, or on a GPU at the next call of :func:`is_new_kind`, so that no step waits."""
    if looking_waits(value):
        _seen_of(model).pending.append((value, look))
    else:
        look(float(value))


def check_repeatable(model: nn.Module, again: Callable[[], Tensor], expected: Tensor, precision: torch.dtype) -> None:
    """Refuses a model whose repeated forward gives other logits.

    Args:
        model: the model.
        again: repeats the forward and gives its logits.
        expected: the logits of the first time.
        precision: what they were computed in.

    Raises:
        ValueError: they differ by more than rounding; the module that differs first is named. On a GPU the next call of
            :func:`is_new_kind` raises it, so that this step does not wait.
    """
    limit = ROUNDINGS * torch.finfo(precision).eps
    try:
        found = again()
        same_shape = found.shape == expected.shape
        difference = _distance(found, expected) if same_shape else torch.full((), torch.inf)
        path = None
    except ValueError as error:  # the replay met other gates: the second forward took another path
        if not str(error).startswith("gates:"):
            raise
        difference, path = torch.full((), torch.inf), error
    waits = looking_waits(difference)

    def look(distance: float) -> None:
        if not distance <= limit:
            _seen_of(model).kinds.clear()
            _refuse(distance, None if waits else _first_to_differ(model, again), path)

    look_at(model, difference, look)


def _distance(found: Tensor, expected: Tensor) -> Tensor:
    """The largest difference over the largest logit."""
    if not found.numel():
        return torch.zeros(())
    finite = expected.isfinite() & found.isfinite()
    away = torch.where(finite, (found - expected).abs(), (found != expected) & ~(found.isnan() & expected.isnan()))
    return away.double().amax() / torch.where(finite, expected.abs(), 0).double().amax().clamp(min=1e-30)


def _refuse(distance: float, name: str | None, cause: BaseException | None) -> None:
    where = "its logits" if name is None else f"the output of module {name}"
    raise ValueError(
        f"model: its forward cannot be repeated: called again at the same point, {where} differed (the logits by "
        f"{distance:.1e} of the largest). It draws random numbers that are not of torch's default generators (NumPy, "
        "random, a torch.Generator of its own), or keeps a state or a counter outside of its buffers. Finite "
        "differences need the same network twice: draw by torch's default generators, keep states in buffers "
        '(register_buffer), or use method="double_backprop"'
    ) from cause


_Output = tuple[str, str, list[Tensor]]


def _first_to_differ(model: nn.Module, again: Callable[[], Tensor]) -> str | None:
    """The first module whose output differs between two more repetitions."""
    first: list[_Output] = []
    second: list[_Output] = []
    for found in (first, second):
        with (
            _watched(model, found),
            suppress(ValueError),
        ):  # raised where it takes another path; the outputs before that are noted
            again()
    for (name, kind, x), (other_name, _, y) in zip(first, second, strict=False):
        if name != other_name:
            return f"{other_name!r}, which was called in place of {name!r},"
        if not all(torch.equal(a, b) for a, b in zip(x, y, strict=False)):
            return f"{name!r} ({kind})"
    return None


@contextmanager
def _watched(model: nn.Module, found: list[_Output]) -> Iterator[None]:
    names = {module: name for name, module in model.named_modules() if name}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        with torch._C.DisableTorchFunction():  # or the replay would take this for a part of the forward
            outputs = output if isinstance(output, tuple) else (output,)
            tensors = [x.detach().clone() for x in outputs if isinstance(x, Tensor)]
        found.append((names[module], type(module).__name__, tensors))

    handles = [module.register_forward_hook(note) for module in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

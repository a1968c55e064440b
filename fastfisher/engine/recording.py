"""The forwards of gates: one that records what is discrete in it, and one that replays a record."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastfisher.autocast import autocast_dtype
from fastfisher.engine.calls import argument, name_of, opened, positional, tensors_in, written
from fastfisher.engine.checkpointing import keep_saved_tensors
from fastfisher.engine.fused.forward import has_gates, ungated
from fastfisher.engine.hooks import watched
from fastfisher.engine.piecewise.rules import Rule, Run
from fastfisher.engine.piecewise.table import DROPOUTS, KNOWN, Known, always, refuse_random
from fastfisher.slow_path import warn_slow_path


class AccuracyWarning(UserWarning):
    """A finite difference may be far from the derivative; the message says why, and what would help.

    To forbid it: ``warnings.simplefilter("error", fastfisher.AccuracyWarning)``.
    """


@dataclass
class Entry:
    """One recorded call: its name, the shape it produced, and what its replay needs."""

    name: str
    shape: torch.Size | None
    saved: Any


@dataclass
class _Held:
    """A value that autograd holds fixed, as it was when it was recorded.

    It shares its memory with the tensor that the model has, until the model is about to write into that memory.
    """

    value: Any
    version: int = 0

    @classmethod
    def of(cls, value: Any) -> _Held:
        return cls(value.detach(), value._version) if isinstance(value, Tensor) else cls(value)

    def given(self) -> Any:
        """The value, for a replayed forward."""
        if not isinstance(self.value, Tensor):
            return self.value
        if self.value._version != self.version:
            raise ValueError(
                f"model: a tensor {tuple(self.value.shape)} made under detach() or no_grad() was overwritten "
                'by something that cannot be seen (a custom autograd.Function?); use method="double_backprop"'
            )
        return self.value.detach()


@dataclass(kw_only=True)
class Recording:
    """What a recorded forward leaves behind.

    Attributes:
        device: the type of device that the model is on.
        autocast: the dtype of an autocast met within the forward, which its caller need not know of.
        met: the floating dtypes in which something was computed that depends on the parameters, each with the number
            of the first such node in autograd's order.
        full_precision: whether autocast is off within, wherever it is switched on.
        hook: a hook within the model that changed a gradient in a backward of the recorded forward, by name.
        entries: the recorded calls in order.
    """

    device: str = "cpu"
    autocast: torch.dtype | None = None
    met: dict[torch.dtype, int] = field(default_factory=dict)
    full_precision: bool = False
    hook: str | None = None
    entries: list[Entry] = field(default_factory=list)

    def without_autocast(self) -> AbstractContextManager[Any]:
        """A context without autocast on the device of the model."""
        return torch.autocast(self.device, enabled=False)

    def arithmetic(self) -> AbstractContextManager[Any]:
        """A context for the backward of the forward: an autocast that is on around a backward applies to it, too."""
        return self.without_autocast() if self.full_precision else nullcontext()

    def watched(self, hook: Callable[..., Any], given: int) -> Callable[..., Any]:
        """``hook``, whose name is noted when it gives another gradient than its argument ``given``."""

        def note(name: str) -> None:
            self.hook = self.hook or name

        return watched(hook, given, note)


class _Repeatable(Run, TorchFunctionMode):
    """A forward that is recorded or replayed: sorts its calls into gated ones, held values and all others."""

    def __init__(self, recording: Recording, *, keep_random: bool) -> None:
        super().__init__()
        self.recording, self.entries, self.keep_random = recording, recording.entries, keep_random
        self.shared: dict[int, list[_Held]] = {}  # by storage: held values that share it with a tensor of the model

    def within(self) -> AbstractContextManager[Any]:
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.recording.full_precision and autocast_dtype(self.recording.device) is not None:
            with self.recording.without_autocast():  # it was switched on within the model
                return self._call(func, args, kwargs)
        return self._call(func, args, kwargs)

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is Tensor.register_hook:
            return func(args[0], self.recording.watched(argument(func, args, kwargs, "hook"), 0))  # type: ignore[no-untyped-call]
        known = KNOWN.get(func)
        if self.keep_random:
            known = DROPOUTS.get(func, known)
        if keep_saved_tensors():
            warn_slow_path(
                "activation checkpointing is off in the forwards that R is taken of, which keep their activations: the "
                "steps that recompute R take the memory of a step without it (examples= takes R of a part of the batch)"
            )
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return self._transformed(known, func, args, kwargs)
        target = written(func, args, kwargs)
        if target is not None and target.layout != torch.strided:
            target = None
        moves = target is not None and any(x.requires_grad for x in tensors_in((args, kwargs)))
        if target is not None and self.shared:
            self._save_before(target)
        if known is not None and known.rule is not None and torch.is_grad_enabled():
            placed, named = positional(func, args, kwargs)
            if any(has_gates(x) for x in placed[:2]) and not known.smooth(func, *placed, **named):
                return self.gated(known, known.rule, func, placed, named)
        if known is None:
            inner = opened(func)
            if inner is not None:
                with self:
                    return inner(*args, **kwargs)
        self.before(known, func, args, kwargs)
        out = ungated(func, args, kwargs)
        if known is None and any(True for _ in tensors_in(out)):
            self.unknown()
        return self._after(known, func, args, kwargs, out, target, moves)

    def _transformed(self, known: Known | None, func: Any, args: Any, kwargs: Any) -> Any:
        """The output of a call within ``torch.func.vmap``, ``jvp`` or ``grad``: only smooth ones need no replay.

        Raises:
            NotImplementedError: it is not smooth, and its inputs move: values within a transformation belong to it, and
                cannot be kept for another forward.
        """
        moves = any(_moves(x) for x in tensors_in((args, kwargs)))
        self.before(known, func, args, kwargs)
        if not moves:
            return func(*args, **kwargs)
        placed, named = positional(func, args, kwargs)
        smooth = known is None or known.smooth(func, *placed, **named)
        if smooth and torch.is_grad_enabled() and func not in _HOLDS | _READS:
            out = func(*args, **kwargs)
            made = list(tensors_in(out))  # empty for a call that asks for a shape or a dtype
            if not made or (known is not None and all(x.is_floating_point() or x.is_complex() for x in made)):
                self.noted(out)
                return out
        raise NotImplementedError(
            f'gates="frozen": {name_of(func)} within torch.func.vmap, jvp or grad may have kinks, or holds a value '
            'fixed, which cannot be replayed there. Use method="double_backprop", or write the forward without the '
            "transformation, on whole batches"
        )

    def _after(
        self, known: Known | None, func: Any, args: Any, kwargs: Any, out: Any, target: Tensor | None, moves: bool
    ) -> Any:
        """The output of a call without gates: the parts of it that autograd holds fixed, as recorded.

        ``target`` is what it wrote into, and ``moves`` whether any of its inputs moved.
        """
        if isinstance(out, Tensor) and out.requires_grad and target is None:
            self.after(known, func, args, kwargs, out)
            return out
        if not torch.is_grad_enabled() and _is_floating(out) and _in_a_custom_function():
            self.after(known, func, args, kwargs, out)
            return out
        if target is not None:
            if target.requires_grad:
                self.after(known, func, args, kwargs, target)
            elif moves:  # autograd does not follow it: what it wrote is held
                recorded = self.held(func, target, copy=True)
                if recorded is not target:
                    with torch.no_grad():
                        target.copy_(recorded)
            return out
        if not any(x.requires_grad for x in tensors_in((args, kwargs))):
            return out
        if isinstance(out, Tensor):
            return self.held(func, out)
        if not (isinstance(out, (tuple, list)) and any(isinstance(x, Tensor) for x in out)):
            return self.held(func, out) if func in _READS else out
        parts = [self.held(func, x) if isinstance(x, Tensor) and not x.requires_grad else x for x in out]
        moving = [x for x in parts if isinstance(x, Tensor) and x.requires_grad]
        if moving:
            self.after(known, func, args, kwargs, moving[0])
        return out if all(a is b for a, b in zip(parts, out, strict=True)) else type(out)(parts)

    def _save_before(self, target: Tensor) -> None:
        """Gives held values that share memory with what is about to be written a memory of their own."""
        for held in self.shared.pop(target.untyped_storage().data_ptr(), ()):
            held.value = held.value.clone()
            held.version = 0

    def share(self, held: _Held) -> _Held:
        """Notes that the model has the memory of a held value."""
        if isinstance(held.value, Tensor) and held.value.layout == torch.strided:
            self.shared.setdefault(held.value.untyped_storage().data_ptr(), []).append(held)
        return held

    def gated(self, known: Known, rule: Rule, func: Any, args: Any, kwargs: Any) -> Any:
        """The output of a call that has gates."""
        raise NotImplementedError

    def held(self, func: Any, value: Any, *, copy: bool = False) -> Any:
        """The value that autograd holds fixed; ``copy`` where its memory is written again and again."""
        raise NotImplementedError

    def before(self, known: Known | None, func: Any, args: Any, kwargs: Any) -> None:
        """Called before a call without gates."""

    def unknown(self) -> None:
        """Called after one of which nothing is known and that gave a tensor."""

    def after(self, known: Known | None, func: Any, args: Any, kwargs: Any, moving: Tensor) -> None:
        """Called after it, with an output that moves, if there is one."""

    def noted(self, out: Any) -> None:
        """Called after a call within a transformation."""


class Record(_Repeatable):
    """The forward that is recorded; ``may_have_drawn`` is whether it met a function that draws random numbers."""

    def __init__(self, recording: Recording, *, keep_random: bool) -> None:
        super().__init__(recording, keep_random=keep_random)
        self.may_have_drawn = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.recording.autocast is None:
            self.recording.autocast = autocast_dtype(self.recording.device)
        return super().__torch_function__(func, types, args, kwargs)

    def gated(self, known: Known, rule: Rule, func: Any, args: Any, kwargs: Any) -> Any:
        place = len(self.entries)
        self.may_have_drawn |= known.draws
        out, saved = rule.record(self, func, args, kwargs)
        # Before the entries of calls that the rule made.
        self.entries.insert(place, Entry(known.name, _shape(out), saved))
        self._note(out[0] if isinstance(out, tuple) else out)
        return out

    def held(self, func: Any, value: Any, *, copy: bool = False) -> Any:
        held = _Held.of(value.clone() if copy else value)
        self.entries.append(Entry(name_of(func), _shape(value), held if copy else self.share(held)))
        return value

    def before(self, known: Known | None, func: Any, args: Any, kwargs: Any) -> None:
        if self.keep_random:
            refuse_random(func, args, kwargs)
        self.may_have_drawn |= known is not None and known.draws

    def unknown(self) -> None:
        self.may_have_drawn = True

    def after(self, known: Known | None, func: Any, args: Any, kwargs: Any, moving: Tensor) -> None:
        self._note(moving)
        if known is not None and known.smooth is always:
            return
        if known is None or not known.smooth(func, *positional(func, args, kwargs)[0]):
            warnings.warn(
                f'gates="frozen": {name_of(func)} is not among the functions that fastfisher knows to be smooth, and '
                "it cannot replay kinks of it; if there are any, finite differences may be far from double backprop. "
                'If not, ignore it; else use method="double_backprop", or write it by functions such as torch.where',
                AccuracyWarning,
                stacklevel=2,
            )

    def noted(self, out: Any) -> None:
        for x in tensors_in(out):
            self._note(x)

    def _note(self, out: Any) -> None:
        met = self.recording.met
        if isinstance(out, Tensor) and out.dtype not in met and out.dtype.is_floating_point:
            met[out.dtype] = 0 if out.grad_fn is None else out.grad_fn._sequence_nr()


class Replay(_Repeatable):
    """A forward that repeats the gates of a recorded one.

    Raises:
        ValueError: it takes another path.
    """

    def __init__(self, recording: Recording, *, keep_random: bool) -> None:
        super().__init__(recording, keep_random=keep_random)
        self.position = 0

    def gated(self, known: Known, rule: Rule, func: Any, args: Any, kwargs: Any) -> Any:
        entry = self._next(known.name)
        out = rule.replay(self, entry.saved, func, args, kwargs)
        self._check(entry, out)
        return out

    def held(self, func: Any, value: Any, *, copy: bool = False) -> Any:
        entry = self._next(name_of(func))
        self._check(entry, value)
        return entry.saved.given() if copy else self.share(entry.saved).given()

    def _next(self, name: str) -> Entry:
        if self.position == len(self.entries) or self.entries[self.position].name != name:
            raise ValueError(f"gates: the second forward calls {name} where the recorded one did not")
        self.position += 1
        return self.entries[self.position - 1]

    def _check(self, entry: Entry, out: Any) -> None:
        if _shape(out) != entry.shape:
            raise ValueError(f"gates: {entry.name} gave shape {_shape(out)}, recorded was {entry.shape}")

    def check_complete(self) -> None:
        """Raises ValueError where recorded gates were left over."""
        if self.position != len(self.entries):
            left = self.entries[self.position].name
            raise ValueError(f"gates: the second forward did not call {left} where the recorded one did")


# ---- small things ----------------------------------------------------------------------------------------------------

_READS = frozenset(
    getattr(Tensor, name)
    for name in ["item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__"]
) | {torch.equal, Tensor.equal, torch.allclose, Tensor.allclose, torch.is_nonzero, Tensor.is_nonzero}  # fmt: skip
"""The functions by which Python reads values of tensors."""

_HOLDS = frozenset({torch.detach, Tensor.detach, Tensor.detach_, Tensor.data.__get__, Tensor.requires_grad_})  # type: ignore[attr-defined]
"""The functions whose output autograd holds fixed."""


def _shape(out: Any) -> torch.Size | None:
    out = out[0] if isinstance(out, tuple) else out
    return out.shape if isinstance(out, Tensor) else None


def _moves(x: Tensor) -> bool:
    """Whether autograd follows the tensor, or one that transformations have wrapped in it."""
    while not x.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x.requires_grad


def _is_floating(out: Any) -> bool:
    return out.is_floating_point() if isinstance(out, Tensor) else False


_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]


def _in_a_custom_function() -> bool:
    """Whether the caller is in the forward of a custom ``autograd.Function``: there, values that move have no graph."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _APPLY:
            return True
        frame = frame.f_back
    return False

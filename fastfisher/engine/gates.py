"""Records what is discrete in a forward (ReLU masks, max-pool indices, comparisons, …) and replays it in another.

Finite differences of the gradient converge to the Hessian that autograd sees only where no kink lies between the two
points, and in a ReLU network kinks are everywhere. Replaying at θ + ρd the gates of the forward at θ leaves a network
that is smooth in ρ, with the same value, gradient and (autograd's) Hessian at θ. Recorded are

- the kinks of the functions that have a rule in :mod:`fastfisher.engine.piecewise`;
- every value that autograd holds fixed although it was computed from something that moves: results of comparisons,
  indices, bins, numbers read by Python, and whatever was computed under ``detach()`` or ``no_grad()``.

The replayed forward starts where the recorded one did: with the buffers as they were, and with the state of the random
number generators if the recorded forward drew from them (dropout masks, stochastic depth).

Recorded, replayed or neither (:func:`fused_forward`), a forward of the penalty runs ReLU, max-pool, large convolutions
and batch normalisation through our own Functions, which take less time and memory.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from fastfisher import ops
from fastfisher.autocast import autocast_dtype
from fastfisher.checks import check_flags, check_model
from fastfisher.engine.calls import opened, positional
from fastfisher.engine.checkpointing import in_checkpoint, keep_saved_tensors
from fastfisher.engine.fused.batch_norm import by_batch
from fastfisher.engine.fused.convolution import in_pieces
from fastfisher.engine.fused.relu_pool import Passage
from fastfisher.engine.piecewise import (
    DROPOUTS,
    KNOWN,
    Known,
    MaxPool,
    Relu,
    Rule,
    always,
    names_inplace,
    refuse_random,
)
from fastfisher.engine.taylor.tape import tensors_in
from fastfisher.model import copy_buffers, is_compiled, uncompiled
from fastfisher.slow_path import warn_slow_path


class AccuracyWarning(UserWarning):
    """A finite difference may be far from the derivative; the message says why, and what would help.

    To forbid it: ``warnings.simplefilter("error", fastfisher.AccuracyWarning)``.
    """


@dataclass
class RandomState:
    """The states of the CPU's and of some devices' default generators."""

    cpu: Tensor
    cuda: dict[int, Tensor]

    @classmethod
    def current(cls, devices: frozenset[int]) -> RandomState:
        """The states now, for the CPU and the CUDA devices given by index."""
        return cls(torch.get_rng_state(), {i: torch.cuda.get_rng_state(i) for i in devices})

    def restore(self) -> None:
        """Puts the generators into these states."""
        torch.set_rng_state(self.cpu)
        for index, state in self.cuda.items():
            torch.cuda.set_rng_state(state, index)

    def has_moved(self) -> bool:
        """Whether any of the generators is in another state now."""
        now = RandomState.current(frozenset(self.cuda))
        return not torch.equal(now.cpu, self.cpu) or any(not torch.equal(now.cuda[i], s) for i, s in self.cuda.items())


@dataclass
class _Entry:
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
        if not isinstance(value, Tensor):
            return cls(value)
        return cls(value.detach(), value._version)

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


@dataclass
class Gates:
    """The gates of one forward. Made by :func:`record_gates`; pass it as ``gates=`` beside ``logits=``.

    Attributes:
        random: the state of the random number generators when the recording began.
        frozen: whether there are gates to replay.
        model: the model that ran.
        buffers: its buffers as they were when the recording began, by name.
        drew: whether the forward drew from the default random number generators: only then are they set back.
        changed: the parameters that the forward wrote into, by name.
        autocast: the dtype of an autocast met within the forward, which its caller need not know of.
        met: the floating dtypes in which something was computed that depends on the parameters, each with the number
            of the first such node in autograd's order.
        precision: the coarsest of those that the logits may depend on; None before :meth:`end_at`.
        full_precision: whether autocast is off within, wherever it is switched on.
        hook: a hook within the model that changed a gradient in a backward of the recorded forward, by name.
        entries: the recorded calls in order.
    """

    random: RandomState | None
    frozen: bool = True
    model: torch.nn.Module | None = None
    buffers: dict[str, Tensor] = field(default_factory=dict)
    drew: bool = True
    changed: frozenset[str] = frozenset()
    autocast: torch.dtype | None = None
    met: dict[torch.dtype, int] = field(default_factory=dict)
    precision: torch.dtype | None = None
    full_precision: bool = False
    hook: str | None = None
    entries: list[_Entry] = field(default_factory=list)

    def end_at(self, logits: Tensor) -> None:
        """Notes where the forward ends: what the model computes after its logits, such as a loss, has no part in R."""
        last = logits.grad_fn._sequence_nr() if logits.grad_fn is not None else 0
        before = [dtype for dtype, first in self.met.items() if first <= last]
        self.precision = max(before, key=lambda dtype: torch.finfo(dtype).eps, default=None)

    def without_autocast(self) -> AbstractContextManager[Any]:
        """A context without autocast on the device of the model."""
        return torch.autocast(_device_of(self.model), enabled=False)

    def arithmetic(self) -> AbstractContextManager[Any]:
        """A context for the backward of the forward: an autocast that is on around a backward applies to it, too."""
        return self.without_autocast() if self.full_precision else nullcontext()

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Within, recorded calls repeat the gates in order, and random draws repeat the recorded ones.

        Raises:
            ValueError: the forward took another path than the recorded one.
        """
        if self.random is None or not self.drew:
            with self._replay_gates():
                yield
            return
        outer = RandomState.current(frozenset(self.random.cuda))
        self.random.restore()
        try:
            with self._replay_gates():
                yield
        finally:
            outer.restore()

    @contextmanager
    def _replay_gates(self) -> Iterator[None]:
        if not self.frozen:
            yield
            return
        with (
            uncompiled(self.model, _FROZEN),
            self.arithmetic(),
            _Replay(self, keep_random=self.random is None) as replay,
        ):
            yield
        replay.check_complete()


_FROZEN = 'gates="frozen", unlike gates="free",'


@contextmanager
def record_gates(
    model: torch.nn.Module | None = None,
    *,
    frozen: bool = True,
    rewind: bool = True,
    buffers: dict[str, Tensor] | None = None,
    full_precision: bool = False,
) -> Iterator[Gates]:
    """Records the gates, the buffers and the random state of the forward run within.

    Example:
        >>> with fastfisher.record_gates(model) as gates:
        ...     logits = model(inputs)
        >>> penalty = fastfisher.penalty(model, inputs, logits=logits, method="finite_difference", gates=gates)

    Args:
        model: the model about to run; tells which CUDA devices' random states matter, and has the buffers.
        frozen: False records the random state and the buffers alone (for ``gates="free"``).
        rewind: False keeps the masks of dropout instead of the random state, which a CUDA graph cannot go back to.
        buffers: copies of the model's buffers, where the caller has made some already.
        full_precision: True switches autocast off, for this forward and its replays, wherever it is switched on.

    Raises:
        ValueError: a module is a TorchScript module, which hides its gates; or, without ``rewind``, a function draws
            numbers that are not those of a dropout, or free gates meet a dropout; or a flag is no boolean.
        TypeError: ``model`` is no module.
    """
    check_flags(frozen=frozen, rewind=rewind)
    if model is not None:
        check_model(model)
    parameters = model.parameters() if model is not None else ()
    devices = frozenset(p.device.index for p in parameters if p.device.type == "cuda")
    if buffers is None:
        buffers = {} if model is None else copy_buffers(model)
    random = RandomState.current(devices) if rewind else None
    gates = Gates(random, frozen, model, buffers, full_precision=full_precision)
    writes = {} if model is None else {name: (p, p._version) for name, p in model.named_parameters()}
    seen_drawing: Callable[[], bool] = lambda: True  # noqa: E731
    if frozen:
        if model is not None:
            check_recordable(model)
        record = _Record(gates, keep_random=not rewind)
        with uncompiled(model, _FROZEN), gates.arithmetic(), _watched_hooks(gates), record:
            yield gates
        seen_drawing = lambda: record.may_have_drawn  # noqa: E731
    elif not rewind:
        with fused_forward(model) if model is not None else nullcontext(), _NoRandom():
            yield gates
    elif model is not None:
        with fused_forward(model):
            yield gates
    else:
        yield gates
    gates.changed = frozenset(name for name, (p, version) in writes.items() if p._version != version)
    # Another thread may have drawn meanwhile. Its numbers are its own: they do not come twice because of us.
    gates.drew = gates.random is not None and seen_drawing() and gates.random.has_moved()


@contextmanager
def fused_forward(model: torch.nn.Module) -> Iterator[_Fused | None]:
    """Within, ReLU, max-pool, large convolutions and batch normalisation run through :mod:`fastfisher.engine.fused`:
    less time and memory, and the same values and gradients up to rounding.

    Where a module is compiled or scripted, no compiled kernel serves a tensor, or a checkpoint will run a call again,
    PyTorch's own run as ever, and so they do on other devices than the CPU.
    """
    hidden = any(is_compiled(module) or isinstance(module, torch.jit.ScriptModule) for module in model.modules())
    if ops.UNAVAILABLE is not None or hidden or _device_of(model) != "cpu":
        yield None
    else:
        with _Fused() as fused:
            yield fused


def check_recordable(model: torch.nn.Module) -> None:
    """Raises ValueError where a TorchScript module would hide its gates from the recording."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f'gates="frozen": module {name or "(the model itself)"!r} is a TorchScript module, so its gates cannot '
                'be recorded; pass the module it was made from, or gates="free"'
            )


def _watched(gates: Gates, hook: Callable[..., Any], given: int) -> Callable[..., Any]:
    """``hook``, noting in ``gates`` when it gives another gradient than its argument ``given``."""

    @functools.wraps(hook, updated=())
    def watched(*args: Any) -> Any:
        was = list(tensors_in(args[given]))
        versions = [x._version for x in was]
        out = hook(*args)
        now = was if out is None else list(tensors_in(out))
        same = len(now) == len(was) and all(a is b or torch.equal(a, b) for a, b in zip(was, now, strict=True))
        if not (same and versions == [x._version for x in was]):
            gates.hook = gates.hook or getattr(hook, "__qualname__", type(hook).__qualname__)
        return out

    return watched


@contextmanager
def _watched_hooks(gates: Gates) -> Iterator[None]:
    """Within, a forward takes the modules' backward hooks with a watch around each."""
    places = [] if gates.model is None else list(gates.model.modules())
    hooks = [hooked for m in places for hooked in (m._backward_hooks, m._backward_pre_hooks) if hooked]
    own = [(hooked, dict(hooked)) for hooked in hooks]
    try:
        for hooked, before in own:
            for key, hook in before.items():  # (module, the gradient, …)
                hooked[key] = _watched(gates, hook, 1)
        yield
    finally:
        for hooked, before in own:
            for key, hook in before.items():
                if key in hooked:
                    hooked[key] = hook


class _NoRandom(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        refuse_random(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _ungated(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The call as it is, but a large convolution in pieces and a large batch normalisation by our own kernel."""
    x = args[0] if args else kwargs.get("input")
    if ops.UNAVAILABLE is None and not (isinstance(x, Tensor) and x.numel() < FUSED_ELEMENTS):
        for ours in (in_pieces, by_batch):
            out = ours(function, args, kwargs)
            if out is not None:
                return out
    return function(*args, **kwargs)


# Below, what Python adds to a call is more than the kernels save.
FUSED_ELEMENTS = 1 << 18


class _Fused(TorchFunctionMode):
    """``met_large`` is whether any tensor was large enough for the kernels."""

    met_large = False
    last: Passage | None = None

    def within(self) -> AbstractContextManager[Any]:
        """See :class:`fastfisher.engine.piecewise.Run`."""
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, Tensor):
            if x.numel() < FUSED_ELEMENTS:
                return func(*args, **kwargs)
            self.met_large = True
        if in_checkpoint():  # which runs its function again, without this mode, and wants the same tensors kept
            return func(*args, **kwargs)
        known = KNOWN.get(func)
        if known is None or not isinstance(known.rule, Relu | MaxPool) or not _has_gates(x):
            return _ungated(func, args, kwargs)
        assert isinstance(x, Tensor)
        if x.device.type != "cpu":
            return func(*args, **kwargs)
        return known.rule.record(self, func, *positional(func, args, kwargs))[0]


def _has_gates(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.numel() > 0


_READS = frozenset(
    getattr(Tensor, name)
    for name in ["item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__"]
) | {torch.equal, Tensor.equal, torch.allclose, Tensor.allclose, torch.is_nonzero, Tensor.is_nonzero}  # fmt: skip
"""The functions by which Python reads values of tensors."""


class _Repeatable(TorchFunctionMode):
    """A forward that is recorded or replayed: sorts its calls into gated ones, held values and all others."""

    def __init__(self, gates: Gates, *, keep_random: bool) -> None:
        super().__init__()
        self.gates, self.entries, self.keep_random = gates, gates.entries, keep_random
        self.last: Passage | None = None
        self.shared: dict[int, list[_Held]] = {}  # by storage: the held values whose memory the model has, too
        self.device = _device_of(gates.model)

    def within(self) -> AbstractContextManager[Any]:
        """See :class:`fastfisher.engine.piecewise.Run`."""
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.gates.full_precision and autocast_dtype(self.device) is not None:  # switched on within the model
            with self.gates.without_autocast():
                return self._call(func, args, kwargs)
        return self._call(func, args, kwargs)

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is Tensor.register_hook:
            return func(args[0], _watched(self.gates, args[1] if len(args) > 1 else kwargs["hook"], 0))  # type: ignore[no-untyped-call]
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
        written = _written(func, args, kwargs)
        moves = False
        if written is not None:
            moves = any(x.requires_grad for x in tensors_in((args, kwargs)))
            if self.shared:
                self._save_before(written)
        if known is not None and known.rule is not None and torch.is_grad_enabled():
            placed, named = positional(func, args, kwargs)
            if any(_has_gates(x) for x in placed[:2]) and not known.smooth(*placed, **named):
                return self.gated(known, known.rule, func, placed, named)
        if known is None:
            inner = opened(func)
            if inner is not None:
                with self:
                    return inner(*args, **kwargs)
        self.before(known, func, args, kwargs)
        out = _ungated(func, args, kwargs)
        if known is None and any(True for _ in tensors_in(out)):
            self.unknown()
        if isinstance(out, Tensor) and out.requires_grad and written is None:
            self.after(known, func, args, kwargs, out)
            return out
        if not torch.is_grad_enabled() and _is_floating(out) and _in_a_custom_function():
            self.after(known, func, args, kwargs, out)
            return out
        if written is not None:
            return self._after_writing(known, func, args, kwargs, out, written, moves)
        if not any(x.requires_grad for x in tensors_in((args, kwargs))):
            return out
        return self._after_reading(known, func, args, kwargs, out)

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
        smooth = known is None or known.smooth(*placed, **named)
        if smooth and torch.is_grad_enabled() and func not in _HOLDS | _READS:
            out = func(*args, **kwargs)
            made = list(tensors_in(out))  # none by what asks for a shape or a dtype
            if not made or (known is not None and all(x.is_floating_point() or x.is_complex() for x in made)):
                self.noted(out)
                return out
        raise NotImplementedError(
            f'gates="frozen": {_name(func)} within torch.func.vmap, jvp or grad may have kinks, or holds a value '
            'fixed, which cannot be replayed there. Use method="double_backprop", or write the forward without the '
            "transformation, on whole batches"
        )

    def noted(self, out: Any) -> None:
        """Called after a call within a transformation."""

    def _after_writing(
        self, known: Known | None, func: Any, args: Any, kwargs: Any, out: Any, written: Tensor, moves: bool
    ) -> Any:
        """The output of a call that wrote into a tensor; where autograd does not follow it, what it wrote is held."""
        if written.requires_grad:
            self.after(known, func, args, kwargs, written)
        elif moves:
            recorded = self.held(func, written, copy=True)
            if recorded is not written:
                with torch.no_grad():
                    written.copy_(recorded)
        return out

    def _after_reading(self, known: Known | None, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        """The output of a call with inputs that move; the parts of it that autograd holds fixed, as recorded."""
        if isinstance(out, Tensor):
            return self.held(func, out)
        if isinstance(out, (tuple, list)) and any(isinstance(x, Tensor) for x in out):
            parts = [self.held(func, x) if isinstance(x, Tensor) and not x.requires_grad else x for x in out]
            moving = [x for x in parts if isinstance(x, Tensor) and x.requires_grad]
            if moving:
                self.after(known, func, args, kwargs, moving[0])
            if all(a is b for a, b in zip(parts, out, strict=True)):
                return out
            return type(out)(parts)
        return self.held(func, out) if func in _READS else out

    def _save_before(self, written: Tensor) -> None:
        """Gives held values that share memory with what is about to be written a memory of their own."""
        for held in self.shared.pop(written.untyped_storage().data_ptr(), ()):
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


class _Record(_Repeatable):
    def __init__(self, gates: Gates, *, keep_random: bool) -> None:
        super().__init__(gates, keep_random=keep_random)
        self.may_have_drawn = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.gates.autocast is None:
            self.gates.autocast = autocast_dtype(self.device)
        return super().__torch_function__(func, types, args, kwargs)

    def gated(self, known: Known, rule: Rule, func: Any, args: Any, kwargs: Any) -> Any:
        place = len(self.entries)
        self.may_have_drawn |= known.draws
        out, saved = rule.record(self, func, args, kwargs)
        self.entries.insert(place, _Entry(known.name, _shape(out), saved))  # before those of the calls within
        self._note(out[0] if isinstance(out, tuple) else out)
        return out

    def held(self, func: Any, value: Any, *, copy: bool = False) -> Any:
        held = _Held.of(value.clone() if copy else value)
        self.entries.append(_Entry(_name(func), _shape(value), held if copy else self.share(held)))
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
        if known is None or not known.smooth(*positional(func, args, kwargs)[0]):
            _warn_of_kinks(func)

    def noted(self, out: Any) -> None:
        for x in tensors_in(out):
            self._note(x)

    def _note(self, out: Any) -> None:
        if isinstance(out, Tensor) and out.dtype not in self.gates.met and out.dtype.is_floating_point:
            self.gates.met[out.dtype] = 0 if out.grad_fn is None else out.grad_fn._sequence_nr()


class _Replay(_Repeatable):
    def __init__(self, gates: Gates, *, keep_random: bool) -> None:
        super().__init__(gates, keep_random=keep_random)
        self.position = 0

    def gated(self, known: Known, rule: Rule, func: Any, args: Any, kwargs: Any) -> Any:
        entry = self._next(known.name)
        out = rule.replay(self, entry.saved, func, args, kwargs)
        self._check(entry, out)
        return out

    def held(self, func: Any, value: Any, *, copy: bool = False) -> Any:
        entry = self._next(_name(func))
        self._check(entry, value)
        return entry.saved.given() if copy else self.share(entry.saved).given()

    def _next(self, name: str) -> _Entry:
        if self.position == len(self.entries) or self.entries[self.position].name != name:
            raise ValueError(f"gates: the second forward calls {name} where the recorded one did not")
        self.position += 1
        return self.entries[self.position - 1]

    def _check(self, entry: _Entry, out: Any) -> None:
        if _shape(out) != entry.shape:
            raise ValueError(f"gates: {entry.name} gave shape {_shape(out)}, recorded was {entry.shape}")

    def check_complete(self) -> None:
        """Raises ValueError where recorded gates were left over."""
        if self.position != len(self.entries):
            left = self.entries[self.position].name
            raise ValueError(f"gates: the second forward did not call {left} where the recorded one did")


# ---- small things ----------------------------------------------------------------------------------------------------


def _device_of(model: torch.nn.Module | None) -> str:
    parameter = None if model is None else next(model.parameters(), None)
    return "cpu" if parameter is None else parameter.device.type


def _shape(out: Any) -> torch.Size | None:
    out = out[0] if isinstance(out, tuple) else out
    return out.shape if isinstance(out, Tensor) else None


def _name(func: Any) -> str:
    return str(resolve_name(func) or getattr(func, "__name__", func))


_HOLDS = frozenset({torch.detach, Tensor.detach, Tensor.detach_, Tensor.data.__get__, Tensor.requires_grad_})  # type: ignore[attr-defined]
"""The functions whose output autograd holds fixed."""


def _moves(x: Tensor) -> bool:
    """Whether autograd follows the tensor, or one that transformations have wrapped in it."""
    while not x.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x.requires_grad


def _is_floating(out: Any) -> bool:
    return out.is_floating_point() if isinstance(out, Tensor) else False


def _in_a_custom_function() -> bool:
    """Whether the caller is in the forward of a custom ``autograd.Function``: there, values that move have no graph."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _APPLY:
            return True
        frame = frame.f_back
    return False


_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]


def _written(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """The tensor that a call writes into; None for one that writes into nothing."""
    written = kwargs.get("out")
    if written is None and args and (func is Tensor.__setitem__ or names_inplace(func)):
        written = args[0]
    return written if isinstance(written, Tensor) and written.layout == torch.strided else None


def _warn_of_kinks(func: Any) -> None:
    warnings.warn(
        f'gates="frozen": {_name(func)} is not among the functions that fastfisher knows to be smooth, and it cannot '
        "replay kinks of it; if there are any, finite differences may be far from double backprop. If not, ignore it; "
        'else use method="double_backprop", or write it by functions such as torch.where',
        AccuracyWarning,
        stacklevel=2,
    )

"""What a model is called with: its arguments as a call, the tensors in them, and some of their examples."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastfisher.outputs import OUTPUT, Reading, code_of

See = Callable[[Any, Tensor], None]
"""Gets what a forward returned and the logits in it."""


@dataclass(frozen=True)
class Call:
    """How a model is called, and what is read of that which it returns.

    Attributes:
        args, kwargs: the arguments, batch first. They may hold tuples, lists and mappings of tensors, and anything
            else, which the model gets as it is.
        reading: which tensor that is.
        targets: those of the examples, where the reading needs them.
        see: called after each forward, before anything else is done with its output.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reading: Reading = OUTPUT
    targets: Any = None
    see: See | None = field(default=None, repr=False)

    @property
    def class_dim(self) -> int | None:
        """The dimension of the logits that holds the classes; None where it was not said."""
        return self.reading.class_dim

    @property
    def kind(self) -> Hashable:
        """What is the same for calls of which the same is read, in the same way."""
        return self.reading.kind

    def run(self, model: nn.Module) -> Any:
        """What the model returns."""
        return model(*self.args, **self.kwargs)

    def read(self, output: Any) -> Tensor:
        """The tensor in it that all is about."""
        examples = count_examples(self) if self.reading.takes_targets else 0
        return self.reading.read(output, self.targets, examples)


@dataclass(frozen=True)
class LoopCall(Call):
    """A forward of the caller's own, of nothing that could be taken apart: it counts as one example.

    Attributes:
        function: returns the loss, by whatever calls of the model.
    """

    function: Callable[[], Any] = field(default=lambda: None)

    @property
    def kind(self) -> Hashable:
        """See :attr:`Call.kind`."""
        return code_of(self.function)

    def run(self, model: nn.Module) -> Any:
        """See :meth:`Call.run`."""
        return self.function()


Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any] | Call
"""What a caller gives a model: a tensor, several arguments by position or by name, or a :class:`Call`."""


def as_call(model: nn.Module, inputs: Any, reading: Reading = OUTPUT, name: str = "inputs") -> Call:
    """The call of ``model`` that ``inputs`` mean; the signature of ``forward`` decides.

    A tensor is the one argument. The items of a tuple or list are arguments by position, those of a mapping arguments
    by name; where ``forward`` has no such parameters, the whole is its one argument.

    Raises:
        TypeError: ``inputs`` is none of these; ``name`` is the argument that is named.
        ValueError: ``forward`` cannot be called like that.
    """
    if isinstance(inputs, Call):
        return inputs
    if isinstance(inputs, Tensor):
        known = known_of(model)
        if "one argument" not in known:
            signature = signature_of(model)
            if signature is not None and not _binds(signature, inputs):
                raise ValueError(
                    f"{name}: expected the arguments of {type(model).__name__}.forward{signature}, got one tensor; the "
                    "last of several tensors of a batch are its targets: of inputs alone make ((x, w), None)"
                )
            known["one argument"] = True
        return Call((inputs,), {}, reading)
    if isinstance(inputs, PackedSequence):
        raise TypeError(
            f"{name}: expected tensors batch first, got a PackedSequence, whose examples lie one in another; "
            "give the padded sequences and the lengths, and pack them in the model's forward"
        )
    if isinstance(inputs, Mapping):
        return _by_name(model, inputs, reading, name)
    if isinstance(inputs, tuple | list):
        return _by_position(model, inputs, reading, name)
    raise TypeError(f"{name}: expected a tensor, a tuple, a list or a dict of tensors, got {type(inputs).__name__}")


def signature_of(model: nn.Module) -> inspect.Signature | None:
    """The signature of the model's forward; None where Python does not know it."""
    module: Any = getattr(model, "_orig_mod", model)  # torch.compile's own forward takes anything
    try:
        return inspect.signature(module.forward)
    except (TypeError, ValueError):
        return None


def takes(signature: inspect.Signature, name: str) -> bool:
    """Whether a function has a parameter that can be given by this name."""
    parameter = signature.parameters.get(name)
    return parameter is not None and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def takes_any_name(signature: inspect.Signature) -> bool:
    """Whether a function takes ``**kwargs``."""
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())


def _binds(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _by_name(model: nn.Module, inputs: Mapping[str, Any], reading: Reading, name: str) -> Call:
    signature = signature_of(model)
    names = all(isinstance(key, str) for key in inputs)
    if names and (signature is None or _binds(signature, **inputs)):
        return Call((), dict(inputs), reading)
    if signature is None:
        return Call((inputs,), {}, reading)
    known = [key for key in inputs if isinstance(key, str) and takes(signature, key)]
    if not known and _binds(signature, inputs):
        return Call((inputs,), {}, reading)
    forward = f"{type(model).__name__}.forward{signature}"
    unknown = [key for key in inputs if key not in known]
    if unknown and not takes_any_name(signature):
        raise ValueError(f"{name}: expected the arguments of {forward}, got {unknown}, which it does not take")
    raise ValueError(f"{name}: expected all arguments that {forward} needs, got {list(inputs)}")


def _by_position(model: nn.Module, inputs: tuple[Any, ...] | list[Any], reading: Reading, name: str) -> Call:
    signature = signature_of(model)
    if signature is None or _binds(signature, *inputs):
        return Call(tuple(inputs), {}, reading)
    first = next(iter(signature.parameters.values()), None)
    of_a_tensor = first is not None and first.annotation in (Tensor, "Tensor", "torch.Tensor")
    if _binds(signature, inputs) and not of_a_tensor:
        return Call((inputs,), {}, reading)
    forward = f"{type(model).__name__}.forward{signature}"
    raise ValueError(f"{name}: expected the arguments of {forward}, got {len(inputs)} of them")


def map_inputs(inputs: Any, function: Callable[[Tensor], Any]) -> Any:
    """Applies a function to every tensor of ``inputs``, at any depth of tuples, lists and mappings, which keep their
    types.

    Raises:
        TypeError: an object holds tensors that are out of reach.
    """
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Call):
        args = tuple(map_inputs(value, function) for value in inputs.args)
        kwargs = {name: map_inputs(value, function) for name, value in inputs.kwargs.items()}
        return dataclasses.replace(inputs, args=args, kwargs=kwargs, targets=map_inputs(inputs.targets, function))
    if isinstance(inputs, tuple | list) and not isinstance(inputs, PackedSequence):
        values = [map_inputs(value, function) for value in inputs]
        return type(inputs)(*values) if hasattr(inputs, "_fields") else type(inputs)(values)
    if isinstance(inputs, Mapping):
        found = {key: map_inputs(value, function) for key, value in inputs.items()}
        if type(inputs) is dict:
            return found
        kept: Any = copy.copy(inputs)  # its type and what else it has: a default, the encoding of a tokenizer
        for key, value in found.items():
            kept[key] = value
        return kept
    held = isinstance(inputs, PackedSequence) or any(
        isinstance(value, Tensor) for value in getattr(inputs, "__dict__", {}).values()
    )
    if held:
        raise TypeError(
            f"inputs: expected tensors in tuples, lists and mappings, got an object of type {type(inputs).__name__}, "
            "whose tensors cannot be taken apart by examples; give them one by one and make the object in the model's "
            "forward"
        )
    return inputs


def input_tensors(inputs: Any) -> list[Tensor]:
    """The tensors of ``inputs`` in order."""
    found: list[Tensor] = []
    map_inputs(inputs, lambda x: found.append(x) or x)  # type: ignore[func-returns-value]
    return found


def count_examples(inputs: Any, name: str = "inputs") -> int:
    """How many examples there are: the size of the first tensor's dimension 0.

    Raises:
        ValueError: there is no tensor, or it is a scalar; ``name`` is the argument that is named.
    """
    if isinstance(inputs, LoopCall):
        return 1
    tensors = input_tensors(inputs)
    if not tensors:
        raise ValueError(f"{name}: expected at least one tensor, found none")
    if tensors[0].dim() == 0:
        raise ValueError(f"{name}: expected examples along dimension 0, got a scalar tensor")
    return len(tensors[0])


def check_examples(inputs: Any, name: str = "inputs") -> int:
    """:func:`count_examples`, of at least one.

    Raises:
        ValueError: there is none.
    """
    count = count_examples(inputs, name)
    if count == 0:
        raise ValueError(f"{name}: expected at least one example, got none")
    return count


def is_shared(x: Tensor, examples: int) -> bool:
    """Whether a tensor of the inputs belongs to all examples alike: a scalar, or one that broadcasts over them.

    Raises:
        ValueError: it has neither the examples along dimension 0 nor one element there.
    """
    if x.dim() and len(x) == examples:
        return False
    if x.dim() and len(x) != 1:
        raise ValueError(
            f"inputs: expected {examples} examples along dimension 0 of each tensor where some are taken out, got "
            f"shape {tuple(x.shape)}; expand what all examples share to (1, ...) or ({examples}, ...)"
        )
    return True


def take_rows(inputs: Any, rows: Any, name: str = "inputs") -> Any:
    """The inputs of some examples: a slice, or an index tensor. What all examples share stays whole.

    Raises:
        ValueError: a tensor has another number of examples, or a list has something of each that is no tensor; ``name``
            is the argument that is named.
    """
    examples = count_examples(inputs)
    if isinstance(inputs, Call):
        for value in (*inputs.args, *inputs.kwargs.values()):
            _check_lists(value, examples, name)
        _check_lists(inputs.targets, examples, "targets")

    def take(x: Tensor) -> Tensor:
        if is_shared(x, examples):
            return x
        return x[rows.to(x.device) if isinstance(rows, Tensor) else rows]

    return map_inputs(inputs, take)


def _check_lists(value: Any, examples: int, name: str) -> None:
    """Raises ValueError where a list or tuple has something of each example that cannot be taken out by an index."""
    if not isinstance(value, Mapping | list | tuple):
        return
    items = list(value.values()) if isinstance(value, Mapping) else value
    # The items of a tuple may be of different kinds, as many as there are examples by chance.
    tensors = input_tensors(items) if isinstance(value, tuple) else [x for x in items if isinstance(x, Tensor)]
    if not isinstance(value, Mapping) and 0 < len(items) == examples and not tensors:
        raise ValueError(
            f"{name}: expected tensors where some examples are taken out (examples=, samples=, batch_size=), got a "
            f"{type(value).__name__} of {examples} items of type {type(items[0]).__name__}; leave it out, make a "
            "tensor of it, or give batches of the wanted size"
        )
    for item in items:
        _check_lists(item, examples, name)


def requiring_grad(inputs: Any) -> Any:
    """The inputs with every floating-point tensor detached and requiring a gradient, which targets do not."""
    if isinstance(inputs, Call):
        args, kwargs = requiring_grad(inputs.args), requiring_grad(inputs.kwargs)
        return dataclasses.replace(inputs, args=args, kwargs=kwargs, targets=map_inputs(inputs.targets, Tensor.detach))
    return map_inputs(inputs, lambda x: x.detach().requires_grad_() if x.is_floating_point() else x)


def differentiable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that autograd may save, where it was made in inference mode and that has been left."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


_KNOWN: WeakKeyDictionary[nn.Module, dict[Hashable, Any]] = WeakKeyDictionary()


def known_of(model: nn.Module) -> dict[Hashable, Any]:
    """What was found out of a model once, so that it is not looked for at each step; kept as long as the model is."""
    return _KNOWN.setdefault(model, {})

"""What is read of a model's output: the tensor that stands for a distribution, or a loss that is made of it."""

from __future__ import annotations

import copy
import functools
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OwnLossFunction = Callable[[Any, Any], Tensor]
"""A loss of the caller's: of what the model returns, and the targets."""


class Reading(ABC):
    """How the tensor that a penalty or a measurement is of is read of a model's output."""

    class_dim: int | None = None

    row_dims: int = 0

    takes_targets = False
    """Whether the targets are needed for it, so that they have to go wherever the inputs go."""

    @abstractmethod
    def read(self, output: Any, targets: Any, examples: int) -> Tensor:
        """That tensor, (N, …).

        Raises:
            TypeError, ValueError: the output has none.
        """

    @property
    def kind(self) -> Hashable:
        """What is the same for readings that do the same."""
        return type(self)


@dataclass(frozen=True)
class Output(Reading):
    """The tensor that the model returns, or its ``logits``, as models of Transformers have them.

    Attributes:
        class_dim: which dimension holds the classes; None where it was not said. That dimension is moved last.
        row_dims: how many of the last dimensions are one row; see :class:`fastfisher.Likelihood`.
        find: finds the tensor in another output (``logits_of=``).
    """

    class_dim: int | None = None
    row_dims: int = 1
    find: Callable[[Any], Tensor] | None = None

    def read(self, output: Any, targets: Any = None, examples: int = 0) -> Tensor:
        """See :meth:`Reading.read`; the classes last."""
        return self.laid_out(self.tensor(output))

    def tensor(self, output: Any) -> Tensor:
        """The tensor as the model gives it.

        Raises:
            TypeError: there is none.
        """
        found = logits_of(output) if self.find is None else self.find(output)
        if not isinstance(found, Tensor):
            raise TypeError(f"logits_of: expected a function that returns a tensor, got {type(found).__name__}")
        return found

    def laid_out(self, found: Tensor) -> Tensor:
        """That tensor with the classes last.

        Raises:
            ValueError: it has not as many dimensions as it takes, or that of the classes has to be said.
        """
        if found.dim() < 1 + self.row_dims:
            wanted = "logits (N, ..., C)" if self.row_dims else "an output (N, ...)"
            hint = "; of one number an example say likelihood='bernoulli', 'gaussian' or 'poisson'"
            hint = hint if found.dim() else ""
            raise ValueError(f"model: expected {wanted}, got shape {tuple(found.shape)}{hint}")
        return class_last(found, self.class_dim) if self.row_dims == 1 else found

    def as_given(self, logits: Tensor) -> Tensor:
        """What :meth:`read` made of some logits as it was."""
        return as_given(logits, self.class_dim)

    @property
    def kind(self) -> Hashable:
        """See :meth:`Reading.kind`."""
        return self.class_dim, self.row_dims, code_of(self.find)


OUTPUT = Output()


@dataclass(frozen=True)
class Losses(Reading):
    """A loss of the caller's, (N,): it is taken for a part of the model, and its targets for a part of the inputs.

    So its kinks are frozen like the model's, parameters in it are seen, and examples are taken out with their targets.

    Attributes:
        loss: of what the model returns and the targets; a scalar, which then stands for each example, or (N,).
        each: whether only (N,) will do.
        why: what for.
    """

    loss: OwnLossFunction
    each: bool = False
    why: str = ""

    takes_targets = True

    def read(self, output: Any, targets: Any, examples: int) -> Tensor:
        """See :meth:`Reading.read`."""
        found = loss_of(self.loss, output, targets)
        wanted = f"one value per example ({examples},)" if self.each else "a scalar, or one value per example"
        if not isinstance(found, Tensor) or not found.is_floating_point():
            got = str(found.dtype) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"loss: expected a floating-point tensor, {wanted}, got {got}")
        within = torch._C._functorch.peek_interpreter_stack() is not None
        if not within and not found.requires_grad and any(x.requires_grad for x in tensors_within(output)):
            raise ValueError(f"loss: expected a tensor that depends on the logits, {wanted}, got one that does not")
        if not self.each and found.numel() == 1:
            return found.reshape(()).expand(examples)
        if found.shape != (examples,):
            raise ValueError(f"loss: expected {wanted}{self.why}, got {tuple(found.shape)}")
        return found

    @property
    def kind(self) -> Hashable:
        """See :meth:`Reading.kind`."""
        return code_of(self.loss), self.each


def loss_of(loss: OwnLossFunction, output: Any, targets: Any) -> Any:
    """What the loss gives of an output.

    Raises:
        TypeError: it takes a tensor and got more; the way out is named.
    """
    try:
        return loss(output, targets)
    except (TypeError, AttributeError) as error:
        if isinstance(output, Tensor):
            raise
        raise TypeError(
            f"loss: it gets what the model returns, a {type(output).__name__}, and raised {type(error).__name__}: "
            f"{error}; take the tensor it is of, as in loss=lambda output, targets: F.cross_entropy(output.logits, "
            "targets)"
        ) from error


FOLLOWED = 3
"""How many functions deep :func:`code_of` looks: a loss, one that it calls, and one that this one calls."""


def code_of(function: Any) -> Hashable:
    """What two functions that are made anew at each call, as a lambda in a loop is, have in common.

    Their code is not all: the same lambda around another function is another loss. So what a function closes over,
    has by default, or finds among its globals belongs to it: functions by their code, objects that are called by their
    type and flags. Numbers and tensors do not, which change from step to step.
    """
    return _marked(function, FOLLOWED)


def _marked(value: Any, depth: int) -> Hashable:
    if value is None or isinstance(value, bool | str):
        return value
    if not callable(value) or isinstance(value, type) or depth == 0:
        return value if isinstance(value, type) else type(value)
    if isinstance(value, functools.partial):
        held = [value.func, *value.args, *value.keywords.values()]
        return (*value.keywords, *(_marked(x, depth) for x in held))
    bound = getattr(value, "__self__", None)
    function = getattr(value, "__func__", value)
    code = getattr(function, "__code__", None)
    if code is None:
        if not hasattr(value, "__dict__") or isinstance(value, types.BuiltinFunctionType):
            return id(value)
        return (type(value), *((name, _marked(x, depth - 1)) for name, x in vars(value).items()))
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
    known = [function.__globals__[name] for name in code.co_names if name in function.__globals__]
    held = [bound, *cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *known]
    return (code, *(_marked(x, depth - 1) for x in held))


def logits_of(output: Any) -> Tensor:
    """The tensor among what a model returned: itself, or its ``logits``.

    Raises:
        TypeError: there is none.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        held = ""
        if isinstance(output, Mapping):
            held = f" with the keys {list(output)}"
        elif isinstance(output, tuple | list):
            held = f" of {len(output)} items"
        raise TypeError(
            f"model: expected it to return logits or an object with .logits, got {type(output).__name__}{held}; say "
            "where they are, logits_of=lambda output: ..., or wrap the model in a module whose forward returns them"
        )
    return logits


def tensors_within(value: Any) -> Iterator[Tensor]:
    """The tensors at any depth of tuples, lists, mappings and the attributes of an object."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_within(item)
    elif hasattr(value, "__dict__"):
        yield from (x for x in vars(value).values() if isinstance(x, Tensor))


def map_output(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same with the function's tensors in the place of those of :func:`tensors_within`; objects are copied."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple | list):
        items = [map_output(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        found: Any = copy.copy(value)  # which may be more than its items
        for key, item in value.items():
            found[key] = map_output(item, function)
        return found
    if any(isinstance(item, Tensor) for item in getattr(value, "__dict__", {}).values()):
        found = copy.copy(value)
        for name, item in vars(value).items():
            if isinstance(item, Tensor):
                object.__setattr__(found, name, function(item))  # also of a frozen dataclass
        return found
    return value


def class_last(logits: Tensor, class_dim: int | None, least: int = 1) -> Tensor:
    """The logits with the dimension of the classes last: a view.

    Raises:
        ValueError: ``class_dim`` is no dimension of theirs from ``least`` on, or it is None where four dimensions or
            more leave open which it is.
    """
    shape, dims = tuple(logits.shape), logits.dim()
    if class_dim is None:
        if dims >= 4:
            raise ValueError(
                f"class_dim: expected the dimension of the logits {shape} that holds the classes, got None; say "
                "class_dim=1 for (N, C, H, W), class_dim=-1 where they are last"
            )
        return logits
    check_class_dim(class_dim)
    position = class_dim % dims if -dims <= class_dim < dims else -1
    if position < least:
        other = " other than that of the examples" if least else ""
        raise ValueError(f"class_dim: expected a dimension of the logits {shape}{other}, got {class_dim}")
    return logits if position == dims - 1 else logits.movedim(position, -1)


def as_given(logits: Tensor, class_dim: int | None) -> Tensor:
    """What :func:`class_last` made of some logits as it was."""
    position = -1 if class_dim is None else class_dim % logits.dim() - logits.dim()
    return logits if position == -1 else logits.movedim(-1, position)


def check_class_dim(class_dim: Any) -> None:
    """Raises ValueError where ``class_dim`` is neither an integer nor None."""
    if class_dim is not None and (isinstance(class_dim, bool) or not isinstance(class_dim, int)):
        raise ValueError(f"class_dim: expected an integer or None, got {class_dim!r}")

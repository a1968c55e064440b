"""The tensors that a tape holds: they must stay what they were when the tape took them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfisher.engine.taylor.registry import NoRule


class Held:
    """What each tensor of a forward stands for now, and whether anything but a rule wrote into one that is held.

    Rules compute what a call in place would write as a tensor of its own, and from then on the changed tensor stands
    for that (:meth:`replace`). A write that no rule follows is seen by its effect, PyTorch's count of the writes to a
    tensor, and refused where it concerns a tensor that is held or memory that such a tensor shares.
    """

    def __init__(self) -> None:
        self._kept: list[Tensor] = []  # kept alive, so that no other tensor gets the same id
        self._writes: dict[int, int] = {}  # by id of a held tensor: how often it had been written to by then
        self._memory: set[int] = set()  # the storages of the first self._looked_at of self._kept
        self._looked_at = 0
        self._current: dict[int, Tensor] = {}  # by id of a tensor changed in place: what it is now
        self._changed: set[int] = set()  # the storages of those

    def hold(self, x: Tensor) -> None:
        """Holds a tensor as it is now."""
        if id(x) not in self._writes:
            self._kept.append(x)
        self._writes[id(x)] = writes_to(x)

    def __contains__(self, x: Tensor) -> bool:
        return id(x) in self._writes

    def shares(self, x: Tensor) -> bool:
        """Whether a tensor is held that is ``x`` or has its memory."""
        self._memory.update(_storage(y) for y in self._kept[self._looked_at :])
        self._looked_at = len(self._kept)
        return x in self or _storage(x) in self._memory

    def replace(self, old: Tensor, new: Tensor) -> None:
        """From here on, ``old`` (which the caller wanted changed in place) means ``new``."""
        self._kept.append(old)
        self._current[id(old)] = new
        for known, replaced in list(self._current.items()):
            if replaced is old:
                self._current[known] = new
        if _storage(new) != _storage(old):  # else only its shape was changed
            self._changed.add(_storage(old))

    def current(self, x: Tensor) -> Tensor:
        """What a tensor is after all that was done to it in place."""
        return self._current.get(id(x), x)

    def checked(self, x: Tensor) -> Tensor:
        """What an argument of a call stands for.

        Raises:
            NoRule: that is not known.
        """
        x = self.current(x)
        writes = self._writes.get(id(x))
        if writes is None:
            if x.requires_grad:
                raise NoRule("a tensor came from an operation that cannot be seen (a custom autograd.Function?)")
        elif writes != writes_to(x):
            raise NoRule(_CHANGED)
        if self._changed and _storage(x) in self._changed:
            raise NoRule("a view of a tensor that was changed in place is used afterwards")
        return x

    def check_unchanged(self) -> None:
        """Raises NoRule where something was written to that no call showed."""
        if any(self._writes.get(id(x), writes_to(x)) != writes_to(x) for x in self._kept):
            raise NoRule(_CHANGED)


_CHANGED = "a tensor was changed in place by an operation that cannot be seen"


def writes_to(x: Tensor) -> int:
    """PyTorch's count of the writes to a tensor and its views; a tensor of inference mode has none and is never one."""
    return 0 if x.is_inference() else x._version


def _storage(x: Tensor) -> int:
    """The memory of a tensor and its views; of an empty one and of one that has several, a number of its own."""
    return (x.untyped_storage().data_ptr() if x.layout == torch.strided else 0) or -id(x)

"""Which targets fit which logits, and which rows of the logits they count: class indices or class probabilities."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastfisher.host import looking_waits
from fastfisher.inputs import known_of
from fastfisher.outputs import as_given, class_last

IGNORED = -100
"""The target of a row that does not count, as in ``F.cross_entropy``."""


def fit(
    logits: Tensor,
    targets: Any,
    *,
    class_dim: int | None = None,
    name: str = "targets",
    model: nn.Module | None = None,
    in_range: bool = True,
) -> Tensor:
    """The targets of a cross-entropy with logits (N, …, C), the classes last: int64 (N, …), or probabilities (N, …, C).

    Args:
        logits: as :func:`fastfisher.model.call_model` gives them.
        targets: class indices of any integer dtype, −100 where a row does not count, or class probabilities, which have
            their classes where the model's own logits have them.
        class_dim: what the caller said of the model's logits. Where nothing was said, targets must not fit another
            dimension of theirs than the last.
        name: the argument that is named where something is wrong.
        model: on a GPU, where the host waits for a look at the values, they are looked at once for each model and kind
            of targets; each time without it.
        in_range: whether to look if class indices are within the classes; a cross-entropy on the CPU does that itself.

    Raises:
        ValueError: the targets do not fit, or there is a single class, whose probability is 1 whatever the logits.
    """
    check_classes(logits)
    if not isinstance(targets, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(targets).__name__}")
    if targets.device != logits.device:
        raise ValueError(f"{name}: expected a tensor on {logits.device}, where the logits are, got {targets.device}")
    if targets.is_floating_point():
        return _fitting_probabilities(logits, targets, class_dim, name, model)
    if targets.dtype == torch.bool or targets.is_complex():
        raise ValueError(
            f"{name}: expected class indices or class probabilities, got {targets.dtype}; of two classes give "
            f"{name}.long(); several labels at once are those of likelihood='bernoulli'"
        )
    check_certain(logits, targets, class_dim, name)
    if targets.shape != logits.shape[:-1]:
        raise ValueError(_misfit(logits, targets, class_dim, name))
    indices = targets.long()
    if in_range and _to_be_looked_at(indices, logits.shape, model):
        check_range(indices, logits.shape[-1], name)
        _looked_at(indices, logits.shape, model)
    return indices


def check_classes(logits: Tensor) -> None:
    """Raises ValueError where the logits (..., C) are of fewer than two classes."""
    if logits.shape[-1] < 2:
        raise ValueError(
            f"model: expected logits of at least two classes, got shape {tuple(logits.shape)}, and a softmax over one "
            "class is 1 whatever the logit, so that every gradient is 0; of a binary model with logit z say "
            "likelihood='bernoulli', or give (0, z): torch.cat([torch.zeros_like(z), z], -1)"
        )


def check_certain(logits: Tensor, targets: Any, class_dim: int | None, name: str = "targets") -> None:
    """Raises ValueError where nobody said which dimension holds the classes, and class indices of such a shape leave it
    open or show that it is not the last."""
    if class_dim is not None or not isinstance(targets, Tensor) or targets.is_floating_point() or logits.dim() < 3:
        return
    shape = tuple(logits.shape)
    fits = [d for d in range(1, logits.dim()) if shape[:d] + shape[d + 1 :] == tuple(targets.shape)]
    if fits and fits != [logits.dim() - 1]:
        raise ValueError(_unsaid(shape, f"{name} of shape {tuple(targets.shape)} fit", fits))


def _unsaid(shape: tuple[int, ...], what: str, fits: list[int]) -> str:
    ways = " or ".join(f"class_dim={d}" for d in fits)
    return (
        f"class_dim: expected the dimension of the logits {shape} that holds the classes, got None, and {what} {ways}"
    )


def _misfit(logits: Tensor, targets: Tensor, class_dim: int | None, name: str) -> str:
    """What is wrong with the shape of targets."""
    rows, shape = tuple(logits.shape[:-1]), tuple(targets.shape)
    given = tuple(as_given(logits, class_dim).shape)
    hint = ""
    if targets.is_floating_point():
        hint = (
            f"; class indices are integers, {name}.long(); numbers to regress are those of "
            "likelihood='gaussian', or of a loss=; of inputs alone that are several tensors make ((x, w), None)"
        )
    elif shape == (*rows, 1):
        hint = f"; give {name}.squeeze(-1)"
    elif shape == given:
        hint = f"; of one-hot integers give {name}.argmax over the classes"
    elif shape == (math.prod(rows),):
        hint = f"; give {name}.view{rows}"
    elif shape == rows[::-1]:
        hint = f"; give {name}.T"
    return (
        f"{name}: expected class indices (int64) of shape {rows} or class probabilities of shape {given}, got "
        f"{targets.dtype} of shape {shape}{hint}"
    )


def check_range(targets: Tensor, classes: int, name: str, ignored: int = IGNORED) -> None:
    """Raises ValueError where a class index is out of range, and not the one of rows that do not count."""
    wrong = (targets != ignored) & ((targets < 0) | (targets >= classes))
    if bool(wrong.any()):
        found = int(targets[wrong][0])
        raise ValueError(
            f"{name}: expected class indices 0 to {classes - 1}, or -100 where a row does not count, got {found}; if "
            f"{found} stands for no class, give {name}.masked_fill({name} == {found}, -100)"
        )


def _fitting_probabilities(
    logits: Tensor, targets: Tensor, class_dim: int | None, name: str, model: nn.Module | None
) -> Tensor:
    if targets.shape != as_given(logits, class_dim).shape:
        raise ValueError(_misfit(logits, targets, class_dim, name))
    if not _to_be_looked_at(targets, logits.shape, model):
        return class_last(targets, -1 if class_dim is None else class_dim)
    if class_dim is None and logits.dim() > 2:
        fits = [d for d in range(1, logits.dim()) if _first_that_is_none(targets.movedim(d, -1)) is None]
        if fits and fits != [logits.dim() - 1]:
            raise ValueError(_unsaid(tuple(logits.shape), f"{name} are probabilities over", fits))
    targets = class_last(targets, -1 if class_dim is None else class_dim)
    row = _first_that_is_none(targets)
    if row is not None:
        values = targets.reshape(-1, targets.shape[-1])[row].double()
        raise ValueError(
            f"{name}: expected class probabilities, each row >= 0 and with the sum 1, got {targets.dtype} with row "
            f"{row} from {float(values.min()):g} to {float(values.max()):g} and the sum {float(values.sum()):.6g}; "
            "several labels at once are those of likelihood='bernoulli', numbers to regress of 'gaussian' or a loss="
        )
    _looked_at(targets, logits.shape, model)
    return targets


def _first_that_is_none(probabilities: Tensor) -> int | None:
    """The number of the first row that is no distribution, up to rounding: of each probability and of what they were
    divided by, a few in their precision, and of the sum of so many, in that of sums."""
    classes, eps = probabilities.shape[-1], torch.finfo(probabilities.dtype).eps
    accumulated = eps if probabilities.dtype == torch.float64 else torch.finfo(torch.float32).eps
    tolerance = 16 * eps + math.sqrt(classes) * accumulated
    p = probabilities.detach().reshape(-1, classes)
    near = (p.sum(-1, dtype=torch.float64) - 1).abs() <= tolerance
    fine = near & (p >= 0).all(-1)
    return None if bool(fine.all()) else int(fine.logical_not().nonzero()[0])


def _to_be_looked_at(targets: Tensor, logits: torch.Size, model: nn.Module | None) -> bool:
    """Whether the values of such targets were not looked at yet, or looking costs nothing."""
    return model is None or not looking_waits(targets) or _kind(targets, logits) not in known_of(model)


def _looked_at(targets: Tensor, logits: torch.Size, model: nn.Module | None) -> None:
    if model is not None and looking_waits(targets):
        known_of(model)[_kind(targets, logits)] = True


def _kind(targets: Tensor, logits: torch.Size) -> tuple[Any, ...]:
    return "targets", targets.dtype, targets.dim(), logits[-1]


def ignored(logits: Tensor, targets: Any) -> Tensor | None:
    """Which rows of the logits (..., C) the targets (...) take out of every mean with ``IGNORED``: padding, prompts.

    None where there are none.
    """
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.shape != logits.shape[:-1]:
        return None
    found = targets == IGNORED
    return found if looking_waits(found) or bool(found.any()) else None


def count_targets(targets: Tensor, class_dim: int | None) -> int:
    """How many rows the mean loss at these targets, as :func:`fit` takes them, is over."""
    if targets.is_floating_point():
        return targets.numel() // max(1, targets.shape[-1 if class_dim is None else class_dim])
    return int((targets != IGNORED).sum())


def check_counted(targets: Tensor, name: str = "targets") -> None:
    """Raises ValueError where no row counts and a mean over them is NaN; on a GPU nothing waits for a look."""
    if targets.dtype == torch.int64 and not looking_waits(targets) and bool((targets == IGNORED).all()):
        raise ValueError(f"{name}: expected at least one row that counts, got -100 in all of them")

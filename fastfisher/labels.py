"""Which labels a gradient is taken at, and the loss there: sampled, true, uniform, Rademacher, or given."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfisher import ops
from fastfisher.checks import check_generator, is_count
from fastfisher.model import as_given, class_last, known_of
from fastfisher.ops import reference

LABELS = ("sampled", "true", "uniform", "rademacher")

IGNORED = -100
"""The target of a row that does not count, as in ``F.cross_entropy``."""


@dataclass(frozen=True)
class Signs:
    """Random signs ε in place of labels: int8 (..., C), 1 and −1; 0 in the rows that do not count."""

    tensor: Tensor


def new_key(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """A fresh key (seed, offset) as int64[2] on ``device``, drawn from ``generator`` or from torch's default one."""
    source = generator.device if generator is not None else torch.device("cpu")
    return torch.empty(2, dtype=torch.int64, device=source).random_(generator=generator).to(device)


def sample_cross_entropy(
    logits: Tensor,
    *,
    generator: torch.Generator | None = None,
    key: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    first: int = 0,
    class_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws ŷ ~ p(y) = softmax(logits) and returns the cross-entropy −log p(ŷ) and ŷ, in one fused pass.

    The gradient of the loss in the logits is softmax(logits) − onehot(ŷ): exactly the per-example output gradient
    whose second moment is the Fisher matrix (eq. 2 of Jastrzebski et al., 2021). Twice differentiable.

    Args:
        logits: (..., C) with C from 1 to 262,144; float32, float64, bfloat16 or float16. −inf masks a class: it is
            never drawn.
        generator: where the key comes from; torch's default generator otherwise, so ``torch.manual_seed`` governs it.
        key: int64[2] (seed, offset) instead. The same key and logits give the same labels.
        reduction: "mean" over all rows, "sum", or "none".
        first: the number of the first row. Two halves of a batch, drawn with one key, the second one with ``first`` the
            rows of the other, get the labels of the whole.
        class_dim: which dimension of the logits holds the classes; the last by default, but of four or more it has to
            be said.

    Returns:
        The loss (float64 for float64 logits, else float32; shape () or logits.shape[:-1]) and the labels (int64,
        logits.shape[:-1], or that without ``class_dim``). No rows: a mean of NaN, as in ``F.cross_entropy``.

    Raises:
        ValueError: no class dimension, an unknown reduction, a ``first`` that is no row number, a key or generator that
            is none, both of them, a ``class_dim`` that is none, or a row without a softmax (NaN, +inf, or all −inf),
            which is named.
    """
    if not isinstance(logits, Tensor):
        raise ValueError(f"logits: expected a tensor of shape (..., C), got {type(logits).__name__}")
    check_generator(generator)
    if not (key is None or isinstance(key, Tensor)):
        raise ValueError(f"key: expected an int64 tensor of 2 elements or None, got {type(key).__name__}")
    if logits.dim() == 0:
        raise ValueError("logits: expected shape (..., C), got a scalar")
    logits = class_last(logits, class_dim, least=0)
    if not (isinstance(reduction, str) and reduction in ("mean", "sum", "none")):
        raise ValueError(f'reduction: expected "mean", "sum" or "none", got {reduction!r}')
    if not is_count(first, 0):
        raise ValueError(f"first: expected a row number >= 0, got {first!r}")
    if key is None:
        key = new_key(generator, logits.device)
    elif generator is not None:
        raise ValueError("key and generator: expected one of them, got both")
    flat = logits.dim() == 2
    rows = logits if flat else logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])
    transformed = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
    if logits.requires_grad and torch.is_grad_enabled() and not transformed:
        loss, labels, _ = _Sampled.apply(rows, key, first, reduction)  # type: ignore[no-untyped-call]
    else:
        nll, labels, _ = ops.sample_cross_entropy(rows, key, 1.0, first)
        loss = _reduced(nll, reduction)
    if flat:
        return loss, labels
    return loss.view(logits.shape[:-1]) if reduction == "none" else loss, labels.view(logits.shape[:-1])


def _reduced(nll: Tensor, reduction: str) -> Tensor:
    return nll.mean() if reduction == "mean" else nll.sum() if reduction == "sum" else nll


class _Sampled(torch.autograd.Function):
    """The drawn loss with its derivative, in half of the time that the operator's own takes, which is registered in
    Python. ``torch.compile`` and ``torch.func`` take that one.

    Its third output is the gradient in the logits, so that a second derivative finds its way through it.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, key: Tensor, first: int, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
        # With the mean taken in the operator, a backward from the loss itself has nothing left to do. A low precision
        # would lose there what a gradient scaler is to keep.
        precise = rows.dtype in (torch.float32, torch.float64) and not looking_waits(rows)
        ctx.scale = 1.0 / len(rows) if reduction == "mean" and precise and len(rows) else 1.0
        nll, labels, gradient = ops.sample_cross_entropy(rows, key, ctx.scale, first)
        ctx.reduction = reduction
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(labels)
        ctx.save_for_backward(labels, gradient)
        return _reduced(nll, reduction), labels, gradient

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: None, grad_gradient: Tensor | None) -> Any:
        labels, gradient = ctx.saved_tensors
        grad = None
        if grad_loss is not None:
            # A graph that is kept reads the gradient again: nobody else may get it, and write into it as into a .grad.
            kept = torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph()
            if ctx.scale != 1.0 and not kept and grad_gradient is None and float(grad_loss) == 1.0:
                return gradient, None, None, None
            if ctx.reduction == "mean" and ctx.scale == 1.0:
                grad_loss = grad_loss / len(labels)
            # In the precision of the loss: what a gradient scaler multiplies by may have no value in float16.
            grad = (gradient * grad_loss.reshape(-1, 1)).to(gradient.dtype)
        if grad_gradient is not None:  # the Jacobian of softmax is symmetric
            product = ops.softmax_hessian_product(gradient, labels, grad_gradient, ctx.scale)
            grad = product if grad is None else grad + product
        return grad, None, None, None


def cross_entropy(
    logits: Tensor, targets: Tensor | Signs, *, reduction: Literal["mean", "sum"] = "mean", name: str = "targets"
) -> Tensor:
    """Mean (or summed) cross-entropy of logits (..., C) against targets that :func:`fit`.

    Against signs ε it is 2⟨√p, ε⟩ instead, whose gradient in the logits, √p⊙ε − p⟨√p, ε⟩, has over random signs the
    mean and covariance of that of −log p(ŷ) over ŷ ~ p. The mean is over the rows whose label is not ``IGNORED``, or
    whose signs are not 0.

    Raises:
        ValueError: a target is no class, on the CPU; ``name`` is the argument that is named.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    if isinstance(targets, Signs):
        signs = targets.tensor.reshape(rows.shape)
        total = 2 * ((rows.log_softmax(-1) / 2).exp() * signs).sum()
        return total / (signs[:, :1] != 0).sum() if reduction == "mean" else total
    if targets.is_floating_point():
        return F.cross_entropy(rows, targets.reshape(rows.shape), reduction=reduction)
    try:
        return F.cross_entropy(rows, targets.reshape(-1), reduction=reduction)
    except IndexError:  # on a GPU the device asserts
        _check_range(targets, rows.shape[1], name)
        raise


# ---- which targets fit which logits ----------------------------------------------------------------------------------


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
            f"{name}.long(); several labels at once have a loss of their own, to be given as loss="
        )
    check_certain(logits, targets, class_dim, name)
    if targets.shape != logits.shape[:-1]:
        raise ValueError(_misfit(logits, targets, class_dim, name))
    indices = targets.long()
    if in_range and _to_be_looked_at(indices, logits.shape, model):
        _check_range(indices, logits.shape[-1], name)
        _looked_at(indices, logits.shape, model)
    return indices


def check_classes(logits: Tensor) -> None:
    """Raises ValueError where the logits (..., C) are of fewer than two classes."""
    if logits.shape[-1] < 2:
        raise ValueError(
            f"model: expected logits of at least two classes, got shape {tuple(logits.shape)}, and a softmax over one "
            "class is 1 whatever the logit, so that every gradient is 0; of a binary model with logit z give (0, z): "
            "torch.cat([torch.zeros_like(z), z], -1)"
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
            f"; class indices are integers, {name}.long(); numbers to regress have a loss of their own, to be given as "
            "loss=; of inputs alone that are several tensors make ((x, w), None)"
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


def _check_range(targets: Tensor, classes: int, name: str) -> None:
    """Raises ValueError where a class index is out of range."""
    wrong = (targets != IGNORED) & ((targets < 0) | (targets >= classes))
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
            "several labels at once, and numbers to regress, have a loss of their own, to be given as loss="
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


HOST = "cpu"
"""The type of device whose values the host reads at once; a test has others wait, too."""


def looking_waits(x: Tensor) -> bool:
    """Whether the host would wait for a value, as on a GPU, where that stalls the stream."""
    return x.device.type != HOST


def counted_rows(logits: Tensor, targets: Any) -> int | Tensor:
    """How many rows of the logits a mean is over; a float64 tensor where some may be :func:`ignored`."""
    out = ignored(logits, targets)
    return logits[..., 0].numel() if out is None else (~out).sum(dtype=torch.float64)


def averaged_rows(targets: Any, rows: int) -> int:
    """How many of the rows ``F.cross_entropy`` averages over at these targets; on a GPU the host waits."""
    if isinstance(targets, Tensor) and targets.dtype == torch.int64:
        return int((targets != IGNORED).sum())
    return rows


def count_targets(targets: Tensor, class_dim: int | None) -> int:
    """How many rows the mean loss at these targets, as :func:`fit` takes them, is over."""
    if targets.is_floating_point():
        return targets.numel() // max(1, targets.shape[-1 if class_dim is None else class_dim])
    return int((targets != IGNORED).sum())


def check_counted(targets: Tensor, name: str = "targets") -> None:
    """Raises ValueError where no row counts and a mean over them is NaN; on a GPU nothing waits for a look."""
    if targets.dtype == torch.int64 and not looking_waits(targets) and bool((targets == IGNORED).all()):
        raise ValueError(f"{name}: expected at least one row that counts, got -100 in all of them")


def check_labels(labels: str | Tensor) -> None:
    """Raises ValueError where ``labels`` names nothing known."""
    if not isinstance(labels, Tensor) and not (isinstance(labels, str) and labels in LABELS):
        raise ValueError(f'labels: expected "sampled", "true", "uniform", "rademacher" or a tensor, got {labels!r}')


def check_targets(labels: str | Tensor, targets: Tensor | None) -> None:
    """Raises ValueError where the labels are the targets and there are none."""
    if isinstance(labels, str) and labels == "true" and targets is None:
        raise ValueError('targets: expected the true labels with labels="true", got None')


def are_drawn(labels: str | Tensor) -> bool:
    """Whether it takes a key to have such labels."""
    return isinstance(labels, str) and labels != "true"


def label_loss(
    logits: Tensor, labels: str | Tensor, targets: Tensor | None, key: Tensor | None, first: int = 0
) -> tuple[Tensor, Tensor | Signs]:
    """The mean cross-entropy at the chosen labels, and those labels, so that it can be taken again elsewhere.

    ``key`` is what they are drawn with, where they :func:`are_drawn`, and ``first`` the number of the first row. Rows
    whose target is ``IGNORED`` have that label (signs of 0), and no part in the mean. Labels that are given and targets
    :func:`fit` the logits.
    """
    check_classes(logits)
    out = ignored(logits, targets)
    chosen: Tensor | Signs
    if isinstance(labels, Tensor):
        chosen = labels
        if out is not None and labels.is_floating_point():
            raise ValueError("targets: expected none of -100 beside labels that are probabilities")
        chosen = labels if out is None else labels.masked_fill(out, IGNORED)
    elif labels == "sampled":
        losses, drawn = sample_cross_entropy(logits, key=key, first=first, reduction="none", class_dim=-1)
        if out is None:
            return losses.mean(), drawn
        return losses.masked_fill(out, 0).sum() / (~out).sum(), drawn.masked_fill(out, IGNORED)
    elif labels == "uniform":
        _, chosen = sample_cross_entropy(torch.zeros_like(logits), key=key, first=first, class_dim=-1)
        chosen = chosen if out is None else chosen.masked_fill(out, IGNORED)
    elif labels == "rademacher":
        assert key is not None
        drawn = reference.rademacher_signs(logits[..., 0].numel(), logits.shape[-1], key, first)
        drawn = drawn.view(logits.shape).to(logits.device)
        chosen = Signs(drawn if out is None else drawn.masked_fill(out[..., None], 0))
    else:
        assert targets is not None
        chosen = targets
    return cross_entropy(logits, chosen, name="labels" if isinstance(labels, Tensor) else "targets"), chosen

"""Per-example gradient norms, the trace of the Fisher, and inner products of gradients, none of it materialised.

One forward, one backward to the outputs of the layers, and a formula per layer (``fastfisher/layers``): the cost of a
plain forward and backward, and no array of examples x parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fastfisher import ops
from fastfisher.arguments import check_flags, is_count, is_number
from fastfisher.batches import Batches, paired, split
from fastfisher.capture import Capture, Part
from fastfisher.distributed import Ranks, digest, measuring_together, shared_by
from fastfisher.estimate import TraceEstimate
from fastfisher.labels import IGNORED, check_classes, cross_entropy, fit, ignored, new_key
from fastfisher.layers import Layer, chunks, squares
from fastfisher.model import (
    Call,
    Inputs,
    as_given,
    call_with,
    check_class_dim,
    chosen_names,
    eval_mode,
    input_tensors,
    is_shared,
    map_inputs,
    trainable_parameters,
    uncompiled,
)
from fastfisher.placement import placement_of, whole
from fastfisher.rollback import undoing
from fastfisher.slow_path import warn_slow_path

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Labels = Literal["rademacher", "sampled", "exact", "true"]
Loss = Callable[[Tensor, Tensor | None], Tensor]
Seen = dict[int, tuple[Tensor, Tensor]]

LABELS = ("rademacher", "sampled", "exact", "true")


# ---- the public functions --------------------------------------------------------------------------------------------


@undoing
def per_example_grad_norms(
    model: nn.Module,
    inputs: Inputs,
    targets: Tensor | None = None,
    *,
    labels: Labels | Tensor = "sampled",
    draws: int = 1,
    squared: bool = True,
    params: Iterable[Tensor] | None = None,
    loss: Loss | None = None,
    generator: torch.Generator | None = None,
    class_dim: int | None = None,
) -> Tensor:
    """‖∇_θ ℓ(x_i, ŷ_i)‖² for each example i, with ℓ = −log p(ŷ_i | x_i) summed over the positions of an example.

    About the cost of one forward and backward of the batch; each further draw costs a backward. The model is in eval
    mode meanwhile (a batch norm in train mode couples the examples) and put back as it was.

    Example:
        >>> norms = fastfisher.per_example_grad_norms(model, x, y, labels="true", squared=False)

    Args:
        model: any module from ``inputs`` to logits (N, …, C).
        inputs: a tensor, a tuple or list (positional arguments) or a mapping (keyword arguments), batch first; see
            docs/data.md.
        targets: class indices (N, …) or class probabilities (N, …, C), where ``labels="true"``; by default the
            ``labels`` in a mapping of inputs. Positions with the index −100 are left out, whichever the labels.
        labels: "sampled" draws ŷ ~ p(y|x); "rademacher" draws the cotangent √p⊙ε − p⟨√p, ε⟩, ε = ±1, whose squared
            norm has the same expectation; "exact" is that expectation, E_ŷ‖∇ℓ(x_i, ŷ)‖², by C − 1 backwards for each
            position; "true" takes the targets; a tensor is used as the targets.
        draws: how many independent draws, with one forward in common.
        squared: False for the norms themselves.
        params: the parameters whose gradient is meant; all trainable ones otherwise.
        loss: instead of the cross-entropy, a function of (logits, targets) that returns one loss per example (N,).
            Goes with ``labels="true"``; logits are as the model gives them, and targets may be anything.
        generator: where labels are drawn; torch's default generator otherwise.
        class_dim: which dimension of the logits holds the classes; by default the last, but where logits have four
            dimensions or more, or targets fit another one, it has to be said.

    Returns:
        float64 (N,), or (draws, N) for more than one draw.

    Raises:
        ValueError: an argument is none of the above; it is named.
        TypeError: the model, the inputs or the data are of a type that cannot be one.
    """
    check_flags(squared=squared)
    check_class_dim(class_dim)
    model = placement_of(model).module  # the norms of this process's examples are right in any case
    names = parameter_names(model, params)
    with eval_mode(model):
        inputs, targets = paired(model, inputs, targets, of_loss(class_dim, loss))
        _check(labels, draws, loss, targets)
        capture = _capture(model, inputs, names)
        cotangents = _Cotangents(capture.logits.detach(), labels, targets, loss, generator, inputs.class_dim)
        found = [sum(n.values()) for n in _draws(model, inputs, capture, cotangents, draws)]
    norms = torch.stack([n if isinstance(n, Tensor) else _zeros(capture) for n in found])
    norms = norms if squared else norms.sqrt()
    return norms[0] if draws == 1 else norms


@dataclass(frozen=True)
class FisherTrace(TraceEstimate):
    """An estimate of Tr(F).

    Attributes:
        minibatch: Tr(F_B) = E‖(1/B) Σ_i g_i‖² over the batches that were used, where it was asked for; else None.
    """

    minibatch: float | None = None


@undoing
def trace_fisher(
    model: nn.Module,
    data: Any,
    *,
    samples: int | None = None,
    labels: Labels = "rademacher",
    draws: int = 1,
    batch_size: int = 128,
    tolerance: float | None = None,
    minibatch: bool = False,
    params: Iterable[Tensor] | None = None,
    generator: torch.Generator | None = None,
    class_dim: int | None = None,
    process_group: ProcessGroup | None = None,
) -> FisherTrace:
    """Tr(F) = E_x E_ŷ ‖∇_θ ℓ(x, ŷ)‖², ŷ ~ p(y|x): the trace of the Fisher Information Matrix (eq. 2 of the paper).

    One draw costs about a plain forward and backward of the data, "exact" C − 1 backwards. Memory is that of one batch.

    Example:
        >>> print(fastfisher.trace_fisher(model, loader))
        41.3 ± 0.52 (fisher, labels=rademacher; over labels and examples, 5000 examples)

    The error bar. With more than one draw, or a label that is not drawn, ``standard_error`` is that of the trace over
    the examples given (0 for "exact" and "true"), plus, with ``samples``, that of having taken only some of the data.
    With a single draw the noise of the labels cannot be told from the differences between examples, and the error bar
    is that of the trace over the distribution the examples come from; ``method`` says which. It is NaN for one example.

    Args:
        model: as in :func:`per_example_grad_norms`; in eval mode meanwhile.
        data: a batch (a tensor of inputs, a pair (inputs, targets), a mapping with ``labels``) or an iterable of
            batches, such as a DataLoader; see docs/data.md. Batches are moved to the device of the model's parameters.
        samples: at most so many examples: a random choice of a pair's, the first of an iterable's.
        labels: "rademacher" has by far the smallest variance once a network has fitted its data; "sampled", "exact" as
            in :func:`per_example_grad_norms`; "true" gives the empirical Fisher's trace, of the targets in ``data``.
        draws: how many draws for each example.
        batch_size: how many examples at a time, where ``data`` is no iterable.
        tolerance: go on drawing (at least two draws in all) until standard_error ≤ tolerance·value.
        minibatch: also Tr(F_B), for about a third more.
        params, generator, class_dim: as in :func:`per_example_grad_norms`.
        process_group: the processes that each have a part of the data; by default those of
            ``DistributedDataParallel`` around the model. The b-th batches of all are one batch, that of rank 0 first:
            with its key, any number of processes draw the same labels for it. Each batch takes a message of 88 bytes
            per process, and one for each draw; at the end 16 bytes of each example go to each process. ``samples`` and
            ``batch_size`` are each process's own; ``minibatch`` needs a single one.

    Returns:
        The estimate over the data of all processes, split by parameter, with the parameters that took a slower way.

    Raises:
        ValueError: an argument is none of the above, or there is no example; it is named.
        TypeError: the model, the inputs or the data are of a type that cannot be one.
        RankFailure: another process raised.
    """
    if isinstance(labels, Tensor):
        raise ValueError(f"labels: expected one of {', '.join(LABELS)}, got a tensor")
    _check(labels, draws, None, None, data_has_targets=True)
    check_flags(minibatch=minibatch)
    check_class_dim(class_dim)
    if tolerance is not None and not (is_number(tolerance) and tolerance > 0):
        raise ValueError(f"tolerance: expected a number > 0, got {tolerance!r}")
    ranks, model = whole_model(model, process_group)
    if ranks is not None and minibatch:
        raise ValueError("minibatch: expected False where several processes share the data, got True")
    names = parameter_names(model, params)
    drawn = labels in ("rademacher", "sampled")
    sums = _Sums(names)
    rounds = max(2, draws) if tolerance is not None and drawn else draws if drawn else 1
    device = next(model.parameters()).device
    told = {"labels": labels, "draws": draws, "tolerance": tolerance, "params": digest(names)}
    with measuring_together(ranks, "trace_fisher", model, trainable_parameters(model), **told), eval_mode(model):
        batches = Batches(
            model, data, device, class_dim=class_dim, samples=samples, batch_size=batch_size, generator=generator
        )
        while True:
            sums.begin(rounds)
            for batch in batches if ranks is None else ranks.aligned(batches):
                if batch is None:  # the others have more: their labels are drawn with what rank 0 tells them
                    for _ in range(rounds if drawn else 0):
                        draw_key(generator, device, 0, ranks)
                    continue
                inputs, targets = batch
                capture = _capture(model, inputs, names)
                sums.fallbacks.update(capture.fallbacks)
                cotangents = _Cotangents(capture.logits.detach(), labels, targets, None, generator, class_dim, ranks)
                sums.add(_draws(model, inputs, capture, cotangents, rounds, sums.means if minibatch else None))
                del capture, cotangents  # before the next forward
            fraction = batches.fraction
            found = sums
            if ranks is not None:
                found, fraction = sums.of_all(ranks, device), _fraction_of_all(ranks, sums.examples, fraction, device)
            if not found.examples:
                raise ValueError("data: expected at least one example, got none")
            error = found.standard_error(drawn, fraction)
            if tolerance is None or not drawn or error <= tolerance * found.value():
                break
            rounds = sums.draws  # twice as many with each round
    over = "labels" if found.draws > 1 else "labels and examples"
    if drawn and fraction < 1:
        over = "labels and examples"
    if not drawn:
        over = "examples" if fraction < 1 else ""
    return FisherTrace(
        value=found.value(),
        standard_error=error,
        samples=found.examples,
        draws=found.draws if drawn else 0,
        method=f"fisher, labels={labels}" + (f"; over {over}" if over else ""),
        per_parameter=found.per_parameter(),
        fallbacks=found.fallbacks,
        minibatch=found.minibatch() if minibatch else None,
    )


@dataclass(frozen=True)
class GradInnerProducts:
    """Inner products between the gradients of two batches.

    Attributes:
        per_example: ⟨g_i, h_i⟩ for the pairs of examples, float64 (N,); None where the batches differ in size.
        mean: ⟨ḡ, h̄⟩ of the mean gradients.
        cosine: ⟨ḡ, h̄⟩ / (‖ḡ‖ ‖h̄‖).
    """

    per_example: Tensor | None
    mean: float
    cosine: float


@undoing
def grad_inner_products(
    model: nn.Module,
    first: Any,
    second: Any,
    *,
    labels: Labels = "true",
    params: Iterable[Tensor] | None = None,
    loss: Loss | None = None,
    generator: torch.Generator | None = None,
    class_dim: int | None = None,
) -> GradInnerProducts:
    """Inner products of the gradients of two batches, such as clean and mislabelled examples (figure 12).

    One forward and backward of each batch, whose layer inputs and output gradients are kept until both are there.

    Args:
        model: as in :func:`per_example_grad_norms`; in eval mode meanwhile.
        first, second: batches, as in :func:`trace_fisher`: pairs (inputs, targets).
        labels: "true", or "sampled" or "rademacher" for drawn ones (the targets may then be None).
        params, loss, generator, class_dim: as in :func:`per_example_grad_norms`.

    Raises:
        ValueError: an argument is none of the above; it is named.
        TypeError: the model, the inputs or the data are of a type that cannot be one.
    """
    check_class_dim(class_dim)
    if isinstance(labels, str) and labels == "exact":
        raise ValueError('labels: expected "true", "sampled" or "rademacher", got "exact"')
    model = whole(model, "the inner product of mean gradients")
    names = parameter_names(model, params)
    sides = []
    with eval_mode(model):
        pairs = [
            split(model, batch, of_loss(class_dim, loss), name)
            for name, batch in (("first", first), ("second", second))
        ]
        for _, targets in pairs:
            _check(labels, 1, loss, targets)
        for inputs, targets in pairs:
            sides.append(one_backward(model, inputs, names, labels, targets, loss, generator))
        one, two = sides
        matched = one.capture.examples == two.capture.examples
        per_example = _zeros(one.capture)
        mean = norm_one = norm_two = 0.0
        for name in names:
            if matched:
                per_example = per_example + one.inner_products(name, two)
            totals = [side.totals(name) for side in sides]
            for g, h in zip(*totals, strict=True):
                g, h = g.double() / one.capture.examples, h.double() / two.capture.examples
                mean += float((g * h).sum())
                norm_one += float(g.square().sum())
                norm_two += float(h.square().sum())
    size = math.sqrt(norm_one * norm_two)
    return GradInnerProducts(per_example if matched else None, mean, mean / size if size else math.nan)


# ---- arguments ----------------------------------------------------------------------------------------------


def _check(
    labels: str | Tensor, draws: int, loss: Loss | None, targets: Tensor | None, data_has_targets: bool = False
) -> None:
    if not isinstance(labels, Tensor) and not (isinstance(labels, str) and labels in LABELS):
        raise ValueError(f"labels: expected one of {', '.join(LABELS)}, got {labels!r}")
    if not is_count(draws):
        raise ValueError(f"draws: expected an integer >= 1, got {draws!r}")
    if not (loss is None or callable(loss)):
        raise ValueError(f"loss: expected a function or None, got {type(loss).__name__}")
    if loss is not None and not (isinstance(labels, str) and labels == "true"):
        raise ValueError(f'loss: expected None with labels={labels!r}, which are drawn; a loss goes with labels="true"')
    if isinstance(labels, str) and labels == "true" and loss is None and targets is None and not data_has_targets:
        raise ValueError('targets: expected the true labels with labels="true", got None')


def parameter_names(model: nn.Module, params: Iterable[Tensor] | None) -> list[str]:
    """The chosen parameters in the model's order: that of a set differs between processes, and so would rounding."""
    trainable = trainable_parameters(model)
    chosen = chosen_names(trainable, params)
    return [name for name in trainable if name in chosen]


def of_loss(class_dim: int | None, loss: Loss | None) -> int | None:
    """What is said of the classes; a loss of the caller's decides itself what the dimensions of its logits are."""
    return -1 if class_dim is None and loss is not None else class_dim


def _capture(model: nn.Module, inputs: Call, names: Iterable[str]) -> Capture:
    capture = Capture(model, inputs, names)
    for reason in dict.fromkeys(capture.fallbacks.values()):
        slow = ", ".join(name for name, why in capture.fallbacks.items() if why == reason)
        warn_slow_path(f"per-example gradients of {slow} go by vmap(grad): {reason}")
    logits = capture.logits
    if logits.dim() < 2 or len(logits) != capture.examples:
        raise ValueError(
            f"model: expected logits (N, ..., C) for N = {capture.examples} examples, got shape {tuple(logits.shape)}"
        )
    return capture


def whole_model(model: nn.Module, process_group: ProcessGroup | None) -> tuple[Ranks | None, nn.Module]:
    """The processes that share the data, and the module that each of them has.

    Raises:
        ValueError: a process has only a part of the parameters.
    """
    shared = shared_by(model, process_group)
    if shared.ranks is not None and shared.ranks.sharded:
        raise ValueError("model: expected all parameters in each process, got a model sharded by fully_shard")
    return shared.ranks, shared.module


def _fraction_of_all(ranks: Ranks, examples: int, fraction: float, device: torch.device) -> float:
    """How much of all processes' data was used; 0 where one does not know how much it has."""
    of_this = [float(examples), examples / fraction if fraction else math.inf]
    used = ranks.gather(torch.tensor(of_this, dtype=torch.float64, device=device))
    counts = used.view(-1, 2).sum(0)
    return float(counts[0] / counts[1]) if counts[1] else 1.0


def draw_key(
    generator: torch.Generator | None, device: torch.device, rows: int, ranks: Ranks | None
) -> tuple[Tensor, int]:
    """A fresh key for ``rows`` rows, that of rank 0 where there are several processes, and the number of the first."""
    key = new_key(generator, device)
    return (key, 0) if ranks is None else ranks.share_key(key, rows)


def _zeros(capture: Capture) -> Tensor:
    return torch.zeros(capture.examples, dtype=torch.float64, device=capture.logits.device)


# ---- the gradients of the loss in the logits -------------------------------------------------------------------------


class _Cotangents:
    """∂ℓ/∂logits for each draw of the labels; with "exact", several whose squared norms add up."""

    def __init__(
        self,
        logits: Tensor,
        labels: str | Tensor,
        targets: Tensor | None,
        loss: Loss | None,
        generator: torch.Generator | None,
        class_dim: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.logits, self.labels, self.targets, self.loss = logits, labels, targets, loss
        self.generator, self.class_dim, self.ranks = generator, class_dim, ranks
        self.name = "targets"
        if loss is None:
            check_classes(logits)
            if targets is not None:
                self.targets = fit(logits, targets, class_dim=class_dim)
        if isinstance(labels, Tensor):
            given = fit(logits, labels, class_dim=class_dim, name="labels")
            out = ignored(logits, self.targets)
            if out is not None and not given.is_floating_point():
                given = given.masked_fill(out, IGNORED)
            elif out is not None:
                raise ValueError("targets: expected none of -100 beside labels that are probabilities")
            self.labels, self.targets, self.name = "true", given, "labels"
        if self.labels == "true" and loss is None and self.targets is None:
            raise ValueError('targets: expected the true labels with labels="true", got None')

    @property
    def count(self) -> int:
        """How many backwards a draw takes."""
        return max(1, self.logits[0].numel() - self.logits[0, ..., 0].numel()) if self.labels == "exact" else 1

    def draw(self) -> Iterator[Tensor]:
        """The cotangents of one draw; 0 where the target is ignored."""
        out = None if self.loss is not None else ignored(self.logits, self.targets)
        for cotangent in self._draw():
            yield cotangent if out is None else cotangent.masked_fill(out[..., None], 0)

    def _draw(self) -> Iterator[Tensor]:
        rows = self.logits.reshape(-1, self.logits.shape[-1])
        if self.labels == "exact":
            yield from self._exact()
        elif self.labels == "true":
            yield self._true()
        else:
            key, first = draw_key(self.generator, rows.device, len(rows), self.ranks)
            if self.labels == "sampled":
                yield ops.sample_cross_entropy(rows, key, 1.0, first)[2].view(self.logits.shape)
            else:
                yield ops.rademacher_cotangent(rows, key, 1.0, first).view(self.logits.shape)

    def _true(self) -> Tensor:
        logits = self.logits.requires_grad_()
        with torch.enable_grad():
            if self.loss is not None:
                each = self.loss(as_given(logits, self.class_dim), self.targets)
                if not isinstance(each, Tensor) or not each.requires_grad:
                    raise ValueError("loss: expected a tensor that depends on the logits, one value per example")
                if each.shape != logits.shape[:1]:
                    raise ValueError(f"loss: expected one value per example ({len(logits)},), got {tuple(each.shape)}")
                total = each.sum()
            else:
                assert self.targets is not None
                total = cross_entropy(logits, self.targets, reduction="sum", name=self.name)
            (grad,) = torch.autograd.grad(total, logits)
        logits.requires_grad_(False)
        return grad

    def _exact(self) -> Iterator[Tensor]:
        """Columns of a square root of diag(p) − ppᵀ = √p (I − uuᵀ) √p, u = √p.

        The Householder reflection that takes u to −e_C has C − 1 further columns, which span what is orthogonal to u:
        one backward fewer than there are classes.
        """
        u = self.logits.softmax(-1).sqrt()
        shifted = u.clone()
        shifted[..., -1] += 1
        factor = u * shifted / shifted[..., -1:]
        classes = u.shape[-1]
        positions = u[0, ..., 0].numel()
        if classes == 1:
            yield torch.zeros_like(u)
        for k in range(classes - 1):
            column = -factor * u[..., k : k + 1]
            column[..., k] += u[..., k]
            if positions == 1:
                yield column
                continue
            flat = column.reshape(len(u), positions, classes)
            for position in range(positions):
                one = torch.zeros_like(flat)
                one[:, position] = flat[:, position]
                yield one.view_as(column)


# ---- from captures to norms ------------------------------------------------------------------------------------------


def _draws(
    model: nn.Module,
    inputs: Call,
    capture: Capture,
    cotangents: _Cotangents,
    draws: int,
    means: list[float] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """For each draw, the squared norms of each example's gradient by parameter, float64[N].

    With ``means``, ‖mean gradient‖² of each draw is appended to it.
    """
    for draw in range(draws):
        total: dict[str, Tensor] = {}
        squared_mean = 0.0
        for index, cotangent in enumerate(cotangents.draw()):
            last = draw == draws - 1 and index == cotangents.count - 1
            with_mean = means is not None and cotangents.labels != "exact"
            norms, mean = _squared_norms(model, inputs, capture, cotangent, not last, with_mean)
            squared_mean += mean
            for name, values in norms.items():
                total[name] = total[name] + values if name in total else values
        if means is not None:
            if cotangents.labels == "exact":  # labels are independent and their gradients have mean 0
                squared_mean = sum(float(values.sum()) for values in total.values()) / capture.examples**2
            means.append(squared_mean)
        yield total


def _squared_norms(
    model: nn.Module, inputs: Call, capture: Capture, cotangent: Tensor, retain_graph: bool, with_mean: bool
) -> tuple[dict[str, Tensor], float]:
    """One backward: squared norms by parameter, each taken when its layer's gradient arrives; and ‖mean gradient‖²."""
    direct: dict[int, list[tuple[str, str]]] = {}
    for name, parts in capture.direct.items():
        for part in parts:
            direct.setdefault(id(part.layer), []).append((part.slot, name))
    held = {id(part.layer) for parts in capture.joint.values() for part in parts}
    norms = {name: _zeros(capture) for name in capture.parameters}
    kept: Seen = {}
    totals: list[Tensor] = []

    def receive(layer: Layer, grad: Tensor) -> None:
        if id(layer) not in direct and id(layer) not in held:
            return
        a, d = layer.seen(grad)
        slots = direct.get(id(layer), [])
        found = layer.squared_norms([slot for slot, _ in slots], a, d)
        for slot, name in slots:
            norms[name] += found[slot]
            if with_mean:
                totals.append(layer.total(slot, a, d))
        if id(layer) in held:
            kept[id(layer)] = (a, d)

    capture.backward(cotangent, receive, retain_graph=retain_graph)
    side = Side(model, inputs, capture, cotangent, kept)
    for name in [*capture.joint, *capture.fallbacks]:
        chunked = [(squares(g), g.sum(0) if with_mean else g[:0]) for g in side.gradients(name)]
        norms[name] = torch.cat([squared for squared, _ in chunked])
        if with_mean:
            totals.append(torch.stack([total for _, total in chunked]).sum(0))
    mean = sum(float(t.double().square().sum()) for t in totals) / capture.examples**2
    return norms, mean


def one_backward(
    model: nn.Module,
    inputs: Call,
    names: Iterable[str],
    labels: Labels | Tensor,
    targets: Tensor | None,
    loss: Loss | None = None,
    generator: torch.Generator | None = None,
) -> Side:
    """A capture, one backward of it, and what its layers saw there; the model is in eval mode."""
    capture = _capture(model, inputs, names)
    cotangents = _Cotangents(capture.logits.detach(), labels, targets, loss, generator, inputs.class_dim)
    (cotangent,) = cotangents.draw()
    kept: Seen = {}

    def keep(layer: Layer, grad: Tensor) -> None:
        kept[id(layer)] = layer.seen(grad)

    capture.backward(cotangent, keep)
    return Side(model, inputs, capture, cotangent, kept)


@dataclass
class Side:
    """A capture with what its layers saw in one backward; gradients are made a chunk of examples at a time."""

    model: nn.Module
    inputs: Call
    capture: Capture
    cotangent: Tensor
    seen: Seen

    def inner_products(self, name: str, other: Side) -> Tensor:
        """⟨g_i, h_i⟩ for one parameter, float64[N]."""
        if name in self.capture.direct and name in other.capture.direct:
            total = _zeros(self.capture)
            for mine, theirs in zip(self.capture.direct[name], other.capture.direct[name], strict=True):
                if id(mine.layer) in self.seen and id(theirs.layer) in other.seen:
                    pair = (*self.seen[id(mine.layer)], *other.seen[id(theirs.layer)])
                    total = total + mine.layer.inner_products(mine.slot, *pair)
            return total
        both = zip(self.gradients(name), other.gradients(name), strict=True)
        return torch.cat([(g.double() * h.double()).flatten(1).sum(1) for g, h in both])

    def gram(self, name: str, other: Side) -> Tensor:
        """⟨g_i, h_j⟩ for one parameter and all pairs of examples, float64[N, M]."""
        total = self.cotangent.new_zeros(self.capture.examples, other.capture.examples, dtype=torch.float64)
        if name in self.capture.direct and name in other.capture.direct:
            for mine, theirs in zip(self.capture.direct[name], other.capture.direct[name], strict=True):
                if id(mine.layer) in self.seen and id(theirs.layer) in other.seen:
                    pair = (*self.seen[id(mine.layer)], *other.seen[id(theirs.layer)])
                    total += mine.layer.gram(mine.slot, *pair)
            return total
        row = 0
        for g in self.gradients(name):
            column = 0
            for h in other.gradients(name):
                block = total[row : row + len(g), column : column + len(h)]
                block += g.reshape(len(g), -1).double() @ h.reshape(len(h), -1).double().mT
                column += len(h)
            row += len(g)
        return total

    def totals(self, name: str) -> list[Tensor]:
        """The summed gradient of one parameter, in the pieces in which it is used."""
        if name not in self.capture.direct:
            return [torch.stack([g.sum(0) for g in self.gradients(name)]).sum(0)]
        found = []
        for part in self.capture.direct[name]:
            if id(part.layer) in self.seen:
                found.append(part.layer.total(part.slot, *self.seen[id(part.layer)]))
            else:
                found.append(torch.zeros_like(part.tensor, requires_grad=False))
        return found

    def gradients(self, name: str) -> Iterator[Tensor]:
        """The gradients of one parameter, [n, *shape] for one chunk of examples after the other."""
        leaf = self.capture.parameters[name]
        if name in self.capture.fallbacks:
            yield from _fallback(self.model, self.inputs, self.capture, name, self.cotangent)
            return
        parts = self.capture.direct.get(name) or self.capture.joint.get(name) or []
        for rows in chunks(self.capture.examples, leaf.numel()):
            total = torch.zeros(rows.stop - rows.start, *leaf.shape, dtype=leaf.dtype, device=leaf.device)
            for part in parts:
                if id(part.layer) in self.seen:
                    a, d = self.seen[id(part.layer)]
                    total += _pull_back(part, leaf, part.layer.gradients(part.slot, a[rows], d[rows]))
            yield total


def _pull_back(part: Part, leaf: Tensor, gradients: Tensor) -> Tensor:
    """Gradients in ``part.tensor``, pulled back to the parameter that it was computed from."""
    if part.tensor is leaf:
        return gradients
    pulled = []
    for gradient in gradients.to(part.tensor.dtype):
        (found,) = torch.autograd.grad(part.tensor, leaf, gradient, retain_graph=True, allow_unused=True)
        pulled.append(torch.zeros_like(leaf, requires_grad=False) if found is None else found)
    return torch.stack(pulled)


def _fallback(model: nn.Module, inputs: Call, capture: Capture, name: str, cotangent: Tensor) -> Iterator[Tensor]:
    """The gradients of one parameter by vmap(grad), the other parameters held."""
    parameter = capture.parameters[name].detach()
    state = {n: b.clone() for n, b in model.named_buffers()} | {n: p.detach() for n, p in model.named_parameters()}
    tensors = input_tensors(inputs)
    shared = [is_shared(x, capture.examples) for x in tensors]

    def value(parameter: Tensor, cotangent: Tensor, *example: Tensor) -> Tensor:
        rest = iter(zip(example, shared, strict=True))

        def place(_: Tensor) -> Tensor:
            x, alike = next(rest)
            return x if alike else x[None]

        one = map_inputs(inputs, place)
        logits = call_with(model, state | {name: parameter}, one)
        return (logits[0] * cotangent).sum()

    gradient = torch.func.grad(value)
    dims = tuple(None if alike else 0 for alike in shared)
    for rows in chunks(capture.examples, 8 * max(parameter.numel(), tensors[0][0].numel())):
        some = [x if alike else x[rows] for x, alike in zip(tensors, shared, strict=True)]
        with uncompiled(model, "the measurement"):
            try:
                found = torch.func.vmap(gradient, in_dims=(None, 0, *dims))(parameter, cotangent[rows], *some)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # an operation that vmap does not know: one example at a time
                each = [
                    gradient(
                        parameter,
                        cotangent[i],
                        *(x if alike else x[i] for x, alike in zip(tensors, shared, strict=True)),
                    )
                    for i in range(rows.start, rows.stop)
                ]
                found = torch.stack(each)
        yield found


class _Sums:
    """What :func:`trace_fisher` adds up: for each example the sum and the sum of squares over its draws."""

    def __init__(self, names: Iterable[str]) -> None:
        self.first: list[Tensor] = []
        self.second: list[Tensor] = []
        self.parameters = dict.fromkeys(names, 0.0)
        self.fallbacks: dict[str, str] = {}
        self.means: list[float] = []
        self.draws = 0
        self.batch = 0

    def begin(self, draws: int) -> None:
        """A pass over the data with so many draws is to come."""
        self.draws += draws
        self.batch = 0

    def add(self, draws: Iterable[dict[str, Tensor]]) -> None:
        """The norms of one batch."""
        for norms in draws:
            for name, values in norms.items():
                self.parameters[name] += float(values.sum())
            total = torch.stack(list(norms.values())).sum(0)
            if self.batch == len(self.first):
                self.first.append(torch.zeros_like(total))
                self.second.append(torch.zeros_like(total))
            self.first[self.batch] += total
            self.second[self.batch] += total.square()
        self.batch += 1

    def of_all(self, ranks: Ranks, device: torch.device) -> _Sums:
        """What all processes have added up."""
        found = _Sums(self.parameters)
        found.draws, found.fallbacks = self.draws, self.fallbacks
        none = torch.zeros(0, dtype=torch.float64, device=device)
        found.first = [ranks.gather(torch.cat([none, *self.first]))]
        found.second = [ranks.gather(torch.cat([none, *self.second]))]
        values = torch.tensor(list(self.parameters.values()), dtype=torch.float64, device=device)
        total = ranks.gather(values).view(-1, len(values)).sum(0)
        found.parameters = dict(zip(self.parameters, total.tolist(), strict=True))
        return found

    @property
    def examples(self) -> int:
        return sum(len(x) for x in self.first)

    def value(self) -> float:
        """Tr(F)."""
        return float(torch.cat(self.first).sum()) / (self.draws * self.examples)

    def per_parameter(self) -> dict[str, float]:
        """Its parts."""
        return {name: value / (self.draws * self.examples) for name, value in self.parameters.items()}

    def minibatch(self) -> float:
        """Tr(F_B); the mean over batches and draws."""
        return sum(self.means) / len(self.means)

    def standard_error(self, drawn: bool, fraction: float) -> float:
        """Of the mean over n examples, ``fraction`` of all: √(((1 − f) s² + f w)/n).

        s² is the variance between the examples' means, label noise included; w the part of it that is label noise,
        known from two draws on; with one draw all of it may be.
        """
        mean = torch.cat(self.first) / self.draws
        between = float(mean.var()) if len(mean) > 1 else math.nan
        if not drawn:
            within = 0.0
        elif self.draws == 1:
            within = between
        else:
            each = (torch.cat(self.second) - self.draws * mean.square()) / (self.draws - 1)
            within = float(each.clamp(min=0).mean()) / self.draws
        if fraction == 1.0:
            return math.sqrt(within / len(mean))
        return math.sqrt(((1 - fraction) * between + fraction * within) / len(mean))

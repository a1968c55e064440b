"""Per-example gradient norms, the trace of the Fisher, and inner products of gradients, none of it materialised.

One forward, one backward to the outputs of the layers, and a formula per layer (``engine/layers``): the cost of a
plain forward and backward, and no array of examples x parameters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastfisher.checks import check_flags, is_count, is_number
from fastfisher.data import Batches, paired, split
from fastfisher.distributed.ranks import Ranks, digest, measuring_together, shared_by
from fastfisher.engine.capture import Capture, Part
from fastfisher.engine.completeness import verified_capture
from fastfisher.engine.layers import GRAM_ELEMENTS, Layer, chunks, computing, dots, flat_rows, squares
from fastfisher.engine.one_by_one import Gradients, Reduce, gradients_of_each
from fastfisher.engine.rollback import undoing
from fastfisher.labels import KINDS, LabelName, Labels, Rows, labels_of
from fastfisher.likelihoods import CATEGORICAL, CallersLoss, EachLoss, Likelihood
from fastfisher.measure.estimate import TraceEstimate
from fastfisher.memory import BATCH, held, may_double
from fastfisher.model import (
    Call,
    Inputs,
    check_class_dim,
    check_examples,
    chosen_names,
    differentiable,
    eval_mode,
    map_inputs,
    trainable_parameters,
)
from fastfisher.ops.sampled import new_key
from fastfisher.placement import placement_of, whole
from fastfisher.slow_path import warn_slow_path

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Seen = dict[int, tuple[Tensor, Tensor]]


# ---- the public functions --------------------------------------------------------------------------------------------


@undoing
def per_example_grad_norms(
    model: nn.Module,
    inputs: Inputs,
    targets: Tensor | None = None,
    *,
    labels: LabelName | Tensor = "sampled",
    draws: int = 1,
    squared: bool = True,
    params: Iterable[Tensor] | None = None,
    loss: EachLoss | None = None,
    generator: torch.Generator | None = None,
    class_dim: int | None = None,
    verify: bool = True,
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
            position; "uniform" draws from all classes alike; "true" takes the targets; a tensor is used as the targets.
        draws: how many independent draws, with one forward in common.
        squared: False for the norms themselves.
        params: the parameters whose gradient is meant; all trainable ones otherwise.
        loss: instead of the cross-entropy, a function of (logits, targets) that returns one loss per example (N,).
            Goes with ``labels="true"``; logits are as the model gives them, and targets may be anything.
        generator: where labels are drawn; torch's default generator otherwise.
        class_dim: which dimension of the logits holds the classes; by default the last, but where logits have four
            dimensions or more, or targets fit another one, it has to be said.
        verify: compare the first capture of a model and kind of batch with its ordinary gradient: three forwards and
            backwards, once.

    Returns:
        float64 (N,), or (draws, N) for more than one draw.

    Raises:
        ValueError: an argument is none of the above, or the per-example gradients do not add up to the ordinary one; it
            is named.
        NotImplementedError: the model recomputes layers with reentrant checkpointing.
        TypeError: the model, the inputs or the data are of a type that cannot be one.
    """
    check_flags(squared=squared, verify=verify)
    check_class_dim(class_dim)
    _check_draws(draws)
    kind, likelihood = _labels_and_likelihood(labels, loss, class_dim)
    model = placement_of(model).module  # the norms of this process's examples are right in any case
    names = parameter_names(model, params)
    with eval_mode(model):
        inputs, targets = paired(model, inputs, targets, of_loss(class_dim, loss))
        inputs, targets = _savable(inputs, targets)
        kind.check_targets(targets, likelihood)
        capture = _capture(model, inputs, names, verify)
        cotangents = _Cotangents(capture.logits.detach(), kind, likelihood, targets, Keys(generator), inputs.class_dim)
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

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The interval that holds the trace with probability ``level``, by Student's t.

        Norms are positive, and a few of them are large: those of few examples mostly have a mean that is too low. So
        the upper end is that of the interval of log Tr(F), value·exp(t·standard_error/value), and the lower end, which
        is at least 0, value − t·standard_error.
        """
        reach = self._reach(level)
        if not reach or not self.value > 0:
            return self.value - reach, self.value + reach
        ratio = reach / self.value
        return max(0.0, self.value - reach), self.value * math.exp(ratio) if ratio < 700 else math.inf


@undoing
def trace_fisher(
    model: nn.Module,
    data: Any,
    *,
    samples: int | None = None,
    labels: LabelName = "rademacher",
    draws: int = 1,
    batch_size: int | None = None,
    tolerance: float | None = None,
    minibatch: bool = False,
    params: Iterable[Tensor] | None = None,
    generator: torch.Generator | None = None,
    class_dim: int | None = None,
    process_group: ProcessGroup | None = None,
    verify: bool = True,
) -> FisherTrace:
    """Tr(F) = E_x E_ŷ ‖∇_θ ℓ(x, ŷ)‖², ŷ ~ p(y|x): the trace of the Fisher Information Matrix (eq. 2 of the paper).

    One draw costs about a plain forward and backward of the data, "exact" C − 1 backwards. Memory is that of one batch.

    Example:
        >>> print(fastfisher.trace_fisher(model, loader))
        41.3 ± 0.52 (fisher, labels=rademacher; over labels and examples, 5000 examples; 95 %: 40.28 to 42.33)

    The error bar. With more than one draw, or a label that is not drawn, ``standard_error`` is that of the trace over
    the examples given (0 for "exact" and "true"), plus, with ``samples``, that of having taken only some of the data.
    With a single draw the noise of the labels cannot be told from the differences between examples, and the error bar
    is that of the trace over the distribution the examples come from; ``method`` says which. It is NaN for one example.
    ``interval()`` is the confidence interval, which is printed too: of 16 examples or fewer it is much wider than two
    standard errors.

    Args:
        model: as in :func:`per_example_grad_norms`; in eval mode meanwhile.
        data: a batch (a tensor of inputs, a pair (inputs, targets), a mapping with ``labels``) or an iterable of
            batches, such as a DataLoader; see docs/data.md. Batches are moved to the device of the model's parameters.
        samples: at most so many examples: a random choice of a pair's, the first of an iterable's.
        labels: "rademacher" has by far the smallest variance once a network has fitted its data; "sampled", "exact" as
            in :func:`per_example_grad_norms`; "true" gives the empirical Fisher's trace, of the targets in ``data``,
            and "uniform" that of the second moment of gradients at labels drawn from all classes alike.
        draws: how many draws for each example.
        batch_size: how many examples at a time, where ``data`` is no iterable; by default 128, and on a GPU twice as
            many with each batch while memory allows. But for rounding, and for ``minibatch``, the value is the same
            however the data are cut into batches.
        tolerance: go on drawing (at least two draws in all) until standard_error ≤ tolerance·value.
        minibatch: also Tr(F_B), for about a third more.
        params, generator, class_dim: as in :func:`per_example_grad_norms`.
        process_group: the processes that each have a part of the data; by default those of
            ``DistributedDataParallel`` around the model. The b-th batches of all are one batch, that of rank 0 first:
            with its key, any number of processes draw the same labels for it. Each batch takes a message of 88 bytes
            per process, and one for each draw; at the end 16 bytes of each example go to each process. ``samples`` and
            ``batch_size`` are each process's own; ``minibatch`` needs a single one.
        verify: as in :func:`per_example_grad_norms`.

    Returns:
        The estimate over the data of all processes, split by parameter, with the parameters that took a slower way.

    Raises:
        ValueError: an argument is none of the above, or there is no example; it is named.
        TypeError: the model, the inputs or the data are of a type that cannot be one.
        RankFailure: another process raised.
    """
    kind = labels_of(labels, given=False)
    _check_draws(draws)
    check_flags(minibatch=minibatch, verify=verify)
    check_class_dim(class_dim)
    if tolerance is not None and not (is_number(tolerance) and tolerance > 0):
        raise ValueError(f"tolerance: expected a number > 0, got {tolerance!r}")
    ranks, model = whole_model(model, process_group)
    if ranks is not None and minibatch:
        raise ValueError("minibatch: expected False where several processes share the data, got True")
    names = parameter_names(model, params)
    drawn = kind.drawn
    sums = _Sums(names)
    rounds = max(2, draws) if tolerance is not None and drawn else draws if drawn else 1
    device = next(model.parameters()).device
    told = {"labels": labels, "draws": draws, "tolerance": tolerance, "params": digest(names)}
    with measuring_together(ranks, "trace_fisher", model, trainable_parameters(model), **told), eval_mode(model):
        size = BATCH if batch_size is None else batch_size
        batches = Batches(
            model, data, device, class_dim=class_dim, samples=samples, batch_size=size, generator=generator
        )
        growing = batch_size is None and not minibatch and ranks is None
        keys = Keys(generator, ranks)
        while True:
            keys.begin(sums.draws)
            sums.begin(rounds)
            for batch in batches if ranks is None else ranks.aligned(batches):
                if batch is None:  # the others have more: their labels are drawn with what rank 0 tells them
                    for draw in range(rounds if drawn else 0):
                        keys.of(draw, 0, device)
                    continue
                inputs, targets = _savable(*batch)
                before = held(device)
                capture = _capture(model, inputs, names, verify)
                activations = held(device) - before
                cotangents = _Cotangents(capture.logits.detach(), kind, CATEGORICAL, targets, keys, class_dim)
                sums.add(_draws(model, inputs, capture, cotangents, rounds, sums.means if minibatch else None))
                sums.fallbacks.update(capture.fallbacks)
                full = capture.examples == size
                del capture, cotangents  # before the next forward
                if growing and full and not sums.fallbacks and may_double(activations, device):
                    size *= 2
                    batches.batch_size = size
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
        degrees=found.degrees(drawn, fraction),
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
    labels: LabelName = "true",
    params: Iterable[Tensor] | None = None,
    loss: EachLoss | None = None,
    generator: torch.Generator | None = None,
    class_dim: int | None = None,
    verify: bool = True,
) -> GradInnerProducts:
    """Inner products of the gradients of two batches, such as clean and mislabelled examples (figure 12).

    One forward and backward of each batch, whose layer inputs and output gradients are kept until both are there.

    Args:
        model: as in :func:`per_example_grad_norms`; in eval mode meanwhile.
        first, second: batches, as in :func:`trace_fisher`: pairs (inputs, targets).
        labels: "true", or "sampled", "uniform" or "rademacher" for drawn ones (the targets may then be None).
        params, loss, generator, class_dim, verify: as in :func:`per_example_grad_norms`.

    Raises:
        ValueError: an argument is none of the above, or the per-example gradients do not add up to the ordinary one; it
            is named.
        NotImplementedError: the model recomputes layers with reentrant checkpointing.
        TypeError: the model, the inputs or the data are of a type that cannot be one.
    """
    check_class_dim(class_dim)
    kind, likelihood = _labels_and_likelihood(labels, loss, class_dim, ("true", "sampled", "uniform", "rademacher"))
    check_flags(verify=verify)
    model = whole(model, "the inner product of mean gradients")
    names = parameter_names(model, params)
    sides = []
    with eval_mode(model):
        pairs = [
            split(model, batch, of_loss(class_dim, loss), name)
            for name, batch in (("first", first), ("second", second))
        ]
        for _, targets in pairs:
            kind.check_targets(targets, likelihood)
        for inputs, targets in pairs:
            sides.append(one_backward(model, inputs, names, kind, likelihood, targets, generator, verify))
        one, two = sides
        matched = one.capture.examples == two.capture.examples
        per_example = one.inner_products(two) if matched else None
        mean = norm_one = norm_two = 0.0
        totals = [side.totals() for side in sides]
        for name in names:
            g, h = (flat_rows(side[name][None])[0].double() for side in totals)
            g, h = g / one.capture.examples, h / two.capture.examples
            mean += float(g @ h)
            norm_one += float(g @ g)
            norm_two += float(h @ h)
    size = math.sqrt(norm_one * norm_two)
    return GradInnerProducts(per_example, mean, mean / size if size else math.nan)


# ---- arguments ----------------------------------------------------------------------------------------------


def _labels_and_likelihood(
    labels: Any, loss: EachLoss | None, class_dim: int | None, names: Sequence[str] = tuple(KINDS)
) -> tuple[Labels, Likelihood]:
    """What two arguments of that name mean.

    Raises:
        ValueError: they mean nothing, or do not go together.
    """
    kind = labels_of(labels, names)
    if not (loss is None or callable(loss)):
        raise ValueError(f"loss: expected a function or None, got {type(loss).__name__}")
    if loss is not None and kind.name != "true":
        raise ValueError(f'loss: expected None with labels={labels!r}, which are drawn; a loss goes with labels="true"')
    return kind, CATEGORICAL if loss is None else CallersLoss(loss, class_dim)


def _check_draws(draws: int) -> None:
    if not is_count(draws):
        raise ValueError(f"draws: expected an integer >= 1, got {draws!r}")


def parameter_names(model: nn.Module, params: Iterable[Tensor] | None) -> list[str]:
    """The chosen parameters in the model's order: that of a set differs between processes, and so would rounding."""
    trainable = trainable_parameters(model)
    chosen = chosen_names(trainable, params)
    return [name for name in trainable if name in chosen]


def of_loss(class_dim: int | None, loss: EachLoss | None) -> int | None:
    """What is said of the classes; a loss of the caller's decides itself what the dimensions of its logits are."""
    return -1 if class_dim is None and loss is not None else class_dim


def _savable(inputs: Call, targets: Any) -> tuple[Call, Any]:
    """A batch that autograd may save, also where it was made in inference mode."""
    return map_inputs(inputs, differentiable), differentiable(targets) if isinstance(targets, Tensor) else targets


def _capture(model: nn.Module, inputs: Call, names: Iterable[str], verify: bool) -> Capture:
    check_examples(inputs)
    capture = (verified_capture if verify else Capture)(model, inputs, names)
    logits = capture.logits
    if logits.dim() < 2 or len(logits) != capture.examples:
        raise ValueError(
            f"model: expected logits (N, ..., C) for N = {capture.examples} examples, got shape {tuple(logits.shape)}"
        )
    return capture


def _tell_fallbacks(capture: Capture) -> None:
    """Says which parameters go a slower way; known for certain after a backward.

    Raises:
        ValueError: they cannot, because the forward draws random numbers.
    """
    if capture.told or not capture.fallbacks:
        return
    capture.told = True
    capture.check_repeatable()
    for reason in dict.fromkeys(capture.fallbacks.values()):
        slow = ", ".join(name for name, why in capture.fallbacks.items() if why == reason)
        warn_slow_path(f"per-example gradients of {slow} take a backward for each example: {reason}")


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


class Keys:
    """The keys that labels are drawn with: one in all, whose offset counts the draws, while the rows of logits are
    counted through all batches. The same labels are drawn however the data are cut into batches.

    Of several processes the key is that of rank 0, and the rows of each batch are those of rank 0 first.
    """

    def __init__(self, generator: torch.Generator | None, ranks: Ranks | None = None) -> None:
        self.generator, self.ranks = generator, ranks
        self.key: Tensor | None = None
        self.drawn = self.done = self.rows = 0

    def begin(self, drawn: int) -> None:
        """A pass over the data is to come, after so many draws of each example."""
        self.drawn, self.done, self.rows = drawn, 0, 0

    def of(self, draw: int, rows: int, device: torch.device) -> tuple[Tensor, int]:
        """The key for one draw of a batch of so many rows, and the number of its first row."""
        if self.key is None:
            self.key = new_key(self.generator, device)
        if draw == 0:  # of the next batch
            self.done += self.rows
        key, first, self.rows = self.key.clone(), 0, rows
        if self.ranks is not None:
            key, first, self.rows = self.ranks.share_key(key, rows)
        key[1] += self.drawn + draw
        return key, self.done + first


def _zeros(capture: Capture) -> Tensor:
    return torch.zeros(capture.examples, dtype=torch.float64, device=capture.logits.device)


# ---- the gradients of the loss in the logits -------------------------------------------------------------------------


class _Cotangents:
    """∂ℓ/∂logits for each draw of the labels; with "exact", several whose squared norms add up."""

    def __init__(
        self, logits: Tensor, labels: Labels, likelihood: Likelihood, targets: Any, keys: Keys, class_dim: int | None
    ) -> None:
        likelihood.check(logits)
        if targets is not None:
            targets = likelihood.fit(logits, targets, class_dim=class_dim)
        if labels.of_model:
            likelihood.check_drawable(logits)
        self.labels = labels.fitted(likelihood, logits, class_dim=class_dim)
        labels.check_targets(targets, likelihood)
        self.rows, self.keys, self.draws = Rows(likelihood, logits, targets), keys, 0
        self.count = self.labels.cotangent_count(likelihood, logits)

    def draw(self) -> Iterator[Tensor]:
        """The cotangents of one draw."""
        rows = self.rows
        if self.labels.drawn:
            count = rows.likelihood.shape_of_labels(rows.output).numel()
            key, first = self.keys.of(self.draws, count, rows.output.device)
            rows, self.draws = dataclasses.replace(rows, key=key, first=first), self.draws + 1
        return self.labels.cotangents(rows)


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
    exact = cotangents.labels.name == "exact"
    for draw in range(draws):
        total: dict[str, Tensor] = {}
        squared_mean = 0.0
        for index, cotangent in enumerate(cotangents.draw()):
            last = draw == draws - 1 and index == cotangents.count - 1
            with_mean = means is not None and not exact
            norms, mean = _squared_norms(model, inputs, capture, cotangent, not last, with_mean)
            squared_mean += mean
            for name, values in norms.items():
                total[name] = total[name] + values if name in total else values
        if means is not None:
            if exact:  # labels are independent and their gradients have mean 0
                squared_mean = sum(float(values.sum()) for values in total.values()) / capture.examples**2
            means.append(squared_mean)
        yield total


def _squared_norms(
    model: nn.Module, inputs: Call, capture: Capture, cotangent: Tensor, retain_graph: bool, with_mean: bool
) -> tuple[dict[str, Tensor], float]:
    """One backward: squared norms by parameter, each taken when its layer's gradient arrives; and ‖mean gradient‖².

    What the layers of parameters with several uses saw is kept until all are there.
    """
    direct: dict[int, list[tuple[str, str]]] = {}
    held: set[int] = set()
    for name, groups in capture.apart.items():
        for group in groups:
            if len(group) == 1:
                direct.setdefault(id(group[0].layer), []).append((group[0].slot, name))
            else:
                held.update(id(part.layer) for part in group)
    held.update(id(part.layer) for groups in capture.joint.values() for group in groups for part in group)
    norms = {name: _zeros(capture) for name in capture.parameters}
    kept: Seen = {}
    squared_totals = dict.fromkeys(capture.parameters, 0.0)

    def note(layer: Layer, slot: str, name: str, found: Tensor, a: Tensor, d: Tensor) -> None:
        norms[name] += found
        if with_mean:
            squared_totals[name] += float(squares(layer.total(slot, a, d)[None]))

    def receive(layer: Layer, grad: Tensor) -> None:
        if id(layer) not in direct and id(layer) not in held:
            return
        a, d = layer.seen(grad)
        slots = direct.get(id(layer), [])
        found = layer.squared_norms([slot for slot, _ in slots], a, d)
        for slot, name in slots:
            note(layer, slot, name, found[slot], a, d)
        if id(layer) in held:
            kept[id(layer)] = (a, d)

    capture.backward(cotangent, receive, retain_graph=retain_graph)
    _tell_fallbacks(capture)
    side = Side(model, inputs, capture, cotangent, kept)
    for name, groups in capture.apart.items():
        for use in side.uses([group for group in groups if len(group) > 1]):
            found = use.layer.squared_norms([use.slot], use.a, use.d)[use.slot]
            note(use.layer, use.slot, name, found, use.a, use.d)
    totals: dict[str, Tensor] = {}

    def reduced(gradients: Gradients) -> Gradients:
        if with_mean:
            for name, g in gradients.items():
                totals[name] = totals.get(name, 0) + g.sum(0)
        if len(next(iter(gradients.values()))) > 1:
            return {name: squares(g) for name, g in gradients.items()}
        each = torch._foreach_norm([flat_rows(computing(g)) for g in gradients.values()])
        return {name: norm.double().square()[None] for name, norm in zip(gradients, each, strict=True)}

    for rows, squared in side.made(reduced=reduced):
        for name, values in squared.items():
            norms[name][rows] = values
    squared_totals |= {name: float(squares(total[None])) for name, total in totals.items()}
    return norms, sum(squared_totals.values()) / capture.examples**2


def one_backward(
    model: nn.Module,
    inputs: Call,
    names: Iterable[str],
    labels: Labels,
    likelihood: Likelihood,
    targets: Any,
    generator: torch.Generator | None = None,
    verify: bool = True,
) -> Side:
    """A capture, one backward of it, and what its layers saw there; the model is in eval mode."""
    inputs, targets = _savable(inputs, targets)
    capture = _capture(model, inputs, names, verify)
    cotangents = _Cotangents(capture.logits.detach(), labels, likelihood, targets, Keys(generator), inputs.class_dim)
    (cotangent,) = cotangents.draw()
    kept: Seen = {}

    def keep(layer: Layer, grad: Tensor) -> None:
        kept[id(layer)] = layer.seen(grad)

    capture.backward(cotangent, keep)
    _tell_fallbacks(capture)
    return Side(model, inputs, capture, cotangent, kept)


@dataclass
class Use:
    """One use of a parameter, or several that one formula serves together, and what its layer saw."""

    layer: Layer
    slot: str
    tensor: Tensor
    a: Tensor
    d: Tensor


@dataclass
class Side:
    """A capture with what its layers saw in one backward; gradients are made a chunk of examples at a time."""

    model: nn.Module
    inputs: Call
    capture: Capture
    cotangent: Tensor
    seen: Seen

    def uses(self, groups: list[list[Part]]) -> Iterator[Use]:
        """Those of which a gradient came."""
        for group in groups:
            came = [part for part in group if id(part.layer) in self.seen]
            if came:
                a, d = zip(*(self.seen[id(part.layer)] for part in came), strict=True)
                first = came[0]
                both = (a[0], d[0]) if len(came) == 1 else (torch.cat(a, 1), torch.cat(d, 1))
                yield Use(first.layer, first.slot, first.tensor, *both)

    def inner_products(self, other: Side) -> Tensor:
        """⟨g_i, h_i⟩, float64[N]."""
        total = _zeros(self.capture)
        alike, rest = self._alike(other)
        for mine, theirs in alike:
            total += mine.layer.inner_products(mine.slot, mine.a, mine.d, theirs.a, theirs.d)
        for (rows, g), (_, h) in zip(self.made(rest), other.made(rest), strict=True):
            for name in g:
                total[rows] += dots(g[name], h[name])
        return total

    def gram(self, other: Side) -> Tensor:
        """⟨g_i, h_j⟩ for all pairs of examples, float64[N, M]."""
        total = self.cotangent.new_zeros(self.capture.examples, other.capture.examples, dtype=torch.float64)
        alike, rest = self._alike(other)
        for mine, theirs in alike:
            total += mine.layer.gram(mine.slot, mine.a, mine.d, theirs.a, theirs.d)
        for rows, g in self.made(rest, GRAM_ELEMENTS):
            for columns, h in other.made(rest, GRAM_ELEMENTS):
                for name in g:
                    if name in h:
                        total[rows, columns] += flat_rows(g[name]).double() @ flat_rows(h[name]).double().mT
        return total

    def totals(self) -> dict[str, Tensor]:
        """The summed gradient of each parameter."""
        found = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.capture.parameters.items()}
        for name, groups in (self.capture.apart | self.capture.joint).items():
            for use in self.uses(groups):
                total = use.layer.total(use.slot, use.a, use.d)
                found[name] += _pull_back(use.tensor, self.capture.parameters[name], total[None])[0]
        for _, gradients in self._each(self.capture.fallbacks):
            for name, g in gradients.items():
                found[name] += g.sum(0)
        return found

    def made(
        self, names: Iterable[str] | None = None, limit: int | None = None, reduced: Reduce | None = None
    ) -> Iterator[tuple[slice, Gradients]]:
        """The gradients of parameters whose parts overlap or that have no formula, some parameters after the other.

        Args:
            names: of which parameters instead.
            limit: how many elements a chunk may have.
            reduced: what to make of each chunk.
        """
        wanted = {*self.capture.joint, *self.capture.fallbacks} if names is None else set(names)
        for name in self.capture.parameters:
            if name in wanted and name not in self.capture.fallbacks:
                leaf = self.capture.parameters[name]
                groups = self.capture.apart.get(name) or self.capture.joint.get(name) or []
                for rows in chunks(self.capture.examples, leaf.numel(), limit):
                    shape = (rows.stop - rows.start, *leaf.shape)
                    total = torch.zeros(shape, dtype=leaf.dtype, device=leaf.device)
                    for use in self.uses(groups):
                        g = use.layer.gradients(use.slot, use.a[rows], use.d[rows])
                        total += _pull_back(use.tensor, leaf, g)
                    yield rows, {name: total} if reduced is None else reduced({name: total})
        yield from self._each([name for name in self.capture.fallbacks if name in wanted], limit, reduced)

    def _each(
        self, names: Iterable[str], limit: int | None = None, reduced: Reduce | None = None
    ) -> Iterator[tuple[slice, Gradients]]:
        names = list(names)
        if not names:
            return
        parameters, start = self.capture.parameters, 0
        for found in gradients_of_each(self.model, self.inputs, parameters, names, self.cotangent, limit, reduced):
            count = len(found[names[0]])
            yield slice(start, start + count), found
            start += count

    def _alike(self, other: Side) -> tuple[list[tuple[Use, Use]], list[str]]:
        """Pairs of uses whose inner products add up, and the parameters whose gradients have to be made."""
        pairs: list[tuple[Use, Use]] = []
        rest = []
        for name in self.capture.parameters:
            mine, theirs = self.capture.apart.get(name), other.capture.apart.get(name)
            if mine is None or theirs is None or [_place(g) for g in mine] != [_place(g) for g in theirs]:
                rest.append(name)
                continue
            for one, two in zip(mine, theirs, strict=True):
                pairs += zip(self.uses([one]), other.uses([two]), strict=False)
        return pairs, rest


def _place(group: list[Part]) -> tuple[Any, ...]:
    """Which formula serves for which elements of a parameter."""
    part = group[0]
    return type(part.layer), part.slot, part.tensor.storage_offset(), part.tensor.shape, part.tensor.stride()


def _pull_back(tensor: Tensor, leaf: Tensor, gradients: Tensor) -> Tensor:
    """Gradients in a function of parameters, pulled back to one of them."""
    if tensor is leaf:
        return gradients
    gradients = gradients.to(tensor.dtype)

    def pull(gradient: Tensor, batched: bool) -> Tensor:
        (found,) = torch.autograd.grad(
            tensor, leaf, gradient, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
        return gradient.new_zeros(len(gradient), *leaf.shape) if batched and found is None else found

    if len(gradients) > 1:
        try:
            return pull(gradients, True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # a function that vmap does not know
            pass
    pulled = [pull(gradient, False) for gradient in gradients]
    return torch.stack([torch.zeros_like(leaf, requires_grad=False) if g is None else g for g in pulled])


class _Sums:
    """What :func:`trace_fisher` adds up: for each example the sum and the sum of squares over its draws."""

    def __init__(self, names: Iterable[str]) -> None:
        self.first: list[Tensor] = []
        self.second: list[Tensor] = []
        self.parameters = dict.fromkeys(names, 0.0)
        self.fallbacks: dict[str, str] = {}
        self.means: list[float] = []
        self.draws = 0
        self.again = False
        self.done = 0

    def begin(self, draws: int) -> None:
        """A pass over the data with so many draws is to come."""
        self.draws += draws
        self.again, self.done = bool(self.first), 0
        if self.again:  # batches may be others than those of the first pass
            self.first, self.second = [torch.cat(self.first)], [torch.cat(self.second)]

    def add(self, draws: Iterable[dict[str, Tensor]]) -> None:
        """The norms of one batch."""
        rows: list[Tensor] = []
        for norms in draws:
            for name, values in norms.items():
                self.parameters[name] += float(values.sum())
            total = torch.stack(list(norms.values())).sum(0)
            rows = rows or self._rows(total)
            rows[0].add_(total)
            rows[1].add_(total.square())
        self.done += len(rows[0])

    def _rows(self, like: Tensor) -> list[Tensor]:
        """Where the sums of the next examples are."""
        if self.again:
            return [part[0][self.done : self.done + len(like)] for part in (self.first, self.second)]
        self.first.append(torch.zeros_like(like))
        self.second.append(torch.zeros_like(like))
        return [self.first[-1], self.second[-1]]

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

    def degrees(self, drawn: bool, fraction: float) -> float:
        """The degrees of freedom of :meth:`standard_error`, by Satterthwaite's rule where the noise of labels differs.

        Of n examples with d draws each, n (d − 1) where all are as noisy, fewer where a few have most of the noise.
        """
        if not drawn and fraction == 1.0:
            return math.inf
        between = float(self.examples - 1)
        if not drawn or self.draws == 1:
            return between
        noise = self._noise()
        total = float(noise.sum())
        within = (self.draws - 1) * total**2 / float(noise.square().sum()) if total else math.inf
        return within if fraction == 1.0 else min(within, between)

    def _noise(self) -> Tensor:
        """The variance of the draws of each example."""
        mean = torch.cat(self.first) / self.draws
        return ((torch.cat(self.second) - self.draws * mean.square()) / (self.draws - 1)).clamp(min=0)

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
            within = float(self._noise().mean()) / self.draws
        if fraction == 1.0:
            return math.sqrt(within / len(mean))
        return math.sqrt(((1 - fraction) * between + fraction * within) / len(mean))

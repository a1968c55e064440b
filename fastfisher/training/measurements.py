"""What is measured on the way. Nothing here moves the parameters, the buffers or PyTorch's global generators.

A measurement takes the model, the examples and a generator, and returns a record: its numbers by name. What is
estimated has its ``_standard_error`` beside it, None where there are too few examples for one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfisher import (
    TraceEstimate,
    gradient_covariance,
    per_example_grad_norms,
    top_eigenvalues,
    trace_fisher,
    trace_hessian,
)
from fastfisher.model import eval_mode, trainable_parameters
from fastfisher.training.data import Data, Images

Record = dict[str, float | int | str | None]

BATCH_SIZE = 128  # memory is that of a batch, however many examples there are

VERIFY = False
"""The networks are those of :mod:`fastfisher.training.networks`, and the tests verify each of them: no run has to."""

# How the record is printed; its other numbers are in the files.
TITLES = {
    "trace_fisher": "Tr(F)",
    "trace_hessian": "Tr(H)",
    "squared_grad_norm_clean": "‖∇ℓ‖² clean",
    "squared_grad_norm_noisy": "noisy",
    "grad_norm_auc": "AUC",
    "top_eigenvalue": "λ¹(H)",
    "gradient_covariance_trace": "Tr(K)",
    "gradient_covariance_largest": "λ¹(K)",
    "gradient_covariance_smallest": "λ*(K)",
    "gradient_norm_clean": "‖g_c‖",
    "gradient_norm_noisy": "‖g_n‖",
    "noisy_clean_cosine": "cos(g_n, g_c)",
    "trace_fisher_batch": "Tr(F_B)",
    "minibatch_covariance_trace": "Tr(K_B)",
    "minibatch_covariance_largest": "λ¹(K_B)",
    "minibatch_covariance_smallest": "λ*(K_B)",
    "measured_accuracy": "measured accuracy",
    "measured_loss": "loss",
}


# Followed by one of --trace-thresholds: Tr(F) when the loss was first below it.
BELOW = "trace_fisher_below_"


@dataclass(frozen=True)
class Examples:
    """Training examples: inputs ``[N, ...]``, the labels they are trained on, and which of these are noise (bool).

    ``batch_size`` is how many of them a training step takes.
    """

    inputs: Tensor
    labels: Tensor
    noisy: Tensor
    batch_size: int


def predict(model: nn.Module, inputs: Images, *, chunk: int = BATCH_SIZE) -> Tensor:
    """Return the most likely class of each of ``N >= 1`` inputs, int64 ``[N]``, in eval mode."""
    return _of_logits(model, inputs, chunk, lambda logits: logits.argmax(dim=1))


def predict_probabilities(model: nn.Module, inputs: Images, *, chunk: int = BATCH_SIZE) -> Tensor:
    """Return p(y|x) = softmax(logits) of each of ``N >= 1`` inputs, float16 ``[N, classes]``, in eval mode."""
    return _of_logits(model, inputs, chunk, lambda logits: logits.softmax(dim=1).half())


def _of_logits(model: nn.Module, inputs: Images, chunk: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    parts = (inputs[start : start + chunk] for start in range(0, len(inputs), chunk))
    with eval_mode(model), torch.no_grad():
        return torch.cat([function(model(part)) for part in parts])


@contextmanager
def averaged_batch_statistics(model: nn.Module, batches: Iterable[Tensor]) -> Iterator[None]:
    """Let batch normalisation use, while this lasts, the averages of its statistics over the inputs in ``batches``.

    For testing, as in the paper (I.2): running statistics weigh the last few batches most, each with the parameters
    before its step. They are put back afterwards, where they were in memory. ``batches`` must not be empty.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    saved = [(layer.momentum, {name: buffer.clone() for name, buffer in layer.named_buffers()}) for layer in layers]
    try:
        with eval_mode(model), torch.no_grad():
            for layer in layers:
                layer.train()
                layer.reset_running_stats()
                layer.momentum = None  # the mean over all batches
            for inputs in batches:
                model(inputs)
        yield
    finally:
        for layer, (momentum, buffers) in zip(layers, saved, strict=True):
            layer.momentum = momentum
            for name, buffer in layer.named_buffers():
                buffer.copy_(buffers[name])


ACCURACIES = (
    "train_accuracy", "clean_accuracy", "noisy_accuracy", "noisy_true_accuracy", "validation_accuracy", "test_accuracy",
)  # fmt: skip


def accuracies(model: nn.Module, data: Data) -> dict[str, float | None]:
    """Return the fraction of right predictions on every part of the data, in eval mode, without augmentation.

    ``train_accuracy``: training examples, against the labels they are trained on. ``clean_accuracy``: those whose label
    was kept. ``noisy_accuracy``: those whose
    label was replaced, against the replaced label they are trained on: memorisation (Figure 5).
    ``noisy_true_accuracy``: the same examples against the label they had before. None where there are none.
    """
    predictions = predict(model, data.inputs)

    def of_part(inputs: Images, labels: Tensor) -> float | None:
        return share(predict(model, inputs) == labels) if len(labels) else None

    def share(right: Tensor) -> float | None:
        return right.double().mean().item() if len(right) else None

    noisy = data.noisy
    values = (
        share(predictions == data.labels),
        share((predictions == data.labels)[~noisy]),
        share((predictions == data.labels)[noisy]),
        share((predictions == data.true_labels)[noisy]),
        of_part(data.validation_inputs, data.validation_labels),
        of_part(data.test_inputs, data.test_labels),
    )
    return dict(zip(ACCURACIES, values, strict=True))


def measure_trace_fisher(model: nn.Module, examples: Examples, generator: torch.Generator) -> Record:
    """Return ``trace_fisher``: Tr(F), by one Rademacher cotangent for each example.

    Its standard error is that of the trace over the whole training distribution.
    """
    estimate = trace_fisher(model, examples.inputs, batch_size=BATCH_SIZE, verify=VERIFY, generator=generator)
    return _record("trace_fisher", estimate)


def measure_trace_hessian(model: nn.Module, examples: Examples, generator: torch.Generator) -> Record:
    """Return ``trace_hessian``: Tr(H) of the mean loss of the examples, with the labels they are trained on.

    By ``trace_hessian_method``. Its standard error is over what that draws, for the examples given: 0 for Tr(F) over
    all labels, which is what serves for the networks here.
    """
    estimate = trace_hessian(model, examples.inputs, examples.labels, batch_size=BATCH_SIZE, generator=generator)
    return _record("trace_hessian", estimate)


def _record(name: str, estimate: TraceEstimate) -> Record:
    error = estimate.standard_error
    return {
        name: estimate.value,
        f"{name}_standard_error": error if math.isfinite(error) else None,
        f"{name}_method": estimate.method,
    }


def measure_grad_norms(model: nn.Module, examples: Examples, generator: torch.Generator) -> Record:
    """Return the per-example ‖∇ℓ(x_i, y_i)‖² with the labels trained on, of clean and of noisy examples apart.

    ``squared_grad_norm_clean`` and ``squared_grad_norm_noisy`` are means, ``grad_norm_auc`` is the probability that a
    noisy example has the larger norm of the two, see :func:`area_under_curve`; None where there are no such examples.
    A replaced label may be the true one by chance, so of C classes at least 1/C of the noisy examples look clean.
    """
    parts = zip(torch.split(examples.inputs, BATCH_SIZE), torch.split(examples.labels, BATCH_SIZE), strict=True)
    norms = torch.cat([per_example_grad_norms(model, inputs, labels=labels, verify=VERIFY) for inputs, labels in parts])
    clean, noisy = norms[~examples.noisy], norms[examples.noisy]
    record: Record = {}
    for name, (value, error) in {
        "squared_grad_norm_clean": _mean(clean),
        "squared_grad_norm_noisy": _mean(noisy),
        "grad_norm_auc": area_under_curve(noisy, clean),
    }.items():
        record |= {name: value, f"{name}_standard_error": error}
    return record


def measure_top_eigenvalue(model: nn.Module, examples: Examples, generator: torch.Generator) -> Record:
    """Return ``top_eigenvalue``, the largest of the Hessian of the examples' mean loss, and its ``_error_bound``."""
    found = top_eigenvalues(model, examples.inputs, examples.labels, batch_size=BATCH_SIZE, generator=generator)
    return {"top_eigenvalue": found.values[0], "top_eigenvalue_error_bound": found.error_bounds[0]}


def measure_gradient_covariance(model: nn.Module, examples: Examples, generator: torch.Generator) -> Record:
    """Return trace, largest and smallest non-zero eigenvalue of the covariance of the examples' gradients.

    ``gradient_covariance_smallest`` is None where there is none, as for a single example.
    """
    found = gradient_covariance(model, (examples.inputs, examples.labels), verify=VERIFY, generator=generator)
    return {
        "gradient_covariance_trace": found.trace,
        "gradient_covariance_largest": found.largest,
        "gradient_covariance_smallest": found.smallest_nonzero if found.eigenvalues else None,
    }


def measure_noisy_gradients(model: nn.Module, examples: Examples, generator: torch.Generator) -> Record:
    """Return norms and angle of the mean gradients g_c of the clean and g_n of the noisy examples (figures 5, 11, 12).

    g = (1/n) Σ_i ∂ℓ(x_i, y_i)/∂θ over the n examples of the group, with the labels trained on. ``gradient_norm_clean``
    is ‖g_c‖, ``gradient_norm_noisy`` ‖g_n‖, ``noisy_clean_cosine`` ⟨g_n, g_c⟩/(‖g_n‖‖g_c‖). None where a group is
    empty; the cosine also where a gradient is 0.
    """
    clean, noisy = (_mean_gradient(model, examples, group) for group in (~examples.noisy, examples.noisy))

    def inner_product(first: list[Tensor], second: list[Tensor]) -> float:
        return sum(float(a.double().flatten() @ b.double().flatten()) for a, b in zip(first, second, strict=True))

    norms = [None if each is None else math.sqrt(inner_product(each, each)) for each in (clean, noisy)]
    cosine = None
    if clean is not None and noisy is not None and all(norm != 0 for norm in norms):
        cosine = inner_product(noisy, clean) / math.prod(norm for norm in norms if norm is not None)
    return {"gradient_norm_clean": norms[0], "gradient_norm_noisy": norms[1], "noisy_clean_cosine": cosine}


def _mean_gradient(model: nn.Module, examples: Examples, group: Tensor) -> list[Tensor] | None:
    """Return the gradient of the group's mean loss in each parameter; None for an empty group."""
    inputs, labels = examples.inputs[group], examples.labels[group]
    if not len(labels):
        return None
    parameters = list(trainable_parameters(model).values())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    with eval_mode(model):
        for part, part_labels in zip(torch.split(inputs, BATCH_SIZE), torch.split(labels, BATCH_SIZE), strict=True):
            loss = F.cross_entropy(model(part), part_labels, reduction="sum") / len(labels)
            for summed, gradient in zip(total, torch.autograd.grad(loss, parameters), strict=True):
                summed += gradient
    return total


def measure_trace_fisher_batch(model: nn.Module, examples: Examples, generator: torch.Generator) -> Record:
    """Return ``trace_fisher_batch``: Tr(F_B) = ‖(1/B) Σ_i g(x_i, ŷ_i)‖², ŷ_i drawn from the model (figures 15 and 21).

    Of the first B = ``batch_size`` examples, or of all if they are fewer: what FP penalises (supplement C).
    """
    size = min(examples.batch_size, len(examples.labels))
    inputs = examples.inputs[:size]
    found = trace_fisher(
        model, inputs, labels="sampled", batch_size=size, minibatch=True, verify=VERIFY, generator=generator
    )
    return {"trace_fisher_batch": found.minibatch}


def measure_minibatch_covariance(model: nn.Module, examples: Examples, generator: torch.Generator) -> Record:
    """Return trace, largest and smallest non-zero eigenvalue of the covariance of mini-batches' gradients (the talk).

    The mini-batches are the ``batch_size`` examples each into which the examples are cut; an incomplete last one is
    dropped. All three are None for fewer than two, the smallest also where the gradients do not differ.
    """
    names = [f"minibatch_covariance_{each}" for each in ("trace", "largest", "smallest")]
    if len(examples.labels) < 2 * examples.batch_size:
        return dict.fromkeys(names)
    found = gradient_covariance(
        model, (examples.inputs, examples.labels), batch_size=examples.batch_size, verify=VERIFY, generator=generator
    )
    smallest = found.smallest_nonzero if found.eigenvalues else None
    return dict(zip(names, (found.trace, found.largest, smallest), strict=True))


def measure_accuracy(model: nn.Module, examples: Examples, generator: torch.Generator) -> Record:
    """Return ``measured_accuracy`` and ``measured_loss``, with the labels trained on (figures 18 and 19).

    The fraction of right predictions and the mean cross-entropy.
    """
    right, loss = 0, 0.0
    with eval_mode(model), torch.no_grad():
        parts = zip(torch.split(examples.inputs, BATCH_SIZE), torch.split(examples.labels, BATCH_SIZE), strict=True)
        for inputs, labels in parts:
            logits = model(inputs)
            right += int((logits.argmax(dim=1) == labels).sum())
            loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
    count = len(examples.labels)
    return {"measured_accuracy": right / count, "measured_loss": loss / count}


def _mean(values: Tensor) -> tuple[float | None, float | None]:
    """Return the mean and its standard error."""
    count = len(values)
    return (values.mean().item() if count else None, values.std().item() / math.sqrt(count) if count > 1 else None)


def area_under_curve(positive: Tensor, negative: Tensor) -> tuple[float | None, float | None]:
    """Return the area under the ROC curve of a score, P(positive > negative) + P(positive = negative)/2, and its error.

    0.5: the score tells nothing; 1: every positive example is above every negative one. The standard error is that of
    DeLong, DeLong and Clarke-Pearson (1988), 0 where the area is 0 or 1. None where there is nothing to take it from.
    """
    if not (len(positive) and len(negative)):
        return None, None

    def share_below(values: Tensor, others: Tensor) -> Tensor:
        """For each value the share of the others below it, of which equals count half."""
        others = others.sort().values
        counts = torch.searchsorted(others, values) + torch.searchsorted(others, values, right=True)
        return counts.double() / (2 * len(others))

    of_positive, of_negative = share_below(positive, negative), share_below(negative, positive)
    area = of_positive.mean().item()
    if min(len(positive), len(negative)) < 2:
        return area, None
    variance = of_positive.var() / len(positive) + of_negative.var() / len(negative)
    return area, math.sqrt(variance.item())


MEASURE: dict[str, Callable[[nn.Module, Examples, torch.Generator], Record]] = {
    "trace_fisher": measure_trace_fisher,
    "trace_hessian": measure_trace_hessian,
    "per_example_grad_norms": measure_grad_norms,
    "top_eigenvalue": measure_top_eigenvalue,
    "gradient_covariance": measure_gradient_covariance,
    "noisy_gradients": measure_noisy_gradients,
    "trace_fisher_batch": measure_trace_fisher_batch,
    "minibatch_covariance": measure_minibatch_covariance,
    "accuracy": measure_accuracy,
}


def describe(record: Record, epochs: int) -> str:
    """Return the line that is printed about a record."""

    def percent(name: str) -> str:
        value = record[name]
        return "-" if value is None else f"{100 * float(value):.1f} %"

    line = f"step {record['step']}"
    seconds = f"{record['measure_seconds']:.2g} s measuring"
    if "epoch" in record:
        line = f"epoch {record['epoch']}/{epochs}  loss {record['train_loss']:.4g}"
        if record["test_accuracy"] is not None:
            line += (
                f"  train clean {percent('clean_accuracy')} noisy {percent('noisy_accuracy')}  "
                f"validation {percent('validation_accuracy')}  test {percent('test_accuracy')}"
            )
        seconds = f"{record['train_seconds']:.3g} s + {seconds}"
    crossed = [name for name in record if name.startswith(BELOW) and not name.endswith("_standard_error")]
    titles = TITLES | {name: f"Tr(F_i) at {name.removeprefix(BELOW)}" for name in crossed}
    for name, title in titles.items():
        if record.get(name) is not None:
            error = record.get(f"{name}_standard_error")
            line += f"  {title} {record[name]:.3g}" + ("" if error is None else f" ± {error:.1g}")
    return f"{line}  {seconds}"

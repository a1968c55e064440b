"""Every module and operator of PyTorch's own lists within a small network: right, or refused by name.

    python -m tests.test_everything [name ...]     # a line for each case; all of them without a name

PyTorch tests itself by two lists, ``module_db`` and ``op_db``. Those that make a float tensor of a float tensor stand
here between two linear layers, and the penalty by each method, the per-example gradient norms and zᵀHz and Tr(H) are
compared with brute force on first derivatives in float64: a loop over examples, and central differences of gradients.
``REFUSED`` lists what is refused, with the reason; a refusal that is not in it, or a wrong value, fails. ``LEFT_OUT``
says where differences of gradients do not tell what is right.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfisher import AccuracyWarning, FisherPenalty, ops, per_example_grad_norms, trace_hessian
from fastfisher.ops.sampled import new_key
from tests.conftest import is_nightly

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES, FEATURES, LOOP = 3, 3, 3
SAMPLE, PARTS = 60, 6
"""How many cases run outside of the nightly tests, and in how many tests, so that several processes share them."""

LARGEST = 400
"""The most elements that an operator may take or make."""

ENOUGH = 6
"""Of the samples of an entry the smallest is taken that has so many elements, or the largest of all."""

_NO_SECOND = "PyTorch has no second derivative of it"
_SECOND = ("double backprop", "hessian")

REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "nn.MultiLabelMarginLoss": (_SECOND, _NO_SECOND),
    "nn.MultiMarginLoss": (_SECOND, _NO_SECOND),
    "nn.functional.multi_margin_loss": (_SECOND, _NO_SECOND),
    "nn.functional.multilabel_margin_loss": (_SECOND, _NO_SECOND),
    "nn.functional.hardsigmoid": (_SECOND, _NO_SECOND),
    "nn.functional.pdist": (_SECOND, _NO_SECOND),
    "cdist": (_SECOND, _NO_SECOND),
    "_segment_reduce lengths": (_SECOND, _NO_SECOND),
    "_segment_reduce offsets": (_SECOND, _NO_SECOND),
    "logcumsumexp": (("hessian",), "PyTorch's second derivative is NaN"),
    "nn.Transformer": (("norms",), "the examples are called one by one and stacked, where they cannot be followed"),
}
"""By name: the checks that refuse it, and why."""

_SYMMETRIC = "made for symmetric matrices: moved off them, its gradient is that of the symmetric part"
_ALL = ("norms", "double backprop", "differences", "hessian")

LEFT_OUT: dict[str, tuple[tuple[str, ...], str]] = {
    **{
        name: (_SECOND, _SYMMETRIC)
        for name in (
            "cholesky", "cholesky_inverse", "linalg.cholesky", "linalg.cholesky_ex", "linalg.eigh", "linalg.eigvalsh",
            "linalg.pinv hermitian",
        )
    },
    **{
        name: (_ALL, "reads memory outside of its argument, that of other examples")
        for name in ("as_strided", "as_strided_copy", "as_strided_scatter")
    },
    "nn.functional.max_unpool1d": (_SECOND, "its sample has an index twice: the gradient is not that of the value"),
    "nn.functional.embedding": (("hessian",), "a padding row has no gradient, but differences move it"),
    "normal": (("hessian",), "draws, and seeds the draws anew in each call"),
    "logcumsumexp": (("double backprop",), "PyTorch's second derivative is NaN"),
}  # fmt: skip
"""By name: the checks that are left out, and why."""

REFUSALS = (ValueError, TypeError, NotImplementedError)


class Net(nn.Module):
    """An operator around the values of its sample, which a linear layer moves, and a linear layer after it.

    ``together``: the operator takes the examples along dimension 0; else it is called once for each.
    """

    def __init__(self, operator: Callable[[Tensor], Any], size: int, features: int, together: bool) -> None:
        super().__init__()
        self.operator, self.together = operator, together
        self.before, self.after = nn.Linear(FEATURES, size), nn.Linear(features, CLASSES)

    def forward(self, x: Tensor, around: Tensor) -> Tensor:
        h = around + 0.1 * self.before(x).view_as(around)
        out = _first(self.operator(h)) if self.together else torch.stack([_first(self.operator(part)) for part in h])
        return self.after(out.reshape(len(x), -1))


@dataclass
class Case:
    name: str
    model: nn.Module
    inputs: tuple[Tensor, Tensor]
    targets: Tensor


def _first(out: Any) -> Any:
    while isinstance(out, (tuple, list)) and out:
        out = out[0]
    return out


# ---- the lists -------------------------------------------------------------------------------------------------------


def names() -> list[str]:
    """The name of each entry of the lists, as they are found by :func:`make`."""
    return [name for name, _ in _entries()]


def make(name: str) -> Case | None:
    """The network around an entry of the lists; None where it makes no float tensor of one."""
    for found, candidates in _entries():
        if found == name:
            torch.manual_seed(0)
            samples = [(operator, sample) for operator, sample in candidates() if sample.numel() <= LARGEST]
            for operator, sample in sorted(samples, key=lambda given: _by_size(given[1])):
                case = _case(name, operator, sample)
                if case is not None:
                    return case
    return None


def _by_size(sample: Tensor) -> tuple[bool, int]:
    small = sample.numel() < ENOUGH
    return small, -sample.numel() if small else sample.numel()


def _entries() -> Iterator[tuple[str, Callable[[], Iterator[tuple[Any, Tensor]]]]]:
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    met: dict[str, int] = {}

    def numbered(name: str) -> str:
        met[name] = met.get(name, 0) + 1
        return name if met[name] == 1 else f"{name} ({met[name]})"

    for entry in module_db:
        yield numbered(entry.name), lambda entry=entry: _of_module(entry)
    for entry in op_db:
        variant = f" {entry.variant_test_name}" if entry.variant_test_name else ""
        yield numbered(f"{entry.name}{variant}"), lambda entry=entry: _of_operator(entry)


def _of_module(entry: Any) -> Iterator[tuple[Any, Tensor]]:
    given = entry.module_inputs_func(entry, device="cpu", dtype=torch.float64, requires_grad=False, training=False)
    for sample in given:
        forward = sample.forward_input
        if forward is None or not forward.args or not isinstance(forward.args[0], Tensor):
            continue
        made = sample.constructor_input
        module = entry.module_cls(*made.args, **made.kwargs).double().eval()
        if forward.args[1:] or forward.kwargs:
            yield _Bound(module, forward.args[1:], forward.kwargs), forward.args[0]
        else:
            yield module, forward.args[0]


def _of_operator(entry: Any) -> Iterator[tuple[Any, Tensor]]:
    if not entry.supports_autograd or torch.float64 not in entry.dtypes:
        return
    for sample in entry.sample_inputs("cpu", torch.float64, requires_grad=False):
        if isinstance(sample.input, Tensor):
            yield _Bound(entry.op, sample.args, sample.kwargs), sample.input


class _Bound(nn.Module):
    """A function with its further arguments, which are constants."""

    def __init__(self, function: Any, args: Any, kwargs: Any) -> None:
        super().__init__()
        self.function, self.args, self.kwargs = function, args, kwargs

    def forward(self, h: Tensor) -> Any:
        return self.function(h, *self.args, **self.kwargs)


def _case(name: str, operator: Any, sample: Tensor) -> Case | None:
    if not (sample.is_floating_point() and sample.layout == torch.strided and sample.numel() > 0):
        return None
    sample = sample.detach().double().clone()
    try:
        out = _first(operator(sample.clone().requires_grad_() * 1.0))
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
        return None  # such as one that wants a leaf
    if not (isinstance(out, Tensor) and out.is_floating_point() and out.requires_grad and 0 < out.numel() <= LARGEST):
        return None
    if out.layout != torch.strided or not bool(out.isfinite().all()) or _is_random(operator, sample):
        return None
    together = isinstance(operator, nn.Module) and not isinstance(operator, _Bound) and sample.dim() > 1
    together = together or (isinstance(operator, _Bound) and sample.dim() > 1)
    together = together and 1 < len(sample) <= 20 and _are_apart(operator, sample, out)
    count = len(sample) if together else LOOP
    around = sample if together else sample + 0.01 * torch.randn(LOOP, *sample.shape, dtype=sample.dtype)
    size = around[0].numel()
    features = out.numel() // (len(out) if together else 1)
    model = Net(operator, size, features, together).double().eval()
    inputs = torch.randn(count, FEATURES, dtype=torch.float64), around
    try:
        logits = model(*inputs)
    except RuntimeError:
        return None
    if not bool(logits.isfinite().all()):
        return None
    return Case(name, model, inputs, torch.arange(count) % CLASSES)


def _is_random(operator: Any, sample: Tensor) -> bool:
    return not torch.equal(_first(operator(sample)), _first(operator(sample)))


def _are_apart(operator: Any, sample: Tensor, out: Tensor) -> bool:
    """Whether dimension 0 has the examples: each alone gives the same."""
    if out.dim() == 0 or len(out) != len(sample):
        return False
    try:
        alone = [_first(operator(sample[i : i + 1])) for i in range(len(sample))]
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    return all(
        a.shape == out[i : i + 1].shape and torch.allclose(a, out[i : i + 1], equal_nan=True)
        for i, a in enumerate(alone)
    )


# ---- brute force -----------------------------------------------------------------------------------------------------


class Truth:
    """What is right, from first derivatives."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.parameters = [p for p in case.model.parameters() if p.requires_grad]

    def loss(self, rows: slice = slice(None)) -> Tensor:
        x, around = self.case.inputs
        return F.cross_entropy(self.case.model(x[rows], around[rows]), self.case.targets[rows])

    def gradient(self, rows: slice = slice(None)) -> Tensor:
        found = torch.autograd.grad(self.loss(rows), self.parameters, allow_unused=True)
        parts = [
            torch.zeros_like(p) if g is None else g.to_dense() for g, p in zip(found, self.parameters, strict=True)
        ]
        return torch.cat([part.reshape(-1) for part in parts])

    def norms(self) -> Tensor:
        return torch.stack([self.gradient(slice(i, i + 1)).square().sum() for i in range(len(self.case.targets))])

    def product(self, z: Tensor, step: float = 1e-5) -> Tensor:
        """Hz, by a central difference of the gradient along z."""
        step = step / max(float(z.norm()), 1e-30)
        up, down = self._at(z, step), self._at(z, -step)
        return (up - down) / (2 * step)

    def _at(self, z: Tensor, step: float) -> Tensor:
        sizes = [p.numel() for p in self.parameters]
        parts = [part.view_as(p) for part, p in zip(z.split(sizes), self.parameters, strict=True)]
        before = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            for p, part in zip(self.parameters, parts, strict=True):
                p.add_(part, alpha=step)
        try:
            return self.gradient()
        finally:
            with torch.no_grad():
                for p, old in zip(self.parameters, before, strict=True):
                    p.copy_(old)

    def trace(self) -> float:
        size = sum(p.numel() for p in self.parameters)
        return sum(float(self.product(row)[i]) for i, row in enumerate(torch.eye(size, dtype=torch.float64)))


def off(found: Any, right: Any, scale: Any = 0.0) -> float:
    """The relative error."""
    found, right = torch.as_tensor(found).double(), torch.as_tensor(right).double()
    size = max(float(right.norm()), float(scale), 1e-12)
    return float((found - right).norm()) / size


# ---- the checks ------------------------------------------------------------------------------------------------------


def check_norms(case: Case, truth: Truth) -> float:
    return off(per_example_grad_norms(case.model, case.inputs, case.targets, labels="true"), truth.norms()) / 1e-8


def check_penalty(case: Case, truth: Truth, **options: Any) -> float:
    g = truth.gradient()
    right = 2 * truth.product(g)
    if off(2 * truth.product(g, 1e-4), right, 1e-3 * g.norm()) > 1e-4:
        return 0.0  # a kink is this near: differences do not tell
    case.model.zero_grad()
    FisherPenalty(case.model, 1.0, every=1, labels="true", **options).backward(case.inputs, case.targets)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in truth.parameters]
    found = torch.cat([part.reshape(-1) for part in parts])
    case.model.zero_grad()
    return off(found - g, right, 1e-3 * g.norm())


def check_double_backprop(case: Case, truth: Truth) -> float:
    return check_penalty(case, truth, method="double_backprop") / 1e-4


def check_differences(case: Case, truth: Truth) -> float:
    return check_penalty(case, truth, method="finite_difference", difference="central") / 2e-2


def check_hessian(case: Case, truth: Truth) -> float:
    """zᵀHz of one probe by each way that there is, and Tr(H) as it comes by default."""
    z = [torch.empty_like(p) for p in truth.parameters]
    ops.perturb(z, [], new_key(torch.Generator().manual_seed(5), torch.device("cpu")), 1.0, "gaussian")
    flat = torch.cat([part.reshape(-1) for part in z])
    image = truth.product(flat)
    right, scale = flat @ image, 1e-2 * image.norm() * flat.norm()
    if off(truth.product(flat, 1e-4), image, 1e-3) > 1e-4:
        return 0.0
    worst = 0.0
    for hvp in ("taylor", "autograd"):
        generator = torch.Generator().manual_seed(5)
        one: Any = trace_hessian(
            case.model, case.inputs, case.targets, method="hutchinson", hvp=hvp, probes=1, generator=generator
        )
        worst = max(worst, off(one.value, right, scale) / 1e-4)
    whole = trace_hessian(case.model, case.inputs, case.targets, probes=50, generator=torch.Generator().manual_seed(1))
    size = sum(p.numel() for p in truth.parameters)
    if size <= 400:
        exact = truth.trace()
        allowed = 5 * whole.standard_error + 1e-4 * max(abs(exact), 1e-2)
        worst = max(worst, abs(whole.value - exact) / allowed)
    return worst


CHECKS: dict[str, Callable[[Case, Truth], float]] = {
    "norms": check_norms,
    "double backprop": check_double_backprop,
    "differences": check_differences,
    "hessian": check_hessian,
}


def outcome(case: Case, check: str) -> str:
    """ "right", "warned", "refused: ...", "WRONG: ..." or "FAILS: ..."."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.manual_seed(0)
        try:
            error = CHECKS[check](case, Truth(case))
        except Exception as raised:
            said = f"{type(raised).__name__}: {str(raised).splitlines()[0] if str(raised) else ''}"
            return f"refused: {said}" if isinstance(raised, REFUSALS) else f"FAILS: {said}"
    if error <= 1:
        return "right"
    if any(issubclass(w.category, AccuracyWarning) for w in seen):
        return "warned"
    return f"WRONG: {error:.3g} times what is allowed"


def verdict(name: str) -> dict[str, str]:
    """What each check said that is neither right nor expected, by check."""
    case = make(name)
    if case is None:
        return {}
    wrong = {}
    expected, _ = REFUSED.get(name, ((), ""))
    left_out, _ = LEFT_OUT.get(name, ((), ""))
    for check in CHECKS.keys() - set(left_out):
        said = outcome(case, check)
        if said.startswith("refused") != (check in expected) or said.startswith(("WRONG", "FAILS")):
            wrong[check] = said
    return wrong


@pytest.mark.parametrize("part", range(PARTS))
def test_right_or_refused(part: int) -> None:
    chosen = names()
    if not is_nightly():
        chosen = random.Random(0).sample(chosen, SAMPLE)
    wrong = {name: said for name in chosen[part::PARTS] if (said := verdict(name))}
    assert not wrong


def main(wanted: list[str]) -> None:
    torch.set_num_threads(1)
    for name in wanted or names():
        case = make(name)
        said = {check: outcome(case, check) for check in CHECKS} if case is not None else {}
        left_out, reason = LEFT_OUT.get(name, ((), ""))
        lines = [f"{check}: {f'left out ({reason})' if check in left_out else said[check]}" for check in said]
        print(f"{name:45s} {'; '.join(lines) or 'no float tensor of one'}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Whether a capture has seen every use of the parameters: it is compared with the ordinary gradient, once.

A use that is not seen would make norms and traces too small in silence. So the first capture of a model and kind of
batch is held against a plain forward and backward of the same batch: the gradients of all examples together, parameter
by parameter, and whether what belongs to an example stays with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastfisher.autocast import autocast_dtype
from fastfisher.capture import Capture, Known, named, random_cotangent
from fastfisher.checkpointing import graph_nodes, refuse_reentrant
from fastfisher.gates import RandomState
from fastfisher.layers import Layer, flat_rows
from fastfisher.model import Inputs, call_model, call_within, input_tensors, known_of, uncompiled
from fastfisher.one_by_one import gradients_of_each

SHAPES = 8
"""How many sizes of batches of the same kind are looked at: more would make batches of any length slow."""


def verified_capture(model: nn.Module, inputs: Inputs, names: Iterable[str]) -> Capture:
    """A capture of the batch, compared with the ordinary gradient where the model has not met a batch of this kind.

    The comparison takes a forward, a backward, and three backwards of the capture.

    Raises:
        ValueError: they differ; the parameters are named.
    """
    names = list(names)
    tensors = input_tensors(inputs)
    device = tensors[0].device.type
    autocast = autocast_dtype(device)
    precisions = tuple(p.dtype for p in model.parameters())
    kind = "capture", tuple(names), precisions, autocast, tuple((x.dim(), x.dtype, x.device) for x in tensors)
    sizes = tuple(x.shape for x in tensors)
    seen: dict[tuple[torch.Size, ...], Known] = known_of(model).setdefault(kind, {})
    if sizes in seen:
        return Capture(model, inputs, names, seen[sizes])
    if len(seen) >= SHAPES:
        return Capture(
            model, inputs, names, Known(frozenset[int]().union(*(known.scattered for known in seen.values())))
        )
    capture, looked = _verify(model, inputs, names)
    if looked:
        seen[sizes] = capture.known
    return capture


def _verify(model: nn.Module, inputs: Inputs, names: list[str]) -> tuple[Capture, bool]:
    """The capture, and whether it could be looked at."""
    devices = frozenset(p.device.index for p in model.parameters() if p.device.type == "cuda")
    before = RandomState.current(devices)
    logits, ordinary = _ordinary(model, inputs, names)
    before.restore()
    capture = Capture(model, inputs, names)
    fitting = logits.dim() >= 2 and len(logits) == capture.examples
    if not fitting or not all(bool(g.isfinite().all()) for g in ordinary.values()):
        return capture, False  # the caller says what logits should be; NaN is said there too, or given back
    scattered = capture.misplaced()
    if scattered:  # such as those of a batch that the forward sorts: their rows are looked for
        del capture
        before.restore()
        capture = Capture(model, inputs, names, Known(scattered))
        if capture.misplaced():
            raise ValueError(
                "model: expected examples that do not influence each other's logits, got a forward in which they do or "
                "which moves them to where they cannot be followed; per-example gradients need a model that treats "
                "each example for itself (verify=False goes without this check)"
            )
    coarsest = max(_precisions(capture), default=torch.finfo(torch.float64).eps)
    tolerance = min(0.3, 30 * coarsest**0.5)
    if not _alike(capture.logits.detach(), logits, tolerance):
        after = RandomState.current(devices)
        before.restore()
        again, _ = _ordinary(model, inputs, names)
        after.restore()
        if _alike(again, logits, tolerance):
            raise ValueError(
                "model: expected the logits of a plain forward where its layers are watched, got others; one of its "
                "functions cannot be watched (verify=False goes without this check)"
            )
        if capture.fallbacks:
            raise ValueError(
                f"model: expected the same logits from two forwards of the same batch, got different ones; "
                f"{named(capture.fallbacks)} have no formula and take a forward for each example, which would be "
                "another one; make the forward repeatable"
            )
        warnings.warn(
            "model: two forwards of the same batch gave different logits, so that its gradients could not be verified; "
            "the measurement is of one forward",
            stacklevel=6,
        )
        return capture, True
    capture.check_repeatable()
    try:
        totals = _totals(model, inputs, capture)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        if not capture.fallbacks:
            raise
        reason = next(iter(capture.fallbacks.values()))
        raise ValueError(
            f"model: expected per-example gradients to exist, and a forward of one example alone for those of "
            f"{named(capture.fallbacks)}, which have no formula ({reason}); it raises: {error}"
        ) from error
    off = _different(totals, ordinary, tolerance, coarsest**0.5)
    if off:
        raise ValueError(
            f"model: expected per-example gradients that add up to the ordinary gradient, got others for "
            f"{named(off)} (off by {max(off.values()):.2g} of it). Either the forward uses them where that cannot be "
            "seen, or its examples influence each other (statistics over the batch, frequencies within it), and "
            "per-example gradients do not exist. Leave them out with params=, or write that part with functions of "
            "torch; verify=False goes without this check"
        )
    return capture, True


def _ordinary(model: nn.Module, inputs: Inputs, names: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of a plain forward, and the gradients of a plain backward of a random cotangent."""
    state = {name: p.detach() for name, p in model.named_parameters()}
    leaves = {name: state[name].requires_grad_() for name in names}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        logits = call_model(model, inputs)
        for node in graph_nodes(logits):
            refuse_reentrant(node)
        found = {name: torch.zeros_like(leaf, requires_grad=False) for name, leaf in leaves.items()}
        if logits.requires_grad:
            total = (logits * random_cotangent(logits)).sum()
            grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
            given = zip(names, grads, strict=True)
            found |= {name: g.to_dense() if g.is_sparse else g for name, g in given if g is not None}
        return logits.detach(), found

    with torch.enable_grad(), uncompiled(model, "the measurement"):
        return call_within(model, buffers | state, run)


def _totals(model: nn.Module, inputs: Inputs, capture: Capture) -> dict[str, Tensor]:
    """The gradients of all examples together, as the layers show them; those without a formula one by one."""
    cotangent = random_cotangent(capture.logits)
    uses: dict[int, dict[str, Tensor]] = {}
    for parts in capture.parts.values():
        for part in parts:
            uses.setdefault(id(part.layer), {})[part.slot] = part.tensor
    sums: dict[int, tuple[Tensor, Tensor]] = {}

    def receive(layer: Layer, grad: Tensor) -> None:
        a, d = layer.seen(grad)
        for slot, tensor in uses.get(id(layer), {}).items():
            total = layer.total(slot, a, d).to(tensor.dtype)
            known = sums.get(id(tensor))
            sums[id(tensor)] = tensor, total if known is None else known[1] + total

    capture.backward(cotangent, receive, retain_graph=True)
    found = {name: torch.zeros_like(p, requires_grad=False) for name, p in capture.parameters.items()}
    followed = {name: p for name, p in capture.parameters.items() if name not in capture.fallbacks}
    if sums and followed:
        tensors, totals = zip(*sums.values(), strict=True)
        grads = torch.autograd.grad(tensors, list(followed.values()), totals, retain_graph=True, allow_unused=True)
        found |= {name: g for name, g in zip(followed, grads, strict=True) if g is not None}
    if capture.fallbacks:
        each = gradients_of_each(model, inputs, capture.parameters, capture.fallbacks, cotangent)
        for gradients in each:
            for name, g in gradients.items():
                found[name] = found[name] + g.sum(0)
    return found


def _different(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, floor: float
) -> dict[str, float]:
    """By name, how far the gradients differ, where by more than rounding: of each, and of all (some cancel to 0)."""
    sizes = {name: _norm(g) for name, g in expected.items()}
    all_sizes = sum(size**2 for size in sizes.values()) ** 0.5
    off = {}
    for name, size in sizes.items():
        error = _norm(found[name] - expected[name])
        if error > tolerance * max(size, _norm(found[name])) + floor * all_sizes:
            off[name] = error / max(size, 1e-30)
    return off


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(flat_rows(x.detach()[None]), dtype=torch.float64))


def _alike(one: Tensor, two: Tensor, tolerance: float) -> bool:
    if one.shape != two.shape:
        return False
    finite = one.isfinite() & two.isfinite()
    return bool((one.isfinite() == two.isfinite()).all()) and _norm((one - two)[finite]) <= tolerance * _norm(
        two[finite]
    )


def _precisions(capture: Capture) -> list[float]:
    tensors = [capture.logits, *capture.parameters.values(), *(layer.operand for layer in capture.layers)]
    return [torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point() or t.is_complex()]

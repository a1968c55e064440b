"""Whether a capture has seen every use of the parameters: it is compared with the ordinary gradient, once.

A use that is not seen would make norms and traces too small in silence. So the first capture of a model and kind of
batch is held against a plain forward and backward of the same batch: the gradients of all examples together, parameter
by parameter, and whether what belongs to an example stays with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fastfisher.autocast import autocast_dtype
from fastfisher.engine.capture import Capture, named, random_cotangent
from fastfisher.engine.checkpointing import graph_nodes, refuse_reentrant
from fastfisher.engine.layers import Layer, flat_rows
from fastfisher.engine.one_by_one import gradients_of_each
from fastfisher.engine.random_state import RandomState
from fastfisher.engine.watching import Known
from fastfisher.inputs import Call, Inputs, input_tensors, known_of
from fastfisher.model import call_model, call_within, uncompiled

SHAPES = 8
"""How many sizes of batches of the same kind are looked at: more would make batches of any length slow."""


def verified_capture(model: nn.Module, inputs: Inputs, names: Iterable[str]) -> Capture:
    """A capture of the batch, compared with the ordinary gradient where the model has not met a batch of this kind.

    The comparison takes three forwards and backwards, and as much memory as one and the gradients of a batch.

    Raises:
        ValueError: they differ; the parameters are named.
    """
    names = list(names)
    tensors = input_tensors(inputs)
    device = tensors[0].device.type
    autocast = autocast_dtype(device)
    precisions = tuple(p.dtype for p in model.parameters())
    reading = inputs.kind if isinstance(inputs, Call) else None
    kind = "capture", reading, tuple(names), precisions, autocast, tuple((x.dim(), x.dtype, x.device) for x in tensors)
    sizes = tuple(x.shape for x in tensors)
    seen: dict[tuple[torch.Size, ...], Known] = known_of(model).setdefault(kind, {})
    if sizes in seen:
        return Capture(model, inputs, names, seen[sizes])
    if len(seen) >= SHAPES:
        return Capture(
            model, inputs, names, Known(frozenset[int]().union(*(known.scattered for known in seen.values())))
        )
    capture, looked = _Verification(model, inputs, names).run()
    if looked:
        seen[sizes] = capture.known
    return capture


class _Verification:
    """The comparison of a capture of one batch with the ordinary gradient."""

    def __init__(self, model: nn.Module, inputs: Inputs, names: list[str]) -> None:
        self.model, self.inputs, self.names = model, inputs, names
        self.before = RandomState.on_devices_of(model.parameters())
        self.known = Known()

    def run(self) -> tuple[Capture, bool]:
        """A capture, and whether it could be looked at.

        Raises:
            ValueError: it is not what the ordinary forward and backward give.
        """
        seen, logits, comparable = self._look()
        if not comparable:
            return seen.capture, False
        coarsest = max(_precisions(seen.capture), default=torch.finfo(torch.float64).eps)
        tolerance = min(0.3, 30 * coarsest**0.5)
        if _alike(seen.capture.logits.detach(), logits, tolerance):
            seen.capture.check_repeatable()
            off = self._differences(seen, tolerance, coarsest**0.5)
            if off:
                raise ValueError(
                    f"model: expected per-example gradients that add up to the ordinary gradient, got others for "
                    f"{named(off)} (off by {max(off.values()):.2g} of it). Either the forward uses them where that "
                    "cannot be seen, or its examples influence each other (statistics over the batch, frequencies "
                    "within it), and per-example gradients do not exist. Leave them out with params=, or write that "
                    "part with functions of torch; verify=False goes without this check"
                )
        else:
            self._check_logits(seen, logits, tolerance)
        del seen  # its graph and gradients are freed before the capture that is returned
        return self._capture(), True

    def _capture(self) -> Capture:
        self.before.restore()
        return Capture(self.model, self.inputs, self.names, self.known)

    def _ordinary(self) -> tuple[Tensor, dict[str, Tensor]]:
        self.before.restore()
        return _ordinary(self.model, self.inputs, self.names)

    def _look(self) -> tuple[_Seen, Tensor, bool]:
        """What the layers show, the logits of a plain forward, and whether the two can be compared.

        Once more where rows of examples have to be looked for, or where a part of a parameter's gradient was taken off
        before it was known that another part has no formula.
        """
        left_out = frozenset[str]()
        while True:
            logits, ordinary = self._ordinary()
            seen = _Seen(self._capture(), ordinary, left_out)
            fitting = logits.dim() >= 1 and len(logits) == seen.capture.examples
            if not fitting or not all(bool(g.isfinite().all()) for g in ordinary.values()):
                return seen, logits, False  # the caller refuses such logits, and refuses or returns NaN
            seen.look(self._capture)
            if seen.misplaced and not self.known.scattered:  # the forward may have sorted the batch
                self.known = Known(frozenset(seen.misplaced))  # the next captures find the owner of each row
            elif seen.misplaced:
                raise ValueError(
                    "model: expected examples that do not influence each other's logits, got a forward in which they "
                    "do or which moves them to where they cannot be followed; per-example gradients need a model that "
                    "treats each example for itself (verify=False goes without this check)"
                )
            elif not left_out and seen.taken & seen.fallbacks.keys():
                left_out = frozenset(seen.fallbacks)
            else:
                return seen, logits, True

    def _check_logits(self, seen: _Seen, logits: Tensor, tolerance: float) -> None:
        """Where the logits of a capture are others than those of a plain forward: an error if a second one gives the
        same, a warning if two plain forwards differ as well."""
        if _alike(self._ordinary()[0], logits, tolerance):
            raise ValueError(
                "model: expected the logits of a plain forward where its layers are watched, got others; one of its "
                "functions cannot be watched (verify=False goes without this check)"
            )
        if seen.fallbacks:
            raise ValueError(
                f"model: expected the same logits from two forwards of the same batch, got different ones; "
                f"{named(seen.fallbacks)} have no formula and take a forward for each example, which would be "
                "another one; make the forward repeatable"
            )
        warnings.warn(
            "model: two forwards of the same batch gave different logits, so that its gradients could not be verified; "
            "the measurement is of one forward",
            stacklevel=7,
        )

    def _differences(self, seen: _Seen, tolerance: float, floor: float) -> dict[str, float]:
        """See :meth:`_Seen.differences`; where it raises, the error names the parameters without a formula."""
        try:
            return seen.differences(self.model, self.inputs, tolerance, floor)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            if not seen.fallbacks:
                raise
            reason = next(iter(seen.fallbacks.values()))
            raise ValueError(
                f"model: expected per-example gradients to exist, and a forward of one example alone for those of "
                f"{named(seen.fallbacks)}, which have no formula ({reason}); it raises: {error}"
            ) from error


class _Seen:
    """What the layers of a capture show in two backwards, each of one half of the examples.

    Each half has a forward of its own, whose activations its backward frees: a graph that is kept over a backward takes
    half as much again. Gradients are taken off the ordinary ones layer by layer, as they come.

    Attributes:
        capture: the last one.
        misplaced: the numbers of the layers that have gradients in the places of examples whose logits get none. Such a
            layer has its examples in another order than the batch, or it mixes them, or it sees a single one, whose
            positions are as many as there are examples.
        fallbacks: by name, why nothing can follow a parameter.
        remaining: the ordinary gradients, without what the layers have shown.
        sizes: the norms of the ordinary gradients.
        taken: the names of which something was taken off; never those that are ``left_out``.
        error: what a layer's formula raised; it is raised in the end, as examples in other places may be its cause.
    """

    def __init__(self, capture: Capture, ordinary: dict[str, Tensor], left_out: frozenset[str]) -> None:
        self.capture, self.remaining, self.left_out = capture, ordinary, left_out
        self.sizes = {name: _norm(g) for name, g in ordinary.items()}
        self.misplaced: set[int] = set()
        self.fallbacks: dict[str, str] = {}
        self.taken: set[str] = set()
        self.error: Exception | None = None

    def look(self, capture: Callable[[], Capture]) -> None:
        """Takes the backwards: of the capture that is there, and of another one."""
        examples = self.capture.examples
        order = torch.randperm(examples, generator=torch.Generator().manual_seed(1)).to(self.capture.logits.device)
        halves = order.tensor_split(2) if examples > 1 else (order[:0],)
        for number, out in enumerate(halves):
            if number > 0:
                del self.capture  # so that its graph is freed before the next one is built
                self.capture = capture()
            cotangent = random_cotangent(self.capture.logits)
            cotangent[out] = 0
            self._half(cotangent, out)
            self.fallbacks |= self.capture.fallbacks

    def _half(self, cotangent: Tensor, out: Tensor) -> None:
        capture = self.capture
        numbers = {id(layer): number for number, layer in enumerate(capture.layers)}
        leaves = {id(p): name for name, p in capture.parameters.items()}
        uses: dict[int, dict[str, Tensor]] = {}
        for parts in capture.parts.values():
            for part in parts:
                uses.setdefault(id(part.layer), {})[part.slot] = part.tensor
        derived: dict[int, tuple[Tensor, Tensor]] = {}

        def receive(layer: Layer, grad: Tensor) -> None:
            a, d = layer.seen(grad)
            largest = d.detach().abs().reshape(len(d), -1).max(1).values if d.numel() else d.new_zeros(len(d))
            if not bool((largest[out] <= 1e-6 * largest.max()).all()):
                self.misplaced.add(numbers[id(layer)])
            for slot, tensor in uses.get(id(layer), {}).items():
                try:
                    total = layer.total(slot, a, d).to(tensor.dtype)
                except torch.OutOfMemoryError:
                    raise
                except (RuntimeError, ValueError, IndexError) as error:
                    self.error = error
                    continue
                if id(tensor) in leaves:
                    self._take(leaves[id(tensor)], total)
                else:
                    known = derived.get(id(tensor))
                    derived[id(tensor)] = tensor, total if known is None else known[1] + total

        capture.backward(cotangent, receive)
        if derived:
            tensors, totals = zip(*derived.values(), strict=True)
            grads = torch.autograd.grad(tensors, list(capture.parameters.values()), totals, allow_unused=True)
            for name, g in zip(capture.parameters, grads, strict=True):
                if g is not None:
                    self._take(name, g)

    def _take(self, name: str, gradient: Tensor) -> None:
        if name not in self.left_out and name not in self.capture.fallbacks:
            self.remaining[name] = self.remaining[name] - gradient
            self.taken.add(name)

    def differences(self, model: nn.Module, inputs: Inputs, tolerance: float, floor: float) -> dict[str, float]:
        """By name, how far the gradients of all examples together differ from the ordinary ones, where by more than
        rounding: of each, and of all (some cancel to 0). Those without a formula are taken one by one."""
        if self.error is not None:
            raise self.error
        if self.fallbacks:
            capture = self.capture
            cotangent = random_cotangent(capture.logits)
            for gradients in gradients_of_each(model, inputs, capture.parameters, self.fallbacks, cotangent):
                for name, g in gradients.items():
                    self.remaining[name] = self.remaining[name] - g.sum(0)
        everything = sum(size**2 for size in self.sizes.values()) ** 0.5
        off = {}
        for name, size in self.sizes.items():
            error = _norm(self.remaining[name])
            if error > tolerance * max(size, error) + floor * everything:
                off[name] = error / max(size, 1e-30)
        return off


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

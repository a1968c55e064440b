"""Causal language models: padding, label smoothing, tied embeddings, models of Transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastfisher
from fastfisher import FisherPenalty
from fastfisher.alignment import Alignments
from fastfisher.data import split
from fastfisher.labels import Rows, labels_of
from fastfisher.likelihoods.base import Signs
from fastfisher.likelihoods.categorical import CATEGORICAL
from fastfisher.ops.sampled import new_key
from tests.support.networks import flat, relative_error
from tests.support.transformer_models import KINDS, batch_of, model_of, penalised, targets_of

pytestmark = pytest.mark.usefixtures("torchvision")  # models of Transformers import it where it is installed

VOCABULARY, LENGTH, BATCH = 11, 6, 4


class TinyGPT(nn.Module):
    """A block of causal attention with dropout between tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, 8), nn.Embedding(LENGTH, 8)
        self.mix, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        q, k, v = self.mix(self.norm(x)).chunk(3, -1)
        scores = (q @ k.mT / 8**0.5).masked_fill(~torch.ones(LENGTH, LENGTH).tril().bool(), -torch.inf)
        x = x + self.out(F.dropout(scores.softmax(-1), 0.1, self.training) @ v)
        return self.head(self.norm(x + self.narrow(F.relu(self.wide(x)))))


def data(padded: bool = True) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=source)
    targets = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=source)
    if padded:
        targets[0, 4:], targets[2, 1:] = -100, -100
    return tokens, targets


def network() -> TinyGPT:
    torch.manual_seed(0)
    return TinyGPT().double()


def gpt2(dtype: torch.dtype = torch.float64) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=8, n_layer=1, n_head=2, attn_implementation="eager",
        use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).to(dtype)


def seeded(**options: Any) -> dict[str, Any]:
    return {"generator": torch.Generator().manual_seed(9), **options}


def smoothed(output: Any, targets: Tensor) -> Tensor:
    logits = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1)


@pytest.mark.parametrize("make", [network, gpt2])
@pytest.mark.parametrize("loss", [None, smoothed])
@pytest.mark.parametrize("labels", ["sampled", "true", "uniform", "rademacher"])
def test_the_gradient_is_that_of_double_backprop(make: Any, labels: Any, loss: Any) -> None:
    found = []
    tokens, targets = data()
    for options in ({"method": "double_backprop"}, {"method": "finite_difference", "difference": "central"}):
        model = make()
        torch.manual_seed(5)  # of the dropout
        penalty = FisherPenalty(model, 0.3, every=1, loss=loss, **seeded(labels=labels, **options))
        penalty.backward(tokens, targets)
        found.append((flat([p.grad for p in model.parameters()]), penalty.value))
    assert relative_error(found[1][0], found[0][0]) < 1e-6
    torch.testing.assert_close(found[1][1], found[0][1])


@pytest.mark.parametrize("labels", ["sampled", "true", "uniform", "rademacher"])
def test_padding_has_no_part_in_the_penalty(labels: Any) -> None:
    """The squared norm of the mean over what counts, for the labels that the same key draws for those positions."""
    model, (tokens, targets) = network().eval(), data()
    kept = targets != -100
    value = fastfisher.penalty(model, tokens, targets, **seeded(labels=labels))
    logits = model(tokens)
    key = None if labels == "true" else new_key(torch.Generator().manual_seed(9), torch.device("cpu"))
    _, drawn = labels_of(labels).loss(Rows(CATEGORICAL, logits, targets.clamp(min=0), key))
    counted = Signs(drawn.tensor[kept]) if isinstance(drawn, Signs) else drawn[kept]
    loss = CATEGORICAL.loss(logits[kept], counted)
    exact = sum(g.square().sum() for g in torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(value, exact)


def test_rows_that_count() -> None:
    model, (tokens, targets) = network().eval(), data()
    penalty = FisherPenalty(model, 0.3, every=1, **seeded())
    penalty.backward(tokens, targets)
    assert penalty.value is not None and penalty.trace_estimate is not None
    torch.testing.assert_close(penalty.trace_estimate, penalty.value * int((targets != -100).sum()))


def test_a_part_of_the_batch_weighs_by_its_positions() -> None:
    model, (tokens, targets) = network().eval(), data()
    FisherPenalty(model, 0.3, every=1, examples=2, method="double_backprop", **seeded()).backward(tokens, targets)
    share = int((targets[:2] != -100).sum()) / int((targets != -100).sum())
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    expected = expected + 0.3 * share * fastfisher.penalty(model, tokens[:2], targets[:2], **seeded())
    exact = flat(list(torch.autograd.grad(expected, list(model.parameters()))))
    torch.testing.assert_close(flat([p.grad for p in model.parameters()]), exact)


@pytest.mark.parametrize("make", [network, gpt2])
def test_the_trace_leaves_padding_out(make: Any) -> None:
    """Exactly, beside the sum over positions and classes, one backward each."""
    model, (tokens, targets) = make().eval(), data()
    parameters = list(model.parameters())
    total = 0.0
    logits = fastfisher.model.call_model(model, tokens)
    for example in range(BATCH):
        for place in range(LENGTH):
            if targets[example, place] == -100:
                continue
            log_p = logits[example, place].log_softmax(-1)
            for c in range(VOCABULARY):
                found = torch.autograd.grad(log_p[c], parameters, retain_graph=True, allow_unused=True)
                total += float(log_p[c].detach().exp()) * sum(float(g.square().sum()) for g in found if g is not None)
    trace = fastfisher.trace_fisher(model, (tokens, targets), labels="exact")
    assert trace.value == pytest.approx(total / BATCH, rel=1e-9)


def test_what_a_model_returns() -> None:
    class Dictionary(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"scores": x}

    with pytest.raises(TypeError, match=r"logits.*dict"):
        fastfisher.model.call_model(Dictionary(), torch.ones(1))


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("method", ["double_backprop", "finite_difference"])
def test_the_term_adds_what_backward_adds(method: Any, every: int) -> None:
    tokens, targets = data()
    models = network(), network()
    options = seeded(method=method, every=every, difference="central")
    mine = FisherPenalty(models[0], 0.3, **options)
    theirs = FisherPenalty(models[1], 0.3, **{**options, "generator": torch.Generator().manual_seed(9)})
    for step in range(3):
        for model, penalty in zip(models, (mine, theirs), strict=True):
            model.zero_grad()
            torch.manual_seed(step)
            if penalty is theirs:
                penalty.backward(tokens, targets)
                continue
            with penalty.watching() as forward:
                loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
            term = penalty.term(forward, targets)
            assert term.item() == 0
            ((loss + term) * 0.25).backward()
        found, expected = (flat([p.grad for p in model.parameters()]) for model in models)
        assert relative_error(4 * found, expected) < 1e-9
    assert mine.steps == theirs.steps == 3
    torch.testing.assert_close(mine.trace_estimate, theirs.trace_estimate)


def test_the_term_of_a_first_example_and_of_a_late_start() -> None:
    model, (tokens, targets) = network().eval(), data(padded=False)
    penalty = FisherPenalty(model, 0.3, start=1, reduction="first", **seeded(method="double_backprop"))
    for step in range(2):
        model.zero_grad()
        with penalty.watching() as forward:
            model(tokens)
        term = penalty.term(forward, targets)
        assert term.requires_grad == bool(step)
    term.backward()
    exact = torch.autograd.grad(
        0.3 * fastfisher.penalty(model, tokens, reduction="first", **seeded()), list(model.parameters())
    )
    torch.testing.assert_close(flat([p.grad for p in model.parameters()]), flat(list(exact)))


def test_watching_refuses_what_it_cannot_share() -> None:
    model, (tokens, _) = network(), data()
    for options, name in (
        ({"mixed": True, "every": 1}, "mixed"),
        ({"examples": 2}, "examples"),
        ({"wrt": "inputs"}, "wrt"),
        ({"loss": smoothed}, "loss"),
    ):
        with pytest.raises(ValueError, match=name), FisherPenalty(model, 0.3, **options).watching():  # type: ignore[arg-type]
            pass
    penalty = FisherPenalty(model, 0.3)
    with penalty.watching() as forward:
        model(tokens)
        model(tokens)
    with pytest.raises(ValueError, match="one finished call of the model, saw 2"):
        penalty.term(forward)
    with pytest.raises(KeyboardInterrupt), penalty.watching() as forward:
        raise KeyboardInterrupt
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert not torch.overrides._get_current_function_mode_stack()


# ---- models of Transformers, with the loss that they make themselves ------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["double_backprop", "finite_difference"])
def test_the_second_forward_is_called_as_the_first(kind: str, method: Any) -> None:
    """A decoder starts from the labels: without them BART's would start from nothing and T5's not at all."""
    batch, model, expected = batch_of(kind), model_of(kind), model_of(kind)
    penalty = FisherPenalty(model, 0.3, every=1, method=method, difference="central", **seeded())
    with penalty.watching() as forward:
        output = model(**batch)
    targets = targets_of(kind, batch["labels"])
    assert torch.equal(targets, Alignments().targets(output.loss, forward.logits, batch["labels"]))
    (output.loss + penalty.term(forward, targets)).backward()
    by_hand = expected(**batch)
    key = new_key(torch.Generator().manual_seed(9), torch.device("cpu"))
    total, value = penalised(by_hand.loss, by_hand.logits, targets, expected, 0.3, key)
    total.backward()
    torch.testing.assert_close(penalty.value, value)
    found, exact = (
        flat([torch.zeros_like(p) if p.grad is None else p.grad for p in m.parameters()]) for m in (model, expected)
    )
    # Norms, attention or the loss are in float32 in most of them, so the step is that of float32.
    assert relative_error(found, exact) < (1e-6 if method == "double_backprop" else 1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_inside_a_batch_leave_out_what_the_loss_leaves_out(kind: str) -> None:
    """The step on a batch with labels is that on their targets, and the model's own loss is the one that is trained."""
    batch, model, expected = batch_of(kind), model_of(kind), model_of(kind)
    targets = targets_of(kind, batch["labels"])
    assert torch.equal(split(model, batch)[1], targets)
    loss = FisherPenalty(model, 0.3, every=1, method="double_backprop", **seeded()).backward(batch)
    by_hand = expected(**batch)
    torch.testing.assert_close(loss.double(), by_hand.loss.double(), rtol=1e-6, atol=0)
    key = new_key(torch.Generator().manual_seed(9), torch.device("cpu"))
    total, _ = penalised(by_hand.loss, by_hand.logits, targets, expected, 0.3, key)
    total.backward()
    found, exact = (
        flat([torch.zeros_like(p) if p.grad is None else p.grad for p in m.parameters()]) for m in (model, expected)
    )
    assert relative_error(found, exact) < 1e-6
    inside, beside = (fastfisher.trace_fisher(model, data, **seeded()) for data in (batch, (batch, targets)))
    assert inside == beside


def test_arguments_by_position_and_by_name() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 4).double()

        def forward(self, *parts: Tensor, scale: float = 1.0) -> Tensor:
            return self.head(parts[0] * parts[1]) * scale

    torch.manual_seed(0)
    model, x, y = Parts(), torch.randn(2, 3).double(), torch.tensor([0, 3])
    penalty = FisherPenalty(model, 1.0, every=1, labels="true", difference="central")
    with penalty.watching() as forward:
        logits = model(x, x, scale=2.0)
    (0 * logits.sum() + penalty.term(forward, y)).backward()
    weight, bias = model.head.weight, model.head.bias
    loss = F.cross_entropy(F.linear(x * x, weight, bias) * 2.0, y)
    squared = sum(g.square().sum() for g in torch.autograd.grad(loss, [weight, bias], create_graph=True))
    for found, exact in zip((weight.grad, bias.grad), torch.autograd.grad(squared, [weight, bias]), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("every", [1, 2])
def test_where_no_position_counts_there_is_no_penalty(every: int) -> None:
    """A micro-batch of prompts: R would be a mean over nothing."""
    model, (tokens, targets) = network().eval(), data()
    penalty = FisherPenalty(model, 0.3, every=every, **seeded())
    found = []
    for some in (torch.full_like(targets, -100), targets, torch.full_like(targets, -100)):
        with penalty.watching() as forward:
            loss = model(tokens).sum() * 0
        model.zero_grad()
        (loss + penalty.term(forward, some)).backward()
        found.append(flat([p.grad for p in model.parameters()]))
    assert penalty.steps == 3 and not found[0].any()
    assert found[1].any() == (every == 1) and all(g.isfinite().all() for g in found) and not found[2].any()

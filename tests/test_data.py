"""What of a batch are inputs and what are targets, beside the same numbers given one by one."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import fastfisher
from fastfisher import FisherPenalty
from fastfisher.data import Batches, paired, split

pytestmark = pytest.mark.usefixtures("one_thread")

G = torch.Generator().manual_seed(0)
X, W = torch.randn(6, 5, generator=G, dtype=torch.float64), torch.rand(6, 1, generator=G, dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0, 1, 2])
CPU = torch.device("cpu")


class Base(nn.Module):
    """The logits of x·w; what it is called with is the affair of its children."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.head = nn.Linear(5, 3).double()

    def logits(self, x: Tensor, w: Tensor) -> Tensor:
        logits: Tensor = self.head(x * w)
        return logits


class Two(Base):
    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return self.logits(x, w)


class ByKeyword(Base):
    def forward(self, x: Tensor, *, w: Tensor, scale: int | None = 1, name: str = "") -> Tensor:
        return self.logits(x, w) * (1 if scale is None else scale)


class OfADict(Base):
    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.logits(batch["x"], batch["w"])


class OfAPair(Base):
    def forward(self, pair: Any) -> Tensor:
        x, w = pair
        return self.logits(x, w)


class Nested(Base):
    def forward(self, given: Mapping[str, Any], how: str = "plain") -> Tensor:
        assert how == "plain"
        return self.logits(given["x"], given["further"][0]["w"])


class Pair(NamedTuple):
    x: Tensor
    w: Tensor


Fields = namedtuple("Fields", "x w y")
NAMED = {"x": X, "w": W}
NESTED = {"x": X, "further": [{"w": W}, None, 3]}

BATCHES: dict[str, tuple[type[Base], Any]] = {
    "a tuple": (Two, (X, W, Y)),
    "a list, as a loader makes it": (Two, [X, W, Y]),
    "a namedtuple": (Two, Fields(X, W, Y)),
    "inputs in a list": (Two, [[X, W], Y]),
    "inputs in a tuple": (Two, ((X, W), Y)),
    "inputs in a namedtuple": (Two, (Pair(X, W), Y)),
    "a dict and targets": (Two, (NAMED, Y)),
    "a dict and targets in a list": (Two, [NAMED, Y]),
    "labels in a dict": (Two, {**NAMED, "labels": Y}),
    "labels in a UserDict": (Two, UserDict(**NAMED, labels=Y)),
    "labels in an OrderedDict": (Two, OrderedDict(**NAMED, labels=Y)),
    "arguments by keyword": (ByKeyword, {**NAMED, "scale": None, "name": "b", "labels": Y}),
    "a dict for its one argument": (OfADict, (NAMED, Y)),
    "a UserDict for its one argument": (OfADict, (UserDict(NAMED), Y)),
    "labels in a dict for its one argument": (OfADict, {**NAMED, "labels": Y}),
    "a pair for its one argument": (OfAPair, ((X, W), Y)),
    "a list for its one argument": (OfAPair, ([X, W], Y)),
    "a namedtuple for its one argument": (OfAPair, (Pair(X, W), Y)),
    "three items for its one argument": (OfAPair, (X, W, Y)),
    "nested": (Nested, (NESTED, Y)),
    "nested beside a string": (Nested, (NESTED, "plain", Y)),
}


def plain() -> tuple[nn.Module, Tensor]:
    """The same network of one argument, and that."""
    return Two().head, X * W


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("name", BATCHES)
def test_measurements_take_batches_as_people_have_them(name: str) -> None:
    kind, batch = BATCHES[name]
    model, (same, x) = kind(), plain()

    def close(found: float, expected: float) -> None:
        assert found == pytest.approx(expected, rel=1e-9)

    for labels in ("exact", "true"):
        expected = fastfisher.trace_fisher(same, (x, Y), labels=labels).value
        for data in (batch, [batch], iter([batch]), (b for b in [batch])):
            close(fastfisher.trace_fisher(model, data, labels=labels).value, expected)
        close(fastfisher.trace_fisher(model, batch, labels=labels, batch_size=4).value, expected)
    close(fastfisher.trace_hessian(model, batch).value, fastfisher.trace_hessian(same, x, Y).value)
    found, expected_values = fastfisher.top_eigenvalues(model, batch), fastfisher.top_eigenvalues(same, x, Y)
    assert found.values[0] == pytest.approx(expected_values.values[0], rel=1e-2)
    close(fastfisher.gradient_covariance(model, batch).trace, fastfisher.gradient_covariance(same, (x, Y)).trace)
    close(
        fastfisher.grad_inner_products(model, batch, batch).mean,
        fastfisher.grad_inner_products(same, (x, Y), (x, Y)).mean,
    )
    assert fastfisher.trace_fisher(model, batch, samples=4).samples == 4


@pytest.mark.parametrize("name", BATCHES)
def test_steps_and_norms_take_the_same_inputs(name: str) -> None:
    kind, batch = BATCHES[name]
    inputs, targets = batch, None
    if not isinstance(batch, Mapping):
        *items, targets = batch
        inputs = items[0] if len(items) == 1 else tuple(items)
    model, (same, x) = kind(), plain()
    norms = fastfisher.per_example_grad_norms(model, inputs, targets, labels="true")
    torch.testing.assert_close(norms, fastfisher.per_example_grad_norms(same, x, Y, labels="true"))
    for options in ({}, {"labels": "true"}, {"reduction": "first"}, {"method": "finite_difference"}):
        found = fastfisher.penalty(model, inputs, targets, generator=seeded(), **options)  # type: ignore[arg-type]
        expected = fastfisher.penalty(same, x, Y, generator=seeded(), **options)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected)
    for options in ({}, {"examples": 2}, {"method": "double_backprop"}):
        model, same = kind(), plain()[0]
        FisherPenalty(model, 0.3, every=1, generator=seeded(), **options).backward(inputs, targets)  # type: ignore[arg-type]
        FisherPenalty(same, 0.3, every=1, generator=seeded(), **options).backward(x, Y)  # type: ignore[arg-type]
        torch.testing.assert_close(flat(model), flat(same))


def test_loaders() -> None:
    same, x = plain()
    expected = fastfisher.trace_fisher(same, (x, Y), labels="exact").value

    class Named(Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, i: int) -> dict[str, Tensor]:
            return {"x": X[i], "w": W[i], "labels": Y[i]}

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from ((X[:4], W[:4], Y[:4]), (X[4:], W[4:], Y[4:]))

    for data in (
        DataLoader(TensorDataset(X, W, Y), batch_size=4),
        DataLoader(Named(), batch_size=4),
        DataLoader(Stream(), batch_size=None),
        Stream(),
        next(iter(DataLoader(TensorDataset(X, W, Y), batch_size=6))),
        [[[X[:4], W[:4]], Y[:4]], [[X[4:], W[4:]], Y[4:]]],
    ):
        assert fastfisher.trace_fisher(Two(), data, labels="exact").value == pytest.approx(expected, rel=1e-9)
    for single in (TensorDataset(X, W, Y), Named()):
        with pytest.raises(TypeError, match=r"data: expected batches, got .* single examples; give .*DataLoader"):
            fastfisher.trace_fisher(Two(), single)


def test_inputs_alone() -> None:
    expected = fastfisher.trace_fisher(*plain(), labels="exact").value
    for batch in (((X, W), None), [[X, W], None], [NAMED], NAMED, ([X, W],)):
        assert fastfisher.trace_fisher(Two(), batch, labels="exact").value == pytest.approx(expected, rel=1e-9)
    model, x = plain()
    for data in (x, [x], (x,), (x, None), [(x[:4],), (x[4:],)], iter([x[:4], x[4:]]), [[x[:4]], [x[4:]]]):
        assert fastfisher.trace_fisher(model, data, labels="exact").value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ((X, Y), ValueError, r"data: .*Two.forward\(x: .*got one tensor; the last of several tensors"),
        ((X, X, W, Y), ValueError, r"data: .*Two.forward\(x: .*got 3 of them"),
        ({**NAMED, "index": Y}, ValueError, r"data: .*got \['index'\], which it does not take"),
        ({**NAMED, "target": Y}, ValueError, r"got \['target'\], which it does not take"),
        ({"x": X, "labels": Y}, ValueError, r"data: expected all arguments that .* needs, got \['x'\]"),
        (((X, W), W), ValueError, r"targets: .*float64 of shape \(6, 1\)"),
        ([X, W, X], ValueError, r"targets: .*make \(\(x, w\), None\)"),
        (((X, W), Y[:5]), ValueError, "data: expected one target per input, got 5 for 6"),
        ([((X, W), Y[:5])], ValueError, "data: expected one target per input, got 5 for 6"),
        ((X, W, Y[0]), ValueError, "data: .* a scalar tensor"),
        ((X, W, Y.tolist()), TypeError, "data: .*last item, the targets, is of type list"),
        (((X, Y), (X, Y)), TypeError, "data: .*last item, the targets, is of type tuple"),
        ((X, W, {"boxes": Y}), TypeError, "data: .*is of type dict"),
        ((X, W, ["a", "b"]), TypeError, "data: .*is of type list"),
        ((), TypeError, "data: expected tensors or pairs"),
        ([], ValueError, "data: expected at least one example"),
        ({}, ValueError, "data: expected all arguments"),
        ((X[:0], W[:0], Y[:0]), ValueError, "data: expected at least one example"),
        ("text", TypeError, "data: expected tensors or pairs .*got str"),
        (7, TypeError, "data: expected tensors or an iterable of batches, got int"),
        ((torch.tensor(1.0), W, Y), ValueError, "data: expected examples along dimension 0"),
        (((X.numpy(), W.numpy()), Y), ValueError, "data: expected at least one tensor, found none"),
        (nn.utils.rnn.pack_sequence([X]), TypeError, "data: .* PackedSequence"),
    ],
)
def test_what_is_no_batch_is_refused(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastfisher.trace_fisher(Two(), data, labels="exact")


def test_packed_sequences_and_objects_with_tensors_are_refused() -> None:
    packed = nn.utils.rnn.pack_sequence([X[:3], X[3:]])
    with pytest.raises(TypeError, match=r"inputs: .*PackedSequence"):
        fastfisher.penalty(Two(), packed)
    with pytest.raises(TypeError, match=r"inputs: .*PackedSequence"):
        fastfisher.penalty(Two(), (X, packed))

    @dataclasses.dataclass
    class Graph:
        nodes: Tensor

    with pytest.raises(TypeError, match=r"inputs: .*an object of type Graph"):
        fastfisher.penalty(Two(), (X, Graph(W)))


def test_what_all_examples_share_stays_whole() -> None:
    """A scalar, and a tensor that broadcasts over the examples."""
    for shared in (torch.tensor(0.5, dtype=torch.float64), torch.rand(1, 5, dtype=torch.float64)):
        expected = fastfisher.per_example_grad_norms(plain()[0], X * shared, Y, labels="true")
        for model in (Two(), OfADict()):
            inputs: Any = {"x": X, "w": shared}
            found = fastfisher.per_example_grad_norms(model, inputs, Y, labels="true")
            torch.testing.assert_close(found, expected)
            trace = fastfisher.trace_fisher(model, (inputs, Y), labels="true", batch_size=2)
            assert trace.value == pytest.approx(float(expected.mean()), rel=1e-9)
            first = fastfisher.penalty(model, inputs, Y, labels="true", reduction="first")
            torch.testing.assert_close(first.detach(), expected[0])
    table = torch.rand(5, dtype=torch.float64)
    model = Two()
    assert fastfisher.trace_fisher(model, ((X, table), Y)).samples == 6  # no example is taken out
    for call in (
        lambda: fastfisher.trace_fisher(model, ((X, table), Y), samples=3),
        lambda: fastfisher.penalty(model, (X, table), reduction="first"),
        lambda: FisherPenalty(model, 0.1, examples=2).backward((X, table), Y),
    ):
        with pytest.raises(ValueError, match=r"inputs: expected 6 examples .* shape \(5,\); expand"):
            call()


def test_lists_of_other_things_are_not_taken_apart() -> None:
    class Names(Base):
        def forward(self, x: Tensor, w: Tensor, names: list[str]) -> Tensor:
            return self.logits(x, w) * len(names)

    batch = {**NAMED, "names": list("abcdef")}
    assert fastfisher.trace_fisher(Names(), batch, labels="exact").samples == 6
    for options in ({"samples": 3}, {"batch_size": 2}):
        with pytest.raises(ValueError, match=r"data: .*a list of 6 items of type str"):
            fastfisher.trace_fisher(Names(), batch, labels="exact", **options)  # type: ignore[arg-type]


def test_mappings_keep_their_type_and_the_caller_his_own() -> None:
    class Encoding(UserDict[str, Any]):
        extra = "kept"

    given = Encoding(x=X.float(), w=W)
    ((call, targets),) = Batches(OfADict(), (given, Y), CPU, batch_size=6)
    (inner,) = call.args
    assert type(inner) is Encoding and inner is not given and inner.extra == "kept"
    assert targets is not None and given["x"].dtype == torch.float32
    call, _ = next(iter(Batches(OfADict(), (given, Y), CPU, batch_size=2)))
    assert len(call.args[0]["x"]) == 2 and len(given["x"]) == 6


def test_samples_are_the_same_rows_of_everything() -> None:
    data = (X, W, Y)
    ((call, targets),) = Batches(Two(), data, CPU, samples=3, generator=seeded())
    x, w = call.args
    rows = [int((row == X).all(1).nonzero()) for row in x]
    assert len(set(rows)) == 3 and torch.equal(w, W[rows]) and targets is not None and torch.equal(targets, Y[rows])


# ---- labels within a batch -------------------------------------------------------------------------------------------

TOKENS = torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(2))
LABELS = TOKENS.masked_fill(torch.arange(7) < 2, -100)
LABELS[1, 5:] = -100
FOLLOWING = F.pad(LABELS[:, 1:], (0, 1), value=-100)


class Out(dict[str, Any]):
    """What models of Transformers return."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class Language(nn.Module):
    """A model with a loss of its own, at the labels (``shift=0``) or those of the next position (1)."""

    def __init__(self, shift: int | None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.shift = shift
        self.tokens, self.drop, self.head = nn.Embedding(11, 6).double(), nn.Dropout(0.1), nn.Linear(6, 11).double()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        self.seen += 1
        logits = self.head(self.drop(self.tokens(input_ids)))
        if labels is None or self.shift is None:
            return Out(logits=logits)
        length = logits.shape[1] - self.shift
        rows, wanted = logits[:, :length].flatten(0, 1), labels[:, self.shift :].flatten()
        return Out(logits=logits, loss=F.cross_entropy(rows, wanted))


@pytest.mark.parametrize("shift", [None, 0, 1])
def test_labels_in_a_batch_are_targets_as_the_models_own_loss_has_them(shift: int | None) -> None:
    model, batch = Language(shift), {"input_ids": TOKENS, "labels": LABELS}
    targets = FOLLOWING if shift else LABELS
    state = torch.random.get_rng_state()
    call, found = paired(model, batch, None)
    assert torch.equal(found, targets) and torch.equal(call.kwargs["labels"], LABELS)
    assert torch.equal(torch.random.get_rng_state(), state) and float(model.seen) == 0
    for labels in ("true", "exact"):
        trace = fastfisher.trace_fisher(model, [UserDict(batch)], labels=labels).value
        assert trace == pytest.approx(
            fastfisher.trace_fisher(Language(None), (TOKENS, targets), labels=labels).value, rel=1e-9
        )
    parts = fastfisher.trace_fisher(model, batch, labels="true", batch_size=3).value
    assert parts == pytest.approx(fastfisher.trace_fisher(model, batch, labels="true").value, rel=1e-9)
    loss = FisherPenalty(model.eval(), 0.1).backward(batch)
    expected = F.cross_entropy(model(TOKENS).logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected.detach())


def test_targets_given_beside_labels_are_taken() -> None:
    targets = LABELS.roll(1, 0)
    _, found = paired(Language(1), {"input_ids": TOKENS, "labels": LABELS}, targets)
    assert found is targets
    _, found = split(Language(1), ({"input_ids": TOKENS, "labels": LABELS}, targets))
    assert found is targets


def test_a_loss_that_says_nothing_of_the_targets_is_refused() -> None:
    class Squared(Language):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
            logits = self.head(self.tokens(input_ids))
            return Out(logits=logits, loss=logits.square().mean())

    batch = {"input_ids": TOKENS, "labels": LABELS}
    with pytest.raises(ValueError, match=r"^loss: expected a cross-entropy .* state the targets"):
        fastfisher.trace_fisher(Squared(None), batch)
    assert fastfisher.trace_fisher(Squared(None), (batch, LABELS)).value > 0
    with pytest.raises(ValueError, match=r"labels: expected class indices, or -100 .* 255"):
        fastfisher.trace_fisher(Language(1), {"input_ids": TOKENS, "labels": LABELS.masked_fill(LABELS < 0, 255)})


@pytest.mark.parametrize("options", [{}, {"alpha": 0.0}, {"method": "double_backprop"}, {"gates": "free"}], ids=str)
def test_another_loss_of_the_models_own_is_not_left_out_in_silence(options: dict[str, Any]) -> None:
    class Balanced(Language):
        factor = 0.01

        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
            out = super().forward(input_ids, labels)
            return Out(logits=out.logits, loss=out.loss + self.factor * self.head.weight.square().mean())

    model = Balanced(1).eval()
    penalty = FisherPenalty(model, **{"alpha": 0.1, "every": 1, **options})
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^model: its own loss at the labels, .* which would be trained in"):
            penalty.backward({"input_ids": TOKENS, "labels": LABELS})
    assert all(p.grad is None for p in model.parameters()) and penalty.steps == 0
    penalty.backward({"input_ids": TOKENS, "labels": LABELS}, FOLLOWING)  # the targets are stated
    model.factor = 0.0
    penalty.backward({"input_ids": TOKENS, "labels": LABELS})
    assert penalty.steps == 2


def test_labels_of_an_encoder_and_decoder_reach_its_forward() -> None:
    """The decoder's inputs are made of them; without, it starts from nothing."""

    class Decoder(Language):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
            before = torch.zeros_like(input_ids)
            if labels is not None:
                before[:, 1:] = labels[:, :-1].clamp(min=0)
            return Out(logits=self.head(self.tokens(input_ids) * self.tokens(before)))

    class Given(Decoder):
        def forward(self, input_ids: Tensor, before: Tensor) -> Any:  # type: ignore[override]
            return Out(logits=self.head(self.tokens(input_ids) * self.tokens(before)))

    before = F.pad(LABELS[:, :-1].clamp(min=0), (1, 0))
    found = fastfisher.trace_fisher(Decoder(None), {"input_ids": TOKENS, "labels": LABELS}, labels="true")
    expected = fastfisher.trace_fisher(Given(None), (TOKENS, before, LABELS), labels="true")
    assert found.value == pytest.approx(expected.value, rel=1e-9)
    one, two = Decoder(None), Given(None)
    FisherPenalty(one, 0.3, every=1, generator=seeded()).backward({"input_ids": TOKENS, "labels": LABELS})
    FisherPenalty(two, 0.3, every=1, generator=seeded()).backward((TOKENS, before), LABELS)
    torch.testing.assert_close(flat(one), flat(two))


def test_models_of_transformers(torchvision: Any) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 11, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, n_embd=8, n_layer=1, n_head=2, n_positions=9))
    bert = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
    )
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=11, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    )
    batch = transformers.BatchEncoding({"input_ids": TOKENS, "labels": LABELS})
    for model in (gpt2, bert, t5):
        model = model.double().eval()
        loss = FisherPenalty(copy.deepcopy(model), 0.1, every=1).backward(batch)
        torch.testing.assert_close(loss, model(**batch).loss.detach().to(loss.dtype), rtol=1e-6, atol=0)
        _, targets = paired(model, batch, None)
        assert torch.equal(targets, FOLLOWING if model is gpt2 else LABELS)

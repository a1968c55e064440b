"""The Trainer's mixin before classes with a ``compute_loss`` of their own, as those of reinforcement learning from
preferences are: keywords only, a loss without outputs, a frozen reference model, and heads that return no logits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfisher import FisherPenalty
from tests.support.networks import flat, relative_error
from tests.support.transformer_models import data_of, model_of, penalised
from tests.test_integrations import STEP, fisher_trainer, following, key, lightning_module, network

pytestmark = [
    pytest.mark.usefixtures("torchvision", "one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

ALPHA = 0.5


def log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each example's labels together, each compared with the row before it."""
    targets = following(labels)
    chosen = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return chosen.where(targets != -100, 0.0).sum(-1)


def preferring(model: Any, reference: Any, inputs: dict[str, Tensor], of: Any) -> Tensor:
    """The loss of direct preference optimisation: the first half of a batch is preferred to the second."""
    arguments = {name: x for name, x in inputs.items() if name != "labels"}
    ours = log_probabilities(of(model(**arguments)), inputs["labels"])
    with torch.no_grad():
        theirs = log_probabilities(of(reference(**arguments)), inputs["labels"])
    better, worse = (ours - theirs).chunk(2)
    return -F.logsigmoid(0.5 * (better - worse)).mean()


def preference_trainer(base: Any) -> Any:
    class Preference(base):
        """As in TRL: outputs are not supported; the model serves as its own reference, with other parameters."""

        reference: Any = None
        loss_is_scaled_for_ga = False

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Tensor:
            if return_outputs:
                raise ValueError("this trainer does not support returning outputs")
            return preferring(model, self.reference or model, inputs, lambda output: output.logits)

    return Preference


def test_a_preference_loss_of_its_own(tmp_path: Path) -> None:
    """Labels that lie as the loss says; the model itself, called without gradients as its reference, does not count."""
    from transformers import Trainer

    from fastfisher.integrations.transformers import FisherPenaltyMixin

    noted: list[dict[str, Tensor]] = []

    class Mine(FisherPenaltyMixin, preference_trainer(Trainer)):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
            noted.append({name: x.clone() for name, x in inputs.items()})
            return super().compute_loss(model, inputs, **kwargs)

    for own_reference in (True, False):
        noted.clear()
        model, expected, reference = model_of("gpt2"), model_of("gpt2"), model_of("gpt2").requires_grad_(False)
        before = flat([p.detach().clone() for p in model.parameters()])
        trainer = fisher_trainer(
            model, data_of("gpt2", 8), tmp_path, Mine, options={"method": "double_backprop"},
            gradient_accumulation_steps=2,
        )  # fmt: skip
        trainer.reference = None if own_reference else reference
        trainer.train()
        assert len(noted) == 4 and trainer.penalty.steps == 4
        from fastfisher.ops.sampled import new_key

        optimizer, drawn = torch.optim.SGD(expected.parameters(), lr=0.3), new_key(key(), torch.device("cpu"))
        for start in (0, 2):
            optimizer.zero_grad()
            for inputs in noted[start : start + 2]:
                loss = preferring(expected, expected if own_reference else reference, inputs, lambda o: o.logits)
                logits = expected(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
                total, _ = penalised(loss, logits, following(inputs["labels"]), expected, ALPHA, drawn)
                (total / 2).backward()
                drawn[1] += 1
            nn.utils.clip_grad_norm_(expected.parameters(), 0.2)
            optimizer.step()
        moved = [flat(list(m.parameters())) - before for m in (model, expected)]
        assert relative_error(*moved) < 1e-6


class Fused(nn.Module):
    """A causal model whose head makes the log-probabilities of the labels, and no logits, where that is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model_of("gpt2")
        self.config = self.inner.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Any = None, fused: bool = False) -> Any:
        output = self.inner(input_ids, attention_mask=attention_mask)
        if not fused:
            return output
        return {"log_probs": log_probabilities(output.logits, labels)}


def test_a_head_without_logits(tmp_path: Path) -> None:
    """R has a forward of its own, with the arguments that ``penalty_call`` says; the loss is the fused head's."""
    from transformers import Trainer

    from fastfisher.integrations.transformers import FisherPenaltyMixin

    class Likelihood(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Tensor:
            return -model(**inputs, fused=True)["log_probs"].mean()

    class Mine(FisherPenaltyMixin, Likelihood):
        def penalty_call(self, arguments: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
            noted.append(dict(arguments))
            labels = arguments.pop("labels")
            del arguments["fused"]
            return arguments, following(labels)

    class Unsaid(FisherPenaltyMixin, Likelihood):
        pass

    noted: list[dict[str, Any]] = []
    for options in ({"method": "double_backprop"}, STEP):
        noted.clear()
        torch.manual_seed(0)
        model, expected = Fused(), Fused()
        expected.load_state_dict(copy.deepcopy(model.state_dict()))
        before = flat([p.detach().clone() for p in model.parameters()])
        trainer = fisher_trainer(model, data_of("gpt2"), tmp_path, Mine, options=options)
        trainer.loss_is_scaled_for_ga = False
        trainer.train()
        assert len(noted) == 2
        from fastfisher.ops.sampled import new_key

        optimizer, drawn = torch.optim.SGD(expected.parameters(), lr=0.3), new_key(key(), torch.device("cpu"))
        for arguments in noted:
            optimizer.zero_grad()
            loss = -expected(**arguments)["log_probs"].mean()
            logits = expected(arguments["input_ids"], arguments["attention_mask"]).logits
            total, _ = penalised(loss, logits, following(arguments["labels"]), expected, ALPHA, drawn)
            total.backward()
            drawn[1] += 1
            nn.utils.clip_grad_norm_(expected.parameters(), 0.2)
            optimizer.step()
        moved = [flat(list(m.parameters())) - before for m in (model, expected)]
        assert relative_error(*moved) < 1e-5
    with pytest.raises(TypeError, match=r"got none when called with .*'fused'.*override penalty_call"):
        fisher_trainer(Fused(), data_of("gpt2"), tmp_path, Unsaid).train()


def test_two_heads_for_answers_are_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16,
    )  # fmt: skip
    data = [{"input_ids": x["input_ids"], "start_positions": 1, "end_positions": 2} for x in data_of("gpt2")]
    model = transformers.BertForQuestionAnswering(config)
    with pytest.raises(TypeError, match="A model with several heads of classes"):
        fisher_trainer(model, data, tmp_path).train()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("call", [0, 1])
@pytest.mark.parametrize("options", [{"method": "double_backprop"}, {"difference": "central", "step": 1e-5}])
def test_two_views_of_each_example(call: int, options: Any) -> None:
    """R is of the call that is named, in a loss that is made of both."""
    from fastfisher.ops.sampled import new_key

    model, expected = network(), network()
    source = torch.Generator().manual_seed(5)
    views = [torch.randn(8, 6, generator=source, dtype=torch.float64) for _ in range(2)]

    def loss_of(logits: list[Tensor]) -> Tensor:
        return (logits[0] - logits[1]).square().mean()

    penalty = FisherPenalty(model, ALPHA, every=1, generator=key(), **options)
    with penalty.watching(call) as forward:
        with torch.no_grad():
            model(views[0])
        loss = loss_of([model(view) for view in views])
    (loss + penalty.term(forward)).backward()
    logits = [expected(view) for view in views]
    drawn = new_key(key(), torch.device("cpu"))
    targets = torch.zeros(8, dtype=torch.int64)
    total, _ = penalised(loss_of(logits), logits[call], targets, expected, ALPHA, drawn)
    total.backward()
    found, wanted = (flat([p.grad for p in m.parameters()]) for m in (model, expected))  # type: ignore[misc]
    assert relative_error(found, wanted) < 1e-6
    with pytest.raises(ValueError, match=r"expected more than 2 finished calls of the model, saw 2"):
        with penalty.watching(2) as forward:
            loss_of([model(view) for view in views])
        penalty.term(forward)
    with pytest.raises(ValueError, match=r"saw 2; where it is called several times .*watching\(call=0\)"):
        with penalty.watching() as forward:
            loss_of([model(view) for view in views])
        penalty.term(forward)
    with pytest.raises(ValueError, match="call: expected an integer >= 0 or None, got -1"):
        penalty.watching(-1)


def test_lightning_with_two_views(tmp_path: Path) -> None:
    from fastfisher.integrations.lightning import FisherPenaltyCallback
    from tests.test_integrations import fit

    callback = FisherPenaltyCallback(ALPHA, network="model", call=1, every=1, generator=key())
    fit(lightning_module(network(), "twice"), [callback], tmp_path)
    assert callback.penalty is not None and callback.penalty.steps == 6


@pytest.mark.filterwarnings("ignore::fastfisher.SlowPathWarning")
@pytest.mark.parametrize("every", [1, 2])
def test_a_network_compiled_in_place(every: int) -> None:
    """``net.compile()``: the watched calls are seen, and the compiled code is there for the other steps."""
    runs: list[int] = []

    def backend(graph: Any, example_inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            runs.append(1)
            return graph(*args)

        return run

    class Net(nn.Module):  # PyTorch compiles no Sequential by itself
        def __init__(self) -> None:
            super().__init__()
            self.layers = network()

        def forward(self, x: Tensor) -> Any:
            return self.layers(x)

    model, expected = Net(), Net()
    model.compile(backend=backend)
    compiled = model._compiled_call_impl
    x, y = torch.randn(8, 6, generator=key(), dtype=torch.float64), torch.arange(8) % 3
    for m in (model, expected):
        penalty = FisherPenalty(m, ALPHA, every=every, generator=key(), difference="central", step=1e-5)
        for _ in range(4):
            with penalty.watching() as forward:
                loss = F.cross_entropy(m(x), y)
            (loss + penalty.term(forward, y)).backward()
    found, wanted = (flat([p.grad for p in m.parameters()]) for m in (model, expected))  # type: ignore[misc]
    assert relative_error(found, wanted) < 1e-9
    assert model._compiled_call_impl is compiled and len(runs) == (2 if every == 2 else 0)

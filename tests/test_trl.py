"""TRL's trainers with the mixin, as docs/frameworks.md has it: R's gradient at each step is that of double backprop.

They need TRL and datasets, which no extra of this package installs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support.networks import flat, relative_error
from tests.support.transformer_models import penalised

pytestmark = [
    pytest.mark.usefixtures("torchvision", "one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

WORDS = ["<pad>", "<eos>", "<unk>", "a", "b", "c", "d", "e", "f", "g"]
ROWS = {
    "SFT": [{"prompt": "a b c", "completion": " d e f"}, {"prompt": "a b", "completion": " d e f g"}] * 4,
    "DPO": [{"prompt": "a b c", "chosen": " d e f", "rejected": " g f"}] * 8,
    "GRPO": [{"prompt": "a b c"}] * 8,
}


def tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    raw = tokenizers.Tokenizer(words)
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def data_set(rows: list[dict[str, str]]) -> Any:
    datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    datasets.disable_caching()  # which would hash the data, and cannot beside every version of its packages
    return datasets.Dataset(datasets.table.InMemoryTable(pyarrow.Table.from_pylist(rows)), fingerprint="rows")


@pytest.mark.parametrize("kind", ["SFT", "DPO", "GRPO"])
def test_a_trainer_of_trl(kind: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from fastfisher.integrations.transformers import FisherPenaltyMixin

    class Penalised(FisherPenaltyMixin, getattr(trl, f"{kind}Trainer")):  # type: ignore[misc]
        def penalty_call(self, arguments: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
            labels = arguments.pop("labels")
            del arguments["fused_lm_head"]  # with which TRL's models return no logits
            return arguments, F.pad(labels[:, 1:], (0, 1), value=-100)

    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True,
        bf16=False, save_strategy="no", logging_steps=1, learning_rate=0.1, gradient_checkpointing=False, optim="sgd",
        **({"num_generations": 2, "max_completion_length": 6} if kind == "GRPO" else {"max_length": 16}),
    )  # fmt: skip
    given: dict[str, Any] = {"reward_funcs": lambda completions, **_: [float(len(c)) for c in completions]}
    if kind != "GRPO":
        given = {"ref_model": llama()} if kind == "DPO" else {}
    trainer = Penalised(
        model=llama(), args=arguments, train_dataset=data_set(ROWS[kind]), processing_class=tokenizer(), alpha=0.5,
        penalty_options={"every": 1, "method": "double_backprop", "generator": torch.Generator().manual_seed(3)},
        **given,
    )  # fmt: skip
    inner, errors, counted = trainer.penalty.term, [], []

    def checked(forward: Any, targets: Tensor, *, inputs: dict[str, Any]) -> Tensor:
        term: Tensor = inner(forward, targets, inputs=inputs)
        model = trainer.model
        logits = model(**inputs).logits
        total, _ = penalised(0 * logits.sum(), logits, targets, model, 0.5, trainer.penalty.state_dict()["key"])
        wanted = torch.autograd.grad(total, list(model.parameters()))
        found = torch.autograd.grad(term, list(model.parameters()), retain_graph=True)
        errors.append(relative_error(flat(list(found)), flat(list(wanted))))
        counted.append(int((targets != -100).sum()))
        return term

    trainer.penalty.term = checked
    trainer.train()
    assert len(errors) == 2 and max(errors) < 1e-4
    # Completions with their ends: of SFT 4 and 5 tokens, in one order or the other; of DPO twice 4 and 3; of GRPO any.
    possible = {"SFT": {8, 9, 10}, "DPO": {14}, "GRPO": set(range(2, 13))}
    assert set(counted) <= possible[kind], counted
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[-1]["fisher_penalty"] > 0

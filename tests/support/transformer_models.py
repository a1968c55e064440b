"""Tiny models of Transformers from configurations, batches for them, and their penalty by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfisher.labels import Rows, labels_of
from fastfisher.likelihoods.categorical import CATEGORICAL

VOCABULARY, LENGTH = 11, 6
KINDS = ("gpt2", "llama", "bart", "t5", "bert", "bert classifier", "vit")


def model_of(kind: str) -> Any:
    """One layer of width 8, in float64, without dropout, in train mode; "bert …" with another ``problem_type``."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    family, _, variant = kind.partition(" ")
    common = {"vocab_size": VOCABULARY, "attn_implementation": "eager"}
    bert = {
        "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": "eager",
    }  # fmt: skip
    made: Any
    if family == "gpt2":
        config = transformers.GPT2Config(
            n_positions=16, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=0, eos_token_id=0, **common,
        )  # fmt: skip
        made = transformers.GPT2LMHeadModel(config)
    elif family == "llama":
        config = transformers.LlamaConfig(
            hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
            max_position_embeddings=16, pad_token_id=0, bos_token_id=0, eos_token_id=0, **common,
        )  # fmt: skip
        made = transformers.LlamaForCausalLM(config)
    elif family == "bart":
        config = transformers.BartConfig(
            d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16, dropout=0.0, pad_token_id=1,
            bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2, **common,
        )  # fmt: skip
        made = transformers.BartForConditionalGeneration(config)
    elif family == "t5":
        config = transformers.T5Config(
            d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
            decoder_start_token_id=0, **common,
        )  # fmt: skip
        made = transformers.T5ForConditionalGeneration(config)
    elif kind == "bert":
        made = transformers.BertForMaskedLM(
            transformers.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **bert)
        )
    elif family == "bert":
        problem = {"regression": "regression", "multi-label": "multi_label_classification"}.get(variant)
        config = transformers.BertConfig(
            vocab_size=VOCABULARY, max_position_embeddings=16, num_labels=3, problem_type=problem, **bert
        )
        made = transformers.BertForSequenceClassification(config)
    else:
        made = transformers.ViTForImageClassification(
            transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=3, **bert)
        )
    if kind == "gpt2":
        made.loss_type = "ForCausalLM"  # without it the Trainer divides by the number of labels before the shift
    return made.double().train()


def data_of(kind: str, examples: int = 4) -> list[dict[str, Tensor]]:
    """Examples as the default collator takes them; those of language models have labels of −100."""
    source = torch.Generator().manual_seed(3)
    classes = torch.arange(examples) % 3
    if kind == "vit":
        pixels = torch.randn(examples, 1, 8, 8, generator=source, dtype=torch.float64)
        return [{"pixel_values": x, "labels": y} for x, y in zip(pixels, classes, strict=True)]
    tokens = torch.randint(3, VOCABULARY, (examples, LENGTH), generator=source)
    other = torch.randint(3, VOCABULARY, (examples, LENGTH), generator=source)
    labels = tokens.clone() if kind in ("gpt2", "llama") else other
    labels[0, 4:], labels[2, :3] = -100, -100
    if kind.startswith("bert "):
        labels = classes if kind == "bert classifier" else F.one_hot(classes, 3).double()
    mask = torch.ones_like(tokens)
    return [{"input_ids": x, "attention_mask": m, "labels": y} for x, m, y in zip(tokens, mask, labels, strict=True)]


def batch_of(kind: str, examples: int = 4) -> dict[str, Tensor]:
    """The same as one batch."""
    data = data_of(kind, examples)
    return {name: torch.stack([example[name] for example in data]) for name in data[0]}


def targets_of(kind: str, labels: Tensor) -> Tensor:
    """What the logits of each row are compared with, written down for each model."""
    return F.pad(labels[:, 1:], (0, 1), value=-100) if kind in ("gpt2", "llama") else labels


def penalised(
    loss: Tensor, logits: Tensor, targets: Tensor, model: nn.Module, alpha: float, key: Tensor
) -> tuple[Tensor, Tensor]:
    """loss + α·R by double backprop through the very forward that made them, and R, at labels drawn with the key."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    drawn, _ = labels_of("sampled").loss(Rows(CATEGORICAL, logits, targets, key))
    gradients = torch.autograd.grad(drawn, parameters, create_graph=True, allow_unused=True)
    squared = torch.stack([g.square().sum() for g in gradients if g is not None]).sum()
    return loss + alpha * squared, squared.detach()

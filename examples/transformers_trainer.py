"""Transformers: the Fisher penalty in a Trainer, on a small causal language model made from a configuration."""

import argparse

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from fastfisher.integrations.transformers import FisherPenaltyTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--out", default="trainer_output")
arguments = parser.parse_args()

tokens = (torch.arange(256)[:, None] * 7 + torch.arange(16) ** 2) % 50  # counts that grow by odd numbers
data = [{"input_ids": row, "labels": row} for row in tokens]
model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=1, n_head=2))
settings = TrainingArguments(
    arguments.out, max_steps=arguments.steps, per_device_train_batch_size=16, gradient_accumulation_steps=2,
    logging_steps=5, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
)  # fmt: skip
trainer = FisherPenaltyTrainer(model=model, args=settings, train_dataset=data, alpha=0.1, penalty_options={"every": 2})
trainer.train()
print(f"R = {trainer.penalty.value:.4f}, Tr(F) per position = {trainer.penalty.trace_estimate:.2f}")

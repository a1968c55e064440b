"""A character-level GPT learns the Zen of Python, without and with the Fisher penalty: loss and Tr(F) in a picture.

The text ships with Python (``import this``) and the model is made from a configuration: nothing is downloaded.
"""

import argparse
import codecs
import contextlib
import io

import matplotlib
import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments, set_seed

from fastfisher.integrations.transformers import FisherPenaltyTrainer, FisherTraceCallback

with contextlib.redirect_stdout(io.StringIO()):
    import this

matplotlib.use("Agg")
from matplotlib import pyplot as plt

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--alphas", type=float, nargs="+", default=[0.0, 0.1])
parser.add_argument("--length", type=int, default=32, help="characters that the model sees at a time")
parser.add_argument("--out", default="char_gpt.png")
arguments = parser.parse_args()

text = codecs.decode(this.s, "rot13")
letters = sorted(set(text))
encoded = torch.tensor([letters.index(letter) for letter in text])
windows = encoded.unfold(0, arguments.length, 4)
targets = torch.nn.functional.pad(windows[:, 1:], (0, 1), value=-100)
every = max(1, arguments.steps // 15)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5))
for alpha in arguments.alphas:
    set_seed(0)
    config = GPT2Config(
        vocab_size=len(letters), n_positions=arguments.length, n_embd=64, n_layer=2, n_head=4, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    settings = TrainingArguments(
        "unused", max_steps=arguments.steps, per_device_train_batch_size=16, learning_rate=1e-3, logging_steps=every,
        report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, log_level="error",
    )  # fmt: skip
    trainer = FisherPenaltyTrainer(
        model=GPT2LMHeadModel(config), args=settings, train_dataset=[{"input_ids": w, "labels": w} for w in windows],
        alpha=alpha, callbacks=[FisherTraceCallback(every, (windows[:64], targets[:64]))],
    )  # fmt: skip
    trainer.train()
    for axes, name in ((left, "loss"), (right, "fisher_trace")):
        points = [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]
        axes.plot(*zip(*points, strict=True), label=f"α = {alpha:g}")
left.set(xlabel="step", ylabel="training loss per character")
right.set(xlabel="step", ylabel=f"Tr(F) of {arguments.length} characters", yscale="log")
right.legend()
figure.tight_layout()
figure.savefig(arguments.out, dpi=120)
print(f"{arguments.out}: loss and Tr(F) at α = {', '.join(f'{a:g}' for a in arguments.alphas)}")

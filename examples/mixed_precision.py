"""Autocast in float16 with a GradScaler, and gradients accumulated over micro-batches.

``python examples/mixed_precision.py``. In bfloat16 no scaler is needed: leave ``scaler`` out.
"""

import warnings

import torch
from sklearn.datasets import load_digits
from torch import nn

import fastfisher

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
digits = load_digits()
images = (torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1).to(device)
labels = torch.tensor(digits.target, device=device)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
model.to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
scaler = torch.amp.GradScaler(device)
micro_batches = 2
# R's two gradients are taken in float32, because rounding would hide their difference; this is said once.
warnings.simplefilter("ignore", fastfisher.SlowPathWarning)
# R is that of a micro-batch, k times as large in expectation: α/k penalises as much as α on the whole batch.
penalty = fastfisher.FisherPenalty(model, alpha=0.1 / micro_batches, scaler=scaler)

for epoch in range(8):
    for batch in torch.randperm(1500).split(100):
        optimizer.zero_grad()
        for part in batch.chunk(micro_batches):
            with torch.autocast(device, dtype=torch.float16):
                loss = penalty.backward(images[part], labels[part], weight=1 / micro_batches)
        scaler.unscale_(optimizer)  # only for the clipping
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        scaler.step(optimizer)
        scaler.update()
    with torch.no_grad():
        accuracy = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean()
    print(f"epoch {epoch}: loss {loss:.3f}, test accuracy {accuracy:.3f}, scale {scaler.get_scale():.0f}")

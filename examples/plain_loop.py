"""The Fisher penalty in a plain loop: three lines, marked. ``python examples/plain_loop.py``"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import fastfisher  # 1

torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(digits.target)
model = nn.Sequential(
    nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
penalty = fastfisher.FisherPenalty(model, alpha=0.1)  # 2

for epoch in range(3):
    for batch in torch.randperm(1500).split(50):
        optimizer.zero_grad()
        loss = penalty.backward(images[batch], labels[batch])  # 3, instead of loss = …; loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    with torch.no_grad():
        accuracy = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean()
    trace = penalty.trace_estimate
    print(f"epoch {epoch}: loss {loss:.3f}, test accuracy {accuracy:.3f}, Tr(F) about {trace:.1f}")

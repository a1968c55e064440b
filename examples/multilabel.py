"""Several yes-or-no labels for each image, with the Fisher penalty. ``python examples/multilabel.py``"""

import statistics
import time

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import fastfisher

torch.manual_seed(0)
torch.set_num_threads(1)
digits = load_digits()
images, classes = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(digits.target)
ALL = ([0, 2, 4, 6, 8], [2, 3, 5, 7], [5, 6, 7, 8, 9], [0, 6, 8, 9])  # even, prime, at least five, with a loop
labels = torch.stack([torch.isin(classes, torch.tensor(some)) for some in ALL], 1)  # (N, 4)
model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Flatten(), nn.Linear(1024, 4),
)  # fmt: skip
parameters = list(model.parameters())
optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
penalty = fastfisher.FisherPenalty(model, alpha=0.1, every=1, likelihood="bernoulli")


def gradient(way, x, y):
    """Fills .grad: without a penalty, by the library, or as people write it."""
    model.zero_grad()
    if way == "fastfisher":
        penalty.backward(x, y)
        return
    logits = model(x)
    loss = F.binary_cross_entropy_with_logits(logits, y.float())
    if way == "by hand":
        drawn = torch.bernoulli(logits.detach().sigmoid())
        at_drawn = F.binary_cross_entropy_with_logits(logits, drawn)
        g = torch.autograd.grad(at_drawn, parameters, create_graph=True)
        loss = loss + 0.1 * sum(part.square().sum() for part in g)
    loss.backward()


for _ in range(2):
    for batch in torch.randperm(1500).split(50):
        gradient("fastfisher", images[batch], labels[batch])
        optimizer.step()
with torch.no_grad():
    accuracy = ((model(images[1500:]) > 0) == labels[1500:]).float().mean()
print(f"Tr(F) = {fastfisher.trace_fisher(model, images[:1500], likelihood='bernoulli')}")

seconds = {"plain": [], "fastfisher": [], "by hand": []}
for _ in range(9):
    for way, taken in seconds.items():
        start = time.process_time()
        gradient(way, images[:128], labels[:128])
        taken.append(time.process_time() - start)
plain, ours, theirs = (statistics.median(taken) for taken in seconds.values())
print(f"multi-label: {ours / plain:.2f} plain steps, by hand {theirs / plain:.2f}; test accuracy {accuracy:.3f}")

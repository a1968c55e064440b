"""A class for each pixel, logits (N, C, H, W), with the Fisher penalty. ``python examples/segmentation.py``"""

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
ink = images[:, 0] > 0
pixels = torch.where(ink, 1 + classes[:, None, None] % 2, 0)  # background, even, odd: (N, 8, 8)
pixels[(images[:, 0].abs() < 0.2)] = 255  # neither ink nor background: does not count
model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=2, dilation=2), nn.ReLU(),
    nn.Conv2d(64, 64, 3, padding=2, dilation=2), nn.ReLU(), nn.Conv2d(64, 3, 1),
)  # fmt: skip
parameters = list(model.parameters())
optimizer = torch.optim.SGD(parameters, lr=0.2, momentum=0.9)
without = fastfisher.Categorical(ignore_index=255)
penalty = fastfisher.FisherPenalty(model, alpha=0.1, every=1, likelihood=without, class_dim=1)


def gradient(way, x, y):
    """Fills .grad: without a penalty, by the library, or as people write it."""
    model.zero_grad()
    if way == "fastfisher":
        penalty.backward(x, y)
        return
    logits = model(x)
    loss = F.cross_entropy(logits, y, ignore_index=255)
    if way == "by hand":
        drawn = torch.distributions.Categorical(logits=logits.detach().movedim(1, -1)).sample()
        at_drawn = F.cross_entropy(logits, drawn.masked_fill(y == 255, 255), ignore_index=255)
        g = torch.autograd.grad(at_drawn, parameters, create_graph=True)
        loss = loss + 0.1 * sum(part.square().sum() for part in g)
    loss.backward()


for _ in range(2):
    for batch in torch.randperm(1500).split(50):
        gradient("fastfisher", images[batch], pixels[batch])
        optimizer.step()
with torch.no_grad():
    right, counts = model(images[1500:]).argmax(1) == pixels[1500:], pixels[1500:] != 255
print(f"Tr(F) = {fastfisher.trace_fisher(model, (images[:500], pixels[:500]), likelihood=without, class_dim=1)}")

seconds = {"plain": [], "fastfisher": [], "by hand": []}
for _ in range(9):
    for way, taken in seconds.items():
        start = time.process_time()
        gradient(way, images[:64], pixels[:64])
        taken.append(time.process_time() - start)
plain, ours, theirs = (statistics.median(taken) for taken in seconds.values())
accuracy = right[counts].float().mean()
print(f"segmentation: {ours / plain:.2f} plain steps, by hand {theirs / plain:.2f}; test accuracy {accuracy:.3f}")

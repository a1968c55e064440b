"""A regression with the norm of its gradient penalised, and its curvature. ``python examples/regression.py``"""

import statistics
import time

import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.nn import functional as F

import fastfisher

torch.manual_seed(0)
torch.set_num_threads(1)
data = load_diabetes()
inputs, targets = torch.tensor(data.data, dtype=torch.float32) * 20, torch.tensor(data.target, dtype=torch.float32)
targets = ((targets - targets.mean()) / targets.std())[:, None]  # (N, 1), as the output
train, test = torch.randperm(len(inputs)).tensor_split([352])
model = nn.Sequential(nn.Linear(10, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
penalty = fastfisher.GradientPenalty(model, F.mse_loss, alpha=0.1)


def gradient(way, x, y):
    """Fills .grad: without a penalty, by the library, or as people write it."""
    model.zero_grad()
    if way == "fastfisher":
        penalty.backward(x, y)
    elif way == "by hand":
        loss = F.mse_loss(model(x), y)
        g = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        (loss + 0.1 * sum(part.square().sum() for part in g)).backward()
    else:
        F.mse_loss(model(x), y).backward()


for _ in range(10):
    for batch in train[torch.randperm(len(train))].split(88):
        gradient("fastfisher", inputs[batch], targets[batch])
        optimizer.step()
with torch.no_grad():
    explained = 1 - F.mse_loss(model(inputs[test]), targets[test]) / targets[test].var()
squared_error = fastfisher.Gaussian(variance=0.5)  # whose loss is F.mse_loss
fisher = fastfisher.trace_fisher(model, inputs[train], likelihood=squared_error, labels="exact")
hessian = fastfisher.trace_hessian(model, inputs[train], targets[train], likelihood=squared_error)
print(f"R² on test data {explained:.3f}, Tr(F) = {fisher.value:.3f}, Tr(H) = {hessian.value:.3f}")

seconds = {"plain": [], "fastfisher": [], "by hand": []}
for _ in range(25):
    for way, taken in seconds.items():
        start = time.process_time()
        gradient(way, inputs[train], targets[train])
        taken.append(time.process_time() - start)
plain, ours, theirs = (statistics.median(taken) for taken in seconds.values())
print(f"regression: {ours / plain:.2f} plain steps, by hand {theirs / plain:.2f}; R² {explained:.3f}")

"""WGAN-GP and R1 on digits: the penalty is a term of the critic's loss. ``python examples/wgan_gp.py``"""

import statistics
import sys
import time

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import fastfisher

torch.manual_seed(0)
torch.set_num_threads(1)
digits = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
digits = F.interpolate(digits, size=16, mode="bilinear")
critic = nn.Sequential(
    nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 128, 3, 2, 1), nn.ReLU(),
    nn.Conv2d(128, 256, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4096, 1),
)  # fmt: skip
generator = nn.Sequential(nn.Linear(16, 512), nn.ReLU(), nn.Linear(512, 256), nn.Tanh(), nn.Unflatten(1, (1, 16, 16)))
optimizers = [torch.optim.Adam(net.parameters(), 2e-4, betas=(0.5, 0.9)) for net in (critic, generator)]
wgan_gp = fastfisher.GradientPenalty(critic, lambda out, _: out[:, 0], 10.0, wrt="inputs", of=lambda n: (n - 1) ** 2)
r1 = fastfisher.GradientPenalty(critic, lambda out, _: out[:, 0], 5.0, wrt="inputs")


def gradient(way, kind, real, fake, points):
    """Fills .grad of the critic: without a penalty, by ``term``, or as people write it."""
    critic.zero_grad()
    loss = critic(fake).mean() - critic(real).mean()
    if way == "term":
        loss = loss + kind.term(points)
    elif way == "by hand":
        x = points.clone().requires_grad_()
        (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        norms = g.flatten(1).norm(dim=1)
        loss = loss + kind.alpha * (norms - (1 if kind is wgan_gp else 0)).square().mean()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in critic.parameters()])


for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 200):
    real, fake, share = digits[torch.randint(1797, (64,))], generator(torch.randn(64, 16)), torch.rand(64, 1, 1, 1)
    between = share * real + (1 - share) * fake.detach()
    gradient("term", wgan_gp, real, fake.detach(), between)
    optimizers[0].step()
    generator.zero_grad()
    (-critic(fake).mean()).backward()
    optimizers[1].step()

for name, kind, points in (("WGAN-GP", wgan_gp, between), ("R1", r1, real)):
    seconds, found = {"plain": [], "term": [], "by hand": []}, {}
    for _ in range(9):
        for way, taken in seconds.items():
            start = time.process_time()
            found[way] = gradient(way, kind, real, fake.detach(), points)
            taken.append(time.process_time() - start)
    plain, ours, theirs = (statistics.median(taken) for taken in seconds.values())
    cosine = torch.cosine_similarity(found["term"], found["by hand"], dim=0)
    print(f"{name}: {ours / plain:.2f} plain steps, by hand {theirs / plain:.2f}; cosine {cosine:.4f}")

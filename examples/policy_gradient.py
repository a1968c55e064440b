"""A policy gradient on a small causal model, its frozen reference beside it. ``python examples/policy_gradient.py``"""

import copy
import statistics
import time
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastfisher


class Causal(nn.Module):
    """12 tokens, 16 places, one layer of causal attention with two heads."""

    def __init__(self):
        super().__init__()
        self.token, self.place, self.mix = nn.Embedding(12, 64), nn.Embedding(16, 64), nn.Linear(64, 192)
        self.head = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 12))

    def forward(self, tokens):
        """The logits of what follows each token."""
        h = self.token(tokens) + self.place.weight[: tokens.shape[1]]
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.mix(h).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(h + attended.transpose(1, 2).flatten(-2))


def chosen(model, tokens):
    """The log-probabilities of the tokens."""
    return model(tokens[:, :-1]).log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]


@torch.no_grad()
def sample(count):
    """Sequences of the policy, and rewards: how often a token is one more than the last."""
    tokens = torch.zeros(count, 1, dtype=torch.long)
    while tokens.shape[1] < 16:
        tokens = torch.cat([tokens, policy(tokens)[:, -1].softmax(-1).multinomial(1)], 1)
    return tokens, chosen(policy, tokens), (tokens.diff() % 12 == 1).float().mean(1)


def surrogate(tokens, old, reward):
    """Clipped, and with a pull towards the reference."""
    new = chosen(policy, tokens)
    apart = chosen(reference, tokens) - new
    ratio, gain = (new - old).exp(), (reward - reward.mean())[:, None] / (reward.std() + 1e-3)
    return -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean() + 0.02 * (apart.exp() - 1 - apart).mean()


def gradient(way, *batch):
    """Fills .grad: without a penalty, by the library, or as people write it."""
    policy.zero_grad()
    if way == "fastfisher":
        penalty.step(lambda: surrogate(*batch))
        return
    # Fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH) if way == "by hand" else nullcontext():
        loss = surrogate(*batch)
        if way == "by hand":
            g = torch.autograd.grad(loss, list(policy.parameters()), create_graph=True)
            loss = loss + 0.01 * sum(part.square().sum() for part in g)
        loss.backward()


torch.manual_seed(0)
torch.set_num_threads(1)
policy = Causal()
reference = copy.deepcopy(policy).requires_grad_(False)
optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3)
penalty = fastfisher.GradientPenalty(policy, None, alpha=0.01)
for _ in range(60):
    batch = sample(64)
    gradient("fastfisher", *batch)
    optimizer.step()
mean, seconds = sample(256)[2].mean(), {"plain": [], "fastfisher": [], "by hand": []}
for _ in range(15):
    for way, taken in seconds.items():
        start = time.process_time()
        gradient(way, *batch)
        taken.append(time.process_time() - start)
plain, ours, theirs = (statistics.median(taken) for taken in seconds.values())
print(f"policy gradient: {ours / plain:.2f} plain steps, by hand {theirs / plain:.2f}; mean reward {mean:.3f}")

"""Uses of parameters that are easily missed, against one backward per example in float64; and nothing is kept."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastfisher
from fastfisher import per_example_grad_norms
from tests.measure.test_traces import data_for, per_example_gradients

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::fastfisher.SlowPathWarning")]


class Uses(nn.Module):
    """[N, 6] to logits [N, 4] by way of ``function(model, h)``, h = tanh of a linear layer."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.LazyLinear(4)
        self.p, self.q, self.w = (
            nn.Parameter(torch.randn(6)),
            nn.Parameter(torch.randn(6)),
            nn.Parameter(torch.randn(6, 6)),
        )
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self, torch.tanh(self.first(x))))


def assigned(m: Any, h: Tensor) -> Tensor:
    z = m.second(h)
    z[:, :3] = h[:, :3] * m.p[:3]
    return z


def parameter_assigned(m: Any, h: Tensor) -> Tensor:
    z = h * 1
    z[:, 2:4] = m.p[2:4]
    z[:, 0] = m.q[1] * h[:, 1]
    return z


def buffer_of_parameters(m: Any, h: Tensor) -> Tensor:
    buffer = torch.zeros(6, dtype=h.dtype)
    buffer[:3].copy_(m.p[:3])
    buffer[2:].mul_(m.q[2:]).add_(m.q[:4], alpha=0.3)
    return F.linear(h, m.w * buffer) + buffer


def changed_through_a_view(m: Any, h: Tensor) -> Tensor:
    w = m.w.clone()
    w[0].mul_(m.p)
    w.T[1].add_(m.q)
    return F.linear(h, w)


def examples_in_a_buffer_of_parameters(m: Any, h: Tensor) -> Tensor:
    buffer = m.p.expand(len(h), 6).clone()
    view = buffer[:, 1:]
    view[:, :3] = h[:, :3]
    return torch.tanh(m.second(buffer)) + buffer * m.q


def examples_in_a_plain_buffer(m: Any, h: Tensor) -> Tensor:
    buffer = torch.zeros_like(h)
    buffer[:, :4] = h[:, :4]
    buffer[:, 4:].add_(m.p[:2])
    return m.second(buffer)


def keywords(m: Any, h: Tensor) -> Tensor:
    z = torch.add(input=h, other=m.p, alpha=0.5)
    z = torch.rsub(z, other=m.q, alpha=0.3) + torch.rsub(m.p, z, alpha=2)
    z = torch.matmul(input=z, other=m.w)
    z = F.linear(weight=m.w, input=z, bias=m.q)
    z = F.layer_norm(input=z, weight=m.norm.weight, bias=m.norm.bias, normalized_shape=[6])
    return torch.addmm(mat1=z, mat2=m.w, input=m.p, beta=2.0)


def convolved(m: Any, h: Tensor) -> Tensor:
    z = torch.conv1d(weight=m.w[:, None, :3], input=h[:, None], padding=1, bias=m.p)
    z = F.conv1d(z, m.w[:2, :6, None], stride=2)
    return F.batch_norm(z, running_mean=torch.zeros(2, dtype=h.dtype), running_var=torch.ones(2, dtype=h.dtype),
                        weight=m.p[:2], bias=m.q[:2], training=False).flatten(1)  # fmt: skip


def rows_of_its_own(m: Any, h: Tensor) -> Tensor:
    return (
        h * m.p.repeat(len(h), 1)
        + torch.stack([m.q] * len(h))
        + F.embedding(torch.arange(2).repeat(len(h), 1), m.w).sum(1)
    )


def permuted(m: Any, h: Tensor) -> Tensor:
    order = torch.randperm(len(h), generator=torch.Generator().manual_seed(0))
    return (m.second(h[order]) * m.p).tanh()[order.argsort()]


def sorted_by_the_examples(m: Any, h: Tensor) -> Tensor:
    order = h[:, 0].argsort()
    return m.norm(m.second(h[order]).tanh())[order.argsort()]


def experts(m: Any, h: Tensor) -> Tensor:
    tokens = torch.stack([h, h.flip(1), h.roll(2, 1)], 1).reshape(-1, 6)
    gate = (tokens @ m.w[:, :3]).softmax(-1)
    best, which = gate.max(-1)
    out = torch.zeros_like(tokens)
    for k, layer in enumerate([m.first, m.second, lambda z: F.linear(z, m.w, m.p)]):
        mine = which == k
        out[mine] = layer(tokens[mine]).tanh() * best[mine, None]
    return out.view(len(h), -1)


def taken_within(m: Any, h: Tensor) -> Tensor:
    x = h.detach().requires_grad_()
    (force,) = torch.autograd.grad((torch.tanh(m.second(x)) * m.p).sum(), x, create_graph=True)
    return force * m.q


def by_a_transform(m: Any, h: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.grad(lambda z: (torch.tanh(F.linear(z, m.w, m.p)) * m.q).sum()))(h)


def without_a_formula(m: Any, h: Tensor) -> Tensor:
    z = torch.einsum("ni,ij,nj->nj", h, m.w, h)
    return torch.cdist(z, m.w) + (m.w @ z.mT).mT


def by_einsum(m: Any, h: Tensor) -> Tensor:
    x = h.view(-1, 2, 3)
    y = torch.einsum("nij,jk->nik", x, m.w[:3, :4]) + torch.einsum("ko, bij, jk -> bio", m.w[:4, :4], x, m.w[:3, 2:])
    z = torch.einsum("jk,njk->nk", m.w[:2, :3], x) + torch.einsum("nij,nij,j->nj", x, x, m.p[:3])
    folded = torch.einsum("ri,ij->rj", x.reshape(-1, 3), m.w[:3, :3]).view(len(h), -1)
    inner = torch.einsum("ri,ij->rj", x.transpose(0, 1).reshape(-1, 3), m.w[3:, 3:]).view(2, len(h), -1)
    implicit = torch.einsum("ai,ij", h, m.w) + torch.einsum("...i,ij->...j", h, m.w)
    return torch.cat([y.flatten(1), z, folded, inner.transpose(0, 1).flatten(1), implicit], 1)


def batched_products(m: Any, h: Tensor) -> Tensor:
    x = h.view(-1, 2, 1, 3)
    heads = m.w[:4].view(2, 3, 4)
    y = x @ heads + torch.matmul(x, heads[None]) + torch.matmul(x, heads.expand(len(h), 2, 3, 4))
    rows = torch.bmm(x.reshape(-1, 1, 3), heads.repeat(len(h), 1, 1)).view_as(y)
    other = torch.bmm(m.w.expand(len(h), 6, 6), h[..., None]).flatten(1)
    return torch.cat([(y + rows).flatten(1), other], 1)


def biased_scores(m: Any, h: Tensor) -> Tensor:
    q = h.view(-1, 1, 3, 2)
    found = F.scaled_dot_product_attention(q, q, q, attn_mask=m.w[None, None, :3, :3])
    return (found + F.scaled_dot_product_attention(q, q, q, m.w[3:, 3:].expand(len(h), 1, 3, 3))).flatten(1)


def checkpointed(m: Any, h: Tensor) -> Tensor:
    def block(z: Tensor) -> Tensor:
        return torch.tanh(checkpoint(m.second, z * m.p, use_reentrant=False))

    return checkpoint(block, h, use_reentrant=False)


def in_low_rank(m: Any, h: Tensor) -> Tensor:
    return h @ (m.w[:, :2] @ m.w[:2]) + F.linear(F.linear(h, m.w[2:4]), m.w[:, 2:4])


def bags(m: Any, h: Tensor) -> Tensor:
    tokens = (h.detach() * 7).long().abs() % 6
    sums = F.embedding_bag(tokens, m.w, mode="sum", padding_idx=1)
    weighted = F.embedding_bag(tokens, m.w, per_sample_weights=h, mode="sum")
    largest = F.embedding_bag(tokens, m.w, mode="max")
    fixed = F.embedding_bag(tokens, m.w, per_sample_weights=h.detach(), mode="sum")
    return sums + weighted + largest + fixed


def bags_of_any_length(m: Any, h: Tensor) -> Tensor:
    tokens = (h.detach() * 7).long().abs() % 6
    counts = tokens[:, 0] + 1
    flat = torch.cat([row[:count] for row, count in zip(tokens, counts.tolist(), strict=True)])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return F.embedding_bag(flat, m.w, offsets, mode="mean", include_last_offset=True)


def bilinear(m: Any, h: Tensor) -> Tensor:
    return F.bilinear(h, h.flip(1), m.w.view(6, 2, 3).repeat(1, 3, 2), m.p)


def one_example_after_the_other(m: Any, h: Tensor) -> Tensor:
    """Of each example as many positions as there may be examples: none of them is told by its shape."""
    return torch.stack([torch.tanh(F.linear(e.outer(m.p), m.w)).sum(0) for e in h])


def one_call_for_each_example(m: Any, h: Tensor) -> Tensor:
    return torch.cat([m.second(e.expand(len(h), 6) * m.q).mean(0, keepdim=True) for e in h])


USES = [
    one_example_after_the_other,
    one_call_for_each_example,
    assigned, parameter_assigned, buffer_of_parameters, changed_through_a_view, examples_in_a_buffer_of_parameters,
    examples_in_a_plain_buffer, keywords, convolved, rows_of_its_own, permuted, sorted_by_the_examples, experts,
    taken_within, by_a_transform, without_a_formula, by_einsum, batched_products, biased_scores, checkpointed,
    in_low_rank, bags, bags_of_any_length, bilinear,
]  # fmt: skip


@pytest.mark.parametrize("examples", [1, 2, 5, 6])
@pytest.mark.parametrize("function", USES)
def test_every_use_is_seen(function: Any, examples: int) -> None:
    torch.manual_seed(3)
    x, y = data_for((6,), examples)
    model = Uses(function)
    model(x.float())
    model.double()
    gradients = per_example_gradients(model, x, y)
    expected = {name: g.flatten(1).square().sum(1) for name, g in gradients.items()}
    found = per_example_grad_norms(model, x, y, labels="true")
    torch.testing.assert_close(found, torch.stack(list(expected.values())).sum(0), rtol=1e-9, atol=1e-12)
    each = fastfisher.trace_fisher(model, (x, y), labels="true").per_parameter
    for name, squared in expected.items():
        assert each[name] == pytest.approx(float(squared.mean()), rel=1e-8, abs=1e-12), name


class Spectral(nn.Module):
    """Complex weights between two Fourier transforms, used three times, and a complex linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.a = (nn.Parameter(torch.randn(n, 5, dtype=torch.cdouble)) for n in (1, 5))
        self.head = nn.Linear(8, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        z = torch.fft.rfft(x, dim=1) * self.w
        z = F.linear(z * self.w.conj(), self.a) + self.w
        return self.head(torch.fft.irfft(z, n=8, dim=1))


def test_complex_weights() -> None:
    torch.manual_seed(0)
    model, (x, y), (v, z) = Spectral(), data_for((8,), 5), data_for((8,), 5)
    v = v.flip(1)
    g, h = (
        torch.cat([torch.view_as_real(t).flatten(1) if t.is_complex() else t.flatten(1) for t in found.values()], 1)
        for found in (per_example_gradients(model, i, t) for i, t in ((x, y), (v, z)))
    )
    norms = per_example_grad_norms(model, x, y, labels="true")
    torch.testing.assert_close(norms, g.square().sum(1), rtol=1e-10, atol=0)
    products = fastfisher.grad_inner_products(model, (x, y), (v, z))
    assert products.per_example is not None
    torch.testing.assert_close(products.per_example, (g * h).sum(1), rtol=1e-9, atol=1e-12)
    assert products.mean == pytest.approx(float(g.mean(0) @ h.mean(0)), rel=1e-9)
    for size in (None, 2):
        rows = g if size is None else g[:4].view(2, 2, -1).mean(1)
        covariance = fastfisher.gradient_covariance(model, (x, y), batch_size=size)
        assert covariance.trace == pytest.approx(float((rows - rows.mean(0)).square().sum(1).mean()), rel=1e-9)


def test_sparse_embeddings() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.bags = nn.Embedding(9, 6, sparse=True), nn.EmbeddingBag(9, 6, sparse=True)
            self.head = nn.Linear(6, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.tanh(self.words(tokens).mean(1) + self.bags(tokens)))

    torch.manual_seed(0)
    model, tokens, y = Words().double(), torch.randint(9, (5, 4)), torch.arange(5) % 4
    parameters = list(model.parameters())
    expected = []
    for i in range(5):
        loss = F.cross_entropy(model(tokens[i : i + 1]), y[i : i + 1])
        expected.append(sum(float(g.to_dense().square().sum()) for g in torch.autograd.grad(loss, parameters)))
    torch.testing.assert_close(
        per_example_grad_norms(model, tokens, y, labels="true"), torch.tensor(expected, dtype=torch.float64)
    )


def test_reentrant_checkpoints_are_refused() -> None:
    model = Uses(lambda m, h: checkpoint(m.second, h, use_reentrant=True))
    x, y = data_for((6,))
    model(x.float())
    for verify in (True, False):
        with pytest.raises(NotImplementedError, match="use_reentrant=False"):
            per_example_grad_norms(model.double(), x, y, labels="true", verify=verify)
    assert all(p.grad is None for p in model.parameters())


def test_in_inference_mode() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x, y = data_for((6,))
    z = torch.tensor([3, 1, 0, 2, 2])
    measures: list[Callable[[Tensor, Tensor], float]] = [
        lambda x, y: float(per_example_grad_norms(model, x, y, labels="true").sum()),
        lambda x, y: fastfisher.trace_fisher(model, [(x, y)], labels="exact").value,
        lambda x, y: fastfisher.grad_inner_products(model, (x, y), (x, z)).mean,
        lambda x, y: fastfisher.gradient_covariance(model, (x, y)).trace,
        lambda x, y: fastfisher.trace_hessian(model, x, y, generator=torch.Generator().manual_seed(0)).value,
        lambda x, y: float(fastfisher.top_eigenvalues(model, x, y, generator=torch.Generator().manual_seed(0))),
    ]
    expected = [measure(x, y) for measure in measures]
    with torch.inference_mode():
        made = x.clone(), y.clone()  # inference tensors
        assert [measure(x, y) for measure in measures] == expected
        assert [measure(*made) for measure in measures] == expected
        with pytest.raises(ValueError, match=r"0\.weight.*inference_mode"):
            per_example_grad_norms(nn.Sequential(nn.Linear(6, 4)).double(), x, y, labels="true")


def test_modes_are_set_without_the_modules_own_train() -> None:
    class Acts(nn.Linear):
        def train(self, mode: bool = True) -> Any:
            raise AssertionError("called")

    model = nn.Sequential(Acts(6, 4), nn.Dropout())
    x, y = data_for((6,))
    per_example_grad_norms(model.double(), x, y, labels="true")
    assert model[0].training and model[1].training


@pytest.mark.parametrize("labels", ["sampled", "rademacher", "exact"])
def test_logits_that_are_nan_are_named(labels: Any) -> None:
    class Broken(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.tensor(float("nan"))

    model, (x, y) = Broken(6, 4).double(), data_for((6,))
    with pytest.raises(ValueError, match=r"model: expected logits .* NaN"):
        per_example_grad_norms(model, x, labels=labels)
    assert per_example_grad_norms(model, x, y, labels="true").isnan().all()  # an honest answer


def measures() -> dict[str, Callable[[nn.Module, Tensor, Tensor], Any]]:
    return {
        "norms": lambda m, x, y: per_example_grad_norms(m, x, y, labels="true"),
        "trace": lambda m, x, y: fastfisher.trace_fisher(m, x, draws=2, minibatch=True),
        "inner products": lambda m, x, y: fastfisher.grad_inner_products(m, (x, y), (x, y)),
        "covariance": lambda m, x, y: fastfisher.gradient_covariance(m, (x, y)),
        "covariance of batches": lambda m, x, y: fastfisher.gradient_covariance(m, (x, y), batch_size=2),
        "eigenvalues": lambda m, x, y: fastfisher.top_eigenvalues(m, x, y, max_iterations=3, tolerance=1.0),
        "hessian": lambda m, x, y: fastfisher.trace_hessian(m, x, y, probes=2, method="hutchinson"),
    }


class Everything(nn.Module):
    """A convolution, a normalisation, a recurrent layer, a gain and an einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)
        self.recurrent = nn.RNN(4, 3, batch_first=True)
        self.gain, self.w, self.head = nn.Parameter(torch.ones(3)), nn.Parameter(torch.randn(3, 3)), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.norm(self.conv(x))).flatten(1).view(len(x), 3, 4)
        return self.head(torch.einsum("ni,ij->nj", self.recurrent(z)[0][:, -1] * self.gain, self.w))


@pytest.mark.parametrize("name", measures())
def test_nothing_is_kept(name: str) -> None:
    torch.manual_seed(0)
    model, x, y = Everything(), torch.randn(4, 1, 4, 4), torch.arange(4)
    measure = measures()[name]

    def kept() -> tuple[int, int]:
        gc.collect()
        objects = gc.get_objects()
        nodes = sum(isinstance(o, torch.autograd.function.BackwardCFunction) for o in objects)
        return sum(isinstance(o, Tensor) for o in objects), nodes

    for _ in range(2):
        measure(model, x, y)
    before = kept()
    for _ in range(8):
        measure(model, x, y)
    after = kept()
    assert after[0] <= before[0] + 2 and after[1] <= before[1], (before, after)


def test_the_model_that_was_measured_can_go() -> None:
    import weakref

    model, (x, y) = nn.Sequential(nn.Linear(6, 4)).double(), data_for((6,))
    per_example_grad_norms(model, x, y, labels="true")
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None


def test_layers_that_examples_index_have_formulas() -> None:
    """Experts, sorted batches and packed rows: nothing goes one example at a time."""
    for function in (
        experts, sorted_by_the_examples, bags, bags_of_any_length, bilinear, rows_of_its_own, batched_products,
        biased_scores,
    ):  # fmt: skip
        torch.manual_seed(3)
        x, y = data_for((6,))
        model = Uses(function)
        model(x.float())
        assert not fastfisher.trace_fisher(model.double(), (x, y), labels="true").fallbacks, function

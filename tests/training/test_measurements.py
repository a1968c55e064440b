import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfisher import sample_cross_entropy
from fastfisher.training.data import Data
from fastfisher.training.measurements import accuracies, eval_mode, predict, trace_fisher


def network_with_batch_norm() -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(108, 4)
    )
    network(torch.randn(16, 1, 8, 8))
    return network.train()


def test_eval_mode_restores_every_module() -> None:
    network = network_with_batch_norm()
    network[1].eval()
    with pytest.raises(KeyError), eval_mode(network):
        assert not any(module.training for module in network.modules())
        raise KeyError
    assert [module.training for module in network] == [True, False, True, True, True, True]
    assert network.training


def test_trace_fisher_is_the_mean_of_squared_per_example_norms() -> None:
    network = network_with_batch_norm().double()
    inputs = torch.randn(10, 1, 8, 8, dtype=torch.float64)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    global_state = torch.get_rng_state()
    measured = trace_fisher(network, inputs, generator=torch.Generator().manual_seed(3), chunk=4)

    generator = torch.Generator().manual_seed(3)
    norms = []
    with eval_mode(network):
        for part in inputs.split(4):
            _, labels = sample_cross_entropy(network(part), generator=generator)
            for example, label in zip(part, labels, strict=True):
                loss = F.cross_entropy(network(example[None]), label[None])
                gradients = torch.autograd.grad(loss, list(network.parameters()))
                norms.append(sum(g.square().sum().item() for g in gradients))
    assert measured == pytest.approx(sum(norms) / 10, rel=1e-12)
    assert torch.equal(torch.get_rng_state(), global_state)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_trace_fisher_agrees_with_the_exact_expectation() -> None:
    # For a linear layer ∂ℓ/∂W = (p − e_ŷ) xᵀ: E_ŷ‖·‖² = (1 − ‖p‖²)(‖x‖² + 1) with the bias.
    torch.manual_seed(1)
    model = nn.Linear(5, 3).double()
    inputs = torch.randn(1, 5, dtype=torch.float64)
    p = model(inputs).softmax(1)
    exact = ((1 - p.square().sum()) * (inputs.square().sum() + 1)).item()
    measured = trace_fisher(model, inputs.expand(20_000, 5), generator=torch.Generator().manual_seed(0), chunk=2_000)
    assert measured == pytest.approx(exact, rel=0.02)


class Constant(nn.Module):
    """Predicts the first feature of its input, rounded."""

    def forward(self, inputs: Tensor) -> Tensor:
        return F.one_hot(inputs[:, 0].long(), 3).float()


def test_accuracies_of_each_group() -> None:
    predictions = torch.tensor([[0.0], [1.0], [2.0], [2.0], [0.0]])
    data = Data(
        inputs=predictions,
        labels=torch.tensor([0, 0, 2, 1, 1]),
        true_labels=torch.tensor([0, 0, 2, 2, 1]),
        noisy=torch.tensor([False, False, True, True, True]),
        validation_inputs=predictions,
        validation_labels=torch.tensor([0, 1, 2, 2, 1]),
        test_inputs=predictions,
        test_labels=torch.tensor([0, 1, 2, 2, 0]),
        classes=3,
    )
    assert accuracies(Constant(), data) == {
        "clean_accuracy": 0.5,
        "noisy_accuracy": pytest.approx(1 / 3),
        "noisy_true_accuracy": pytest.approx(2 / 3),
        "validation_accuracy": 0.8,
        "test_accuracy": 1.0,
    }


def test_predict_does_not_depend_on_the_chunk() -> None:
    network = network_with_batch_norm()
    inputs = torch.randn(7, 1, 8, 8)
    assert torch.equal(predict(network, inputs, chunk=2), predict(network, inputs, chunk=7))

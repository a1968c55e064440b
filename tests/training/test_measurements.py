import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfisher.capture import eval_mode
from fastfisher.training.data import Data
from fastfisher.training.measurements import accuracies, predict


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

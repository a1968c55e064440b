"""What is measured after an epoch. Nothing here moves the parameters, the buffers or a caller's generator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastfisher.capture import eval_mode
from fastfisher.training.data import Data


def predict(model: nn.Module, inputs: Tensor, *, chunk: int = 500) -> Tensor:
    """Return the most likely class of each input, int64 ``[N]``, in eval mode."""
    with eval_mode(model), torch.no_grad():
        return torch.cat([model(part).argmax(dim=1) for part in torch.split(inputs, chunk)])


def accuracies(model: nn.Module, data: Data) -> dict[str, float | None]:
    """Return the fraction of right predictions on every part of the data, in eval mode, without augmentation.

    ``clean_accuracy``: training examples whose label was kept. ``noisy_accuracy``: training examples whose
    label was replaced, against the replaced label they are trained on: memorisation (Figure 5).
    ``noisy_true_accuracy``: the same examples against the label they had before. None where there are none.
    """
    predictions = predict(model, data.inputs)

    def share(right: Tensor) -> float | None:
        return right.double().mean().item() if len(right) else None

    noisy = data.noisy
    return {
        "clean_accuracy": share((predictions == data.labels)[~noisy]),
        "noisy_accuracy": share((predictions == data.labels)[noisy]),
        "noisy_true_accuracy": share((predictions == data.true_labels)[noisy]),
        "validation_accuracy": share(predict(model, data.validation_inputs) == data.validation_labels),
        "test_accuracy": share(predict(model, data.test_inputs) == data.test_labels),
    }

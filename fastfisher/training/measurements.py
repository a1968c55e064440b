"""What is measured after an epoch. Nothing here moves the parameters, the buffers or a caller's generator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from fastfisher import sample_cross_entropy
from fastfisher.training.data import Data


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode and, on leaving, every module back in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


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


def trace_fisher(model: nn.Module, inputs: Tensor, *, generator: torch.Generator, chunk: int = 16) -> float:
    """Estimate the trace of the Fisher Information Matrix per example, equation 2 of the paper.

    Tr(F) = E_x E_ŷ ‖∂ℓ(x, ŷ; θ)/∂θ‖², ℓ the softmax cross-entropy and ŷ ~ p_θ(y|x), estimated as the mean
    over ``inputs`` ``[N, ...]`` with one label each, drawn from ``generator`` (on the device of the inputs).
    In eval mode, so that batch normalisation does not couple the examples.

    Raises:
        ValueError: if the logits of an example are not finite.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor], example: Tensor, label: Tensor) -> Tensor:
        logits: Tensor = functional_call(model, values, (example.unsqueeze(0),))
        return F.cross_entropy(logits, label.unsqueeze(0))

    total = torch.zeros((), dtype=torch.float64, device=inputs.device)
    with eval_mode(model), torch.no_grad():
        for part in torch.split(inputs, chunk):
            _, labels = sample_cross_entropy(model(part), generator=generator)
            gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, part, labels)
            total += sum(gradient.double().square().sum() for gradient in gradients.values())
    return total.item() / len(inputs)

import dataclasses
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from fastfisher.model import eval_mode
from fastfisher.training.config import MEASUREMENTS
from fastfisher.training.data import Data
from fastfisher.training.measurements import (
    MEASURE,
    Examples,
    accuracies,
    area_under_curve,
    averaged_batch_statistics,
    predict,
    predict_probabilities,
)


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
        "train_accuracy": 0.4,
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


def test_probabilities_are_those_of_eval_mode() -> None:
    network, inputs = network_with_batch_norm().double(), examples(7, 0).inputs
    found = predict_probabilities(network, inputs, chunk=2)
    assert network.training
    with eval_mode(network), torch.no_grad():
        assert torch.equal(found, network(inputs).softmax(1).half())


def test_averaged_statistics_are_the_means_over_the_batches() -> None:
    network = network_with_batch_norm()
    norm = network[1]
    assert isinstance(norm, nn.BatchNorm2d)
    before = {name: (buffer.clone(), buffer.data_ptr()) for name, buffer in network.named_buffers()}
    batches = [torch.randn(8, 1, 8, 8) for _ in range(5)]
    hidden = [network[0](inputs) for inputs in batches]
    with averaged_batch_statistics(network, iter(batches)):
        means = torch.stack([h.mean((0, 2, 3)) for h in hidden]).mean(0)
        variances = torch.stack([h.var((0, 2, 3)) for h in hidden]).mean(0)
        torch.testing.assert_close(norm.running_mean, means)
        torch.testing.assert_close(norm.running_var, variances)
        assert network.training
    assert norm.momentum == 0.1
    for name, buffer in network.named_buffers():
        content, place = before[name]
        assert torch.equal(buffer, content)
        assert buffer.data_ptr() == place


def test_statistics_are_put_back_whatever_is_raised() -> None:
    network = network_with_batch_norm()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with pytest.raises(RuntimeError), averaged_batch_statistics(network, [torch.randn(8, 1, 8, 8), torch.randn(1, 2)]):
        pass
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    assert all(module.training for module in network.modules())


def examples(count: int, noisy: int, dtype: torch.dtype = torch.float64, batch_size: int = 4) -> Examples:
    """Random images, the first ``noisy`` of them with noisy labels."""
    generator = torch.Generator().manual_seed(1)
    return Examples(
        inputs=torch.randn(count, 1, 8, 8, generator=generator, dtype=dtype),
        labels=torch.randint(4, (count,), generator=generator),
        noisy=torch.arange(count) < noisy,
        batch_size=batch_size,
    )


def gradient(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """The gradient of the mean loss in eval mode, flat."""
    with eval_mode(model):
        found = torch.autograd.grad(F.cross_entropy(model(inputs), labels), list(model.parameters()))
    return torch.cat([each.flatten() for each in found])


def squared_norms(model: nn.Module, data: Examples) -> Tensor:
    """‖∇ℓ(x_i, y_i)‖², one backward for each example."""
    each = zip(data.inputs.split(1), data.labels.split(1), strict=True)
    return torch.stack([gradient(model, one, label).square().sum() for one, label in each])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_measurement_can_be_asked_for() -> None:
    assert tuple(MEASURE) == MEASUREMENTS


@pytest.mark.parametrize("name", MEASURE)
def test_measuring_leaves_model_and_global_generator_as_they_were(name: str) -> None:
    model, data = network_with_batch_norm().double(), examples(10, 5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first = MEASURE[name](model, data, generator())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    torch.rand(3)
    assert MEASURE[name](model, data, generator()) == first


def test_gradient_norms_of_clean_and_noisy_examples() -> None:
    # More examples than go through the model at once.
    model, data = network_with_batch_norm().double(), examples(150, 70)
    record = MEASURE["per_example_grad_norms"](model, data, generator())
    norms = squared_norms(model, data)
    for name, group in (("clean", norms[70:]), ("noisy", norms[:70])):
        assert record[f"squared_grad_norm_{name}"] == pytest.approx(float(group.mean()), rel=1e-10)
        error = float(group.std()) / len(group) ** 0.5
        assert record[f"squared_grad_norm_{name}_standard_error"] == pytest.approx(error, rel=1e-10)
    labels = data.noisy.numpy()
    assert record["grad_norm_auc"] == pytest.approx(roc_auc_score(labels, norms.numpy()), rel=1e-10)


def test_a_fitted_network_tells_noisy_examples_by_their_norms() -> None:
    model = network_with_batch_norm().double()
    data = examples(40, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with eval_mode(model):
        for _ in range(100):
            optimizer.zero_grad()
            F.cross_entropy(model(data.inputs), data.labels).backward()
            optimizer.step()
    wrong = torch.where(torch.arange(40) < 20, (data.labels + 1) % 4, data.labels)
    model.zero_grad(set_to_none=True)
    fitted = dataclasses.replace(data, labels=wrong, noisy=torch.arange(40) < 20)
    record = MEASURE["per_example_grad_norms"](model, fitted, generator())
    assert record["grad_norm_auc"] == 1.0
    assert record["squared_grad_norm_noisy"] > 10 * record["squared_grad_norm_clean"]


@pytest.mark.parametrize("noisy", [0, 3])
def test_an_empty_group_has_no_mean(noisy: int) -> None:
    record = MEASURE["per_example_grad_norms"](network_with_batch_norm().double(), examples(3, noisy), generator())
    there, missing = ("noisy", "clean") if noisy else ("clean", "noisy")
    assert record[f"squared_grad_norm_{there}"] is not None
    for name in (f"squared_grad_norm_{missing}", f"squared_grad_norm_{missing}_standard_error", "grad_norm_auc"):
        assert record[name] is None


def test_traces_and_their_standard_errors() -> None:
    model, data = network_with_batch_norm().double(), examples(200, 100)
    # Tr(F) over all labels is the probability-weighted mean of the squared norms.
    with eval_mode(model), torch.no_grad():
        probabilities = model(data.inputs).softmax(1)
    each = [squared_norms(model, dataclasses.replace(data, labels=torch.full((200,), label))) for label in range(4)]
    trace = float((probabilities * torch.stack(each, 1)).sum(1).mean())
    hessian = MEASURE["trace_hessian"](model, data, generator())
    assert hessian["trace_hessian"] == pytest.approx(trace, rel=1e-10)
    assert hessian["trace_hessian_standard_error"] == 0
    assert hessian["trace_hessian_method"] == "fisher, labels=exact"
    fisher = MEASURE["trace_fisher"](model, data, generator())
    assert abs(fisher["trace_fisher"] - trace) < 4 * fisher["trace_fisher_standard_error"]  # p = 6e-5
    assert 0 < fisher["trace_fisher_standard_error"] < trace
    assert "labels=rademacher" in fisher["trace_fisher_method"]


def test_leading_curvature() -> None:
    model, data = network_with_batch_norm().double(), examples(12, 5)
    parameters = list(model.parameters())

    def flat(loss: Tensor, **options: bool) -> Tensor:
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters, **options)])

    with eval_mode(model):
        mean = flat(F.cross_entropy(model(data.inputs), data.labels), create_graph=True)
        hessian = torch.stack([flat(g, retain_graph=True, materialize_grads=True) for g in mean])
        losses = F.cross_entropy(model(data.inputs), data.labels, reduction="none")
        gradients = torch.stack([flat(loss, retain_graph=True) for loss in losses])
    record = MEASURE["top_eigenvalue"](model, data, generator())
    largest = float(torch.linalg.eigvalsh(hessian)[-1])
    assert abs(record["top_eigenvalue"] - largest) <= record["top_eigenvalue_error_bound"] <= 1e-3 * largest
    centred = gradients - gradients.mean(0)
    eigenvalues = torch.linalg.eigvalsh(centred @ centred.mT / 12)
    assert MEASURE["gradient_covariance"](model, data, generator()) == {
        "gradient_covariance_trace": pytest.approx(float(eigenvalues.sum()), rel=1e-10),
        "gradient_covariance_largest": pytest.approx(float(eigenvalues[-1]), rel=1e-10),
        "gradient_covariance_smallest": pytest.approx(float(eigenvalues[1]), rel=1e-8),
    }


def test_gradients_of_clean_and_noisy_examples() -> None:
    # More examples of each kind than go through the model at once.
    model, data = network_with_batch_norm().double(), examples(290, 140)
    noisy, clean = (gradient(model, data.inputs[part], data.labels[part]) for part in (slice(140), slice(140, None)))
    assert MEASURE["noisy_gradients"](model, data, generator()) == {
        "gradient_norm_clean": pytest.approx(float(clean.norm()), rel=1e-10),
        "gradient_norm_noisy": pytest.approx(float(noisy.norm()), rel=1e-10),
        "noisy_clean_cosine": pytest.approx(float(noisy @ clean / noisy.norm() / clean.norm()), rel=1e-10),
    }


@pytest.mark.parametrize("noisy", [0, 3])
def test_an_empty_group_has_no_gradient(noisy: int) -> None:
    record = MEASURE["noisy_gradients"](network_with_batch_norm().double(), examples(3, noisy), generator())
    there, missing = ("noisy", "clean") if noisy else ("clean", "noisy")
    assert record[f"gradient_norm_{there}"] > 0
    assert record[f"gradient_norm_{missing}"] is None
    assert record["noisy_clean_cosine"] is None


def test_a_gradient_of_zero_has_no_angle() -> None:
    data = examples(6, 3)
    one_class = nn.Sequential(nn.Flatten(), nn.Linear(64, 1)).double()
    record = MEASURE["noisy_gradients"](one_class, dataclasses.replace(data, labels=data.labels * 0), generator())
    assert record == {"gradient_norm_clean": 0.0, "gradient_norm_noisy": 0.0, "noisy_clean_cosine": None}


def test_the_trace_of_a_batch_is_of_its_first_examples_with_drawn_labels() -> None:
    model, data = network_with_batch_norm().double(), examples(5, 2, batch_size=2)
    batch = data.inputs[:2]
    with eval_mode(model), torch.no_grad():
        first, second = model(batch).softmax(1)
    # All that two labels can give, and how likely each is.
    pairs = list(itertools.product(range(4), repeat=2))
    possible = torch.stack([gradient(model, batch, torch.tensor(pair)).square().sum() for pair in pairs])
    likely = torch.stack([first[a] * second[b] for a, b in pairs])
    drawn = [MEASURE["trace_fisher_batch"](model, data, generator(seed)) for seed in range(200)]
    values = torch.tensor([record["trace_fisher_batch"] for record in drawn], dtype=torch.float64)
    assert ((values[:, None] - possible).abs() < 1e-10 * possible).any(1).all()
    assert abs(values.mean() - likely @ possible) < 4 * values.std() / 200**0.5  # p = 6e-5
    few = dataclasses.replace(data, inputs=batch, labels=data.labels[:2], batch_size=7)
    assert MEASURE["trace_fisher_batch"](model, few, generator(0)) == drawn[0]


def test_the_covariance_of_minibatches_drops_an_incomplete_one() -> None:
    model, data = network_with_batch_norm().double(), examples(14, 5)
    gradients = torch.stack([gradient(model, data.inputs[i : i + 4], data.labels[i : i + 4]) for i in (0, 4, 8)])
    eigenvalues = torch.linalg.eigvalsh((gradients - gradients.mean(0)) @ (gradients - gradients.mean(0)).mT / 3)
    assert MEASURE["minibatch_covariance"](model, data, generator()) == {
        "minibatch_covariance_trace": pytest.approx(float(eigenvalues.sum()), rel=1e-10),
        "minibatch_covariance_largest": pytest.approx(float(eigenvalues[2]), rel=1e-10),
        "minibatch_covariance_smallest": pytest.approx(float(eigenvalues[1]), rel=1e-8),
    }


@pytest.mark.parametrize("batch_size", [6, 12])
def test_fewer_than_two_minibatches_have_no_covariance(batch_size: int) -> None:
    record = MEASURE["minibatch_covariance"](
        network_with_batch_norm(), examples(11, 5, torch.float32, batch_size), generator()
    )
    names = ("trace", "largest", "smallest")
    assert record == {f"minibatch_covariance_{name}": None for name in names}


def test_minibatches_that_are_alike_have_no_smallest_eigenvalue() -> None:
    data = examples(4, 2)
    twice = dataclasses.replace(data, inputs=data.inputs.repeat(2, 1, 1, 1), labels=data.labels.repeat(2))
    record = MEASURE["minibatch_covariance"](network_with_batch_norm().double(), twice, generator())
    assert record["minibatch_covariance_trace"] == pytest.approx(0, abs=1e-12)
    assert record["minibatch_covariance_largest"] == 0
    assert record["minibatch_covariance_smallest"] is None


def test_accuracy_and_loss_of_the_examples_measured() -> None:
    model, data = network_with_batch_norm().double(), examples(150, 70)
    with eval_mode(model), torch.no_grad():
        logits = model(data.inputs)
    assert MEASURE["accuracy"](model, data, generator()) == {
        "measured_accuracy": float((logits.argmax(1) == data.labels).double().mean()),
        "measured_loss": pytest.approx(float(F.cross_entropy(logits, data.labels)), rel=1e-12),
    }


def test_the_trace_of_a_smooth_networks_hessian_has_an_error_bar() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU()]  # the curvature of one alone is known exactly
    model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(8, 4)).double()
    record = MEASURE["trace_hessian"](model, examples(20, 10), generator())
    assert record["trace_hessian_standard_error"] > 0
    assert "hutchinson" in record["trace_hessian_method"]


@pytest.mark.parametrize("levels", [3, 10**9])
def test_area_under_curve_counts_pairs(levels: int) -> None:
    positive = torch.randint(levels, (9,), generator=generator(1)).double()
    negative = torch.randint(levels, (7,), generator=generator(2)).double()
    pairs = (positive[:, None] > negative).double() + (positive[:, None] == negative).double() / 2
    area, error = area_under_curve(positive, negative)
    assert area == pytest.approx(float(pairs.mean()), rel=1e-12)
    variance = pairs.mean(1).var() / 9 + pairs.mean(0).var() / 7
    assert error == pytest.approx(float(variance.sqrt()), rel=1e-12)


def test_area_under_curve_at_its_ends() -> None:
    low, high = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0])
    assert area_under_curve(high, low) == (1.0, 0.0)
    assert area_under_curve(low, high) == (0.0, 0.0)
    assert area_under_curve(low, low)[0] == 0.5
    assert area_under_curve(high, low[:1]) == (1.0, None)
    assert area_under_curve(high, low[:0]) == (None, None)


def test_the_error_of_the_area_is_calibrated() -> None:
    # P(x + 1 > y) = Φ(1/√2) for normal x and y.
    truth = 0.5 * (1 + math.erf(0.5))
    draws = generator(3)
    covered = 0
    for _ in range(400):
        area, error = area_under_curve(
            1 + torch.randn(60, generator=draws, dtype=torch.float64),
            torch.randn(80, generator=draws, dtype=torch.float64),
        )
        assert area is not None and error is not None
        covered += abs(area - truth) < 1.96 * error
    assert 0.9 <= covered / 400 <= 0.99


def test_every_process_measures_the_same_bits() -> None:
    # A resumed run is another process, whose sets iterate in another order.
    program = (
        "from tests.training.test_measurements import *\n"
        "print([measure(network_with_batch_norm(), examples(20, 9, torch.float32), generator())\n"
        "       for measure in MEASURE.values()])"
    )
    environments = [{**os.environ, "PYTHONHASHSEED": str(seed)} for seed in range(3)]
    printed = {subprocess.check_output([sys.executable, "-c", program], env=each) for each in environments}
    assert len(printed) == 1

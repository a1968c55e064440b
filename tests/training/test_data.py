from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from fastfisher.training.config import ConfigError
from fastfisher.training.data import Augmentation, Batches, Data, Mixup, load_data, replace_labels, spread
from tests.support.archives import accept_any_cifar, write_cifar


def augment(images: Tensor, kind: str) -> Tensor:
    drawn = Augmentation.draw(kind, len(images), torch.Generator().manual_seed(0), images.device)
    return drawn.apply(images, slice(0, len(images)))


def digits(**changes: Any) -> Data:
    options: dict[str, Any] = {
        "data_dir": "",
        "image_size": 16,
        "label_noise": 0.5,
        "noise_seed": 0,
        "device": "cpu",
    }
    return load_data("digits", **{**options, **changes})


def test_digits_split_is_stratified_and_disjoint() -> None:
    data = digits(image_size=8)
    parts = [data.inputs, data.validation_inputs, data.test_inputs]
    assert [tuple(part.shape) for part in parts] == [(1097, 1, 8, 8), (200, 1, 8, 8), (500, 1, 8, 8)]
    assert data.classes == 10
    for labels in (data.true_labels, data.validation_labels, data.test_labels):
        counts = labels.bincount(minlength=10) / len(labels)
        assert (counts - 0.1).abs().max() < 0.015
    # A handful of the 1,797 images occur twice; a leak of a whole part would be far more.
    distinct = torch.cat(parts).flatten(1).unique(dim=0)
    assert len(distinct) > 1_780


def test_inputs_are_normalised_by_the_training_images() -> None:
    data = digits()
    assert data.inputs.shape == (1097, 1, 16, 16)
    assert data.inputs.dtype == torch.float32
    assert data.inputs.mean().item() == pytest.approx(0, abs=1e-4)
    assert data.inputs.std().item() == pytest.approx(1, abs=1e-4)
    assert abs(data.test_inputs.mean().item()) > 1e-4  # not normalised by itself


def test_validation_and_test_labels_stay_clean() -> None:
    noisy, clean = digits(), digits(label_noise=0.0)
    assert torch.equal(noisy.validation_labels, clean.validation_labels)
    assert torch.equal(noisy.test_labels, clean.test_labels)
    assert torch.equal(noisy.true_labels, clean.labels)
    assert not clean.noisy.any()
    assert torch.equal(noisy.inputs, clean.inputs)


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [0]), (3, [0, 3, 6]), (4, [0, 2, 5, 7]), (9, [0, 1, 2, 3, 4, 5, 6, 7, 8])]
)
def test_examples_are_spread_over_the_order(count: int, expected: list[int]) -> None:
    values = torch.arange(10)
    assert spread(values, count).tolist() == expected
    assert all(spread(values, each) is values for each in (None, 10, 11))


def test_some_examples_are_as_if_there_were_no_others() -> None:
    everything, some = digits(label_noise=0.0), digits(examples=300, evaluate=(100, 300))
    assert [len(part) for part in (some.labels, some.validation_labels, some.test_labels)] == [300, 100, 300]
    assert torch.equal(some.true_labels, spread(everything.labels, 300))
    assert torch.equal(some.test_labels, spread(everything.test_labels, 300))
    assert int(some.noisy.sum()) == 150
    assert some.classes == 10
    # Normalised by themselves: they are the others up to one scale and shift.
    chosen = spread(everything.inputs, 300)
    std, mean = torch.std_mean(chosen)
    torch.testing.assert_close(some.inputs, (chosen - mean) / std)
    torch.testing.assert_close(some.validation_inputs, (spread(everything.validation_inputs, 100) - mean) / std)
    torch.testing.assert_close(some.test_inputs, (spread(everything.test_inputs, 300) - mean) / std)
    assert abs(mean) > 1e-4


def test_more_examples_than_there_are_are_refused() -> None:
    assert len(digits(examples=1097).labels) == 1097
    with pytest.raises(ConfigError, match="--examples: got 1098, expected at most the 1097 training examples"):
        digits(examples=1098)


@pytest.mark.parametrize(("evaluate", "counts"), [((), [200, 500]), ((50,), [50, 500]), ((50, 20), [50, 20])])
def test_what_is_trained_on_and_what_is_evaluated_are_limited_apart(
    evaluate: tuple[int, ...], counts: list[int]
) -> None:
    data = digits(examples=30, evaluate=evaluate)
    assert [len(data.inputs), len(data.validation_inputs), len(data.test_inputs)] == [30, *counts]
    assert [len(data.labels), len(data.validation_labels), len(data.test_labels)] == [30, *counts]


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ((201,), "--evaluate: got 201, expected at most the 200 validation examples"),
        ((200, 501), "--evaluate: got 501, expected at most the 500 test examples"),
    ],
)
def test_more_than_there_are_to_evaluate_are_refused(evaluate: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        digits(evaluate=evaluate)


@pytest.mark.parametrize("size", [4, 2])
def test_images_become_the_means_of_squares_where_their_size_is_a_multiple(size: int) -> None:
    def means(images: Tensor) -> Tensor:
        side = 8 // size
        return images.view(-1, 1, size, side, size, side).mean((3, 5))

    def scaled(images: Tensor) -> Tensor:
        return (images - everything.mean()) / everything.std()

    whole, data = digits(image_size=8), digits(image_size=size)
    everything = means(whole.inputs)
    torch.testing.assert_close(data.inputs, scaled(everything))
    torch.testing.assert_close(data.test_inputs, scaled(means(whole.test_inputs)))


def test_replace_labels_follows_the_definition_of_the_paper() -> None:
    labels = torch.arange(10).repeat(4_000)
    replaced, noisy = replace_labels(labels, 0.25, 10, seed=1)
    assert noisy.sum() == 10_000
    assert torch.equal(replaced[~noisy], labels[~noisy])
    # Uniform over all classes, the true one included: 9 in 10 differ, and each class is drawn as often.
    assert (replaced != labels)[noisy].float().mean().item() == pytest.approx(0.9, abs=0.012)
    assert (replaced[noisy].bincount(minlength=10) - 1_000).abs().max() < 150
    assert torch.equal(labels, torch.arange(10).repeat(4_000))
    again, _ = replace_labels(labels, 0.25, 10, seed=1)
    other, _ = replace_labels(labels, 0.25, 10, seed=2)
    assert torch.equal(again, replaced)
    assert not torch.equal(other, replaced)


def test_all_or_none_can_be_replaced() -> None:
    labels = torch.zeros(50, dtype=torch.int64)
    assert not replace_labels(labels, 0.0, 10, seed=0)[1].any()
    assert replace_labels(labels, 1.0, 10, seed=0)[1].all()


def test_flip_mirrors_about_half_of_the_images() -> None:
    images = torch.randn(400, 2, 4, 5)
    flipped = augment(images, "flip")
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_crop_flip_shifts_each_image_by_up_to_four_pixels() -> None:
    images = torch.randn(300, 2, 9, 9)
    cropped = augment(images, "crop_flip")
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    seen = set()
    for image, source in zip(cropped, padded, strict=True):
        places = [
            (row, column, mirrored)
            for row in range(9)
            for column in range(9)
            for mirrored in (False, True)
            if torch.equal(image.flip(-1) if mirrored else image, source[:, row : row + 9, column : column + 9])
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert {row for row, _, _ in seen} == set(range(9))
    assert {column for _, column, _ in seen} == set(range(9))


def test_crops_of_small_images_are_shifted_by_an_eighth_of_their_size_and_not_mirrored() -> None:
    images = torch.randn(200, 1, 8, 8)
    drawn = Augmentation.draw("crop", len(images), torch.Generator().manual_seed(0), images.device, 8)
    cropped = drawn.apply(images, slice(0, len(images)))
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    shifts = [(row, column) for row in range(3) for column in range(3)]
    found = [
        [shift for shift in shifts if torch.equal(image, source[:, shift[0] : shift[0] + 8, shift[1] : shift[1] + 8])]
        for image, source in zip(cropped, padded, strict=True)
    ]
    assert all(len(places) == 1 for places in found)
    assert {places[0] for places in found} == set(shifts)


def test_no_augmentation_draws_nothing() -> None:
    images = torch.randn(3, 1, 4, 4)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    augmentation = Augmentation.draw("none", 3, generator, images.device)
    assert augmentation.apply(images, slice(0, 3)) is images
    assert torch.equal(generator.get_state(), before)


def test_each_image_has_its_own_augmentation_whatever_its_batch() -> None:
    images = torch.randn(10, 1, 6, 6)
    augmentation = Augmentation.draw("crop_flip", 10, torch.Generator().manual_seed(1), images.device)
    parts = [slice(0, 4), slice(4, 10)]
    apart = torch.cat([augmentation.apply(images[part], part) for part in parts])
    assert torch.equal(apart, augmentation.apply(images, slice(0, 10)))


def batches(seed: int = 0, mixup: float | None = None) -> Batches:
    inputs = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 1, 4, 4).clone()
    mixed = None if mixup is None else Mixup(mixup, classes=10, seed=seed)
    return Batches(inputs, torch.arange(10), batch_size=3, augment="crop_flip", seed=seed, mixup=mixed)


def test_an_epoch_holds_no_example_twice_and_drops_the_rest() -> None:
    loader = batches()
    assert len(loader) == 3
    first = torch.cat([loader.next()[1] for _ in range(3)])
    second = torch.cat([loader.next()[1] for _ in range(3)])
    assert len(first.unique()) == len(second.unique()) == 9
    assert not torch.equal(first, second)


def test_inputs_and_labels_stay_together() -> None:
    loader = Batches(torch.arange(10.0), torch.arange(10), batch_size=4, augment="none", seed=1)
    inputs, labels = loader.next()
    assert torch.equal(inputs.long(), labels)


@pytest.mark.parametrize("beta", [0.2, 1.0, 6.4])
def test_the_weights_of_mixup_have_the_beta_distribution(beta: float) -> None:
    mixup = Mixup(beta, classes=2, seed=3)
    mixup.draw(5_000, 2, torch.device("cpu"))
    # In float32 a weight may be a whole 0 or 1, of which the distribution has none. Significance 1 in 1,000.
    assert stats.kstest(mixup.weights.double().numpy(), stats.beta(beta, beta).cdf).pvalue > 1e-3
    # Half of the permutations of two are the identity.
    assert stats.binomtest(int((mixup.partners[:, 0] == 0).sum()), 5_000).pvalue > 1e-3


def test_mixup_mixes_inputs_and_labels_alike() -> None:
    values = torch.arange(10.0)
    plain = Batches(values, torch.arange(10), batch_size=4, augment="none", seed=1)
    mixed = Batches(
        values, torch.arange(10), batch_size=4, augment="none", seed=1, mixup=Mixup(1.0, classes=10, seed=2)
    )
    for position in (0, 1, 0, 1):
        first, _ = plain.next()
        inputs, labels = mixed.next()
        assert mixed.mixup is not None
        weight, partners = mixed.mixup.weights[position], mixed.mixup.partners[position]
        assert sorted(partners.tolist()) == [0, 1, 2, 3]
        assert 0 < weight < 1
        torch.testing.assert_close(inputs, weight * first + (1 - weight) * first[partners])
        # An example is its own label here.
        torch.testing.assert_close(labels @ values, inputs)
        torch.testing.assert_close(labels.sum(1), torch.ones(4))
        assert ((labels > 0).sum(1) <= 2).all()


def test_the_loss_of_mixup_is_that_of_both_labels() -> None:
    mixup = Mixup(1.0, classes=5, seed=0)
    mixup.draw(1, 6, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 5, generator=generator), torch.randint(5, (6,), generator=generator)
    _, probabilities = mixup.apply(torch.zeros(6, 1), labels, 0)
    weight, partners = mixup.weights[0], mixup.partners[0]
    expected = weight * F.cross_entropy(logits, labels) + (1 - weight) * F.cross_entropy(logits, labels[partners])
    torch.testing.assert_close(F.cross_entropy(logits, probabilities), expected)


@pytest.mark.parametrize("mixup", [None, 0.4])
@pytest.mark.parametrize("taken", [0, 1, 3, 4])
def test_batches_resume_exactly_and_leave_the_global_generator_alone(taken: int, mixup: float | None) -> None:
    loader, other = batches(mixup=mixup), batches(seed=9, mixup=mixup)
    for _ in range(taken):
        loader.next()
    state = loader.state_dict()
    before = torch.get_rng_state()
    expected = [loader.next() for _ in range(5)]
    assert torch.equal(torch.get_rng_state(), before)
    other.load_state_dict(state)
    for (inputs, labels), (other_inputs, other_labels) in zip(expected, [other.next() for _ in range(5)], strict=True):
        assert torch.equal(inputs, other_inputs)
        assert torch.equal(labels, other_labels)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="--batch-size: got 11, expected at most the 10 training examples"):
        Batches(torch.zeros(10, 1), torch.zeros(10), batch_size=11, augment="none", seed=0)


def test_digits_need_no_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert digits().classes == 10


@pytest.mark.parametrize("error", [ImportError("absent"), RuntimeError("operator torchvision::nms does not exist")])
def test_an_unusable_torchvision_is_explained(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def fake(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "torchvision":
            raise error
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", fake)
    with pytest.raises(ConfigError, match="--data: got 'cifar10', which needs torchvision") as refused:
        load_data("cifar10", data_dir=".", image_size=32, label_noise=0, noise_seed=0, device="cpu")
    assert str(error) in str(refused.value)
    assert "match" in str(refused.value)


def test_cifar10_holds_out_5000_training_examples(
    torchvision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets

    write_cifar(tmp_path, 10, training=6_000)
    accept_any_cifar(datasets, monkeypatch)
    data = load_data("cifar10", data_dir=str(tmp_path), image_size=32, label_noise=0, noise_seed=0, device="cpu")
    assert data.inputs.shape == (1_000, 3, 32, 32)
    assert data.validation_inputs.shape == (5_000, 3, 32, 32)
    assert data.test_inputs.shape == (50, 3, 32, 32)
    assert torch.allclose(data.inputs.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4)
    # The images are the files' own, channels first, up to the normalisation.
    source = datasets.CIFAR10(str(tmp_path), train=False)
    image = torch.from_numpy(source.data[7]).permute(2, 0, 1).float()
    both = torch.stack([data.test_inputs[7].flatten(1), image.flatten(1)])
    assert all(torch.corrcoef(both[:, channel])[0, 1] > 0.9999 for channel in range(3))
    assert data.test_labels[7] == 7


def test_bad_files_of_cifar_are_named(torchvision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    base = write_cifar(tmp_path, 10, training=6_000)
    (base / "data_batch_2").unlink()
    (base / "test_batch").write_bytes(b"cut off")

    def whole(path: str, md5: str | None = None) -> bool:
        return (Path(path).exists() and Path(path).stat().st_size > 100) or path.endswith("meta")

    monkeypatch.setattr(datasets.cifar, "check_integrity", whole)
    monkeypatch.setattr(datasets.utils, "check_integrity", whole)
    with pytest.raises(ConfigError) as refused:
        load_data("cifar10", data_dir=str(tmp_path), image_size=32, label_noise=0, noise_seed=0, device="cpu")
    assert str(refused.value).endswith(f"missing or damaged: {base / 'data_batch_2'}, {base / 'test_batch'}")


def test_absent_cifar_is_explained(torchvision: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a folder that holds cifar-100-python"):
        load_data("cifar100", data_dir=str(tmp_path), image_size=32, label_noise=0, noise_seed=0, device="cpu")

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastfisher.training import image_folders, loop
from fastfisher.training.config import ConfigError, TrainConfig, resolve
from fastfisher.training.data import Data, StoredImages, load_data, mean_and_std, spread
from fastfisher.training.folder import RunFolder
from fastfisher.training.image_folders import read_image
from tests.support.archives import WORDNET, write_image, write_imagenet, write_tiny_imagenet


def load(name: str, folder: Path, **changes: Any) -> Data:
    options: dict[str, Any] = {"image_size": 32, "label_noise": 0.0, "noise_seed": 0, "device": "cpu"}
    return load_data(name, data_dir=str(folder), **{**options, **changes})


def stored(images: Any) -> torch.Tensor:
    assert isinstance(images, StoredImages)
    return images.stored


def assert_same_data(first: Data, second: Data) -> None:
    for field in dataclasses.fields(Data):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if isinstance(a, int):
            assert a == b
        else:
            assert torch.equal(a[:], b[:]), field.name


def test_tiny_imagenet_has_the_archives_labels_and_images(tmp_path: Path) -> None:
    root = write_tiny_imagenet(tmp_path)
    data = load("tinyimagenet", tmp_path)
    assert data.classes == 3
    assert data.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert data.test_labels.tolist() == [(index + 1) % 3 for index in range(7)]
    assert data.inputs.shape == (30, 3, 32, 32)
    assert data.test_inputs.shape == (7, 3, 32, 32)
    assert len(data.validation_labels) == len(data.validation_inputs) == 0

    # Half the size with antialiasing: away from the edges of the blocks their own colours are left.
    def blocks(path: Path) -> torch.Tensor:
        image = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1)
        return image[:, 4::8, 4::8].int()

    def middles(image: torch.Tensor) -> torch.Tensor:
        return image[:, 1::4, 1::4].int()

    found = stored(data.inputs)
    for label, name in enumerate(WORDNET):
        for index in range(10):
            expected = blocks(root / "train" / name / "images" / f"{name}_{index}.JPEG")
            difference = (middles(found[10 * label + index]) - expected).abs().float()
            # Within what the neighbours and JPEG leave; images of other files differ by 85 on average.
            assert difference.mean() < 20, (name, index)
    for index in range(7):
        expected = blocks(root / "val" / "images" / f"val_{index}.JPEG")
        assert (middles(stored(data.test_inputs)[index]) - expected).abs().float().mean() < 20
    grey = found[12]
    assert torch.equal(grey[0], grey[1])


def test_images_are_normalised_when_they_are_taken(tmp_path: Path) -> None:
    write_tiny_imagenet(tmp_path)
    data = load("tinyimagenet", tmp_path)
    taken = data.inputs[torch.arange(30)]
    assert taken.dtype == torch.float32
    assert taken.mean((0, 2, 3)).tolist() == pytest.approx([0] * 3, abs=1e-5)
    assert taken.std((0, 2, 3)).tolist() == pytest.approx([1] * 3, abs=1e-5)
    assert abs(data.test_inputs[:].mean().item()) > 1e-3  # not normalised by itself
    assert torch.equal(data.inputs[3:5], taken[3:5])


def test_mean_and_std_are_those_of_all_parts() -> None:
    images = torch.randint(256, (600, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = mean_and_std(images)
    expected_std, expected_mean = torch.std_mean(images.double(), dim=(0, 2, 3), keepdim=True)
    assert torch.equal(mean, expected_mean.float())
    assert torch.allclose(std, expected_std.float(), rtol=1e-6)


@pytest.mark.parametrize("name", ["tinyimagenet", "imagenet"])
def test_label_noise_leaves_the_test_set_and_counts_every_class(name: str, tmp_path: Path) -> None:
    (write_tiny_imagenet if name == "tinyimagenet" else write_imagenet)(tmp_path)
    clean, noisy = load(name, tmp_path), load(name, tmp_path, label_noise=0.5)
    assert torch.equal(noisy.true_labels, clean.labels)
    assert torch.equal(noisy.test_labels, clean.test_labels)
    assert int(noisy.noisy.sum()) == round(0.5 * len(clean.labels))
    assert torch.equal(noisy.labels[~noisy.noisy], clean.labels[~noisy.noisy])
    assert not torch.equal(noisy.labels, clean.labels)
    assert noisy.labels.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["tinyimagenet", "imagenet"])
def test_some_of_the_stored_images_are_of_every_class(name: str, tmp_path: Path) -> None:
    (write_tiny_imagenet if name == "tinyimagenet" else write_imagenet)(tmp_path)
    everything, some = load(name, tmp_path), load(name, tmp_path, examples=6, evaluate=(6, 3), label_noise=0.5)
    assert torch.equal(stored(some.inputs), spread(stored(everything.inputs), 6))
    assert torch.equal(some.true_labels, spread(everything.labels, 6))
    assert some.true_labels.unique().tolist() == [0, 1, 2]
    assert torch.equal(stored(some.test_inputs), spread(stored(everything.test_inputs), 3))
    assert torch.equal(some.test_labels, spread(everything.test_labels, 3))
    assert int(some.noisy.sum()) == 3
    assert some.inputs[:].mean((0, 2, 3)).tolist() == pytest.approx([0] * 3, abs=1e-5)
    assert len(some.validation_labels) == len(some.validation_inputs) == 0


def test_more_images_than_there_are_are_refused_before_they_are_read(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    with pytest.raises(ConfigError, match="--examples: got 15, expected at most the 14 training examples"):
        load("imagenet", tmp_path, examples=15)
    assert not list(tmp_path.glob("*.npz"))


def test_imagenet_has_its_folders_as_classes(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    data = load("imagenet", tmp_path, image_size=24)
    assert data.inputs.shape == (14, 3, 24, 24)
    assert data.test_inputs.shape == (3, 3, 24, 24)
    assert data.labels.tolist() == [0] * 4 + [1] * 6 + [2] * 4
    assert data.test_labels.tolist() == [0, 1, 2]
    assert len(data.validation_labels) == 0
    assert torch.equal(
        stored(data.inputs)[9], torch.tensor([10, 20, 30], dtype=torch.uint8).view(3, 1, 1).expand(3, 24, 24)
    )


@pytest.mark.parametrize(("size", "square"), [((96, 64), (16, 0)), ((64, 96), (0, 16)), ((64, 64), (0, 0))])
def test_the_largest_centred_square_is_taken(size: tuple[int, int], square: tuple[int, int], tmp_path: Path) -> None:
    write_image(tmp_path / "image.png", 0, size)
    image = np.asarray(Image.open(tmp_path / "image.png"))
    left, top = square
    assert np.array_equal(
        read_image(tmp_path / "image.png", 64), image[top : top + 64, left : left + 64].transpose(2, 0, 1)
    )


def test_reducing_averages_over_what_it_covers(tmp_path: Path) -> None:
    # A pattern finer than the small image can show: without antialiasing it would be black or white.
    pattern = np.indices((64, 64)).sum(0) % 2 * 255
    Image.fromarray(pattern.astype(np.uint8)).save(tmp_path / "image.png")
    assert np.abs(read_image(tmp_path / "image.png", 16).astype(int) - 127).max() <= 2


@pytest.mark.parametrize("name", ["tinyimagenet", "imagenet"])
def test_images_are_read_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (write_tiny_imagenet if name == "tinyimagenet" else write_imagenet)(tmp_path)
    first = load(name, tmp_path)
    assert [path.name for path in tmp_path.glob(f"{name}*")] == [f"{name}-32.npz"]
    # Another size has a cache of its own.
    load(name, tmp_path, image_size=16)
    monkeypatch.setattr(image_folders, "read_image", None)
    assert_same_data(load(name, tmp_path), first)
    assert load(name, tmp_path, image_size=16).inputs.shape[-1] == 16
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("damage", ["one bit", "truncated", "empty", "another file"])
def test_a_damaged_cache_is_made_anew_and_this_is_said(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_tiny_imagenet(tmp_path)
    first = load("tinyimagenet", tmp_path)
    cache = tmp_path / "tinyimagenet-32.npz"
    whole = cache.read_bytes()
    if damage == "one bit":
        content = bytearray(whole)
        content[len(content) // 2] ^= 1
        cache.write_bytes(content)
    elif damage == "another file":
        write_tiny_imagenet(tmp_path, each=11)
        load("tinyimagenet", tmp_path)
        for name in WORDNET:
            (root / "train" / name / "images" / f"{name}_10.JPEG").unlink()
        write_tiny_imagenet(tmp_path)
    else:
        cache.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"")
    capsys.readouterr()
    assert_same_data(load("tinyimagenet", tmp_path), first)
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert f"{cache} cannot be used and is made anew" in said
    assert_same_data(load("tinyimagenet", tmp_path), first)
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.glob("*.tmp"))


def test_no_bit_of_the_cache_can_be_wrong_unnoticed(tmp_path: Path) -> None:
    write_tiny_imagenet(tmp_path, each=1, test=1)
    first = load("tinyimagenet", tmp_path, image_size=8)
    cache = tmp_path / "tinyimagenet-8.npz"
    whole = cache.read_bytes()
    # The directory of the archive, at its end, and what it has before the arrays, among the rest.
    for place in range(0, len(whole), 7):
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        cache.write_bytes(content)
        assert_same_data(load("tinyimagenet", tmp_path, image_size=8), first)


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_imagenet(tmp_path)

    def full(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as context:
        context.setattr(image_folders.np, "savez", full)
        data = load("tinyimagenet", tmp_path)
    assert "cannot be written, the images will be read again next time: no space left" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-imagenet-200"]
    assert_same_data(load("tinyimagenet", tmp_path), data)


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "file", "expected"),
    [
        (remove, "train/n04067472/images/n04067472_3.JPEG", "is missing"),
        (remove, "val/images/val_2.JPEG", "is missing"),
        (truncate, "train/n04067472/images/n04067472_3.JPEG", "as an image"),
        (empty, "val/images/val_2.JPEG", "as an image"),
        (remove, "wnids.txt", "cannot read"),
        (remove, "val/val_annotations.txt", "cannot read"),
        (empty, "val/val_annotations.txt", "expected images in"),
    ],
)
def test_a_bad_file_of_tiny_imagenet_is_named(damage: Any, file: str, expected: str, tmp_path: Path) -> None:
    path = write_tiny_imagenet(tmp_path) / file
    damage(path)
    with pytest.raises(ConfigError, match="--data-dir:") as refused:
        load("tinyimagenet", tmp_path)
    assert str(path) in str(refused.value)
    assert expected in str(refused.value)
    assert not list(tmp_path.glob("*.npz"))


def test_an_unknown_class_of_tiny_imagenet_is_named(tmp_path: Path) -> None:
    annotations = write_tiny_imagenet(tmp_path) / "val" / "val_annotations.txt"
    annotations.write_text(annotations.read_text().replace(WORDNET[0], "n00000000"))
    with pytest.raises(ConfigError, match=r"got 'n00000000' in line 3 of .*val_annotations.txt"):
        load("tinyimagenet", tmp_path)


def test_absent_archives_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--data-dir: cannot read .*wnids.txt"):
        load("tinyimagenet", tmp_path)
    with pytest.raises(ConfigError, match=r"--data-dir: cannot read .*train"):
        load("imagenet", tmp_path)


def test_bad_folders_of_imagenet_are_named(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    unknown = tmp_path / "val" / "n00000000"
    write_image(unknown / "image.JPEG", 0)
    with pytest.raises(ConfigError, match=f"got {unknown}, expected the classes of train"):
        load("imagenet", tmp_path)
    (tmp_path / "train" / "n00000000").mkdir()
    with pytest.raises(ConfigError, match="n00000000, which is empty"):
        load("imagenet", tmp_path)
    bad = tmp_path / "train" / "n00000000" / "notes.txt"
    bad.write_text("no image")
    with pytest.raises(ConfigError, match=f"cannot read {bad} as an image"):
        load("imagenet", tmp_path)


def test_images_that_do_not_fit_are_refused_with_the_size_that_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_imagenet(tmp_path)  # 17 images
    monkeypatch.setattr(image_folders, "free_bytes", lambda device: 10_000_000)
    monkeypatch.setattr(image_folders, "SHARE_OF_MEMORY", 0.5)
    with pytest.raises(ConfigError) as refused:
        load("imagenet", tmp_path, image_size=400)
    # 17 x 3 x 400 x 400 = 8.16 million bytes; 17 x 3 x 312 x 312 = 4.96, and 320 would take 5.2.
    assert str(refused.value) == (
        "--image-size: got 400, at which the 17 images take 0.00816 GB, expected at most 0.005 GB, 50% of the free "
        "memory of cpu: --image-size 312 fits"
    )
    assert not list(tmp_path.glob("*.npz"))
    assert load("imagenet", tmp_path, image_size=312).inputs.shape[-1] == 312


def test_free_memory_is_a_plausible_number() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 10**6 < image_folders.free_bytes(torch.device("cpu")) <= total


@pytest.mark.parametrize(("name", "size"), [("tinyimagenet", 32), ("imagenet", 224)])
def test_the_size_of_images_defaults_to_that_of_the_data_set(name: str, size: int, tmp_path: Path) -> None:
    assert resolve(TrainConfig(data=name, data_dir=str(tmp_path))).image_size == size


@pytest.mark.parametrize(("name", "method"), [("tinyimagenet", "FP"), ("imagenet", "baseline")])
def test_a_run_without_a_validation_set(
    name: str, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (write_tiny_imagenet if name == "tinyimagenet" else write_imagenet)(tmp_path)
    config = TrainConfig(
        out=str(tmp_path / "run"),
        data=name,
        data_dir=str(tmp_path),
        image_size=16,
        augment="crop_flip",
        label_noise=0.25,
        method=method,
        epochs=2,
        batch_size=4,
        trace_samples=8,
        device="cpu",
    )
    assert loop.train(config) == "finished"
    assert "validation -  test" in capsys.readouterr().out
    for record in RunFolder(config.out).read_metrics():
        assert record["validation_accuracy"] is None
        assert 0 <= record["test_accuracy"] <= 1
        assert record["trace_fisher"] > 0

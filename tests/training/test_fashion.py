from __future__ import annotations

import gzip
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastfisher.training import fashion
from fastfisher.training.config import ConfigError, TrainConfig, resolve
from fastfisher.training.data import SPLIT_SEED, Data, load_data, spread
from fastfisher.training.fashion import CHECKSUMS
from fastfisher.training.loop import train
from tests.support.archives import accept_fashion, idx, write_fashion
from tests.training.runs import metrics

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = CHECKSUMS
INSTALLED = fashion.DEBIAN
WAYS = ["the package dataset-fashion-mnist of Debian or Ubuntu", "--download", "torchvision"]


@pytest.fixture(autouse=True)
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the package's files would be, which this machine may have."""
    folder = tmp_path / "usr" / "share"
    monkeypatch.setattr(fashion, "DEBIAN", folder)
    return folder


def load(data_dir: Path, **changes: Any) -> Data:
    options: dict[str, Any] = {"image_size": 28, "label_noise": 0.0, "noise_seed": 0, "device": "cpu"}
    return load_data("fashion", data_dir=str(data_dir), **{**options, **changes})


def normalised(images: Tensor, by: Tensor) -> Tensor:
    return (images - by.mean()) / by.std()


def split(arrays: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Images and labels for training, validation and testing, as they should be."""
    images, labels = torch.from_numpy(arrays[TRAIN_IMAGES]).float()[:, None], torch.from_numpy(arrays[TRAIN_LABELS])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    parts = order[5_000:], order[:5_000]
    test = torch.from_numpy(arrays[TEST_IMAGES]).float()[:, None], torch.from_numpy(arrays[TEST_LABELS])
    return [*(images[part] for part in parts), test[0]], [*(labels[part] for part in parts), test[1]]


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("where", ["data_dir", "torchvision", "debian"])
def test_the_files_are_found_in_each_place_gzipped_or_not(
    where: str, gzipped: bool, tmp_path: Path, debian: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir = tmp_path / "data"
    places = {"data_dir": data_dir, "torchvision": data_dir / "FashionMNIST" / "raw", "debian": debian}
    arrays = write_fashion(places[where], gzipped=gzipped)
    accept_fashion(arrays, monkeypatch)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    data = load(data_dir)
    images, labels = split(arrays)
    for found, expected in zip((data.inputs, data.validation_inputs, data.test_inputs), images, strict=True):
        torch.testing.assert_close(found, normalised(expected, images[0]))
    for found, expected in zip((data.labels, data.validation_labels, data.test_labels), labels, strict=True):
        assert torch.equal(found, expected)
    assert data.classes == 10
    assert len(data.validation_labels) == 5_000


def test_at_14_an_image_is_the_mean_of_its_squares_of_2_x_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = write_fashion(tmp_path)
    accept_fashion(arrays, monkeypatch)
    data = load(tmp_path, image_size=14, examples=50, evaluate=(40,))
    images, _ = split(arrays)
    # Sums of four bytes and their quarters are exact.
    small = [sum(part[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4 for part in images]
    chosen = spread(small[0], 50)
    std, mean = torch.std_mean(chosen, dim=(0, 2, 3), keepdim=True)
    parts = (data.inputs, chosen), (data.validation_inputs, spread(small[1], 40)), (data.test_inputs, small[2])
    for found, expected in parts:
        assert torch.equal(found, (expected - mean) / std)  # type: ignore[arg-type]


def test_a_file_that_is_not_gzipped_is_read_where_there_are_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept_fashion(write_fashion(tmp_path), monkeypatch)
    (tmp_path / f"{TRAIN_IMAGES}.gz").write_bytes(b"cut off")
    assert load(tmp_path).classes == 10


def test_a_folder_that_has_all_files_is_read_before_one_that_lacks_some(
    tmp_path: Path, debian: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept_fashion(write_fashion(tmp_path), monkeypatch)
    shutil.copytree(tmp_path, debian, ignore=lambda folder, names: ["usr"])
    (tmp_path / TEST_LABELS).unlink()
    assert len(load(tmp_path).test_labels) == 30


def test_where_there_is_none_the_ways_to_get_it_are_named(tmp_path: Path, debian: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load(tmp_path / "absent")
    for part in (f"--data-dir: got '{tmp_path / 'absent'}'", f"{debian} (has none)", *CHECKSUMS, *WAYS):
        assert part in str(refused.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    write_fashion(tmp_path, gzipped=True)
    (tmp_path / f"{TRAIN_LABELS}.gz").unlink()
    with pytest.raises(ConfigError) as refused:
        load(tmp_path)
    assert f"{tmp_path} (lacks {TRAIN_LABELS});" in str(refused.value)


LABELS = [i % 10 for i in range(30)]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (TEST_IMAGES, lambda whole: whole[:-1], ["got 23535 bytes", "expected 23536", "the 30"]),
        (TEST_IMAGES, lambda whole: whole + b"0", ["got 23537 bytes", "expected 23536", "the 30"]),
        (TEST_IMAGES, lambda whole: whole[:15], ["got 15 bytes", "expected at least the 16"]),
        (TEST_LABELS, lambda whole: b"", ["got 0 bytes", "expected at least the 8"]),
        (TEST_IMAGES, lambda whole: idx(2049, LABELS), ["the magic number 2049", "expected 2051"]),
        (TEST_LABELS, lambda whole: whole[::-1], ["the magic number", "expected 2049"]),
        (TEST_IMAGES, lambda whole: idx(2051, [[[0] * 32] * 32] * 30), ["images of 32 x 32", "expected 28 x 28"]),
        (TEST_LABELS, lambda whole: idx(2049, LABELS[:-1]), ["got 29 labels", "each of the 30 images"]),
        (TEST_LABELS, lambda whole: idx(2049, [*LABELS[:-1], 10]), ["label 10 of image 29", "labels from 0 to 9"]),
        (TEST_LABELS, lambda whole: idx(2049, LABELS[::-1]), ["contents with the CRC-32", "Fashion-MNIST's"]),
        (TEST_IMAGES, lambda whole: whole[:-1] + b"\x00", ["contents with the CRC-32", "Fashion-MNIST's"]),
    ],
)
@pytest.mark.parametrize("gzipped", [False, True])
def test_what_is_wrong_with_a_file_is_said(
    gzipped: bool, name: str, content: Any, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept_fashion(write_fashion(tmp_path), monkeypatch)
    wrong = content((tmp_path / name).read_bytes())
    path = tmp_path / (f"{name}.gz" if gzipped else name)
    (tmp_path / name).unlink()
    path.write_bytes(gzip.compress(wrong) if gzipped else wrong)
    with pytest.raises(ConfigError) as refused:
        load(tmp_path)
    for part in ("--data-dir: ", f" in {path}, ", *expected, "delete it", *WAYS):
        assert part in str(refused.value), refused.value


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[:-9], lambda whole: b"PK" + whole, lambda whole: whole[:-6] + b"123456"]
)
def test_a_damaged_gzip_file_is_named(damage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accept_fashion(write_fashion(tmp_path, gzipped=True), monkeypatch)
    path = tmp_path / f"{TEST_IMAGES}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError) as refused:
        load(tmp_path)
    for part in (f"--data-dir: cannot read {path}", "delete it", *WAYS):
        assert part in str(refused.value)


def test_mnist_is_not_taken_for_fashion(tmp_path: Path) -> None:
    """Files of the same names and shapes; here the sums are those of the real data."""
    write_fashion(tmp_path)
    with pytest.raises(ConfigError, match=f"contents with the CRC-32 .* in .*{TRAIN_IMAGES}, expected b4f29f28"):
        load(tmp_path)


@pytest.mark.skipif(not INSTALLED.is_dir(), reason="the package dataset-fashion-mnist is not installed")
def test_the_package_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "DEBIAN", INSTALLED)
    data = load(tmp_path, image_size=14)
    assert [len(data.labels), len(data.validation_labels), len(data.test_labels)] == [55_000, 5_000, 10_000]
    assert data.test_labels.bincount().tolist() == [1_000] * 10


def test_a_folder_need_not_be_there_for_a_package(tmp_path: Path) -> None:
    config = resolve(TrainConfig(data="fashion", data_dir=str(tmp_path / "absent")))
    assert config.image_size == 28


def test_a_run_trains_on_some_and_is_tested_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accept_fashion(write_fashion(tmp_path / "data"), monkeypatch)
    config = TrainConfig(
        data="fashion", data_dir=str(tmp_path / "data"), image_size=14, examples=64, evaluate=(25,), batch_size=32,
        epochs=1, measure="none", out=str(tmp_path / "run"), device="cpu",
    )  # fmt: skip
    assert train(config) == "finished"
    (record,) = metrics(config)
    for accuracy, count in (("train", 64), ("validation", 25), ("test", 30)):
        right = record[f"{accuracy}_accuracy"] * count
        assert right == pytest.approx(round(right), abs=1e-4)


def test_nothing_is_written_where_there_is_no_data(tmp_path: Path) -> None:
    config = TrainConfig(data="fashion", data_dir=str(tmp_path), out=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="dataset-fashion-mnist"):
        train(config)
    assert not list(tmp_path.iterdir())

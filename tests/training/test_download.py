"""``--download`` against a server on this machine: the addresses and sums of torchvision are replaced by its."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from fastfisher.training import fashion
from fastfisher.training.config import ConfigError, TrainConfig, resolve
from fastfisher.training.data import Data, load_data
from tests.support.archives import accept_fashion, write_cifar, write_fashion


class Server:
    """Serves the files of a folder, and remembers which were asked for."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.asked: list[str] = []
        outer = self

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments, directory=str(outer.folder))

            def do_GET(self) -> None:
                outer.asked.append(self.path.lstrip("/"))
                super().do_GET()

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/"
        self.thread = threading.Thread(target=self.http.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fashion, "DEBIAN", tmp_path / "absent")
    server = Server(tmp_path / "served")
    yield server
    server.close()


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def serve_fashion(server: Server, torchvision: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    accept_fashion(write_fashion(server.folder, gzipped=True), monkeypatch)
    names = [f"{name}.gz" for name in fashion.CHECKSUMS]
    kind = torchvision.datasets.FashionMNIST
    monkeypatch.setattr(kind, "mirrors", [server.url])
    monkeypatch.setattr(kind, "resources", [(name, md5(server.folder / name)) for name in names])
    return names


def serve_cifar(server: Server, torchvision: Any, monkeypatch: pytest.MonkeyPatch, classes: int) -> Path:
    """Serve an archive of a made-up data set, and return its extracted folder."""
    base = write_cifar(server.folder, classes, training=6_000)
    kind = torchvision.datasets.CIFAR10 if classes == 10 else torchvision.datasets.CIFAR100
    archive = server.folder / kind.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(base, arcname=base.name)
    for name in ("train_list", "test_list"):
        monkeypatch.setattr(kind, name, [[file, md5(base / file)] for file, _ in getattr(kind, name)])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(base / kind.meta["filename"])})
    monkeypatch.setattr(kind, "url", server.url + kind.filename)
    monkeypatch.setattr(kind, "tgz_md5", md5(archive))
    return base


def load(name: str, data_dir: Path, download: bool = True) -> Data:
    size = 28 if name == "fashion" else 32
    options: dict[str, Any] = {"image_size": size, "label_noise": 0.0, "noise_seed": 0, "device": "cpu"}
    return load_data(name, data_dir=str(data_dir), download=download, **options)


def test_fashion_is_fetched_once(
    torchvision: Any, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = serve_fashion(server, torchvision, monkeypatch)
    data_dir = tmp_path / "new" / "data"
    fetched = load("fashion", data_dir)
    assert sorted(set(server.asked)) == sorted(names)
    # The extracted files and nothing else, where torchvision finds them, too.
    raw = data_dir / "FashionMNIST" / "raw"
    assert sorted(path for path in data_dir.rglob("*") if path.is_file()) == sorted(
        raw / name for name in fashion.CHECKSUMS
    )
    assert len(torchvision.datasets.FashionMNIST(str(data_dir), train=False)) == 30
    server.asked.clear()
    again, direct = load("fashion", data_dir), load("fashion", server.folder, download=False)
    assert server.asked == []
    for other in (again, direct):
        assert torch.equal(fetched.inputs[:], other.inputs[:])
        assert torch.equal(fetched.labels, other.labels)


def test_what_is_there_is_not_fetched(
    torchvision: Any, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_fashion(server, torchvision, monkeypatch)
    monkeypatch.setattr(fashion, "DEBIAN", server.folder)
    load("fashion", tmp_path / "data")
    assert server.asked == []
    assert not (tmp_path / "data").exists()


def test_without_download_nothing_is_fetched(
    torchvision: Any, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_fashion(server, torchvision, monkeypatch)
    with pytest.raises(ConfigError, match="--download"):
        load("fashion", tmp_path / "data", download=False)
    assert server.asked == []


@pytest.mark.parametrize("cause", ["other contents", "absent", "no server"])
def test_what_cannot_be_fetched_or_fails_its_sum_leaves_nothing(
    cause: str, torchvision: Any, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = serve_fashion(server, torchvision, monkeypatch)
    if cause == "other contents":
        shutil.copy(server.folder / names[1], server.folder / names[3])
    elif cause == "absent":
        (server.folder / names[3]).unlink()
    else:
        monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:1/"])
    data_dir = tmp_path / "data"
    with pytest.raises(ConfigError) as refused:
        load("fashion", data_dir)
    for part in (
        f"--download: fashion could not be fetched into '{data_dir}'",
        names[3] if cause != "no server" else names[0],
        "by hand",
    ):
        assert part in str(refused.value)
    assert not list(data_dir.iterdir())


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_is_fetched_and_damaged_files_are_replaced(
    classes: int, torchvision: Any, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = serve_cifar(server, torchvision, monkeypatch, classes)
    name, data_dir = f"cifar{classes}", tmp_path / "data"
    fetched = load(name, data_dir)
    assert fetched.inputs.shape == (1_000, 3, 32, 32)
    assert [path.name for path in data_dir.iterdir()] == [base.name]
    assert len(server.asked) == 2  # torchvision looks for redirections first
    load(name, data_dir)
    assert len(server.asked) == 2
    damaged = data_dir / base.name / ("data_batch_3" if classes == 10 else "train")
    damaged.write_bytes(b"cut off")
    with pytest.raises(ConfigError, match="--download fetches; missing or damaged"):
        load(name, data_dir, download=False)
    assert torch.equal(load(name, data_dir).inputs[:], fetched.inputs[:])
    assert md5(damaged) == md5(base / damaged.name)


@pytest.mark.parametrize("name", ["fashion", "cifar10"])
def test_a_folder_that_cannot_be_written_is_named(name: str, torchvision: Any, server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"--download: {name} could not be fetched into '{tmp_path}/file/data'"):
        load(name, tmp_path / "file" / "data")


def test_download_needs_torchvision(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ConfigError, match="--download: got True with --data fashion, which needs torchvision"):
        load("fashion", tmp_path)
    assert not (tmp_path / "FashionMNIST").exists()


def test_a_folder_to_download_into_need_not_be_there(tmp_path: Path) -> None:
    config = resolve(TrainConfig(data="cifar10", data_dir=str(tmp_path / "new"), download=True))
    assert config.download

"""The README and the site: every block of code runs, every command exists, and nothing public is left out.

A page's blocks run in order in one namespace. Beside the imports it has, as any reader would, ``model`` (a small ReLU
network on 8x8 images), a batch ``x, y`` (also ``inputs, targets`` and ``images, labels``), a second one ``x_noisy,
y_noisy``, ``loader``, ``optimizer`` and ``learning_rate``. A block that cannot run here says why in its info string,
as in ``python needs="a GPU"``.
"""

from __future__ import annotations

import argparse
import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastfisher
from bench import readme
from fastfisher import cli, ops
from fastfisher.ops import reference
from fastfisher.paper.experiments import IDS, THEMES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PLACEHOLDERS = {
    **dict.fromkeys(("N", "K", "s"), "2"), **dict.fromkeys(("EPS", "BETA"), "1.5"), "ID": "fig1",
    **dict.fromkeys(("DIR", "FOLDER", "ADDRESS"), "somewhere"),
}  # fmt: skip
"""What stands for a reader's own value in a command, and a value for it."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def namespace() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 10)
    )
    x, y = torch.randn(256, 1, 8, 8), torch.randint(10, (256,))
    data = torch.utils.data.TensorDataset(x, y)
    names: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "fastfisher": fastfisher, "model": model}
    names.update(x=x, y=y, inputs=x, targets=y, images=x, labels=y, x_noisy=x, y_noisy=y.roll(1))
    names.update(loader=torch.utils.data.DataLoader(data, batch_size=64), learning_rate=0.01)
    names.update(optimizer=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
    return names


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """Info string, text and first line of each fenced block."""
    text = page.read_text()
    return [(m[1].strip(), m[2], text.count("\n", 0, m.start()) + 2) for m in FENCE.finditer(text)]


# Those of the page about migrating run in test_migrating.py, which compares them with the packages that they name.
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "migrating.md"], ids=name_of)
@pytest.mark.usefixtures("one_thread", "torchvision")  # Transformers and Lightning import torchvision where it is
def test_every_block_of_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # What torchrun sets, for one process.
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    python = [block for block in blocks(page) if block[0].startswith("python")]
    names = namespace()
    for info, text, line in python:
        if info == 'python needs="a GPU"' and not torch.cuda.is_available():
            continue
        if info == 'python needs="TRL"':  # tests/test_trl.py has these lines
            continue
        assert info == "python", f"{name_of(page)}:{line}: no such reason to leave a block out: {info}"
        # So many lines before it that an error names the line of the page.
        exec(compile("\n" * (line - 1) + text, str(page), "exec"), names)


def commands(page: Path) -> list[list[str]]:
    """The words of each command of this repository, of a line in a block of shell or of code within a line."""
    text = page.read_text()
    lines = [line for info, block, _ in blocks(page) if info in ("", "sh", "bash") for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    found = []
    for line in lines:
        if re.match(r"(fastfisher (info|train|reproduce)|python -m|make)\b", line):
            words = shlex.split(line, comments=True)
            found.append([PLACEHOLDERS.get(word, word) for word in words if word not in ("...", "…")])
    return found


@functools.cache
def parser() -> argparse.ArgumentParser:
    """The parser of ``fastfisher``."""

    class Found(Exception):
        pass

    def stop(self: argparse.ArgumentParser, arguments: Any = None) -> None:
        raise Found(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Found) as caught:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        cli.main([])
    return caught.value.args[0]  # type: ignore[no-any-return]


def parsed(words: list[str]) -> argparse.Namespace | None:
    """What the command line makes of the words; None where it refuses them."""
    try:
        return parser().parse_args(words)
    except SystemExit as ended:
        return None if ended.code else argparse.Namespace()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_exists(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for words in commands(page):
        if words[:3] == ["python", "-m", "fastfisher"]:
            words = words[2:]
        if words[0] == "make":
            for target in [word for word in words[1:] if "=" not in word]:
                assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"no such target: make {target}"
        elif words[0] == "python":
            place = ROOT / words[2].replace("fastfisher.kernels", "kernels").replace(".", "/")
            assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), words
        else:
            given = parsed(words[1:]) or parsed([*words[1:], "1"])  # "1": an option named without its value
            assert given is not None, f"not a command: {shlex.join(words)}"
            assert set(getattr(given, "ids", None) or ()) <= set(THEMES), words


def test_commands_that_do_not_exist_are_found() -> None:
    assert parsed(["train", "--no-such-option"]) is None
    assert parsed(["no-such-command"]) is None
    assert parsed(["train", "--seeds", "three"]) is None
    assert parsed(["train", "--help"]) is not None
    assert parsed(["train", "--seeds", "3"]) == argparse.Namespace(command="train", seeds=3)


def test_the_api_has_every_public_name_and_no_other() -> None:
    text = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    named = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    public = [f"fastfisher.{name}" for name in fastfisher.__all__] + [reference.__name__]
    for file in (ROOT / "fastfisher" / "integrations").glob("[a-z]*.py"):
        classes = re.findall(r"^class ([A-Z]\w+)", file.read_text(), re.MULTILINE)
        public += [f"fastfisher.integrations.{file.stem}.{name}" for name in classes]
    assert sorted(named) == sorted(public)


def test_the_guide_uses_every_public_function() -> None:
    text = "\n".join(page.read_text() for page in PAGES if page.parent.name != "api")
    results = [name for name in fastfisher.__all__ if name[0].isupper()]  # results of functions: the API has them
    missing = [name for name in set(fastfisher.__all__) - set(results) if f"fastfisher.{name}(" not in text]
    assert not missing


def test_the_kernels_page_has_every_operator() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text()
    assert [name for name in ops.served.FAMILIES if f"`{name}`" not in text] == []


def test_every_id_of_the_paper_has_its_command() -> None:
    text = (ROOT / "docs" / "reproduce.md").read_text()
    assert [name for name in IDS if f"`fastfisher reproduce {name}`" not in text] == []


@pytest.mark.parametrize("page", readme.PAGES, ids=name_of)
def test_figures_quoted_are_those_of_the_last_measurement(page: Path) -> None:
    assert readme.filled(page.read_text()) == page.read_text(), "run python -m bench.readme"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1500


def test_the_table_of_costs_has_every_figure() -> None:
    """A benchmark that is renamed would leave "not measured" in the table."""
    sources, form = readme.PARTS["costs"]
    table = form(*(source.read_text() for source in sources))
    assert "not measured |" not in table and len(table.split("\n\n")[0].splitlines()) == len(readme.CALLS) + 4


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(
        r"`((?:bench|csrc|docs|examples|fastfisher|kernels|results|tests)/[\w./]*)[`:]", page.read_text()
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_steps_quoted_are_those_of_the_library() -> None:
    from fastfisher.penalise.rho import FROZEN_STEP

    table = (ROOT / "docs" / "choosing.md").read_text()
    rows = re.findall(r"^\| (float64|float32|float16|bfloat16)[^|]*\| (\S+) \| (\S+) \|", table, re.MULTILINE)
    quoted = {getattr(torch, name): {"forward": float(one), "central": float(two)} for name, one, two in rows}
    assert quoted == FROZEN_STEP


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "api" / "penalty.html").read_text()
    assert "graphs: bool" in re.sub(r"<[^>]*>", "", page)  # the signature of a class
    assert "trace_estimate" in page  # docstrings of properties too
    assert ":class:" not in page and "&gt;&gt;&gt; penalty" not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL)

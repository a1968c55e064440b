"""docs/migrating.md: every block of code runs, and what it calls ``theirs`` is what it calls ``ours``."""

from __future__ import annotations

import copy
import math
import re
import statistics
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastfisher
from fastfisher.measure.estimate import TraceEstimate
from tests.support.networks import flat, torchvision_operators

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = (Path(__file__).parent.parent / "docs" / "migrating.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def identity(block: str) -> str:
    imported = re.findall(r"^from (?!torch)\S+ import (\w+)", block, re.MULTILINE)
    return imported[-1] if imported else "SAM"


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 5)
    )


def test_the_page_has_a_block_for_each_row_of_its_table() -> None:
    table = PAGE.partition("\n\n## ")[0]
    rows = re.findall(r"^\| (?!there|---).*\|$", table, re.MULTILINE)
    assert len(rows) == len(BLOCKS) == 17


@pytest.mark.parametrize("block", BLOCKS, ids=[f"{i}-{identity(b)}" for i, b in enumerate(BLOCKS)])
@pytest.mark.filterwarnings("ignore")  # the peers' own
def test_theirs_is_ours(block: str) -> None:
    with torchvision_operators():  # laplace imports torchmetrics, and that torchvision where it is
        for package in re.findall(r"^from (\w+)", block, re.MULTILINE):
            pytest.importorskip(package, reason=f"{package}: pip install .[peers]")
    model, labels = network().eval(), torch.arange(6) % 5
    images = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    values = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    flags = (values > 0.3).float()
    scope: dict[str, Any] = {
        "torch": torch, "nn": nn, "F": F, "copy": copy, "math": math, "fastfisher": fastfisher,
        "model": model, "images": images, "labels": labels, "values": values, "flags": flags,
    }  # fmt: skip
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(block, "docs/migrating.md", "exec"), scope)
    theirs, ours = scope["theirs"], scope["ours"]
    if isinstance(ours, TraceEstimate):  # both are estimates: within 4 standard errors of each other
        spread = statistics.stdev(theirs) / math.sqrt(len(theirs))
        error = math.hypot(spread, ours.standard_error)
        assert 0 < error < 0.2 * ours.value
        assert abs(statistics.mean(theirs) - ours.value) < 4 * error
    elif isinstance(ours, list):
        torch.testing.assert_close(flat(list(theirs)), flat(ours), rtol=1e-3, atol=1e-6)
    else:
        theirs, ours = (torch.as_tensor(x, dtype=torch.float64) for x in (theirs, ours))
        assert isinstance(ours, Tensor)
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6)

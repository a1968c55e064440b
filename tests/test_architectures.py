"""Per-example gradient norms of a handful of architectures as in ``bench/architectures.py``, the smallest of each kind:
no parameter takes a slow path, and the norms are those of one backward per example."""

from __future__ import annotations

from typing import Any

import pytest

from bench.architectures import Architecture, measure

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("library", "name", "size", "options"),
    [
        ("torchvision", "squeezenet1_1", 32, {}),
        ("torchvision", "shufflenet_v2_x0_5", 32, {}),
        ("torchvision", "mobilenet_v3_small", 32, {}),
        ("timm", "convnext_atto", 32, {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
        ("timm", "vit_tiny_patch16_224", 32, {"img_size": 32, "depth": 2, "embed_dim": 48}),
        ("timm", "test_nfnet", 64, {}),
        ("timm", "test_byobnet", 64, {}),
    ],
)
def test_every_parameter_has_a_formula(
    torchvision: Any, library: str, name: str, size: int, options: dict[str, Any]
) -> None:
    pytest.importorskip(library, reason=f"pip install {library}")
    found = measure(Architecture(library, name, size, options))
    assert found.refusal is None and not found.slow
    assert found.error < 1e-9

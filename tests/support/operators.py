"""What the tests of the operators share."""

from __future__ import annotations

import re
from pathlib import Path

HOST = Path(__file__).parents[2] / "csrc" / "host"


def declared() -> list[str]:
    """The name of every operator, as the C++ sources declare it."""
    return [
        name for file in sorted(HOST.glob("*.cpp")) for name in re.findall(r"^OPERATOR\((\w+),", file.read_text(), re.M)
    ]

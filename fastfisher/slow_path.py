"""How the library says that it could not take its fast path."""

from __future__ import annotations

import warnings


class SlowPathWarning(UserWarning):
    """A fast path could not serve; the message says which, why, and what would help.

    To forbid slow paths: ``warnings.simplefilter("error", fastfisher.SlowPathWarning)``.
    """


def warn_slow_path(message: str) -> None:
    """Warns of a slow path: shown once per message, raised each time where the user made it an error."""
    warnings.warn(message, SlowPathWarning, stacklevel=2)

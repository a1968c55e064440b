"""How a run ends before its last epoch: by a signal, or because it diverged."""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType


class TrainingDivergedError(RuntimeError):
    """The loss or the logits are no longer finite numbers."""


def how_to_continue(out: str) -> str:
    """Return what is said of a run, or of several seeds, that Ctrl-C interrupted."""
    return f"interrupted; continue with: fastfisher train --resume --out {shlex.quote(out)}"


def ending_signals() -> list[int]:
    """Return the signals that must also stop child runs, except those that the user ignores (nohup)."""
    return [each for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) != signal.SIG_IGN]


@contextmanager
def catch_interrupt(signals: Sequence[int] = (signal.SIGINT,)) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag that the yielded function reads; the second raises KeyboardInterrupt.

    So does any other of ``signals``. The previous handlers are back afterwards. Outside the main thread, where Python
    delivers no signals, the flag is never set.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    caught = threading.Event()

    def first(number: int, frame: FrameType | None) -> None:
        caught.set()
        for each in signals:
            signal.signal(each, signal.default_int_handler)

    previous = {each: signal.signal(each, first) for each in signals}
    try:
        yield caught.is_set
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)

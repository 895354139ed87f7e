"""What this process does while it is a spare: it has imported what it would need, and gives its memory up first.

What it would need comes with control's order. It touches nothing that the process beside it works with: settings are
taken, models loaded and sockets opened only when it steps in.
"""

import contextlib
import importlib
import logging
from pathlib import Path

from agent.channel import Prepare
from agent.inference.configured import modules_for
from runtime.interpreter import RuntimeMissing, import_runtime

log = logging.getLogger(__name__)

_OOM_SCORE = Path("/proc/self/oom_score_adj")
_FIRST = "1000"  # the highest: when memory runs out, the kernel takes this process before any that serves


class Waiting:
    """A process that may be a spare: it is one from the first `prepare` until `step_in`."""

    def __init__(self, oom_score: Path = _OOM_SCORE) -> None:
        """``oom_score``: where the kernel is told whom to end first."""
        self._oom_score = oom_score
        self._score_before: str | None = None

    def prepare(self, order: Prepare) -> None:
        """Import what the order names. What is missing here is said by whoever needs it."""
        if self._score_before is None:
            self._score_before = self._score(_FIRST)
        for runtime in order.runtimes:
            with contextlib.suppress(RuntimeMissing):
                import_runtime(runtime.value)
        for module in modules_for(order.configuration):
            try:
                importlib.import_module(module)
            except ImportError as error:
                log.warning("the spare cannot import %s: %s", module, error)

    def step_in(self) -> None:
        """Be as any other process from now on."""
        if self._score_before is not None:
            self._score(self._score_before)
            self._score_before = None

    def _score(self, score: str) -> str | None:
        """Set the score and return the one before; a kernel that does not let is none the worse for it."""
        with contextlib.suppress(OSError):
            before = self._oom_score.read_text(encoding="ascii").strip()
            self._oom_score.write_text(score, encoding="ascii")
            return before
        return None

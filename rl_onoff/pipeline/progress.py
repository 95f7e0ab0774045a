"""How far a stage is: a bar with rate and time left on a terminal, a log line every few seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Self

log = logging.getLogger(__name__)


class Progress:
    """Counts responses and tokens of one stage; `report` is called with the figures every `every_s` seconds."""

    def __init__(self, stage: str, total: int, report: Callable[[dict[str, float]], None], every_s: float = 10.0):
        self.stage, self.total, self.report, self.every_s = stage, total, report, every_s
        self.responses = self.tokens = self._said = 0
        self._start = self._last = time.monotonic()
        self._end: float | None = None
        self._bar: Any = None

    def __enter__(self) -> Self:
        self._start = self._last = time.monotonic()
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self.total, desc=self.stage, unit="response", smoothing=0.1, dynamic_ncols=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        self._end = time.monotonic()
        if self.responses != self._said:
            self._say()

    def add(self, num_tokens: int) -> None:
        """One more response, of so many tokens."""
        self.responses += 1
        self.tokens += num_tokens
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self.tokens_per_s:.0f} tokens/s", refresh=False)
            self._bar.update()
        if time.monotonic() - self._last >= self.every_s:
            self._last = time.monotonic()
            self._say()

    @property
    def seconds(self) -> float:
        return max((self._end or time.monotonic()) - self._start, 1e-9)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    def _say(self) -> None:
        self._said = self.responses
        left = (self.total - self.responses) * self.seconds / self.responses
        if self._bar is None:
            figures = (self.stage, self.responses, self.total, self.tokens_per_s, timedelta(seconds=round(left)))
            log.info("%s: %d of %d responses, %.0f tokens/s, %s left", *figures)
        tokens = f"progress/{self.stage}_tokens"
        self.report({"progress/responses": self.responses, tokens: self.tokens, f"{tokens}_per_s": self.tokens_per_s})

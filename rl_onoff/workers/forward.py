"""What rl_onoff logs in a worker, kept until it can be handed to the process that the user sees."""

from __future__ import annotations

import logging
from collections import deque

Line = tuple[str, int, str]  # logger, level, text


class Forward(logging.Handler):
    """Keeps warnings of this package; whoever sends them does so from a thread of its own choice."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._waiting: deque[Line] = deque()
        logging.getLogger("rl_onoff").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._waiting.append((record.name, record.levelno, record.getMessage()))

    def lines(self) -> list[Line]:
        """Those since the last time."""
        return [self._waiting.popleft() for _ in range(len(self._waiting))]

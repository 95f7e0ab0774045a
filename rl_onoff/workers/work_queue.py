"""What a pool's replicas still have to do, and who gets what next: longest first, a prompt's samples together.

A share that is scored as a whole is a part of what is left (guided self-scheduling): large while there is much to do,
which keeps an engine's batches full, and small at the end, so that all replicas finish together. A replica that is
topped up while it samples has as much as its engine can use, but no more than its fair part of all that is not done.

When a replica dies, what it held comes back. No one can tell which of the responses did it, so they are tried again
in pieces, after everything that is above suspicion, and the third time each one alone: what dies then is named and
left out.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Sequence

import numpy as np

from rl_onoff.errors import EngineDiedError
from rl_onoff.types import Key
from rl_onoff.workers.wire import Work

MOST_DEATHS = 3  # of a replica, with the same response in its hands
FILL = 32  # responses that a share has at least, if there are enough: engines compute them side by side


class WorkQueue:
    """The work of one call. Replicas take from it side by side, each in a thread of its own."""

    def __init__(self, work: Sequence[Work], num_replicas: int, fill: int = FILL):
        groups: dict[bytes, list[Work]] = {}
        for one in work:
            groups.setdefault(one.prompt_ids.tobytes(), []).append(one)
        longest_first = sorted(groups.values(), key=lambda group: -max(one.num_tokens for one in group))
        self._waiting = deque(one for group in longest_first for one in group)
        self._suspects: list[list[Work]] = []  # pieces of what a dead replica held
        self._tokens = sum(one.num_tokens for one in work)  # of what waits
        self._taken = 0
        self._replicas, self._fill = num_replicas, fill
        self.stopped = False
        self.deaths: Counter[Key] = Counter()  # of replicas that held the response
        self.given_up: dict[Key, EngineDiedError] = {}  # what died too often, and its last death
        self._changed = threading.Condition()

    def take(self, most: int | None = None, held: int = 0, *, wait: bool = True) -> list[Work]:
        """The next share (None), or up to `most` for a replica that has `held`; empty: there is nothing more to do.

        Waits while others hold some that may come back. Without `wait` empty means that there is nothing now.
        """
        with self._changed:
            while wait and self._taken and not (self._waiting or self._suspects or self.stopped):
                self._changed.wait()
            share: list[Work] = []
            if self.stopped:
                return share
            if num_waiting := len(self._waiting):
                fair = math.ceil((num_waiting + self._taken) / self._replicas) - held
                number = self._cut() if most is None else min(most, num_waiting, fair if held else max(fair, 1))
                share = [self._waiting.popleft() for _ in range(number)]
                self._tokens -= sum(one.num_tokens for one in share)
            elif wait and self._suspects:
                self._suspects.sort(key=lambda piece: self.deaths[piece[0].key])
                share = self._suspects.pop()
            self._taken += len(share)
            return share

    def done(self) -> None:
        """One of the responses that were taken has its result."""
        with self._changed:
            self._taken -= 1
            if not self._taken:
                self._changed.notify_all()

    def give_back(self, work: Sequence[Work], error: EngineDiedError | None = None) -> None:
        """Take back what a replica held that died, maybe of it, with `error`."""
        with self._changed:
            self._taken -= len(work)
            if error is not None:
                self.deaths.update(one.key for one in work)
            deaths = max((self.deaths[one.key] for one in work), default=0)
            if error is not None and deaths >= MOST_DEATHS:
                self.given_up |= {one.key: error for one in work}
            elif deaths:
                # two rounds are left to find the one among n: pieces of √n, then each alone, is the least to do again
                size = len(work) if error is None else 1 if deaths == MOST_DEATHS - 1 else math.isqrt(len(work))
                self._suspects += [list(work[at : at + size]) for at in range(0, len(work), size)]
            else:
                self._waiting.extendleft(reversed(work))
                self._tokens += sum(one.num_tokens for one in work)
            self._changed.notify_all()

    def stop(self) -> None:
        """Nobody wants the rest: every `take` returns nothing."""
        with self._changed:
            self.stopped = True
            self._changed.notify_all()

    def _cut(self) -> int:
        """How many responses the next whole share has: a prompt's samples, unless that makes it twice as large."""
        enough = self._tokens / (2 * self._replicas)
        least = min(self._fill, math.ceil(len(self._waiting) / self._replicas))
        tokens, last = 0, self._waiting[0]
        for number, one in enumerate(self._waiting):
            full = number >= least and tokens >= enough
            if full and (tokens >= 2 * enough or not np.array_equal(one.prompt_ids, last.prompt_ids)):
                return number
            tokens, last = tokens + one.num_tokens, one
        return len(self._waiting)

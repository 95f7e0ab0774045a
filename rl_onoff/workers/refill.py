"""When a worker gets more to sample: while half of what it may hold is still with it, so that its engine never runs dry."""

from __future__ import annotations

from rl_onoff.backends.engine import Supply
from rl_onoff.types import Key, SampleRequest


class Refill:
    """What of a supply is with one worker. Whoever reads the worker's results discards their keys."""

    def __init__(self, supply: Supply, room: int):
        self._supply, self._room = supply, room
        self._ended = False
        self.keys: set[Key] = set()  # of the responses that are with the worker

    @property
    def is_due(self) -> bool:
        return not self._ended and len(self.keys) <= self._room // 2

    def take(self) -> tuple[list[SampleRequest], bool]:
        """More requests, which may be none, and whether there will never be more; waits when nothing is with the worker."""
        requests = self._supply.take(self._room - len(self.keys), wait=not self.keys)
        self._ended = not requests and not self.keys
        self.keys.update(request.key for request in requests)
        return requests, self._ended

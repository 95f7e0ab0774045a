"""Results of an asyncio engine as a plain iterator, in the order in which they are done."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any

PERIOD = 0.05  # seconds between two looks for more work while no result comes

Emit = Callable[[Any], None]
Work = tuple[int, Callable[[Emit], Coroutine[Any, Any, None]]]  # (cost, what to run; it emits results)
Take = Callable[[int, bool], Iterable[Work]]


def run(loop: asyncio.AbstractEventLoop, take: Take, limit: int, abort: Callable[[], None]) -> Iterator[Any]:
    """Run work side by side, as much as costs `limit` together, and yield what it emits; the first exception ends it
    all.

    `take` gives more work, up to so much, and waits for it where asked to.

    The loop turns only while a result is waited for; an engine with processes of its own goes on meanwhile. Whoever
    stops reading early stops the work: its tasks are cancelled, and `abort` tells the engine.
    """
    results: asyncio.Queue[Any] = asyncio.Queue()
    waiting: deque[Work] = deque()
    running: dict[asyncio.Task[None], int] = {}
    try:
        while True:
            if not waiting:
                waiting.extend(take(limit - sum(running.values()), not running))
            if not waiting and not running:
                return
            while waiting and (not running or sum(running.values()) + waiting[0][0] <= limit):
                cost, start = waiting.popleft()
                task = loop.create_task(start(results.put_nowait))
                task.add_done_callback(results.put_nowait)
                running[task] = cost
            try:
                result = loop.run_until_complete(asyncio.wait_for(results.get(), PERIOD))
            except TimeoutError:  # there may be more work by now
                continue
            if isinstance(result, asyncio.Task):
                del running[result]
                result.result()
            else:
                yield result
    finally:
        if running:
            for task in running:
                task.cancel()
            abort()
            loop.run_until_complete(asyncio.gather(*running, return_exceptions=True))

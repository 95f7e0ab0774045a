"""Results of an asyncio engine as a plain iterator, in the order in which they are done."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any

Emit = Callable[[Any], None]
Work = tuple[int, Callable[[Emit], Coroutine[Any, Any, None]]]  # (cost, what to run; it emits results)


def run(loop: asyncio.AbstractEventLoop, work: Iterable[Work], limit: int, abort: Callable[[], None]) -> Iterator[Any]:
    """Run work side by side, as much as costs `limit` together, and yield what it emits; the first exception ends it all.

    The loop turns only while a result is waited for; an engine with processes of its own goes on meanwhile. Whoever stops
    reading early stops the work: its tasks are cancelled, and `abort` tells the engine.
    """
    results: asyncio.Queue[Any] = asyncio.Queue()
    waiting = deque(work)
    running: dict[asyncio.Task[None], int] = {}
    try:
        while waiting or running:
            while waiting and (not running or sum(running.values()) + waiting[0][0] <= limit):
                cost, start = waiting.popleft()
                task = loop.create_task(start(results.put_nowait))
                task.add_done_callback(results.put_nowait)
                running[task] = cost
            result = loop.run_until_complete(results.get())
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

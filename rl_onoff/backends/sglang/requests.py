"""Requests to SGLang: what each asks of the hooks inside it, what came back, and how many run side by side."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from rl_onoff.errors import EngineError
from rl_onoff.types import Sampling, Want

INFO = "rl_onoff"  # key of what the hooks send back in meta_info
PREFIX = "rl_onoff"

PERIOD = 0.05  # seconds between two looks for more work while no result comes

Emit = Callable[[Any], None]
Work = tuple[int, Callable[[Emit], Coroutine[Any, Any, None]]]  # (cost, what to run; it emits results)
Take = Callable[[int, bool], Iterable[Work]]

_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One request's order: a response to be drawn, or one to be scored. Carried in the request's id, the one thing that
    SGLang hands through untouched."""

    prompt_len: int
    seed: int | None = None  # to generate: the seed of the response
    num_tokens: int = 0  # to score: how many tokens the response has
    top_k: int = 0
    sampler: Sampling | None = None
    logits_file: str | None = None  # where to write the full logits: float32 (T, V)

    def rid(self) -> str:
        """A new request id. None is the beginning of another: SGLang aborts by prefix."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return f"{PREFIX} {next(_numbers):012d} {json.dumps(values)}"

    @staticmethod
    @lru_cache(maxsize=8192)
    def of(rid: str) -> Job | None:
        """The job in a request's id; None for a request that is not ours."""
        if not rid.startswith(PREFIX + " "):
            return None
        values = json.loads(rid.split(" ", 2)[2])
        if "sampler" in values:
            values["sampler"] = Sampling(**values["sampler"])
        return Job(**values)

    @property
    def want(self) -> Want:
        return Want(top_k=self.top_k, sampler=self.sampler)


def check(meta: dict[str, Any]) -> None:
    """Raise for a request that SGLang gave up, or that our code inside it failed on."""
    reason = meta.get("finish_reason") or {}
    if reason.get("type") == "abort":
        raise EngineError(f"SGLang gave a request up: {reason.get('message')}")
    if reason.get("matched") == "NaN happened":
        raise EngineError(
            "the model's logits are not numbers (SGLang: NaN happened): set backend.dtype=float32 or another model"
        )
    for info in meta.get(INFO) or ():
        if info and (error := info.get("error") or info.get("sampler_error")):
            fix = "set backend.in_engine_stats=false" if "error" in info else "report it with the worker's log"
            raise EngineError(f"our code inside SGLang failed ({error.strip().splitlines()[-1]}): {fix}")


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

"""What an engine answers, wherever it runs, and how it is given work while it works, so that its batches stay full."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeVar

from rl_onoff.types import Rollout, SampleRequest, TokenScores, Want

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInfo:
    """What a loaded engine says about itself; kept with the rows it makes."""

    engine: str  # "huggingface", "vllm", …
    version: str  # the engine package's version
    dtype: str  # of the weights as loaded: "float32", "bfloat16", …
    vocab_size: int  # columns of the logits
    max_len: int  # most tokens of prompt and response together
    eos_ids: tuple[int, ...]  # tokens that end a response
    in_engine_stats: bool = True  # False: statistics come through the engine's public API
    caches_prompts: bool = False  # a prompt that was computed before is not computed again
    batch: int = 32  # responses that it samples side by side, about
    replicas: int = 1


class Supply(Protocol):
    """Where an engine gets the responses that it samples."""

    def take(self, most: int | None = None, *, wait: bool) -> list[SampleRequest]:
        """Up to `most` requests (None: all there are). Empty: none is there now; after a `wait`, none will come."""
        ...


class Core(Protocol):
    """The four calls an engine answers, wherever it runs. One call at a time; results come in any order."""

    def _begin(self) -> None:
        """Start to load where that takes none of the caller's time; `_load` follows."""

    @abstractmethod
    def _load(self) -> EngineInfo:
        """Load the weights in this process."""

    @abstractmethod
    def _generate(self, supply: Supply) -> Iterator[Rollout]:
        """Sample what the supply gives, while it gives; a rollout's prompt and text may be left to `complete`."""

    @abstractmethod
    def _score(self, rollouts: Sequence[Rollout], want: Want) -> Iterator[TokenScores]:
        """Score given token ids; no response is empty or longer than the context."""

    @abstractmethod
    def _close(self) -> None:
        """Free what `_load` took; must be safe to call twice."""


class Given:
    """A supply whose requests are all there from the start."""

    def __init__(self, requests: Iterable[SampleRequest]) -> None:
        self._requests = deque(requests)

    def take(self, most: int | None = None, *, wait: bool) -> list[SampleRequest]:
        return taken(self._requests, most)


def taken(requests: deque[Item], most: int | None) -> list[Item]:
    """The first `most` requests (None: all), taken out."""
    number = len(requests) if most is None else min(max(most, 0), len(requests))
    return [requests.popleft() for _ in range(number)]


def whole(items: Iterable[Item]) -> Callable[[int, bool], Iterable[Item]]:
    """What an engine's loop takes its work from, where all of the work is there from the start."""
    items = iter(items)
    return lambda most, wait: islice(items, max(most, 0))

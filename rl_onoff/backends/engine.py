"""What an engine answers, wherever it runs, and how it is given work while it works, so that its batches stay full."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol, TypeVar

from rl_onoff.types import Completion, Request, Response, TokenScores, Want

Item = TypeVar("Item")
Draw = tuple[Request, int]  # one response to sample: the request, and which of its samples


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
    batch: int = 32  # responses that it samples side by side, about
    replicas: int = 1


class Core(Protocol):
    """The four calls an engine answers, wherever it runs. One call at a time; results come in any order."""

    def _load(self) -> EngineInfo: ...

    def _generate(self, requests: Sequence[Request]) -> Iterator[Completion]: ...

    def _score(self, responses: Sequence[Response], want: Want) -> Iterator[TokenScores]: ...

    def _close(self) -> None: ...


class Supply(Protocol):
    """Where an engine gets what it samples."""

    def take(self, most: int | None = None, *, wait: bool) -> list[Draw]:
        """Up to `most` draws (None: all that are there). Nothing: there are none now; after a `wait`, none will come."""
        ...


class Given:
    """A supply that is there from the start."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._draws = deque(draws_of(requests))

    def take(self, most: int | None = None, *, wait: bool) -> list[Draw]:
        return taken(self._draws, most)


def taken(draws: deque[Draw], most: int | None) -> list[Draw]:
    """The first `most` draws (None: all), taken out."""
    number = len(draws) if most is None else min(max(most, 0), len(draws))
    return [draws.popleft() for _ in range(number)]


def whole(items: Iterable[Item]) -> Callable[[int, bool], Iterable[Item]]:
    """What an engine's loop takes from, where all that it is to do is there."""
    items = iter(items)
    return lambda most, wait: islice(items, max(most, 0))


def draws_of(requests: Iterable[Request]) -> list[Draw]:
    return [(request, sample) for request in requests for sample in request.sample_indices]


def requests_of(draws: Iterable[Draw]) -> list[Request]:
    """The draws as requests again, each with the samples that are among them."""
    samples: dict[int, list[int]] = {}
    requests: dict[int, Request] = {}
    for request, sample in draws:
        requests[id(request)] = request
        samples.setdefault(id(request), []).append(sample)
    return [replace(request, samples=tuple(samples[number])) for number, request in requests.items()]

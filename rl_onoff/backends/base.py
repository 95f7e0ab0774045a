"""The interface of every backend, and everything about it that is not an engine call.

Two widths, one implementation each. The core takes and gives token ids: `complete(requests)` streams Completions as they
finish, `score(responses, want)` streams TokenScores. The public API (text in, text out) is written once on top of it.

An engine's file subclasses BaseBackend and implements `_load`, `_generate`, `_score`, `_close` and `sampling_args`. Where
the engine runs (here, in a worker process, in a pool of them) is not its business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from rl_onoff.backends.config import EngineConfig
from rl_onoff.types import Completion, LogprobKind, Request, Response, Sampling, TokenScores, Want


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInfo:
    """What a loaded engine says about itself; stored with every row it makes."""

    engine: str  # "huggingface", "vllm", …
    version: str  # the engine package's version
    dtype: str  # of the weights as loaded: "float32", "bfloat16", …
    vocab_size: int  # columns of the logits
    max_len: int  # most tokens of prompt and response together
    eos_ids: tuple[int, ...]  # tokens that end a response
    in_engine_stats: bool = True  # False: statistics come through the engine's public API


class Core(Protocol):
    """The four calls an engine answers, in this process or behind a worker. Not thread-safe: one call at a time."""

    def _load(self) -> EngineInfo: ...

    def _generate(self, requests: Sequence[Request]) -> Iterator[Completion]: ...

    def _score(self, responses: Sequence[Response], want: Want) -> Iterator[TokenScores]: ...

    def _close(self) -> None: ...

"""A backend without a model, whose engine misbehaves on command: `engine_kwargs` and request ids say how."""

from __future__ import annotations

import itertools
import logging
import multiprocessing.shared_memory
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil

from rl_onoff.backends.base import BaseBackend
from rl_onoff.backends.engine import EngineInfo, Given, Supply
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.backends.fake.config import FakeBackendConfig
from rl_onoff.errors import MissingDependencyError, UsageError
from rl_onoff.types import FinishReason, LogprobKind, Rollout, SampleRequest, Sampling, TokenScores, Want

# an engine's process: maps the shared memory that its parent made, and sleeps
ENGINE = """
import sys, time
from multiprocessing import shared_memory
memory = shared_memory.SharedMemory(sys.argv[1])
print("engine is up", flush=True)
time.sleep(600)
"""


class TinyBackend(BaseBackend):
    name: ClassVar[str] = "tiny"
    package: ClassVar[str] = "numpy"
    config_class: ClassVar[type[EngineConfig]] = FakeBackendConfig
    logprob_kinds: ClassVar[frozenset[LogprobKind]] = frozenset(LogprobKind)
    worker_by_default: ClassVar[bool] = True

    _engine: Any = None

    def _load(self) -> EngineInfo:
        kwargs = self.config.engine_kwargs
        print("tiny is loading", flush=True)
        time.sleep(float(kwargs.get("load_seconds", 0)))
        match kwargs.get("fail"):
            case "missing":
                raise MissingDependencyError("tiny is not installed: pip install 'rl-onoff[tiny]'")
            case "usage":
                raise UsageError("model.name is wrong: set model.name=right")
            case "exit":
                os._exit(3)
            case "bug":
                raise ZeroDivisionError("a bug of the engine")
        if "engine" in kwargs:
            self._memory = multiprocessing.shared_memory.SharedMemory(create=True, size=1 << 16)
            self._semaphore = multiprocessing.get_context(
                "spawn"
            ).Semaphore()  # has a name until its tracker takes it away
            self._engine = subprocess.Popen([sys.executable, "-c", ENGINE, self._memory.name], stdout=subprocess.PIPE)
            self._engine.stdout.readline()
            Path(kwargs["engine"]).write_text(f"{self._engine.pid} {self._memory.name}")
        return EngineInfo(
            engine="tiny", version=sys.executable, dtype="float32", vocab_size=50_000, max_len=1 << 20, eos_ids=(0,)
        )

    def _generate(self, supply: Supply) -> Iterator[Rollout]:
        while requests := supply.take(1, wait=True):
            request = requests[0]
            match request.request_id:
                case "usage":
                    raise UsageError("a sentence of ours")
                case "warn":
                    logging.getLogger("rl_onoff.tiny").warning("look %s", "here")
                case "bug":
                    raise KeyError("lost")
                case "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "hang":
                    time.sleep(600)
            time.sleep(float(self.config.engine_kwargs.get("seconds", 0)))
            ids = np.asarray(request.prompt_ids) + request.sample
            yield Rollout(
                request_id=request.request_id,
                sample=request.sample,
                token_ids_T=ids,
                text=str(request.seed),
                logprobs_T=-ids.astype(np.float32),
                kind=LogprobKind.raw,
                finish_reason=FinishReason.length,
            )

    def _score(self, rollouts: Sequence[Rollout], want: Want) -> Iterator[TokenScores]:
        for rollout in rollouts:
            num_tokens = len(rollout.token_ids_T)
            zeros = np.zeros(num_tokens, np.float32)
            logits = np.full((num_tokens, 50_000), rollout.sample, np.float32) if want.full_logits else None
            yield TokenScores(
                request_id=rollout.request_id,
                sample=rollout.sample,
                token_ids_T=rollout.token_ids_T,
                logprobs_T=zeros,
                entropy_T=zeros,
                logsumexp_T=zeros,
                rank_T=zeros.astype(np.int32),
                top_ids_TK=np.zeros((num_tokens, want.top_k), np.int32),
                top_logprobs_TK=np.zeros((num_tokens, want.top_k), np.float32),
                logits_TV=logits,
            )

    def _close(self) -> None:
        careless = self.config.engine_kwargs.get("careless")
        if careless == "kills":  # like an engine that ends whatever is there, the tracker of its shared memory too
            for child in psutil.Process().children():
                child.kill()
        if self._engine is not None and not careless:
            self._engine.kill()
            self._memory.unlink()
        self._engine = None

    @staticmethod
    def sampling_args(sampling: Sampling, eos_ids: Sequence[int], seed: int) -> dict[str, Any]:
        return {}

    def _load_tokenizer(self) -> Any:
        return object()


def generate(core: Any, requests: Sequence[Sequence[SampleRequest]]) -> Any:
    """What a core samples for what `sample_requests` made of some prompts."""
    return core._generate(Given(itertools.chain.from_iterable(requests)))


def pids_of(pool: Any) -> list[int | None]:
    """The ids of the processes of a pool's workers, None for one that is not running."""
    return [replica.client.pid for replica in pool._replicas]

"""vLLM: generation and scores from its engine, in a worker process by default."""

from __future__ import annotations

import logging
import os
import pickle
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rl_onoff.backends.base import BaseBackend
from rl_onoff.backends.core import disagreement
from rl_onoff.backends.engine import EngineInfo, Supply, whole
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.backends.layers import NO_LAYERS
from rl_onoff.backends.token_stats import chunk_rows, stats_of_hidden
from rl_onoff.backends.vllm.config import VLLMBackendConfig
from rl_onoff.backends.vllm.engine import Engine, options
from rl_onoff.backends.vllm.hooks import HOOKS, job_of, read
from rl_onoff.errors import EngineError, UsageError, plural
from rl_onoff.types import FinishReason, LogprobKind, Rollout, SampleRequest, Sampling, TokenScores, Want

log = logging.getLogger(__name__)

FULL_LOGITS_BYTES = 2**30  # of full logits in flight
PREFILL: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
TEMPERATURES = (0.01, 2.0)  # vLLM refuses what is above and raises what is below, 0 (greedy) apart


class VLLMBackend(BaseBackend):
    """A language model in vLLM."""

    name: ClassVar[str] = "vllm"
    package: ClassVar[str] = "vllm"
    config_class: ClassVar[type[EngineConfig]] = VLLMBackendConfig
    logprob_kinds: ClassVar[frozenset[LogprobKind]] = frozenset((LogprobKind.raw, LogprobKind.processed))
    worker_by_default: ClassVar[bool] = True
    sees_layers: ClassVar[bool] = True
    adapters: ClassVar[bool] = True
    plain_adapters: ClassVar[bool] = True
    config: VLLMBackendConfig

    _engine: Engine | None = None
    _in_engine = False

    def _load(self) -> EngineInfo:
        os.environ |= self.config.environment  # before vLLM is imported: some of its modules read it then
        vllm = self._import_engine()
        from rl_onoff.models.resolve import end_ids

        why = f"version {vllm.__version__} takes no worker extension"
        self._in_engine = self.config.in_engine_stats and options() >= HOOKS.keys()
        engine = self._running()
        if self._in_engine:
            why = self._disagreement()
            self._in_engine = not why
        if self.config.in_engine_stats and not self._in_engine:
            log.warning(
                "token statistics are not computed inside this vLLM (%s): they come through its public API, which is "
                "much slower", why,
            )  # fmt: skip
        eos_ids = end_ids(engine.model.try_get_generation_config().get("eos_token_id"), self.get_tokenizer())
        return EngineInfo(
            engine=self.name, version=vllm.__version__, dtype=str(engine.model.dtype).removeprefix("torch."),
            vocab_size=engine.vocab_size, max_len=engine.model.max_model_len, eos_ids=eos_ids,
            in_engine_stats=self._in_engine, caches_prompts=engine.caches_prompts, batch=engine.batch,
        )  # fmt: skip

    def _generate(self, supply: Supply) -> Iterator[Rollout]:
        from vllm import SamplingParams

        def take(most: int, wait: bool) -> Iterator[tuple[SampleRequest, list[int], Any]]:
            for request in supply.take(most, wait=wait):
                args = self.sampling_args(request.sampling, self.info.eos_ids, request.seed)
                args["max_tokens"] = min(args["max_tokens"], self.info.max_len - len(request.prompt_ids))
                yield request, request.prompt_ids.tolist(), SamplingParams(**args)

        for finished in self._running().run(take):
            for request, output in finished:
                yield self._rollout(request, output.outputs[0])

    def _score(self, rollouts: Sequence[Rollout], want: Want) -> Iterator[TokenScores]:
        if want.layers is not None and not self._in_engine:
            raise EngineError(NO_LAYERS.format("vLLM", self.name))
        yield from (self._stats if self._in_engine else self._public_stats)(rollouts, want)

    def _close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    @staticmethod
    def sampling_args(sampling: Sampling, eos_ids: Sequence[int], seed: int) -> dict[str, Any]:
        """vLLM's SamplingParams of one response."""
        low, high = TEMPERATURES
        if not sampling.greedy and not low <= sampling.temperature <= high:
            takes = f"vLLM takes 0 (greedy) or {low} to {high}"
            raise UsageError(f"sampling.temperature is {sampling.temperature} but {takes}: set sampling.temperature=1")
        if sampling.min_p > 0 and sampling.top_p < 1 and not sampling.greedy:
            both = f"sampling.min_p={sampling.min_p} and sampling.top_p={sampling.top_p} together"
            why = f"{both} mean something else in vLLM, which cuts by min_p first"
            raise UsageError(f"{why}: set sampling.min_p=0 or sampling.top_p=1")
        return {
            # with n above 1 and a seed vLLM would draw sample i from seed + i
            "n": 1, "seed": seed, "max_tokens": sampling.max_new_tokens, "min_tokens": 0,
            "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k,
            "min_p": sampling.min_p, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0,
            # the tokenizer's and the model's EOS are in stop_token_ids, and nothing else ends a response
            "stop": list(sampling.stop), "stop_token_ids": list(eos_ids), "ignore_eos": True,
            "logprobs": 0, "flat_logprobs": True,  # of the sampled token alone
            "detokenize": bool(sampling.stop), "skip_special_tokens": True, "spaces_between_special_tokens": False,
        }  # fmt: skip

    def _running(self, mode: str | None = None) -> Engine:
        """The engine, in this logprobs_mode. Only scores by the public API need another than sampling does."""
        mode = mode or f"{self.config.logprob_kind.value}_logprobs"
        if self._engine is not None and self._engine.mode != mode:
            log.warning("vLLM is loaded again to report %s: its public API cannot sample and score in one life", mode)
            self._close()
        if self._engine is None:
            self._engine = Engine(self.config, mode, in_engine=self._in_engine)
        return self._engine

    def _rollout(self, request: SampleRequest, output: Any) -> Rollout:
        flat = output.logprobs
        logprobs_T = np.array([flat.logprobs[at] for at in flat.start_indices], np.float32)
        if request.sampling.greedy and self.config.logprob_kind is LogprobKind.processed:
            logprobs_T[:] = 0.0  # vLLM reports raw ones here, but greedy decoding draws from a single token
        stopped = FinishReason.stop if isinstance(output.stop_reason, str) else FinishReason.eos
        reason = {"length": FinishReason.length, "stop": stopped}.get(output.finish_reason)
        if reason is None:
            response = f"response {request.sample} to request {request.request_id!r}"
            raise EngineError(f"vLLM ended {response} with {output.finish_reason!r}")
        return Rollout(
            request_id=request.request_id, sample=request.sample, token_ids_T=np.array(output.token_ids, np.int32),
            logprobs_T=logprobs_T, kind=self.config.logprob_kind, finish_reason=reason,
        )  # fmt: skip

    def _stats(self, responses: Sequence[Rollout], want: Want) -> Iterator[TokenScores]:
        """Inside the engine. A response of which some row was never computed, being cached, is scored again without the
        cache."""
        engine = self._running()
        most = None
        if want.full_logits:
            longest = max(len(response.token_ids_T) for response in responses)
            most = max(1, FULL_LOGITS_BYTES // (4 * longest * engine.vocab_size))
        with tempfile.TemporaryDirectory() as folder:
            engine.rpc("rl_onoff_begin", pickle.dumps(want), folder)
            try:
                waiting: Sequence[int] = range(len(responses))
                for skip_cache in (False, True) if want.layers is None else (True,):
                    incomplete: list[int] = []
                    for finished in engine.run(whole(_jobs(responses, waiting, want, skip_cache)), most):
                        numbers = [number for number, _ in finished]
                        found: dict[int, TokenScores] = {}
                        for encoded in engine.rpc("rl_onoff_fetch", numbers):
                            found |= read(encoded, Path(folder))
                        incomplete += [number for number in numbers if number not in found]
                        for number in list(found):
                            yield found.pop(number).of(responses[number])
                    waiting = incomplete
            finally:
                if self._engine is engine:  # else it was closed meanwhile
                    engine.rpc("rl_onoff_begin", pickle.dumps(None), "")
        if waiting:
            why = f"vLLM computed only a part of {plural(len(waiting), 'response')}"
            raise EngineError(f"{why}: set backend.in_engine_stats=false")

    def _public_stats(self, responses: Sequence[Rollout], want: Want) -> Iterator[TokenScores]:
        """Through vLLM's public API: the whole vocabulary's logits at every position, as Python lists.

        Slow, and only a fallback, for a vLLM whose insides have moved. One response at a time, for each is gigabytes of
        objects. It is logits, for logprobs have lost their logsumexp.
        """
        import torch
        from vllm import SamplingParams

        engine = self._running("raw_logits")
        params = SamplingParams(prompt_logprobs=-1, logprobs=-1, flat_logprobs=True, **PREFILL)
        inputs = ((response, _prefix(response), params.clone()) for response in responses)
        size = chunk_rows(engine.vocab_size, "cpu")
        for finished in engine.run(whole(inputs), most=1):
            for response, output in finished:
                # prompt_logprobs[i] tells of token i, given those before it; the last row is that of the sampled token
                first, token_ids_T = len(response.prompt_ids), torch.from_numpy(response.token_ids_T)
                rows = [(output.prompt_logprobs, i) for i in range(first, first + len(token_ids_T) - 1)]
                rows.append((output.outputs[0].logprobs, 0))
                stats = stats_of_hidden(rows, self._public_logits, token_ids_T, want, rows=size)
                yield stats.scores().of(response)

    def _public_logits(self, rows: Sequence[tuple[Any, int]]) -> Any:
        """Logits (R, V) of positions in what vLLM's flat_logprobs gives."""
        import torch

        logits_RV = np.full((len(rows), self._running("raw_logits").vocab_size), -np.inf, np.float32)
        for logits_V, (flat, position) in zip(logits_RV, rows, strict=True):
            entries = slice(flat.start_indices[position], flat.end_indices[position])
            logits_V[np.array(flat.token_ids[entries], np.int64)] = np.array(flat.logprobs[entries], np.float32)
        return torch.from_numpy(logits_RV)

    def _disagreement(self) -> str:
        from vllm import SamplingParams

        engine = self._running()

        def public(rollout: Rollout) -> np.ndarray:
            ids = [*_prefix(rollout), int(rollout.token_ids_T[-1])]
            ((_, output),) = next(engine.run(whole([(None, ids, SamplingParams(prompt_logprobs=0, **PREFILL))])))
            first = len(rollout.prompt_ids)
            return np.array([output.prompt_logprobs[i][ids[i]].logprob for i in range(first, len(ids))])

        # logits of half precision are steps of 0.1 apart
        allowed = 2e-3 if str(engine.model.dtype) == "torch.float32" else 0.5
        return disagreement(engine.vocab_size, allowed, self._stats, public)


def _prefix(response: Rollout) -> list[int]:
    """What vLLM must have seen to tell of every response token: all but the last, so that the longest sequences fit
    too."""
    return [*response.prompt_ids.tolist(), *response.token_ids_T[:-1].tolist()]


def _jobs(responses: Sequence[Rollout], numbers: Iterable[int], want: Want, skip_cache: bool) -> Iterator[Any]:
    from vllm import SamplingParams

    for number in numbers:
        job = job_of(number, responses[number], want)
        params = SamplingParams(extra_args=job, skip_reading_prefix_cache=skip_cache, **PREFILL)
        yield number, _prefix(responses[number]), params

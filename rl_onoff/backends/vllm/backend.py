"""vLLM: generation and scores from its engine, in a worker process by default."""

from __future__ import annotations

import logging
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
from rl_onoff.backends.token_stats import chunk_rows, stats_of_hidden
from rl_onoff.backends.vllm.config import VLLMBackendConfig
from rl_onoff.backends.vllm.hooks import job_of, read
from rl_onoff.errors import EngineError, UsageError
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
    config: VLLMBackendConfig

    _engine: Any = None
    _in_engine = False

    # -- the engine's four calls ---------------------------------------------------------------------------------------

    def _load(self) -> EngineInfo:
        vllm = self._import_engine()
        from rl_onoff.backends.vllm.engine import HOOKS, options
        from rl_onoff.models.resolve import end_ids

        self._in_engine = self.config.in_engine_stats
        if self._in_engine and not options() >= HOOKS:
            self._fall_back(f"version {vllm.__version__} takes no worker extension")
        engine = self._running(self._sampling_mode)
        if self._in_engine and (why := self._disagreement()):
            self._fall_back(why)
        return EngineInfo(
            engine=self.name,
            version=vllm.__version__,
            dtype=str(engine.model.dtype).removeprefix("torch."),
            vocab_size=engine.vocab_size,
            max_len=engine.model.max_model_len,
            eos_ids=end_ids(engine.model.try_get_generation_config().get("eos_token_id"), self.get_tokenizer()),
            in_engine_stats=self._in_engine,
            batch=engine.batch,
        )

    def _generate(self, supply: Supply) -> Iterator[Rollout]:
        from vllm import SamplingParams

        def take(most: int, wait: bool) -> Iterator[tuple[SampleRequest, list[int], Any]]:
            for request in supply.take(most, wait=wait):
                args = self.sampling_args(request.sampling, self.info.eos_ids, request.seed)
                args["max_tokens"] = min(args["max_tokens"], self.info.max_len - len(request.prompt_ids))
                yield request, request.prompt_ids.tolist(), SamplingParams(**args)

        for finished in self._running(self._sampling_mode).run(take):
            for request, output in finished:
                yield self._rollout(request, output.outputs[0])

    def _score(self, rollouts: Sequence[Rollout], want: Want) -> Iterator[TokenScores]:
        for rollout, scores in (self._stats if self._in_engine else self._public_stats)(rollouts, want):
            yield scores.of(rollout)

    def _close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    @staticmethod
    def sampling_args(sampling: Sampling, eos_ids: Sequence[int], seed: int) -> dict[str, Any]:
        """vLLM's SamplingParams of one response."""
        low, high = TEMPERATURES
        if not sampling.greedy and not low <= sampling.temperature <= high:
            raise UsageError(
                f"sampling.temperature is {sampling.temperature} but vLLM takes 0 (greedy) or {low} to {high}: set "
                "sampling.temperature=1"
            )
        if sampling.min_p > 0 and sampling.top_p < 1 and not sampling.greedy:
            raise UsageError(
                f"sampling.min_p={sampling.min_p} and sampling.top_p={sampling.top_p} together mean something else in "
                "vLLM, which cuts by min_p first: set sampling.min_p=0 or sampling.top_p=1"
            )
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

    # -- generation ----------------------------------------------------------------------------------------------------

    @property
    def _sampling_mode(self) -> str:
        return f"{self.config.logprob_kind.value}_logprobs"

    def _running(self, mode: str) -> Any:
        """The engine, in this logprobs_mode. Only scores by the public API need another than sampling does."""
        from rl_onoff.backends.vllm.engine import Engine

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
        if output.finish_reason == "length":
            reason = FinishReason.length
        elif output.finish_reason == "stop":
            reason = FinishReason.stop if isinstance(output.stop_reason, str) else FinishReason.eos
        else:
            raise EngineError(
                f"vLLM ended response {request.sample} to request {request.request_id!r} with {output.finish_reason!r}"
            )
        return Rollout(
            request_id=request.request_id,
            sample=request.sample,
            token_ids_T=np.array(output.token_ids, np.int32),
            logprobs_T=logprobs_T,
            kind=self.config.logprob_kind,
            finish_reason=reason,
        )

    # -- statistics ----------------------------------------------------------------------------------------------------

    def _stats(self, responses: Sequence[Rollout], want: Want) -> Iterator[tuple[Rollout, TokenScores]]:
        """Inside the engine. A response of which some row was never computed, being cached, is scored again without the
        cache."""
        engine = self._running(self._sampling_mode)
        most = None
        if want.full_logits:
            longest = max(len(response.token_ids_T) for response in responses)
            most = max(1, FULL_LOGITS_BYTES // (4 * longest * engine.vocab_size))
        with tempfile.TemporaryDirectory() as folder:
            engine.rpc("rl_onoff_begin", pickle.dumps(want), folder)
            try:
                waiting: Sequence[int] = range(len(responses))
                for skip_cache in (False, True):
                    incomplete = []
                    for finished in engine.run(whole(_jobs(responses, waiting, skip_cache)), most):
                        numbers = [number for number, _ in finished]
                        found: dict[int, TokenScores | None] = {}
                        for encoded in engine.rpc("rl_onoff_fetch", numbers):
                            found |= read(encoded, Path(folder))
                        for number in numbers:
                            if (stats := found.pop(number, None)) is None:
                                incomplete.append(number)
                            else:
                                yield responses[number], stats
                    waiting = incomplete
            finally:
                if not engine.closed:
                    engine.rpc("rl_onoff_end")
        if waiting:
            raise EngineError(
                f"vLLM computed only a part of {len(waiting)} responses: set backend.in_engine_stats=false"
            )

    def _public_stats(self, responses: Sequence[Rollout], want: Want) -> Iterator[tuple[Rollout, TokenScores]]:
        """Through vLLM's public API: the whole vocabulary's logits at every position, as Python lists.

        Slow, and only a fallback, for a vLLM whose insides have moved. One response at a time, for each is gigabytes of
        objects. It is logits, for logprobs have lost their logsumexp.
        """
        from vllm import SamplingParams

        engine = self._running("raw_logits")
        params = SamplingParams(prompt_logprobs=-1, logprobs=-1, flat_logprobs=True, **PREFILL)
        inputs = ((response, _prefix(response), params.clone()) for response in responses)
        for finished in engine.run(whole(inputs), most=1):
            for response, output in finished:
                yield response, _public_scores(output, response, want, engine.vocab_size)

    def _disagreement(self) -> str:
        from vllm import SamplingParams

        engine = self._engine

        def inside(rollout: Rollout) -> np.ndarray:
            engine.rpc("rl_onoff_install")
            ((_, scores),) = self._stats([rollout], Want())
            return scores.logprobs_T

        def public(rollout: Rollout) -> np.ndarray:
            ids = [*rollout.prompt_ids.tolist(), *rollout.token_ids_T.tolist()]
            ((_, output),) = next(engine.run(whole([(None, ids, SamplingParams(prompt_logprobs=0, **PREFILL))])))
            first = len(rollout.prompt_ids)
            return np.array([output.prompt_logprobs[i][ids[i]].logprob for i in range(first, len(ids))])

        # logits of half precision are steps of 0.1 apart
        allowed = 2e-3 if str(engine.model.dtype) == "torch.float32" else 0.5
        return disagreement(engine.vocab_size, allowed, inside, public)

    def _fall_back(self, why: str) -> None:
        log.warning(
            "token statistics are not computed inside this vLLM (%s): they come through its public API, which is much "
            "slower", why,
        )  # fmt: skip
        self._in_engine = False


def _prefix(response: Rollout) -> list[int]:
    """What vLLM must have seen to tell of every response token: all but the last, so that the longest sequences fit
    too."""
    return [*response.prompt_ids.tolist(), *response.token_ids_T[:-1].tolist()]


def _jobs(responses: Sequence[Rollout], numbers: Iterable[int], skip_cache: bool) -> Iterator[Any]:
    from vllm import SamplingParams

    for number in numbers:
        job = job_of(number, responses[number])
        params = SamplingParams(extra_args=job, skip_reading_prefix_cache=skip_cache, **PREFILL)
        yield number, _prefix(responses[number]), params


def _public_scores(output: Any, response: Rollout, want: Want, vocab_size: int) -> TokenScores:
    """Statistics from the RequestOutput of `prompt + response[:-1]`; the last row is that of the sampled token."""
    import torch

    prompt, sampled = output.prompt_logprobs, output.outputs[0].logprobs
    first = len(response.prompt_ids)  # prompt_logprobs[i] tells of token i, given those before it
    rows = [(prompt, position) for position in range(first, first + len(response.token_ids_T) - 1)] + [(sampled, 0)]

    def logits_V(flat: Any, position: int) -> np.ndarray:
        entries = slice(flat.start_indices[position], flat.end_indices[position])
        logits = np.full(vocab_size, -np.inf, np.float32)
        logits[np.array(flat.token_ids[entries], np.int64)] = np.array(flat.logprobs[entries], np.float32)
        return logits

    return stats_of_hidden(
        rows,
        lambda rows: torch.from_numpy(np.stack([logits_V(*row) for row in rows])),
        torch.from_numpy(response.token_ids_T),
        want,
        rows=chunk_rows(vocab_size, "cpu"),
    )

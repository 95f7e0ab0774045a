"""SGLang: engine calls only. Written against 0.5.23; what its source says that its documentation does not stands beside
the code.

Runs in a worker process: `Engine.shutdown` kills every child of its process, and a failing child of the engine ends it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial, partialmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rl_onoff.backends.base import BaseBackend
from rl_onoff.backends.core import cut_at_stop, disagreement
from rl_onoff.backends.engine import EngineInfo, Supply, whole
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.backends.layers import NO_LAYERS, states_name
from rl_onoff.backends.sglang import hooks
from rl_onoff.backends.sglang.config import ADAPTER, MARGIN, SGLangBackendConfig
from rl_onoff.backends.sglang.hooks import INFO, Job
from rl_onoff.backends.sglang.layers import LayerJob
from rl_onoff.backends.sglang.public import PublicScorer, check
from rl_onoff.backends.token_stats import read_logits
from rl_onoff.errors import EngineError, UsageError
from rl_onoff.types import FinishReason, LogprobKind, Rollout, SampleRequest, Sampling, TokenScores, Want

log = logging.getLogger(__name__)

MAX_STOP = 32
MAX_IN_FLIGHT = 1024  # responses handed to the engine at a time; its own queue needs no more to fill a batch
NO_TOP_K = 1 << 30  # SGLang's way to say that every token is kept
PERIOD = 0.05  # seconds between two looks for more work while no result comes
CALLS = ("generate", "async_generate")  # of SGLang's Engine
PROBE = {"max_new_tokens": 1, "temperature": 0.0}  # with 0 new tokens the statistics would not come back

Work = tuple[int, Callable[[], Coroutine[Any, Any, Any]]]  # (cost, what gives a result)
Take = Callable[[int, bool], Iterable[Work]]


class SGLangBackend(BaseBackend):
    """One SGLang engine."""

    name: ClassVar[str] = "sglang"
    package: ClassVar[str] = "sglang"
    config_class: ClassVar[type[EngineConfig]] = SGLangBackendConfig
    # SGLANG_RETURN_ORIGINAL_LOGPROB chooses between log_softmax(z) and log_softmax(z / T); there is no third
    logprob_kinds: ClassVar[frozenset[LogprobKind]] = frozenset({LogprobKind.raw, LogprobKind.scaled})
    worker_by_default: ClassVar[bool] = True
    sees_layers: ClassVar[bool] = True
    adapters: ClassVar[bool] = True
    plain_adapters: ClassVar[bool] = True
    unknown_adapter_options: ClassVar[tuple[str, ...]] = ("use_rslora", "rank_pattern", "alpha_pattern")
    config: SGLangBackendConfig

    _engine: Any = None
    _public: PublicScorer | None = None  # None: statistics are computed inside the engine
    _pool: int = 0  # tokens that the engine's key-value cache holds

    def _load(self) -> EngineInfo:
        from rl_onoff.models.resolve import hub_errors

        version = self._import_engine().__version__
        with hub_errors(self.config.model_name):
            self._start(self.config.in_engine_stats)
            if self._public is None and (why := self._disagreement()):
                log.warning(
                    "SGLang %s: statistics inside the engine do not work (%s); they are taken through its public API "
                    "instead, which is slow: set backend.in_engine_stats=false to do so without this warning", version,
                    why,
                )  # fmt: skip
                self._close()
                self._start(False)
        if not self._seeds_count():
            log.warning("SGLang %s: our sampler does not work inside it, so sampling.seed has no effect", version)
        manager = self._engine.tokenizer_manager
        model = manager.model_config
        tokenizers = self.get_tokenizer(), manager.tokenizer
        eos_ids = {*(tokenizer.eos_token_id for tokenizer in tokenizers), *(model.hf_eos_token_id or ())} - {None}
        return EngineInfo(
            engine=self.name, version=version, dtype=str(model.dtype).removeprefix("torch."),
            vocab_size=model.vocab_size, max_len=min(model.context_len, self._pool) - MARGIN,
            eos_ids=tuple(sorted(eos_ids)), in_engine_stats=self._public is None, batch=MAX_IN_FLIGHT // 4,
            caches_prompts=not self._engine.server_args.disable_radix_cache,
        )  # fmt: skip

    def _generate(self, supply: Supply) -> Iterator[Rollout]:
        def take(most: int, wait: bool) -> Iterator[Work]:
            for request in supply.take(most, wait=wait):
                yield 1, partial(self._complete, request)

        yield from self._run(take, MAX_IN_FLIGHT)

    def _score(self, responses: Sequence[Rollout], want: Want) -> Iterator[TokenScores]:
        if self._public is not None:
            if want.layers is not None:
                raise EngineError(NO_LAYERS.format("SGLang", self.name))
            for response in responses:
                yield self._public.score(response, want)
            return
        groups: dict[bytes, list[Rollout]] = {}
        for response in responses:
            groups.setdefault(response.prompt_ids.tobytes(), []).append(response)

        async def score(response: Rollout, cached: asyncio.Event, leads: bool) -> TokenScores:
            if not leads:
                await cached.wait()
            scores = await self._probe(response, want)
            cached.set()
            return scores

        def work() -> Iterator[Work]:
            for group in groups.values():
                # requests of one step share no prefix: the first leaves the prompt in the cache for the others
                cached = asyncio.Event()
                for i, response in enumerate(group):
                    cost = len(response.token_ids_T) + (0 if i else len(response.prompt_ids))
                    yield cost, partial(score, response, cached, leads=i == 0)

        yield from self._run(whole(work()), max(1, self._pool // 2))  # else a prompt is evicted before its turn

    def _close(self) -> None:
        engine, self._engine, self._public = self._engine, None, None
        if engine is not None:
            engine.shutdown()

    @staticmethod
    def sampling_args(sampling: Sampling, eos_ids: Sequence[int], seed: int) -> dict[str, Any]:
        if len(sampling.stop) > MAX_STOP:
            why = f"sampling.stop has {len(sampling.stop)} strings but SGLang takes at most {MAX_STOP}"
            raise UsageError(f"{why}: shorten sampling.stop")
        return {
            "n": 1, "sampling_seed": seed, "max_new_tokens": sampling.max_new_tokens, "min_new_tokens": 0,
            "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or NO_TOP_K,
            "min_p": sampling.min_p, "frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0,
            "stop": list(sampling.stop), "stop_token_ids": list(eos_ids), "ignore_eos": False, "no_stop_trim": True,
            "skip_special_tokens": True,
        }  # fmt: skip

    def _start(self, in_engine: bool) -> None:
        os.environ.update(self.config.environment())
        from sglang.srt.entrypoints.engine import Engine

        ours: dict[str, Any] = {"run_scheduler_process_func": staticmethod(hooks.run_scheduler)}
        if self.config.adapter_beside:  # every request names it
            ours |= {name: partialmethod(getattr(Engine, name), lora_path=ADAPTER) for name in CALLS}
        options = {} if in_engine else {"enable_return_hidden_states": True}
        self._engine = type("HookedEngine", (Engine,), ours)(**self.config.arguments() | options)
        self._pool = self._engine._scheduler_init_result.scheduler_infos[0]["max_total_num_tokens"]
        self._public = None if in_engine else PublicScorer(self._engine)

    def _disagreement(self) -> str:
        model = self._engine.tokenizer_manager.model_config

        def public(rollout: Rollout) -> np.ndarray:
            output = self._engine.generate(
                input_ids=[*rollout.prompt_ids.tolist(), *rollout.token_ids_T.tolist()],
                sampling_params={"max_new_tokens": 0, "temperature": 0.0},
                return_logprob=True, logprob_start_len=len(rollout.prompt_ids) - 1,
            )  # fmt: skip
            return np.array([entry[0] for entry in output["meta_info"]["input_token_logprobs"][1:]])

        # in 16 bits the two round differently
        return disagreement(model.vocab_size, 1e-3 if "float32" in str(model.dtype) else 0.1, self._score, public)

    def _seeds_count(self) -> bool:
        """Whether the same seed gives the same token, where almost every token is as likely as the next."""
        args = self.sampling_args(Sampling(max_new_tokens=1, temperature=100.0), (), seed=1)
        rids = [Job(prompt_len=3, seed=1).rid() for _ in range(4)]
        outputs = self._engine.generate(input_ids=[[1, 2, 3]] * 4, sampling_params=[args] * 4, rid=rids)
        return len({output["output_ids"][0] for output in outputs}) == 1

    async def _complete(self, request: SampleRequest) -> Rollout:
        sampling, num_prompt = request.sampling, len(request.prompt_ids)
        limited = sampling.replace(max_new_tokens=min(sampling.max_new_tokens, self.info.max_len - num_prompt))
        output = await self._engine.async_generate(
            input_ids=request.prompt_ids.tolist(), rid=Job(prompt_len=num_prompt, seed=request.seed).rid(),
            sampling_params=self.sampling_args(limited, self.info.eos_ids, request.seed), return_logprob=True,
        )  # fmt: skip
        meta = output["meta_info"]
        check(meta)
        token_ids_T = np.asarray(output["output_ids"], np.int32)
        # SGLang says `stop` of a token id and of a string alike
        if token_ids_T[-1] in self.info.eos_ids:
            reason = FinishReason.eos
        elif meta["finish_reason"]["type"] == "stop":
            reason = FinishReason.stop
        else:
            text = self.get_tokenizer().decode(token_ids_T.tolist(), skip_special_tokens=True) if sampling.stop else ""
            reason = FinishReason.length if cut_at_stop(text, sampling.stop) is None else FinishReason.stop
        return Rollout(
            request_id=request.request_id, sample=request.sample, token_ids_T=token_ids_T,
            logprobs_T=np.array([entry[0] for entry in meta["output_token_logprobs"]], np.float32),
            kind=self.config.logprob_kind, finish_reason=reason,
        )  # fmt: skip

    async def _probe(self, response: Rollout, want: Want) -> TokenScores:
        """Statistics of one response, computed inside the engine."""
        num_prompt, num_tokens = len(response.prompt_ids), len(response.token_ids_T)
        with tempfile.TemporaryDirectory(prefix="rl_onoff-logits-") as folder:
            file = Path(folder) / "logits"
            layers = None
            if want.layers is not None:
                name = states_name(response)
                asked = replace(want.layers, inside=want.layers.inside & {name})
                layers = LayerJob(want=asked, name=name, length=response.num_tokens - 1)
            job = Job(
                prompt_len=num_prompt, num_tokens=num_tokens, want=replace(want, full_logits=False, layers=None),
                logits_file=str(file) if want.full_logits else None, layers=layers,
            )  # fmt: skip
            output = await self._engine.async_generate(
                input_ids=[*response.prompt_ids.tolist(), *response.token_ids_T.tolist()], sampling_params=PROBE,
                return_logprob=True, logprob_start_len=num_prompt - 1, rid=job.rid(),
            )  # fmt: skip
            check(output["meta_info"])
            arrays = (output["meta_info"].get(INFO) or [None])[0]
            if arrays is None:
                raise EngineError("SGLang sent no statistics back: set backend.in_engine_stats=false")
            if want.full_logits:
                arrays["logits_TV"] = read_logits(file, num_tokens)
        return TokenScores(**arrays).of(response)

    def _run(self, take: Take, limit: int) -> Iterator[Any]:
        """Run work side by side, as much as costs `limit` together, and yield what it gives; the first exception ends
        it all.

        `take` gives more work, up to so much, and waits for it where asked to. The loop turns only while a result is
        waited for; the engine's processes go on meanwhile. Whoever stops reading early stops the work, here and there.
        """
        loop, manager = self._engine.loop, self._engine.tokenizer_manager
        done: asyncio.Queue[asyncio.Task[Any]] = asyncio.Queue()
        waiting: deque[Work] = deque()
        running: dict[asyncio.Task[Any], int] = {}
        try:
            while True:
                if not waiting:
                    waiting.extend(take(limit - sum(running.values()), not running))
                if not waiting and not running:
                    return
                while waiting and (not running or sum(running.values()) + waiting[0][0] <= limit):
                    cost, start = waiting.popleft()
                    task = loop.create_task(start())
                    task.add_done_callback(done.put_nowait)
                    running[task] = cost
                try:
                    task = loop.run_until_complete(asyncio.wait_for(done.get(), PERIOD))
                except TimeoutError:  # there may be more work by now
                    continue
                del running[task]
                yield task.result()
        finally:
            if running:
                for task in running:
                    task.cancel()
                manager.abort_request(abort_all=True)
                loop.run_until_complete(asyncio.gather(*running, return_exceptions=True))

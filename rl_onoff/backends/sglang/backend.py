"""SGLang: engine calls only. Written against 0.5.23; what its source says that its documentation does not stands beside
the code.

Runs in a worker process: `Engine.shutdown` kills every child of its process, and a failing child of the engine ends it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rl_onoff.backends.base import BaseBackend
from rl_onoff.backends.core import cut_at_stop
from rl_onoff.backends.engine import EngineInfo, Supply, whole
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.backends.sglang.config import SGLangBackendConfig
from rl_onoff.backends.sglang.job import INFO, Job
from rl_onoff.backends.sglang.public import PublicScorer, check
from rl_onoff.backends.sglang.setup import MARGIN, engine_args, engine_environment
from rl_onoff.backends.sglang.streaming import Emit, Take, Work, run
from rl_onoff.errors import EngineError, MissingDependencyError, UsageError
from rl_onoff.types import FinishReason, LogprobKind, Rollout, SampleRequest, Sampling, TokenScores, Want

log = logging.getLogger(__name__)

MAX_STOP = 32
MAX_IN_FLIGHT = 1024  # responses handed to the engine at a time; its own queue needs no more to fill a batch
NO_TOP_K = 1 << 30  # SGLang's way to say that every token is kept


class SGLangBackend(BaseBackend):
    """One SGLang engine."""

    name: ClassVar[str] = "sglang"
    package: ClassVar[str] = "sglang"
    config_class: ClassVar[type[EngineConfig]] = SGLangBackendConfig
    # SGLANG_RETURN_ORIGINAL_LOGPROB chooses between log_softmax(z) and log_softmax(z / T); there is no third
    logprob_kinds: ClassVar[frozenset[LogprobKind]] = frozenset({LogprobKind.raw, LogprobKind.scaled})
    worker_by_default: ClassVar[bool] = True
    config: SGLangBackendConfig

    _engine: Any = None
    _public: PublicScorer | None = None  # None: statistics are computed inside the engine
    _pool: int = 0  # tokens that the engine's key-value cache holds

    # -- the engine's four calls ---------------------------------------------------------------------------------------

    def _load(self) -> EngineInfo:
        from rl_onoff.models.resolve import hub_errors

        try:
            import sglang  # noqa: F401
        except ImportError as error:
            if error.name != "sglang":
                raise EngineError(
                    f"SGLang is installed but cannot be imported ({error}): run `rl-onoff doctor`"
                ) from error
            raise MissingDependencyError(
                "the sglang backend needs the sglang package: pip install 'rl-onoff[sglang]', or set backend.python to "
                "the interpreter "
                "of an environment that has it"
            ) from error
        version = metadata.version(self.package)
        with hub_errors(self.config.model_name):
            self._start(self.config.in_engine_stats)
            if self._public is None and (why := self._check_probes()):
                log.warning(
                    "SGLang %s: statistics inside the engine do not work (%s); they are taken through its public API "
                    "instead, which is "
                    "slow: set backend.in_engine_stats=false to do so without this warning", version, why,
                )  # fmt: skip
                self._close()
                self._start(False)
        if not self._seeds_count():
            log.warning(
                "SGLang %s: our sampler inside the engine does not work, so sampling.seed has no effect", version
            )
        manager = self._engine.tokenizer_manager
        model = manager.model_config
        eos_ids = {
            self.get_tokenizer().eos_token_id,
            manager.tokenizer.eos_token_id,
            *(model.hf_eos_token_id or ()),
        } - {None}
        self._info = EngineInfo(
            engine=self.name,
            version=version,
            dtype=str(model.dtype).removeprefix("torch."),
            vocab_size=model.vocab_size,
            max_len=min(model.context_len, self._pool) - MARGIN,
            eos_ids=tuple(sorted(eos_ids)),
            in_engine_stats=self._public is None,
            batch=MAX_IN_FLIGHT // 4,
        )
        return self._info

    def _generate(self, supply: Supply) -> Iterator[Rollout]:
        def work(request: SampleRequest) -> Work:
            async def draw(emit: Emit) -> None:
                emit(await self._complete(request))

            return 1, draw

        yield from self._run(lambda most, wait: map(work, supply.take(most, wait=wait)), MAX_IN_FLIGHT)

    def _score(self, responses: Sequence[Rollout], want: Want) -> Iterator[TokenScores]:
        if self._public is not None:
            yield from self._run(whole((1, self._public.scoring(response, want)) for response in responses), 1)
            return
        groups: dict[bytes, list[Rollout]] = {}
        for response in responses:
            groups.setdefault(response.prompt_ids.tobytes(), []).append(response)

        def work(members: list[Rollout]) -> Work:
            async def one(response: Rollout, emit: Emit) -> None:
                emit(await self._probe(response, want))

            async def group(emit: Emit) -> None:
                # requests of one step share no prefix: the first leaves the prompt in the cache for the others
                await one(members[0], emit)
                await asyncio.gather(*(one(response, emit) for response in members[1:]))

            return len(members[0].prompt_ids) + sum(len(response.token_ids_T) for response in members), group

        yield from self._run(
            whole(map(work, groups.values())), max(1, self._pool // 2)
        )  # else a prompt is evicted before its turn

    def _close(self) -> None:
        engine, self._engine, self._public = self._engine, None, None
        if engine is not None:
            engine.shutdown()

    @staticmethod
    def sampling_args(sampling: Sampling, eos_ids: Sequence[int], seed: int) -> dict[str, Any]:
        if len(sampling.stop) > MAX_STOP:
            raise UsageError(
                f"sampling.stop has {len(sampling.stop)} strings but SGLang takes at most {MAX_STOP}: shorten "
                "sampling.stop"
            )
        return {
            "n": 1,
            "max_new_tokens": sampling.max_new_tokens,
            "min_new_tokens": 0,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or NO_TOP_K,
            "min_p": sampling.min_p,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "stop": list(sampling.stop),
            "stop_token_ids": list(eos_ids),
            "ignore_eos": False,
            "no_stop_trim": True,
            "skip_special_tokens": True,
            "sampling_seed": seed,
        }

    # -- starting ------------------------------------------------------------------------------------------------------

    def _start(self, in_engine: bool) -> None:
        from rl_onoff.backends.sglang.hooks import engine_class

        os.environ.update(engine_environment(self.config))
        args = engine_args(self.config) | ({} if in_engine else {"enable_return_hidden_states": True})
        self._engine = engine_class()(**args)
        self._pool = self._engine._scheduler_init_result.scheduler_infos[0]["max_total_num_tokens"]
        self._public = None if in_engine else PublicScorer(self._engine)

    def _check_probes(self) -> str | None:
        """Score a short known sequence inside the engine and through its public API; why they differ, None when they
        agree."""
        vocab_size = self._engine.tokenizer_manager.model_config.vocab_size
        ids = np.array([(1009 * i + 7) % vocab_size for i in range(12)], np.int32)
        response = Rollout(request_id="check", sample=0, prompt_ids=ids[:5], token_ids_T=ids[5:])
        loop = self._engine.loop
        try:
            ours = loop.run_until_complete(self._probe(response, Want())).logprobs_T
        except EngineError as error:
            return str(error)
        output = loop.run_until_complete(
            self._engine.async_generate(
                input_ids=ids.tolist(),
                sampling_params={"max_new_tokens": 0, "temperature": 0.0},
                return_logprob=True,
                logprob_start_len=4,
            )
        )
        theirs = np.array([entry[0] for entry in output["meta_info"]["input_token_logprobs"][1:]])
        difference = float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else float("inf")
        # in 16 bits the two round differently
        allowed = 1e-3 if "float32" in str(self._engine.tokenizer_manager.model_config.dtype) else 0.1
        return None if difference <= allowed else f"they differ from the engine's own logprobs by {difference:.2g}"

    def _seeds_count(self) -> bool:
        """Whether the same seed gives the same token, where almost every token is as likely as the next."""
        args = self.sampling_args(Sampling(max_new_tokens=1, temperature=100.0), (), seed=1)

        async def draw() -> list[Any]:
            rids = [Job(prompt_len=3, seed=1).rid() for _ in range(4)]
            return await asyncio.gather(
                *(self._engine.async_generate(input_ids=[1, 2, 3], sampling_params=args, rid=rid) for rid in rids)
            )

        return len({output["output_ids"][0] for output in self._engine.loop.run_until_complete(draw())}) == 1

    # -- one request ---------------------------------------------------------------------------------------------------

    async def _complete(self, request: SampleRequest) -> Rollout:
        sampling = request.sampling
        room = self.info.max_len - len(request.prompt_ids)
        limited = sampling.replace(max_new_tokens=min(sampling.max_new_tokens, room))
        job = Job(prompt_len=len(request.prompt_ids), seed=request.seed)
        output = await self._engine.async_generate(
            input_ids=request.prompt_ids.tolist(),
            sampling_params=self.sampling_args(limited, self.info.eos_ids, request.seed),
            return_logprob=True,
            rid=job.rid(),
        )
        meta = output["meta_info"]
        check(meta)
        token_ids_T = np.asarray(output["output_ids"], np.int32)
        return Rollout(
            request_id=request.request_id,
            sample=request.sample,
            token_ids_T=token_ids_T,
            logprobs_T=np.array([entry[0] for entry in meta["output_token_logprobs"]], np.float32),
            kind=self.config.logprob_kind,
            finish_reason=self._finish(meta["finish_reason"], token_ids_T, sampling.stop),
        )

    def _finish(self, reason: dict[str, Any], token_ids_T: np.ndarray, stop: Sequence[str]) -> FinishReason:
        """Why a response ended. SGLang says `stop` of a token id and of a string alike."""
        if token_ids_T[-1] in self.info.eos_ids:
            return FinishReason.eos
        if reason["type"] == "stop":
            return FinishReason.stop
        text = self.get_tokenizer().decode(token_ids_T.tolist(), skip_special_tokens=True) if stop else ""
        return FinishReason.length if cut_at_stop(text, stop) is None else FinishReason.stop

    async def _probe(self, response: Rollout, want: Want) -> TokenScores:
        """Statistics of one response, computed inside the engine."""
        num_prompt, num_tokens = len(response.prompt_ids), len(response.token_ids_T)
        file = None
        if want.full_logits:
            handle, path = tempfile.mkstemp(prefix="rl_onoff-logits-")
            file = Path(path)
            os.truncate(handle, num_tokens * self._engine.tokenizer_manager.model_config.vocab_size * 4)
            os.close(handle)
        name = str(file) if file else None
        job = Job(
            prompt_len=num_prompt, num_tokens=num_tokens, top_k=want.top_k, sampler=want.sampler, logits_file=name
        )
        try:
            output = await self._engine.async_generate(
                input_ids=np.concatenate([response.prompt_ids, response.token_ids_T]).tolist(),
                sampling_params={
                    "max_new_tokens": 1,
                    "temperature": 0.0,
                },  # with 0 new tokens the statistics would not come back
                return_logprob=True,
                logprob_start_len=num_prompt - 1,
                rid=job.rid(),
            )
            check(output["meta_info"])
            columns = (output["meta_info"].get(INFO) or [None])[0]
            if columns is None:
                raise EngineError("SGLang sent no statistics back: set backend.in_engine_stats=false")
            if file is not None:
                columns["logits_TV"] = np.fromfile(file, np.float32).reshape(num_tokens, -1)
        finally:
            if file is not None:
                file.unlink(missing_ok=True)
        return TokenScores(**columns).of(response)

    def _run(self, take: Take, limit: int) -> Iterator[Any]:
        engine = self._engine
        return run(engine.loop, take, limit, abort=lambda: engine.tokenizer_manager.abort_request(abort_all=True))

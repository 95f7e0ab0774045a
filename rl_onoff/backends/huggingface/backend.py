"""HuggingFace Transformers, in this process: the reference the other engines are measured against, and the one with gradients."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from rl_onoff.backends.base import BaseBackend
from rl_onoff.backends.engine import Core, EngineInfo
from rl_onoff.backends.engine_config import EngineConfig, PoolKind
from rl_onoff.backends.huggingface.config import HuggingFaceBackendConfig
from rl_onoff.errors import EngineError, MissingDependencyError, UsageError
from rl_onoff.models.tokenizer import context_length, end_ids
from rl_onoff.types import Completion, LogprobKind, Request, Response, Sampling, TokenScores, Want

if TYPE_CHECKING:
    from torch import Tensor

    from rl_onoff.backends.huggingface.model import SplitModel

log = logging.getLogger(__name__)

SHARED_PROMPT_TOKENS = 16  # below this, computing a prompt once for all its responses saves nothing


class HuggingFaceBackend(BaseBackend):
    """A causal language model of Transformers."""

    name: ClassVar[str] = "huggingface"
    package: ClassVar[str] = "transformers"
    config_class: ClassVar[type[EngineConfig]] = HuggingFaceBackendConfig
    logprob_kinds: ClassVar[frozenset[LogprobKind]] = frozenset(LogprobKind)
    supports_gradients: ClassVar[bool] = True
    config: HuggingFaceBackendConfig

    _split: Any = None
    _ranks: Any = None  # the other processes that hold a part of the model, with tp_size above 1

    # -- the engine's four calls ---------------------------------------------------------------------------------------

    def _load(self) -> EngineInfo:
        try:
            import torch  # noqa: F401
            import transformers
        except ImportError as error:
            raise MissingDependencyError(
                f"the huggingface backend needs torch and transformers ({error}): pip install rl-onoff"
            ) from error
        if self.config.num_devices > 1:
            from rl_onoff.backends.huggingface.tensor_parallel import Ranks

            self._ranks = Ranks(self.config)
        self._split = self._load_split()
        model = self._split.whole
        self._info = EngineInfo(
            engine=self.name,
            version=transformers.__version__,
            dtype=str(model.dtype).removeprefix("torch."),
            vocab_size=model.get_output_embeddings().weight.shape[0],
            max_len=context_length(model.config),
            eos_ids=end_ids(model.generation_config.eos_token_id, self.get_tokenizer()),
            batch=self.config.batch_size,
        )
        return self._info

    def _load_split(self) -> SplitModel:
        """The weights in this process; with tp_size above 1, the part of them that its rank holds."""
        import torch
        import transformers

        from rl_onoff.backends.huggingface import tensor_parallel
        from rl_onoff.backends.huggingface.model import SplitModel
        from rl_onoff.models.resolve import load_errors, resolve

        if not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()
        config = self.config
        device_map, split_over = config.device_map, {}
        if config.num_devices > 1:
            split_over = {"distributed_config": transformers.DistributedConfig(tp_size=config.tp_size)}
        elif device_map is None and config.device is None and torch.cuda.device_count() > 1:
            device_map = "auto"
        dtype = config.weights_dtype
        files = resolve(config.model_name, revision=config.revision)
        with load_errors(
            config.model_name, options="backend.device_map, backend.attn_implementation or backend.engine_kwargs"
        ):
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                files.path,
                revision=files.revision or "main",
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                device_map=device_map,
                trust_remote_code=config.trust_remote_code,
                **({"attn_implementation": config.attn_implementation} if config.attn_implementation else {}),
                **split_over,
                **config.engine_kwargs,
            )
        if device_map is None and not split_over:
            model = model.to(self._device())
        model.eval()
        model.requires_grad_(False)
        split = SplitModel(model) if self._ranks is None else tensor_parallel.Lead(model, self._ranks)
        if config.head_dtype == "float32":
            if split_over:
                tensor_parallel.use_float32_head(split)
            else:
                split.use_float32_head()
        return split

    def _generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        from rl_onoff.backends.huggingface.decode import batches, decode
        from rl_onoff.backends.sampler import Row

        rows = [Row(request, sample, self.info.max_len) for request in requests for sample in request.sample_indices]
        eos_ids = frozenset(self.info.eos_ids)
        for batch in batches(rows, self.config.batch_size, self.config.max_batch_tokens):
            yield from decode(self._split, batch, self.get_tokenizer(), eos_ids, self.config.logprob_kind)

    def _score(self, responses: Sequence[Response], want: Want) -> Iterator[TokenScores]:
        import torch

        for batch, shares_prompt in self._score_batches(responses):
            with torch.no_grad():
                if not self._split.splits:
                    scores = [self._score_whole(response, want) for response in batch]
                else:
                    scores = self._score_batch(
                        batch, self._hidden_shared(batch) if shares_prompt else self._hidden(batch), want
                    )
            yield from scores

    def _close(self) -> None:
        self._split = None
        ranks, self._ranks = self._ranks, None
        if ranks is not None:
            ranks.close()
        try:
            import torch
        except ImportError:
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @staticmethod
    def sampling_args(sampling: Sampling, eos_ids: Sequence[int], seed: int) -> dict[str, Any]:
        """What `model.generate` would need to draw from the same distribution (our own loop does the drawing)."""
        return {
            "do_sample": not sampling.greedy,
            "temperature": 1.0 if sampling.greedy else sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "max_new_tokens": sampling.max_new_tokens,
            "stop_strings": sampling.stop or None,
            "eos_token_id": list(eos_ids),
            "repetition_penalty": 1.0,
        }

    # -- placement -----------------------------------------------------------------------------------------------------

    def _num_replicas(self) -> int | None:
        config = self.config
        if (
            config.pool.kind is PoolKind.ray
            or config.dp_size is not None
            or config.num_devices == 1
            or not config.gpus_per_replica
        ):
            return config.dp_size
        from rl_onoff.workers.devices import replicas_that_fit

        return replicas_that_fit(config.num_devices)

    def _hosted_by_default(self) -> bool:
        return self.config.num_devices > 1  # whose ranks are one process each

    def _place(self) -> Core:
        if self.config.num_devices > 1:
            from rl_onoff.backends.huggingface import hybrid

            hybrid.check(self.config)
            if self.config.worker is not False and self.config.pool.kind is PoolKind.local:
                hybrid.announce(self._num_replicas() or 1, self.config.num_devices)
        return super()._place()

    def _check_gradients(self) -> None:
        if self.config.num_devices > 1:
            raise UsageError(
                f"there are no gradients with backend.tp_size={self.config.tp_size}: set backend.tp_size=1"
            )

    # -- scoring -------------------------------------------------------------------------------------------------------

    def _score_batches(self, responses: Sequence[Response]) -> Iterator[tuple[list[Response], bool]]:
        """(batch, whether its responses share one prompt that is worth computing once), each within the limits on size."""
        alone: list[Response] = []
        for _, group in groupby(sorted(responses, key=_prompt_key), key=_prompt_key):
            members = sorted(group, key=lambda r: len(r.token_ids_T))
            if len(members) == 1 or len(members[0].prompt_ids) < SHARED_PROMPT_TOKENS or not self._split.shares_prompts:
                alone += members
                continue
            for batch in self._cut(members):
                yield batch, len(batch) > 1
        for batch in self._cut(sorted(alone, key=lambda r: r.num_tokens)):
            yield batch, False

    def _cut(self, responses: Sequence[Response]) -> Iterator[list[Response]]:
        """Batches of responses sorted by length."""
        batch: list[Response] = []
        for response in responses:
            too_long = response.num_tokens * (len(batch) + 1) > self.config.max_batch_tokens
            if batch and (too_long or len(batch) == self.config.batch_size):
                yield batch
                batch = []
            batch.append(response)
        if batch:
            yield batch

    def _hidden(self, batch: Sequence[Response]) -> Tensor:
        """Hidden states (R, D) at the positions that give the response tokens, response after response.

        Padding is on the right, where a causal model cannot see it: every row is computed as if it were alone.
        """
        import torch

        width = (
            max(response.num_tokens for response in batch) - 1
        )  # the last token's own position gives no response token
        ids_BL = np.zeros((len(batch), width), np.int64)
        for i, response in enumerate(batch):
            sequence = np.concatenate([response.prompt_ids, response.token_ids_T[:-1]])
            ids_BL[i, : len(sequence)] = sequence
        hidden_BLD = self._split.body(input_ids=self._tensor(ids_BL), use_cache=False).last_hidden_state
        return torch.cat([hidden_BLD[i, len(r.prompt_ids) - 1 : r.num_tokens - 1] for i, r in enumerate(batch)])

    def _hidden_shared(self, batch: Sequence[Response]) -> Tensor:
        """The same for responses to one prompt: the prompt is computed once and its cache repeated."""
        import torch

        prompt_ids = batch[0].prompt_ids
        output = self._split.body(input_ids=self._tensor(prompt_ids[None].astype(np.int64)), use_cache=True)
        first_1D = output.last_hidden_state[0, -1:]
        width = max(len(response.token_ids_T) for response in batch) - 1
        if width == 0:
            return first_1D.repeat(len(batch), 1)
        ids_BL = np.zeros((len(batch), width), np.int64)
        for i, response in enumerate(batch):
            ids_BL[i, : len(response.token_ids_T) - 1] = response.token_ids_T[:-1]
        output.past_key_values.batch_repeat_interleave(len(batch))
        positions = torch.arange(len(prompt_ids), len(prompt_ids) + width, device=self._split.device)[None]
        hidden_BLD = self._split.body(
            input_ids=self._tensor(ids_BL),
            past_key_values=output.past_key_values,
            position_ids=positions,
            use_cache=True,
        ).last_hidden_state
        return torch.cat(
            [part for i, r in enumerate(batch) for part in (first_1D, hidden_BLD[i, : len(r.token_ids_T) - 1])]
        )

    def _score_batch(self, batch: Sequence[Response], hidden_RD: Tensor, want: Want) -> list[TokenScores]:
        from rl_onoff.backends.token_stats import chunk_rows, stats_of_hidden

        token_ids_R = self._tensor(np.concatenate([response.token_ids_T for response in batch])).to(hidden_RD.device)
        rows = chunk_rows(self.info.vocab_size, hidden_RD.device.type)
        stats = stats_of_hidden(hidden_RD, self._split.head, token_ids_R, want, rows=rows)
        scores, start = [], 0
        for response in batch:
            end = start + len(response.token_ids_T)
            scores.append(stats[start:end].of(response))
            start = end
        return scores

    def _score_whole(self, response: Response, want: Want) -> TokenScores:
        """For a model that cannot be split: its own logits of one sequence."""
        from rl_onoff.backends.token_stats import token_stats

        logits_TV = self._whole_logits(response)
        return token_stats(logits_TV, self._tensor(response.token_ids_T).to(logits_TV.device), want).of(response)

    def _logits_with_gradients(self, responses: Sequence[Response]) -> list[Any]:
        import torch

        if self._split is None:
            raise EngineError(
                "gradients need the model in this process: set worker to false and leave dp_size and python alone"
            )
        self._split.whole.requires_grad_(True)
        with torch.enable_grad():
            return [self._whole_logits(response).float() for response in responses]

    def _whole_logits(self, response: Response) -> Tensor:
        """(T, V) logits of one unpadded sequence, by the model's own forward pass."""
        input_ids = self._tensor(np.concatenate([response.prompt_ids, response.token_ids_T])[None].astype(np.int64))
        logits_LV = self._split.whole(input_ids=input_ids, use_cache=False).logits[0]
        return logits_LV[len(response.prompt_ids) - 1 : -1]

    def _tensor(self, array: np.ndarray) -> Tensor:
        import torch

        return torch.as_tensor(array, device=self._split.device)

    def _device(self) -> str:
        import torch

        device = self.config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.device(device)
        except RuntimeError as error:
            raise UsageError(
                f"backend.device is {device!r}, which torch does not know: set backend.device=cuda or cpu"
            ) from error
        kind, _, index = device.partition(":")
        if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
            raise UsageError(
                f"backend.device is {device}, but torch sees {torch.cuda.device_count()} CUDA devices: set backend.device=cpu"
            )
        return device


def _prompt_key(response: Response) -> bytes:
    return np.asarray(response.prompt_ids, np.int32).tobytes()

"""HuggingFace Transformers: the reference the other engines are measured against, and the one with gradients."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from rl_onoff.backends.base import BaseBackend
from rl_onoff.backends.devices import replicas_that_fit
from rl_onoff.backends.engine import Core, EngineInfo, Supply
from rl_onoff.backends.engine_config import EngineConfig, PoolKind
from rl_onoff.backends.huggingface import tensor_parallel
from rl_onoff.backends.huggingface.config import HuggingFaceBackendConfig
from rl_onoff.backends.huggingface.model import decode, load
from rl_onoff.backends.huggingface.tensor_parallel import Ranks
from rl_onoff.backends.placement import place
from rl_onoff.backends.sampler import Row
from rl_onoff.backends.token_stats import chunk_rows, stats_of_hidden, token_stats
from rl_onoff.errors import EngineError, UsageError
from rl_onoff.models.resolve import context_length, end_ids
from rl_onoff.types import LogprobKind, Rollout, SampleRequest, TokenScores, Want

if TYPE_CHECKING:
    from torch import Tensor

Item = TypeVar("Item", SampleRequest, Rollout)

SHARED_PROMPT_TOKENS = 16  # below this, computing a prompt once for all its responses saves nothing


class HuggingFaceBackend(BaseBackend):
    """A causal language model of Transformers."""

    name: ClassVar[str] = "huggingface"
    package: ClassVar[str] = "transformers"
    config_class: ClassVar[type[EngineConfig]] = HuggingFaceBackendConfig
    logprob_kinds: ClassVar[frozenset[LogprobKind]] = frozenset(LogprobKind)
    supports_gradients: ClassVar[bool] = True
    adapters: ClassVar[bool] = True
    config: HuggingFaceBackendConfig

    _split: Any = None
    _ranks = Ranks()  # the processes that compute with this one; none, unless tp_size is above 1

    def _check_adapter(self, name: str, path: str) -> None:
        super()._check_adapter(name, path)
        if self.config.num_devices > 1 and not self.config.merge_adapter:
            why = f"Transformers does not split an adapter, and backend.tp_size is {self.config.tp_size}"
            raise UsageError(f"{why}: set model.merge_adapter=true, or backend.tp_size=1")

    def _load(self) -> EngineInfo:
        import transformers

        if self.config.num_devices > 1 and self._ranks.leads:
            self._ranks = Ranks.start(type(self), self.config)
        self._split = load(self.config)
        model = self._split.whole
        return EngineInfo(
            engine=self.name, version=transformers.__version__, dtype=str(model.dtype).removeprefix("torch."),
            vocab_size=model.get_output_embeddings().weight.shape[0], max_len=context_length(model.config),
            eos_ids=end_ids(model.generation_config.eos_token_id, self.get_tokenizer()), batch=self.config.batch_size,
        )  # fmt: skip

    def _generate(self, supply: Supply) -> Iterator[Rollout]:
        while requests := supply.take(wait=True):
            # prompts of like length together, longest first; samples of one prompt stay neighbours
            for batch in self._cut(sorted(requests, key=lambda request: (-len(request.prompt_ids), request.key))):
                yield from self._on_all_ranks("_sample_batch", batch)

    def _score(self, rollouts: Sequence[Rollout], want: Want) -> Iterator[TokenScores]:
        by_prompt: defaultdict[bytes, list[Rollout]] = defaultdict(list)
        for rollout in sorted(rollouts, key=lambda rollout: rollout.num_tokens):
            by_prompt[rollout.prompt_ids.tobytes()].append(rollout)
        alone: list[Rollout] = []
        for members in by_prompt.values():
            if len(members) == 1 or len(members[0].prompt_ids) < SHARED_PROMPT_TOKENS or not self._split.shares_prompts:
                alone += members
                continue
            for batch in self._cut(members):
                yield from self._on_all_ranks("_score_batch", batch, want, len(batch) > 1)
        for batch in self._cut(sorted(alone, key=lambda rollout: rollout.num_tokens)):
            yield from self._on_all_ranks("_score_batch", batch, want, False)

    def _close(self) -> None:
        self._split = None
        self._ranks.close()
        if "torch" in sys.modules:
            import torch

            torch.cuda.empty_cache()

    def _place(self) -> Core:
        config, splits = self.config, self.config.num_devices > 1
        dp_size, on_ray = config.dp_size, config.pool.kind is PoolKind.ray
        if splits and dp_size is None and config.gpus_per_replica and not on_ray:
            dp_size = replicas_that_fit(config.num_devices)
        if splits:
            tensor_parallel.check(config)
            if config.worker is not False and not on_ray:
                tensor_parallel.announce(dp_size or 1, config.num_devices)
        return place(self, replace(config, dp_size=dp_size), in_worker=splits)  # each of its ranks is a process

    def _check_gradients(self) -> None:
        if self.config.num_devices > 1:
            split = f"backend.tp_size={self.config.tp_size}"
            raise UsageError(f"there are no gradients with {split}: set backend.tp_size=1")

    def _cut(self, items: Iterable[Item]) -> Iterator[list[Item]]:
        """Neighbours together, as many as the limits on size allow; the longest sets the padding."""
        batch: list[Item] = []
        width = 0
        for item in items:
            length = min(item.num_tokens, self.info.max_len)
            width = max(width, length)
            too_many = width * (len(batch) + 1) > self.config.max_batch_tokens
            if batch and (too_many or len(batch) == self.config.batch_size):
                yield batch
                batch, width = [], length
            batch.append(item)
        if batch:
            yield batch

    def _on_all_ranks(self, method: str, *args: Any) -> Iterator[Any]:
        """The results of one batch; where they are yielded, the other ranks wait for rank 0's next word."""
        with self._ranks.batch(method, *args):
            yield from getattr(self, method)(*args)

    def _sample_batch(self, requests: Sequence[SampleRequest]) -> Iterator[Rollout]:
        rows = [Row(request, self.info.max_len) for request in requests]
        eos_ids = frozenset(self.info.eos_ids)
        return decode(self._split, rows, self.get_tokenizer(), eos_ids, self.config.logprob_kind, self._ranks)

    def _score_batch(self, batch: Sequence[Rollout], want: Want, shares_prompt: bool) -> list[TokenScores]:
        """The scores of a batch; other ranks than 0 only compute their part of the logits."""
        import torch

        with torch.no_grad():
            if not self._split.splits:
                pairs = ((r, self._whole_logits(r)) for r in batch)
                return [token_stats(z_TV, torch.as_tensor(r.token_ids_T, device=z_TV.device), want).of(r)
                        for r, z_TV in pairs]  # fmt: skip
            hidden_RD = self._hidden(batch, shares_prompt)
            rows = chunk_rows(self.info.vocab_size, hidden_RD.device.type)
            if not self._ranks.leads:
                for hidden in hidden_RD.split(rows):
                    self._split.head(hidden)
                return []
            token_ids_R = torch.as_tensor(np.concatenate([r.token_ids_T for r in batch]), device=hidden_RD.device)
            stats = stats_of_hidden(hidden_RD, self._split.head, token_ids_R, want, rows=rows)
        ends = np.cumsum([len(rollout.token_ids_T) for rollout in batch])
        return [stats[end - len(r.token_ids_T) : end].of(r) for r, end in zip(batch, ends, strict=True)]

    def _hidden(self, batch: Sequence[Rollout], shares_prompt: bool) -> Tensor:
        """Hidden states (R, D) at the positions that give the response tokens, response after response.

        Padding is on the right, where a causal model cannot see it: every row is computed as if it were alone. A prompt
        that the batch shares is computed once and its cache repeated.
        """
        import torch

        body, padded = self._split.body, self._split.padded
        starts = [0 if shares_prompt else len(r.prompt_ids) - 1 for r in batch]
        if shares_prompt:
            prompt_BL, _ = padded([batch[0].prompt_ids])
            output = body(input_ids=prompt_BL, use_cache=True)
            hidden_BLD = output.last_hidden_state[:, -1:].repeat(len(batch), 1, 1)
            ids_BL, _ = padded([r.token_ids_T[:-1] for r in batch])
            if ids_BL.shape[1]:
                output.past_key_values.batch_repeat_interleave(len(batch))
                positions = prompt_BL.shape[1] + torch.arange(ids_BL.shape[1], device=ids_BL.device)[None]
                cached = {"past_key_values": output.past_key_values, "position_ids": positions, "use_cache": True}
                hidden_BLD = torch.cat([hidden_BLD, body(input_ids=ids_BL, **cached).last_hidden_state], 1)
        else:  # the last token's own position gives no response token
            ids_BL, _ = padded([np.concatenate([r.prompt_ids, r.token_ids_T[:-1]]) for r in batch])
            hidden_BLD = body(input_ids=ids_BL, use_cache=False).last_hidden_state
        return torch.cat([hidden_BLD[i, at : at + len(batch[i].token_ids_T)] for i, at in enumerate(starts)])

    def _whole_logits(self, rollout: Rollout) -> Tensor:
        """(T, V) logits of one unpadded sequence, by the model's own forward pass."""
        ids_BL, _ = self._split.padded([np.concatenate([rollout.prompt_ids, rollout.token_ids_T])])
        logits_LV = self._split.whole(input_ids=ids_BL, use_cache=False).logits[0]
        return logits_LV[len(rollout.prompt_ids) - 1 : -1]

    def _logits_with_gradients(self, rollouts: Sequence[Rollout]) -> list[Any]:
        import torch

        if self._split is None:
            raise EngineError("gradients need the model in this process: set worker=false, dp_size=1 and python=null")
        self._split.whole.requires_grad_(True)
        with torch.enable_grad():
            return [self._whole_logits(rollout).float() for rollout in rollouts]

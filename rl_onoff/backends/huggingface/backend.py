"""HuggingFace Transformers: the reference the other engines are measured against, and the one with gradients."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from rl_onoff.backends.base import BaseBackend
from rl_onoff.backends.devices import replicas_that_fit
from rl_onoff.backends.engine import Core, EngineInfo, Supply
from rl_onoff.backends.engine_config import EngineConfig, PoolKind
from rl_onoff.backends.huggingface import packed, tensor_parallel
from rl_onoff.backends.huggingface.config import AUTO, HuggingFaceBackendConfig
from rl_onoff.backends.huggingface.decode import Decoder
from rl_onoff.backends.huggingface.layers import scores_and_layers
from rl_onoff.backends.huggingface.limits import Limits, cut, is_out_of_memory
from rl_onoff.backends.huggingface.model import load
from rl_onoff.backends.huggingface.tensor_parallel import Ranks
from rl_onoff.backends.placement import place
from rl_onoff.backends.token_stats import StatsBuffer, chunk_rows, stats_of_hidden, token_stats
from rl_onoff.errors import EngineError, UsageError
from rl_onoff.models.resolve import context_length, end_ids
from rl_onoff.types import LogprobKind, Rollout, SampleRequest, TokenScores, Want

if TYPE_CHECKING:
    from torch import Tensor


class HuggingFaceBackend(BaseBackend):
    """A causal language model of Transformers."""

    name: ClassVar[str] = "huggingface"
    package: ClassVar[str] = "transformers"
    config_class: ClassVar[type[EngineConfig]] = HuggingFaceBackendConfig
    logprob_kinds: ClassVar[frozenset[LogprobKind]] = frozenset(LogprobKind)
    supports_gradients: ClassVar[bool] = True
    sees_layers: ClassVar[bool] = True
    adapters: ClassVar[bool] = True
    config: HuggingFaceBackendConfig

    _split: Any = None
    _limits: Any = None
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
        if not self._ranks.alone:
            _ = self._split.packs  # a forward pass of all ranks, which rank 0 alone would wait in for ever
        self._limits = Limits.of(self.config, self._split)
        model = self._split.whole
        return EngineInfo(
            engine=self.name, version=transformers.__version__, dtype=str(model.dtype).removeprefix("torch."),
            vocab_size=model.get_output_embeddings().weight.shape[0], max_len=context_length(model.config),
            eos_ids=end_ids(model.generation_config.eos_token_id, self.get_tokenizer()), batch=self._limits.rows,
        )  # fmt: skip

    def _generate(self, supply: Supply) -> Iterator[Rollout]:
        while requests := supply.take(wait=True):
            take = functools.partial(supply.take, wait=False)
            with self._ranks.batch("_sample", requests, self._limits):
                yield from self._sample(requests, self._limits, take)

    def _score(self, rollouts: Sequence[Rollout], want: Want) -> Iterator[TokenScores]:
        batches = self._batches(rollouts, want)
        at_once = self._split.device.type == "cpu" or want.full_logits  # those of two batches would fill the host
        waiting: Iterable[TokenScores] = ()  # read once a GPU has the next batch to compute
        if want.layers is not None:
            yield from scores_and_layers(self._split, batches, self._score_batch, want)
            return
        while batches:
            try:
                with self._ranks.batch("_score_batch", batches[0], want):
                    launched = self._score_batch(batches[0], want)
                batches = batches[1:]
            except RuntimeError as error:
                if not (self._ranks.alone and is_out_of_memory(error)):
                    raise
                self._limits.halve(len(batches[0]))
                batches = self._batches([rollout for batch in batches for rollout in batch], want)
                continue
            yield from launched if at_once else waiting
            waiting = () if at_once else launched
        yield from waiting

    def _batches(self, rollouts: Sequence[Rollout], want: Want) -> list[list[Rollout]]:
        """What is scored at once."""
        total = attrgetter("num_tokens")
        if self._packs(want):
            batches = packed.cut(rollouts, self._limits.tokens)
        else:
            batches = cut(sorted(rollouts, key=total), self._limits.tokens, total)
        size = self.config.batch_size
        most = len(rollouts) if size == AUTO else int(size)
        return [batch[i : i + most] for batch in batches for i in range(0, len(batch), most)]

    def _packs(self, want: Want) -> bool:
        return self._split.packs and want.layers is None  # whose hidden states are told apart by their padding

    def _close(self) -> None:
        self._split = None
        self._ranks.close()
        if "torch" in sys.modules:
            import torch

            if torch.cuda.is_available():
                gc.collect()  # accelerate, which spreads a model over several devices, makes cycles of its modules
                torch.cuda.empty_cache()

    def _place(self) -> Core:
        config, splits = self.config, self.config.num_devices > 1
        dp_size, on_ray = config.dp_size, config.pool.kind is PoolKind.ray
        if splits:
            tensor_parallel.check(config)
            if dp_size is None and config.gpus_per_replica and not on_ray:
                dp_size = replicas_that_fit(config.num_devices)
            if config.worker is not False and not on_ray:
                tensor_parallel.announce(dp_size or 1, config.num_devices)
        return place(self, replace(config, dp_size=dp_size), in_worker=splits)  # each of its ranks is a process

    def _check_gradients(self) -> None:
        if self.config.num_devices > 1:
            split = f"backend.tp_size={self.config.tp_size}"
            raise UsageError(f"there are no gradients with {split}: set backend.tp_size=1")

    def _sample(
        self, requests: Sequence[SampleRequest], limits: Limits, take: Callable[[], list[SampleRequest]] | None = None
    ) -> Iterator[Rollout]:
        """Sample on this rank; rank 0 says to the others what its supply gives, and how much is computed at once."""
        decoder = Decoder(
            model=self._split, limits=limits, max_len=self.info.max_len, tokenizer=self.get_tokenizer(),
            eos_ids=frozenset(self.info.eos_ids), kind=self.config.logprob_kind, ranks=self._ranks,
        )  # fmt: skip
        return decoder.run(requests, take or list)

    def _score_batch(self, batch: Sequence[Rollout], want: Want) -> Iterable[TokenScores]:
        """The scores of a batch, for which a GPU is waited when they are asked for; other ranks than 0 only compute
        their part of the logits."""
        import torch

        low = self.config.logprob_dtype == "weights"
        with torch.no_grad():
            if not self._split.splits:
                pairs = ((r, self._whole_logits(r)) for r in batch)
                return [token_stats(z_TV, torch.as_tensor(r.token_ids_T, device=z_TV.device), want, low=low).of(r)
                        for r, z_TV in pairs]  # fmt: skip
            hidden_RD = self._split.packed_hidden(batch) if self._packs(want) else self._padded_hidden(batch)
            rows = chunk_rows(self.info.vocab_size, hidden_RD.device.type)
            if not self._ranks.leads:
                for hidden in hidden_RD.split(rows):
                    self._split.head(hidden)
                return []
            ids_R = np.concatenate([r.token_ids_T for r in batch])
            token_ids_R = torch.as_tensor(ids_R, device=self._split.head_device)
            stats = stats_of_hidden(hidden_RD, self._split.head, token_ids_R, want, rows=rows, low=low)
        return self._shares(stats, batch)

    @staticmethod
    def _shares(stats: StatsBuffer, batch: Sequence[Rollout]) -> Iterator[TokenScores]:
        """What each response of a batch gets of its statistics."""
        scores, end = stats.scores(), 0
        for rollout in batch:
            start, end = end, end + len(rollout.token_ids_T)
            yield scores[start:end].of(rollout)

    def _padded_hidden(self, batch: Sequence[Rollout]) -> Tensor:
        """Hidden states (R, D) at the positions that give the response tokens, response after response.

        Padding is on the right, where a causal model cannot see it: every row is computed as if it were alone.
        """
        import torch

        # the last token's own position gives no response token
        ids_BL, _ = self._split.padded([np.concatenate([r.prompt_ids, r.token_ids_T[:-1]]) for r in batch])
        hidden_BLD = self._split.body(input_ids=ids_BL, use_cache=False).last_hidden_state
        starts = [len(r.prompt_ids) - 1 for r in batch]
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

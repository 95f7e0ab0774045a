"""The decoding loop: rows that end leave the batch, and waiting ones enter.

`model.generate` draws from one global stream of random numbers, so a response would depend on its batch; it also reads
the model's generation config, and computes every row until the last one ends. Our loop does neither, prefills a prompt
once for all its samples, and hands out each response when it ends.

A row that ended is computed on, unheeded, until a quarter of the batch has ended: moving rows costs a copy of their
cache.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rl_onoff.backends.huggingface.cache import ROOM, growing_cache, joined
from rl_onoff.backends.huggingface.limits import Limits, cut, is_out_of_memory
from rl_onoff.backends.huggingface.model import SplitModel
from rl_onoff.backends.huggingface.tensor_parallel import Ranks
from rl_onoff.backends.sampler import Row, draw
from rl_onoff.types import LogprobKind, Rollout, SampleRequest

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Decoder:
    """What does not change while rows come and go."""

    model: SplitModel
    limits: Limits
    max_len: int
    tokenizer: Any
    eos_ids: frozenset[int]
    kind: LogprobKind
    ranks: Ranks

    def run(self, requests: Iterable[SampleRequest], take: Callable[[], list[SampleRequest]]) -> Iterator[Rollout]:
        """Sample these requests and those that `take` gives meanwhile; yields each response soon after its end."""
        import torch

        waiting = self._queue(requests)
        while True:
            batch = Batch(self.model, self.max_len)
            try:
                yield from self._rollouts(batch, waiting, take)
                return
            except RuntimeError as error:
                if not (self.ranks.alone and is_out_of_memory(error)):
                    raise
            self.limits.halve(len(batch.rows))
            going = [row.request for row in batch.rows if row.finish is None]  # a request gives the same row again
            waiting, done = self._queue([*going, *(row.request for row in waiting)]), batch.done
            del batch
            torch.cuda.empty_cache()
            yield from done

    def _rollouts(
        self, batch: Batch, waiting: deque[Row], take: Callable[[], list[SampleRequest]]
    ) -> Iterator[Rollout]:
        import torch

        tokens_R, is_full = None, False
        while True:
            with torch.no_grad():  # not inference_mode: it would stay on between two steps of this generator
                logits_RV: Any = None if tokens_R is None else batch.advance(tokens_R)
                going = [i for i, row in enumerate(batch.rows) if row.finish is None]
                if 4 * len(going) <= 3 * len(batch.rows) or (waiting and not is_full):
                    new = self._admitted(waiting, [batch.rows[i] for i in going])
                    is_full = bool(waiting)
                    if new or len(going) < len(batch.rows):
                        after = waiting[0] if waiting else None
                        logits_RV = batch.replace(going, new, logits_RV, after, self.limits.tokens)
            # here the other ranks wait for rank 0's next word: the caller may leave
            while batch.done:
                yield batch.done.pop(0)
            if not batch.rows:
                return
            with torch.no_grad():
                said = (*self._draws(batch, logits_RV), [] if waiting else take()) if self.ranks.leads else None
            # rank 0's draws on every rank, not each rank's own: were the gathered logits to differ in a last bit, the
            # ranks would go on with other tokens, and wait for ever for a batch of another size
            tokens_RS, logprobs_RS, more = self.ranks.agreed(said)
            for row, tokens_S, logprobs_S in zip(batch.rows, tokens_RS.tolist(), logprobs_RS.tolist(), strict=True):
                if row.finish is None:
                    for token, logprob in zip(tokens_S, logprobs_S, strict=True):
                        row.append(token, logprob, self.tokenizer, self.eos_ids)
                        if row.finish:
                            batch.done.append(row.rollout(self.kind))
                            break
            if more:
                waiting.extend(self._queue(more))
            tokens_R = torch.as_tensor(tokens_RS[:, -1], device=self.model.device)

    def _queue(self, requests: Iterable[SampleRequest]) -> deque[Row]:
        """Prompts of like length together, longest first; samples of one prompt are neighbours."""
        in_order = sorted(requests, key=lambda request: (-len(request.prompt_ids), request.key))
        return deque(Row(request, self.max_len) for request in in_order)

    def _admitted(self, waiting: deque[Row], going: list[Row]) -> list[Row]:
        """The rows that enter beside those that go on, taken from `waiting`."""
        new: list[Row] = []
        if going and not self.model.cache_grows:
            return new
        width = max((row.most_tokens for row in going), default=0)
        while waiting:
            width, count = max(width, waiting[0].most_tokens), len(going) + len(new) + 1
            if count > 1 and (count > self.limits.rows or count * width > self.limits.cached_tokens):
                break
            new.append(waiting.popleft())
        return new

    def _draws(self, batch: Batch, logits_RV: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and logprobs (R, S) of the next S draws, which the host sees at once."""
        import torch

        steps = min(self.limits.steps, batch.steps_left) if self.ranks.alone else 1
        samplings = [row.request.sampling for row in batch.rows]
        keys = np.array([[row.key() for _ in range(steps)] for row in batch.rows])
        keys_RS, drawn = torch.as_tensor(keys, device=logits_RV.device), []
        for step in range(steps):
            if step:
                logits_RV = batch.advance(drawn[-1][0])
            drawn.append(draw(logits_RV, samplings, keys_RS[:, step], self.kind))
        tokens_RS, logprobs_RS = (torch.stack(each, 1).cpu().numpy() for each in zip(*drawn, strict=True))
        return tokens_RS, logprobs_RS


class Prompt(NamedTuple):
    """A prompt that was computed, for samples of it that enter later."""

    ids: bytes
    cache: Any
    logits_1V: Tensor


class Batch:
    """Rows that are decoded side by side, and their cache.

    A row that ended is computed on, unheeded, until it is replaced: moving rows costs a copy of the cache.
    """

    def __init__(self, model: SplitModel, max_len: int):
        self.rows: list[Row] = []
        self.done: list[Rollout] = []  # of rows that ended, until they are handed out
        self._model, self._max_len = model, max_len
        self._cache: Any = None
        self._mask_RC: Any = None  # of all columns there may be
        self._positions_R1: Any = None  # of the next tokens
        self._width = 0  # columns in use
        self._prompt: Prompt | None = None

    @property
    def steps_left(self) -> int:
        """The most tokens that a row may still get."""
        return max(row.limit - len(row.token_ids) for row in self.rows if row.finish is None)

    def advance(self, tokens_R: Tensor) -> Tensor:
        """Add a token to every row: (logits (R, V) for the next)."""
        self._width += 1
        logits_RV, self._cache = self._model.last_logits(
            input_ids=tokens_R[:, None].to(self._model.device), attention_mask=self._mask_RC[:, : self._width],
            position_ids=self._positions_R1, past_key_values=self._cache,
        )  # fmt: skip
        self._positions_R1 = (self._positions_R1 + 1).clamp_(max=self._max_len - 1)  # a row that ended may pass the end
        return logits_RV

    def replace(self, going: list[int], new: list[Row], logits_RV: Any, after: Row | None, most_tokens: int) -> Any:
        """Keep the rows `going` and let `new` ones enter: (logits of every row for its next token).

        `after` is the row that enters next time, and `most_tokens` the most that are prefilled at once.
        """
        import torch

        by_prompt: defaultdict[bytes, list[Row]] = defaultdict(list)
        for row in new:
            by_prompt[row.request.prompt_ids.tobytes()].append(row)
        self.rows = [self.rows[i] for i in going] + [row for rows in by_prompt.values() for row in rows]
        if not self.rows:
            self._cache = self._prompt = None
            return None
        parts: list[tuple[Any, Any, list[int]]] = [(self._cache, logits_RV, going)] if going else []
        parts += self._prefilled(by_prompt, after and after.request.prompt_ids.tobytes(), most_tokens)
        device = self._model.device
        moves = [(cache, logits, torch.tensor(rows, device=device)) for cache, logits, rows in parts]
        lengths_R1 = torch.tensor([[row.num_tokens] for row in self.rows], device=device)
        left = self.steps_left
        if self._model.cache_grows or not going:  # a cache of another kind is not trimmed
            self._width = int(lengths_R1.max())
        if self._model.cache_grows:
            room = min(left, max(ROOM, self._width // 4))
            self._cache = joined([(cache, rows_R) for cache, _, rows_R in moves], self._width, room)
        else:
            ((self._cache, _, rows_R),) = moves
            self._cache.reorder_cache(rows_R)
        columns_C = torch.arange(self._width + left, device=device)
        self._mask_RC = (columns_C >= self._width - lengths_R1).long()
        self._positions_R1 = lengths_R1
        return torch.cat([logits[rows_R.to(logits.device)] for _, logits, rows_R in moves])

    def _prefilled(
        self, by_prompt: dict[bytes, list[Row]], after: bytes | None, most_tokens: int
    ) -> Iterator[tuple[Any, Tensor, list[int]]]:
        """Each prompt computed once, several at a time: (cache, logits, for every row its place in those two)."""
        known, self._prompt = self._prompt, None
        waiting = list(by_prompt.items())
        if known is not None and waiting and waiting[0][0] == known.ids:
            rows = waiting.pop(0)[1]
            yield known.cache, known.logits_1V, [0] * len(rows)
            self._prompt = known if known.ids == after else None
        grows = self._model.cache_grows
        for chunk in cut(waiting, most_tokens if grows else 2**62, lambda one: len(one[1][0].request.prompt_ids)):
            prompts = [rows[0].request.prompt_ids for _, rows in chunk]
            input_ids, mask_BL = self._model.padded(prompts, left=True)
            positions_BL = (mask_BL.cumsum(-1) - 1).clamp_(min=0)
            inputs = {"input_ids": input_ids, "attention_mask": mask_BL, "position_ids": positions_BL}
            logits_BV, cache = self._model.last_logits(**inputs, past_key_values=growing_cache() if grows else None)
            yield cache, logits_BV, [i for i, (_, rows) in enumerate(chunk) for _ in rows]
            if grows and after is not None and chunk[-1][0] == after:
                place = positions_BL.new_tensor([len(chunk) - 1])
                own = joined([(cache, place)], len(prompts[-1]), 0)
                self._prompt = Prompt(after, own, logits_BV[-1:].clone())

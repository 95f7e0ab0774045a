"""Responses beside each other in one unpadded sequence, each prompt once: what scoring gives the model.

No token is computed twice and no padding at all: everything but attention sees one long sequence, and attention sees
each response after its own prompt. Shapes: L tokens of the sequence, H heads, D size of a head, P prompt, T response.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from rl_onoff.types import Rollout

if TYPE_CHECKING:
    from torch import Tensor

NAME = "rl_onoff_packed"  # in Transformers' table of kinds of attention
# what a layer tells its attention that ours does not do; so is any tensor but these
NOT_DONE, HARMLESS = ("softcap", "sliding_window"), ("position_ids", "cache_position")


@dataclass(frozen=True)
class Segment:
    """Tokens that see the prompt before them, and each other as far as they come first."""

    prompt: slice  # empty for the first response of a prompt: the prompt is a part of that segment
    own: slice
    mask_TC: Any  # of what every token sees of prompt and segment; None: all that comes first


@dataclass(frozen=True)
class Packed:
    """One sequence of several prompts with their responses."""

    ids_1L: Tensor
    positions_1L: Tensor
    segments: list[Segment]
    rows_R: Tensor  # places in the sequence that give the response tokens, response after response

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], device: Any) -> Packed:
        """Of rollouts where those of one prompt are neighbours. The last token of a response gives none and is left
        out."""
        import torch

        ids: list[np.ndarray] = []
        positions: list[np.ndarray] = []
        rows: list[np.ndarray] = []
        segments: list[Segment] = []
        end = 0
        for _, members in groupby(rollouts, key=lambda rollout: rollout.prompt_ids.tobytes()):
            prompt = slice(end, end)
            for rollout in members:
                num_prompt, response = len(rollout.prompt_ids), rollout.token_ids_T[:-1]
                is_first = prompt.start == prompt.stop
                start = end
                if is_first:
                    prompt = slice(start, start + num_prompt)
                    ids.append(rollout.prompt_ids)
                    positions.append(np.arange(num_prompt))
                    end += num_prompt
                rows.append(np.append(prompt.stop - 1, np.arange(end, end + len(response))))
                ids.append(response)
                positions.append(num_prompt + np.arange(len(response)))
                end += len(response)
                if is_first:
                    segments.append(Segment(slice(start, start), slice(start, end), None))
                elif len(response):
                    shape = len(response), num_prompt + len(response)
                    mask_TC = torch.ones(shape, dtype=torch.bool, device=device).tril(num_prompt)
                    segments.append(Segment(prompt, slice(start, end), mask_TC))
        ids_L, positions_L, rows_R = (
            torch.as_tensor(np.concatenate(parts).astype(np.int64), device=device) for parts in (ids, positions, rows)
        )
        return cls(ids_L[None], positions_L[None], segments, rows_R)


def cut(rollouts: Sequence[Rollout], most_tokens: int) -> list[list[Rollout]]:
    """Rollouts packed together, as many as fit; a prompt's stay together where one sequence holds them."""
    by_prompt: dict[bytes, list[Rollout]] = {}
    for rollout in rollouts:
        by_prompt.setdefault(rollout.prompt_ids.tobytes(), []).append(rollout)
    batches: list[list[Rollout]] = [[]]
    used = 0
    for members in by_prompt.values():
        num_prompt = len(members[0].prompt_ids)
        whole = num_prompt + sum(len(rollout.token_ids_T) for rollout in members)
        if batches[-1] and used + whole > most_tokens:
            batches.append([])
            used = 0
        used += num_prompt
        for rollout in members:
            if batches[-1] and used + len(rollout.token_ids_T) > most_tokens:
                batches.append([])
                used = num_prompt
            batches[-1].append(rollout)
            used += len(rollout.token_ids_T)
    return [batch for batch in batches if batch]


def hidden(body: Any, config: Any, packed: Packed) -> Tensor:
    """Hidden states (R, D) at the positions that give the response tokens."""
    with _attention(config):
        inputs = {"input_ids": packed.ids_1L, "position_ids": packed.positions_1L, "use_cache": False}
        states_LD = body(**inputs, segments=packed.segments).last_hidden_state[0]
        return states_LD[packed.rows_R.to(states_LD.device)]


@contextmanager
def _attention(config: Any) -> Iterator[None]:
    """Have a model's layers call our attention; no mask is made for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: None, *, segments: list[Segment],
    scaling: float | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    import torch

    for name, given in others.items():
        if (name in NOT_DONE and given) or (name not in HARMLESS and isinstance(given, torch.Tensor)):
            raise TypeError(f"attention with {name}")
    repeats = query.shape[1] // key.shape[1]
    query, key, value = query[0], key[0].repeat_interleave(repeats, 0), value[0].repeat_interleave(repeats, 0)
    parts = []
    for segment in segments:
        keys, values = key[:, segment.own], value[:, segment.own]
        mask_TC = None if segment.mask_TC is None else segment.mask_TC.to(query.device)
        if mask_TC is not None:
            keys, values = (
                torch.cat([whole[:, segment.prompt], own], 1) for whole, own in ((key, keys), (value, values))
            )
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                query[None, :, segment.own], keys[None], values[None], attn_mask=mask_TC,
                is_causal=mask_TC is None, scale=scaling,
            )
        )  # fmt: skip
    return torch.cat(parts, 2).transpose(1, 2), None

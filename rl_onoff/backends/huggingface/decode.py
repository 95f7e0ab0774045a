"""The decoding loop of the HuggingFace backend.

`model.generate` draws from one global stream of random numbers, so a response would depend on its batch; it also reads the
model's generation config. This loop does neither, prefills a prompt once for all its samples, and hands out each response
when it ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rl_onoff.backends.huggingface.model import SplitModel
from rl_onoff.backends.sampler import Row, draw
from rl_onoff.types import Completion, LogprobKind

if TYPE_CHECKING:
    from torch import Tensor


def batches(rows: Sequence[Row], batch_size: int, max_batch_tokens: int) -> Iterator[list[Row]]:
    """Rows of like prompt length together, longest first; samples of one prompt stay neighbours."""
    batch: list[Row] = []
    width = 0  # of the widest row, which sets the padding
    for row in sorted(rows, key=lambda r: (-len(r.request.prompt_ids), r.request.id, r.sample)):
        longest = max(width, len(row.request.prompt_ids) + row.limit)
        if batch and (len(batch) == batch_size or longest * (len(batch) + 1) > max_batch_tokens):
            yield batch
            batch, longest = [], len(row.request.prompt_ids) + row.limit
        batch.append(row)
        width = longest
    if batch:
        yield batch


def decode(
    model: SplitModel, rows: list[Row], tokenizer: Any, eos_ids: frozenset[int], kind: LogprobKind
) -> Iterator[Completion]:
    """Sample one batch to the end; yields each response as it finishes."""
    import torch

    with torch.no_grad():  # not inference_mode: it would stay on between two steps of this generator
        logits_RV, cache, mask_RL = _prefill(model, rows)
    while rows:
        with torch.no_grad():
            keys_R = np.array([row.key() for row in rows])
            tokens_R, logprobs_R = draw(logits_RV, [row.request.sampling for row in rows], keys_R, kind)
        for row, token, logprob in zip(rows, tokens_R.tolist(), logprobs_R.tolist(), strict=True):
            row.append(token, logprob, tokenizer, eos_ids)
        yield from (row.completion(kind) for row in rows if row.finish)
        going = [i for i, row in enumerate(rows) if not row.finish]
        if not going:
            return
        with torch.no_grad():
            if len(going) < len(rows):
                keep = torch.tensor(going, device=model.device)
                cache.batch_select_indices(keep)
                mask_RL, rows = mask_RL[keep], [rows[i] for i in going]
            mask_RL = torch.nn.functional.pad(mask_RL, (0, 1), value=1)
            logits_RV, cache = model.last_logits(
                input_ids=torch.as_tensor(tokens_R[going], dtype=torch.long, device=model.device)[:, None],
                attention_mask=mask_RL,
                position_ids=mask_RL.sum(-1, keepdim=True) - 1,
                past_key_values=cache,
            )


def _prefill(model: SplitModel, rows: Sequence[Row]) -> tuple[Tensor, Any, Tensor]:
    """(logits that give the first token (R, V), cache, attention mask (R, L)); each distinct prompt is computed once."""
    import torch

    prompts = {row.request.prompt_ids.tobytes(): row.request.prompt_ids for row in rows}
    place = {key: i for i, key in enumerate(prompts)}
    width = max(map(len, prompts.values()))
    ids_BL = np.zeros((len(prompts), width), np.int64)
    mask_BL = np.zeros((len(prompts), width), np.int64)
    for i, prompt_ids in enumerate(prompts.values()):
        ids_BL[i, width - len(prompt_ids) :] = prompt_ids
        mask_BL[i, width - len(prompt_ids) :] = 1
    mask = torch.as_tensor(mask_BL, device=model.device)
    logits_BV, cache = model.last_logits(
        input_ids=torch.as_tensor(ids_BL, device=model.device),
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp_(min=0),
    )
    of_row = torch.tensor([place[row.request.prompt_ids.tobytes()] for row in rows], device=model.device)
    if len(of_row) != len(prompts):
        cache.batch_select_indices(of_row)
    return logits_BV[of_row.to(logits_BV.device)], cache, mask[of_row]

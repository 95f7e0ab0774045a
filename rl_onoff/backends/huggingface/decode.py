"""The decoding loop of the HuggingFace backend.

`model.generate` draws from one global stream of random numbers, so a response would depend on its batch; it also reads
the model's generation config. This loop does neither, prefills a prompt once for all its samples, and hands out each
response when it ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rl_onoff.backends.huggingface.model import SplitModel
from rl_onoff.backends.huggingface.tensor_parallel import Ranks
from rl_onoff.backends.sampler import Row, draw
from rl_onoff.types import LogprobKind, Rollout

if TYPE_CHECKING:
    from torch import Tensor


def decode(
    model: SplitModel, rows: list[Row], tokenizer: Any, eos_ids: frozenset[int], kind: LogprobKind, ranks: Ranks
) -> Iterator[Rollout]:
    """Sample one batch to the end; yields each response as it finishes, one step later."""
    import torch

    with torch.no_grad():  # not inference_mode: it would stay on between two steps of this generator
        logits_RV, cache, mask_RL = _prefill(model, rows)
    while rows:
        with torch.no_grad():
            keys_R = np.array([row.key() for row in rows])
            drawn = draw(logits_RV, [row.request.sampling for row in rows], keys_R, kind) if ranks.leads else None
        # rank 0's draws on every rank, not each rank's own: were the gathered logits to differ in a last bit, the ranks
        # would go on with other tokens, and wait for ever for a batch of another size
        tokens_R, logprobs_R = ranks.agreed(drawn)
        for row, token, logprob in zip(rows, tokens_R.tolist(), logprobs_R.tolist(), strict=True):
            row.append(token, logprob, tokenizer, eos_ids)
        done = [row.rollout(kind) for row in rows if row.finish]
        going = [i for i, row in enumerate(rows) if not row.finish]
        if going:
            with torch.no_grad():
                if done:
                    keep = torch.tensor(going, device=model.device)
                    cache.batch_select_indices(keep)
                    mask_RL = mask_RL[keep]
                mask_RL = torch.nn.functional.pad(mask_RL, (0, 1), value=1)
                logits_RV, cache = model.last_logits(
                    input_ids=torch.as_tensor(tokens_R[going, None], dtype=torch.long, device=model.device),
                    attention_mask=mask_RL,
                    position_ids=mask_RL.sum(-1, keepdim=True) - 1,
                    past_key_values=cache,
                )
        rows = [rows[i] for i in going]
        # after the forward pass: when a caller leaves here, the other ranks wait for the next draws or batch
        yield from done


def _prefill(model: SplitModel, rows: Sequence[Row]) -> tuple[Tensor, Any, Tensor]:
    """(logits that give the first token (R, V), cache, attention mask (R, L)); each prompt is computed once."""
    import torch

    prompts = {row.request.prompt_ids.tobytes(): row.request.prompt_ids for row in rows}
    place = {key: i for i, key in enumerate(prompts)}
    input_ids, mask_BL = model.padded(list(prompts.values()), left=True)
    positions_BL = (mask_BL.cumsum(-1) - 1).clamp_(min=0)
    logits_BV, cache = model.last_logits(input_ids=input_ids, attention_mask=mask_BL, position_ids=positions_BL)
    of_row = torch.tensor([place[row.request.prompt_ids.tobytes()] for row in rows], device=model.device)
    if len(of_row) != len(prompts):
        cache.batch_select_indices(of_row)
    return logits_BV[of_row.to(logits_BV.device)], cache, mask_BL[of_row]

"""A causal language model, loaded and taken apart into body and head, so that the head runs where it is wanted; and the
decoding loop.

`model.generate` draws from one global stream of random numbers, so a response would depend on its batch; it also reads
the model's generation config. Our loop does neither, prefills a prompt once for all its samples, and hands out each
response when it ends.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rl_onoff.backends.huggingface.config import HuggingFaceBackendConfig
from rl_onoff.backends.huggingface.tensor_parallel import Ranks
from rl_onoff.backends.sampler import Row, draw
from rl_onoff.errors import UsageError
from rl_onoff.models.adapter import need_peft, open_adapter, with_adapter
from rl_onoff.models.resolve import load_errors
from rl_onoff.types import LogprobKind, Rollout

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


def load(config: HuggingFaceBackendConfig) -> SplitModel:
    """The weights in this process; with tp_size above 1, the part of them that this process's rank holds."""
    import torch
    import transformers

    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"device_map": config.device_map}
    if config.num_devices > 1:
        options["distributed_config"] = transformers.DistributedConfig(tp_size=config.tp_size)
    elif config.device_map is None and config.device is None and torch.cuda.device_count() > 1:
        options["device_map"] = "auto"
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    dtype = config.weights_dtype
    options["dtype"] = dtype if dtype == "auto" else getattr(torch, dtype)
    if config.adapter_beside:
        need_peft()
    files = config.model_files()
    options |= {"revision": files.revision or "main", "trust_remote_code": config.trust_remote_code}
    alternatives = "backend.device_map, backend.attn_implementation or backend.engine_kwargs"
    with load_errors(config.model_name, options=alternatives):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(files.path, **options, **config.engine_kwargs)
    if config.adapter_beside:
        with_adapter(model, open_adapter(config.adapter_beside))
    if options["device_map"] is None and config.num_devices == 1:
        name = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(name)
        except RuntimeError as error:
            why = f"backend.device is {name!r}, which torch does not know: set backend.device=cuda or cpu"
            raise UsageError(why) from error
        if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
            raise UsageError(f"backend.device is {name}, but torch sees {count} CUDA devices: set backend.device=cpu")
        model = model.to(device)
    return SplitModel(model.eval().requires_grad_(False), float32_head=config.head_dtype == "float32")


class SplitModel:
    """`body(input_ids, …) -> hidden`, `head(hidden) -> logits`; `whole` is the model itself.

    What lies between the LM head and the logits (soft-capping, scaling) is read from the config and checked against the
    model's own logits on a short sequence. Where the two differ, `splits` is False and callers run the whole model.
    """

    def __init__(self, model: Any, *, float32_head: bool = False):
        self.whole = model
        self.device = model.get_input_embeddings().weight.device  # where input ids go
        self.body = model.base_model
        self._lm_head = model.get_output_embeddings()
        self._head_weights: dict[str, Tensor] = {}  # in place of the LM head's own
        self._head_dtype: Any = None  # of the hidden states that the LM head is given; None: as they come
        config = model.config.get_text_config()
        names = ("logit_scale", "logits_scaling", "final_logit_softcapping")
        self._scale, self._divisor, self._cap = (getattr(config, name, None) for name in names)
        self._whole_keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.splits = self._lm_head is not None and self.body is not model and self._agrees()
        if not self.splits:
            name = type(model).__name__
            log.warning("%s cannot be split into body and head: full logits are computed, which is slower", name)
        if float32_head:
            if not self.splits:
                why = "the LM head of this model cannot be taken apart from its body"
                raise UsageError(f"{why}: set backend.head_dtype=null")
            weights = model.get_output_embeddings().named_parameters()
            self._head_weights = {name: weight.float() for name, weight in weights}  # a copy: embeddings may share them
            self._head_dtype = next(iter(self._head_weights.values())).dtype
        # whether a prompt's cache can be repeated for several responses: plain attention caches can
        plain = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        self.shares_prompts = self.splits and plain and getattr(config, "sliding_window", None) is None

    def padded(self, rows: Sequence[np.ndarray], *, left: bool = False) -> tuple[Tensor, Tensor]:
        """Sequences of token ids as (ids, attention mask), both int64 (B, L)."""
        import torch

        width = max(map(len, rows))
        ids_BL, mask_BL = np.zeros((2, len(rows), width), np.int64)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if left else slice(len(row))
            ids_BL[i, place], mask_BL[i, place] = row, 1
        return torch.as_tensor(ids_BL, device=self.device), torch.as_tensor(mask_BL, device=self.device)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states of any leading shape."""
        from torch.func import functional_call

        hidden = hidden.to(device=self._lm_head.weight.device, dtype=self._head_dtype)
        logits = functional_call(self._lm_head, self._head_weights, (hidden,))
        if self._scale is not None:  # Cohere's
            logits = logits * self._scale
        if self._divisor is not None:  # Granite's
            logits = logits / self._divisor
        if self._cap is not None:  # Gemma's
            logits = (logits / self._cap).tanh() * self._cap
        return logits

    def last_logits(self, **inputs: Any) -> tuple[Tensor, Any]:
        """(logits of the last position (B, V), cache)."""
        if self.splits:
            output = self.body(**inputs, use_cache=True)
            return self.head(output.last_hidden_state[:, -1]), output.past_key_values
        keep = {"logits_to_keep": 1} if self._whole_keeps else {}
        output = self.whole(**inputs, **keep, use_cache=True)
        return output.logits[:, -1], output.past_key_values

    def _agrees(self) -> bool:
        import torch

        vocab = self.whole.get_input_embeddings().weight.shape[0]
        input_ids = torch.arange(1, 9, device=self.device)[None] * 7 % vocab
        with torch.no_grad():
            try:
                ours = self.head(self.body(input_ids=input_ids, use_cache=False).last_hidden_state).float()
                theirs = self.whole(input_ids=input_ids, use_cache=False).logits.to(ours.device).float()
            except (AttributeError, TypeError, RuntimeError) as error:
                log.warning("splitting the model failed: %s", error)
                return False
        return ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-4, rtol=1e-3)


def decode(
    model: SplitModel, rows: list[Row], tokenizer: Any, eos_ids: frozenset[int], kind: LogprobKind, ranks: Ranks
) -> Iterator[Rollout]:
    """Sample one batch to the end; yields each response as it finishes, one step later."""
    import torch

    prompts = {row.request.prompt_ids.tobytes(): row.request.prompt_ids for row in rows}  # each is computed once
    place = {key: i for i, key in enumerate(prompts)}
    of_row = torch.tensor([place[row.request.prompt_ids.tobytes()] for row in rows], device=model.device)
    with torch.no_grad():  # not inference_mode: it would stay on between two steps of this generator
        input_ids, mask_BL = model.padded(list(prompts.values()), left=True)
        positions_BL = (mask_BL.cumsum(-1) - 1).clamp_(min=0)
        logits_BV, cache = model.last_logits(input_ids=input_ids, attention_mask=mask_BL, position_ids=positions_BL)
        if len(of_row) != len(prompts):
            cache.batch_select_indices(of_row)
        logits_RV, mask_RL = logits_BV[of_row.to(logits_BV.device)], mask_BL[of_row]
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
                input_ids = torch.as_tensor(tokens_R[going, None], dtype=torch.long, device=model.device)
                positions_R1 = mask_RL.sum(-1, keepdim=True) - 1
                step = {"input_ids": input_ids, "attention_mask": mask_RL, "position_ids": positions_R1}
                logits_RV, cache = model.last_logits(**step, past_key_values=cache)
        rows = [rows[i] for i in going]
        # after the forward pass: when a caller leaves here, the other ranks wait for the next draws or batch
        yield from done

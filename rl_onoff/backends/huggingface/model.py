"""A causal language model, loaded and taken apart into body and head, so that the head runs where it is wanted."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from rl_onoff.backends.huggingface import packed
from rl_onoff.backends.huggingface.cache import can_grow
from rl_onoff.backends.huggingface.config import HuggingFaceBackendConfig
from rl_onoff.errors import UsageError
from rl_onoff.models.adapter import need_peft, open_adapter, with_adapter
from rl_onoff.models.resolve import load_errors
from rl_onoff.types import Rollout

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


def load(config: HuggingFaceBackendConfig) -> SplitModel:
    """The weights in this process; with tp_size above 1, the part of them that this process's rank holds."""
    import torch
    import transformers

    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
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
        self._measure(config)

    def padded(self, rows: Sequence[np.ndarray], *, left: bool = False) -> tuple[Tensor, Tensor]:
        """Sequences of token ids as (ids, attention mask), both int64 (B, L)."""
        import torch

        width = max(map(len, rows))
        ids_BL, mask_BL = np.zeros((2, len(rows), width), np.int64)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if left else slice(len(row))
            ids_BL[i, place], mask_BL[i, place] = row, 1
        return torch.as_tensor(ids_BL, device=self.device), torch.as_tensor(mask_BL, device=self.device)

    def packed_hidden(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Hidden states (R, D) at the positions that give the response tokens, response after response."""
        config = self.whole.config.get_text_config()
        return packed.hidden(self.body, config, packed.Packed.of(rollouts, self.device))

    @property
    def head_device(self) -> Any:
        """Where logits are: of a model over several devices not always where its hidden states are."""
        return self._lm_head.weight.device

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states of any leading shape."""
        from torch.func import functional_call

        hidden = hidden.to(device=self.head_device, dtype=self._head_dtype)
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

    def _some_ids(self) -> Tensor:
        import torch

        return torch.arange(1, 9, device=self.device)[None] * 7 % self.whole.get_input_embeddings().weight.shape[0]

    @cached_property
    def packs(self) -> bool:
        """Whether all attention of the model goes through the function that a packed sequence needs; else sequences are
        padded. Found out on first use, for sampling does not ask."""
        import torch

        config = self.whole.config.get_text_config()
        if not self.splits:
            return False
        plain = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        if not plain or config._attn_implementation != "sdpa":  # another kind was asked for: it computes other numbers
            return False
        ids_T = self._some_ids()[0].cpu().numpy().astype(np.int32)
        some = [
            Rollout(request_id="", sample=i, prompt_ids=ids_T[:3], token_ids_T=response)
            for i, response in enumerate((ids_T[3:], ids_T[4:]))
        ]
        with torch.no_grad():
            try:
                ours = self.packed_hidden(some).float()
            except (AttributeError, TypeError, KeyError, RuntimeError) as error:
                log.debug("sequences are padded, not packed: %s", error)
                return False
            inputs = [self.padded([np.concatenate([r.prompt_ids, r.token_ids_T[:-1]])])[0] for r in some]
            theirs = [self.body(input_ids=ids_1L, use_cache=False).last_hidden_state[0, 2:] for ids_1L in inputs]
        expected = torch.cat(theirs).float()
        tolerance = 1e-4 if self.whole.dtype == torch.float32 else 0.05
        return bool((ours - expected).norm() <= tolerance * expected.norm())

    def _measure(self, config: Any) -> None:
        """Find out what the model keeps of a token, and what memory a token takes."""
        import torch

        input_ids = self._some_ids()
        with torch.no_grad():
            output = self.whole(input_ids=input_ids, use_cache=True)
        cache = output.past_key_values
        self.cache_grows = can_grow(cache)  # else rows can leave a batch, but none can enter
        self.vocab_size: int = output.logits.shape[-1]
        hidden, inner = config.hidden_size, getattr(config, "intermediate_size", None)
        inner = max(inner) if isinstance(inner, list) else inner or 4 * hidden
        size = self.whole.dtype.itemsize
        layers = getattr(config, "num_hidden_layers", 1)
        self.cache_bytes = 2 * layers * hidden * size  # of one token
        if self.cache_grows:
            used = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            self.cache_bytes = used // input_ids.shape[1]
        self.activation_bytes = size * (12 * hidden + 4 * inner)  # of one token, in one layer

    def _agrees(self) -> bool:
        import torch

        input_ids = self._some_ids()
        with torch.no_grad():
            try:
                ours = self.head(self.body(input_ids=input_ids, use_cache=False).last_hidden_state).float()
                theirs = self.whole(input_ids=input_ids, use_cache=False).logits.to(ours.device).float()
            except (AttributeError, TypeError, RuntimeError) as error:
                log.warning("splitting the model failed: %s", error)
                return False
        return ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-4, rtol=1e-3)

"""A causal language model, loaded and taken apart into body and head, so that the head runs where it is wanted."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rl_onoff.backends.huggingface.config import HuggingFaceBackendConfig
from rl_onoff.errors import UsageError
from rl_onoff.models.resolve import load_errors, resolve

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
    files = resolve(config.model_name, revision=config.revision)
    alternatives = "backend.device_map, backend.attn_implementation or backend.engine_kwargs"
    with load_errors(config.model_name, options=alternatives):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            files.path,
            revision=files.revision or "main",
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=config.trust_remote_code,
            **options,
            **config.engine_kwargs,
        )
    if options["device_map"] is None and config.num_devices == 1:
        model = model.to(_device(config.device))
    split = SplitModel(model.eval().requires_grad_(False))
    if config.head_dtype == "float32":
        split.use_float32_head()
    return split


def _device(name: str | None) -> str:
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            f"backend.device is {name!r}, which torch does not know: set backend.device=cuda or cpu"
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"backend.device is {name}, but torch sees {torch.cuda.device_count()} CUDA devices: set backend.device=cpu"
        )
    return name


class SplitModel:
    """`body(input_ids, …) -> hidden`, `head(hidden) -> logits`; `whole` is the model itself.

    What lies between the LM head and the logits (soft-capping, scaling) is read from the config and checked against the
    model's own logits on a short sequence. Where the two differ, `splits` is False and callers run the whole model.
    """

    def __init__(self, model: Any):
        self.whole = model
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
            log.warning(
                "%s cannot be split into body and head: full logits are computed, which is slower", type(model).__name__
            )

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt's cache can be repeated for several responses: plain attention caches can."""
        config = self.whole.config.get_text_config()
        layers = set(getattr(config, "layer_types", None) or ["full_attention"])
        return self.splits and layers == {"full_attention"} and getattr(config, "sliding_window", None) is None

    @property
    def device(self) -> Any:
        """Where input ids go."""
        return self.whole.get_input_embeddings().weight.device

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

    def use_float32_head(self) -> None:
        """Compute the logits in float32 from now on, with a copy of the weights: they may be the embedding's too."""
        if not self.splits:
            raise UsageError(
                "the LM head of this model cannot be taken apart from its body: set backend.head_dtype=null"
            )
        import torch

        self._head_weights = {name: weight.float() for name, weight in self._lm_head.named_parameters()}
        self._head_dtype = torch.float32

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

"""A causal language model taken apart into body and head, so that the head runs over the positions that are wanted alone."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rl_onoff.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


class SplitModel:
    """`body(input_ids, …) -> hidden`, `head(hidden) -> logits`; `whole` is the model itself.

    What lies between the LM head and the logits (soft-capping, scaling) is read from the config and checked against the
    model's own logits on a short sequence. Where the two differ, `splits` is False and callers run the whole model.
    """

    def __init__(self, model: Any):
        self.whole = model
        self._body = model.base_model
        self._lm_head = model.get_output_embeddings()
        self._head_dtype: Any = None  # of the hidden states that the head is given; None: as they come
        self._after_head = _after_head(model.config)
        self._whole_keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.splits = self._lm_head is not None and self._body is not model and self._agrees()
        if not self.splits:
            log.warning(
                "%s cannot be split into body and head: full logits are computed, which is slower", type(model).__name__
            )

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt's cache can be repeated for several responses: plain attention caches can."""
        text_config = self.whole.config.get_text_config()
        layers = getattr(text_config, "layer_types", None) or ["full_attention"]
        return (
            self.splits and set(layers) == {"full_attention"} and getattr(text_config, "sliding_window", None) is None
        )

    @property
    def device(self) -> Any:
        """Where input ids go."""
        return self.whole.get_input_embeddings().weight.device

    def body(self, **inputs: Any) -> Any:
        """The model up to its last hidden state; returns the model's output object."""
        return self._body(**inputs)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states of any leading shape."""
        return self._after_head(self._lm_head(hidden.to(device=self._lm_head.weight.device, dtype=self._head_dtype)))

    def use_float32_head(self) -> None:
        """Compute the logits in float32 from now on. The head is copied: its weight may be the embedding's, which stays as it is."""
        if not self.splits:
            raise UsageError(
                "the LM head of this model cannot be taken apart from its body: set backend.head_dtype=null"
            )
        import torch

        self._lm_head = copy.deepcopy(self._lm_head).float()
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
                ours = self.head(self.body(input_ids=input_ids, use_cache=False).last_hidden_state)
                theirs = self.whole(input_ids=input_ids, use_cache=False).logits
            except (AttributeError, TypeError, RuntimeError) as error:
                log.warning("splitting the model failed: %s", error)
                return False
        return ours.shape == theirs.shape and torch.allclose(
            ours.float(), theirs.to(ours.device).float(), atol=1e-4, rtol=1e-3
        )


def _after_head(config: Any) -> Callable[[Tensor], Tensor]:
    """What the model does to its logits after the LM head (Gemma's soft cap; Cohere's and Granite's scales)."""
    config = config.get_text_config()
    cap, scale, divide = (
        getattr(config, name, None) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")
    )

    def apply(logits: Tensor) -> Tensor:
        if scale is not None:
            logits = logits * scale
        if divide is not None:
            logits = logits / divide
        if cap is not None:
            logits = (logits / cap).tanh() * cap
        return logits

    return apply

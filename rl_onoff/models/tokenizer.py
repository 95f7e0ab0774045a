"""The tokenizer of a model, loaded the same way for every engine, and facts of a model that engines read alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rl_onoff.errors import MissingDependencyError
from rl_onoff.models.resolve import load_errors, resolve


def load_tokenizer(
    model_name: str, *, tokenizer: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The transformers tokenizer of `tokenizer`, or else of the model; pads on the left, as batched decoding needs."""
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            f"a tokenizer needs the transformers package ({error}): pip install rl-onoff"
        ) from error
    key = "model.tokenizer" if tokenizer else "model.name"
    files = resolve(tokenizer or model_name, revision=None if tokenizer else revision, key=key)
    with load_errors(files.name, key):
        loaded = transformers.AutoTokenizer.from_pretrained(
            files.path, revision=files.revision or "main", trust_remote_code=trust_remote_code, padding_side="left"
        )
    if loaded.pad_token_id is None and loaded.eos_token_id is not None:
        loaded.pad_token = loaded.eos_token
    return loaded


def context_length(config: Any) -> int:
    """Most tokens a model's config allows for; a million where it sets no limit."""
    config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return 1_000_000


def end_ids(eos_token_id: int | Sequence[int] | None, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a response: the model's own list (its generation config) and the tokenizer's EOS."""
    ids = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return tuple(sorted(set(ids)))

"""What a model's files say: its tokenizer, its sampling defaults, and which tensors two models do not share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rl_onoff.errors import OnOffError, UsageError
from rl_onoff.models.resolve import hub_errors, load_errors, resolve
from rl_onoff.types import Sampling

TAKEN = ("temperature", "top_p", "top_k", "min_p")
PENALTIES = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "typical_p": 1.0}  # with the value that does nothing


def load_tokenizer(
    model_name: str, *, tokenizer: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The transformers tokenizer of `tokenizer`, or else of the model; pads on the left, as batched decoding needs."""
    import transformers

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
    names = ("max_position_embeddings", "n_positions", "max_sequence_length")
    return next((int(limit) for name in names if (limit := getattr(config, name, None))), 1_000_000)


def end_ids(eos_token_id: int | Sequence[int] | None, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a response: the model's own list (its generation config) and the tokenizer's EOS."""
    ids = {*(eos_token_id if isinstance(eos_token_id, Sequence) else [eos_token_id]), tokenizer.eos_token_id}
    return tuple(sorted(token_id for token_id in ids if token_id is not None))


def model_sampling(sampling: Sampling, model_name: str, revision: str | None = None) -> Sampling:
    """`sampling` with what the model's generation_config.json says instead; UsageError for what no sampler does."""
    from transformers import GenerationConfig

    files = resolve(model_name, revision=revision)
    try:
        with hub_errors(files.name):
            found = GenerationConfig.from_pretrained(files.path, revision=files.revision or "main")
    except OSError as error:
        why = f"model.name={model_name} has no generation_config.json: set model.sampling_defaults=false"
        raise UsageError(why) from error
    for name, nothing in PENALTIES.items():
        if (value := getattr(found, name, None)) not in (None, nothing):
            why = f"the model's generation_config.json asks for {name}={value}, which no sampler here does"
            raise UsageError(f"{why}: set model.sampling_defaults=false")
    values = {name: value for name in TAKEN if (value := getattr(found, name, None)) is not None}
    return sampling.replace(**values)


def different_tensors(a: tuple[str, str | None], b: tuple[str, str | None]) -> list[str]:
    """Names of the tensors in which two local safetensors models differ, each given as (name, revision), without
    loading a model; empty where it cannot be told (a hub id, other shapes). Compares bytes: NaN is NaN, -0 not 0."""
    import torch
    from safetensors import SafetensorError, safe_open

    def opened(name: str, revision: str | None) -> dict[str, Any]:
        """Tensor name -> the open file that holds it."""
        folder = Path(resolve(name, revision=revision).path)
        found = [files.enter_context(safe_open(file, "pt")) for file in sorted(folder.glob("*.safetensors"))]
        return {name: file for file in found for name in file.keys()}  # noqa: SIM118

    different = []
    try:
        with ExitStack() as files:
            ours, theirs = opened(*a), opened(*b)
            for name in sorted({*ours, *theirs}):
                one, other = ours[name].get_tensor(name), theirs[name].get_tensor(name)
                if (one.dtype, one.shape) != (other.dtype, other.shape):
                    return []
                if not torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8)):
                    different.append(name)
    except (OnOffError, OSError, SafetensorError, KeyError):  # a KeyError: only one of them has the tensor
        return []
    return different

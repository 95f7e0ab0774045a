"""A model's own sampling defaults, taken only when the user asks for them, then on every engine alike and on record."""

from __future__ import annotations

from rl_onoff.errors import UsageError
from rl_onoff.models.resolve import hub_errors, resolve
from rl_onoff.types import Sampling

TAKEN = ("temperature", "top_p", "top_k", "min_p")
PENALTIES = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "typical_p": 1.0}  # with the value that does nothing


def model_sampling(sampling: Sampling, model_name: str, revision: str | None = None) -> Sampling:
    """`sampling` with what the model's generation_config.json says instead; UsageError for what no sampler does."""
    from transformers import GenerationConfig

    files = resolve(model_name, revision=revision)
    try:
        with hub_errors(files.name):
            found = GenerationConfig.from_pretrained(files.path, revision=files.revision or "main")
    except OSError as error:
        raise UsageError(
            f"model.name={model_name} has no generation_config.json: set model.sampling_defaults=false"
        ) from error
    for name, nothing in PENALTIES.items():
        value = getattr(found, name, None)
        if value not in (None, nothing):
            raise UsageError(
                f"the model's generation_config.json asks for {name}={value}, which no sampler here does:"
                " set model.sampling_defaults=false"
            )
    values = {name: value for name in TAKEN if (value := getattr(found, name, None)) is not None}
    return sampling.replace(**values)

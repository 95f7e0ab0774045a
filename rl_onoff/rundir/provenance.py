"""What the records beside the rows tell of who made them: the engine's config again, and whose tokenizer it was."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, fields
from functools import cache
from typing import Any

from rl_onoff.backends import create_backend, engine_configs
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.config import DataConfig
from rl_onoff.errors import OnOffError, UsageError
from rl_onoff.models.resolve import load_tokenizer
from rl_onoff.redaction import MASK, masked
from rl_onoff.rundir.table import differences
from rl_onoff.types import LogprobKind, Sampling, Want

log = logging.getLogger(__name__)

Records = Collection[Mapping[str, Any]]
ALIASES = {"torch_dtype": "dtype", "tensor_parallel_size": "tp_size"}  # second names that an engine's option had
LANDMARK_GROWTH = 1.25  # ids 0, 1, 2, 3, 4, 5, 7, … : some fifty of any vocabulary
SAME_TOKENIZER = 0.9  # of the landmarks both know: a special token that was renamed does not make another tokenizer


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """In what the config of a record and a later one differ. An option that a record does not name is younger than the
    record and counts as its default. So does the content of a file that an older version did not keep; `take_in`
    compares the rows themselves."""
    before, after = ({**c, "backend": _settled(c["backend"])} if c.get("backend") else c for c in (before, after))
    schema, sampling = _schema(after.get("backend", {}).get("_target_")), asdict(Sampling())
    defaults = {
        "backend": schema().what_it_computes() if schema else {},
        "data": asdict(DataConfig()),
        "sampling": sampling,
        "want": {**asdict(Want()), "sampler": sampling},
        "content": after.get("content"),
    }
    return differences(before, after, masked(defaults))


def same_engine(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Whether two records' engines compute the same numbers."""
    return bool(one and other) and not changes({"backend": one}, {"backend": other})


def is_truth(record: Mapping[str, Any]) -> bool:
    """Whether the rows are those of a forward pass in float32 that others' errors can be measured against."""
    backend = record.get("config", {}).get("backend") or {}
    schema, dtype = _schema(backend.get("_target_")), record.get("engine", {}).get("dtype")
    if schema is None or schema.name != schema.reference or dtype != "float32":
        return False
    return not any(backend.get(option) for option in schema.inexact)


def same_weights(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two records name the same weights, as far as both name any."""
    first, second = (record.get("config", {}).get("backend") for record in (one, other))
    return not (first and second) or all(first.get(x) == second.get(x) for x in ("model_name", "revision", "adapter"))


def _settled(backend: Mapping[str, Any]) -> dict[str, Any]:
    """An engine's record with every option under one name."""
    options = {name: value for name, value in backend.items() if name not in ALIASES}
    return options | {ALIASES[name]: backend[name] for name in ALIASES if backend.get(name) is not None}


def _schema(target: Any) -> type[EngineConfig] | None:
    return next((schema for schema in engine_configs().values() if schema()._target_ == target), None)


def engine_of(record: Mapping[str, Any], known: Iterable[EngineConfig]) -> EngineConfig | None:
    """The engine whose rows a record stands beside: one of `known` that computes the same, since it also says where it
    runs; else one made from the record. None when no engine of ours made the rows."""
    computed = record.get("config", {}).get("backend")
    if computed is None:
        return None
    for engine in known:
        if same_engine(computed, json.loads(json.dumps(masked(engine.what_it_computes())))):
            return engine
    target, model = computed["_target_"], computed.get("model_name")
    if MASK in json.dumps(computed):
        why = f"the engine of {model} was given a secret, which is not on disk: repeat the overrides of the run"
        raise UsageError(why)
    if (schema := _schema(target)) is None:
        raise UsageError(f"the engine {target} of {model} is not registered here: install it")
    computed = _settled(computed)
    values = {f.name: computed[f.name] for f in fields(schema) if f.name in computed}
    return schema(**{**values, "logprob_kind": LogprobKind(computed["logprob_kind"])})


def sampling_of(record: Mapping[str, Any]) -> Sampling | None:
    """How the responses were drawn, where that is known."""
    sampling = record.get("config", {}).get("sampling")
    return Sampling(**sampling) if sampling else None


def landmarks(tokenizer: Any) -> dict[str, str]:
    """Some ids and their tokens, kept beside the rows: two tokenizers that agree on all of them are taken for one."""
    count = math.ceil(math.log(len(tokenizer), LANDMARK_GROWTH))
    ids = sorted({0, *(int(LANDMARK_GROWTH**i) for i in range(count))})
    return dict(zip(map(str, ids), map(str, tokenizer.convert_ids_to_tokens(ids)), strict=True))


def check_tokenizers(behaviour: Mapping[str, Any], target: Mapping[str, Any], name: str) -> None:
    """Refuse two records whose ids mean different tokens."""
    ours, theirs = behaviour.get("tokenizer") or {}, target.get("tokenizer") or {}
    differ = [i for i in ours if theirs.get(i, ours[i]) != ours[i]]
    if len(differ) > (1 - SAME_TOKENIZER) * len(ours.keys() & theirs):
        i = differ[0]
        why = f"{name} and the behaviour have different tokenizers (id {i} is {theirs[i]!r} there and {ours[i]!r} here)"
        raise UsageError(f"{why}: compare models that share a tokenizer, or set target.tokenizer")


def texts_of(records: Records, tokenizer: Any) -> Callable[[int], str]:
    """How the page writes a token out: by the tokenizer, special tokens too, else by the pieces of text beside the ids,
    else as its id."""
    if tokenizer is not None:
        return cache(lambda token_id: tokenizer.decode([token_id]))
    pieces = next((record["pieces"] for record in records if record.get("pieces")), {})
    return lambda token_id: pieces.get(str(token_id), f"⟨{token_id}⟩")


def texts_tokenizer(records: Records, tokenizer: str | None, known: Collection[EngineConfig]) -> Any:
    """The tokenizer that is named, else that of the first engine that the records name; None where there is none."""
    if tokenizer is not None:
        return load_tokenizer(tokenizer)
    for record in records:
        try:
            if (engine := engine_of(record, known)) is not None:
                return create_backend(engine).get_tokenizer()
        except (OnOffError, OSError) as error:
            model = record.get("config", {}).get("backend", {}).get("model_name")
            log.warning("tokens are not written out by the tokenizer of %s: %s", model, error)
    return None

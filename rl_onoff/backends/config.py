"""The nested form of a backend's config, as the public API takes it: every mistake in it is one sentence.

Hydra checks the command line; this checks what Python gives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import EnumType
from pathlib import Path
from typing import Any, get_args, get_type_hints

from rl_onoff.backends.engine_config import EngineConfig, PoolConfig
from rl_onoff.backends.registry import engine_configs
from rl_onoff.errors import UsageError, nearest

KEYS = ("backend_type", "model_name", "backend_specific")
ENGINES_ELSEWHERE = {"hf": "huggingface", "transformers": "huggingface"}


@dataclass(kw_only=True, slots=True)
class BackendConfig:
    """The nested form of the public API: `backend_type`, `model_name`, and the engine's own options.

    Raises ValueError for an unknown backend or option, and for a config of another engine.
    """

    backend_type: str
    model_name: str
    backend_config: EngineConfig | None = None

    def __post_init__(self) -> None:
        schema = schema_of(self.backend_type)
        self.backend_config = schema() if self.backend_config is None else self.backend_config
        if not isinstance(self.backend_config, schema):
            given = type(self.backend_config).__name__
            raise UsageError(f"backend {self.backend_type!r} takes a {schema.__name__}, not a {given}")
        if not self.model_name or not isinstance(self.model_name, str):
            raise UsageError("no model was named: set model_name to a hub id, a folder, a .gguf file or smollm2")
        self.backend_config = dataclasses.replace(self.backend_config, model_name=self.model_name)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BackendConfig:
        """Build from `{"backend_type": …, "model_name": …, "backend_specific": {…}}`."""
        backend_type = values.get("backend_type", "huggingface")
        config = engine_config(backend_type, values)
        return cls(backend_type=backend_type, model_name=values.get("model_name", ""), backend_config=config)

    @classmethod
    def from_file(cls, path: str | Path) -> BackendConfig:
        """Read a YAML file of the same shape; a relative path is looked for here, then beside the installed package."""
        import yaml

        file = Path(path)
        if not file.exists() and not file.is_absolute():
            file = Path(__file__).parents[2] / path
        if not file.exists():
            raise UsageError(f"there is no config file {path}")
        values = yaml.safe_load(file.read_text())
        if not isinstance(values, dict):
            raise UsageError(f"{path} does not hold a mapping with backend_type, model_name and backend_specific")
        return cls.from_dict(values)


def engine_config(backend_type: Any, values: Mapping[str, Any]) -> EngineConfig:
    """The engine's config in `{"backend_type": …, "model_name": …, "backend_specific": {…}}`, without the model."""
    schema = schema_of(backend_type)
    known = {f.name for f in dataclasses.fields(schema)} - {"_target_", "model_name"}
    for key in values:
        if key not in KEYS:
            near = None if key in known else nearest(str(key), KEYS, cutoff=0.5)
            fix = f"did you mean {near}?" if near else "options of the engine go under backend_specific"
            raise UsageError(f"unknown key {key!r} in the backend's config: {fix}")
    options = values.get("backend_specific") or {}
    if not isinstance(options, Mapping):
        raise UsageError(f"backend_specific is {options!r} but must be a mapping of the engine's options")
    return schema(**_checked(schema, options, known, backend_type, "; others go in engine_kwargs"))


def schema_of(backend_type: Any) -> type[EngineConfig]:
    """The schema of the engine of this name."""
    known = engine_configs()
    if isinstance(backend_type, str) and backend_type in known:
        return known[backend_type]
    near = nearest_engine(str(backend_type), known)
    meant = f"did you mean {near}? " if near else ""
    raise UsageError(f"there is no backend {backend_type!r}: {meant}choose one of {', '.join(known)}")


def nearest_engine(name: str, known: Iterable[str]) -> str | None:
    """The engine that was probably meant, also by what it is called elsewhere."""
    return nearest(ENGINES_ELSEWHERE.get(name.lower(), name), known)


def _checked(schema: Any, values: Mapping[str, Any], known: set[str], what: str, more: str = "") -> dict[str, Any]:
    """The fields of a schema that `values` sets, Enums and the pool made of what stands for them.

    Refuses a value of another type than its field's, which Hydra does for the command line.
    """
    hints, options = get_type_hints(schema), dict(values)
    for name, value in values.items():
        if name not in known:
            near = nearest(str(name), known)
            fix = f"did you mean {near}?" if near else f"it has {', '.join(sorted(known))}{more}"
            raise UsageError(f"{what} has no option {name!r}: {fix}")
        hint = hints[name]
        if isinstance(hint, EnumType) and isinstance(value, str):
            if value not in hint.__members__:
                raise UsageError(f"{what} has the {name} {value!r}, which must be one of {', '.join(hint.__members__)}")
            options[name] = hint[value]
        elif hint is PoolConfig and isinstance(value, Mapping):
            fields = {f.name for f in dataclasses.fields(PoolConfig)}
            options[name] = PoolConfig(**_checked(PoolConfig, value, fields, "a pool"))
        elif name in ("engine_kwargs", "runtime_env", "device_map") or name.endswith("dtype"):
            continue  # any mapping; an option with a check of its own
        elif not isinstance(value, hint) and not (isinstance(value, int) and float in (hint, *get_args(hint))):
            wanted = str(getattr(hint, "__name__", hint)).replace(" | None", " or None")
            raise UsageError(f"{name} is {value!r} but must be of type {wanted}: correct it under backend_specific")
    return options

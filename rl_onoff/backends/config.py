"""Which engines there are, and the nested form of a backend's config, as the public API takes it.

An engine registers the dataclass of its options under its name, in the entry-point group `rl_onoff.backends` of its
package's metadata; the dataclass's `_target_` names the backend class. Asking which engines there are imports none.
Hydra checks the command line; `BackendConfig` checks what Python gives, and says every mistake in one sentence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import EnumType
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from rl_onoff.backends.engine_config import EngineConfig, PoolConfig
from rl_onoff.errors import UsageError, nearest

KEYS = ("backend_type", "model_name", "backend_specific")
ENGINES_ELSEWHERE = {"hf": "huggingface", "transformers": "huggingface"}


@cache
def engine_configs() -> dict[str, type[EngineConfig]]:
    """Name of every installed engine -> the schema of its options."""
    points = entry_points(group="rl_onoff.backends")
    return {point.name: point.load() for point in sorted(points, key=lambda point: point.name)}


def backend_class(target: str) -> Any:
    """The class that a config's `_target_` names; imports no engine. UsageError for one that no engine registered."""
    if target not in {schema()._target_ for schema in engine_configs().values()}:
        what = f"backend._target_ is {target!r}, which is no registered engine"
        raise UsageError(f"{what}: set backend to one of {', '.join(engine_configs())}")
    module, _, name = target.rpartition(".")
    return getattr(import_module(module), name)


def lazily(package: str, **modules: str) -> Callable[[str], Any]:
    """A package's `__getattr__`: names, each of a module of the package that is imported once the name is asked for, so
    that the schemas alone, which `--help` needs, do without numpy."""

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"{package} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{modules[name]}"), name)

    return get


@dataclass(kw_only=True, slots=True)
class BackendConfig:
    """The nested form of the public API: `backend_type`, `model_name`, and the engine's own options. ValueError for an
    unknown backend or option, and for a config of another engine."""

    backend_type: str
    model_name: str
    backend_config: EngineConfig = None  # type: ignore[assignment]  # None: the engine's defaults

    def __post_init__(self) -> None:
        schema = _schema_of(self.backend_type)
        config = schema() if self.backend_config is None else self.backend_config
        if not isinstance(config, schema):
            raise UsageError(f"backend {self.backend_type!r} takes a {schema.__name__}, not a {type(config).__name__}")
        self.backend_config = dataclasses.replace(config, model_name=self.model_name)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BackendConfig:
        """Build from `{"backend_type": …, "model_name": …, "backend_specific": {…}}`."""
        if not isinstance(values, Mapping):
            raise UsageError(f"{values!r} is no backend's config: a config is a mapping with {', '.join(KEYS)}")
        backend_type = values.get("backend_type", "huggingface")
        schema = _schema_of(backend_type)
        for key in values:
            if key not in KEYS:
                near = None if key in [f.name for f in dataclasses.fields(schema)] else nearest(str(key), KEYS, 0.5)
                fix = f"did you mean {near}?" if near else "options of the engine go under backend_specific"
                raise UsageError(f"unknown key {key!r} in the backend's config: {fix}")
        options = values.get("backend_specific") or {}
        if not isinstance(options, Mapping):
            raise UsageError(f"backend_specific is {options!r} but must be a mapping of the engine's options")
        config = _made(schema, options, backend_type, "; others go in engine_kwargs")
        return cls(backend_type=backend_type, model_name=values.get("model_name", ""), backend_config=config)

    @classmethod
    def from_file(cls, path: str | Path) -> BackendConfig:
        """Read a YAML file of the same shape; a relative path is looked for here, then beside the installed package."""
        import yaml

        for file in (Path(path), Path(__file__).parents[2] / path):  # the second is the first where that is absolute
            if file.exists():
                return cls.from_dict(yaml.safe_load(file.read_text()))
        raise UsageError(f"there is no config file {path}")


def nearest_engine(name: str, known: Iterable[str]) -> str | None:
    """The engine that was probably meant, also by what it is called elsewhere."""
    return nearest(ENGINES_ELSEWHERE.get(name.lower(), name), known)


def _schema_of(backend_type: Any) -> type[EngineConfig]:
    known = engine_configs()
    if isinstance(backend_type, str) and backend_type in known:
        return known[backend_type]
    near = nearest_engine(str(backend_type), known)
    meant = f"did you mean {near}? " if near else ""
    raise UsageError(f"there is no backend {backend_type!r}: {meant}choose one of {', '.join(known)}")


def _made(schema: Any, values: Mapping[str, Any], what: str, more: str = "") -> Any:
    """A config of these values; refuses a name or a type that no field has, as Hydra does for the command line."""
    hints, made = get_type_hints(schema), {}
    known = [f.name for f in dataclasses.fields(schema) if f.name not in ("_target_", "model_name")]
    for name, value in values.items():
        if name not in known:
            near = nearest(str(name), known)
            fix = f"did you mean {near}?" if near else f"it has {', '.join(sorted(known))}{more}"
            raise UsageError(f"{what} has no option {name!r}: {fix}")
        hint = hints[name]
        try:
            is_pool = hint is PoolConfig and isinstance(value, Mapping)
            made[name] = _made(PoolConfig, value, "a pool") if is_pool else msgspec.convert(value, hint)
        except msgspec.ValidationError as error:
            wanted = f"of type {getattr(hint, '__name__', hint)}".replace(" | None", " or None")
            if isinstance(hint, EnumType):
                wanted = f"one of {', '.join(hint.__members__)}"
            raise UsageError(f"{name} is {value!r} but must be {wanted}: correct it under backend_specific") from error
    return schema(**made)

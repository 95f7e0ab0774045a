"""The engines of a run: who samples and who scores, by the names their rows have, and the one that is alive.

A run says before each step which engine the step uses, so that a sweep's jobs can share a slot (sweeps/start.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rl_onoff.backends import create_backend
from rl_onoff.backends.engine_config import EngineConfig, PoolKind
from rl_onoff.config import RunConfig, Stage

if TYPE_CHECKING:  # the command line imports this module, and answers at once since it imports no numpy
    from rl_onoff.backends.base import BaseBackend

log = logging.getLogger(__name__)

ANY: Final = "any engine"  # wanted by a step that finds out only as it goes which engines it loads

Wish = EngineConfig | str | None  # an engine, ANY, or None for a step that loads nothing
Steps = Generator[Wish, None, Any]  # yields, before each step, what the step wants of the slot


class Slot(AbstractContextManager["Slot"]):
    """Holds the engine that is alive, if any; leaving the `with` block frees it."""

    _backend: BaseBackend | None = None
    _next: BaseBackend | None = None  # not loaded yet

    def prepare(self, config: EngineConfig, *, begin: bool = False) -> BaseBackend:
        """The engine of this config, whose tokenizer can be had before it is loaded. With `begin` the one alive before
        is closed, and an engine with a process of its own loads from now on."""
        if self._backend is not None and self._backend.config == config:
            return self._backend
        if self._next is None or self._next.config != config:
            self._next = _closed(self._next)
            self._next = create_backend(config)
        if begin:
            self._backend = _closed(self._backend)
            self._next.begin()
        return self._next

    def get(self, config: EngineConfig) -> BaseBackend:
        """The loaded engine of this config; the one alive before, if another, is closed first."""
        backend, start = self.prepare(config), time.monotonic()
        if backend is self._backend:
            return backend
        self._backend = _closed(self._backend)
        what = " and ".join(filter(None, (config.model_name, config.adapter)))
        log.info("loading %s with %s", config.name, what)
        backend.load()
        info, seconds = backend.info, time.monotonic() - start
        log.info("%s %s ready in %.0f s (%s weights)", info.engine, info.version, seconds, info.dtype)
        self._backend, self._next = backend, None
        return backend

    def close(self) -> None:
        self._backend, self._next = _closed(self._backend), _closed(self._next)

    def __exit__(self, *_: object) -> None:
        self.close()


def _closed(backend: BaseBackend | None) -> None:
    if backend is not None:
        backend.close()


def engines(config: RunConfig) -> dict[str, EngineConfig]:
    """Every engine of the config that the run may load, by the option that chooses it, in the order of their use."""
    stages, found = set(config.stages), {}
    targets = {f"targets.{name}": engine for name, engine in config.targets.items()}
    if config.target is not None:
        targets = {"target": config.target, **targets}
    if stages & {Stage.generate, Stage.attribute, Stage.layers, Stage.acceptance} or (
        Stage.score in stages and not targets
    ):
        found["backend"] = config.backend
    if stages & {Stage.score, Stage.attribute, Stage.layers}:
        found.update(targets)
    elif Stage.acceptance in stages and config.target is not None:
        found["target"] = config.target
    if Stage.matrix in stages:
        found.update({f"policies.{name}": engine for name, engine in config.policies.items()})
    return found


def samplers(config: RunConfig) -> list[EngineConfig]:
    """The engines that draw responses."""
    policies = config.policies.values() if Stage.matrix in config.stages else ()
    return [*([config.backend] if Stage.generate in config.stages else []), *policies]


def scorers(config: RunConfig) -> dict[str, EngineConfig]:
    """Name of the scores -> the engine that makes them; the engine that sampled comes first.

    Two names of one config both get scores, which shows the engine's noise; only a `target` without a name that is the
    engine that sampled adds nothing.
    """
    asked, targets = config.score.name, list(config.targets.items())
    if config.target is not None:
        targets.insert(0, (asked or default_name(config.target), config.target))
    found: dict[str, EngineConfig] = {}
    if not targets or (config.score.own and Stage.generate in config.stages):
        found[asked if asked and not targets else default_name(config.backend)] = config.backend
    for name, engine in targets:
        if found.get(name) == engine:
            continue
        while name in found:
            name += "-target"
        found[name] = engine
    return found


def default_name(engine: EngineConfig) -> str:
    """A folder name made of engine, model, adapter and dtype."""
    model = Path(engine.model_name).name.removesuffix(".gguf")
    if engine.adapter is not None:
        model += f"+{Path(engine.adapter).name}{'-merged' if engine.merge_adapter else ''}"
    return f"{engine.name}-{model}-{engine.weights_dtype}"


def known_engines(config: RunConfig) -> list[EngineConfig]:
    """Every engine the config has, for finding the one that made a table again."""
    first = [config.target] if config.target else []
    return [*first, config.backend, *config.targets.values(), *config.policies.values()]


def unseen(option: str, engine: EngineConfig) -> str:
    """Why our code cannot look at the layers of an engine, and what to set instead; empty where it can."""
    if not create_backend(engine).sees_layers:
        return f"{option}={engine.name} has no layers to look at: set {option} to another engine"
    if engine.num_devices > 1:
        what = f"{option}.tp_size={engine.num_devices} splits every layer over several devices"
        return f"{what}, where its states cannot be read: set {option}.tp_size=1"
    if engine.pool.kind is PoolKind.ray:
        return f"the layers of {option} go through a file on this machine's disk, not to a cluster: set pool=local"
    if not getattr(engine, "in_engine_stats", True):
        what = f"{option}.in_engine_stats=false keeps our code out of the engine, which has to read its layers"
        return f"{what}: set {option}.in_engine_stats=true"
    return ""

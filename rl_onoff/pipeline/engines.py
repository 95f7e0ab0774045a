"""Who samples and who scores in a run: the engines of a config, by the names their rows have."""

from __future__ import annotations

from pathlib import Path

from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.config import RunConfig, Stage


def engines(config: RunConfig) -> dict[str, EngineConfig]:
    """Every engine the run may use: the one that samples first, then those that score, by the name their scores have."""
    found = {"behaviour": config.backend} if Stage.generate in config.stages else {}
    if Stage.score in config.stages:
        found.update(scorers(config))
    if Stage.matrix in config.stages:
        found.update(config.policies)
    return found


def samplers(config: RunConfig) -> list[EngineConfig]:
    """The engines that draw responses."""
    policies = config.policies.values() if Stage.matrix in config.stages else ()
    return [*([config.backend] if Stage.generate in config.stages else []), *policies]


def scorers(config: RunConfig) -> dict[str, EngineConfig]:
    """Name of the scores -> the engine that makes them; the engine that sampled comes first."""
    targets = list(config.targets.items())
    if config.target is not None:
        targets.insert(0, (config.score.name or default_name(config.target), config.target))
    found: dict[str, EngineConfig] = {}
    if not targets or (config.score.own and Stage.generate in config.stages):
        found[config.score.name if config.score.name and not targets else default_name(config.backend)] = config.backend
    for name, engine in targets:
        if engine not in found.values():
            found[name if name not in found else f"{name}-target"] = engine
    return found


def default_name(engine: EngineConfig) -> str:
    """A folder name made of engine, model and dtype."""
    model = Path(engine.model_name).name.removesuffix(".gguf")
    return f"{engine.name}-{model}-{engine.weights_dtype}"


def known_engines(config: RunConfig) -> list[EngineConfig]:
    """Every engine the config has, for finding the one that made a table again."""
    return [
        *([config.target] if config.target else []),
        config.backend,
        *config.targets.values(),
        *config.policies.values(),
    ]

"""Who samples and who scores in a run: the engines of a config, by the names their rows have."""

from __future__ import annotations

from pathlib import Path

from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.config import RunConfig, Stage


def engines(config: RunConfig) -> dict[str, EngineConfig]:
    """Every engine of the config that the run may load, by the option that chooses it, in the order of their use."""
    stages, found = set(config.stages), {}
    targets = {f"targets.{name}": engine for name, engine in config.targets.items()}
    if config.target is not None:
        targets = {"target": config.target, **targets}
    if stages & {Stage.generate, Stage.attribute} or (Stage.score in stages and not targets):
        found["backend"] = config.backend
    if stages & {Stage.score, Stage.attribute}:
        found.update(targets)
    if Stage.matrix in stages:
        found.update({f"policies.{name}": engine for name, engine in config.policies.items()})
    return found


def samplers(config: RunConfig) -> list[EngineConfig]:
    """The engines that draw responses."""
    policies = config.policies.values() if Stage.matrix in config.stages else ()
    return [*([config.backend] if Stage.generate in config.stages else []), *policies]


def scorers(config: RunConfig) -> dict[str, EngineConfig]:
    """Name of the scores -> the engine that makes them; the engine that sampled comes first.

    Every name the user gave has scores of its own, also where two names have one config: the engine scores again under
    the second, which shows its noise. Only a `target` without a name that is the engine that sampled adds nothing.
    """
    targets = list(config.targets.items())
    if config.target is not None:
        targets.insert(0, (config.score.name or default_name(config.target), config.target))
    found: dict[str, EngineConfig] = {}
    if not targets or (config.score.own and Stage.generate in config.stages):
        found[config.score.name if config.score.name and not targets else default_name(config.backend)] = config.backend
    for name, engine in targets:
        if found.get(name) == engine:
            continue
        while name in found:
            name += "-target"
        found[name] = engine
    return found


def default_name(engine: EngineConfig) -> str:
    """A folder name made of engine, model and dtype."""
    model = Path(engine.model_name).name.removesuffix(".gguf")
    return f"{engine.name}-{model}-{engine.weights_dtype}"


def known_engines(config: RunConfig) -> list[EngineConfig]:
    """Every engine the config has, for finding the one that made a table again."""
    first = [config.target] if config.target else []
    return [*first, config.backend, *config.targets.values(), *config.policies.values()]

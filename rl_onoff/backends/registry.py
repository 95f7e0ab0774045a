"""Which engines there are: those of this package, and those that other packages register.

An engine registers the dataclass of its options under its name, in the entry-point group `rl_onoff.backends` of its
package's metadata; the dataclass's `_target_` names the backend class. Asking which engines there are imports none of
them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.errors import UsageError

GROUP = "rl_onoff.backends"


@cache
def engine_configs() -> dict[str, type[EngineConfig]]:
    """Name of every installed engine -> the schema of its options."""
    return {point.name: point.load() for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)}


def backend_class(target: str) -> Any:
    """The class that a config's `_target_` names; imports no engine. UsageError for one that no engine registered."""
    if target not in {schema()._target_ for schema in engine_configs().values()}:
        known = ", ".join(engine_configs())
        raise UsageError(
            f"backend._target_ is {target!r}, which is no registered engine: set backend to one of {known}"
        )
    module, _, name = target.rpartition(".")
    return getattr(import_module(module), name)


def build(config: EngineConfig) -> Any:
    """The BaseBackend that a config names, not loaded."""
    return backend_class(config._target_)(config)


def lazily(module: str, *names: str) -> Callable[[str], Any]:
    """A package's `__getattr__`: `names` of `module`, which is imported once one of them is asked for.

    So the schemas alone, which `--help` needs, do without numpy.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"{module.rpartition('.')[0]} has no attribute {name!r}")
        return getattr(import_module(module), name)

    return get

"""Where an engine runs: in this process, in a worker process, or in a pool of them, here or on a Ray cluster."""

from __future__ import annotations

from rl_onoff.backends.engine import Core
from rl_onoff.backends.engine_config import EngineConfig, PoolKind
from rl_onoff.errors import UsageError


def place(engine: Core, config: EngineConfig, *, in_worker: bool) -> Core:
    """`engine` itself, or what answers for it elsewhere; `in_worker` decides where `config.worker` is not set."""
    backend = type(engine)
    if config.pool.kind is PoolKind.ray:
        if config.worker is False:
            raise UsageError(
                "backend.worker=false keeps the engine in this process, but pool=ray runs it on a cluster: drop one of "
                "them"
            )
        from rl_onoff.workers.pool import Pool
        from rl_onoff.workers.ray import RayCluster

        return Pool(backend, config, cluster=RayCluster(backend, config))
    if (replicas := config.dp_size or 1) > 1:
        if config.worker is False:
            raise UsageError(
                f"backend.worker=false keeps the engine in this process, but its {replicas} replicas are processes of "
                "their own: drop backend.worker=false, or set backend.dp_size=1"
            )
        from rl_onoff.workers.pool import Pool

        return Pool(backend, config)
    if not (in_worker if config.worker is None else config.worker) and config.python is None:
        return engine
    from rl_onoff.workers.client import WorkerClient

    return WorkerClient(backend, config)

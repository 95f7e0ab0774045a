"""One HuggingFace model split over the devices of a replica by Transformers' tensor parallelism.

Every rank is a process that runs the backend's own methods on its part of the weights, so that all enter the same
collective operations. Rank 0 is the worker: it says which batch comes next and which tokens were drawn, and it alone
yields results. The other ranks hear rank 0 through their stdin: an idle rank may wait there for hours, where a
collective operation would time out, and the pipe ends whenever and however rank 0 does.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from rl_onoff.backends.huggingface.config import HuggingFaceBackendConfig
from rl_onoff.errors import EngineError, UsageError
from rl_onoff.models.resolve import hub_errors, resolve

log = logging.getLogger(__name__)

TIMEOUT = timedelta(hours=2)  # of a collective operation: large weights load at different speeds
FOLLOW = "from rl_onoff.backends.huggingface.tensor_parallel import follow; follow()"


class CallerLeft(Exception):
    """Rank 0's caller wants no more of the batch: rank 0 says so in place of a value, and the other ranks raise it."""


class Ranks:
    """The ranks of one replica, as one of them sees them: rank 0 leads, alone unless `start` gave it others; any other
    rank agrees to what it hears from rank 0."""

    def __init__(self, heard: queue.SimpleQueue[Any] | None = None) -> None:
        self.leads = heard is None
        self._heard = heard
        self._others: list[Any] = []  # their Popen objects

    @property
    def alone(self) -> bool:
        return self.leads and not self._others

    @classmethod
    def start(cls, backend_class: type, config: HuggingFaceBackendConfig) -> Ranks:
        """Start the other ranks, and make this process rank 0 of their group."""
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        if spec is None or spec.name != "rl_onoff.workers.worker_main":
            wants = f"backend.tp_size={config.tp_size} wants {config.tp_size} processes"
            raise UsageError(f"backend.worker=false keeps the engine in this process, but {wants}: drop it")
        ranks = cls()
        store = f"{tempfile.mkdtemp(prefix='ranks-')}/store"  # in the worker's folder, and removed with it
        for rank in range(1, config.num_devices):
            process = subprocess.Popen([sys.executable, "-c", FOLLOW], stdin=subprocess.PIPE)
            ranks._others.append(process)
            _say(process, (backend_class, config, rank, store))
            threading.Thread(target=ranks._watch, args=(process,), daemon=True).start()
        _join(0, config.num_devices, store)
        return ranks

    @contextmanager
    def batch(self, method: str, *args: Any) -> Iterator[None]:
        """Have the other ranks call the same method of their backends, for the batch that is computed within."""
        try:
            self.agreed((method, args))
            yield
        except GeneratorExit:
            with suppress(EngineError):
                self.agreed(CallerLeft())
            raise
        except BaseException:
            self._end(0)  # the other ranks may wait for ever in a collective operation that this one left
            raise

    def agreed(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self._heard is not None:
            if isinstance(value := self._heard.get(), CallerLeft):
                raise value
            return value
        try:
            for process in self._others:
                _say(process, value)
        except OSError as error:
            raise EngineError("a rank of tensor parallelism ended") from error
        return value

    def close(self) -> None:
        if self._others:
            import torch.distributed as dist

            self._end(5)
            with suppress(Exception):  # the group is gone already
                dist.destroy_process_group()

    def _end(self, patience: float) -> None:
        others, self._others = self._others, []
        for process in others:
            with suppress(OSError):
                process.stdin.close()
        until = time.monotonic() + patience
        for process in others:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0, until - time.monotonic()))
            process.kill()
            process.wait()

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """End this worker when another rank ends on its own: the worker would wait for that rank for ever."""
        process.wait()
        time.sleep(2)  # what ended that rank may be about to be told by this one too
        if process in self._others:
            print("a rank of tensor parallelism ended", file=sys.stderr, flush=True)
            os._exit(1)


def follow() -> None:
    """Be a rank other than 0: load its part of the model, and compute every batch that rank 0 names."""
    try:
        backend_class, config, rank, store = pickle.load(sys.stdin.buffer)
        heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(heard,), daemon=True).start()
        _join(rank, config.num_devices, store)
        backend = backend_class(config)
        backend._ranks = Ranks(heard)
        backend.load()
        while True:
            with suppress(CallerLeft):
                method, args = backend._ranks.agreed(None)
                for _ in getattr(backend, method)(*args):
                    pass
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # at once: the interpreter's end would wait for the group


def _listen(heard: queue.SimpleQueue[Any]) -> None:
    """Take in what rank 0 says, and end with it, also from within a collective operation."""
    with suppress(EOFError, pickle.UnpicklingError):  # rank 0 ended, maybe in the middle of a word
        while True:
            heard.put(pickle.load(sys.stdin.buffer))
    os._exit(0)  # without the group's own farewell, for which rank 0 may be gone


def _say(process: Any, value: Any) -> None:
    pickle.dump(value, process.stdin)
    process.stdin.flush()


def _join(rank: int, size: int, store: str) -> None:
    """Make this process one of the group; waits for the others."""
    import torch
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host's name need not lead anywhere
    dist.init_process_group(
        "nccl" if cuda else "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=TIMEOUT,
        device_id=torch.device("cuda", rank) if cuda else None,
    )  # fmt: skip


def announce(num_replicas: int, tp_size: int) -> None:
    """Say how the devices are used, once: as a log line where those are shown, else on the terminal."""
    from accelerate import ParallelismConfig

    mesh = ParallelismConfig(dp_shard_size=num_replicas, tp_size=tp_size)
    counts = {"Data parallel shards": num_replicas, "Tensor parallel size": tp_size, "Total GPUs": mesh.total_size}
    lines = ["Setting up hybrid (data + tensor) using Accelerate", *(f"  {what}: {n}" for what, n in counts.items())]
    say = log.info if log.isEnabledFor(logging.INFO) else print
    say("\n".join(lines))


def check(config: HuggingFaceBackendConfig) -> None:
    """Raise UsageError for a model that cannot be split, before any process is started."""
    import torch
    from transformers import AutoConfig

    size, option = config.num_devices, f"backend.tp_size={config.tp_size}"
    if config.device_map is not None:
        raise UsageError(f"backend.device_map={config.device_map} and {option} both split the model: set one to null")
    if (config.device or "").startswith("cpu") and torch.cuda.is_available():
        raise UsageError(f"backend.device=cpu with {option} needs the GPUs hidden: set CUDA_VISIBLE_DEVICES to nothing")
    files = resolve(config.model_name, revision=config.revision)
    options = {"revision": files.revision or "main", "trust_remote_code": config.trust_remote_code}
    with hub_errors(config.model_name):
        model = AutoConfig.from_pretrained(files.path, **options).get_text_config()
    if not getattr(model, "base_model_tp_plan", None):
        what = f"Transformers cannot split a {model.model_type} model this way"
        raise UsageError(f"{what}: set backend.device_map=auto, not tp_size")
    for name in ("num_attention_heads", "num_key_value_heads", "vocab_size"):
        if (value := getattr(model, name, None) or 0) % size:
            raise UsageError(f"the model's {name} is {value}, which {option} does not divide: change backend.tp_size")

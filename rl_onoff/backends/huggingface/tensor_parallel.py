"""One HuggingFace model split over the devices of a replica by Transformers' tensor parallelism.

Every rank is a process with its part of the weights. Rank 0 is the worker that runs the backend; it starts the others and
tells them through a pipe each step it takes (the tensors follow by broadcast), so that every rank enters the same collective
operations. Only rank 0 samples, computes statistics and yields: the others know nothing of requests, so a call that is left
early or fails in between leaves no rank waiting for the rest of it.
"""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from rl_onoff.backends.huggingface.config import HuggingFaceBackendConfig
from rl_onoff.backends.huggingface.model import SplitModel
from rl_onoff.backends.huggingface.rank import broadcast, join
from rl_onoff.errors import EngineError, UsageError


class Ranks:
    """The ranks of one replica, seen from rank 0."""

    def __init__(self, config: HuggingFaceBackendConfig):
        size = config.num_devices
        if (
            main := getattr(sys.modules["__main__"], "__spec__", None)
        ) is None or main.name != "rl_onoff.workers.worker_main":
            raise UsageError(
                f"backend.worker=false keeps the engine in this process, but backend.tp_size={size} wants {size}: drop it"
            )
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._others: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []
        self._forgotten: list[
            int
        ] = []  # caches that nobody can reach any more; the others hear of them with the next step
        store = str(Path(self._folder.name) / "store")
        for rank in range(1, size):
            process = subprocess.Popen(
                [sys.executable, "-m", "rl_onoff.backends.huggingface.rank"], stdin=subprocess.PIPE
            )
            assert process.stdin is not None
            self._others.append((process, process.stdin))
            pickle.dump((config, rank, store), process.stdin)
            process.stdin.flush()
        threading.Thread(target=self._watch, daemon=True, name="ranks").start()
        join(0, size, store)

    def send(self, step: str, number: int, inputs: dict[str, Any]) -> None:
        """Have the other ranks take a step; the tensors among its inputs are broadcast."""
        import torch

        tensors = {name: value.contiguous() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        plain = {name: value for name, value in inputs.items() if name not in tensors}
        forgotten, self._forgotten = self._forgotten, []
        shapes = [(name, tuple(value.shape), value.dtype) for name, value in tensors.items()]
        message = pickle.dumps((step, number, plain, shapes, forgotten))
        for _, pipe in self._others:
            pipe.write(message)
            pipe.flush()
        for tensor in tensors.values():
            broadcast(tensor)

    def forget(self, number: int) -> None:
        self._forgotten.append(number)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A step that fails here may leave the others waiting in a collective operation for ever: no further step is possible."""
        try:
            yield
        except BaseException as error:
            self._end(0)
            if isinstance(error, OSError):
                raise EngineError("a rank of tensor parallelism ended") from error
            raise

    def close(self) -> None:
        import torch.distributed as dist

        with suppress(OSError):
            self.send("close", 0, {})
        self._end(5)
        with suppress(Exception):  # the group is gone already
            dist.destroy_process_group()
        self._folder.cleanup()

    def _end(self, patience: float) -> None:
        others, self._others = self._others, []
        until = time.monotonic() + patience
        for process, pipe in others:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0, until - time.monotonic()))
            process.kill()
            process.wait()
            with suppress(OSError):
                pipe.close()

    def _watch(self) -> None:
        """End this worker when another rank ends on its own: it would wait for that rank for ever, while loading too."""
        while others := self._others:
            if any(process.poll() is not None for process, _ in others):
                time.sleep(2)  # what ended that rank may be about to be told by this one too
                if not self._others:
                    return
                print("a rank of tensor parallelism ended", file=sys.stderr, flush=True)
                os._exit(1)
            time.sleep(0.3)


class Lead(SplitModel):
    """Rank 0's part of the model: what it computes, the other ranks compute with it."""

    def __init__(self, model: Any, ranks: Ranks):
        self._ranks: Ranks | None = None  # while it is checked, which every rank does on its own accord
        self._numbers = itertools.count(1)
        super().__init__(model)
        self._ranks = ranks

    def body(self, **inputs: Any) -> Any:
        ranks = self._ranks
        if ranks is None:
            return super().body(**inputs)
        cache: SharedCache | None = inputs.pop("past_key_values", None)
        number = cache.number if cache is not None else next(self._numbers) if inputs.get("use_cache") else 0
        with ranks.together():
            ranks.send("body", number, inputs)
            output = super().body(**inputs, past_key_values=cache and cache.local)
        if number:
            output.past_key_values = cache or SharedCache(number, output.past_key_values, ranks)
        return output

    def head(self, hidden: Any) -> Any:
        if self._ranks is None:
            return super().head(hidden)
        with self._ranks.together():
            self._ranks.send("head", 0, {"hidden": hidden})
            return super().head(hidden)


class SharedCache:
    """Rank 0's part of a key-value cache; the other ranks hold theirs under the same number."""

    def __init__(self, number: int, local: Any, ranks: Ranks):
        self.number, self.local, self._ranks = number, local, ranks
        weakref.finalize(self, ranks.forget, number)

    def batch_select_indices(self, indices: Any) -> None:
        self._both("batch_select_indices", {"indices": indices})

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._both("batch_repeat_interleave", {"repeats": repeats})

    def __bool__(self) -> bool:
        return True

    def _both(self, step: str, inputs: dict[str, Any]) -> None:
        with self._ranks.together():
            self._ranks.send(step, self.number, inputs)
            getattr(self.local, step)(*inputs.values())


def use_float32_head(split: SplitModel) -> None:
    """SplitModel's own, for a head that is split: the forward that Transformers hooks into a layer is not copied with it."""
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    split.use_float32_head()
    head = split._lm_head
    if head.__dict__.pop("forward", None) is not None:
        ALL_PARALLEL_STYLES["colwise_gather_output"].install_forward(head, split.whole._device_mesh["tp"])

"""How much the HuggingFace backend computes at once: what the config says, or what memory holds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from rl_onoff.backends.huggingface.config import AUTO, HuggingFaceBackendConfig
from rl_onoff.errors import EngineError

if TYPE_CHECKING:
    from rl_onoff.backends.huggingface.model import SplitModel

log = logging.getLogger(__name__)

Item = TypeVar("Item")

# Beyond these a device computes no faster, but rows of unlike length wait for each other and take memory.
CPU_ROWS, CPU_TOKENS = 64, 2048
GPU_ROWS, GPU_TOKENS = 512, 32768
CPU_SHARE, GPU_SHARE = 0.25, 0.8  # of free memory; on a CPU other processes want it too
GPU_STEPS = 8
LEAST_TOKENS = 256  # to begin with


@dataclass
class Limits:
    """Most that is computed at once; a sequence that is longer than the tokens allowed runs alone."""

    rows: int  # responses that are sampled side by side
    cached_tokens: int  # of the rows that are sampled, padding and room for what comes included
    tokens: int  # given to the model in one forward pass, padding included
    steps: int = 1  # tokens drawn for every row before the host looks at them: a GPU need not wait for each

    @classmethod
    def of(cls, config: HuggingFaceBackendConfig, model: SplitModel) -> Limits:
        on_cpu = model.device.type != "cuda"
        free = CPU_SHARE * _free_ram() if on_cpu else GPU_SHARE * _free_gpu_memory(model.whole)
        # twice the cache, which is copied when rows move; logits in their own type, float32 and float64
        row_bytes, token_bytes = 24 * model.vocab_size, 2 * model.cache_bytes
        tokens = int(free / model.activation_bytes / 4)
        tokens = max(LEAST_TOKENS, min(CPU_TOKENS if on_cpu else GPU_TOKENS, tokens))
        rows = max(1, min(CPU_ROWS if on_cpu else GPU_ROWS, int(free / 2 / row_bytes)))
        cached_tokens = max(LEAST_TOKENS, int(free / 2 / token_bytes))
        limits = cls(rows, cached_tokens, tokens, steps=1 if on_cpu else GPU_STEPS)
        if config.batch_size != AUTO:
            limits.rows = int(config.batch_size)
        if config.max_batch_tokens != AUTO:
            limits.cached_tokens = limits.tokens = int(config.max_batch_tokens)
        return limits

    def halve(self, num_rows: int) -> None:
        """Remember that so many rows at once ran out of memory."""
        if num_rows == 1:
            fix = "use a smaller dtype, a shorter response or another device (backend.device, backend.device_map)"
            raise EngineError(f"one response alone runs out of memory: {fix}")
        self.rows = max(1, min(self.rows, num_rows) // 2)
        self.cached_tokens = max(1, self.cached_tokens // 2)
        self.tokens = max(1, self.tokens // 2)
        words = "out of memory with %d responses: going on with at most %d at once, and %d tokens"
        log.warning(words, num_rows, self.rows, self.tokens)


def cut(items: Iterable[Item], most_tokens: int, length: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Neighbours together, as many as fit into `most_tokens` when padded to the longest; at least one."""
    batch: list[Item] = []
    width = 0
    for item in items:
        width = max(width, length(item))
        if batch and width * (len(batch) + 1) > most_tokens:
            yield batch
            batch, width = [], length(item)
        batch.append(item)
    if batch:
        yield batch


def is_out_of_memory(error: BaseException) -> bool:
    import torch

    words = ("out of memory", "can't allocate memory")  # of MPS, and of torch's allocator for CPUs
    return isinstance(error, torch.OutOfMemoryError) or any(one in str(error) for one in words)


def _free_ram() -> int:
    import psutil

    return psutil.virtual_memory().available


def _free_gpu_memory(model: Any) -> int:
    """Of the fullest GPU that holds a part of the model."""
    import torch

    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    return min(torch.cuda.mem_get_info(device)[0] for device in devices)

"""A rank of tensor parallelism: holds a part of a model and follows rank 0 (tensor_parallel.py)."""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

TIMEOUT = timedelta(
    hours=2
)  # of a collective operation: large weights load at different speeds; idle ranks wait at the pipe


def join(rank: int, size: int, store: str) -> None:
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


def broadcast(tensor: Any) -> None:
    import torch
    import torch.distributed as dist

    if tensor.numel():
        dist.broadcast(tensor.view(torch.uint8), 0)  # as bytes: not every group knows every type


# -- the other ranks ---------------------------------------------------------------------------------------------------


def follow() -> None:
    """Take the steps that rank 0 tells, until it closes the pipe."""
    import torch

    from rl_onoff.backends.huggingface.backend import HuggingFaceBackend

    pipe, parent = sys.stdin.buffer, os.getppid()
    config, rank, store = pickle.load(pipe)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    join(rank, config.tp_size, store)
    backend = HuggingFaceBackend(config)
    split = backend._load_split()
    caches: dict[int, Any] = {}
    with torch.no_grad():
        while True:
            try:
                step, number, inputs, shapes, forgotten = pickle.load(pipe)
            except EOFError:
                return
            inputs |= _receive(shapes, split.device)
            for old in forgotten:
                caches.pop(old, None)
            match step:
                case "body":
                    output = split.body(**inputs, past_key_values=caches.get(number))
                    if number:
                        caches[number] = output.past_key_values
                case "head":
                    split.head(**inputs)
                case "close":
                    return
                case _:
                    getattr(caches[number], step)(*inputs.values())


def _receive(shapes: Sequence[tuple[str, tuple[int, ...], Any]], device: Any) -> dict[str, Any]:
    import torch

    tensors = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape, dtype in shapes}
    for tensor in tensors.values():
        broadcast(tensor)
    return tensors


def _end_with(parent: int) -> None:
    """End with rank 0, also from within a collective operation that nobody else will ever enter."""
    while os.getppid() == parent:
        time.sleep(0.3)
    os._exit(1)


if __name__ == "__main__":
    follow()
    sys.stdout.flush()
    os._exit(0)  # without the group's own farewell, for which rank 0 may be gone

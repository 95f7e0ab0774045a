"""Which tensors two model folders do not share, byte by byte, without loading either model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.errors import OnOffError
from rl_onoff.models.resolve import resolve

CHUNK = 1 << 24


def different_tensors(a: EngineConfig, b: EngineConfig) -> list[str]:
    """Names of the tensors in which two local safetensors models differ; empty where that cannot be told (a hub id, other shapes)."""
    try:
        ours, theirs = (
            dict(_tensors(Path(resolve(engine.model_name, revision=engine.revision).path))) for engine in (a, b)
        )
    except (OnOffError, OSError, ValueError):
        return []
    if not ours or {name: where[0] for name, where in ours.items()} != {
        name: where[0] for name, where in theirs.items()
    }:
        return []
    return [name for name in sorted(ours) if not _same(ours[name], theirs[name])]


_Tensor = tuple[str, Path, int, int]  # type and shape; file; first byte; one after the last


def _tensors(folder: Path) -> Iterator[tuple[str, _Tensor]]:
    """By the header of the safetensors format: 8 bytes of length, then JSON with the offsets of every tensor."""
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as data:
            length = int.from_bytes(data.read(8), "little")
            header = json.loads(data.read(length))
        for name, tensor in header.items():
            if name != "__metadata__":
                start, end = tensor["data_offsets"]
                yield name, (f"{tensor['dtype']} {tensor['shape']}", file, 8 + length + start, 8 + length + end)


def _same(a: _Tensor, b: _Tensor) -> bool:
    with a[1].open("rb") as ours, b[1].open("rb") as theirs:
        ours.seek(a[2])
        theirs.seek(b[2])
        left = a[3] - a[2]
        while left > 0:
            step = min(CHUNK, left)
            if ours.read(step) != theirs.read(step):
                return False
            left -= step
    return True

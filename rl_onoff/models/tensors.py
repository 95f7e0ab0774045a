"""Which tensors two model folders do not share, without loading either model."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rl_onoff.errors import OnOffError
from rl_onoff.models.resolve import resolve


def different_tensors(a: tuple[str, str | None], b: tuple[str, str | None]) -> list[str]:
    """Names of the tensors in which two local safetensors models differ, each given as (name, revision); empty where
    that cannot be told (a hub id, other shapes)."""
    from safetensors import SafetensorError

    try:
        with ExitStack() as files:
            ours, theirs = (_tensors(Path(resolve(name, revision=revision).path), files) for name, revision in (a, b))
            if {name: _kind(file, name) for name, file in ours.items()} != {
                name: _kind(file, name) for name, file in theirs.items()
            }:
                return []
            return [
                name for name in sorted(ours) if not _same(ours[name].get_tensor(name), theirs[name].get_tensor(name))
            ]
    except (OnOffError, OSError, SafetensorError):
        return []


def _tensors(folder: Path, files: ExitStack) -> dict[str, Any]:
    """Tensor name -> the open file that holds it."""
    from safetensors import safe_open

    opened = [files.enter_context(safe_open(file, "pt")) for file in sorted(folder.glob("*.safetensors"))]
    return {name: file for file in opened for name in file.keys()}  # noqa: SIM118


def _kind(file: Any, name: str) -> tuple[str, list[int]]:
    tensor = file.get_slice(name)
    return tensor.get_dtype(), tensor.get_shape()


def _same(a: Any, b: Any) -> bool:
    """Whether two tensors are equal byte by byte, so that a NaN equals itself and -0 is not 0."""
    import torch

    return torch.equal(*(tensor.flatten().view(torch.uint8) for tensor in (a, b)))

"""Makes `import torchvision` work beside a CPU build of torch; the environment's .pth file imports this in every
process.

torchvision comes as a CUDA build whose compiled half does not load here, and its Python half registers metadata for two
operators that are then missing. SGLang imports torchvision and uses none of it for text. Declaring the two operators
just before torchvision is imported is enough. A process that never imports torchvision pays nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class DeclareOperators:
    """A finder that finds nothing: it only acts when torchvision is about to be imported."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(cls)
            import torch

            for operator in ("nms", "qnms"):
                torch.library.define(f"torchvision::{operator}", BOXES)
        return None


sys.meta_path.insert(0, DeclareOperators)

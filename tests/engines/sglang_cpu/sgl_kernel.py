"""Stand-in for SGLang's compiled CPU kernels, which no package index carries.

SGLang imports a few of them by name when it starts and calls none in plain generation and scoring; its torch-native
code does the work. A kernel that is called after all fails with its name. `torch.ops.sgl_kernel` stays without
operators, which is how SGLang decides against its AMX kernels (`cpu_has_amx_support`) on a CPU that has AMX: the same
code runs everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def kernel(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(
            f"sgl_kernel.{name} is a stand-in: this environment runs SGLang on torch's own kernels"
        )

    kernel.__name__ = name
    return kernel

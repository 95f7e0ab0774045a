"""Routers of mixtures of experts: which experts they choose for every token, and how to have them choose given ones.

An engine's router is a module or an object with one call, whose result holds the ids of the chosen experts as its only
integers, (N, K) of them. Another choice is put in where the router asks `torch.topk` for one, so that what follows, the
weights of the chosen experts, is the model's own code on its own logits. A router that asks a kernel instead can be
looked at, but not told.

Shapes: N rows (tokens) of a forward pass, R rows of them that belong to one response, L positions of a response, M
layers of the model, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rl_onoff.errors import EngineError

if TYPE_CHECKING:
    from torch import Tensor

UNSEEN = "the choice of the engine's routers cannot be read: it is made inside a kernel, or by a class not known here"
NOT_TOLD = "the engine's routers choose other experts than they are told: inside a kernel, in groups, or another number"


def router_of(layer: Any) -> tuple[Any, str] | None:
    """What chooses the experts of a decoder layer, and the name of its call; None for a dense layer."""
    found = [getattr(module, "router", None) for module in layer.modules()]
    if objects := [router for router in found if hasattr(router, "select_experts")]:  # vLLM's, which are no modules
        return objects[0], "select_experts"
    named = (m for m in layer.modules() if any(part in type(m).__name__.lower() for part in ("router", "topk")))
    return next(((module, "forward") for module in named), None)


class Experts:
    """The experts of one response at every position, by layer: recorded, compared with those in a file, or given."""

    def __init__(self, file: Path, length: int, num_layers: int, *, writes: bool, needed: bool):
        # needed: they are all that is asked for, and not to write them is to choose those in the file
        self._file, self._writes, self._needed, self._shape = file, writes, needed, (num_layers, length)
        self._found: dict[int, np.ndarray] = {}  # layer -> (L, K), -1 where nothing came by yet
        self.given_MLK = np.load(file) if needed and not writes else None  # what the routers are to choose
        self.overlap_ML: np.ndarray | None = None  # share of the experts that are those in the file; NaN: dense layer

    def given(self, layer: int, first: int, num: int) -> np.ndarray | None:
        return None if self.given_MLK is None else self.given_MLK[layer, first : first + num]

    def put(self, layer: int, first: int, ids_RK: np.ndarray) -> None:
        """Take in the experts from position `first` on; those past the last position are left out."""
        length, ids_RK = self._shape[1], ids_RK[: max(self._shape[1] - first, 0)].astype(np.int16)
        wanted = self.given(layer, first, len(ids_RK))
        if wanted is not None and not np.array_equal(np.sort(wanted), np.sort(ids_RK)):
            raise EngineError(NOT_TOLD)
        found_LK = self._found.setdefault(layer, np.full((length, ids_RK.shape[1]), -1, np.int16))
        found_LK[first : first + len(ids_RK)] = ids_RK

    def finish(self) -> bool:
        """Whether those of all positions came by, of every layer that has a router and, if given, of the same ones."""
        if any((found_LK < 0).any() for found_LK in self._found.values()):
            return False
        if self._needed and not self._found:
            raise EngineError(UNSEEN)
        if self.given_MLK is not None:
            return self._found.keys() == set(np.flatnonzero((self.given_MLK >= 0).any((1, 2))))
        if self._writes and self._found:
            widths = {found_LK.shape[1] for found_LK in self._found.values()}
            experts_MLK = np.full((*self._shape, max(widths)), -1, np.int16)
            for layer, found_LK in self._found.items():
                experts_MLK[layer, :, : found_LK.shape[1]] = found_LK
            np.save(self._file, experts_MLK)
        elif self._found and self._file.exists():
            there_MLK, self.overlap_ML = np.load(self._file), np.full(self._shape, np.nan, np.float32)
            for layer, found_LK in self._found.items():
                # of other numbers of experts, where one side counts shared ones too, no share can be told
                if ((there_MLK[layer] >= 0).sum(-1) == found_LK.shape[1]).all():
                    both_LK = (found_LK[:, :, None] == there_MLK[layer, :, None, :]).any(-1)
                    self.overlap_ML[layer] = both_LK.mean(-1)
        return True


def experts_in(output: Any) -> Tensor | None:
    """The chosen experts' ids (N, K) among what a router's call gives; None where it gives none."""
    parts = output if isinstance(output, tuple) else (output,)
    return next((x for x in parts if "int" in str(getattr(x, "dtype", "")) and x.dim() == 2), None)


def choosing(given: Sequence[tuple[int, np.ndarray]], call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A router's call in which rows choose given experts: `given` has (first row, ids (R, K)). Where that cannot be the
    router chooses its own, which `Experts.put` finds: an exception inside an engine ends more than a call."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Choice(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if func not in (torch.topk, torch.Tensor.topk) or not args or found[1].dim() != 2:
                return found
            scores_NE, (values_NK, ids_NK) = args[0], map(torch.clone, found)
            for begin, rows in given:
                here = slice(begin, begin + len(rows))
                fits = rows.min(initial=0) >= 0 and rows.max(initial=0) < scores_NE.shape[1]
                if not fits or rows.shape[1] != ids_NK.shape[1]:  # a choice among groups of experts, say
                    return found
                ids_NK[here] = torch.from_numpy(rows).to(ids_NK)
                values_NK[here] = scores_NE[here].gather(-1, ids_NK[here])
                if not (values_NK[here].isfinite() & (values_NK[here] != 0)).all():  # of a group that was ruled out
                    return found
            return type(found)((values_NK, ids_NK))

    with Choice():
        return call(*args, **kwargs)

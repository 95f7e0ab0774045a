"""Keys and values of the rows that are decoded side by side: rows of other lengths join them, and tokens are added
without a copy of what is there.

Rows are padded on the left and end at the same column. Shapes: R rows, H heads, C columns, D size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ROOM = 64  # columns, at least, that a cache is given room for at once


class GrowingLayer:
    """One layer of attention, for Transformers, whose own layer copies all keys and values at every step.

    A layer with a sliding window keeps all tokens too: the window is in the attention mask, so rows of all lengths join
    the same way.
    """

    is_compileable = is_sliding = is_croppable = supports_early_init = False

    def __init__(self, buffers: tuple[Tensor, Tensor] | None = None, length: int = 0):
        self.buffers = buffers
        self.length = length  # columns in use

    @property
    def is_initialized(self) -> bool:
        return self.buffers is not None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        """Add the new columns; all keys and values."""
        start, end = self.length, self.length + key_states.shape[2]
        if self.buffers is None:
            self.buffers = key_states, value_states
        else:
            if end > self.buffers[0].shape[2]:
                self.buffers = _joined([(self, None)], start, max(ROOM, start // 4, end - start))
            for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
                buffer[:, :, start:end] = new
        self.length = end
        return tuple(buffer[:, :, : self.length] for buffer in self.buffers)

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1  # none

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0


def growing_cache(layers: Sequence[GrowingLayer] = ()) -> Any:
    """A cache of Transformers made of growing layers; without `layers` an empty one."""
    from transformers import cache_utils

    cache_utils.CacheLayerMixin.register(GrowingLayer)
    layer_class: Any = GrowingLayer
    made: list[Any] = list(layers)
    return cache_utils.Cache(layers=made) if made else cache_utils.Cache(layer_class_to_replicate=layer_class)


def can_grow(cache: Any) -> bool:
    """Whether growing layers can stand in for the layers of a cache that a model of Transformers made itself."""
    from transformers import cache_utils

    plain = (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer)
    return type(cache) is cache_utils.DynamicCache and all(type(layer) in plain for layer in cache.layers)


def joined(parts: Sequence[tuple[Any, Tensor]], width: int, room: int) -> Any:
    """One cache of some rows of several, in this order, `width` columns wide and with room for more."""
    layers = zip(*(cache.layers for cache, _ in parts), strict=True)
    rows = [rows_R for _, rows_R in parts]
    return growing_cache(
        [GrowingLayer(_joined(list(zip(each, rows, strict=True)), width, room), width) for each in layers]
    )


def _joined(parts: Sequence[tuple[GrowingLayer, Tensor | None]], width: int, room: int) -> Any:
    """Keys and values of rows (None: all) of several layers, moved to end at column `width`; zeros before and after."""
    made = []
    for kind in (0, 1):
        old = [(layer.buffers[kind], layer.length, rows) for layer, rows in parts if layer.buffers is not None]
        counts = [len(buffer) if rows is None else len(rows) for buffer, _, rows in old]
        _, num_heads, _, size = old[0][0].shape
        new = old[0][0].new_zeros(sum(counts), num_heads, width + room, size)
        at = 0
        for (buffer, length, rows), count in zip(old, counts, strict=True):
            used = min(length, width)
            columns = buffer[:, :, length - used : length]
            new[at : at + count, :, width - used : width] = columns if rows is None else columns[rows.to(buffer.device)]
            at += count
        made.append(new)
    return tuple(made)

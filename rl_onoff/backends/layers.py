"""Hidden states on the way through a model: the reference engine writes them to files, the other engine compares its
own with them where they arise, so that only norms leave an engine.

A file holds the states of one response, float32 (points, positions, D), where position i is that of the i-th token of
prompt and response together, the last token left out. Points follow the forward pass: what goes into the first decoder
layer, the residual stream after every decoder layer, and what the LM head is given. A file may also hold, before each
layer's own point, what its attention and its MLP give. Beside it lies, of a mixture of experts, which ones its routers
chose (routers.py).

Shapes: N rows (tokens) of a forward pass, R rows of them that belong to one response, D hidden size.
"""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rl_onoff.backends.routers import Experts, choosing, experts_in, router_of
from rl_onoff.errors import EngineError
from rl_onoff.types import LayerWant, Rollout

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDINGS, ATTENTION, MLP, LAYER, HEAD = "embeddings", "attention", "mlp", "layer", "lm_head"
PARTS = {ATTENTION: ("attn", "attention"), MLP: ("mlp", "feed_forward", "ffn", "moe")}  # in names of a layer's modules

NO_LAYERS = "our code does not work inside this {0}, so its layers cannot be looked at: pip install 'rl-onoff[{1}]'"

Point = tuple[str, int]  # kind of point, number of the layer
Stream = Callable[[Any, tuple[Any, ...]], "Tensor"]


def points_of(num_layers: int, inside: bool) -> list[Point]:
    """The points of a model, in the order of the forward pass."""
    kinds = (ATTENTION, MLP, LAYER) if inside else (LAYER,)
    return [(EMBEDDINGS, 0), *((kind, k) for k in range(num_layers) for kind in kinds), (HEAD, num_layers - 1)]


def states_name(response: Rollout) -> str:
    """Name of the file with a response's hidden states, which depend on its ids alone."""
    ids = np.concatenate([response.prompt_ids, response.token_ids_T]).astype(np.int32)
    prompt_len = len(response.prompt_ids).to_bytes(8, "little")
    return hashlib.blake2b(ids.tobytes(), digest_size=16, salt=prompt_len).hexdigest()


class States:
    """One response's hidden states while they arise: written to its file, or compared with what is in it."""

    def __init__(self, want: LayerWant, name: str, length: int, num_layers: int):
        self.file, self.writes, self.length = Path(want.folder) / name, want.writes, length
        points = points_of(num_layers, name in want.inside) if want.states else []
        self.index = {point: i for i, point in enumerate(points)}
        experts = self.file.with_suffix(".npy")
        self.experts = Experts(experts, length, num_layers, writes=want.writes, needed=not want.states)
        self.norms = np.full((2, len(self.index), length), np.nan, np.float32)  # of difference and reference
        self._missing, self._size = np.ones(self.norms.shape[1:], bool), 0
        if self.writes and points:
            self.file.write_bytes(b"")

    def finish(self) -> bool:
        """Whether all states came by. A layer may lack an attention or MLP of its own: its norms are NaN."""
        for (kind, _), i in self.index.items():
            if kind in PARTS and self._missing[i].all():
                if self.writes:
                    nothing_LD = np.full((self.length, self._size), np.nan, np.float32)
                    self._write(i * nothing_LD.nbytes, nothing_LD)
                self._missing[i] = False
        return self.experts.finish() and not self._missing.any()

    def found(self) -> dict[str, np.ndarray | None]:
        """What a response's scores are to hold beside its statistics."""
        return {} if self.writes or not self.index else {"layers": self.norms, "experts": self.experts.overlap_ML}

    def put(self, point: Point, first: int, states_RD: Tensor) -> None:
        """Take in the states from position `first` on; those past the last position are left out."""
        import torch

        i, states_RD = self.index.get(point), states_RD[: max(self.length - first, 0)].detach().float()
        num, size = states_RD.shape
        self._size = size
        if i is None or not num:
            return
        offset = 4 * size * (i * self.length + first)
        if self.writes:
            self._write(offset, states_RD.cpu().numpy())
        else:
            if self.file.stat().st_size != 4 * size * self._missing.size:
                raise EngineError(f"the other side's hidden states are not {size} numbers in {len(self.index)} points")
            there = np.memmap(self.file, np.float32, "c", offset, (num, size))  # mapped for this call alone
            reference_RD = torch.from_numpy(there).to(states_RD.device)
            both = torch.stack([(states_RD - reference_RD).norm(dim=-1), reference_RD.norm(dim=-1)])
            self.norms[:, i, first : first + num] = both.cpu().numpy()
        self._missing[i, first : first + num] = False

    def _write(self, offset: int, states_RD: np.ndarray) -> None:
        """Not through a mapping: where the disk is full that would end the process without a word."""
        with self.file.open("r+b") as file:
            file.seek(offset)
            file.write(states_RD.tobytes())


class LayerSpan(NamedTuple):
    """Rows [begin, end) of a forward pass, which are those of one response from its position `first` on."""

    states: States
    begin: int
    end: int
    first: int


class LayerWatch(AbstractContextManager["LayerWatch"]):
    """Hooks on a model's decoder layers, for as long as the context lasts.

    `spans` is asked at the beginning of each forward pass which rows belong to whom; `stream` finds the residual stream
    in what a layer gives (the first one: takes), and in all that the layer was called with. What fails in a hook is
    kept in `error`, since an exception inside an engine ends more than a call.
    """

    error = ""

    def __init__(self, model: Any, config: Any, spans: Callable[[], Iterable[LayerSpan]], stream: Stream):
        self._spans_of, self._stream, self._spans = spans, stream, list[LayerSpan]()
        self.num_layers = config.get_text_config().num_hidden_layers
        self._body, self._layers = find_layers(model, self.num_layers)
        self._undo = ExitStack()

    def __enter__(self) -> LayerWatch:
        def added(handle: Any) -> None:
            self._undo.callback(handle.remove)

        added(self._layers[0].register_forward_pre_hook(self._begin, with_kwargs=True))
        for k, layer in enumerate(self._layers):
            hooked = {LAYER: layer, **parts_of(layer)}
            for kind, module in hooked.items():
                added(module.register_forward_hook(partial(self._after, (kind, k)), with_kwargs=True))
            if (router := router_of(layer)) is not None:
                self._wrap(*router, k)
        head = partial(self._after, (HEAD, self.num_layers - 1))
        added(self._body.register_forward_hook(head, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        """Take the hooks away."""
        self._undo.close()
        self._spans = []

    def states(self, want: LayerWant, name: str, length: int) -> States:
        return States(want, name, length, self.num_layers)

    def check(self, states: Iterable[States]) -> None:
        """Raise for a hook that failed, and for states that never came by."""
        if self.error:
            raise EngineError(f"hidden states could not be read ({self.error.strip().splitlines()[-1]})")
        if not all([each.finish() for each in states]):
            raise EngineError("hidden states are missing: the engine does not run its decoder layers as modules")

    def take(self, point: Point, output: Any, given: tuple[Any, ...] = ()) -> None:
        """Take in what a module gave: a tensor, or a tuple that holds it first."""
        spans = [span for span in self._spans if point in span.states.index]
        if not spans or self.error:
            return
        try:
            read = self._stream if point[0] in (EMBEDDINGS, LAYER) else first_of
            states = read(getattr(output, "last_hidden_state", output), given)
            states_ND = states.reshape(-1, states.shape[-1])
            for span in spans:
                span.states.put(point, span.first, states_ND[span.begin : span.end])
        except Exception:
            self.error = traceback.format_exc()

    def _begin(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        try:
            self._spans = list(self._spans_of())
            given = (*args, *kwargs.values())
            tensors = (x for x in given if hasattr(x, "is_floating_point") and x.is_floating_point())
            self.take((EMBEDDINGS, 0), tuple(tensors), given)
        except Exception:
            self.error = traceback.format_exc()

    def _after(self, point: Point, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        self.take(point, output, (*args, *kwargs.values()))

    def _wrap(self, router: Any, name: str, layer: int) -> None:
        call, own = getattr(router, name), vars(router).get(name)
        setattr(router, name, partial(self._route, layer, call))
        self._undo.callback(partial(delattr, router, name) if own is None else partial(setattr, router, name, own))

    def _route(self, layer: int, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A router's call, whose choice is taken in or, where experts are given, is theirs."""
        try:
            given = [(x.begin, x.states.experts.given(layer, x.first, x.end - x.begin)) for x in self._spans]
            if told := [(begin, ids) for begin, ids in given if ids is not None]:
                call = partial(choosing, told, call)
        except Exception:
            self.error = traceback.format_exc()
        output = call(*args, **kwargs)
        try:
            if not self.error and self._spans and (ids_NK := experts_in(output)) is not None:
                for span in self._spans:
                    span.states.experts.put(layer, span.first, ids_NK[span.begin : span.end].cpu().numpy())
        except Exception as error:
            self.error = str(error) if isinstance(error, EngineError) else traceback.format_exc()
        return output


def first_of(output: Any, given: tuple[Any, ...]) -> Tensor:
    """A module's output, or the first of several."""
    return output[0] if isinstance(output, tuple) else output


def pair_sum(output: Any, given: tuple[Any, ...]) -> Tensor:
    """The residual stream of an engine that fuses the sum with the residual into the next norm, and hands a pair on."""
    hidden, *rest = output if isinstance(output, tuple) else (output,)
    if rest and (residual := rest[0]) is not None and residual.shape == hidden.shape:
        return hidden.float() + residual.float()
    return hidden


def find_layers(model: Any, num_layers: int) -> tuple[Any, Any]:
    """(the body, its decoder layers): the list of as many modules as the config says there are layers."""
    from torch.nn import ModuleList

    for module in model.modules():
        for child in module.children():
            if isinstance(child, ModuleList) and len(child) == num_layers:
                return module, child
    what = f"{type(model).__name__} has no list of {num_layers} decoder layers"
    raise EngineError(f"{what}, so nothing can be said of its layers: set model to another")


def parts_of(layer: Any) -> dict[str, Any]:
    """A decoder layer's attention and MLP, by kind, found by the names of its modules."""
    named = [(name, module) for name, module in layer.named_children() if "norm" not in name]
    found = {kind: [m for name, m in named if any(part in name for part in parts)] for kind, parts in PARTS.items()}
    return {kind: modules[0] for kind, modules in found.items() if modules}

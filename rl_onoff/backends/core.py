"""The core of every backend: token ids in and out, and everything about it that is not an engine call.

`complete(requests)` streams Rollouts as they finish, `score(rollouts, want)` streams TokenScores. An engine's folder
implements `_load`, `_generate`, `_score`, `_close` and a pure `sampling_args`. Where the engine runs (here, in a worker
process, in a pool of workers) is decided by placement.py and is not the engine's business.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar, Self

import numpy as np

from rl_onoff.backends.config import BackendConfig
from rl_onoff.backends.engine import Core, EngineInfo, Given, Supply
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.backends.placement import check_installed, place
from rl_onoff.errors import EngineError, MissingDependencyError, UsageError
from rl_onoff.types import Key, LogprobKind, Rollout, SampleRequest, Sampling, TokenScores, Want

log = logging.getLogger(__name__)


class CoreBackend(ABC):
    """One language model behind one inference engine, token ids in and out."""

    name: ClassVar[str]  # the config group's name
    package: ClassVar[str]  # what must be importable, and the extra that brings it
    config_class: ClassVar[type[EngineConfig]]
    logprob_kinds: ClassVar[frozenset[LogprobKind]]  # what it can report while sampling
    supports_gradients: ClassVar[bool] = False
    worker_by_default: ClassVar[bool] = False

    def __init__(self, config: EngineConfig | BackendConfig):
        if isinstance(config, BackendConfig):
            assert config.backend_config is not None
            config = config.backend_config
        if not isinstance(config, self.config_class):
            raise UsageError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, not a {type(config).__name__}"
            )
        if not config.model_name:
            raise UsageError("no model was named: set model.name to a hub id, a folder, a .gguf file or smollm2")
        if config.logprob_kind not in self.logprob_kinds:
            kinds = ", ".join(kind.value for kind in LogprobKind if kind in self.logprob_kinds)
            raise UsageError(
                f"{self.name} cannot report {config.logprob_kind.value} logprobs: set backend.logprob_kind to one of "
                f"{kinds}"
            )
        self.config = config
        self._core: Core | None = None
        self._info: EngineInfo | None = None
        self._tokenizer: Any = None

    # -- what an engine's file implements ------------------------------------------------------------------------------

    @abstractmethod
    def _load(self) -> EngineInfo:
        """Load the weights in this process."""

    @abstractmethod
    def _generate(self, supply: Supply) -> Iterator[Rollout]:
        """Sample what the supply gives, while it gives; a rollout's prompt and text may be left to `complete`."""

    @abstractmethod
    def _score(self, rollouts: Sequence[Rollout], want: Want) -> Iterator[TokenScores]:
        """Score given token ids; no response is empty or longer than the context."""

    @abstractmethod
    def _close(self) -> None:
        """Free what `_load` took; must be safe to call twice."""

    @staticmethod
    @abstractmethod
    def sampling_args(sampling: Sampling, eos_ids: Sequence[int], seed: int) -> dict[str, Any]:
        """The engine's own sampling arguments, every one explicit: nothing comes from the model's generation config."""

    # -- checks that load nothing --------------------------------------------------------------------------------------

    def check_model(self) -> None:
        """Refuse a model that cannot be there."""
        from rl_onoff.models.resolve import check_name

        check_name(self.config.model_name, revision=self.config.revision)

    def check_engine(self, option: str = "backend") -> None:
        """Refuse an engine that is not installed where it shall run; `option` is the option that chose the engine."""
        check_installed(self.package, self.config, option)

    def check_sampling(self, sampling: Sampling) -> None:
        """Refuse a sampler this engine does not have."""
        self.sampling_args(sampling, (), sampling.seed)

    # -- life ----------------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Load the model and tokenizer. Loading twice is loading once.

        Raises ImportError when the engine is not installed, ValueError for a model that is not there.
        """
        if self._core is not None:
            return
        self._tokenizer = self._tokenizer or self._load_tokenizer()
        core = self._place()
        try:
            self._info = core._load()
        except BaseException:
            core._close()
            raise
        self._core = core

    def _place(self) -> Core:
        """Where the engine runs: this object itself, a worker process, or a pool of them."""
        return place(self, replace(self.config, dp_size=self._num_replicas()), in_worker=self._hosted_by_default())

    def _num_replicas(self) -> int | None:
        return self.config.dp_size

    def _hosted_by_default(self) -> bool:
        return self.worker_by_default

    def close(self) -> None:
        """Free the model, and every process, file and port the engine took."""
        core, self._core, self._info = self._core, None, None
        if core is not None:
            core._close()

    def __enter__(self) -> Self:
        self.load()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def is_loaded(self) -> bool:
        """True between `load` and `close`."""
        return self._core is not None

    @property
    def info(self) -> EngineInfo:
        """What the engine says about itself; only once loaded."""
        self._loaded()
        assert self._info is not None
        return self._info

    def _loaded(self) -> Core:
        if self._core is None:
            raise EngineError("the backend is not loaded: call backend.load() first")
        return self._core

    # -- the core: token ids -------------------------------------------------------------------------------------------

    def complete(self, requests: Iterable[SampleRequest | Sequence[SampleRequest]]) -> Iterator[Rollout]:
        """Sample one response to every request; yields each as it finishes, in any order.

        What `sample_requests` makes of one prompt, a list of requests, may stand in place of a request.
        """
        core = self._loaded()
        asked = [one for request in requests for one in ([request] if isinstance(request, SampleRequest) else request)]
        by_key = _by_key(asked)
        for request in asked:
            self._check_prompt(request.request_id, len(request.prompt_ids), room=1)
        for rollout in core._generate(Given(asked)) if asked else ():
            request = by_key[rollout.key]
            text = self._text(rollout.token_ids_T, request.sampling.stop)
            yield replace(rollout, prompt_ids=request.prompt_ids, text=text)

    def score(self, rollouts: Iterable[Rollout], want: Want | None = None) -> Iterator[TokenScores]:
        """Score given responses by prefill; yields each as it is done, in any order.

        Row t describes response token t, whose distribution is that of a plain forward pass over the unpadded sequence.
        """
        core, bare = self._loaded(), []
        for rollout in rollouts:  # engines read the ids alone
            prompt_ids, token_ids_T = (np.asarray(ids, np.int32) for ids in (rollout.prompt_ids, rollout.token_ids_T))
            request_id, sample = rollout.key
            bare.append(Rollout(request_id=request_id, sample=sample, prompt_ids=prompt_ids, token_ids_T=token_ids_T))
        _by_key(bare)
        for rollout in bare:
            self._check_prompt(rollout.request_id, len(rollout.prompt_ids), room=len(rollout.token_ids_T))
            if len(rollout.token_ids_T) == 0:
                raise UsageError(f"response {rollout.sample} to request {rollout.request_id!r} has no tokens to score")
        yield from core._score(bare, want or Want()) if bare else ()

    def _check_prompt(self, request_id: str, num_tokens: int, room: int) -> None:
        if num_tokens == 0:
            raise UsageError(f"the prompt of request {request_id!r} is empty: give it at least one token")
        if num_tokens + room > self.info.max_len:
            raise UsageError(
                f"the prompt of request {request_id!r} has {num_tokens} tokens and needs {room} more, but the context "
                f"holds {self.info.max_len}: shorten it, leave the row out, or raise the engine's context length"
            )

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer of the model; pads on the left."""
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
        return self._tokenizer

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _import_engine(self) -> ModuleType:
        """The engine's package, which may be missing or broken."""
        package = self.package
        try:
            return import_module(package)
        except ImportError as error:
            if error.name != package:
                raise EngineError(
                    f"{package} is installed but cannot be imported ({error}): run `rl-onoff doctor`"
                ) from error
            raise MissingDependencyError(
                f"the {self.name} backend needs the {package} package: set backend.python to the interpreter of an "
                f"environment that has it, or pip install 'rl-onoff[{package}]'"
            ) from error

    def _load_tokenizer(self) -> Any:
        from rl_onoff.models.facts import load_tokenizer

        config = self.config
        return load_tokenizer(
            config.model_name,
            tokenizer=config.tokenizer,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )

    def _text(self, token_ids_T: np.ndarray, stop: Sequence[str]) -> str:
        """The text of a response, the same for every engine: no special tokens, cut before the first stop string."""
        text = self.get_tokenizer().decode(token_ids_T.tolist(), skip_special_tokens=True)
        cut = cut_at_stop(text, stop)
        return text if cut is None else cut


def _by_key(items: Iterable[Any]) -> dict[Key, Any]:
    """Requests or rollouts by (request id, sample), which is all that tells their results apart."""
    found: dict[Key, Any] = {}
    for item in items:
        if item.key in found:
            raise UsageError(
                f"request {item.request_id!r} (sample {item.sample}) is there twice: give every request its own id"
            )
        found[item.key] = item
    return found


def disagreement(
    vocab_size: int,
    allowed: float,
    score: Callable[[Sequence[Rollout], Want], Iterable[TokenScores]],
    public: Callable[[Rollout], np.ndarray],
) -> str:
    """Why statistics computed inside an engine cannot be used, empty where they can: the logprobs of a short response
    from inside the engine and from its public API may be `allowed` nats apart."""
    ids = np.arange(1, 13, dtype=np.int32) * 7919 % vocab_size
    rollout = Rollout(request_id="check", sample=0, prompt_ids=ids[:4], token_ids_T=ids[4:])
    try:
        (inside,) = score([rollout], Want())
    except Exception as error:  # whatever moved inside the engine, its public API is still there
        log.debug("in-engine statistics failed", exc_info=True)
        return f"{type(error).__name__}: {error}"
    worst = float(np.abs(inside.logprobs_T - public(rollout)).max())
    return "" if worst <= allowed else f"its logprobs are off by up to {worst:.2g} nats"


def cut_at_stop(text: str, stop: Sequence[str]) -> str | None:
    """`text` before the first stop string in it; None when there is none."""
    hits = [at for at in (text.find(string) for string in stop) if at >= 0]
    return text[: min(hits)] if hits else None

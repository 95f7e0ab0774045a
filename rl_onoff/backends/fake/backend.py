"""A tiny deterministic language model over bytes: a real backend, quick enough for every test around an engine.

Its logits depend on the last two tokens through a random table that the model's name seeds. `noise` perturbs the table,
as another policy would.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from rl_onoff.backends.base import BaseBackend
from rl_onoff.backends.engine import EngineInfo, Supply
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.backends.fake.config import FakeBackendConfig
from rl_onoff.backends.sampler import Row, draw
from rl_onoff.backends.token_stats import token_stats
from rl_onoff.types import LogprobKind, Rollout, TokenScores, Want

END = 256


class ByteTokenizer:
    """256 bytes and an end token, with the part of a transformers tokenizer's interface that the project uses."""

    eos_token_id = END
    eos_token = "<|end|>"
    bos_token_id = None
    all_special_ids: ClassVar[list[int]] = [END]
    chat_template = (
        "{% if tools %}tools: {{ tools }}\n{% endif %}{% if enable_thinking is defined %}think: {{ enable_thinking }}\n"
        "{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}{% for call in m.tool_calls %} {{ call }}"
        "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    padding_side = "left"
    name_or_path = "fake"

    def __len__(self) -> int:
        return END + 1

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text)}

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False, **_: Any) -> str:
        end = b"" if skip_special_tokens else self.eos_token.encode()
        return b"".join(bytes([i]) if i < END else end for i in token_ids).decode(errors="replace")

    def get_vocab(self) -> dict[str, int]:
        return {f"<{i}>": i for i in range(len(self))}

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self.decode([i]) for i in ids]

    def apply_chat_template(self, messages: Any, tokenize: bool = True, **options: Any):
        from jinja2 import Template

        text = Template(self.chat_template, keep_trailing_newline=True).render(messages=messages, **options)
        return self.encode(text) if tokenize else text


class FakeBackend(BaseBackend):
    """Behaves like any other engine, in numpy-sized time."""

    name: ClassVar[str] = "fake"
    package: ClassVar[str] = "torch"
    config_class: ClassVar[type[EngineConfig]] = FakeBackendConfig
    logprob_kinds: ClassVar[frozenset[LogprobKind]] = frozenset(LogprobKind)
    supports_gradients: ClassVar[bool] = True
    config: FakeBackendConfig

    _table: Any = None

    def _load(self) -> EngineInfo:
        import torch

        seed, size = zlib.crc32(self.config.model_name.encode()), END + 1
        own, noise = (torch.randn(2, size, size, generator=torch.Generator().manual_seed(seed + i)) for i in range(2))
        self._table = 2 * own + self.config.noise * noise
        return EngineInfo(engine=self.name, version="1", dtype="float32", vocab_size=size, max_len=4096, eos_ids=(END,))

    def _generate(self, supply: Supply) -> Iterator[Rollout]:
        kind, tokenizer = self.config.logprob_kind, self.get_tokenizer()
        while requests := supply.take(wait=True):
            for row in [Row(request, self.info.max_len) for request in requests]:
                while row.finish is None:
                    logits = self._rows(np.concatenate([row.request.prompt_ids, row.token_ids])[-2:], 1)
                    token, logprob = draw(logits, [row.request.sampling], np.array([row.key()]), kind)
                    row.append(int(token[0]), float(logprob[0]), tokenizer, frozenset(self.info.eos_ids))
                yield row.rollout(kind)

    def _score(self, rollouts: Sequence[Rollout], want: Want) -> Iterator[TokenScores]:
        import torch

        for rollout in rollouts:
            yield token_stats(self._logits_of(rollout), torch.as_tensor(rollout.token_ids_T), want).of(rollout)

    def _close(self) -> None:
        self._table = None

    def check_model(self) -> None:
        """Any name will do: it seeds the table."""
        if self.config.adapter is not None:
            self._check_adapter(self.config.adapter, "")

    def model_json(self, file: str) -> dict[str, Any]:
        return {}

    def _load_tokenizer(self) -> ByteTokenizer:
        return ByteTokenizer()

    def _rows(self, ids: np.ndarray, num_rows: int) -> Any:
        """Logits of the last `num_rows` positions of a sequence: (num_rows, 257)."""
        ids = np.concatenate([[0], ids]).astype(np.int64)
        logits = self._table[0, ids[-num_rows:]] + 0.5 * self._table[1, ids[-num_rows - 1 : -1]]
        return (logits / step).round() * step if (step := self.config.rounding) else logits

    def _logits_of(self, rollout: Rollout) -> Any:
        return self._rows(np.concatenate([rollout.prompt_ids, rollout.token_ids_T[:-1]]), len(rollout.token_ids_T))

    def _logits_with_gradients(self, rollouts: Sequence[Rollout]) -> list[Any]:
        self._table.requires_grad_(True)
        return [self._logits_of(rollout) for rollout in rollouts]

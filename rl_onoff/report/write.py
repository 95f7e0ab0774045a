"""Writes the page while the responses stream by: summary first, then packed chunks, then their index."""

from __future__ import annotations

import base64
import hashlib
import heapq
import html
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import IO, Any

import numpy as np

from rl_onoff.report.data import ReportInput, ReportResponse
from rl_onoff.report.pack import TOP_LIMITS, pack_json, pack_tokens
from rl_onoff.types import TokenScores

CHUNK_RESPONSES = 32
CHUNK_TOKENS = 8_000
BUDGET_BYTES = 42_000_000  # of packed responses, 56 MB in base64, whatever the run: top lists are cut, then responses
NUM_WORST = 100  # worst tokens kept per target
GUESSED_TOKENS = 2_000_000  # when nobody says how many are to come
PROMPT_CHARS = 8_000  # of a prompt that are embedded
TEXT_CHARS = 100_000  # of a response's text that are embedded, for search; its tokens are all there
COLUMNS = ("id", "sample", "chunk", "length", "reward", "finish")
SCRIPTS = (
    "base.js", "codec.js", "plots.js", "metrics.js", "attribution.js", "plots_page.js", "colours.js", "filters.js",
    "responses.js", "panel.js", "worst.js", "main.js",
)  # fmt: skip


def write_report(path: str | Path, report: ReportInput, *, budget_bytes: int = BUDGET_BYTES) -> Path:
    """Write the page and return its path. The file appears whole or not at all."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="ascii", newline="\n") as out:
            _write_page(out, report, budget_bytes)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def plain(value: Any) -> Any:
    """Value with every number JSON can say: NaN and infinities as the strings JavaScript's Number() reads."""
    if hasattr(value, "items"):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def inline_json(value: Any) -> str:
    """JSON that is safe inside <script>: ASCII, and no `<` that could end the element or open a comment."""
    text = json.dumps(plain(value), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _write_page(out: IO[str], report: ReportInput, budget_bytes: int) -> None:
    head, tail = _file("page.html").split("<!-- data -->")
    script = "\n".join(_file(name) for name in SCRIPTS)
    script = f'(() => {{\n"use strict";\n{script}\n}})();'
    script_hash = base64.b64encode(hashlib.sha256(script.encode("ascii")).digest()).decode("ascii")
    title = html.escape(report.title).encode("ascii", "xmlcharrefreplace").decode("ascii")
    head = head.replace("/* script hash */", script_hash).replace("/* style */", _file("page.css"))
    out.write(head.replace("<!-- title -->", title))
    known = {name for comparison in report.comparisons for name in comparison.get("overall", {})}
    metrics = {name: asdict(metric) for name, metric in report.metrics.items() if name in known}
    names = ("title", "verdict", "policies", "comparisons", "attribution")
    _write_script(out, "summary", {name: getattr(report, name) for name in names} | {"metrics": metrics})
    counts: Mapping[str, Any] = report.comparisons[0].get("counts", {}) if report.comparisons else {}
    num_tokens = max(counts.get("tokens", GUESSED_TOKENS), 1)
    packer = _Packer(out, report.token_text, budget_bytes / num_tokens, budget_bytes)
    for response in report.responses:
        packer.add(response)
        if packer.is_full and report.num_responses is not None:
            packer.num_left_out = max(report.num_responses - packer.index.num_responses, 0)
            break
    packer.finish()
    out.write(tail.replace("/* script */", script))


def _file(name: str) -> str:
    text = resources.files("rl_onoff.report").joinpath("page", name).read_text(encoding="utf-8")
    assert text.isascii(), f"{name} must be ASCII, so that no server's charset can break the page"
    return text


def _write_script(out: IO[str], name: str, value: Any) -> None:
    """A script element of data: packed bytes in base64, all else as JSON."""
    packed = isinstance(value, bytes)
    kind = "text/plain" if packed else "application/json"
    text = base64.b64encode(value).decode("ascii") if packed else inline_json(value)
    out.write(f'<script type="{kind}" id="{name}">{text}</script>\n')


class Index:
    """Columns with one entry per response, a heap of worst tokens per target: small even for a million responses."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        self.groups: dict[str, list[str | None]] = {}
        # Per target (or for the behaviour, where nothing is compared): mean l, or mean logprob
        self.mean: list[list[Any]] = []
        self.worst: list[list[Any]] = []  # max |l|, or minus the lowest logprob
        self.heaps: list[list[tuple[float, int, int, float, float]]] = []
        self.num_responses = 0
        self.has_behaviour = self.has_targets = False

    def add(self, response: ReportResponse, chunk: int) -> None:
        rollout = response.rollout
        finish = "" if rollout.finish_reason is None else rollout.finish_reason.value
        row = (rollout.request_id, rollout.sample, chunk, response.num_tokens, rollout.reward, finish)
        for name, value in zip(COLUMNS, row, strict=True):
            self.columns[name].append(plain(value))
        for name in self.groups | dict(response.groups):
            self.groups.setdefault(name, [None] * self.num_responses).append(response.groups.get(name))
        for i, target in enumerate(response.targets or (None,)):
            self._add_numbers(i, response.behaviour, target)
        self.has_behaviour |= response.behaviour is not None
        self.has_targets |= bool(response.targets)
        self.num_responses += 1

    def _add_numbers(self, i: int, behaviour: TokenScores | None, target: TokenScores | None) -> None:
        while len(self.mean) <= i:
            self.mean.append([None] * self.num_responses)
            self.worst.append([None] * self.num_responses)
            self.heaps.append([])
        q_T, p_T = (None if side is None else np.asarray(side.logprobs_T, np.float64) for side in (behaviour, target))
        with np.errstate(invalid="ignore"):
            shown_T = p_T - q_T if p_T is not None and q_T is not None else q_T if p_T is None else p_T
        assert shown_T is not None
        known_T = shown_T[~np.isnan(shown_T)]
        for column, short in ((self.mean, np.mean), (self.worst, lambda x_T: np.abs(x_T).max())):
            column[i].append(plain(float(f"{short(known_T):.6g}")) if len(known_T) else None)
        size_T = np.nan_to_num(np.abs(shown_T), nan=-1.0, posinf=1e9)
        heap = self.heaps[i]
        least = heap[0][0] if len(heap) == NUM_WORST else 0.0
        for t in np.argsort(-size_T, kind="stable")[: min(NUM_WORST, int((size_T > least).sum()))]:
            q, p = (math.nan if side_T is None else float(side_T[t]) for side_T in (q_T, p_T))
            item = float(size_T[t]), -self.num_responses, -int(t), q, p
            if len(heap) < NUM_WORST:
                heapq.heappush(heap, item)
            elif item > heap[0]:
                heapq.heapreplace(heap, item)

    def as_json(self) -> dict[str, Any]:
        worst_tokens = [
            [[-r, -t, plain(q), plain(p)] for _, r, t, q, p in sorted(heap, key=lambda item: item[:3], reverse=True)]
            for heap in self.heaps
        ]
        groups = {}
        for name, values in self.groups.items():
            names = sorted({v for v in values if v is not None})
            code = {v: i for i, v in enumerate(names)}
            groups[name] = {"values": names, "codes": [-1 if v is None else code[v] for v in values]}
        numbers = {"mean": self.mean, "worst": self.worst, "worst_tokens": worst_tokens}
        has = {"has_behaviour": self.has_behaviour, "has_targets": self.has_targets}
        return {**self.columns, "groups": groups, **numbers, **has}


@dataclass
class _Packer:
    """Gathers responses into chunks and writes them, cutting top lists where a run would make the file too large.

    Every chunk may use its tokens' share of the budget and what earlier ones saved; the limit tightens until it fits.
    """

    out: IO[str]
    token_text: Callable[[int], str] | None
    bytes_per_token: float
    bytes_left: float
    saved: float = 0.0
    level: int = 0
    num_cut: int = 0
    pending: list[ReportResponse] = field(default_factory=list)
    index: Index = field(default_factory=Index)
    texts: dict[int, str] = field(default_factory=dict)
    num_chunks: int = 0
    num_left_out: int = 0

    @property
    def is_full(self) -> bool:
        return self.bytes_left <= 0

    def add(self, response: ReportResponse) -> None:
        if self.is_full:
            self.num_left_out += 1
            return
        self.pending.append(response)
        num_tokens = sum(r.num_tokens for r in self.pending)
        if len(self.pending) >= CHUNK_RESPONSES or num_tokens >= CHUNK_TOKENS:
            self._write_chunk()

    def finish(self) -> None:
        if self.pending:
            self._write_chunk()
        index = {**self.index.as_json(), "left_out": self.num_left_out, "cut_chunks": self.num_cut}
        table = {"ids": list(self.texts), "texts": list(self.texts.values())}
        _write_script(self.out, "index", index)
        _write_script(self.out, "token-table", pack_json(table))

    def _write_chunk(self) -> None:
        budget = self.bytes_per_token * sum(r.num_tokens for r in self.pending)
        allowance = budget + self.saved / 4  # a quarter: limits that change slowly
        if self.saved > budget:
            self.level = max(self.level - 1, 0)
        texts = pack_json([self._text_row(response) for response in self.pending])
        chunk = pack_tokens(self.pending, TOP_LIMITS[self.level])
        while len(texts) + len(chunk.data) > allowance and self.level + 1 < len(TOP_LIMITS):
            self.level += 1
            chunk = pack_tokens(self.pending, TOP_LIMITS[self.level])
        size = len(texts) + len(chunk.data)
        self.saved += budget - size
        self.bytes_left -= size
        self.num_cut += self.level > 0
        for response in self.pending:
            self.index.add(response, self.num_chunks)
        if self.token_text is not None:
            for token_id in set(chunk.ids.tolist()) - self.texts.keys():
                self.texts[token_id] = self.token_text(token_id)
        _write_script(self.out, f"texts-{self.num_chunks}", texts)
        _write_script(self.out, f"tokens-{self.num_chunks}", chunk.data)
        self.num_chunks += 1
        self.pending = []

    def _text_row(self, response: ReportResponse) -> dict[str, Any]:
        """A response's texts; `own`: those of its tokens that are not the one in the table (part of a character)."""
        ids, tokens = response.rollout.token_ids_T.tolist(), response.tokens
        if len(ids) != len(tokens):
            raise ValueError(f"a response has {len(ids)} token ids and {len(tokens)} token texts")
        own = {}
        if list(map(self.texts.get, ids)) != list(tokens):
            for t, (token_id, text) in enumerate(zip(ids, tokens, strict=True)):
                if token_id not in self.texts:
                    self.texts[token_id] = text if self.token_text is None else self.token_text(token_id)
                if self.texts[token_id] != text:
                    own[t] = text
        text = _cut(response.rollout.text, TEXT_CHARS)
        return {"prompt": _cut(response.prompt, PROMPT_CHARS), "text": text, "own": own}


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} \u2026 ({len(text) - limit:,} characters left out)"

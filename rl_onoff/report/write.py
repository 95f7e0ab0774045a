"""Writes the page while the responses stream by: summary first, then packed chunks, then their index."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

import numpy as np

from rl_onoff.compare import Metric
from rl_onoff.report.pack import TOP_LIMITS, ReportResponse, pack_json, pack_tokens
from rl_onoff.rundir.files import whole
from rl_onoff.types import Key, TokenScores

CHUNK_RESPONSES = 32
CHUNK_TOKENS = 8_000
BUDGET_BYTES = 42_000_000  # of packed responses, 56 MB in base64, whatever the run: top lists are cut, then responses
NUM_WORST = 100  # worst tokens kept per target
GUESSED_TOKENS = 2_000_000  # when nobody says how many are to come
PROMPT_CHARS = 8_000  # of a prompt that are embedded
TEXT_CHARS = 100_000  # of a response's text that are embedded, for search; its tokens are all there
# `mean` and `worst` are, per target, the mean l and the largest |l|, or with nothing to compare the behaviour's mean
# logprob and minus its lowest. `context` of the `length` tokens were not sampled and are in neither number.
COLUMNS = ("id", "sample", "chunk", "length", "context", "reward", "finish", "groups", "mean", "worst")
SAFE = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})  # none could end <script> or open a comment
SCRIPTS = (
    "base.js", "codec.js", "plots.js", "metrics.js", "findings.js", "acceptance.js", "attribution.js", "layers.js",
    "plots_page.js", "steps.js", "colours.js", "filters.js", "responses.js", "panel.js", "worst.js", "main.js",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportInput:
    """The whole page. `responses` is read once, in order, and never held as a whole.

    A policy is a dict of facts, shown in the order given; the first is the behaviour and all after it are targets,
    unless `role` ("behaviour" or "target") says otherwise. `name` is what the page calls it; else engine, model, dtype.
    A comparison is `Comparison.to_dict()` of one target, any part of which may be missing, and its `name`.
    """

    title: str
    verdict: str
    policies: Sequence[Mapping[str, Any]]
    responses: Iterable[ReportResponse]
    comparisons: Sequence[Mapping[str, Any]] = ()
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    token_text: Callable[[int], str] | None = None  # of a token id; None: ids outside the responses are numbers
    attribution: Mapping[str, Any] | None = None  # Attribution.to_dict(): why the gap is there; None: nobody asked
    layers: Mapping[str, Any] | None = None  # Layers.to_dict(): where in the network they part; None: nobody asked
    acceptance: Mapping[str, Any] | None = None  # Acceptance.to_dict(): fit to be trained? None: nobody asked
    num_responses: int | None = None  # to come; where known, those that the page has no room for are not read at all


def write_report(path: str | Path, report: ReportInput, *, budget_bytes: int = BUDGET_BYTES) -> Path:
    """Write the page and return its path. The file appears whole or not at all."""
    script = "\n".join(["(() => {", '"use strict";', *map(page_file, SCRIPTS), "})();"])
    script_hash = base64.b64encode(hashlib.sha256(script.encode("ascii")).digest()).decode("ascii")
    head, tail = page_file("page.html").split("<!-- data -->")
    head = head.replace("/* script hash */", script_hash).replace("/* style */", page_file("page.css"))
    known = {name for comparison in report.comparisons for name in comparison.get("overall", {})}
    metrics = {name: asdict(metric) for name, metric in report.metrics.items() if name in known}
    names = ("title", "verdict", "policies", "comparisons", "attribution", "layers", "acceptance")
    counts: Mapping[str, Any] = report.comparisons[0].get("counts", {}) if report.comparisons else {}
    bytes_per_token = budget_bytes / max(counts.get("tokens", GUESSED_TOKENS), 1)
    with whole(Path(path)) as part, part.open("w", encoding="ascii", errors="xmlcharrefreplace", newline="\n") as out:
        out.write(head.replace("<!-- title -->", html.escape(report.title)))
        _write_script(out, "summary", {name: getattr(report, name) for name in names} | {"metrics": metrics})
        aside = [frozenset(comparison.get("set_aside") or ()) for comparison in report.comparisons]
        chunks = _Chunks(out, report.token_text, aside, bytes_per_token, budget_bytes)
        responses, left_out = iter(report.responses), 0
        for batch in _batches(responses):
            chunks.write(batch)
            if chunks.bytes_left <= 0:
                total = report.num_responses
                left_out = sum(1 for _ in responses) if total is None else max(total - len(chunks.rows), 0)
                break
        _write_script(out, "index", chunks.index() | {"left_out": left_out, "cut_chunks": chunks.num_cut})
        table = {"ids": list(chunks.texts), "texts": list(chunks.texts.values())}
        _write_script(out, "token-table", pack_json(table))
        out.write(tail.replace("/* script */", script))
    return Path(path)


def page_file(name: str) -> str:
    text = resources.files("rl_onoff.report").joinpath("page", name).read_text(encoding="utf-8")
    assert text.isascii(), f"{name} must be ASCII, so that no server's charset can break the page"
    return text


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


def _write_script(out: IO[str], name: str, value: Any) -> None:
    """A script element of data: packed bytes in base64, all else as JSON."""
    if isinstance(value, bytes):
        kind, text = "text/plain", base64.b64encode(value).decode("ascii")
    else:
        text = json.dumps(plain(value), separators=(",", ":"), allow_nan=False).translate(SAFE)
        kind = "application/json"
    out.write(f'<script type="{kind}" id="{name}">{text}</script>\n')


def _batches(responses: Iterable[ReportResponse]) -> Iterator[list[ReportResponse]]:
    """The responses of one chunk at a time, in a list that is emptied after use."""
    batch: list[ReportResponse] = []
    for response in responses:
        batch.append(response)
        if len(batch) >= CHUNK_RESPONSES or sum(len(r.tokens) for r in batch) >= CHUNK_TOKENS:
            yield batch
            batch.clear()
    if batch:
        yield batch


@dataclass
class _Chunks:
    """Writes chunks, cutting top lists where a run would make the file too large, and collects their index.

    Every chunk may use its tokens' share of the budget and what earlier ones saved; the limit tightens until it fits.
    """

    out: IO[str]
    token_text: Callable[[int], str] | None
    set_aside: Sequence[Collection[str]]  # by target: `request id/sample` of responses that are in no number
    bytes_per_token: float
    bytes_left: float
    saved: float = 0.0
    level: int = 0
    num_chunks: int = 0
    num_cut: int = 0
    texts: dict[int, str] = field(default_factory=dict)  # of token ids
    rows: list[tuple[Any, ...]] = field(default_factory=list)  # COLUMNS of every response
    # of each target: size, minus the numbers of the response and the token, log q, log p
    worst_tokens: dict[int, list[tuple[float, ...]]] = field(default_factory=dict)
    has_behaviour: bool = False
    has_targets: bool = False

    def write(self, responses: Sequence[ReportResponse]) -> None:
        responses = [response.only_comparable() for response in responses]
        budget = self.bytes_per_token * sum(int((~r.context_T).sum()) for r in responses)
        allowance = budget + self.saved / 4  # a quarter: limits that change slowly
        if self.saved > budget:
            self.level = max(self.level - 1, 0)
        texts = pack_json([self._add(response) for response in responses])
        data, ids = pack_tokens(responses, TOP_LIMITS[self.level])
        while len(texts) + len(data) > allowance and self.level + 1 < len(TOP_LIMITS):
            self.level += 1
            data, ids = pack_tokens(responses, TOP_LIMITS[self.level])
        size = len(texts) + len(data)
        self.saved += budget - size
        self.bytes_left -= size
        self.num_cut += self.level > 0
        if self.token_text is not None:
            for token_id in set(ids.tolist()) - self.texts.keys():
                self.texts[token_id] = self.token_text(token_id)
        _write_script(self.out, f"texts-{self.num_chunks}", texts)
        _write_script(self.out, f"tokens-{self.num_chunks}", data)
        self.num_chunks += 1

    def _add(self, response: ReportResponse) -> dict[str, Any]:
        """Put a response into the index; returns its texts, `own` those of its tokens that are not the one in the table
        (part of a character).
        """
        rollout, finish, own = response.rollout, response.rollout.finish_reason, {}
        ids = rollout.token_ids_T.tolist()
        if len(ids) != len(response.tokens):
            raise ValueError(f"a response has {len(ids)} token ids and {len(response.tokens)} token texts")
        for t, (token_id, text) in enumerate(zip(ids, response.tokens, strict=True)):
            if token_id not in self.texts:
                self.texts[token_id] = text if self.token_text is None else self.token_text(token_id)
            if self.texts[token_id] != text:
                own[t] = text
        targets = enumerate(response.targets or (None,))
        numbers = [self._numbers(i, rollout.key, response.behaviour, target) for i, target in targets]
        means, worst = zip(*numbers, strict=True)
        lengths = (len(ids), int(response.context_T.sum()))
        named = (rollout.request_id, rollout.sample, self.num_chunks, *lengths, rollout.reward)
        self.rows.append((*named, "" if finish is None else finish.value, response.groups, means, worst))
        self.has_behaviour |= response.behaviour is not None
        self.has_targets |= bool(response.targets)
        return {"prompt": _cut(response.prompt, PROMPT_CHARS), "text": _cut(rollout.text, TEXT_CHARS), "own": own}

    def _numbers(self, i: int, key: Key, *sides: TokenScores | None) -> tuple[float | None, float | None]:
        """A response's mean and worst number between behaviour and target i, whose worst tokens are kept."""
        worst = self.worst_tokens.setdefault(i, [])
        if i < len(self.set_aside) and "{}/{}".format(*key) in self.set_aside[i]:
            return None, None
        q_T, p_T = (None if side is None else np.asarray(side.logprobs_T, np.float64) for side in sides)
        with np.errstate(invalid="ignore"):
            shown_T = p_T - q_T if p_T is not None and q_T is not None else q_T if p_T is None else p_T
        assert shown_T is not None
        size_T = np.nan_to_num(np.abs(shown_T), nan=-1.0, posinf=1e9)
        least = worst[-1][0] if len(worst) == NUM_WORST else 0.0
        for t in np.argsort(-size_T, kind="stable")[: min(NUM_WORST, int((size_T > least).sum()))]:
            q, p = (math.nan if side_T is None else float(side_T[t]) for side_T in (q_T, p_T))
            worst.append((float(size_T[t]), -len(self.rows), -int(t), q, p))
        worst.sort(reverse=True)
        del worst[NUM_WORST:]
        known_T = shown_T[~np.isnan(shown_T)]
        if not len(known_T):
            return None, None
        return float(f"{known_T.mean():.6g}"), float(f"{np.abs(known_T).max():.6g}")

    def index(self) -> dict[str, Any]:
        """Columns with one entry per response, and the worst tokens of every target."""
        found: dict[str, Any] = {name: [row[i] for row in self.rows] for i, name in enumerate(COLUMNS)}
        if not any(found["context"]):
            del found["context"]
        groups = {}
        for name in dict.fromkeys(name for of in found["groups"] for name in of):
            values = [of.get(name) for of in found["groups"]]
            names = sorted({value for value in values if value is not None})
            code = {None: -1, **{value: i for i, value in enumerate(names)}}
            groups[name] = {"values": names, "codes": [code[value] for value in values]}
        found |= {"groups": groups} | {name: list(zip_longest(*found[name])) for name in ("mean", "worst")}
        found["worst_tokens"] = [[[-r, -t, q, p] for _, r, t, q, p in worst] for worst in self.worst_tokens.values()]
        return found | {"has_behaviour": self.has_behaviour, "has_targets": self.has_targets}


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} \u2026 ({len(text) - limit:,} characters left out)"

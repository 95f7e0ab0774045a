"""What was measured of a model on an engine -> one line: pass or fail, with the number and its bar. Pure functions.

Shapes: T response tokens, K top tokens. A number that is not finite fails, whatever the bar.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rl_onoff.analysis_config import Check
from rl_onoff.compare.metrics import token_terms
from rl_onoff.errors import plural
from rl_onoff.types import Rollout, TokenScores

PASS, FAIL, NOT_TRIED = "pass", "fail", "not tried"
ROUNDING = 1e-3  # nats: what a logprob and an entropy may be off, so that a model without doubts passes
NEUTRAL: Mapping[str, Collection[Any]] = {  # of generation_config.json: the values that change nothing
    "temperature": (None, 1), "top_p": (None, 1), "top_k": (None, 0, -1), "min_p": (None, 0), "typical_p": (None, 1),
    "repetition_penalty": (None, 1), "presence_penalty": (None, 0), "frequency_penalty": (None, 0),
    "no_repeat_ngram_size": (None, 0),
}  # fmt: skip
CAUSE = "find the cause: experiment=onoff with this backend and target, then experiment=attribute on its run_dir"
FIXES: Mapping[Check, str] = {
    Check.template: "send the ids that the tokenizer's own chat template gives, with one BOS",
    Check.round_trip: "train on ids, not on text",
    Check.eos: "name the same end tokens in config.json, generation_config.json and the tokenizer",
    Check.sampling: "turn off what the engine does to the distribution at temperature 1: a top-k, a penalty, a default",
    Check.decode: CAUSE,
    Check.decode_long: CAUSE,
    Check.batch: "score one response at a time or turn on the engine's batch-invariant kernels",
    Check.cache: "turn off the engine's prefix cache",
    Check.head: "mask these rows while sampling, or cut the LM head to the tokenizer's size",
    Check.greedy: CAUSE,
    Check.truth: CAUSE,
}
Ids = Sequence[int]
Said = Rollout | TokenScores  # who says a response's logprobs


class NotTried(Exception):
    """A check does not apply; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One check. `value` is None where it is not finite or there is none; `said` is the reason of a line not tried."""

    check: Check
    outcome: str
    value: float | None = None
    bar: float | None = None
    said: str
    fix: str | None = None  # of a line that failed


def judged(check: Check, value: float, bar: float, said: str, fix: str | None = None) -> Line:
    """Pass where the value is at most the bar; else `fix`, or what is usual for this check, says what to do."""
    finite = value if math.isfinite(value) else None
    if value <= bar:
        return Line(check=check, outcome=PASS, value=finite, bar=bar, said=said)
    return Line(check=check, outcome=FAIL, value=finite, bar=bar, said=said, fix=fix or FIXES[check])


def template_line(sent: Sequence[Ids], told: Sequence[Ids], bos: int | None, *, template: bool | None) -> Line:
    """Prompts as they are sent, beside the tokenizer's own. `template`: whether it has one; None: none is asked for."""
    source = "the tokenizer's chat template" if template else "the tokenizer"
    differ = sum(list(a) != list(b) for a, b in zip(sent, told, strict=True))
    begins = {_leading(ids, bos) for ids in told}
    how = "as" if differ == 0 else "otherwise than"
    said = f"{differ or len(sent)} of {plural(len(sent), 'prompt')} sent {how} {source} says"
    if bos is not None:
        said += f", with {' or '.join(map(str, sorted(begins)))} BOS (id {bos}) in front"
    doubled, fix = max(begins, default=0) > 1, None
    if template is False:
        said = "the tokenizer has no chat template"
        fix = "set data.chat_template=false if prompts are meant to be plain text"
    return judged(Check.template, max(differ, len(sent) if doubled or template is False else 0), 0, said, fix)


def _leading(ids: Ids, token: int | None) -> int:
    return next((i for i, found in enumerate(ids) if found != token), len(ids))


def round_trip_line(ids: Sequence[Ids], again: Sequence[Ids]) -> Line:
    """The ids of prompts, beside the ids of their decoded text."""
    differ = sum(list(a) != list(b) for a, b in zip(ids, again, strict=True))
    said = "prompts that are decoded and encoded again have the same ids"
    if differ:
        said = f"{differ} of {plural(len(ids), 'prompt')} with other ids once decoded and encoded again"
    return judged(Check.round_trip, differ, 0, said)


def eos_line(ids: Mapping[str, Collection[int] | None], texts: Mapping[int, str]) -> Line:
    """What ends a response by `config`, `generation config`, `tokenizer`, `template` (its end of a turn) and `engine`;
    None where one says nothing. The engine must stop at all of them, and the generation config (the config, where there
    is none) must know those of config, tokenizer and template."""
    known = {source: set(of) for source, of in ids.items() if of is not None}
    settled = known.get("generation config", known.get("config", set())) or known["engine"]
    wrong = (set().union(*known.values()) - known["engine"]) | (
        set().union(*(known.get(source, ()) for source in ("config", "tokenizer", "template"))) - settled
    )
    said = "; ".join(f"{source} {', '.join(map(str, sorted(of))) or 'none'}" for source, of in known.items())
    if wrong:
        said += f": not everywhere {', '.join(f'{i} {texts.get(i, str())!r}' for i in sorted(wrong))}"
    return judged(Check.eos, len(wrong), 0, said)


def sampling_line(defaults: Mapping[str, Any], scores: Iterable[TokenScores], bar: float) -> Line:
    """Whether drawn tokens are as likely as draws from the whole distribution: their mean logprob is minus the mean
    entropy, within so many standard errors. The variance is that of the top tokens, and of all other tokens as if each
    were as likely as the last of those."""
    excess = variance = 0.0
    tokens = 0
    for each in scores:
        assert each.entropy_T is not None and each.top_logprobs_TK is not None
        entropy_T, top_TK = each.entropy_T.astype(np.float64), np.maximum(each.top_logprobs_TK.astype(np.float64), -100)
        rest_T = np.clip(1 - np.exp(top_TK).sum(-1), 0, 1)
        spread_TK = (top_TK + entropy_T[:, None]) ** 2
        excess += float((each.logprobs_T + entropy_T).sum())
        variance += float((np.exp(top_TK) * spread_TK).sum() + (rest_T * spread_TK[:, -1]).sum())
        tokens += len(entropy_T)
    z = abs(excess) / math.sqrt(variance + ROUNDING**2 * tokens)
    found = [f"{name}={defaults[name]}" for name, nothing in NEUTRAL.items() if defaults.get(name) not in nothing]
    said = f"an engine left to the checkpoint's defaults draws with {', '.join(found)}; " if found else ""
    miss = f"mean logprob {excess / tokens:+.2g} nats off minus the entropy"
    return judged(Check.sampling, z, bar, f"{said}{plural(tokens, 'draw')} at temperature 1, {miss}")


def k3_line(check: Check, pairs: Sequence[tuple[Said, Said]], bar: float, said: str) -> Line:
    """The mean k3 KL of the same responses' logprobs said twice, up to a token that a rounded draw made another."""
    sides: list[list[np.ndarray]] = [[np.zeros(0)], [np.zeros(0)]]
    for pair in pairs:
        ids = [side.token_ids_T[: min(len(side.token_ids_T) for side in pair)] for side in pair]
        same = int(np.append(ids[0] == ids[1], False).argmin())
        for logprobs, side in zip(sides, pair, strict=True):
            assert side.logprobs_T is not None
            logprobs.append(side.logprobs_T[:same])
    q_N, p_N = map(np.concatenate, sides)
    if not len(q_N):
        return judged(check, math.nan, bar, f"{said}: there is no token to compare")
    terms = token_terms(q_N, p_N)
    mean, worst = terms["logprob_diff_mean"].mean(), terms["logprob_diff_mean"].max()
    detail = f"{said}: mean |Δ| {mean:.2g}, worst {worst:.2g} of {plural(len(q_N), 'token')}"
    return judged(check, float(terms["kl_k3"].mean()), bar, detail)


def greedy_line(scores: Sequence[TokenScores], bar: float) -> Line:
    """Greedy tokens under the truth: up to the first that is not the truth's likeliest they are its own greedy ids. The
    number is how many nats less likely such a first one is, at most: rounding turns near ties, a fault turns more."""
    equal, lost = [], [0.0]
    for each in scores:
        assert each.rank_T is not None and each.top_logprobs_TK is not None
        at = int(np.append(each.rank_T > 1, True).argmax())
        equal.append(at / len(each.rank_T))
        lost += [float(each.top_logprobs_TK[at, 0] - each.logprobs_T[at])] if at < len(each.rank_T) else []
    said = f"{sum(share == 1 for share in equal)} of {plural(len(equal), 'prompt')} with the truth's greedy ids"
    said += f", together {np.mean(equal):.0%} of the tokens; the number is the nats lost where they part"
    return judged(Check.greedy, float(np.max(lost)), bar, said)


def head_line(rows: Collection[int], mass: float, positions: int, bar: float) -> Line:
    """The most probability, at any position, on rows of the LM head that stand for no token."""
    said = "every row of the LM head stands for a token"
    if rows:
        of = f"{plural(len(rows), 'row')} of the LM head, from {min(rows)} on"
        said = f"{of}, for no token; at {plural(positions, 'position')}"
    return judged(Check.head, mass, bar, said)

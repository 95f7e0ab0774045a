"""Checks of logprobs before they are judged: faults that make a comparison meaningless, or a few rows of it.

Each check is a pure function from the tokens of responses to a Finding, or None; `examine.py` runs them, and a
response's ids alone are looked at before (`row_checks.py`).

Shapes: S responses, N tokens of all of them one after the other; sampled tokens alone, in the order of the responses.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rl_onoff.compare.findings import Found, Sampled

ROUNDING = 1e-3  # nats above 0 that a logprob may be by rounding
SENTINEL = -99.0  # no sampler draws a token this unlikely twice at the same value: −100, −9999, −1e9 stand for "none"
ZERO_RUN = 8  # tokens with a logprob of exactly 0, one after the other
UNSURE = -0.5  # nats a token: what the other side says, on average, of tokens that are not certain
MIN_TOKENS = 32  # a pattern over fewer tokens may be chance
OTHER_KIND = "compare one kind: set compare.behaviour_kind and compare.target_kind to what the columns are"
PADDING_RUN = 4  # tokens of one id at the end of a response


def no_numbers(tokens: Sampled) -> Found:
    """Logprobs that are missing or +inf; −inf is a number: an impossible token."""
    bad_N = ~((tokens.behaviour_N < np.inf) & (tokens.target_N < np.inf))
    what = "the logprobs hold NaN, nothing or +inf"
    return tokens.finding("no_numbers", bad_N, what, "write every sampled token's logprob, and mask all other tokens")


def positive(tokens: Sampled) -> Found:
    """Logprobs above 0: probabilities, negative log-likelihoods, or a mask's filling."""
    bad_N, sides = np.zeros(len(tokens.token_ids_N), bool), []
    fix = "mask tokens that were not sampled"
    for side, logprobs_N in tokens.sides.items():
        high_N = logprobs_N > ROUNDING
        bad_N |= high_N
        sides += [side] if high_N.any() else []
        if high_N.any() and (logprobs_N >= 0).all():
            what = "probabilities" if logprobs_N.max() <= 1 + ROUNDING else "negative log-likelihoods"
            fix = f"give the {side}'s natural logarithms: these look like {what}"
    what = f"the {' and '.join(sides)} logprobs are above 0, which no logprob is"
    return tokens.finding("positive", bad_N, what, fix)


def sentinels(tokens: Sampled) -> Found:
    """Numbers that stand for "no logprob": very low, and the same in several tokens or without a fraction."""
    bad_N, seen = np.zeros(len(tokens.token_ids_N), bool), set()
    for logprobs_N in tokens.sides.values():
        low_N = (logprobs_N <= SENTINEL) & np.isfinite(logprobs_N)
        if not low_N.any():
            continue
        values, counts = np.unique(logprobs_N[low_N], return_counts=True)
        said = values[(counts > 1) | (values == np.round(values))]
        bad_N |= low_N & np.isin(logprobs_N, said)
        seen |= set(said.tolist())
    what = f"{', '.join(f'{value:g}' for value in sorted(seen)[:3])} stands where a logprob should"
    return tokens.finding("sentinels", bad_N, what, "mask the tokens that have no logprob")


def zero_runs(tokens: Sampled) -> Found:
    """One side exactly 0 for many tokens that the other side is unsure of: tool tokens, padding, skipped work."""
    bad_N, sides = np.zeros(len(tokens.token_ids_N), bool), []
    for side, other in (("behaviour", tokens.target_N), ("target", tokens.behaviour_N)):
        zero_N = tokens.sides[side] == 0
        for start, end in _runs(zero_N, tokens.ends_S) if zero_N.any() else ():
            if other[start:end].mean() < UNSURE:
                bad_N[start:end] = True
                sides.append(side)
    what = f"the {' and '.join(dict.fromkeys(sides))} logprobs are exactly 0 in runs of {ZERO_RUN} tokens or more"
    return tokens.finding("zero_runs", bad_N, what, "mask the tokens of tools and padding, or fill the column")


def same_columns(tokens: Sampled) -> Found:
    """Both columns equal to the last bit: one was copied from the other (verl's bypass mode), so they say nothing."""
    unsure = np.count_nonzero((tokens.behaviour_N < -ROUNDING) & np.isfinite(tokens.behaviour_N))
    same = len(tokens.recorded) == 2 and unsure >= MIN_TOKENS and np.array_equal(tokens.behaviour_N, tokens.target_N)
    what = "behaviour and target are equal to the last bit, so one is a copy of the other"
    fix = "let the trainer compute its own logprobs, or set target=huggingface to score the tokens here"
    return tokens.finding("same_columns", np.full(len(tokens.token_ids_N), same), what, fix, fatal=True)


def shifted(tokens: Sampled) -> Found:
    """One column fits the other a token earlier or later ten times better than at its place."""
    q_N, p_N = tokens.behaviour_N, tokens.target_N
    here = _median_gap(q_N, p_N)
    inside_N = np.ones(len(q_N) - 1, bool) if len(q_N) else np.zeros(0, bool)
    inside_N[tokens.ends_S[:-1] - 1] = False  # the last token of a response and the first of the next
    pairs = {-1: (q_N[:-1], p_N[1:]), 1: (q_N[1:], p_N[:-1])}
    for by, (one_N, two_N) in pairs.items():
        enough = np.count_nonzero(inside_N) >= MIN_TOKENS
        if enough and here > 0.01 and _median_gap(one_N[inside_N], two_N[inside_N]) < 0.1 * here:
            what = f"the behaviour's logprobs fit the target's shifted by {by:+d} token"
            fix = "shift one column: the logprob at t is that of the token at t"
            return tokens.finding("shifted", np.ones(len(q_N), bool), what, fix, fatal=True)
    return None


def copied(digests: Sequence[bytes], lengths_S: np.ndarray) -> np.ndarray:
    """Which responses stand in the data before, ids and logprobs alike, where nearly every one does: (S,)."""
    seen: dict[bytes, int] = {}
    copy_S = np.array([seen.setdefault(digest, s) != s for s, digest in enumerate(digests)], bool)
    chance = len(digests) < 4 or lengths_S.mean() < MIN_TOKENS / 2  # short answers are alike by chance
    return copy_S & (not chance and copy_S.sum() >= 0.45 * len(digests))


def copies(tokens: Sampled, copy_S: np.ndarray) -> Found:
    """Nearly every row stands in the data twice or more; the first of each is as good as it ever was."""
    what, fix = "rows are copies of earlier rows", "write every response once (a file for each rank may repeat them)"
    return tokens.finding("copies", copy_S[tokens.responses_N], what, fix)


def padding(tokens: Sampled) -> Found:
    """All responses of one length, ending in one and the same id with logprobs of exactly 0 on both sides."""
    starts_S, last_S = tokens.ends_S - tokens.lengths_S, tokens.token_ids_N[tokens.ends_S - 1]
    bad_N = np.zeros(len(tokens.token_ids_N), bool)
    if len(starts_S) < 2 or len(set(tokens.lengths_S.tolist())) > 1:
        return None
    filling = (tokens.behaviour_N == 0) & (tokens.target_N == 0)
    values, counts = np.unique(last_S, return_counts=True)
    pad, runs = values[counts.argmax()], set()
    for start, end in zip(starts_S, tokens.ends_S, strict=True):
        other = np.flatnonzero((tokens.token_ids_N[start:end] != pad) | ~filling[start:end])
        run = end - start - (other[-1] + 1 if len(other) else 0)
        if run >= PADDING_RUN:
            bad_N[end - run : end] = True
            runs.add(run)
    bad_N &= len(runs) > 1  # one length of padding may be one way to end
    what = f"the responses end in padding (token id {pad}, logprobs of 0)"
    return tokens.finding("padding", bad_N, what, "give a mask that leaves padding out", fatal=True)


def cut(tokens: Sampled) -> Found:
    """The behaviour hardly ever below the target: what top-p or top-k leaves, renormalised, against raw logprobs."""
    p_N, l_N = tokens.target_N, tokens.target_N - tokens.behaviour_N
    unsure_N = np.isfinite(l_N) & (p_N < np.log(0.6))  # where a cut takes something away
    if np.count_nonzero(unsure_N) < 2 * MIN_TOKENS:
        return None
    low, middle, high = np.quantile(l_N[unsure_N], (0.05, 0.5, 0.95))
    if middle > -0.02 or high > -0.2 * low:  # differences of engines and policies have two tails
        return None
    what = f"the behaviour's logprobs lie above the target's as after a cut that keeps {np.exp(middle):.2f} (top_p?)"
    return tokens.finding("cut", np.ones(len(p_N), bool), what, OTHER_KIND, fatal=True)


def temperature(tokens: Sampled) -> Found:
    """One side the other at a temperature: likely tokens are all likelier (T < 1) on that side.

    Of a token and the rest of the vocabulary the log-odds grow by 1/T where the rest is one token, and by more where
    there are several: T comes from the least they grow by.
    """
    names = ("behaviour", "target")
    for sharp, flat in (names, names[::-1]):
        fit_N = (tokens.sides[flat] > np.log(0.6)) & (tokens.sides[flat] < np.log(0.98))
        sharp_N, flat_N = (np.asarray(tokens.sides[side][fit_N], np.float64) for side in (sharp, flat))
        gap_N = sharp_N - flat_N
        if len(gap_N) < 2 * MIN_TOKENS or (gap_N > 0).mean() < 0.98 or np.median(gap_N) < 0.02:
            continue
        odds = [x - np.log1p(-np.exp(np.minimum(x, -1e-6))) for x in (sharp_N, flat_N)]
        known = 1 / float(np.quantile((odds[0] / odds[1])[flat_N > np.log(0.75)], 0.1))
        what = (
            f"the {sharp}'s logprobs are the {flat}'s at a temperature of {known:.2g}, or those its at {1 / known:.2g}"
        )
        return tokens.finding("temperature", np.ones(len(tokens.target_N), bool), what, OTHER_KIND, fatal=True)
    return None


def _median_gap(q_N: np.ndarray, p_N: np.ndarray) -> float:
    gap_N = np.abs(q_N - p_N, where=np.isfinite(q_N) & np.isfinite(p_N), out=np.full(len(q_N), np.inf))
    return float(np.median(gap_N)) if len(gap_N) else 0.0


def _runs(true_N: np.ndarray, ends_S: np.ndarray) -> list[tuple[int, int]]:
    """Stretches of ZERO_RUN true values or more, each within one response."""
    before_N, after_N = np.roll(true_N, 1), np.roll(true_N, -1)
    before_N[np.append(0, ends_S[:-1])] = after_N[ends_S - 1] = False
    starts, ends = np.flatnonzero(true_N & ~before_N), np.flatnonzero(true_N & ~after_N) + 1
    long = ends - starts >= ZERO_RUN
    return list(zip(starts[long].tolist(), ends[long].tolist(), strict=True))

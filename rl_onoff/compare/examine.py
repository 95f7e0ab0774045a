"""All checks (`checks.py`) over all responses: rows that a check names are set aside as long as they are few; what
concerns many rows, or the file as a whole, is fatal: no number of the comparison means anything then.

Shapes: S responses, in blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from rl_onoff.compare.checks import (
    copied,
    copies,
    cut,
    no_numbers,
    padding,
    positive,
    same_columns,
    sentinels,
    shifted,
    temperature,
    zero_runs,
)  # fmt: skip
from rl_onoff.compare.findings import Finding, Found, Sampled, counted, is_many

SAMPLE = 1 << 22  # tokens in which patterns are looked for
ROWS: tuple[Callable[[Sampled], Found], ...] = (no_numbers, positive, sentinels, zero_runs)
WHOLE: tuple[Callable[[Sampled], Found], ...] = (padding, same_columns, shifted, cut, temperature)


def examine(tokens: Sampled) -> tuple[list[Finding], np.ndarray]:
    """All findings, and which responses are worth comparing: (S,). After a fatal finding nothing is.

    Patterns over the whole are looked for only where another program wrote a side: what our engines give is known.
    """
    return examine_blocks(lambda: iter([tokens]), len(tokens.token_ids_N))


def examine_blocks(blocks: Callable[[], Iterator[Sampled]], num_tokens: int) -> tuple[list[Finding], np.ndarray]:
    """The same of blocks of responses. Of more than SAMPLE tokens, patterns other than copies are looked for in a
    random sample of the responses, of about so many tokens; every response is looked at for all else.
    """
    parts: list[list[tuple[Finding | None, np.ndarray]]] = [[] for _ in ROWS]
    rng, samples, digests, lengths = np.random.default_rng(0), [], [], []
    for block in blocks():
        kept_S = np.ones(len(block.lengths_S), bool)
        for check, of_check in zip(ROWS, parts, strict=True):
            found, bad_S = check(block.only(kept_S)) if kept_S.any() else None, np.zeros(len(kept_S), bool)
            if found is not None:
                bad_S[np.flatnonzero(kept_S)[found[1]]] = True
            of_check.append((found and found[0], bad_S))
            kept_S = kept_S & ~bad_S
        lengths.append(block.lengths_S)
        if block.recorded:
            some_S = rng.random(len(kept_S)) < SAMPLE / num_tokens if num_tokens > SAMPLE else kept_S
            samples.append(block.only(kept_S & some_S))
            digests += block.digests()
    lengths_S, findings = np.concatenate(lengths), []
    kept_S = np.ones(len(lengths_S), bool)
    for of_check in parts:
        if (finding := _joined([found for found, _ in of_check], int(kept_S.sum()))) is not None:
            findings.append(finding)
            if finding.fatal:
                return findings, kept_S
            kept_S &= ~np.concatenate([bad_S for _, bad_S in of_check])
    if not samples:
        return findings, kept_S
    sample = Sampled.joined(samples)
    for check in WHOLE:
        if (found := check(sample)) is not None:
            chosen = f", chosen at random from {len(lengths_S):,}" if num_tokens > SAMPLE else ""
            return [*findings, replace(found[0], what=found[0].what + chosen)], kept_S
    copy_S = np.zeros(len(kept_S), bool)
    copy_S[kept_S] = copied([digests[s] for s in np.flatnonzero(kept_S)], lengths_S[kept_S])
    if copy_S.any():
        ends = np.cumsum([len(each) for each in lengths])
        of_blocks = zip(blocks(), np.split(copy_S, ends[:-1]), np.split(kept_S, ends[:-1]), strict=True)
        found = [copies(block.only(kept), copy[kept]) for block, copy, kept in of_blocks]
        finding = _joined([each and each[0] for each in found], int(kept_S.sum()))
        findings += [replace(finding, fatal=False)] if finding else []
        kept_S &= ~copy_S
    return findings, kept_S


def _joined(parts: Sequence[Finding | None], of: int) -> Finding | None:
    """The findings of one check in the blocks as one, in the words of the first."""
    found = [part for part in parts if part is not None]
    if not found:
        return None
    tokens, responses = sum(each.tokens for each in found), sum(each.responses for each in found)
    what = counted(found[0].what.rpartition(": ")[0], tokens, responses, of)
    return replace(found[0], what=what, tokens=tokens, responses=responses, fatal=is_many(responses, of))

"""Checks of one response's token ids: whether the ids are those of its text, of the model, and of the other side.

Each is a pure function to what is wrong with the row, in words, empty where nothing is. `row_findings` counts the rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np

from rl_onoff.compare.findings import Finding, is_many
from rl_onoff.errors import plural
from rl_onoff.types import Key, Rollout

WINDOW = 8  # characters that are looked up together: two or three tokens
ALIKE = 0.5  # share of them that the text and the decoded ids have in common where the ids are the text's
SHOWN = 24  # characters of a text in a message
UNREADABLE = re.compile(r"[\s\ufffd]+")  # what decoding may add, take away, or lose where a character was cut

Fault = tuple[str, str]
"""The name of a check, and what is wrong with a row."""

FAULTS = {  # check -> what a finding says, and what to do
    "other_tokens": (
        "the two sides hold other tokens",
        "score the very token ids that were sampled, with the same tokenizer",
    ),
    "other_text": (
        "the token ids are not those of the text beside them",
        "set model, or compare.tokenizer, to what has the sampler's tokenizer, or leave the text out of the file",
    ),
    "outside_vocab": (
        "token ids lie past the last row of the target's model",
        "set model to the one that sampled, or score.responses to another file",
    ),
    "outside_tokenizer": (
        "token ids lie past the tokenizer's last token",
        "set model, or compare.tokenizer, to what has the sampler's tokenizer",
    ),
}


def other_tokens(behaviour_ids_T: np.ndarray, target_ids_T: np.ndarray) -> str:
    """Two sides of another length, or tokenised again."""
    q_T, p_T = np.asarray(behaviour_ids_T), np.asarray(target_ids_T)
    if len(q_T) != len(p_T):
        return f"{plural(len(q_T), 'token')} under the behaviour and {len(p_T)} under the target"
    at = np.flatnonzero(q_T != p_T)[:1].tolist()
    return "".join(f"token id {q_T[t]} at {t} under the behaviour and {p_T[t]} under the target" for t in at)


def other_text(rollout: Rollout, decode: Callable[..., str]) -> str:
    """Ids that decode to another text than the one beside them, with special tokens or without."""
    ids, text, read = rollout.token_ids_T.tolist(), rollout.text, ""
    if not text:
        return ""
    for skip in (True, False):
        read = decode(ids, skip_special_tokens=skip)
        if _alike(read, text) >= ALIKE:
            return ""
    return f"the ids read {read[:SHOWN]!r} and the text is {text[:SHOWN]!r}"


def outside_vocab(rollout: Rollout, vocab_size: float) -> str:
    """Ids that a model of so many rows has no row for."""
    for what, ids in (("response", rollout.token_ids_T), ("prompt", rollout.prompt_ids)):
        if (high := int(ids.max(initial=0))) >= vocab_size:
            return f"token id {high} in its {what}, and {vocab_size} rows"
    return ""


def row_findings(faults: Mapping[Key, Fault], num_responses: int) -> list[Finding]:
    """A finding for every check that some rows did not pass."""
    found = []
    for check, (what, fix) in FAULTS.items():
        rows = {key: said for key, (name, said) in faults.items() if name == check}
        if rows:
            key, first = next(iter(rows.items()))
            found.append(Finding(
                check=check, what=f"{what} in {len(rows):,} of {plural(num_responses, 'response')}", fix=fix,
                responses=len(rows), tokens=0, example="{}/{}: ".format(*key) + first,
                fatal=is_many(len(rows), num_responses),
            ))  # fmt: skip
    return found


def _alike(read: str, text: str) -> float:
    """The share of windows of characters that two texts have in common, of the one that has fewer: a text may be cut
    at a stop string, lack its reasoning, or hold the prompt as well.
    """
    read, text = (UNREADABLE.sub("", each) for each in (read, text))
    size = min(WINDOW, len(read), len(text))
    if not size:  # a special token or a cut character alone
        return float(len(text) < WINDOW)
    if read in text or text in read:
        return 1.0
    one, other = ({each[i : i + size] for i in range(len(each) - size + 1)} for each in (read, text))
    return len(one & other) / min(len(one), len(other))

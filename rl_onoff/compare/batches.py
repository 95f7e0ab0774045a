"""Pairs of one form, joined: what each of their tokens adds to the metrics.

Shapes: N tokens of all the batch's responses one after the other, T tokens of one response, K top tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from rl_onoff.compare.distributions import distribution_terms, topk_terms
from rl_onoff.compare.pair import Pair
from rl_onoff.types import LogprobKind


def reduce_logits(pair: Pair) -> tuple[Pair, dict[str, np.ndarray]]:
    """The exact terms of a pair with both sides' logits, and the pair without them: they are too large to wait in a batch."""
    q, p = pair.behaviour, pair.target
    exact: dict[str, np.ndarray] = {}
    if q.logits_TV is not None and p.logits_TV is not None:
        exact = distribution_terms(q.logits_TV, p.logits_TV, p.token_ids_T)
    return replace(pair, behaviour=replace(q, logits_TV=None), target=replace(p, logits_TV=None)), exact


def form(pair: Pair, exact: Mapping[str, np.ndarray]) -> tuple[Any, ...]:
    """Which arrays a pair has, and their widths: pairs of one form can be joined into one batch."""
    names = ("entropy_T", "rank_T", "top_ids_TK", "processed_logprobs_T", "nucleus_mass_T")
    arrays = [getattr(side, name) for side in (pair.behaviour, pair.target) for name in names]
    return bool(exact), *(None if array is None else array.shape[1:] for array in arrays)


def join(pairs: list[Pair], side: str, name: str) -> np.ndarray:
    return np.concatenate([np.asarray(getattr(getattr(pair, side), name)) for pair in pairs])


def optional_terms(pairs: list[Pair], is_exact: bool) -> dict[str, np.ndarray]:
    """The terms of whatever else both sides, or one of them, know of these tokens; no top-k bounds where the exact is known."""
    q, p = pairs[0].behaviour, pairs[0].target
    terms: dict[str, np.ndarray] = {}
    for name, attribute in (("entropy", "entropy_T"), ("rank", "rank_T")):
        for who, side in (("behaviour", q), ("target", p)):
            if getattr(side, attribute) is not None:
                terms[f"{name}_{who}"] = join(pairs, who, attribute).astype(np.float64)
    if "entropy_behaviour" in terms and "entropy_target" in terms:
        terms["entropy_diff"] = terms["entropy_target"] - terms["entropy_behaviour"]
    if q.nucleus_mass_T is not None:
        terms["nucleus_mass"] = join(pairs, "behaviour", "nucleus_mass_T").astype(np.float64)
    if p.nucleus_mass_T is not None:
        terms["nucleus_mass_target"] = join(pairs, "target", "nucleus_mass_T").astype(np.float64)
    if p.processed_logprobs_T is not None or p.kind is LogprobKind.processed:
        source = "logprobs_T" if p.processed_logprobs_T is None else "processed_logprobs_T"
        terms["impossible_fraction"] = np.isneginf(join(pairs, "target", source)).astype(np.float64)
        terms["_tokens_impossible_sampler"] = terms["impossible_fraction"]
    if q.top_ids_TK is not None and p.top_ids_TK is not None and not is_exact:
        terms |= _topk_terms(pairs)
    return terms


def _topk_terms(pairs: list[Pair]) -> dict[str, np.ndarray]:
    q, p = pairs[0].behaviour, pairs[0].target
    lists = [join(pairs, who, name) for who in ("behaviour", "target") for name in ("top_ids_TK", "top_logprobs_TK")]
    if (
        q.kind_of_distribution is q.kind and p.kind_of_distribution is p.kind
    ):  # else the logprobs are of another distribution
        lists += [
            join(pairs, "target", "token_ids_T"),
            join(pairs, "behaviour", "logprobs_T"),
            join(pairs, "target", "logprobs_T"),
        ]
    terms = topk_terms(*lists)
    for who, side in (("behaviour", q), ("target", p)):
        if side.entropy_T is not None:
            del terms[f"entropy_{who}_topk"]  # the exact one is known
    return terms

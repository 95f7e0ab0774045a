"""Metrics of two whole distributions at every position: exact from logits, or a lower bound from lists of top tokens.

Shapes: N tokens of some responses one after the other, T positions, V vocabulary, K top tokens of one side (the sides
may differ), A columns of a support. Each function returns terms, one a position, whose mean is the metric of that name;
see metrics.py. All distributions are raw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rl_onoff.compare.metrics import CLAMP, Metric, family
from rl_onoff.errors import UsageError
from rl_onoff.types import LogprobKind, TokenScores

DISTRIBUTION_METRICS: dict[str, Metric] = family(
    "Whole distributions",
    kl_forward_topk=Metric("KL(q‖p) on the shared top tokens and the rest; a lower bound", "nats", "lower",
                           "exact KL on top tokens (nats)", 2),
    kl_reverse_topk=Metric("KL(p‖q) on the shared top tokens and the rest; a lower bound", "nats", "lower"),
    js_topk=Metric("Jensen–Shannon divergence on the shared top tokens and the rest; a lower bound", "nats", "lower"),
    tv_topk=Metric("total variation on the shared top tokens and the rest; a lower bound", "probability", "lower"),
    kl_forward=Metric("KL(q‖p) over the whole vocabulary", "nats", "lower", "exact KL (nats)", 1),
    kl_reverse=Metric("KL(p‖q) over the whole vocabulary", "nats", "lower"),
    js=Metric("Jensen–Shannon divergence; at most ln 2", "nats", "lower"),
    tv=Metric("total variation, ½ Σ|p − q|", "probability", "lower"),
    mass_outside_behaviour=Metric("probability that the behaviour gives the rest", "probability", "lower"),
    mass_outside_target=Metric("probability that the target gives the rest", "probability", "lower"),
    entropy_behaviour=Metric("entropy of the behaviour's distribution", "nats", "none"),
    entropy_target=Metric("entropy of the target's distribution", "nats", "none"),
    entropy_diff=Metric("entropy of the target less that of the behaviour", "nats", "zero"),
    entropy_behaviour_topk=Metric("entropy of the behaviour on the same outcomes; a lower bound", "nats", "none"),
    entropy_target_topk=Metric("entropy of the target on the same outcomes; a lower bound", "nats", "none"),
    argmax_agreement=Metric("share of positions where both find the same token most likely", "fraction", "higher",
                            "same likeliest token", 2),
    topk_jaccard=Metric("common ids over all ids of the two lists of top tokens (k as stored; 20 from logits)",
                        "fraction", "higher"),
    rank_behaviour=Metric("rank of the sampled token under the behaviour, 1 = most likely", "rank", "none"),
    rank_target=Metric("rank of the sampled token under the target, 1 = most likely", "rank", "none"),
    nucleus_mass=Metric("probability that the behaviour's sampler keeps (top-k, top-p, min-p)", "probability", "one"),
    nucleus_mass_target=Metric("probability that the sampler keeps of the target's distribution", "probability", "one"),
    impossible_fraction=Metric("share of the sampled tokens that the target's sampler could not have drawn", "fraction",
                               "lower", "tokens impossible for target", 1),
)  # fmt: skip

CHUNK = 1 << 16  # numbers of one array worked on at a time: in float64 they stay in a core's cache


def optional_terms(q: TokenScores, p: TokenScores, kind: LogprobKind, is_exact: bool) -> dict[str, np.ndarray]:
    """The terms of what else the sides know of their tokens; no bounds where the exact is known."""
    known = {"entropy_behaviour": q.entropy_T, "entropy_target": p.entropy_T}
    known |= {"rank_behaviour": q.rank_T, "rank_target": p.rank_T}
    known |= {"nucleus_mass": q.nucleus_mass_T, "nucleus_mass_target": p.nucleus_mass_T}
    terms = {name: array.astype(np.float64) for name, array in known.items() if array is not None}
    if "entropy_behaviour" in terms and "entropy_target" in terms:
        terms["entropy_diff"] = terms["entropy_target"] - terms["entropy_behaviour"]
    if p.processed_logprobs_T is not None or kind is LogprobKind.processed:
        impossible_N = np.isneginf(p.logprobs_T if p.processed_logprobs_T is None else p.processed_logprobs_T)
        terms |= {"impossible_fraction": impossible_N, "_tokens_impossible_sampler": impossible_N}
    lists = [x for x in (q.top_ids_TK, q.top_logprobs_TK, p.top_ids_TK, p.top_logprobs_TK) if x is not None]
    if len(lists) == 4 and not is_exact:
        # where the sampled tokens' logprobs are not raw, they are of another distribution than the lists
        sampled = (p.token_ids_T, q.logprobs_T, p.logprobs_T) if kind is LogprobKind.raw else ()
        bounds = by_rows(topk_terms, *lists, *sampled)
        terms |= {name: term for name, term in bounds.items() if name.removesuffix("_topk") not in terms}
    return terms


def by_rows(function: Callable[..., dict[str, np.ndarray]], *arrays: np.ndarray) -> dict[str, np.ndarray]:
    """The function on some rows of the arrays at a time, so that its float64 copies stay small whatever T is."""
    num_rows, width = len(arrays[0]), max(array.shape[1] for array in arrays if array.ndim == 2)
    assert all(len(array) == num_rows for array in arrays)
    step = max(1, CHUNK // max(width, 1))
    parts = [function(*(array[at : at + step] for array in arrays)) for at in range(0, num_rows, step)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def distribution_terms(
    logits_q_TV: np.ndarray, logits_p_TV: np.ndarray, token_ids_T: np.ndarray | None = None, *, k: int = 20
) -> dict[str, np.ndarray]:
    """Exact divergences, entropies and agreement from both sides' logits or logprobs (any per-row constant cancels).

    With the sampled ids, also their rank: 1 + the number of tokens with a strictly larger logit.
    """
    size_q, size_p = logits_q_TV.shape[1], logits_p_TV.shape[1]
    if size_q != size_p:
        both = f"the logits of the two sides are over {size_q} and {size_p} tokens"
        raise UsageError(f"{both}: compare models with the same vocabulary")
    logq_TV, logp_TV = log_softmax(logits_q_TV), log_softmax(logits_p_TV)
    k = min(k, size_p)
    shared_T = _shared(*(np.argpartition(x_TV, -k, axis=1)[:, -k:] for x_TV in (logq_TV, logp_TV)))[0].sum(axis=1)
    q_TV, p_TV = np.exp(logq_TV), np.exp(logp_TV)
    terms = divergence_terms(logq_TV, logp_TV, q_TV, p_TV)
    terms |= {"entropy_behaviour": entropy(logq_TV, q_TV), "entropy_target": entropy(logp_TV, p_TV)}
    terms |= {"entropy_diff": terms["entropy_target"] - terms["entropy_behaviour"]}
    terms |= {"argmax_agreement": np.equal(logq_TV.argmax(axis=1), logp_TV.argmax(axis=1))}
    terms |= {"topk_jaccard": shared_T / (2 * k - shared_T)}
    if token_ids_T is not None:
        ids_T1 = np.asarray(token_ids_T, np.int64)[:, None]
        for name, logits_TV in (("rank_behaviour", logits_q_TV), ("rank_target", logits_p_TV)):
            terms[name] = 1.0 + (logits_TV > np.take_along_axis(logits_TV, ids_T1, axis=1)).sum(axis=1)
    return terms


def topk_terms(
    q_ids_TK: np.ndarray, q_logs_TK: np.ndarray, p_ids_TK: np.ndarray, p_logs_TK: np.ndarray,
    token_ids_T: np.ndarray | None = None, logq_T: np.ndarray | None = None, logp_T: np.ndarray | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """The same on a coarser set of outcomes: the ids in both lists, the sampled token, and one bucket for the rest.

    The sampled ids come with their logprobs under both sides, where those are of the lists' distributions.

    An id that only one side stored has an unknown probability on the other, so it belongs to the rest. Merging outcomes
    never raises a divergence (data-processing inequality), so each is a lower bound of the exact one. Negative ids are
    padding.
    """
    k = min(q_ids_TK.shape[1], p_ids_TK.shape[1])
    tiny = 8 * float(np.finfo(np.result_type(q_logs_TK, p_logs_TK)).eps)  # rounding of 1 − Σ
    sides = []
    for ids_TA, logs_TA, own_T in ((q_ids_TK, q_logs_TK, logq_T), (p_ids_TK, p_logs_TK, logp_T)):
        ids_TA, logs_TA = ids_TA.astype(np.int64), logs_TA.astype(np.float64)
        if token_ids_T is not None and own_T is not None:  # one more column, padding where the list has the token
            extra_T = np.where((ids_TA == token_ids_T[:, None]).any(axis=1), -1, token_ids_T.astype(np.int64))
            ids_TA, logs_TA = np.column_stack([ids_TA, extra_T]), np.column_stack([logs_TA, own_T])
        sides += [ids_TA, logs_TA]
    ids_q_TA, logs_q_TA, ids_p_TA, logs_p_TA = sides
    shared_TA, columns_p_TA = _shared(ids_q_TA, ids_p_TA)
    logs_p_TA = np.take_along_axis(logs_p_TA, columns_p_TA, axis=1)
    logs, probs = [], []
    for known_TA in (logs_q_TA, logs_p_TA):
        logs_TA = np.full((len(known_TA), known_TA.shape[1] + 1), -np.inf)
        np.copyto(logs_TA[:, :-1], known_TA, where=shared_TA)
        probs_TA = np.exp(logs_TA)
        # the rest: what they leave of 1, at least what rounding could have made of 0
        probs_TA[:, -1] = np.maximum(1 - probs_TA.sum(axis=1), tiny)
        logs_TA[:, -1] = np.log(probs_TA[:, -1])
        logs, probs = [*logs, logs_TA], [*probs, probs_TA]
    both_T = (shared_TA & (columns_p_TA < k))[:, :k].sum(axis=1)
    either_T = (q_ids_TK[:, :k] >= 0).sum(axis=1) + (p_ids_TK[:, :k] >= 0).sum(axis=1) - both_T
    rows_T = np.arange(len(both_T))
    agree_T = q_ids_TK[rows_T, q_logs_TK.argmax(axis=1)] == p_ids_TK[rows_T, p_logs_TK.argmax(axis=1)]
    exact = divergence_terms(*logs, *probs)
    terms = {name if name.startswith("_") else f"{name}_topk": term for name, term in exact.items()}
    for name, logs_TA, probs_TA in zip(("behaviour", "target"), logs, probs, strict=True):
        terms |= {f"entropy_{name}_topk": entropy(logs_TA, probs_TA), f"mass_outside_{name}": probs_TA[:, -1]}
    return terms | {"argmax_agreement": agree_T, "topk_jaccard": both_T / np.maximum(either_T, 1)}


def log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    """Logprobs in float64; an entry of −inf stays impossible."""
    logits_TV = np.asarray(logits_TV, np.float64)
    shifted_TV = logits_TV - logits_TV.max(axis=1, keepdims=True)
    return shifted_TV - np.log(np.exp(shifted_TV).sum(axis=1, keepdims=True))


def divergence_terms(
    logq_TA: np.ndarray, logp_TA: np.ndarray, q_TA: np.ndarray, p_TA: np.ndarray
) -> dict[str, np.ndarray]:
    """KL both ways, Jensen–Shannon and total variation of q and p on the same outcomes.

    KL(q‖p) is summed as q log(q/p) − q + p: the same number for distributions, and no term of it may be negative, so
    neither rounding nor probabilities that sum to 0.9999999 make it so. Where one side gives 0 and the other does not,
    the infinite log-ratio counts as ±20, and the position is counted.
    """
    middle_TA = 0.5 * (q_TA + p_TA)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio_TA = logq_TA - logp_TA
        log_middle_TA = np.log(middle_TA)
        to_q_TA, to_p_TA = q_TA * (logq_TA - log_middle_TA), p_TA * (logp_TA - log_middle_TA)
    infinite_TA = np.isinf(ratio_TA)
    if (infinite_T := infinite_TA.any(axis=1)).any():
        np.clip(ratio_TA, -CLAMP, CLAMP, out=ratio_TA, where=infinite_TA)
    np.copyto(ratio_TA, 0.0, where=middle_TA == 0)  # impossible on both sides: NaN, as below
    for to_TA, probs_TA in ((to_q_TA, q_TA), (to_p_TA, p_TA)):
        np.copyto(to_TA, 0.0, where=probs_TA == 0)
    gap_TA = p_TA - q_TA
    found: dict[str, Any] = {
        "kl_forward": np.maximum(q_TA * ratio_TA + gap_TA, 0.0).sum(axis=1),
        "kl_reverse": np.maximum(-p_TA * ratio_TA - gap_TA, 0.0).sum(axis=1),
        "js": np.maximum(0.5 * (to_q_TA + to_p_TA).sum(axis=1), 0.0),
        "tv": np.abs(0.5 * gap_TA).sum(axis=1),
        "_tokens_infinite_kl": infinite_T,
    }
    return found


def entropy(logq_TA: np.ndarray, q_TA: np.ndarray) -> np.ndarray:
    """−Σ q log q in nats, 0 log 0 = 0."""
    return -np.multiply(q_TA, logq_TA, out=np.zeros_like(q_TA), where=q_TA > 0).sum(axis=1)


def _shared(ids_q_TA: np.ndarray, ids_p_TB: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every column of the first list: is its id in the second, and in which column there (0 where it is not).

    One sort of (id, column) packed into an integer puts equal ids side by side; ids are unique within a list.
    """
    width_q, width = ids_q_TA.shape[1], ids_q_TA.shape[1] + ids_p_TB.shape[1]
    bits = width.bit_length()
    keys_TC = np.concatenate([ids_q_TA, ids_p_TB], axis=1)
    keys_TC = keys_TC.astype(np.int32 if keys_TC.max(initial=0) < 1 << (31 - bits) else np.int64) << bits
    keys_TC += np.arange(width, dtype=keys_TC.dtype)
    keys_TC.sort(axis=1)
    ids_TC = keys_TC >> bits
    rows, at = np.nonzero((ids_TC[:, 1:] == ids_TC[:, :-1]) & (ids_TC[:, 1:] >= 0))
    mask = (1 << bits) - 1
    columns_q, columns_p = keys_TC[rows, at] & mask, (keys_TC[rows, at + 1] & mask) - width_q
    shared_TA, columns_TA = np.zeros(ids_q_TA.shape, bool), np.zeros(ids_q_TA.shape, np.int64)
    shared_TA[rows, columns_q], columns_TA[rows, columns_q] = True, columns_p
    return shared_TA, columns_TA

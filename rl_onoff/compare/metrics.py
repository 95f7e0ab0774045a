"""The off-policy metrics of sampled tokens: arrays in, numbers out, float64.

Shapes: N tokens of all responses one after the other, S responses (sequences), `lengths_S` cuts N into responses.
`behaviour` (q) is the distribution that drew the tokens, `target` (p) the one they are scored under, l = log p − log q.

Almost every metric is a mean. `token_terms` and `sequence_terms` give the numbers to be averaged, under the metric's
own name; terms that start with an underscore are ingredients of metrics that are not means (a standard deviation, an
effective sample size), which `metrics_from_means` puts together: one formula for the whole, a group, and a resample.

Two rules for extreme numbers, both counted and reported beside the figures: exponents are clamped to ±20 before exp, as
verl does; an infinite log-ratio (one side says the token is impossible) counts as ±20.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

CLAMP = 20.0
PRIME_RL_BAR = 0.015
PERCENTILES = {"logprob_diff_p50": 50, "logprob_diff_p95": 95, "logprob_diff_p99": 99, "logprob_diff_max": 100}  # |l|


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """The knobs of the rules whose effect the metrics count; the defaults are those in common use."""

    eps_low: float = 0.2  # PPO clips ratios under 1 − eps_low
    eps_high: float = 0.2  # … and over 1 + eps_high
    token_cap: float = 2.0  # token-level truncated importance sampling caps ratios here
    sequence_cap: float = 2.0  # the same for a response's ratio; a sequence mask drops what is outside [1/cap, cap]
    geometric_cap: float = 1.001  # geometric-mean rejection drops those outside [1/cap, cap] (verl: 1.0002 to 1.001)
    ess_cap: float = 2.0  # the clamped ESS limits weights to [1/cap, cap], as verl does


DEFAULT_THRESHOLDS = Thresholds()


@dataclass(frozen=True, slots=True)
class Metric:
    """What a metric says: all that a page, a table or W&B is told of it stands here, beside its formula."""

    description: str
    unit: str
    better: str  # lower, higher, zero, one, or none (it only describes)
    label: str = ""  # in a few words; the name where there is none
    headline: int = 0  # 0: among all metrics alone; 1: in the summary, on W&B; 2: in a matrix's cells; 3: a table of it
    bar: float | None = None  # the value the field accepts, where it has agreed on one
    family: str = ""  # the heading it stands under


def family(heading: str, **metrics: Metric) -> dict[str, Metric]:
    return {name: replace(metric, family=heading) for name, metric in metrics.items()}


TOKEN_METRICS: dict[str, Metric] = family(
    "Divergence of the sampled tokens",
    kl=Metric("k1 estimate of KL(q‖p): mean of −l; may be negative", "nats", "zero", "KL, k1 estimate (nats)", 1),
    kl_k2=Metric("k2 estimate of KL(q‖p): mean of ½ l²", "nats", "lower"),
    kl_k3=Metric("k3 estimate of KL(q‖p): mean of rho − 1 − l; prime-rl's mismatch KL", "nats", "lower",
                 "KL, k3 estimate (nats)", 3, bar=PRIME_RL_BAR),
    chi2_token=Metric("mean of rho² − 1: χ² divergence by token", "", "lower"),
    chi2_seq=Metric("mean of (exp Σl)² − 1: χ² divergence by response", "", "lower"),
) | family(
    "Difference of log-probability and probability",
    logprob_diff_mean=Metric("mean of |l| of a token", "nats", "lower", "mean |log p - log q|", 2),
    logprob_diff_max=Metric("largest |l| of any token", "nats", "lower", "max |log p - log q|", 3),
    logprob_diff_p50=Metric("median of |l|", "nats", "lower"),
    logprob_diff_p95=Metric("95th percentile of |l|", "nats", "lower"),
    logprob_diff_p99=Metric("99th percentile of |l|", "nats", "lower"),
    prob_diff_mean=Metric("mean of |p(y) − q(y)|", "probability", "lower"),
    prob_diff_max=Metric("largest |p(y) − q(y)| of any token", "probability", "lower"),
    prob_diff_std=Metric("standard deviation of |p(y) − q(y)|", "probability", "lower"),
    prob_pearson=Metric("Pearson correlation of p(y) and q(y); none where either is constant", "correlation", "one",
                        "correlation of p and q", 1),
    mult_prob_error=Metric("mean of exp|l|, NeMo-RL's multiplicative probability error", "ratio", "one"),
) | family(
    "Importance weights",
    is_ratio_mean_token=Metric("mean importance ratio rho of a token", "ratio", "one"),
    is_ratio_std_token=Metric("standard deviation of rho", "ratio", "lower"),
    is_ratio_min_token=Metric("smallest rho", "ratio", "one"),
    is_ratio_max_token=Metric("largest rho", "ratio", "one"),
    is_ratio_mean_seq=Metric("mean importance ratio exp Σl of a response", "ratio", "one"),
    is_ratio_std_seq=Metric("standard deviation of the responses' ratios", "ratio", "lower"),
    is_ratio_min_seq=Metric("smallest ratio of a response", "ratio", "one"),
    is_ratio_max_seq=Metric("largest ratio of a response", "ratio", "one"),
    ess_token=Metric("effective share of the tokens, (Σw)² / (N Σw²) with w = rho", "fraction", "higher",
                     "effective sample, tokens", 3),
    ess_seq=Metric("effective share of responses, w = exp Σl", "fraction", "higher", "effective sample, sequences", 3),
    ess_token_clamped=Metric("ess_token with weights in [1/τ, τ] as verl reports it; overstates", "fraction", "higher"),
    ess_seq_clamped=Metric("ess_seq with weights in [1/τ, τ] as verl reports it; overstates", "fraction", "higher"),
    fraction_outside=Metric("share of tokens with rho outside PPO's clip range", "fraction", "lower"),
    masked_fraction_token_tis=Metric("share of tokens that token-level truncated IS would cap", "fraction", "lower"),
    masked_fraction_sequence_tis=Metric("share of responses that sequence truncated IS would cap", "fraction", "lower"),
    masked_fraction_sequence_mask=Metric("share of responses that a sequence mask would drop", "fraction", "lower"),
    masked_fraction_geometric=Metric("share of responses that geometric rejection would drop", "fraction", "lower"),
    cumulative_l=Metric("mean over responses of Σ l up to a position: drift with length", "nats", "zero"),
) | family(
    "Perplexity",
    ppl_behaviour=Metric("perplexity of a response under the behaviour, mean over responses", "perplexity", "none"),
    ppl_target=Metric("perplexity of a response under the target, mean over responses", "perplexity", "none"),
    log_ppl_diff_mean=Metric("log perplexity under target less behaviour, mean over responses", "nats", "zero"),
    log_ppl_diff_abs=Metric("mean over responses of |log perplexity difference|", "nats", "lower"),
    log_ppl_diff_min=Metric("smallest log perplexity difference of a response", "nats", "zero"),
    log_ppl_diff_max=Metric("largest log perplexity difference of a response", "nats", "zero"),
    ppl_ratio=Metric("perplexity under the target over that under the behaviour, mean over responses", "ratio", "one",
                     "perplexity ratio", 1),
)  # fmt: skip


def finite_logprobs(logq_N: np.ndarray, logp_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in float64, with −inf as the other side's less 20, so that l is ±20; where both are −inf, l is 0."""
    logq_N, logp_N = np.asarray(logq_N, np.float64), np.asarray(logp_N, np.float64)
    no_q_N, no_p_N = np.isneginf(logq_N), np.isneginf(logp_N)
    if not (no_q_N.any() or no_p_N.any()):
        return logq_N, logp_N
    finite_logq_N = np.where(no_q_N, np.where(no_p_N, 0.0, logp_N) - CLAMP, logq_N)
    return finite_logq_N, np.where(no_p_N, np.where(no_q_N, 0.0, logq_N) - CLAMP, logp_N)


def log_ratios(logq_N: np.ndarray, logp_N: np.ndarray) -> np.ndarray:
    """l of every token, never infinite."""
    logq_N, logp_N = finite_logprobs(logq_N, logp_N)
    return logp_N - logq_N


def token_terms(
    logq_N: np.ndarray, logp_N: np.ndarray, thresholds: Thresholds = DEFAULT_THRESHOLDS
) -> dict[str, np.ndarray]:
    """What every token adds to the token-level metrics, (N,) each; their mean over tokens is the metric.

    k1, k2, k3 after Schulman, "Approximating KL divergence"; the rest as verl's rollout_corr, TRL, NeMo-RL, prime-rl.
    """
    l_N, no_q_N, no_p_N = log_ratios(logq_N, logp_N), np.isneginf(logq_N), np.isneginf(logp_N)
    weights = _weight_terms("token", l_N, thresholds.ess_cap)
    excess_N = weights["_excess_token"]  # rho − 1
    q_N, p_N = (np.exp(np.asarray(x_N, np.float64)) for x_N in (logq_N, logp_N))
    diff_N, outside_N = np.abs(p_N - q_N), (excess_N < -thresholds.eps_low) | (excess_N > thresholds.eps_high)
    terms = {"kl": -l_N, "kl_k2": 0.5 * l_N**2, "kl_k3": np.maximum(excess_N - l_N, 0.0)}
    terms |= {"logprob_diff_mean": np.abs(l_N), "prob_diff_mean": diff_N, "mult_prob_error": _exp(np.abs(l_N))}
    terms |= {"fraction_outside": outside_N, "masked_fraction_token_tis": excess_N > thresholds.token_cap - 1}
    terms |= weights | {"_prob_diff2": diff_N**2, "_q": q_N, "_p": p_N}
    terms |= {"_qq": q_N * q_N, "_pp": p_N * p_N, "_pq": p_N * q_N}
    terms |= {"_tokens_clamped": (no_q_N != no_p_N) | (np.abs(l_N) > CLAMP)}
    return terms | {"_tokens_impossible_behaviour": no_q_N, "_tokens_impossible_target": no_p_N}


def sequence_terms(
    logq_N: np.ndarray, logp_N: np.ndarray, lengths_S: np.ndarray, thresholds: Thresholds = DEFAULT_THRESHOLDS
) -> dict[str, np.ndarray]:
    """What every response adds to the sequence-level metrics, (S,) each; their mean over responses is the metric.

    Perplexities, ratios and rejection rules as in verl's rollout_corr_helper. Every length must be at least 1.
    """
    logq_N, logp_N = finite_logprobs(logq_N, logp_N)
    sum_S, log_cap = segment_sums(logp_N - logq_N, lengths_S), np.log(thresholds.sequence_cap)
    diff_S = -sum_S / lengths_S  # log ppl(p) − log ppl(q)
    ppl_q_S, ppl_p_S = (_exp(-segment_sums(x_N, lengths_S) / lengths_S) for x_N in (logq_N, logp_N))
    terms = {"ppl_behaviour": ppl_q_S, "ppl_target": ppl_p_S}
    terms |= {"log_ppl_diff_mean": diff_S, "log_ppl_diff_abs": np.abs(diff_S), "ppl_ratio": _exp(diff_S)}
    terms |= {"masked_fraction_sequence_tis": sum_S > log_cap, "masked_fraction_sequence_mask": np.abs(sum_S) > log_cap}
    terms |= {"masked_fraction_geometric": np.abs(diff_S) > np.log(thresholds.geometric_cap)}
    return terms | _weight_terms("seq", sum_S, thresholds.ess_cap) | {"_responses_clamped": np.abs(sum_S) > CLAMP}


def metrics_from_means(means: Mapping[str, np.ndarray | float]) -> dict[str, np.ndarray]:
    """Metrics from the means of their terms; means may have any shape (one number, or one for every resample)."""
    m = {name: np.asarray(mean, np.float64) for name, mean in means.items()}
    metrics = {name: mean for name, mean in m.items() if not name.startswith("_")}
    for level in ("token", "seq"):
        if f"_w2_{level}" in m:
            mean, square = m[f"is_ratio_mean_{level}"], m[f"_w2_{level}"]
            excess, excess_square = m[f"_excess_{level}"], m[f"_excess2_{level}"]
            # A variance is E x² − (E x)² about any origin; far from it digits cancel, so take the nearer of 0 and 1.
            variance = np.where(mean < 0.5, square - mean**2, excess_square - excess**2)
            metrics[f"is_ratio_std_{level}"] = np.sqrt(np.maximum(variance, 0))
            metrics[f"chi2_{level}"] = 2 * excess + excess_square
            # (E w)² ≤ E w², and rounding may not lift their ratio over 1
            metrics[f"ess_{level}"] = np.minimum(mean**2 / square, 1.0)
            metrics[f"ess_{level}_clamped"] = np.minimum(m[f"_limited_{level}"] ** 2 / m[f"_limited2_{level}"], 1.0)
    if "_prob_diff2" in m:
        metrics["prob_diff_std"] = np.sqrt(np.maximum(m["_prob_diff2"] - m["prob_diff_mean"] ** 2, 0))
        var_q, var_p, cov = m["_qq"] - m["_q"] ** 2, m["_pp"] - m["_p"] ** 2, m["_pq"] - m["_p"] * m["_q"]
        varies = (var_q > 1e-15) & (var_p > 1e-15)  # by more than rounding
        pearson = np.clip(cov / np.sqrt(np.where(varies, var_q * var_p, 1.0)), -1, 1)
        metrics["prob_pearson"] = np.where(varies, pearson, np.nan)
    return metrics


def order_metrics(logq_N: np.ndarray, logp_N: np.ndarray, lengths_S: np.ndarray) -> dict[str, float]:
    """Percentiles and extremes: what cannot be had from sums."""
    values = np.percentile(np.abs(log_ratios(logq_N, logp_N)), list(PERCENTILES.values())).tolist()
    return dict(zip(PERCENTILES, values, strict=True)) | extremes(logq_N, logp_N, lengths_S)


def extremes(logq_N: np.ndarray, logp_N: np.ndarray, lengths_S: np.ndarray) -> dict[str, float]:
    l_N = log_ratios(logq_N, logp_N)
    sum_S = segment_sums(l_N, lengths_S)
    diff_S = -sum_S / lengths_S
    q_N, p_N = (np.exp(np.asarray(x_N, np.float64)) for x_N in (logq_N, logp_N))
    values = {"prob_diff_max": np.abs(p_N - q_N).max()}
    values |= {"log_ppl_diff_min": diff_S.min(), "log_ppl_diff_max": diff_S.max()}
    values |= {"is_ratio_min_token": _exp(l_N.min()), "is_ratio_max_token": _exp(l_N.max())}
    values |= {"is_ratio_min_seq": _exp(sum_S.min()), "is_ratio_max_seq": _exp(sum_S.max())}
    return {name: float(value) for name, value in values.items()}


def cumulative_l(l_N: np.ndarray, lengths_S: np.ndarray) -> np.ndarray:
    """Σ of l up to and with every token of its own response, (N,)."""
    starts_S, sum_N = segment_starts(lengths_S), np.cumsum(np.asarray(l_N, np.float64))
    return sum_N - np.repeat(np.where(starts_S > 0, sum_N[starts_S - 1], 0.0), lengths_S)


def response_sums(
    terms: Mapping[str, np.ndarray], per_response: Mapping[str, np.ndarray], lengths_S: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(sums, counts) of every term by response, (S,) each: over its tokens, or the response's own number, once."""
    once_S = np.ones(len(lengths_S))
    sums_FS = segment_sums(np.stack(list(terms.values()), dtype=np.float64, casting="unsafe"), lengths_S)
    sums = {name: (sums_S, lengths_S) for name, sums_S in zip(terms, sums_FS, strict=True)}
    return sums | {name: (term, once_S) for name, term in per_response.items()}


def segment_starts(lengths_S: np.ndarray) -> np.ndarray:
    """Where every response starts among the N tokens."""
    return np.cumsum(lengths_S) - lengths_S


def segment_positions(lengths_S: np.ndarray) -> np.ndarray:
    """Position of every token in its own response, (N,)."""
    starts_N = np.repeat(segment_starts(lengths_S), lengths_S)
    return (np.arange(len(starts_N)) - starts_N).astype(np.int32)


def segment_sums(values_N: np.ndarray, lengths_S: np.ndarray) -> np.ndarray:
    """Σ over the tokens of every response, of one row of values or of several; reduceat is wrong for empty responses,
    so there may be none.
    """
    starts_S = segment_starts(lengths_S)
    assert lengths_S.min() > 0 and starts_S[-1] + lengths_S[-1] == values_N.shape[-1]
    return np.add.reduceat(values_N, starts_S, axis=-1, dtype=np.float64)


def _weight_terms(level: str, log_weights: np.ndarray, cap: float) -> dict[str, np.ndarray]:
    """Moments of w, of w − 1 (by expm1: it has digits near 0 where w has none), and of w limited to [1/cap, cap]."""
    weights, excess = _exp(log_weights), np.expm1(np.clip(log_weights, -CLAMP, CLAMP))
    moments = {"is_ratio_mean": weights, "_w2": weights**2, "_excess": excess, "_excess2": excess**2}
    limited = np.clip(weights, 1 / cap, cap)
    moments |= {"_limited": limited, "_limited2": limited**2}
    return {f"{name}_{level}": moment for name, moment in moments.items()}


def _exp(x: np.ndarray | float) -> np.ndarray:
    return np.exp(np.clip(x, -CLAMP, CLAMP))

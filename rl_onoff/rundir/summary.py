"""What a run folder says, as flat numbers: read from the shards alone, so it can be made again at any time."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from rl_onoff.rewards import FAILED, summarise_rewards
from rl_onoff.rundir.table import RunDir, Table

LOGPROB_EDGES = np.linspace(-20, 0, 65)
ENTROPY_EDGES = np.linspace(0, 12, 65)


@dataclass(slots=True)
class Summary:
    """`values` by name (`generate/…`, `score/<name>/…`), and histograms as (counts, edges)."""

    values: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


def summarise(run: RunDir) -> Summary:
    """Read everything the run folder holds, a few rows at a time."""
    summary = Summary()
    if run.completions.exists():
        _completions(run.completions, summary)
    for name in run.score_names():
        _scores(run.scores(name), f"score/{name}", summary)
    return summary


def _completions(table: Table, summary: Summary) -> None:
    lengths, rewards, reasons, failed = [], defaultdict(list), Counter(), 0
    logprobs = _Histogram(LOGPROB_EDGES)
    for row in table.rows(["request_id", "token_ids", "logprobs", "finish_reason", "reward", "meta"]):
        lengths.append(len(row["token_ids"]))
        reasons[row["finish_reason"]] += 1
        if row["logprobs"] is not None:
            logprobs.add(row["logprobs"])
        if row["reward"] is not None:
            rewards[row["request_id"]].append(row["reward"])
        elif f'"{FAILED}"' in (row["meta"] or "") and FAILED in json.loads(row["meta"]):
            failed += 1
    values = summary.values
    values["generate/responses"] = len(lengths)
    values["generate/tokens"] = int(sum(lengths))
    values["generate/length_mean"] = float(np.mean(lengths))
    for reason in ("eos", "stop", "length") if set(reasons) - {None} else ():  # responses made elsewhere do not say
        values[f"generate/finish_{reason}"] = reasons[reason] / len(lengths)
    if logprobs.count:
        values["generate/logprob_mean"] = logprobs.mean
        values["generate/perplexity"] = float(np.exp(-logprobs.mean))
        summary.histograms["generate/logprob"] = logprobs.counts, logprobs.edges
    if rewards:
        values.update({f"reward/{name}": value for name, value in summarise_rewards(rewards).items()})
    if failed:
        values["reward/failed"] = failed


def _scores(table: Table, prefix: str, summary: Summary) -> None:
    logprobs, entropies = _Histogram(LOGPROB_EDGES), _Histogram(ENTROPY_EDGES)
    first, masses, responses = 0, _Histogram(np.linspace(0, 1, 65)), 0
    for row in table.rows(["logprobs", "entropy", "rank", "nucleus_mass"]):
        responses += 1
        logprobs.add(row["logprobs"])
        if row["entropy"] is not None:  # scores made elsewhere are logprobs alone
            entropies.add(row["entropy"])
            first += int((row["rank"] == 1).sum())
        if row["nucleus_mass"] is not None:
            masses.add(row["nucleus_mass"])
    values = summary.values
    values[f"{prefix}/responses"] = responses
    values[f"{prefix}/tokens"] = logprobs.count
    values[f"{prefix}/logprob_mean"] = logprobs.mean
    values[f"{prefix}/perplexity"] = float(np.exp(-logprobs.mean))
    if entropies.count:
        values[f"{prefix}/entropy_mean"] = entropies.mean
        values[f"{prefix}/likeliest_fraction"] = first / entropies.count
        summary.histograms[f"{prefix}/entropy"] = entropies.counts, entropies.edges
    if masses.count:
        values[f"{prefix}/nucleus_mass_mean"] = masses.mean
    summary.histograms[f"{prefix}/logprob"] = logprobs.counts, logprobs.edges


class _Histogram:
    """Counts in fixed bins (values outside go to the outermost), and the exact mean."""

    def __init__(self, edges: np.ndarray):
        self.edges, self.counts = edges, np.zeros(len(edges) - 1, np.int64)
        self.count, self._sum = 0, 0.0

    def add(self, values: np.ndarray) -> None:
        self.counts += np.histogram(np.clip(values, self.edges[0], self.edges[-1]), self.edges)[0]
        self.count += len(values)
        self._sum += float(values.sum(dtype=np.float64))

    @property
    def mean(self) -> float:
        return self._sum / self.count if self.count else float("nan")


LABELS = {
    "responses": "responses",
    "tokens": "response tokens",
    "tokens_per_s": "tokens/s",
    "length_mean": "mean length (tokens)",
    "finish_eos": "ended by EOS",
    "finish_stop": "ended by a stop string",
    "finish_length": "ended by length",
    "logprob_mean": "mean logprob (nats)",
    "entropy_mean": "mean entropy (nats)",
    "perplexity": "perplexity",
    "likeliest_fraction": "sampled the likeliest token",
    "nucleus_mass_mean": "mass the sampler kept",
    "num_prompts": "prompts judged",
    "num_responses": "responses judged",
    "failed": "reward failed",
    "reward_mean": "mean reward",
    "accuracy": "accuracy",
    "kl": "KL, k1 estimate (nats)",
    "kl_k3": "KL, k3 estimate (nats)",
    "logprob_diff_mean": "mean |log p - log q|",
    "logprob_diff_max": "max |log p - log q|",
    "prob_pearson": "correlation of p and q",
    "ess_token": "effective sample, tokens",
    "ess_seq": "effective sample, sequences",
    "ppl_ratio": "perplexity ratio",
    "kl_forward_topk": "exact KL on top tokens (nats)",
    "kl_forward": "exact KL (nats)",
    "argmax_agreement": "same likeliest token",
    "impossible_fraction": "tokens impossible for target",
}


def as_text(values: Mapping[str, float]) -> str:
    """The summary for a terminal: one block a section, one line a number."""
    sections: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for name, value in values.items():
        section, _, last = name.rpartition("/")
        place = 0 if last == "tokens_per_s" else len(sections[section])
        sections[section].insert(place, (LABELS.get(last, last), value))
    lines = []
    for section, numbers in sections.items():
        lines += ["", f"  {section}"]
        lines += [f"    {label:<32}{number(value):>12}" for label, value in numbers]
    return "\n".join(lines[1:])


def number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"

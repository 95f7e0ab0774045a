"""What a run folder says, as flat numbers: read from the shards alone, so it can be made again at any time."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from rl_onoff.rewards import FAILED, summarise_rewards
from rl_onoff.rundir.table import RunDir, Table, rollout_of, scores_of
from rl_onoff.types import Key

LOGPROB_EDGES = np.linspace(-20, 0, 65)
ENTROPY_EDGES = np.linspace(0, 12, 65)
MASS_EDGES = np.linspace(0, 1, 65)


@dataclass(slots=True)
class Summary:
    """`values` by name (`generate/…`, `score/<name>/…`), and histograms as (counts, edges)."""

    values: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


def summarise(run: RunDir) -> Summary:
    """Read everything the run folder holds, a few rows at a time."""
    summary = Summary()
    masks = _completions(run.completions, summary) if run.completions.exists() else {}
    for name in run.score_names():
        _scores(run.scores(name), f"score/{name}", summary, masks)
    return summary


def _completions(table: Table, summary: Summary) -> dict[Key, np.ndarray]:
    """Returns the masks of the responses that hold tokens which the policy did not sample."""
    masks: dict[Key, np.ndarray] = {}
    lengths, rewards, reasons, failed = [], defaultdict(list), Counter(), 0
    logprobs = _Histogram(LOGPROB_EDGES)
    columns = ["request_id", "sample", "token_ids", "logprobs", "mask", "finish_reason", "reward", "meta"]
    for rollout in map(rollout_of, table.rows(columns)):  # rows of earlier versions have no mask
        lengths.append(len(rollout.token_ids_T) if rollout.mask_T is None else int(rollout.mask_T.sum()))
        if rollout.mask_T is not None:
            masks[rollout.key] = rollout.mask_T
        logprobs.add(rollout.logprobs_T, rollout.mask_T)
        if rollout.finish_reason is not None:  # responses made elsewhere do not say
            reasons[rollout.finish_reason.value] += 1
        if rollout.reward is not None:
            rewards[rollout.request_id].append(rollout.reward)
        failed += rollout.reward is None and FAILED in rollout.meta
    values = summary.values
    values |= {"generate/responses": len(lengths), "generate/tokens": sum(lengths)}
    values["generate/length_mean"] = float(np.mean(lengths))
    for reason in ("eos", "stop", "length") if reasons else ():
        values[f"generate/finish_{reason}"] = reasons[reason] / len(lengths)
    logprobs.tell("generate", summary)
    if rewards:
        values |= {f"reward/{name}": value for name, value in summarise_rewards(rewards).items()}
    if failed:
        values["reward/failed"] = failed
    return masks


def _scores(table: Table, prefix: str, summary: Summary, masks: Mapping[Key, np.ndarray]) -> None:
    logprobs, entropies, masses = map(_Histogram, (LOGPROB_EDGES, ENTROPY_EDGES, MASS_EDGES))
    first = responses = 0
    columns = ["request_id", "sample", "token_ids", "logprobs", "entropy", "rank", "nucleus_mass"]
    for scores in map(scores_of, table.rows(columns)):
        responses += 1
        if (mask_T := masks.get(scores.key)) is not None and len(mask_T) == len(scores.token_ids_T):
            scores = scores[mask_T]
        logprobs.add(scores.logprobs_T)
        entropies.add(scores.entropy_T)
        masses.add(scores.nucleus_mass_T)
        first += 0 if scores.rank_T is None else int((scores.rank_T == 1).sum())
    values = summary.values
    values |= {f"{prefix}/responses": responses, f"{prefix}/tokens": logprobs.count}
    logprobs.tell(prefix, summary)
    if entropies.count:  # scores made elsewhere are logprobs alone
        values[f"{prefix}/entropy_mean"] = entropies.mean
        values[f"{prefix}/likeliest_fraction"] = first / entropies.count
        summary.histograms[f"{prefix}/entropy"] = entropies.counts, entropies.edges
    if masses.count:
        values[f"{prefix}/nucleus_mass_mean"] = masses.mean


class _Histogram:
    """Counts in fixed bins (values outside go to the outermost), and the exact mean."""

    def __init__(self, edges: np.ndarray):
        self.edges, self.counts = edges, np.zeros(len(edges) - 1, np.int64)
        self.count, self._sum = 0, 0.0

    def add(self, values: np.ndarray | None, mask: np.ndarray | None = None) -> None:
        if values is not None:
            values = values if mask is None else values[mask]
            values = values[~np.isnan(values)]  # a file's, which the checks name
            self.counts += np.histogram(np.clip(values, self.edges[0], self.edges[-1]), self.edges)[0]
            self.count += len(values)
            self._sum += float(values.sum(dtype=np.float64))

    @property
    def mean(self) -> float:
        return self._sum / self.count

    def tell(self, prefix: str, summary: Summary) -> None:
        """Logprobs, as a summary has them; nothing where there are none."""
        if self.count:
            summary.values |= {f"{prefix}/logprob_mean": self.mean, f"{prefix}/perplexity": float(np.exp(-self.mean))}
            summary.histograms[f"{prefix}/logprob"] = self.counts, self.edges

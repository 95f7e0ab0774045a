"""The whole list for a model and an engine. One engine is alive at a time: first the one under test, then the truth."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import msgspec
import numpy as np

from rl_onoff.acceptance import lines
from rl_onoff.acceptance.lines import FAIL, NOT_TRIED, PASS, Line, NotTried
from rl_onoff.acceptance.measure import Bench, draw_again, draw_in_full, end_tokens, head_mass
from rl_onoff.analysis_config import Check
from rl_onoff.data.prompts import is_ids
from rl_onoff.data.requests import check_lengths, encode_rows, messages_of, with_template_kwargs
from rl_onoff.errors import OnOffError, plural
from rl_onoff.pipeline.compare_inputs import Sources
from rl_onoff.pipeline.engines import Wish
from rl_onoff.pipeline.stages import Run
from rl_onoff.report.tables import aligned, number
from rl_onoff.rundir.table import COMPLETIONS, Table, score_columns
from rl_onoff.types import Key, Rollout, SampleRequest, Sampling, TokenScores, sample_requests

BATCH = 32  # responses that are scored together
ALONE = 8  # of them, that are scored alone too
FEW = 16  # tokens of a response that only fills the batch
MORE = 32  # greedy tokens of a prompt, and tokens behind a long context
LONG = 2  # long contexts


@dataclass(frozen=True, kw_only=True, slots=True)
class Acceptance:
    """Every line, and of whom."""

    model: str
    engine: str | None
    truth: str | None
    lines: list[Line]

    def of(self, outcome: str) -> list[str]:
        """The checks that ended so."""
        return [line.check.value for line in self.lines if line.outcome == outcome]

    def to_dict(self) -> dict[str, Any]:
        failed = self.of(FAIL)
        accepted = not failed and bool(self.of(PASS))
        return {"accepted": accepted, "failed": failed, "not_tried": self.of(NOT_TRIED), **msgspec.to_builtins(self)}

    def values(self) -> dict[str, float]:
        """Flat numbers for W&B."""
        found = {f"acceptance/{line.check.value}": line.value for line in self.lines if line.value is not None}
        return found | {"acceptance/failed": len(self.of(FAIL)), "acceptance/not_tried": len(self.of(NOT_TRIED))}

    def as_text(self) -> str:
        """The list for a terminal."""
        rows = [["check", "", "number", "bar", ""]]
        for line in self.lines:
            said = f"{line.said}; what to do: {line.fix}" if line.fix else line.said
            rows.append([line.check.value, line.outcome, number(line.value, 3), number(line.bar), said])
        counts = (len(self.of(outcome)) for outcome in (PASS, FAIL, NOT_TRIED))
        head = f"  acceptance of {self.model} on {self.engine}; the truth is {self.truth or 'not known'}"
        return "\n".join([head, *aligned(rows, "<<>><"), "", "  {} passed, {} failed, {} not tried".format(*counts)])


def run_acceptance(this: Run) -> Generator[Wish, None, Acceptance]:
    """Measure and judge; writes acceptance.json."""
    yield this.config.backend
    trial, skip, found = Trial(this), this.config.acceptance.skip, list[Line]()
    for check in Check:
        try:
            if check in skip:
                raise NotTried("it is in acceptance.skip")
            if check in (Check.greedy, Check.truth):
                yield trial.prepare_truth()
            found.append(getattr(trial, check.value)())
        except NotTried as reason:
            found.append(Line(check=check, outcome=NOT_TRIED, said=str(reason)))
    names = {"engine": trial.bench.name("drawn"), "truth": trial.truth_bench and trial.truth_bench.name("truth")}
    accepted = Acceptance(model=this.config.backend.model_name, lines=found, **names)
    this.folder.write_json("acceptance.json", accepted.to_dict())
    return accepted


def measured(this: Run) -> Sources:
    """What was drawn, and its scores by the engine and by the truth, as a run folder to compare."""
    path, name = this.folder.path / "acceptance", this.config.backend.name
    tables = {name: Table(path / "batch", score_columns()), "truth": Table(path / "truth", score_columns())}
    scores = {name: table for name, table in tables.items() if table.exists()}
    return Sources(this.folder.path, Table(path / "drawn", COMPLETIONS), scores, name if name in scores else None)


class Trial:
    """A model on an engine beside the truth: a method for each check, which measures what it needs."""

    def __init__(self, this: Run) -> None:
        config = this.config
        self.bars, self.data, self.seed = config.acceptance, config.data, config.sampling.seed
        # one replica: a second would not have in its cache what the first one has
        engine, is_new = replace(config.backend, dp_size=1), not (this.folder.path / "acceptance").exists()
        self.backend = this.slot.prepare(engine, begin=is_new)  # it loads while the prompts are encoded
        self.tokenizer = self.backend.get_tokenizer()
        self.has_template = bool(self.tokenizer.chat_template) if self.data.chat_template else None
        if self.has_template is False:
            self.data = replace(self.data, chat_template=False, system=None, template_kwargs={})
        self.rows = this.rows[: self.bars.prompts]
        self.prompts = encode_rows(self.rows, self.data, self.tokenizer)
        self.sent = [prompt.ids.tolist() for prompt in self.prompts]
        digest = hashlib.blake2b(repr(self.sent).encode(), digest_size=8).hexdigest()
        asked = {"prompts": digest, "seed": self.seed}
        asked |= {name: getattr(self.bars, name) for name in ("tokens", "long_tokens")}
        self.bench = Bench(this, engine, asked)
        self.truth_bench = config.target and Bench(this, replace(config.target, dp_size=1), asked)
        self.info = self.bench.info("drawn")
        check_lengths(self._requests(1), self.info["max_len"])

    def _requests(self, tokens: int, samples: Iterable[int] = (0,), temperature: float = 1.0) -> list[SampleRequest]:
        """Responses to all prompts, of so many tokens where the context has room for them."""
        found = []
        for sample in samples:
            for prompt in self.prompts:
                room = max(1, self.info["max_len"] - len(prompt.ids))
                found.append(self._request(prompt.id, prompt.ids, min(tokens, room), sample, temperature))
        return found

    def _request(self, id: str, ids: np.ndarray, tokens: int, sample: int, temperature: float) -> SampleRequest:
        sampling = Sampling(max_new_tokens=tokens, temperature=temperature, seed=self.seed)
        return sample_requests(id=id, prompt_ids=ids, sampling=sampling, samples=[sample])[0]

    @cached_property
    def drawn(self) -> dict[Key, Rollout]:
        """The first response to each prompt."""
        return self.bench.rollouts("drawn", self._requests(self.bars.tokens), draw_in_full)

    @cached_property
    def together(self) -> list[Rollout]:
        """32 responses: the first ones, then short ones."""
        samples = range(1, -(-BATCH // len(self.prompts)))
        others = self._requests(FEW, samples)[: max(0, BATCH - len(self.prompts))]
        return [*self.drawn.values(), *self.bench.rollouts("drawn_short", others, draw_in_full).values()]

    @cached_property
    def scored(self) -> dict[Key, TokenScores]:
        """All of them in one batch."""
        return self.bench.scores("batch", self.together)

    @cached_property
    def drawn_long(self) -> dict[Key, Rollout]:
        """Responses behind contexts of `long_tokens`: prompts and responses one behind the other, turned by a half."""
        if self.bars.long_tokens + MORE > self.info["max_len"]:
            raise NotTried(f"the context holds {self.info['max_len']:,} tokens")
        turns = np.concatenate([ids for each in self.drawn.values() for ids in (each.prompt_ids, each.token_ids_T)])
        contexts = [np.resize(np.roll(turns, i * len(turns) // LONG), self.bars.long_tokens) for i in range(LONG)]
        requests = [self._request(f"long {i}", ids, MORE, 0, 1.0) for i, ids in enumerate(contexts)]
        return self.bench.rollouts("drawn_long", requests, draw_in_full)

    @cached_property
    def scored_long(self) -> dict[Key, TokenScores]:
        return self.bench.scores("long", list(self.drawn_long.values()))

    @cached_property
    def drawn_greedily(self) -> dict[Key, Rollout]:
        requests = self._requests(MORE, temperature=0.0)
        return self.bench.rollouts("drawn_greedily", requests, lambda backend, asked: backend.complete(asked))

    def prepare_truth(self) -> Wish:
        """The truth's engine, once all that needs the other engine is done."""
        if self.truth_bench is None:
            raise NotTried("there is no truth: set target=truth")
        if Check.greedy not in self.bars.skip:
            _ = self.drawn_greedily
        if Check.truth not in self.bars.skip:
            _ = self.scored
            with suppress(NotTried):
                _ = self.scored_long
        return self.truth_bench.engine

    def _by_truth(self, name: str, rollouts: Iterable[Rollout]) -> dict[Key, TokenScores]:
        assert self.truth_bench is not None
        self.truth_bench.table(name)  # refuses rows of another truth
        try:
            return self.truth_bench.scores(name, list(rollouts))
        except OnOffError as error:  # too large for this machine, or not of Transformers: the other lines still count
            raise NotTried(f"the truth failed ({error})") from error

    def template(self) -> Line:
        tokenizer, told = with_template_kwargs(self.tokenizer, self.data.template_kwargs), []
        for row, prompt in zip(self.rows, self.prompts, strict=True):
            if is_ids(row.prompt):
                raise NotTried("the data has token ids as its prompts")
            if self.data.chat_template:
                messages, tools = messages_of(row.prompt, self.data.system), {"tools": row.tools} if row.tools else {}
                render = tokenizer.apply_chat_template
                told.append(render(messages, add_generation_prompt=True, return_dict=False, **tools))
            else:
                told.append(tokenizer(prompt.text)["input_ids"])
        return lines.template_line(self.sent, told, tokenizer.bos_token_id, template=self.has_template)

    def round_trip(self) -> Line:
        texts = [self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in self.sent]
        again = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return lines.round_trip_line(self.sent, again)

    def eos(self) -> Line:
        found = end_tokens(self.backend, self.info["eos_ids"])
        return lines.eos_line(found, {i: self.tokenizer.decode([i]) for i in set().union(*found.values())})

    def sampling(self) -> Line:
        said = self.backend.model_json("generation_config.json")
        return lines.sampling_line(said, list(self.scored.values()), self.bars.sampling_z)

    def decode(self) -> Line:
        n = self.bars.tokens
        whole = [key for key, rollout in self.drawn.items() if len(rollout.token_ids_T) == n]
        if not whole:
            room = self.info["max_len"] - min(map(len, self.sent))
            why = "the model ends its responses at once" if room >= n else f"the context has room for {room:,}"
            raise NotTried(f"no response has {plural(n, 'token')}: {why}")
        pairs = [(self.drawn[key], self.scored[key]) for key in whole]
        said = f"{plural(n, 'token')} a response, sampled and prefilled"
        return lines.k3_line(Check.decode, pairs, self.bars.k3, said)

    def decode_long(self) -> Line:
        pairs = [(rollout, self.scored_long[key]) for key, rollout in self.drawn_long.items()]
        said = f"behind {plural(self.bars.long_tokens, 'token')}, sampled and prefilled"
        return lines.k3_line(Check.decode_long, pairs, self.bars.k3, said)

    def batch(self) -> Line:
        together = self.together
        alone = self.bench.scores("alone", together[:: max(1, len(together) // ALONE)], alone=True)
        pairs = [(self.scored[key], scores) for key, scores in alone.items()]
        width = f", {self.info['batch']} at a time" if self.info["batch"] < len(together) else ""
        said = f"{plural(len(alone), 'response')} alone and among {len(together)}{width}"
        return lines.k3_line(Check.batch, pairs, self.bars.k3, said)

    def cache(self) -> Line:
        if not self.info["caches_prompts"]:
            raise NotTried("the engine keeps no prompts")
        requests = self._requests(min(FEW, self.bars.tokens))
        again = self.bench.rollouts("drawn_again", requests, draw_again)
        pairs = [(self.drawn[key], rollout) for key, rollout in again.items()]
        widths = sorted(map(len, self.sent))
        said = f"draws behind prompts of {widths[0]} to {widths[-1]} tokens, new and seen before"
        return lines.k3_line(Check.cache, pairs, self.bars.k3, said)

    def head(self) -> Line:
        rows = sorted({*range(self.info["vocab_size"])} - {*self.tokenizer.get_vocab().values()})
        few, mass = self.together[-4:], 0.0
        if rows:
            _ = self.scored  # the fact stands beside its rows
            mass = self.bench.fact("batch", "head_mass", lambda backend: head_mass(backend, few, rows))
        return lines.head_line(rows, mass, sum(len(rollout.token_ids_T) for rollout in few), self.bars.head_mass)

    def greedy(self) -> Line:
        found = self._by_truth("truth_greedy", self.drawn_greedily.values())
        return lines.greedy_line(list(found.values()), self.bars.greedy)

    def truth(self) -> Line:
        drawn, scored = self.together, self.scored
        with suppress(NotTried):  # a context that holds no long ones
            drawn, scored = [*drawn, *self.drawn_long.values()], scored | self.scored_long
        found = self._by_truth("truth", drawn)
        pairs = [(scored[key], scores) for key, scores in found.items()]
        return lines.k3_line(Check.truth, pairs, self.bars.k3, "scores of all responses and the truth's")

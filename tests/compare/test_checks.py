"""The checks of logprobs: hand-worked cases, faults planted in real rollouts, and clean rollouts that raise nothing.

`rollouts.npz` holds 500 responses that SmolLM2 drew (125 at each temperature of 0.3, 0.6, 1 and 1.3): token ids, and
raw logprobs in bfloat16 as they were drawn, in bfloat16 scored again, and in float32; those after the temperature
(`scaled`); and 125 responses drawn with top_p=0.9 (`cut`). `make_rollouts.py` beside it makes it.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_onoff.backends.fake.backend import END, ByteTokenizer
from rl_onoff.compare import Pair, compare, verdict
from rl_onoff.compare.examine import examine, examine_blocks
from rl_onoff.compare.findings import Sampled
from rl_onoff.compare.row_checks import Fault, other_text, other_tokens, outside_vocab, row_findings
from rl_onoff.types import Rollout, TokenScores
from tests.conftest import ROOT

TEMPERATURES = (0.3, 0.6, 1.0, 1.3)
FILE = np.load(Path(__file__).parent / "rollouts.npz")


def of(*responses: tuple[Any, Any], ids: list[list[int]] | None = None, recorded=("behaviour",)):
    """Responses given as (behaviour's logprobs, target's)."""
    q, p = ([np.asarray(r[side], np.float32) for r in responses] for side in (0, 1))
    ids_N = np.concatenate(ids) if ids else np.arange(sum(map(len, q)))
    return Sampled(
        keys=[(f"q{i}", 0) for i in range(len(q))], lengths_S=np.array([len(x) for x in q]), token_ids_N=ids_N,
        behaviour_N=np.concatenate(q), target_N=np.concatenate(p), recorded=recorded,
    )  # fmt: skip


def good(n: int = 6, seed: int = 0) -> tuple[list[float], list[float]]:
    rng = np.random.default_rng(seed)
    q = -rng.exponential(1.0, n)
    return list(q), list(q * np.exp(rng.normal(0, 0.01, n)))


def names(sampled: Sampled) -> list[str]:
    return [finding.check for finding in examine(sampled)[0]]


# --- hand-worked cases ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "q", "p", "tokens", "position"),
    [
        ("no_numbers", [-1, np.nan, -1], [-1, -1, -1], 1, 1),
        ("no_numbers", [-1, -1, -1], [-1, -1, np.inf], 1, 2),
        ("positive", [-1, -1, 1], [-1, -1, -1], 1, 2),
        ("sentinels", [-1, -9999, -2], [-1, -1, -2], 1, 1),
        ("sentinels", [-1, -2, -2], [-1, -123.25, -123.25], 2, 1),
        ("zero_runs", [-1] + [0] * 8, [-1] * 9, 8, 1),
        ("zero_runs", [-1] * 9, [0] * 8 + [-1], 8, 0),
    ],
)
def test_a_row_with_a_fault_is_set_aside(check, q, p, tokens, position):
    findings, kept_S = examine(of(*(good(seed=i) for i in range(12)), (q, p)))
    [finding] = findings
    assert (finding.check, finding.responses, finding.tokens, finding.fatal) == (check, 1, tokens, False)
    assert finding.example == f"q12/0 at token {position}"
    assert kept_S.tolist() == [True] * 12 + [False]
    assert finding.what in finding.sentence() and finding.fix in finding.sentence()


@pytest.mark.parametrize(
    ("q", "p"),
    [
        ([-1, -np.inf, -1], [-1, -2, -np.inf]),  # an impossible token is a fact
        ([0.0005, -1, -1], [-1, -1, -1]),  # rounding
        ([-1, -150.5, -1], [-1, -1, -1]),  # very unlikely, once
        ([0] * 7 + [-1], [-1] * 8),  # a short run
        ([0] * 12, [-0.01] * 12),  # both sides are sure
    ],
)
def test_rare_numbers_are_no_fault(q, p):
    assert names(of(*(good(seed=i) for i in range(3)), (q, p))) == []


def test_a_fault_of_many_rows_is_the_files():
    [finding], _ = examine(of(*(good(seed=i) for i in range(8)), ([-1, 5], [-1, -1]), ([-1, 5], [-1, -1])))
    assert finding.fatal and finding.responses == 2
    [finding], _ = examine(of(*(good(seed=i) for i in range(19)), ([-1, 5], [-1, -1]), ([-1, 5], [-1, -1])))
    assert not finding.fatal


def test_one_response_alone():
    assert names(of(good(1))) == names(of(good(400))) == []
    assert names(of(([np.nan], [-1]))) == ["no_numbers"]


@pytest.mark.parametrize(
    ("turn", "word"), [(np.exp, "probabilities"), (lambda x: -3 * np.asarray(x), "negative log-likelihoods")]
)
def test_other_numbers_than_logprobs(turn, word):
    q, p = good(64)
    [finding], _ = examine(of((turn(q), p)))
    assert finding.check == "positive" and finding.fatal and word in finding.fix and "behaviour" in finding.what


def test_a_copied_column_matters_where_both_are_a_trainers():
    q, _ = good(64)
    assert names(of((q, q), recorded=("behaviour", "target"))) == ["same_columns"]
    assert names(of((q, q))) == [], "an engine may agree with another to the last bit"


def test_patterns_are_not_looked_for_in_what_our_engines_gave():
    q, p = good(64)
    assert names(of((q[1:], p[:-1]))) == ["shifted"]
    assert names(of((q[1:], p[:-1]), recorded=())) == []


@pytest.mark.parametrize("by", [-1, 1])
def test_a_shift_is_named_and_does_not_reach_over_responses(by):
    rows = [good(12, seed=i) for i in range(20)]
    [finding], _ = examine(of(*((np.roll(q, by), p) for q, p in rows)))
    assert finding.check == "shifted" and f"{by:+d}" in finding.what


def test_padding_of_a_rectangle():
    rows = [good(length, seed=length) for length in (5, 7, 9)]
    ids = [[7] * length + [2] * (13 - length) for length in (5, 7, 9)]
    padded = of(*(([*q, *[0] * (13 - len(q))], [*p, *[0] * (13 - len(p))]) for q, p in rows), ids=ids)
    [finding], _ = examine(padded)
    assert (finding.check, finding.tokens, finding.fatal) == ("padding", 8 + 6 + 4, True)
    assert finding.example == "q0/0 at token 5" and "token id 2" in finding.what


def test_copies_are_set_aside_and_the_first_of_each_stays():
    rows = [good(20, seed=i) for i in range(6)]
    findings, kept_S = examine(of(*rows, *rows, ids=[list(range(20))] * 12))
    assert [(f.check, f.responses, f.fatal) for f in findings] == [("copies", 6, False)]
    assert kept_S.tolist() == [True] * 6 + [False] * 6


def test_a_temperature_of_two_outcomes_is_fitted_exactly():
    rng = np.random.default_rng(0)
    odds = rng.normal(0, 2, 200)
    p, q = (-np.log1p(np.exp(-odds / t)) for t in (1, 0.6))
    [finding], _ = examine(of((q, p)))
    assert finding.check == "temperature" and "temperature of 0.6" in finding.what


def response(ids: Any, text: str = "", prompt: Any = (), name: str = "q0") -> Rollout:
    ids_T, prompt_ids = (np.asarray(x, np.int32) for x in (ids, prompt))
    return Rollout(request_id=name, sample=0, prompt_ids=prompt_ids, token_ids_T=ids_T, text=text)


READ = "Two plus two\n is four."


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (READ, READ),
        (READ, f"{READ}<|end|>"),  # which decoding may leave out
        (READ, f"  {READ.replace(chr(10), '')} "),
        (READ, "Two plus"),  # cut at a stop string
        (READ, "four."),  # the reasoning, or the calls of tools, left out
        (READ, f"What is 2 + 2? {READ}"),  # with the prompt
        (READ, f"{READ}\ufffd"),
        ("", ""), ("", "é"), ("4", ""), ("4", "4."),
    ],
)  # fmt: skip
def test_a_text_that_differs_as_it_may(read, text):
    assert other_text(response([*read.encode(), END], text), ByteTokenizer().decode) == ""
    cut = [*read.encode(), "é".encode()[0]]
    assert other_text(response(cut, text), ByteTokenizer().decode) == ""
    turns = [*b"one", END, *b"two", END]
    for text in ("one<|end|>two<|end|>", "one<|end|>two", "onetwo", "two"):
        assert other_text(response(turns, text), ByteTokenizer().decode) == ""


@pytest.mark.parametrize("text", ["Three minus one\n is two.", "5", "ABCDEFGH", "Uxp!qmvt!uxp!jt!gpvs/"])
def test_a_text_of_other_ids(text):
    said = other_text(response([*READ.encode(), END], text), ByteTokenizer().decode)
    assert said == f"the ids read 'Two plus two\\n is four.<|' and the text is {text[:24]!r}"
    assert other_text(response([END], "A long answer"), ByteTokenizer().decode), "and no answer at all"


def test_ids_past_the_rows_of_a_model():
    assert outside_vocab(response([0, 9], prompt=[9]), 10) == "" == outside_vocab(response([], prompt=[]), 10)
    assert outside_vocab(response([0, 10, 12], prompt=[11]), 10) == "token id 12 in its response, and 10 rows"
    assert outside_vocab(response([0, 9], prompt=[10]), 10) == "token id 10 in its prompt, and 10 rows"


def test_two_sides_of_other_tokens():
    assert other_tokens(np.array([1, 2]), np.array([1, 2])) == ""
    assert other_tokens(np.array([1, 2]), np.array([1])) == "2 tokens under the behaviour and 1 under the target"
    said = other_tokens(np.array([1, 2, 3]), np.array([1, 4, 5]))
    assert said == "token id 2 at 1 under the behaviour and 4 under the target"


def test_rows_are_counted_by_what_is_wrong_with_them():
    faults: dict[Any, Fault] = {
        ("a", 0): ("outside_vocab", "x"),
        ("b", 1): ("other_tokens", "y"),
        ("c", 0): ("outside_vocab", "z"),
    }
    one, two = row_findings(faults, 20)
    assert (one.check, one.responses, one.example, one.fatal) == ("other_tokens", 1, "b/1: y", False)
    assert (two.check, two.responses, two.example, two.fatal) == ("outside_vocab", 2, "a/0: x", False)
    assert "in 2 of 20 responses" in two.what and row_findings(faults, 19)[1].fatal and row_findings({}, 9) == []


# --- faults planted in real rollouts ----------------------------------------------------------------------------------


def real(q: str, p: str, *, at: tuple[float, ...] = TEMPERATURES, chosen: np.ndarray | None = None, recorded=None):
    """Rollouts of SmolLM2, the behaviour's logprobs from column `q` and the target's from `p`."""
    columns = {name: np.concatenate([FILE[f"{name}_{t}"].astype(np.float32) for t in at]) for name in {q, p}}
    ids, lengths = (np.concatenate([FILE[f"{name}_{t}"] for t in at]).astype(np.int32) for name in ("ids", "lengths"))
    whole = Sampled(
        keys=[(str(i), 0) for i in range(len(lengths))], lengths_S=lengths, token_ids_N=ids, behaviour_N=columns[q],
        target_N=columns[p], recorded=("behaviour", "target") if recorded is None else recorded,
    )  # fmt: skip
    return whole if chosen is None else whole.only(chosen)


@pytest.mark.parametrize("seed", range(200))
def test_clean_rollouts_raise_no_finding(seed):
    """1 to 500 responses, drawn at 0.3 to 1.3, behaviour in bfloat16 (as drawn) against float32 or bfloat16; raw, and
    after the temperature."""
    rng = np.random.default_rng(seed)
    size = (1, 2, 3, 500)[seed // 4] if seed < 16 else int(rng.integers(1, 501))
    chosen = np.isin(np.arange(500), rng.choice(500, size, replace=False))
    q, p = [("drawn", "f32"), ("drawn", "bf16"), ("bf16", "f32"), ("f32", "drawn")][seed % 4]
    assert [f.sentence() for f in examine(real(q, p, chosen=chosen))[0]] == []


def changed(sampled: Sampled, side: str, rows: list[int] | None, change) -> Sampled:
    """The same with `change` done to one side's logprobs of some responses, or of all."""
    parts = np.split(getattr(sampled, f"{side}_N").copy(), sampled.ends_S[:-1])
    for row in range(len(parts)) if rows is None else rows:
        parts[row] = change(parts[row])
    return replace(sampled, **{f"{side}_N": np.concatenate(parts)})


def put(value: float, start: int, count: int):
    """Writes a value over `count` tokens from `start` on, as a tool's tokens have it."""

    def change(logprobs_T: np.ndarray) -> np.ndarray:
        logprobs_T[start : start + count] = value
        return logprobs_T

    return change


@pytest.mark.parametrize("side", ["behaviour", "target"])
@pytest.mark.parametrize(
    ("check", "value", "count"),
    [("no_numbers", np.nan, 1), ("no_numbers", np.inf, 2), ("positive", 1.0, 1), ("sentinels", -9999.0, 1),
     ("sentinels", -100.0, 3), ("zero_runs", 0.0, 12)],
)  # fmt: skip
def test_values_planted_in_few_and_in_many_rows(check, value, count, side):
    sampled = real("drawn", "f32", at=(1.0, 1.3))
    few = [5, 77, 200]
    findings, kept_S = examine(changed(sampled, side, few, put(value, 2, count)))
    assert [(f.check, f.responses, f.tokens, f.fatal) for f in findings] == [(check, 3, 3 * count, False)]
    assert np.flatnonzero(~kept_S).tolist() == few and findings[0].example.endswith("at token 2")
    [finding], _ = examine(changed(sampled, side, list(range(0, 250, 5)), put(value, 2, count)))
    assert finding.check == check and finding.fatal


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("by", [-1, 1])
def test_a_planted_shift(temperature, by):
    sampled = real("drawn", "f32", at=(temperature,))
    findings, _ = examine(changed(sampled, "behaviour", None, lambda x: np.roll(x, by)))
    assert [f.check for f in findings] == ["shifted"] and f"{by:+d}" in findings[0].what


def test_a_planted_copy_of_a_column_and_of_the_rows():
    assert names(real("drawn", "drawn")) == ["same_columns"]
    sampled = real("drawn", "f32")
    twice = Sampled(
        keys=[*sampled.keys, *((f"again-{i}", 0) for i, _ in sampled.keys)], recorded=sampled.recorded,
        **{name: np.concatenate([getattr(sampled, name)] * 2)
           for name in ("lengths_S", "token_ids_N", "behaviour_N", "target_N")},
    )  # fmt: skip
    findings, kept_S = examine(twice)
    assert [(f.check, f.responses) for f in findings] == [("copies", 503)], "and three answers that are alike anyway"
    assert kept_S.sum() == 497


def test_planted_padding():
    sampled = real("drawn", "f32", at=(0.6,))
    width = int(sampled.lengths_S.max())
    rows = {}
    for name, fill in (("token_ids_N", 2), ("behaviour_N", 0), ("target_N", 0)):
        parts = np.split(getattr(sampled, name), sampled.ends_S[:-1])
        rows[name] = np.concatenate([np.pad(part, (0, width - len(part)), constant_values=fill) for part in parts])
    padded = replace(sampled, lengths_S=np.full(len(sampled.keys), width), **rows)
    assert names(padded) == ["padding"]


@pytest.mark.parametrize("temperature", [0.3, 0.6, 1.3])
@pytest.mark.parametrize("turned", [False, True])
def test_logprobs_after_the_temperature_against_raw_ones(temperature, turned):
    columns = ("f32", "scaled") if turned else ("scaled", "f32")
    [finding], _ = examine(real(*columns, at=(temperature,)))
    assert finding.check == "temperature" and finding.fatal
    named = float(finding.what.split("temperature of ")[1].split(",")[0])
    sharp = "target" if turned == (temperature < 1) else "behaviour"
    assert f"the {sharp}'s logprobs are" in finding.what
    assert abs(np.log(named / min(temperature, 1 / temperature))) < 0.15


def test_logprobs_after_a_cut_against_raw_ones():
    cut = Sampled(
        keys=[(str(i), 0) for i in range(125)], lengths_S=FILE["cut_lengths"], token_ids_N=FILE["cut_ids"],
        behaviour_N=FILE["cut_processed"], target_N=FILE["cut_f32"], recorded=("behaviour",),
    )  # fmt: skip
    [finding], _ = examine(cut)
    assert finding.check == "cut"
    named = float(finding.what.split("keeps ")[1].split()[0])
    assert abs(named - 0.9) < 0.03


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


def responses(temperatures: tuple[float, ...] = TEMPERATURES) -> list[np.ndarray]:
    sampled = real("drawn", "f32", at=temperatures)
    return np.split(sampled.token_ids_N, sampled.ends_S[:-1])


def judged(ids: list[np.ndarray], faults: dict[int, Fault] | None = None, target: dict[int, Any] | None = None) -> Any:
    """The real responses compared, some of them with a fault, or with other ids under the target."""
    sampled = real("drawn", "f32", at=(1.0, 1.3))
    logprobs = [np.split(getattr(sampled, f"{side}_N"), sampled.ends_S[:-1]) for side in ("behaviour", "target")]
    pairs = []
    for i, (ids_T, q_T, p_T) in enumerate(zip(ids, *logprobs, strict=True)):
        theirs_T = (target or {}).get(i, ids_T)
        sides = [(ids_T, q_T), (theirs_T, np.resize(p_T, len(theirs_T)))]
        q, p = (TokenScores(request_id=str(i), token_ids_T=x, logprobs_T=y) for x, y in sides)
        pairs.append(Pair(behaviour=q, target=p, fault=(faults or {}).get(i)))
    return compare(pairs, num_resamples=2, recorded=("behaviour", "target"))


def test_ids_of_real_responses_are_those_of_their_text(tokenizer):
    for ids in responses():
        for skip in (True, False):
            text = tokenizer.decode(ids, skip_special_tokens=skip)
            for told in (text, text.strip(), text[: len(text) // 2], text[len(text) // 2 :]):
                assert other_text(response(ids, told), tokenizer.decode) == "", told


@pytest.mark.parametrize("planted", ["moved", "trained", "next row"])
def test_planted_ids_of_another_tokenizer(tokenizer, planted):
    """Ids of a tokenizer whose first 400 tokens are the same (as Llama's and Qwen's are), of one that was trained on
    other text, and of another row.
    """
    ids = responses((1.0, 1.3))
    texts = [tokenizer.decode(each, skip_special_tokens=True) for each in ids]
    if planted == "moved":
        others = [np.where(each < 400, each, each + 7) for each in ids]
    elif planted == "trained":
        other = tokenizer.train_new_from_iterator([(ROOT / "README.md").read_text()], 2000)
        others = [np.asarray(other(text)["input_ids"]) for text in texts]
    else:
        others = [*ids[1:], ids[0]]
    faults = {i: other_text(response(others[i], text), tokenizer.decode) for i, text in enumerate(texts)}
    found: dict[int, Fault] = {i: ("other_text", said) for i, said in faults.items() if said}
    assert len(found) >= 0.98 * len(ids), planted
    few = judged(ids, {i: found[i] for i in sorted(found)[:3]})
    assert [(f.check, f.responses, f.fatal) for f in few.findings] == [("other_text", 3, False)]
    assert few.overall.counts["responses"] == 247 and few.overall.counts["responses_set_aside"] == 3
    assert verdict(judged(ids, found)).startswith("Not comparable: the token ids are not those of the text beside them")


@pytest.mark.parametrize("change", [lambda ids_T: ids_T[:-1], lambda ids_T: np.append(ids_T[1:], 7)])
def test_planted_tokens_that_the_other_side_does_not_have(change):
    ids = responses((1.0, 1.3))
    rows = {i: change(ids[i]) for i in (5, 77, 200)}
    [finding] = judged(ids, target=rows).findings
    assert (finding.check, finding.responses, finding.fatal) == ("other_tokens", 3, False)
    assert finding.example.startswith("5/0: ")
    assert "two sides hold other tokens" in verdict(judged(ids, target={i: change(each) for i, each in enumerate(ids)}))


def test_planted_ids_that_the_model_has_no_row_for(tokenizer):
    ids, size = responses((1.0, 1.3)), len(tokenizer)
    assert not any(outside_vocab(response(each), size) for each in ids)
    planted = [np.append(each, size) if i in (5, 77, 200) else each for i, each in enumerate(ids)]
    faults: dict[int, Fault] = {
        i: ("outside_vocab", said) for i, each in enumerate(planted) if (said := outside_vocab(response(each), size))
    }
    [finding] = judged(ids, faults).findings
    assert (finding.check, finding.responses, finding.example.split(":")[0]) == ("outside_vocab", 3, "5/0")
    assert "past the last row" in verdict(judged(ids, dict.fromkeys(range(100), faults[5])))


# --- in blocks --------------------------------------------------------------------------------------------------------


def in_blocks(sampled: Sampled, size: int = 7) -> tuple[list[Any], np.ndarray]:
    number_S = np.arange(len(sampled.keys)) // size
    blocks = [sampled.only(number_S == number) for number in range(number_S[-1] + 1)]
    return examine_blocks(lambda: iter(blocks), len(sampled.token_ids_N))


@pytest.mark.parametrize("bad", [[3], [3, 4, 5], [0, 38], list(range(20)), list(range(40))])
@pytest.mark.parametrize("value", [np.nan, 5.0, -9999.0])
def test_rows_in_blocks_are_judged_as_a_whole(bad, value):
    rows = [good(12, seed=i) for i in range(40)]
    for i in bad:
        rows[i][0][4:6] = [value] * 2
    sampled = of(*rows)
    (findings, kept_S), (whole, kept_whole_S) = in_blocks(sampled), examine(sampled)
    assert findings == whole and len(findings) == 1 and kept_S.tolist() == kept_whole_S.tolist()


def test_copies_in_other_blocks_are_found():
    rows = [good(20, seed=i) for i in range(20)]
    sampled = of(*rows, *rows, ids=[list(range(20))] * 40)
    (findings, kept_S), (whole, kept_whole_S) = in_blocks(sampled), examine(sampled)
    assert findings == whole and kept_S.tolist() == kept_whole_S.tolist() == [True] * 20 + [False] * 20


def test_patterns_are_looked_for_in_a_sample_that_is_named(monkeypatch):
    monkeypatch.setattr("rl_onoff.compare.examine.SAMPLE", 4000)
    rows = [good(200, seed=i) for i in range(60)]
    [finding], _ = in_blocks(of(*((np.roll(q, 1), p) for q, p in rows)))
    assert finding.check == "shifted" and finding.fatal and 5 < finding.responses < 40
    assert finding.what.endswith(f"of {finding.responses} of {finding.responses} responses, chosen at random from 60")
    assert in_blocks(of(*rows))[0] == []

"""The rule on made-up errors: what counts as a fault, what as rounding, and what is neither."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.layers.made_errors import NUM_LAYERS, add, made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smooth_growth_is_rounding(dtype: str) -> None:
    found = made(dtype=dtype, nats={"float32": 1e-5, "bfloat16": 0.02}[dtype])
    assert found.parting is None and f"as rounding in {dtype} does" in found.sentence
    assert found.typical == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_a_jump_is_named_with_its_positions(kind: str) -> None:
    found = made(lambda errors, norms: add(errors, 0.3, layer=7, kind=kind, start=16))
    assert found.parting is not None
    assert (found.parting.layer, found.parting.where) == (7, kind)
    assert (found.parting.start, found.parting.end, found.parting.jumps) == (16, 128, [7])
    assert found.parting.after == pytest.approx(0.3, rel=0.1) and found.parting.before < 0.02


def test_two_faults_are_told_in_their_order() -> None:
    def change(errors, norms):
        add(errors, 0.1, layer=3, kind="mlp")
        add(errors, 2.0, layer=9, kind="attention")

    found = made(change)
    assert found.parting is not None and (found.parting.layer, found.parting.where) == (3, "mlp")
    assert found.parting.jumps == [3, 9] and "jumps again in layer 9" in found.sentence


def test_a_stream_that_shrinks_is_no_fault() -> None:
    """A layer that takes most of the stream away: the difference stays, the norm falls to a fiftieth."""

    def change(errors, norms):
        for k in range(6, NUM_LAYERS):
            errors["layer", k] *= 50
            norms["layer", k] /= 50
        errors["lm_head", NUM_LAYERS - 1] *= 50

    assert made(change).parting is None


def test_a_few_odd_tokens_are_no_fault() -> None:
    def change(errors, norms):
        errors["layer", 4][[0, 20, 33, 47]] = 0.9

    found = made(change)
    assert found.parting is None and found.points[5]["max"] == pytest.approx(0.9, rel=1e-5)


def test_states_that_are_no_numbers_are_a_fault_and_valid_json() -> None:
    def change(errors, norms):
        for (where, k), values_L in errors.items():
            if k > 4 or (k == 4 and where in ("mlp", "layer")):
                values_L[:] = np.nan

    found = made(change)
    assert found.parting is not None and found.parting.layer == 4
    assert json.dumps(found.to_dict(), allow_nan=False) and found.as_text()


def test_layers_without_an_attention_of_their_own() -> None:
    """Its norms are NaN, in which no error is seen: the layer is named, and the module that is there."""

    def change(errors, norms):
        add(errors, 0.5, layer=5, kind="mlp")
        for k in range(NUM_LAYERS):
            norms["attention", k][:] = np.nan

    found = made(change)
    assert found.parting is not None and (found.parting.layer, found.parting.where) == (5, "mlp")


def test_logprobs_that_the_states_do_not_explain() -> None:
    assert made(dtype="float32", nats=1e-5).parting is None
    found = made(dtype="float32", nats=0.1)
    assert found.parting is not None and found.parting.where == "lm_head" and "LM head" in found.sentence

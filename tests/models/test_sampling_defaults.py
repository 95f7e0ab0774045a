from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rl_onoff.errors import UsageError
from rl_onoff.models.resolve import model_sampling
from rl_onoff.types import Sampling


def model_with(folder: Path, source: str, **settings: object) -> str:
    shutil.copytree(source, folder)
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return str(folder)


def test_what_the_model_says_is_taken_and_the_rest_stays(tiny_llama: str, tmp_path: Path) -> None:
    model = model_with(tmp_path / "model", tiny_llama, temperature=0.6, top_k=20, do_sample=True)
    assert model_sampling(Sampling(n=3, top_p=0.9), model) == Sampling(n=3, temperature=0.6, top_k=20, top_p=0.9)


def test_a_penalty_is_refused(tiny_llama: str, tmp_path: Path) -> None:
    model = model_with(tmp_path / "model", tiny_llama, repetition_penalty=1.1)
    with pytest.raises(UsageError, match=r"repetition_penalty=1.1.*model.sampling_defaults=false"):
        model_sampling(Sampling(), model)


def test_a_model_without_defaults(tiny_llama: str, tmp_path: Path) -> None:
    model = model_with(tmp_path / "model", tiny_llama)
    (tmp_path / "model" / "generation_config.json").unlink()
    with pytest.raises(UsageError, match="no generation_config"):
        model_sampling(Sampling(), model)

from __future__ import annotations

import sys
from pathlib import Path

from rl_onoff import doctor
from tests.conftest import SGLANG_PYTHON


def test_what_is_here(capsys) -> None:
    assert doctor.doctor(SGLANG_PYTHON) == 0
    said = capsys.readouterr().out
    for name in ("python", "huggingface", "vllm", "sglang", "pool=ray", "gpus", "wandb", "cache"):
        assert name in said
    fine = {line.what: line.fine for line in doctor.findings(SGLANG_PYTHON)}
    assert fine["huggingface"] and fine["vllm"] and fine["sglang"]


def test_what_is_missing_comes_with_what_mends_it(tmp_path: Path) -> None:
    import venv

    venv.create(tmp_path / "bare", symlinks=True)  # an interpreter that has none of the engines
    line = doctor._engine("sglang", "sglang", str(tmp_path / "bare/bin/python"), "pip install it")
    assert not line.fine and "not installed" in line.found and line.mend == "pip install it"
    broken = doctor._engine("sglang", "sglang", str(tmp_path / "nothing"), "pip install it")
    assert not broken.fine
    assert doctor._engine("huggingface", "transformers", sys.executable, "").fine

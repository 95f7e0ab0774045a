from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from rl_onoff.models.resolve import different_tensors


def model(folder: Path, **changes: torch.Tensor) -> tuple[str, None]:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tensors = {
        "a": torch.ones(2, 3),
        "b": torch.tensor([float("nan"), 0.0], dtype=torch.bfloat16),
        "c": torch.tensor(1),
    }
    tensors |= changes
    save_file({"a": tensors.pop("a")}, folder / "model-1.safetensors")
    save_file(tensors, folder / "model-2.safetensors")
    return str(folder), None


def test_the_tensors_that_differ_by_a_byte(tmp_path):
    here = model(tmp_path / "here")
    assert different_tensors(here, model(tmp_path / "same")) == []
    zero = model(tmp_path / "zero", b=torch.tensor([float("nan"), -0.0], dtype=torch.bfloat16), c=torch.tensor(2))
    assert different_tensors(here, zero) == ["b", "c"]


def test_models_whose_tensors_cannot_be_told_apart(tmp_path):
    here = model(tmp_path / "here")
    assert different_tensors(here, model(tmp_path / "shape", a=torch.zeros(3, 2))) == []
    assert different_tensors(here, model(tmp_path / "type", a=torch.zeros(2, 3).half())) == []
    assert different_tensors(here, model(tmp_path / "more", d=torch.zeros(1))) == []
    assert different_tensors(here, ("owner/name", None)) == []
    assert different_tensors(here, (str(tmp_path / "nowhere"), None)) == []
    broken = model(tmp_path / "broken")
    (tmp_path / "broken/model-2.safetensors").write_text("no safetensors")
    assert different_tensors(here, broken) == []

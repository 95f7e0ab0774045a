"""Every shipped config composes, and nothing about it is written twice."""

from __future__ import annotations

import dataclasses
import re
import runpy
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rl_onoff.backends import engine_configs
from rl_onoff.cli.main import CONF
from rl_onoff.config import SCHEMAS, RunConfig, register
from rl_onoff.sweeps.jobs import MAX_FOLDER_NAME, job_folder
from tests.conftest import ROOT

DOCS = runpy.run_path(str(ROOT / "docs/make_configuration.py"))
GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())
CHOICES = [(group, file.stem) for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))]
OF_TARGET = {"truth": "huggingface"}  # targets that are not called like their engine
ENGINES = sorted(file.stem for file in (CONF / "backend").glob("*.yaml"))


def composed(*overrides: str) -> RunConfig:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_object(compose("config", [*overrides, "run_dir=x", "sweep_dir=x"]))
    assert isinstance(config, RunConfig)
    return config


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes(group, choice):
    composed(f"{group}={choice}")


@pytest.mark.parametrize("backend", ENGINES)
def test_every_target_composes_with_every_backend(backend):
    for target in [file.stem for file in (CONF / "target").glob("*.yaml")]:
        config = composed(f"backend={backend}", f"target={target}", "model.name=m", "model.dtype=float32")
        assert type(config.backend) is engine_configs()[backend]
        assert config.backend.model_name == "m" and config.backend.weights_dtype == "float32"
        if target == "self":
            assert config.target is None
        else:
            assert type(config.target) is engine_configs()[OF_TARGET.get(target, target)]
            assert config.target.model_name == "m"


def test_every_engine_has_a_group_choice_and_a_file_of_the_public_api():
    assert set(ENGINES) == set(engine_configs())
    configs = ROOT / "rl_onoff/backends/configs"
    assert {file.name for file in configs.iterdir()} == {
        f"{name}_default.yaml" for name in engine_configs() if name != "fake"
    }


def test_an_engines_own_name_and_ours_are_one_option():
    assert composed("backend=vllm", "backend.tp_size=2").backend.num_devices == 2
    assert composed("backend=vllm", "backend.tensor_parallel_size=2").backend.num_devices == 2
    assert composed("backend=huggingface", "backend.torch_dtype=bfloat16").backend.weights_dtype == "bfloat16"


def test_all_engines_follow_the_pool_field_by_field():
    config = composed(
        "pool=ray",
        "pool.wait_s=9",
        "policies=dtypes",
        "target=vllm",
        "target.pool.kind=local",
        "backend.pool.address=auto",
    )
    assert config.target is not None
    pools = [config.backend.pool, config.policies["float32"].pool, config.target.pool, config.pool]
    assert [pool.kind.value for pool in pools] == ["ray", "ray", "local", "ray"]
    assert [pool.address for pool in pools] == ["auto", None, None, None] and all(pool.wait_s == 9 for pool in pools)
    assert config.backend.what_it_computes() == composed().backend.what_it_computes(), (
        "a run folder goes on with another pool"
    )


def test_the_experiment_beats_the_config_and_the_command_line_beats_both():
    assert [stage.value for stage in composed("experiment=score").stages] == ["score", "compare"]
    assert [stage.value for stage in composed("experiment=score", "stages=[generate]").stages] == ["generate"]


# -- a default is written once -----------------------------------------------------------------------------------------


def settings(file: Path) -> list[tuple[Any, dict[str, Any]]]:
    """The dataclasses whose fields a YAML file sets, each with what it sets."""
    group, values = file.parent.name, yaml.safe_load(file.read_text()) or {}
    values = {name: value for name, value in values.items() if name not in ("defaults", "hydra")}
    if group == "policies":
        text = file.read_text()
        return [
            (engine_configs()[re.search(rf"/backend/(\w+)@{name}\b", text)[1]], fields)
            for name, fields in values.items()
        ]
    if group in ("conf", "experiment") or "@package _global_" in file.read_text():
        return [(RunConfig, values)]
    engine = OF_TARGET.get(file.stem, file.stem) if group == "target" else file.stem
    return [(engine_configs()[engine] if group in ("backend", "target") else SCHEMAS[group, group], values)]


def default_of(field: dataclasses.Field) -> Any:
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return value.value if isinstance(value, Enum) else value


@pytest.mark.parametrize("file", sorted(CONF.rglob("*.yaml")), ids=lambda file: str(file.relative_to(CONF)))
def test_yaml_never_restates_a_default(file):
    for schema, values in settings(file):
        fields = {field.name: field for field in dataclasses.fields(schema)}
        for name, value in values.items():
            assert value != default_of(fields[name]), f"{name}: {value} is the schema's default"


# -- every field is documented -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", [RunConfig, *dict.fromkeys(SCHEMAS.values())], ids=lambda schema: schema.__name__)
def test_every_field_has_a_sentence_below_it(schema):
    for kind in schema.__mro__[:-1]:
        said = DOCS["sentences"](kind)
        for field in DOCS["own_fields"](kind):
            if field.name != "_target_":
                assert said.get(field.name, "").endswith("."), f"{kind.__name__}.{field.name}"


def test_the_page_is_up_to_date():
    committed = (ROOT / "docs/configuration.md").read_text()
    assert committed == DOCS["page"](), "run: python docs/make_configuration.py"


# -- the folder of a sweep's job ---------------------------------------------------------------------------------------


def test_a_jobs_folder_is_one_short_name_without_secrets(monkeypatch):
    assert job_folder(["model.name=./a/b", "sampling.n=2", "sweep_dir=x/y"]) == "model.name=._a_b,sampling.n=2"
    monkeypatch.setenv("MINE", "hunter2hunter2")
    pointed_at = OmegaConf.create(["+backend.engine_kwargs.hf_token=${oc.env:MINE}"])
    assert job_folder(pointed_at) == "+backend.engine_kwargs.hf_token=${oc.env:MINE}"
    assert job_folder([]) == "job"
    assert job_folder(["data.limit=3", "sampling.n=2", "+a.b=1"], ["data.limit", "+a.b"]) == "sampling.n=2"
    long = [job_folder([f"model.name={'ü' * 200}", f"sampling.n={n}"]) for n in (1, 2)]
    assert all(len(name.encode()) <= MAX_FOLDER_NAME for name in long) and long[0] != long[1]

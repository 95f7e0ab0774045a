"""Run: python docs/make_configuration.py

Writes docs/configuration.md from the schemas: names, types and defaults from the dataclasses, the sentence from below
each field. A test fails while the committed page differs.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from rl_onoff import analysis_config, config
from rl_onoff.backends import engine_config as engines
from rl_onoff.backends import engine_configs
from rl_onoff.backends.engine_config import WHEN, EngineConfig
from rl_onoff.cli.main import CONF
from rl_onoff.config import SCHEMAS, RunConfig

PAGE = Path(__file__).with_name("configuration.md")

INTRO = """# Configuration

Written by `python docs/make_configuration.py` from the dataclasses in `rl_onoff/config.py`,
`rl_onoff/analysis_config.py`, `rl_onoff/backends/engine_config.py` and the `config.py` of each engine.

Every field is set on the command line as `group.field=value`; a whole group is chosen as `group=choice`.
`model=NAME` is short for `model.name=NAME`. Lists are written `'[a,b]'`, a value with spaces or commas as
`'data.system="Answer briefly, please."'`; `null` is nothing. `rl-onoff --cfg job` shows the composed config,
`rl-onoff --help` five commands.

A secret (a field whose name ends with `token`, `api_key`, `password`, …) comes from the environment:
`'+backend.engine_kwargs.hf_token=${oc.env:HF_TOKEN}'`. A literal one is refused, and its value is written to no
file of the run.
"""

ENGINES = """The engine that samples (`backend.dtype=…`), the one that scores (`target.dtype=…`) and those of a matrix
(`policies.NAME.dtype=…`) have the same fields. `model_name`, `revision`, `tokenizer`, `trust_remote_code`,
`dtype`, `adapter` and `merge_adapter` follow the group `model` where they are not set here, and `pool` follows
the group `pool`, field by field (`target.pool.kind=local`).

`target` is one engine that scores; `targets` are more, each named by you, and the name is that of its scores:
`'+target@targets.f32=huggingface' targets.f32.dtype=float32`. All of them score, `target` too; `target=self` (the
default) adds none, and without any the engine that samples is the one that scores. In a run that samples it scores
beside them, unless `score.own=false`. Two names of one engine both have scores; a `target` that is the engine that
samples adds none. The verdict is about the one that is furthest from the sampler."""


def sentences(schema: Any) -> dict[str, str]:
    """Field -> the sentence below it, of one class without its bases."""
    body = ast.parse(inspect.getsource(schema)).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for line, after in zip(body.body, body.body[1:], strict=False):
        below = after.value if isinstance(after, ast.Expr) else None
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(below, ast.Constant):
            found[line.target.id] = " ".join(str(below.value).split())
    return found


def own_fields(schema: Any) -> list[dataclasses.Field[Any]]:
    """The fields a class declares itself."""
    return [field for field in dataclasses.fields(schema) if field.name in schema.__annotations__]


def shown_default(field: dataclasses.Field[Any]) -> str:
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    if value == MISSING:
        return "to be given"
    if isinstance(value, Enum):
        return f"`{value.value}`"
    if dataclasses.is_dataclass(value):
        return "as below"
    if value == "":
        return ""
    return "`null`" if value is None else f"`{str(value).lower()}`" if isinstance(value, bool) else f"`{value}`"


def shown_type(field: dataclasses.Field[Any]) -> str:
    """The annotation; of an enum, its values."""
    enums = {
        name: kind
        for name, kind in {**vars(engines), **vars(analysis_config), **vars(config)}.items()
        if inspect.isclass(kind) and issubclass(kind, Enum)
    }
    names = [
        " / ".join(member.value for member in enums[part]) if part in enums else part
        for part in re.split(r"(\w+)", str(field.type))
    ]
    return "".join(names).replace(" | None", "").replace("|", "\\|")


def table(schema: Any) -> list[str]:
    said = sentences(schema)
    lines = ["| field | type | default | |", "|---|---|---|---|"]
    for field in own_fields(schema):
        if field.name == "_target_":
            continue
        sentence = said[field.name].replace("|", "\\|")
        lines.append(f"| `{field.name}` | {shown_type(field)} | {shown_default(field)} | {sentence} |")
    return lines


def switches(schema: type[EngineConfig]) -> list[str]:
    """What `experiment=attribute` tries on an engine."""
    if not schema.switches:
        return []
    said = "Switches, which `experiment=attribute` tries one at a time. Where it says `CPU`, one was planted there and "
    said += "found, or was seen to change nothing; an `untried` one needs a GPU, or a model that is quantised:"
    lines = ["", said, "", "| switch | turned to | options | tried | run on |", "|---|---|---|---|---|"]
    for switch in schema.switches:
        options = ", ".join(f"`{name}={json.dumps(value)}`" for name, value in switch.options.items())
        run_on = switch.tried or "untried"
        lines.append(f"| `{switch.name}` | {switch.change} | {options} | {WHEN[switch.when]} | {run_on} |")
    return lines


def choices(group: str) -> list[str]:
    names = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
    return [f"Choices: {', '.join(f'`{group}={name}`' for name in names)}.", ""] if names else []


def page() -> str:
    lines = [INTRO, "## The run", "", *choices("experiment"), *table(RunConfig), ""]
    for group, schema in ((group, schema) for (group, _), schema in SCHEMAS.items() if group != "backend"):
        lines += [
            f"## {group}",
            "",
            (inspect.getdoc(schema) or "").splitlines()[0],
            "",
            *choices(group),
            *table(schema),
            "",
        ]
    lines += ["## backend, target, policies", "", ENGINES, ""]
    lines += [*choices("backend"), *choices("target"), *choices("policies"), *table(EngineConfig), ""]
    for name, schema in engine_configs().items():
        lines += [f"### {name}", "", (inspect.getdoc(schema) or "").splitlines()[0], ""]
        lines += [*table(schema), *switches(schema), ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

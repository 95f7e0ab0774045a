"""The command line as Hydra takes it: flags in front, texts quoted, and no secret in it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from itertools import islice
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.errors import HydraException

from rl_onoff.config import CONF, SCHEMAS, RunConfig
from rl_onoff.redaction import refuse_literals
from rl_onoff.sweeps.jobs import options_in

FLAGS = {flag: action.nargs for flag, action in get_args_parser()._option_string_actions.items()}  # 0: without a value
MULTIRUN = ("-m", "--multirun")
FOLDERS = ("run_dir", "sweep_dir")  # of the whole command, so never one of several
FIXED = "hydra.job.config.override_dirname.exclude_keys"  # Hydra's option: overrides that no job's folder is named by


def understood(arguments: Sequence[str]) -> list[str]:
    """The arguments for Hydra; UsageError for a secret among them. Of a sweep also the names of the options that are
    the same for all jobs, and that no job in the sweep's folder is named by: none where all options are the same, then
    the one job is named by all of them.
    """
    sweeping = any(flag in arguments for flag in MULTIRUN)
    arguments = [quoted(argument, sweeping=sweeping) for argument in arguments]
    is_fixed: dict[str, bool] = {}  # the last word on an option counts
    named: list[str] = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if (override := _parsed(argument)) is None:  # a flag, or a mistake: Hydra says so
            refuse_literals(value, key)
            continue
        taken = override.value()
        choices = taken.list if isinstance(taken, ChoiceSweep) else []
        refuse_literals([Override._convert_value(each) for each in choices] or taken, key)
        name = override.get_key_element()
        is_fixed[name] = not override.is_sweep_override()
        if sweeping and name == "sweep_dir" and is_fixed[name]:
            named = options_in(Path(str(taken)))
    if sweeping:
        fixed = [name for name, of_all in is_fixed.items() if of_all and name not in named]
        names = ",".join(f"'{name}'" for name in fixed if len(fixed) < len(is_fixed))
        arguments = [*arguments, f"{FIXED}=[{names}]"]
    return flags_first(arguments)


def short_model(argument: str) -> str:
    """`model=<hub id or path>` is short for `model.name=…`: the group's only choices are files of conf/model."""
    key, equals, value = argument.partition("=")
    choices = {file.stem for file in (CONF / "model").glob("*.yaml")}
    is_short = key == "model" and equals and not choices.issuperset(value.split(","))
    return f"model.name={value}" if is_short else argument


def quoted(argument: str, *, sweeping: bool) -> str:
    """The override, quoted where Hydra would not take an option's text as it is: a path with =, # or é, the name 1e3.

    A comma is part of the text where no sweep can be meant, or where a file has that name.
    """
    key, equals, value = argument.partition("=")
    name = re.sub(r"^(targets|policies)\.[^.]+\.", "backend.", key.lstrip("+"))
    is_text = name.startswith("compare.columns.") or name in field_names("str", "str | None")
    if not equals or not is_text or value[:1] in ("", "'", '"') or "${" in value:
        return argument
    if value.startswith("~/"):  # which a shell leaves alone behind a =
        argument = f"{key}={(value := os.path.expanduser(value))}"
    whole = key in FOLDERS or Path(value).exists()
    override = _parsed(argument)
    if override is None:
        whole = whole or not (sweeping and "," in value)
        if not whole and re.search(r",\s|[()\[\]{}]", value):  # not a plain sweep: Hydra says what is wrong with it
            return argument
        parts = [value] if whole else value.split(",")
        parts = [part if not whole and _parsed(f"{key}={part}") else _quote(part) for part in parts]
        return f"{key}={','.join(parts)}"
    taken = override.value()
    comma = isinstance(taken, ChoiceSweep) and taken.simple_form and whole
    return f"{key}={_quote(value)}" if comma or isinstance(taken, int | float) else argument


def flags_first(arguments: Sequence[str]) -> list[str]:
    """The command line with Hydra's flags in front: one between two overrides is an error to it."""
    flags, others, rest = [], [], iter(arguments)
    for argument in rest:
        takes = FLAGS.get(argument, "?")  # a flag that may have a value is left where it is
        (others if takes == "?" else flags).extend([argument, *islice(rest, 1 if takes is None else 0)])
    return flags + others


def continue_command(arguments: Sequence[str], folder: str) -> str:
    """The command line with the folder it goes on in, to be pasted into a shell."""
    left_out = tuple(f"{name}=" for name in (*FOLDERS, FIXED))
    return shlex.join(["rl-onoff", *(argument for argument in arguments if not argument.startswith(left_out)), folder])


@cache
def field_names(*types: str) -> tuple[str, ...]:
    """Every field (of these types) as it stands on the command line: `sampling.top_p`, `backend.tp_size`, …"""
    schemas = [("", RunConfig), *((f"{group}.", schema) for (group, _), schema in SCHEMAS.items())]
    schemas += [("target.", schema) for (group, _), schema in SCHEMAS.items() if group == "backend"]
    names = [f"{group}{f.name}" for group, schema in schemas for f in fields(schema) if not types or f.type in types]
    return tuple(dict.fromkeys(names))


def _parsed(argument: str) -> Override | None:
    """The override as Hydra reads it; None when it cannot."""
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def _quote(text: str) -> str:
    return QuotedString(text=text, quote=Quote.single).with_quotes()

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

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.errors import HydraException

from rl_onoff.config import CONF, SCHEMAS, RunConfig
from rl_onoff.redaction import refuse_literals
from rl_onoff.sweeps.start import FIXED, fixed_options

MULTIRUN = ("-m", "--multirun")
BARE_FLAGS = (*MULTIRUN, "-r", "--run", "--resolve")
VALUED_FLAGS = ("-c", "--cfg", "-p", "--package", "-cn", "--config-name", "-cp", "--config-path", "-cd", "--config-dir")
FOLDERS = ("run_dir", "sweep_dir")  # of the whole command, so never one of several


def understood(arguments: Sequence[str]) -> list[str]:
    """The arguments for Hydra; UsageError for a secret among them."""
    sweeping = any(flag in arguments for flag in MULTIRUN)
    arguments = [quoted(argument, sweeping=sweeping) for argument in arguments]
    for argument in arguments:
        key, _, value = argument.partition("=")
        taken = value if (override := _parsed(argument)) is None else override.value()
        choices = taken.list if isinstance(taken, ChoiceSweep) else []  # of a sweep
        refuse_literals([Override._convert_value(each) for each in choices] or taken, key)
    if sweeping:
        names = ",".join(f"'{name}'" for name in fixed_options(arguments))
        arguments = [*arguments, f"{FIXED}=[{names}]"]
    return flags_first(arguments)


def short_model(argument: str) -> str:
    """`model=<hub id or path>` is short for `model.name=…`: the group's only choices are files of conf/model."""
    key, equals, value = argument.partition("=")
    if key != "model" or not equals:
        return argument
    choices = {file.stem for file in (CONF / "model").glob("*.yaml")}
    return argument if all(name in choices for name in value.split(",")) else f"model.name={value}"


def quoted(argument: str, *, sweeping: bool) -> str:
    """The override, quoted where Hydra would not take an option's text as it is: a path with =, # or é, the name 1e3.

    A comma is part of the text where no sweep can be meant, or where a file has that name.
    """
    key, equals, value = argument.partition("=")
    if not equals or not _is_text(key.lstrip("+")) or value[:1] in ("", "'", '"') or "${" in value:
        return argument
    if value.startswith("~/"):  # which a shell leaves alone behind a =
        argument = f"{key}={(value := os.path.expanduser(value))}"
    whole = key in FOLDERS or Path(value).exists()
    override = _parsed(argument)
    if override is None:
        whole = whole or not (sweeping and "," in value)
        if not whole and re.search(r",\s|[()\[\]{}]", value):  # not a plain sweep: Hydra says what is wrong with it
            return argument
        parts = [value] if whole else [part if _parsed(f"{key}={part}") else _quote(part) for part in value.split(",")]
        return f"{key}={_quote(value) if whole else ','.join(parts)}"
    taken = override.value()
    comma = isinstance(taken, ChoiceSweep) and taken.simple_form and whole
    return f"{key}={_quote(value)}" if comma or isinstance(taken, int | float) else argument


def flags_first(arguments: Sequence[str]) -> list[str]:
    """The command line with Hydra's flags in front: one between two overrides is an error to it."""
    flags, others, rest = [], [], iter(arguments)
    for argument in rest:
        if argument in BARE_FLAGS:
            flags.append(argument)
        elif argument in VALUED_FLAGS:
            flags += [argument, *islice(rest, 1)]
        else:
            others.append(argument)
    return flags + others


def continue_command(arguments: Sequence[str], folder: str) -> str:
    """The command line with the folder it goes on in, to be pasted into a shell."""
    left_out = tuple(f"{name}=" for name in (*FOLDERS, FIXED))
    return shlex.join(["rl-onoff", *(argument for argument in arguments if not argument.startswith(left_out)), folder])


def _parsed(argument: str) -> Override | None:
    """The override as Hydra reads it; None when it cannot."""
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


@cache
def field_names(*types: str) -> tuple[str, ...]:
    """Every field (of these types) as it stands on the command line: `sampling.top_p`, `backend.tp_size`, …"""
    schemas = [("", RunConfig), *((f"{group}.", schema) for (group, _), schema in SCHEMAS.items())]
    schemas += [("target.", schema) for (group, _), schema in SCHEMAS.items() if group == "backend"]
    names = [f"{group}{f.name}" for group, schema in schemas for f in fields(schema) if not types or f.type in types]
    return tuple(dict.fromkeys(names))


def _quote(text: str) -> str:
    return QuotedString(text=text, quote=Quote.single).with_quotes()


def _is_text(name: str) -> bool:
    """Whether the option of this name is a text."""
    of_engine = re.sub(r"^(targets|policies)\.[^.]+\.", "backend.", name)
    return name.startswith("compare.columns.") or of_engine in field_names("str", "str | None")

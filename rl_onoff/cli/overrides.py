"""The command line as Hydra takes it: flags in front, texts quoted, and no secret in it. What Hydra says about a wrong
one, as one sentence: the cause, then the override that fixes it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache
from itertools import islice
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.errors import HydraException

from rl_onoff.backends.config import nearest_engine
from rl_onoff.config import CONF, SCHEMAS, RunConfig
from rl_onoff.errors import UsageError, nearest
from rl_onoff.redaction import refuse_literals
from rl_onoff.sweeps.jobs import options_in

FLAGS = {flag: action.nargs for flag, action in get_args_parser()._option_string_actions.items()}  # 0: without a value
FOLDERS = ("run_dir", "sweep_dir")  # of the whole command, so never one of several
FIXED = "hydra.job.config.override_dirname.exclude_keys"  # Hydra's option: overrides that no job's folder is named by
# what an option is called in other programs -> here
ELSEWHERE = {"tp": "tp_size", "dp": "dp_size", "max_length": "max_new_tokens", "num_samples": "n", "num_rows": "limit"}
NOISE = re.compile(r"full_key:|(object_type|reference_type|provider)=|To append to|Config search path|See https")


def understood(arguments: Sequence[str]) -> list[str]:
    """The arguments for Hydra; UsageError for a secret among them, or for what Hydra answers with its own usage.

    `model=<hub id or path>` is short for `model.name=…`, for the group's only choices are files of conf/model. Of a
    sweep also the names of the options that are the same for all jobs, and that no job in the sweep's folder is named
    by: none where all options are the same, then the one job is named by all of them."""
    sweeping, models = any(flag in arguments for flag in ("-m", "--multirun")), set(_choices()["model"])
    arguments = [
        re.sub("^model=", "model.name=", argument) if set(argument[6:].split(",")) - models else argument
        for argument in arguments
    ]
    if sentence := flag_sentence(arguments):
        raise UsageError(sentence)
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


def quoted(argument: str, *, sweeping: bool) -> str:
    """The override, quoted where Hydra would not take an option's text as it is: a path with =, # or é, the name 1e3. A
    comma is part of the text where no sweep can be meant, or where a file has that name."""
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
        return f"{key}={','.join(p if not whole and _parsed(f'{key}={p}') else _quote(p) for p in parts)}"
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


def config_sentence(error: Exception) -> str:
    """Hydra's message and its cause as one sentence, with the nearest name where one was misspelt."""
    words = " ".join(dict.fromkeys(filter(None, (_words(error), _words(error.__cause__))))).rstrip(".")
    words = re.sub(r"^In '\S+': (?=Could not find)|^In 'config': ", "", words)
    if sentence := _no_engine_of_that_name(words, error):
        return sentence
    for pattern, said in SENTENCES:
        if found := re.fullmatch(pattern, words, re.DOTALL):
            words = found.expand(said) if isinstance(said, str) else said(found, error)
            break
    plugin = re.search(r"hydra/(launcher|sweeper)=|hydra_plugins\.", words)
    more = ", and pip install 'rl-onoff[launchers]' brings joblib, Ray, submitit and Optuna" if plugin else ""
    return f"{words} (rl-onoff --help shows the groups, rl-onoff --cfg job every field){more}"


def target_sentence(error: Exception, arguments: Sequence[str]) -> str | None:
    """What fixes `target.FIELD=…` where no target is chosen, which OmegaConf answers with an assertion; else None. Only
    Hydra, having composed the config, knows that: an experiment or a folder given with `-cd` may choose one."""
    if not isinstance(error, AssertionError) or not re.match(r"Unexpected type( for root)?: None", str(error)):
        return None
    typed = next((argument for argument in arguments if re.match(r"\+{0,2}target\.[^=]+=", argument)), None)
    return typed and f"{typed} needs an engine that scores: add target=huggingface"


def flag_sentence(arguments: Sequence[str]) -> str | None:
    """What is wrong with a command line that Hydra answers with its own usage or a traceback: options have no dashes
    here, and a group is chosen by name, which true, null, 1 or no name at all is not. None when nothing is wrong."""
    known = (*_choices(), *field_names())
    for before, argument, following in zip(["", *arguments], arguments, [*arguments[1:], ""], strict=False):
        typed, equals, value = argument.partition("=")
        name = typed.lstrip("-").replace("-", "_")
        option = next((each for each in (name, name.replace("_", ".", 1)) if each in known), _nearest(name))
        dashed = typed.startswith("--") or (typed.startswith("-") and option is not None)
        if dashed and name and not any(flag.startswith(typed) for flag in FLAGS if flag.startswith("--")):
            if not equals:
                value = following if following and not following.startswith("-") and "=" not in following else "VALUE"
            meant = f"{option}={value}" if option else "NAME=VALUE, as rl-onoff --help shows"
            return f"{typed} is not an option, for options have no dashes: write {meant}"
        of_a_flag = before.startswith("-") and FLAGS.get(before) != 0
        if "/" in argument and not equals and argument[0] not in "-+~" and not of_a_flag:
            return f"'{argument}' is not an override: write {_meant(argument)}"
        if typed in _choices() and re.fullmatch(r"true|false|yes|no|on|off|null|[-+]?\d+(\.\d+)?", value.lower()):
            return _no_choice(typed, value, _choices()[typed])
    return None


def _no_option(found: re.Match[str], error: Exception) -> str:
    """How to fix an option that is not there; Hydra's message repeats what was typed."""
    name, typed = found[1], _typed(error)
    if re.search(r"\b(compare\.columns|engine_kwargs|runtime_env)\.", name):  # whose names are the user's own
        return f"there is no option {name} yet: add it with a plus, +{typed or f'{name}=VALUE'}"
    kind = re.search(r"^\s*object_type=(\w+)$", str(error.__cause__), re.MULTILINE)  # of what lacks the option
    schema = next((schema for schema in SCHEMAS.values() if kind and schema.__name__ == kind[1]), None)
    near = _nearest(name, schema and [each.name for each in fields(schema)])
    fix = f": did you mean {near}?" if near else "; an engine's own is set as +backend.engine_kwargs.NAME=VALUE"
    return f"there is no option {name}{fix}"


def _no_engine_of_that_name(words: str, error: Exception) -> str | None:
    """What fixes `targets.NAME.FIELD=…`, or a policy's, where nothing has that name yet; else None."""
    assigned = re.match(r"Error merging override (.*?) Invalid type assigned.*not a subclass of EngineConfig", words)
    # the engine itself is not there, rather than a field of it
    lacks = re.search(r"^\s*full_key: (?:targets|policies)\.[^.\s]+$", str(error.__cause__), re.MULTILINE)
    typed = assigned[1] if assigned else _typed(error) if lacks else ""
    if (found := re.match(r"\+{0,2}(targets|policies)\.([^.=]+)(\.\S+?)?=(.*)", typed)) is None:
        return None
    kind, name, field, value = found.groups()
    group = "target" if kind == "targets" else "backend"
    engine = value if not field and value in _choices()[group] else "huggingface"
    return f"{typed} needs an engine of that name: add '+{group}@{kind}.{name}={engine}'"


def _no_choice(group: str, value: str, choices: Sequence[str]) -> str:
    """How to fix a choice that a group does not have."""
    fix = f"set {group} to one of {' '.join(choices)}"
    off = value.lower() in ("false", "off", "no", "null", "0")
    if near := "none" if off and "none" in choices else nearest_engine(value, choices):
        fix += f"; did you mean {group}={near}?"
    elif group == "data":
        fix = f"set data.path={value} for a file or a datasets id, or data to one of {' '.join(choices)}"
    return f"{group}={value} is not one of the choices: {fix}"


def _meant(word: str) -> str:
    """The override that a word without a = was meant for."""
    groups = _choices()
    if word in groups:
        return f"{word}=NAME, one of {' '.join(groups[word])}"
    if word in field_names():
        return f"{word}=VALUE, without blanks around the ="
    if group := next((group for group, choices in groups.items() if word in choices), None):
        return f"{group}={word}"
    if word.endswith((".jsonl", ".csv", ".parquet", ".json")):
        return f"data.path={word}"
    if "/" in word or word.endswith(".gguf"):
        return f"model={word}"
    near = nearest(word, groups["experiment"], cutoff=0.7)
    return f"experiment={near}" if near else "NAME=VALUE"


@cache
def _choices() -> dict[str, list[str]]:
    """The groups of conf/ and their choices; first the groups that are meant where several have one choice's name."""
    names = sorted(folder.name for folder in CONF.iterdir() if any(folder.glob("*.yaml")))
    ordered = dict.fromkeys(("experiment", "backend", "model", "sampling", *names))
    return {name: sorted(file.stem for file in (CONF / name).glob("*.yaml")) for name in ordered}


def _nearest(name: str, there: Sequence[str] | None = None) -> str | None:
    """The field that was meant: one of the group that is spelt nearly so, else the only one that begins so, else one of
    another group with the very name. `there`: the fields that the group has, where that is known."""
    group, _, last = name.rpartition(".")
    last = ELSEWHERE.get(last, last)
    known = [known.rpartition(".") for known in field_names()]
    there = [field for of, _, field in known if of == group] if there is None else there
    begun = [field for field in there if field.startswith(last)] if group and len(last) > 1 else []
    if near := nearest(last, there, cutoff=0.7) or (begun[0] if len(begun) == 1 else None):
        return f"{group}.{near}".lstrip(".")
    engines = ("backend", "target", "targets", "policies")
    of_an_engine = group.partition(".")[0] in engines  # which the options of another engine do not help
    others = (of for of, _, field in known if field == last and of and not (of_an_engine and of in engines))
    return next((f"{of}.{last}" for of in others), None)


def _typed(error: Exception) -> str:
    """The override that Hydra proposes to append, which is the one that was typed; empty when it proposes none."""
    found = re.search(r"To append to your config use \+(.+)", str(error))
    return found[1] if found else ""


def _words(error: BaseException | None) -> str:
    """An exception's message in one line, without Hydra's trace of keys, types and search paths."""
    lines = [line.strip() for line in str(error or "").splitlines()]
    return " ".join(line for line in lines if line and not NOISE.match(line))


_REFUSED = r"Error merging override (\S+?)=(.*?) "
SENTENCES: tuple[tuple[str, str | Callable[[re.Match[str], Exception], str]], ...] = (  # what Hydra says -> ours
    (r"Could not find '(hydra/\w+|[^/\s]+)/(\S+)' Available options in '\S+': (.+)",
     lambda found, error: _no_choice(found[1], found[2], found[3].split())),
    (r"Could not override\.? ?'?([^' ]+?)'?\. (?:Key .*|.*does not exist.*)", _no_option),
    (rf"{_REFUSED}field '\S+' is not Optional", r"\1=\2 is refused: set it to a value, for it cannot be null"),
    (rf"{_REFUSED}Invalid value '.*', expected one of \[(.+)\]", r"\1=\2 is refused: set \1 to one of \3"),
    (rf"{_REFUSED}Invalid value assigned: \w+ is not a ListConfig.*",
     r"\1=\2 is refused, for \1 is a list: set \1=[\2]"),
    (rf"{_REFUSED}Value .*Integer.*", r"\1=\2 is refused: set \1 to a whole number"),
    (rf"{_REFUSED}Value .*Float.*", r"\1=\2 is refused: set \1 to a number"),
    (rf"{_REFUSED}Value .*bool.*", r"\1=\2 is refused: set \1 to true or false"),
    (rf"{_REFUSED}((?:Value|Invalid|Cannot|Object) .*)", r"\1=\2 is refused: set \1 to a value of its type (\3)"),
    (r"Error parsing override '([^']*)' missing EQUAL .*",
     lambda found, error: f"'{found[1]}' is not an override: write {_meant(found[1])}"),
    (r"(.*(?:no viable alternative|extraneous|mismatched|token recognition|NoViableAlt).*)",
     r"""an override cannot be read (\1): quote a value with blanks or brackets twice: 'sampling.stop=["a[b"]'"""),
    (r"Ambiguous value for argument '([^']+)' .*",
     r"""\1 has several values: add -m to run each, write NAME=[a,b] for a list, or 'NAME="a,b"' for a text"""),
)  # fmt: skip

"""What Hydra says about a wrong command line, as one sentence: the cause, then the override that mends it."""

from __future__ import annotations

import re
from difflib import get_close_matches

from rl_onoff.config import field_names

SENTENCES = (  # what Hydra says -> the cause, then the override that mends it
    (r"Could not find '(\S+)/(\S+)' Available options in '\S+': (.+)", r"\1=\2 is not one of the choices: set \1 to one of \3"),
    (r"Could not (?:override|delete from config)\.? ?'?([^' ]+?)'?\. (?:Key .*|.*does not exist.*)", r"there is no option \1"),
    (r"Error merging override (\S+?)=(.*?) field '\S+' is not Optional", r"\1=\2 is refused: set it to a value, for it cannot be null"),
    (r"Error merging override (\S+?)=(.*?) Invalid value '.*', expected one of \[(.+)\]", r"\1=\2 is refused: set \1 to one of \3"),
    (r"Error merging override (\S+?)=(.*?) ((?:Value|Invalid|Cannot|Object) .*)", r"\1=\2 is refused: set \1 to a value of its type (\3)"),
    (r"Error parsing override '([^']*)' missing EQUAL .*", r"'\1' is not an override: write NAME=VALUE"),
    (r"(.*(?:no viable alternative|extraneous|mismatched|token recognition|NoViableAlt).*)",
     r"""an override cannot be read (\1): quote a value with blanks, commas or brackets twice, as in 'data.system="Be brief, please."'"""),
    (r"Ambiguous value for argument '([^']+)' .*",
     r"""\1 has several values: add -m to run each, write NAME=[a,b] for a list, or 'NAME="a,b"' for a text with a comma"""),
)  # fmt: skip


def config_sentence(error: Exception) -> str:
    """Hydra's message and its cause as one sentence, with the nearest name where one was misspelt, and where to look."""
    words = " ".join(dict.fromkeys(filter(None, (_words(error), _words(error.__cause__))))).removeprefix("In 'config': ").rstrip(".")
    for pattern, sentence in SENTENCES:
        if found := re.fullmatch(pattern, words, re.DOTALL):
            words = found.expand(sentence)
            break
    if name := re.fullmatch(r"there is no option (\S+)", words):
        near = _nearest(name[1])
        words += f": did you mean {near}?" if near else "; an engine's own is set as +backend.engine_kwargs.NAME=VALUE"
    return f"{words} (rl-onoff --help shows the groups, rl-onoff --cfg job every field)"


def _nearest(name: str) -> str | None:
    """The field that was meant: one of the same group that is spelt nearly so, else one of another group with the very name."""
    group, _, last = name.rpartition(".")
    known = [known.rpartition(".") for known in field_names()]
    near = get_close_matches(last, [field for of, _, field in known if of == group], n=1, cutoff=0.7)
    if near:
        return f"{group}.{near[0]}" if group else near[0]
    return next((f"{of}.{field}" for of, _, field in known if field == last and of), None)


def _words(error: BaseException | None) -> str:
    """An exception's message in one line, without Hydra's trace of keys, types and search paths."""
    noise = ("full_key:", "object_type=", "reference_type=", "To append to your config use", "Config search path", "provider=", "See https")
    lines = [line.strip() for line in str(error or "").splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(noise))

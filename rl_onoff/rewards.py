"""How responses are judged. A reward is a plain function (text, answer, meta) -> float, named in the config: `text` is
the response, `answer` the row's reference answer, `meta` whatever else the row had; from 1 on it is correct."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import math
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rl_onoff.errors import UsageError, nearest, plural
from rl_onoff.types import Key

log = logging.getLogger(__name__)
Reward = Callable[[str, str, Mapping[str, Any]], float]

FAILED = "reward_error"  # in a response's meta: why it has no reward though it has an answer to be judged by
CORRECT = 1.0  # the reward from which on a response counts as right
MAX_CHARS = 4000  # of a response without \boxed{}, from its end, that are searched for an answer
MAX_NODES = 400  # of an expression that is compared; larger ones take sympy minutes
MAX_EXPONENT = 1000  # and the largest factorial; 9^{9^{9}} written out would take all memory
TIMEOUT_S = 5

for _part in ("parser", "grader"):  # which warn of every call without a time limit
    logging.getLogger(f"math_verify.{_part}").addFilter(lambda record: "Timeout is disabled" not in str(record.msg))


def math_verify(text: str, answer: str, meta: Mapping[str, Any] | None = None) -> float:
    """1.0 if the response's answer equals the reference, 0.0 if not or if there is none.
    The answer is what the last \\boxed{} holds, else the last number or formula of the text."""
    import math_verify as library

    boxed = last_boxed(text)
    said = text[-MAX_CHARS:] if boxed is None else boxed
    if said.strip() == answer.strip():
        return 1.0
    # The library's time limit is a signal, which only a main thread may set; elsewhere _too_large keeps sympy short.
    timeout = TIMEOUT_S if threading.current_thread() is threading.main_thread() else None

    def parse(part: str) -> list[Any]:
        items = library.parse(part, parsing_timeout=timeout or 0)
        return [item for item in items if isinstance(item, str) or not _too_large(item)]

    gold = parse(_in_box(answer))
    found = parse(said.replace("\\$", "") if boxed is None else _in_box(boxed))  # \\$ is money, not mathematics
    return float(bool(gold and found) and library.verify(gold, found, timeout_seconds=timeout))


def last_boxed(text: str) -> str | None:
    """What the last complete \\boxed{…} holds, braces inside it included; None if there is none."""
    found, open_braces = None, []
    for brace in re.finditer(r"\\boxed\s*\{|\{|\}", text):
        if brace[0] != "}":
            open_braces.append((brace.end(), len(brace[0]) > 1))
        elif open_braces:
            start, is_box = open_braces.pop()
            found = text[start : brace.start()] if is_box else found
    return found


def _in_box(answer: str) -> str:
    return answer if "\\boxed" in answer else f"\\boxed{{{answer.strip().strip('$')}}}"


def _too_large(expression: Any) -> bool:
    """Whether evaluating a parsed expression could take for ever; it is parsed without being evaluated."""
    import sympy

    for count, node in enumerate(sympy.preorder_traversal(expression)):
        if count > MAX_NODES:
            return True
        if isinstance(node, (sympy.Pow, sympy.factorial)):
            grows = node.args[-1]  # the exponent, or what the factorial is of
            towers = grows.has(sympy.Pow, sympy.factorial) and not grows.free_symbols
            if towers or any(abs(number) > MAX_EXPONENT for number in grows.atoms(sympy.Number)):
                return True
    return False


class Judge:
    """Rewards of a run's responses. One that fails is left empty: sampling is dear, a bad function must not end it."""

    def __init__(self, reward: Reward | None):
        self.reward = reward
        self.judged = self.failed = 0

    def __call__(self, text: str, meta: Mapping[str, Any], response: Key) -> tuple[float | None, str | None]:
        """(reward, why there is none though there should be)."""
        if self.reward is None or meta.get("answer") is None:
            return None, None
        self.judged += 1
        try:
            value = self.reward(text, meta["answer"], meta)
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"it returned {value!r} where a finite number is wanted")
            return float(value), None
        except Exception as error:  # the user's own function may raise anything
            self.failed, why = self.failed + 1, f"{type(error).__name__}: {error}"[:200]
            if self.failed == 1:
                words = "the reward failed on response %s, which is kept without one (%s): %s"
                log.warning(words, response, why, "fix reward.function, or set reward=none")
            return None, why

    def conclude(self) -> None:
        """Say once how many failed."""
        if self.failed:
            words = "the reward failed on %d of %s, kept without one: fix reward.function"
            log.warning(words, self.failed, plural(self.judged, "response"))


def load_reward(spec: str | None) -> Reward | None:
    """The reward that `package.module:name` or `file.py:name` names; a file is looked for from the current folder. None
    where no reward is named."""
    if not spec:
        return None
    here = f"reward.function={spec}"
    place, colon, name = spec.rpartition(":")
    if not (place and colon and name):
        stem, _, last = spec.strip(":").rpartition(".")
        file = f"{stem}.py" if last == "py" or Path(f"{stem}.py").is_file() else stem
        known = stem and (last == "py" or not colon)
        meant = f"{file}:{'NAME' if last == 'py' else last}" if known else "package.module:name"
        raise UsageError(f"{here} names no function: set reward.function={meant} or reward.function=file.py:name")
    path = Path(place).expanduser()
    try:
        if path.suffix == ".py":
            found = importlib.util.spec_from_file_location(f"rl_onoff_reward_{path.stem}", path)
            assert found is not None and found.loader is not None
            module = importlib.util.module_from_spec(found)
            sys.modules[module.__name__] = module  # dataclasses and pickle look a module up by its name
            found.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except Exception as error:  # a user's file may raise anything when it is run, a SyntaxError included
        why = f"{place} of {here} cannot be imported ({type(error).__name__}: {error}): fix it, or set reward=none"
        if path.suffix != ".py" and ("/" in place or Path(f"{place}.py").is_file()):
            why = f"{here} names a file without its ending: set reward.function={place}.py:{name}"
        elif path.suffix == ".py" and not path.is_file():
            why = f"the file {place} of {here} does not exist: set reward.function=FILE.py:NAME to one that does"
        raise UsageError(why) from error
    function: Reward | None = getattr(module, name, None)
    if not callable(function):
        functions = inspect.getmembers(module, inspect.isfunction)
        there = [key for key, f in functions if f.__module__ == module.__name__ and not key.startswith("_")]
        why = f"{place} of {here} has no function {name!r} but {', '.join(there) or 'none at all'}"
        meant = nearest(name, there, cutoff=0.5) or next(iter(there), "NAME")
        raise UsageError(f"{why}: set reward.function={place}:{meant}")
    try:
        inspect.signature(function).bind("", "", {})
    except TypeError as error:
        why = f"{here} cannot be called with (text, answer, meta): {error}: give it these three parameters"
        raise UsageError(why) from error
    except ValueError:  # a function of C that does not tell its parameters
        pass
    return function


def summarise_rewards(rewards: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Over prompts, each with equal weight: mean reward, accuracy, and pass@k for k = 1, 2, 4, … up to the samples that
    every prompt has: the probability that one of k of a prompt's responses, drawn without putting back, is correct."""
    judged = [values for values in rewards.values() if len(values)]
    if not judged:
        return {}
    correct = [(len(values), sum(value >= CORRECT for value in values)) for values in judged]
    summary = {
        "num_prompts": float(len(judged)),
        "num_responses": float(sum(map(len, judged))),
        "reward_mean": sum(sum(values) / len(values) for values in judged) / len(judged),
        "accuracy": sum(right / n for n, right in correct) / len(judged),
    }
    for k in (1 << i for i in range(min(map(len, judged)).bit_length())):
        estimates = [1.0 - math.comb(n - right, k) / math.comb(n, k) for n, right in correct]
        summary[f"pass@{k}"] = sum(estimates) / len(estimates)
    return summary

"""Secrets come from the environment alone: a literal one is refused, and an interpolated one is never written down. A
secret is known by the name it stands under in the config or the environment: `hf_token`, `api_key`, `password`, …"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from rl_onoff.errors import UsageError

MASK = "***"
MIN_LENGTH = 8  # of a value that is looked for in other texts; a shorter one would match by chance
_SECRET_KEY = re.compile(
    r"(^|_)(token|secrets?|password|passwd|passphrase|credentials?|authorization|bearer|api_?keys?"
    r"|(access|private|secret|auth)_keys?)$"
)
_TOKENIZER_KEY = re.compile(r"(^|_)(bos|eos|pad|unk|sep|cls|mask|stop|image|start|end|special)_token$")
_LOGIN_IN_URL = re.compile(r"(?<=://)[^/@\s]+:[^/@\s]+(?=@)")


def secret_key(key: Any) -> str:
    """The name if its value is a secret: `hf_token`, `apiKey`, `HF_TOKEN`; empty for `max_tokens`, `eos_token`."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[^a-zA-Z0-9]+", "_", str(key)).lower().strip("_")
    return str(key) if _SECRET_KEY.search(snake) and not _TOKENIZER_KEY.search(snake) else ""


def secrets_in(config: Any, name: str = "", key: str = "") -> Iterator[tuple[str, str]]:
    """The dotted name and the text of every secret in a config. `key`: the secret's key that `config` stands under."""
    if isinstance(config, Mapping):
        for inner, item in config.items():
            yield from secrets_in(item, f"{name}.{inner}".lstrip("."), key or secret_key(inner))
    elif isinstance(config, list | tuple):
        for item in config:
            yield from secrets_in(item, name, key)
    elif _can_be_secret(config, key) or (isinstance(config, str) and _LOGIN_IN_URL.search(config)):
        yield name, str(config)


def refuse_literals(config: Any, name: str = "") -> None:
    """UsageError for a secret that a config holds as plain text; the message does not quote it."""
    for found, text in secrets_in(config, name, secret_key(name)):
        if "${" not in text and text != "???":
            option = found.lstrip("+")
            plus = "++" if re.search(r"\b(engine_kwargs|runtime_env)\.", option) else ""
            variable = re.sub(r"\W", "_", option.rpartition(".")[2]).upper()
            fix = f"export it and set '{plus}{option}=${{oc.env:{variable}}}'"
            raise UsageError(f"{option} is a literal secret: {fix}, for example")


def masked(config: Any, key: str = "", secrets: Collection[str] | None = None) -> Any:
    """A copy without secrets, to be written down: in plain lists and dicts, Enums by their values, paths as text."""
    secrets = secrets_of_environment() if secrets is None else secrets
    if isinstance(config, Mapping):
        return {inner: masked(item, key or secret_key(inner), secrets) for inner, item in config.items()}
    if isinstance(config, list | tuple | set | frozenset):
        return [masked(item, key, secrets) for item in config]
    if isinstance(config, Enum):
        return config.value
    if _can_be_secret(config, key):
        return MASK
    return masked_text(str(config), secrets) if isinstance(config, str | Path) else config


def masked_text(text: str, secrets: Collection[str]) -> str:
    """A text without these secrets, and without a login in a URL."""
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= MIN_LENGTH:
            text = text.replace(secret, MASK)
    return _LOGIN_IN_URL.sub(MASK, text)


def secrets_of_environment() -> set[str]:
    return {value for name, value in os.environ.items() if secret_key(name)}


def _can_be_secret(value: Any, key: str) -> bool:
    """Whether a leaf under a secret's key is one: a text or a number, but not the number of a `…token`."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and not key.lower().endswith("token")
    return bool(key) and (number or (isinstance(value, str) and value != ""))

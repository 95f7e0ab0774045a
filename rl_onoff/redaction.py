"""No secret in any file of a run: what counts as one, and how it is taken out of a config, a command line, a log and a file.

A secret is known by the name it stands under (`hf_token`, `api_key`, `password`, …), on the command line, in the config or in
the environment. Its value is masked there, and wherever else the same text turns up.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

MASK = "***"
MIN_LENGTH = 8  # of a value that is looked for in other texts; a shorter one would match by chance
_SECRET_KEY = re.compile(
    r"(^|_)(token|secrets?|password|passwd|passphrase|credentials?|authorization|bearer|api_?keys?|(access|private|secret|auth)_keys?)$"
)
_TOKENIZER_KEY = re.compile(r"(^|_)(bos|eos|pad|unk|sep|cls|mask|stop|image|start|end|special)_token$")
_ITEM = re.compile(r"""(["']?([\w-]+)["']?\s*:\s*)("[^"]*"|'[^']*'|[^\s,{}\[\]]+)""")
_LOGIN_IN_URL = re.compile(r"(?<=://)[^/@\s]+:[^/@\s]+(?=@)")
_INTERPOLATION = re.compile(r"\$\{[^{}]*\}")


def is_secret_key(key: str) -> bool:
    """Whether a value of this name is a secret: `hf_token`, `apiKey`, `HF_TOKEN`; not `max_tokens`, `eos_token`, `tokenizer`."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()
    snake = re.sub(r"[^a-z0-9]+", "_", snake).strip("_")
    return bool(_SECRET_KEY.search(snake)) and not _TOKENIZER_KEY.search(snake)


def secret_values(environ: Mapping[str, str]) -> frozenset[str]:
    """Values of the environment's secrets, to be found again where a config interpolated them; short ones would match by chance."""
    return frozenset(value for key, value in environ.items() if is_secret_key(key) and len(value) >= MIN_LENGTH)


def secrets_in(value: Any, *, secret: bool = False) -> frozenset[str]:
    """Texts under a key that names a secret, anywhere in a config, long enough to be found again elsewhere."""
    if isinstance(value, Mapping):
        return frozenset().union(
            *(secrets_in(item, secret=secret or is_secret_key(str(key))) for key, item in value.items())
        )
    if isinstance(value, list | tuple):
        return frozenset().union(*(secrets_in(item, secret=secret) for item in value))
    text = str(value)
    return (
        frozenset([text]) if secret and len(text) >= MIN_LENGTH and not _INTERPOLATION.fullmatch(text) else frozenset()
    )


def redact(value: Any, secrets: Collection[str] = ()) -> Any:
    """A copy, in plain lists and dicts, with '***' for values under a key that names a secret, for `secrets` inside any text
    and for a login inside a URL. Enums become their values and paths text, so that the copy can be written down.
    """
    if isinstance(value, Mapping):
        return {
            key: _mask(item, key) if is_secret_key(str(key)) else redact(item, secrets) for key, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [redact(item, secrets) for item in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, str | Path):
        text = str(value)
        for secret in sorted(secrets, key=len, reverse=True):
            text = text.replace(secret, MASK)
        return _LOGIN_IN_URL.sub(MASK, text)
    return value


def _mask(value: Any, key: str) -> Any:
    """Masks every leaf but the ones that cannot be a secret: nothing, a switch, the number of a `…token`, `${an interpolation}`."""
    if isinstance(value, Mapping):
        return {inner: _mask(item, key) for inner, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mask(item, key) for item in value]
    if (
        value in (None, "")
        or isinstance(value, bool)
        or (isinstance(value, int | float) and key.lower().endswith("token"))
    ):
        return value
    return value if isinstance(value, str) and _INTERPOLATION.fullmatch(value) else MASK


def redact_override(argument: str, secrets: Collection[str] = ()) -> str:
    """The same for an argument of a command line: `a.hf_token=…`, and `a={hf_token: …}` too."""
    key, equals, value = argument.partition("=")
    if equals and value and is_secret_key(key):
        return f"{key}={_mask(value, '')}"
    inside = _ITEM.sub(lambda item: f"{item[1]}{_mask(item[3], '')}" if is_secret_key(item[2]) else item[0], argument)
    return redact(inside, secrets)


def redact_config(config: Any, secrets: Collection[str] = ()) -> Any:
    """`redact` for Hydra's configs, in which the items of a list, and the name of a job's folder, may be overrides."""
    return redact(_redact_overrides(config, secrets), secrets)


def _redact_overrides(value: Any, secrets: Collection[str]) -> Any:
    if isinstance(value, Mapping):
        return {
            key: ",".join(redact_override(part, secrets) for part in item.split(","))
            if key == "override_dirname" and isinstance(item, str)
            else _redact_overrides(item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [
            redact_override(item, secrets) if isinstance(item, str) else _redact_overrides(item, secrets)
            for item in value
        ]
    return value


class RedactingFilter(logging.Filter):
    """Takes secrets out of what is logged, whichever library logs it."""

    def __init__(self, secrets: Iterable[str]):
        super().__init__()
        self.secrets = frozenset(secrets)

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        clean = redact(message, self.secrets)
        if clean != message:
            record.msg, record.args = clean, None
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        record.exc_text = record.exc_text and redact(record.exc_text, self.secrets)
        return True


def protect_log(secrets: Collection[str]) -> None:
    """Put the filter on every handler there is; a handler of an earlier job of the sweep gets it once."""
    for handler in logging.getLogger().handlers:
        handler.filters = [kept for kept in handler.filters if not isinstance(kept, RedactingFilter)]
        handler.addFilter(RedactingFilter(secrets))


def all_secrets(config: Any) -> frozenset[str]:
    """The values of a config's and the environment's secrets."""
    return secrets_in(config) | secret_values(os.environ)

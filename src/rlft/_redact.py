"""Masking of secrets in whatever is shown or written: configurations, reports, messages."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from typing import Any, TypeVar

__all__ = ["LOGGERS", "MASK", "guard_logs", "redact", "secret_keys"]

MASK = "[redacted]"
#: Every logger of the library.
LOGGERS = ("rlft", "rlft.rewards")

T = TypeVar("T")

# A token is long and has a digit or a capital, which tells hf_AbC123... from hf_datasets.
_SHAPES = re.compile(
    r"""
    (?<![A-Za-z0-9])(?:
        hf_(?=[A-Za-z0-9]*[A-Z0-9])[A-Za-z0-9]{8,}
      | sk-(?=[A-Za-z0-9_-]*[A-Z0-9])[A-Za-z0-9_-]{8,}
      | gh[opsur]_[A-Za-z0-9]{16,} | github_pat_[A-Za-z0-9_]{16,} | glpat-[A-Za-z0-9_-]{16,}
      | xox[abeprs]-[A-Za-z0-9-]{10,}
      | (?:AKIA|ASIA)[0-9A-Z]{16} | AIza[A-Za-z0-9_-]{30,}
      | pypi-[A-Za-z0-9_-]{16,} | npm_[A-Za-z0-9]{30,}
      | eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*
    )
    | -----BEGIN[ A-Z]*PRIVATE\ KEY-----.*?(?:-----END[ A-Z]*PRIVATE\ KEY-----|\Z)
    """,
    re.VERBOSE | re.DOTALL,
)
_BEARER = re.compile(r"\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)
# A password may hold slashes and @; digits and then a slash after the colon are a port, though, and no password.
_URL_LOGIN = re.compile(
    r"""(\b[a-z][a-z0-9+.-]*://)[^\s/@:]*:(?!\d{1,5}[/?\#])[^\s"'<>@]+(?:@[^\s"'<>/@]+)*@""", re.IGNORECASE | re.VERBOSE
)
_ASSIGNED = re.compile(
    r"""((?:(?<![A-Za-z0-9])[\w-]{0,64}(?:token(?:_[a-z]{1,32})?|api[_-]?key|secret|passw(?:or)?d|passphrase|credentials?|access[_-]?key|private[_-]?key)
         |(?<![A-Za-z0-9])(?-i:[A-Z0-9_]{0,64}_(?:KEY|PWD|PAT|PASS)))["']?\s*[=:]\s*)(["']?)([^\s"',;&}]{4,})""",
    re.IGNORECASE | re.VERBOSE,
)
_SECRET_WORDS = {"secret", "secrets", "password", "passwd", "passphrase", "credential", "credentials", "authorization"}
_SECRET_ENDS = ("api_key", "apikey", "access_key", "private_key", "secret_key", "auth_key", "signing_key")
# Last words of environment variables that hold a secret.
_VARIABLE_ENDS = {"key", "pwd", "pat", "pass", "passwd", "password", "passphrase", "pw"}
# Words before "token" that name a symbol of the vocabulary, not a key to a door.
_VOCABULARY = set(
    "pad eos bos unk mask sep cls stop special image video audio start end begin per new next last".split()
)


def redact(value: T) -> T:
    """The same value with everything that looks like a secret replaced by ``[redacted]``.

    In text: tokens of known shapes (``hf_...``, ``sk-...``, cloud and repository keys, bearer headers, private-key
    blocks, logins in URLs), ``password=...``-like assignments, and the values of secret-looking environment variables.
    In mappings: also every non-empty value under a key named like a secret (``token``, ``api_key``, ``password``).
    ``pad_token``, ``num_tokens`` and their like stay.

    Args:
        value: text, or any nesting of mappings, lists and tuples; other things come back unchanged.

    Returns:
        A redacted copy.
    """
    return _redact(value, _environment_secrets())


def secret_keys(value: Any, path: str = "") -> list[str]:
    """Dotted paths of the keys in nested mappings and lists that are named like a secret and hold something.

    Args:
        value: any nesting of mappings, lists and tuples.
        path: put before each.
    """
    found = []
    if isinstance(value, Mapping):
        for key, inner in value.items():
            place = f"{path}.{key}" if path else str(key)
            hidden = isinstance(key, str) and _is_secret(key) and _mask(inner) == MASK
            found += [place] if hidden else secret_keys(inner, place)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            found += secret_keys(inner, f"{path}[{index}]")
    return found


def _redact(value: Any, known: list[str]) -> Any:
    if isinstance(value, str):
        return _redact_text(value, known)
    if isinstance(value, Mapping):
        return {
            _redact(key, known): _mask(inner) if isinstance(key, str) and _is_secret(key) else _redact(inner, known)
            for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        inner = [_redact(item, known) for item in value]
        return inner if isinstance(value, list) else tuple(inner)
    return value


def _mask(value: Any) -> Any:
    """Hide a value that sits under a secret's name; None, True and empty say nothing and stay."""
    if value is None or isinstance(value, bool) or (isinstance(value, (str, list, tuple, Mapping)) and not value):
        return value
    return MASK


def _words(key: str) -> list[str]:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower().replace("-", "_").replace(".", "_").split("_")


def _is_secret(key: str) -> bool:
    words = [word for word in _words(key) if word]
    if _SECRET_WORDS & set(words) or "_".join(words).endswith(_SECRET_ENDS):
        return True
    if key.isupper() and _is_secret_variable(words):
        return True
    return bool(words) and words[-1] == "token" and not (len(words) > 1 and words[-2] in _VOCABULARY)


def _is_secret_variable(words: list[str]) -> bool:
    """The same for names of environment variables, which are freer: KAGGLE_KEY, PGPASSWORD, MYSQL_PWD, HF_TOKEN_READ."""
    if not words or (len(words) == 1 and words[0] in ("pwd", "oldpwd")):  # the shell's folders
        return False
    return (
        (len(words) > 1 and words[-1] in _VARIABLE_ENDS)
        or any(part in word for word in words for part in ("password", "passwd", "apikey"))
        or any(word == "token" and before not in _VOCABULARY for before, word in zip(["", *words], words, strict=False))
    )


def guard_logs() -> None:
    """Redact whatever the library logs, before any handler sees it."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(found, _Redacts) for found in logger.filters):
            logger.addFilter(_Redacts())


class _Redacts(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), None
        return True


def _environment_secrets() -> list[str]:
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= 8 and (_is_secret(name) or _is_secret(name.upper()))
    }
    return sorted(found, key=len, reverse=True)


def _redact_text(text: str, known: list[str]) -> str:
    for secret in known:
        text = text.replace(secret, MASK)
    text = _SHAPES.sub(MASK, text)
    text = _BEARER.sub(rf"\1 {MASK}", text)
    text = _URL_LOGIN.sub(rf"\1{MASK}@", text)
    return _ASSIGNED.sub(_hide_assigned, text)


def _hide_assigned(match: re.Match[str]) -> str:
    name = re.split(r"[\"'\s=:]", match.group(1), maxsplit=1)[0]
    return match.group(1) + match.group(2) + MASK if _is_secret(name) else match.group(0)

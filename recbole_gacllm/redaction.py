"""Keys and passwords are shown nowhere: read at one place, taken out of messages at one place.

Every error of this package is redacted when it is made (:mod:`.errors`), whoever wrote its text: a
server, a library, we. So is what a child process tells its parent, and what a run records.
"""

from __future__ import annotations

import json
import logging
import os
import re
from typing import Any, Final
from urllib.parse import quote

_MASK: Final = "***"
_SHORTEST: Final = 6  # a shorter "key" stands in any text
_KEY = re.compile(r"[!-~]+")  # what an HTTP header may hold
_PATTERNS: Final = (
    # http://user:password@host
    re.compile(r"(?<=://)[^\s/'\"<>\\]+(?=@)"),
    # ?api_key=…, --llm_api_key=…
    re.compile(
        r"((?:[?&]key|(?:api|access)[-_]?key|token|secret|password|passwd|pwd|signature)=)"
        r"[^\s&;'\"<>#,)\]}]+",
        re.IGNORECASE,
    ),
    re.compile(r"\b(Bearer\s+)[^\s'\"<>\\,)\]}]{6,}"),
    re.compile(r"(?<![A-Za-z0-9])(sk-|hf_)[\w-]{6,}"),
)
_SECRET_NAME = re.compile(r"(api_?key|password|passwd|secret|access_?token)$", re.IGNORECASE)
_secrets: dict[str, None] = {}  # every form that a key may have in a message, longest first


def api_key(variable: str) -> str:
    """The key that an environment variable holds, without white space around it; empty if none.

    From here on it is taken out of whatever :func:`redact` sees.

    Raises:
        ValueError: If it cannot stand in the header of a request. The message has no part of it.
    """
    key = os.environ.get(variable, "").strip()
    remember(key)
    if key and not _KEY.fullmatch(key):
        place = next(n for n, char in enumerate(key, 1) if not _KEY.match(char))
        raise ValueError(
            f"the environment variable {redact(variable)} (llm_api_key_variable) holds no key: "
            f"character {place} of {len(key)} is a blank, a line end, a control character or not "
            "ASCII. A key is one line of printable ASCII; set the variable again."
        )
    return key


def remember(secret: str) -> None:
    """Take a secret out of every message from now on, in any of the forms that libraries print."""
    if len(secret) < _SHORTEST:
        return
    forms = {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], quote(secret, safe="")}
    forms.add(secret.replace("/", "\\/"))
    forms.update(part for part in secret.split() if len(part) >= _SHORTEST)
    ordered = sorted({**_secrets, **dict.fromkeys(forms)}, key=len, reverse=True)
    _secrets.clear()
    _secrets.update(dict.fromkeys(ordered))


def redact(text: str) -> str:
    """A text without keys and passwords: those that were read, and what looks like one."""
    for secret in _secrets:
        text = text.replace(secret, _MASK)
    for pattern in _PATTERNS:
        text = pattern.sub(lambda match: (match[1] if match.re.groups else "") + _MASK, text)
    return text


def redacted(value: Any) -> Any:
    """The same for every string in what JSON can hold."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {
            name: _MASK if item and _SECRET_NAME.search(str(name)) else redacted(item)
            for name, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redacted(item) for item in value]
    return value


class RedactingFilter(logging.Filter):
    """For the loggers of libraries that speak to servers: a request's headers at level DEBUG."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass, redacted."""
        record.msg, record.args = redact(record.getMessage()), ()
        return True

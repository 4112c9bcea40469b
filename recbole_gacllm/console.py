"""What is printed: no terminal obeys strangers, no encoding and no closed pipe is an error.

Ids, names, texts, paths and errors come from data, models and servers. :func:`visible` makes them
harmless; what the commands print goes through :func:`say`, what is logged through
:class:`VisibleRecord`.
"""

from __future__ import annotations

import io
import locale
import logging
import os
import re
import sys

# Control characters, line ends that are none of ours, bidirectional overrides, halves of pairs.
_HIDDEN = re.compile(
    "[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_COLOUR = re.compile("(\x1b\\[[0-9;]*m)")
_BROKEN_PIPE = 141  # as a shell reports a program that SIGPIPE ended


def visible(text: str) -> str:
    r"""One line whose control characters stand as ``\x1b``, ``\n``, ``\u202e``."""
    return _HIDDEN.sub(lambda char: char[0].encode("unicode_escape").decode(), text)


def one_line(error: object) -> str:
    """An error as one line."""
    return visible(" ".join(str(error).split()))


def say(*lines: object) -> None:
    """Print lines; end the program quietly when nobody reads on, as in ``| head -1``."""
    try:
        print("\n".join(visible(str(line)) for line in lines), flush=True)
    except BrokenPipeError:
        _discard_output()
        sys.exit(_BROKEN_PIPE)


def flush() -> None:
    """Write what is left, such as a help page, before Python does at its end."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class VisibleRecord(logging.LogRecord):
    """A message of the log; RecBole's own keep their colours."""

    def getMessage(self) -> str:  # noqa: N802
        """The lines of the message, visible."""
        text = super().getMessage()
        parts = [text] if self.name.startswith(__package__) else _COLOUR.split(text)
        parts[::2] = ["\n".join(map(visible, part.split("\n"))) for part in parts[::2]]
        # RecBole opens its log files in the locale's encoding, where the rest would be an error.
        encoding = locale.getpreferredencoding(False)
        return "".join(parts).encode(encoding, "backslashreplace").decode(encoding)


def prepare() -> None:
    """Make this process's output and log safe; for a program, not for the library."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.setLogRecordFactory(VisibleRecord)

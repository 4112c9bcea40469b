"""What the commands share: their parsers, keys as flags; what is printed, and written."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd

from recbole_gacllm.artifacts import disk
from recbole_gacllm.artifacts.csv_cells import csv_of, no_formula
from recbole_gacllm.console import say

ARTIFACT_DIR = Path("saved/gacllm")
_FLAGS: dict[str, dict[str, Any]] = {
    "dataset": {"required": True, "help": "name of the data set, such as ml-100k"},
    "model": {"default": "GaCLLM", "help": "GaCLLM (default) or a RecBole model"},
    "config_files": {"default": "", "help": 'yaml files, as "a.yaml b.yaml"'},
    "nproc": {"type": int, "default": 1, "help": "processes of RecBole's DDP, each run"},
    "artifact_dir": {
        "type": Path,
        "default": ARTIFACT_DIR,
        "help": "as in the run, or where its artefacts lie now; default saved/gacllm",
    },
    "output": {"type": Path, "required": True, "help": "file to write; .parquet, .csv or .jsonl"},
}
_TABLES = (".parquet", ".csv", ".jsonl")
VERBOSITY = {
    "--quiet": "print the result alone; all else goes to a file",
    "--verbose": "print debugging messages, too",
}


def command_parser(prog: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser as all commands have it; ``epilog`` holds at least one example."""
    return _Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


class _Parser(argparse.ArgumentParser):
    """One whose errors are told as all others are: in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} ({self.prog} --help tells more)")


def add_flags(parser: argparse.ArgumentParser, *names: str) -> None:
    """Flags that mean the same in several commands."""
    for name in names:
        parser.add_argument(f"--{name}", **_FLAGS[name])


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """The flags ``--quiet`` and ``--verbose``."""
    group = parser.add_mutually_exclusive_group()
    for name, text in VERBOSITY.items():
        group.add_argument(name, action="store_true", help=text)


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """All flags of a command that takes no keys."""
    _refuse_twice(parser, argv)
    return parser.parse_args(argv)


def parse_with_keys(
    parser: argparse.ArgumentParser, argv: list[str]
) -> tuple[argparse.Namespace, dict[str, str]]:
    """The parser's own flags, and all others as keys of RecBole and GaCLLM."""
    argv = with_equals_signs(parser, argv)
    _refuse_twice(parser, argv)
    args, others = parser.parse_known_args(argv)
    return args, keys_of(parser, others)


def with_equals_signs(parser: argparse.ArgumentParser, argv: Iterable[str]) -> list[str]:
    """``--key value`` as ``--key=value``, which is how keys are read.

    A flag of the parser that takes none or several values stays as it is.
    """
    joined: list[str] = []
    for word in argv:
        flag = joined[-1] if joined else ""
        action = parser._option_string_actions.get(flag)
        takes_one = flag.startswith("--") and (action is None or action.nargs is None)
        if takes_one and "=" not in flag and not word.startswith("--"):
            joined[-1] = f"{flag}={word}"
        else:
            joined.append(word)
    return joined


def _refuse_twice(parser: argparse.ArgumentParser, argv: Iterable[str]) -> None:
    """Refuse a flag that is given twice: argparse takes the last."""
    flags = [word.partition("=")[0] for word in argv if word.startswith("--")]
    for flag in flags:
        if flags.count(flag) > 1:
            parser.error(f"{flag} is given twice")


def keys_of(parser: argparse.ArgumentParser, flags: Iterable[str]) -> dict[str, str]:
    """Flags as keys of a run; refuses what is not ``--key=value``, with the parser's error."""
    keys = {}
    for flag in flags:
        if not flag.startswith("--") or flag.count("=") != 1:
            parser.error(
                f"{flag!r} is not of the form --key=value or --key value; a value that holds '=' "
                "goes into a file for --config_files"
            )
        key, value = flag[2:].split("=")
        if not key.isidentifier():
            parser.error(f"'--{key}': the key must be a name of letters, digits and underscores")
        keys[key] = value
    return keys


def flags_of(keys: Mapping[str, object]) -> list[str]:
    """Keys of a run as flags."""
    return [f"--{key}={value}" for key, value in keys.items()]


def say_wrapped(text: str, first: str = "", later: str = "") -> None:
    """Print a text in lines of at most 96 characters, with something before them."""
    say(*textwrap.wrap(text, 96, initial_indent=first, subsequent_indent=later))


def require_table(parser: argparse.ArgumentParser, file: Path) -> None:
    """Refuse an ``--output`` that :func:`write_table` cannot write, before there is a table."""
    if file.suffix not in _TABLES:
        parser.error(f"--output {file}: the name must end in {', '.join(_TABLES)}")
    if not file.resolve().parent.is_dir():
        parser.error(f"--output {file}: there is no folder {file.parent}")


def write_table(frame: pd.DataFrame, file: Path) -> None:
    """Write a table whole or not at all; of a CSV file a spreadsheet calculates nothing."""
    with disk.atomic_path(file) as new:
        if file.suffix == ".parquet":
            frame.to_parquet(new, index=False)
        elif file.suffix == ".jsonl":
            frame.to_json(new, orient="records", lines=True, force_ascii=False)
        else:
            safe = frame.apply(
                lambda cells: cells.map(no_formula) if cells.dtype == object else cells
            )
            new.write_text(csv_of(safe), "utf-8", newline="")


@contextmanager
def quiet_output(name: str, quiet: bool) -> Iterator[None]:
    """With ``quiet``, standard error of this process and its children goes to a file in ``log/``.

    The file is named when something fails; an error itself is told by the caller, afterwards.
    """
    if not quiet:
        yield
        return
    file = Path("log") / f"{name}-{time.strftime('%Y-%m-%d_%H-%M-%S')}-{os.getpid()}.log"
    file.parent.mkdir(exist_ok=True)
    sys.stderr.flush()
    terminal = os.dup(2)
    with open(file, "ab") as log:
        os.dup2(log.fileno(), 2)
    try:
        yield
    except BaseException:
        os.write(terminal, f"what was not printed lies in {file}\n".encode())
        raise
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)
        os.close(terminal)


def show_messages(args: argparse.Namespace) -> None:
    """With ``--verbose``, what this package logs in this process goes to standard error."""
    if args.verbose:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)

"""The command ``check``: what a run would read, before there is one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from recbole_gacllm.cli import common
from recbole_gacllm.cli.common import say_wrapped
from recbole_gacllm.console import say

_EPILOG = """\
Takes every key of a run. Nothing is trained and nothing is written.

examples:
  python -m recbole_gacllm check --dataset=ml-100k
  python -m recbole_gacllm check --dataset=my-books --data_path=data/ --config_files=my-books.yaml
"""


def check(argv: list[str]) -> None:
    """Print what a run would read of a data set, and three texts of each side."""
    parser = common.command_parser(
        "python -m recbole_gacllm check",
        "Read a data set as a run would: columns, ids, times, repeats, filters, split, keys; and "
        "show texts as the language model would see them.",
        _EPILOG,
    )
    common.add_flags(parser, "dataset", "model", "config_files")
    args, keys = common.parse_with_keys(parser, argv)

    from recbole_gacllm.config import MODELS, reads_text
    from recbole_gacllm.inspection.data_door import read_and_inspect, sample_texts

    files = args.config_files.split()
    config, train, report = read_and_inspect(args.model, args.dataset, files, keys)
    say(*report.lines())
    for warning in report.warnings:
        say_wrapped(f"warning: {warning}", later="  ")
    with_text = reads_text(config.final_config_dict)
    if args.model in MODELS and not with_text:
        return
    with _notes() as notes:
        try:
            samples = sample_texts(config, train, args.dataset, files, keys)
        except ValueError as error:
            if with_text:
                raise
            say("")
            say_wrapped(f"no texts, which {args.model} does not read: {error}")
            return
    for side, texts in samples.items():
        say("", f"{side}s, as a language model sees them")
        for text in texts:
            say_wrapped(text, "  - ", "    ")
    for note in notes:
        say("", note)


@contextmanager
def _notes() -> Iterator[list[str]]:
    """What the making of texts says meanwhile: fields left out, cuts, nodes without a text."""
    notes: list[str] = []
    handler, source = logging.Handler(), logging.getLogger("recbole_gacllm.convolution.text")
    handler.emit = lambda record: notes.append(record.getMessage())  # type: ignore[method-assign]
    level = source.level
    source.setLevel(logging.INFO)
    source.addHandler(handler)
    try:
        yield notes
    finally:
        source.removeHandler(handler)
        source.setLevel(level)

"""The command ``report`` of the command line."""

from __future__ import annotations

from pathlib import Path

from recbole_gacllm.cli_common import add_artifact_dir, command_parser, parse
from recbole_gacllm.console import say

_EPILOG = """\
The page holds what the run left: its record, its descriptions and the weights of its checkpoint,
with which every user is scored once more. A run of somebody else may be reported on: no pickle is
loaded and nothing of it is executed. Sections without data say why. Open it by a double click.

examples:
  python -m recbole_gacllm report saved/runs/ml-100k-GaCLLM-Nov-22-2026_15-19-14
  python -m recbole_gacllm report saved/leaderboard --output=leaderboard.html
"""


def report(arguments: list[str]) -> None:
    """Write one HTML file about a run or a leaderboard."""
    parser = command_parser(
        "python -m recbole_gacllm report",
        "Write one HTML file, which needs no network, about a run or a leaderboard: results, "
        "curves, costs, the leakage audit, and every description with what came of it.",
        _EPILOG,
    )
    parser.add_argument(
        "path", type=Path, help="a run.json, its folder, or the folder of a leaderboard"
    )
    add_artifact_dir(parser)
    parser.add_argument("--output", type=Path, help="file to write; default PATH/report.html")
    known = parse(parser, arguments)
    if known.output is not None and not known.output.resolve().parent.is_dir():
        parser.error(f"--output {known.output}: there is no folder {known.output.parent}")

    # RecBole's import takes seconds: --help does not wait for it.
    from recbole_gacllm.report.page import write_report

    file = write_report(known.path, known.output, known.artifact_dir)
    say(f"{file} ({file.stat().st_size / 1e6:.1f} MB)")

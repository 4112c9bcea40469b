"""The command that writes top-k lists."""

from __future__ import annotations

from pathlib import Path

from recbole_gacllm.cli import common
from recbole_gacllm.console import say

_EPILOG = """\
Lists leave out a user's training and validation items, as RecBole's evaluation does. --history
takes a file with the columns user, item and perhaps time, of users who were not in training;
docs/recommend.md says which models can, and by which rule.

examples:
  python -m recbole_gacllm recommend saved/runs/RUN --output=lists.parquet
  python -m recbole_gacllm recommend saved/runs/RUN --users=196,22 --k=5 --explain --output=two.csv
  python -m recbole_gacllm recommend saved/runs/RUN --history=new.csv --output=lists.jsonl
  python -m recbole_gacllm recommend saved/runs/RUN --intent="slow Korean thrillers" --output=l.csv
"""


def recommend(argv: list[str]) -> None:
    """Write the best items of each user to one file."""
    parser = common.command_parser(
        "python -m recbole_gacllm recommend",
        "Top-k lists of a finished run of any model: user, rank, item, title, score.",
        _EPILOG,
    )
    parser.add_argument("run", type=Path, help="a run.json or its folder, of a leaderboard, too")
    parser.add_argument(
        "--users",
        default="all",
        help="raw tokens with commas, a file (a token a line), or all (default)",
    )
    parser.add_argument("--k", type=int, default=20, help="items of a list; default 20")
    parser.add_argument(
        "--history",
        type=Path,
        metavar="FILE",
        help="users by these interactions alone: a table in CSV, TSV, JSON lines or Parquet",
    )
    parser.add_argument("--intent", metavar="TEXT", help="a sentence to mix into every user")
    parser.add_argument(
        "--intent-weight",
        type=float,
        default=1.0,
        help="of the standardised cosines beside the standardised scores; default 1",
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="add what a score is the sum of, the nearest items of the history, the description",
    )
    parser.add_argument(
        "--keep-history", action="store_true", help="rank the items of the history, too"
    )
    common.add_flags(parser, "artifact_dir", "output")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = common.parse(parser, argv)
    common.require_table(parser, args.output)
    for name in ("history", "intent"):
        if getattr(args, name) is not None and not str(getattr(args, name)).strip():
            parser.error(f"--{name}: it is empty")

    from recbole_gacllm.inspection.recommend import recommend

    frame = recommend(
        args.run,
        _users(args.users),
        args.k,
        history=args.history,
        intent=args.intent,
        intent_weight=args.intent_weight,
        explain=args.explain,
        keep_history=args.keep_history,
        artifact_dir=args.artifact_dir,
        show_progress=not args.quiet,
    )
    common.write_table(frame, args.output)
    say(f"{frame['user'].nunique()} lists, {len(frame)} rows, written to {args.output}")


def _users(given: str) -> list[str] | None:
    """The tokens that ``--users`` gives; None is all."""
    if given == "all":
        return None
    if Path(given).is_file():
        lines = Path(given).read_text("utf-8-sig").splitlines()
        tokens = [line.strip() for line in lines if line.strip()]
    else:
        tokens = [token for token in given.split(",") if token]
    if not tokens:
        raise ValueError(f"--users={given}: names no user; give tokens, a file of tokens, or all.")
    return tokens

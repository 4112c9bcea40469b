"""The command ``import-data``: anybody's files become a data set."""

from __future__ import annotations

from pathlib import Path

from recbole_gacllm.cli import common
from recbole_gacllm.console import say

_EPILOG = """\
Files may be CSV, TSV, JSON lines or Parquet, packed or not (.gz, .bz2, .xz, .zip): interactions,
and tables of items and users, in any order. What each column was taken for is printed; a flag says
it otherwise. Files called train, valid and test become a ready split.

recipes (recognised where the columns or names of files leave no doubt):
  %s

examples:
  python -m recbole_gacllm import-data purchases.csv products.csv --name=my-shop
  python -m recbole_gacllm import-data log.parquet --name=my-shop --item=sku --time=none --k-core=5
  python -m recbole_gacllm import-data ratings.csv movies.csv --name=ml-32m --min-rating=4
"""
_ROLES = ("user", "item", "time", "rating")


def import_data(argv: list[str]) -> None:
    """Write a data set out of files, print what was guessed and dropped, and the next step."""
    from recbole_gacllm.data.importing import Request, import_files
    from recbole_gacllm.data.recipes import RECIPES

    parser = common.command_parser(
        "python -m recbole_gacllm import-data",
        "Make RecBole's files, and a yaml that describes them, of tables of any kind.",
        _EPILOG % ", ".join(RECIPES),
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILES", help="tables to read")
    parser.add_argument("--name", required=True, help="of the data set, such as my-shop")
    for role in _ROLES:
        none = "; none: leave it out" if role in ("time", "rating") else ""
        parser.add_argument(f"--{role}", help=f"column of {role}s, if the guess is wrong{none}")
    parser.add_argument("--min-rating", type=float, help="keep ratings from this number on")
    parser.add_argument(
        "--k-core", type=int, default=1, help="keep users and items with so many of each other"
    )
    parser.add_argument("--recipe", help="name of a public data set; default: recognised")
    parser.add_argument(
        "--data_path", type=Path, default=Path("dataset"), help="folder of data sets; dataset"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files of this name")
    args = common.parse(parser, argv)
    columns = {role: getattr(args, role) for role in _ROLES if getattr(args, role) is not None}
    request = Request(
        args.files,
        args.name,
        args.data_path,
        columns,
        args.min_rating,
        args.k_core,
        args.recipe,
        args.overwrite,
    )
    for line in import_files(request):
        common.say_wrapped(line, later="  ")
    folder = args.data_path / args.name
    say("", *sorted(folder.glob(f"{args.name}.*")))
    where = "" if args.data_path == Path("dataset") else f" --data_path={args.data_path}"
    runs = Path("run_recbole_gacllm.py")
    program = f"python {runs}" if runs.is_file() else "python -m recbole_gacllm"
    say("", f"{program} --dataset={args.name}{where} --text_source=raw")

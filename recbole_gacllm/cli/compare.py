"""The commands ``leaderboard``, ``tune`` and ``report`` of the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

from recbole_gacllm.cli import common
from recbole_gacllm.console import say
from recbole_gacllm.errors import GaCLLMError

_LEADERBOARD_EPILOG = """\
Every run is made once, in a process of its own: start the same command again after a kill, with
more models or seeds, or on several machines that share OUTPUT. Tuned hyper-parameters come from
properties/baselines; every key of RecBole and of GaCLLM is a flag, for all models. A variant of a
model is a row of its own: Model:key=value:key=value; Model:seeds=2 has the first two seeds only.

examples:
  python run_recbole_gacllm.py leaderboard --models=GaCLLM,EASE,BPR --datasets=ml-100k --seeds=5
  python run_recbole_gacllm.py leaderboard --datasets=ml-100k --seeds=5 \\
      --models=GaCLLM,GaCLLM:use_text=False,GaCLLM:text_source=shuffled,EASE
  python run_recbole_gacllm.py leaderboard --models=GaCLLM,SASRec --datasets=ml-100k \\
      --protocol=sequential --output=saved/sequential
  python run_recbole_gacllm.py leaderboard -m BPR,EASE -d ml-100k
"""
_TUNE_EPILOG = """\
The validation metric selects. Each trial is made once, in a process of its own: start the same
command again after a kill. GaCLLM's text stages run once for all trials that share them. Spaces
are shipped in properties/spaces; every key of RecBole and of GaCLLM is a flag.

examples:
  python run_recbole_gacllm.py tune --model=EASE --dataset=ml-100k
  python run_recbole_gacllm.py tune --model=GaCLLM --dataset=ml-100k --algo=bayes --max_evals=30
  python run_recbole_gacllm.py tune --model=LightGCN --dataset=ml-100k --space=mine.hyper
"""
_PROTOCOL_HELP = (
    "general (random 8:1:1 split of each user; default), sequential (leave one out by time, for "
    "general and sequential models), temporal (one point in time for all users) or cold (items "
    "without training interactions)"
)


_REPORT_EPILOG = """\
The page holds what the run left: its record, its descriptions and the weights of its checkpoint,
with which every user is scored once more. A run of somebody else may be reported on: no pickle is
loaded and nothing of it is executed. Sections without data say why. Open it by a double click.

examples:
  python -m recbole_gacllm report saved/runs/ml-100k-GaCLLM-Nov-22-2026_15-19-14
  python -m recbole_gacllm report saved/leaderboard --output=leaderboard.html
"""


def leaderboard(argv: list[str]) -> None:
    """Make every run, write the tables and print them."""
    parser = common.command_parser(
        "run_recbole_gacllm.py leaderboard",
        "Compare models: make every run, test the differences, write the tables.",
        _LEADERBOARD_EPILOG,
    )
    parser.add_argument(
        "--models",
        "--model_list",
        "-m",
        required=True,
        help="names with commas, such as GaCLLM,LightGCN,EASE: GaCLLM, RecBole's models, variants",
    )
    parser.add_argument(
        "--datasets", "--dataset", "-d", required=True, help="names of data sets, with commas"
    )
    parser.add_argument(
        "--seeds", type=int, default=1, help="how many, from --seed (2020) on; default 1"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("saved/leaderboard"), help="folder of the leaderboard"
    )
    parser.add_argument(
        "--baseline", help="model that the others are tested against; default the first"
    )
    _add_flags_of_runs(parser)
    args, keys = common.parse_with_keys(parser, argv)
    datasets = args.datasets.split(",")

    from recbole_gacllm.compare import leaderboard as board_runs
    from recbole_gacllm.compare import results, submission
    from recbole_gacllm.compare.plan import make_plan, split_models

    show_progress = _show_progress(args, keys)
    models, files = split_models(args.models), args.config_files.split()
    plan = make_plan(models, datasets, args.seeds, args.protocol, files, keys, args.nproc)
    results.require_baseline(args.baseline, plan.summary["models"])
    with common.quiet_output("leaderboard", args.quiet):
        board_runs.check_data(plan, args.output)
        board_runs.run_leaderboard(plan, args.output, show_progress)
        folder = submission.write_submission(args.output, args.baseline)
    for page in sorted((args.output / "results").glob("*.md")):
        text = page.read_text("utf-8")
        start = text.index("# Evaluation Results")
        say("", *text[start : text.index("# Hyper-parameters")].strip().split("\n"), "", page)
    say(folder)
    board = results.Board.read(args.output)
    if board.failures:
        first_with = {failure["error"]: failure for failure in reversed(board.failures)}
        reasons = [
            f"{failure['model']} on {failure['dataset']}, seed {failure['seed']}: {error} Its "
            f"log: {failure['log']}."
            for error, failure in reversed(first_with.items())
        ]
        raise GaCLLMError(
            f"{len(board.failures)} of {len(plan.runs)} runs failed; start again to try them once "
            f"more. {' '.join(reasons)}"
        )


def tune(argv: list[str]) -> None:
    """Search hyper-parameters, print the best trials, write the best one's yaml file."""
    parser = common.command_parser(
        "run_recbole_gacllm.py tune",
        "Search hyper-parameters of GaCLLM or a RecBole model with RecBole's HyperTuning.",
        _TUNE_EPILOG,
    )
    common.add_flags(parser, "dataset", "model")
    parser.add_argument(
        "--space",
        "--params_file",
        type=Path,
        help="RecBole's .hyper file; default the shipped one",
    )
    parser.add_argument(
        "--algo",
        default="exhaustive",
        help="exhaustive (all combinations, in random order; default), random or bayes (TPE)",
    )
    parser.add_argument(
        "--max_evals", type=int, default=20, help="trials of random and bayes; default 20"
    )
    parser.add_argument(
        "--early_stop",
        type=int,
        help="end after so many trials without a better one; default never",
    )
    parser.add_argument(
        "--output", type=Path, help="folder of the search; default saved/tuning/DATASET-MODEL"
    )
    _add_flags_of_runs(parser)
    args, keys = common.parse_with_keys(parser, argv)

    from recbole_gacllm.compare import tuning
    from recbole_gacllm.config import shipped_path
    from recbole_gacllm.inspection import data_door

    show_progress = _show_progress(args, keys)
    shipped = shipped_path("properties", "spaces", f"{args.model}.hyper")
    search = tuning.Search(
        args.model,
        args.dataset,
        tuning.read_space(args.space or shipped),
        args.output or Path("saved/tuning") / f"{args.dataset}-{args.model}",
        args.protocol,
        args.config_files.split(),
        keys,
        args.nproc,
    )
    with common.quiet_output("tune", args.quiet):
        data_door.check_plan([search.run_of({}).arguments])
        best = tuning.tune(search, args.algo, args.max_evals, args.early_stop, show_progress)
    n_finished = sum(trial.score is not None for trial in search.trials)
    say("", f"{search.model} on {search.dataset}, {n_finished} trials", "")
    say(*best.read_text("utf-8").split("\n"))
    say(f"{'trials':<10}{search.output / 'trials.csv'}")
    say(f"{'best':<10}{best}")
    say(f"{'use it':<10}--config_files={best}, or copy it to")
    say(f"{'':<10}properties/baselines/{search.dataset}/{best.name}")
    if failures := [str(trial.folder) for trial in search.trials if trial.score is None]:
        raise GaCLLMError(
            f"{len(failures)} of {len(search.trials)} trials failed; start again to try them once "
            f"more. Their folders: {', '.join(failures)}"
        )


def _add_flags_of_runs(parser: argparse.ArgumentParser) -> None:
    """What both commands hand to each of their runs."""
    parser.add_argument("--protocol", default="general", help=_PROTOCOL_HELP)
    common.add_flags(parser, "nproc", "config_files")
    common.add_verbosity(parser)


def _show_progress(args: argparse.Namespace, keys: dict[str, str]) -> bool:
    common.show_messages(args)
    return keys.pop("show_progress", "True") == "True" and not args.quiet


def report(argv: list[str]) -> None:
    """Write one HTML file about a run or a leaderboard."""
    parser = common.command_parser(
        "python -m recbole_gacllm report",
        "Write one HTML file, which needs no network, about a run or a leaderboard: results, "
        "curves, costs, the leakage audit, and every description with what came of it.",
        _REPORT_EPILOG,
    )
    parser.add_argument(
        "path", type=Path, help="a run.json, its folder, or the folder of a leaderboard"
    )
    common.add_flags(parser, "artifact_dir")
    parser.add_argument("--output", type=Path, help="file to write; default PATH/report.html")
    args = common.parse(parser, argv)
    if args.output is not None and not args.output.resolve().parent.is_dir():
        parser.error(f"--output {args.output}: there is no folder {args.output.parent}")

    # RecBole's import takes seconds: --help does not wait for it.
    from recbole_gacllm.report.page import write_report

    file = write_report(args.path, args.output, args.artifact_dir)
    say(f"{file} ({file.stat().st_size / 1e6:.1f} MB)")

"""The command line: ``run_recbole_gacllm.py`` and ``python -m recbole_gacllm``."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recbole_gacllm import cli_descriptions
from recbole_gacllm.config import preset_names
from recbole_gacllm.errors import GaCLLMError

_RUN_EPILOG = """\
Every key of RecBole and of GaCLLM is a flag, such as --embedding_size=128 or --llm_model=NAME
(docs/config.md lists ours). Flags win over config files, those over dataset config and preset.

examples:
  python run_recbole_gacllm.py --dataset=ml-100k
  python run_recbole_gacllm.py --dataset=ml-1m --preset=paper --llm_model=Qwen/Qwen2.5-7B-Instruct
  python run_recbole_gacllm.py --dataset=ml-100k --model=LightGCN
  python run_recbole_gacllm.py --dataset=ml-100k --nproc=2 --use_gpu=False

other commands (each has --help):
  leaderboard           models x data sets x seeds on identical splits, with tests and tables
  describe              print what was written about a user or an item, layer by layer
  audit                 print failures, lengths, copies, names and samples of every layer
  export-descriptions   write all descriptions to one Parquet or CSV file
  import-descriptions   check texts from elsewhere, and how a run uses them
  export-embeddings     write a layer's text embeddings as RecBole's .useremb and .itememb files
"""

_LEADERBOARD_EPILOG = """\
Every run is made once, in a process of its own: start the same command again after a kill, with
more models or seeds, or on several machines that share OUTPUT. Tuned hyper-parameters come from
properties/baselines; every key of RecBole and of GaCLLM is a flag, for all models.

examples:
  python run_recbole_gacllm.py leaderboard --models=GaCLLM,EASE,BPR --datasets=ml-100k --seeds=5
  python run_recbole_gacllm.py leaderboard --models=GaCLLM,SASRec --datasets=ml-100k \\
      --protocol=sequential --output=saved/sequential
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; errors of input and of stages end in one line and exit code 2 or 1."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], None]] = {
        "describe": _describe,
        "export-descriptions": _export_descriptions,
        "import-descriptions": cli_descriptions.import_descriptions,
        "audit": cli_descriptions.audit,
        "export-embeddings": _export_embeddings,
        "leaderboard": _leaderboard,
    }
    try:
        if arguments and arguments[0] in commands:
            commands[arguments[0]](arguments[1:])
        else:
            _run(arguments)
    except GaCLLMError as error:
        _fail(error, 1)
    except ValueError as error:
        if not _is_about_input(error):
            raise
        _fail(error, 2)
    except KeyboardInterrupt:
        print("interrupted; start again to resume: what was finished is kept", file=sys.stderr)
        sys.exit(130)


def _fail(error: Exception, exit_code: int) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(exit_code)


def _is_about_input(error: BaseException) -> bool:
    """Whether this package or RecBole raised it; the traceback of anything else is worth seeing."""
    last = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return last.is_relative_to(Path(__file__).parent) or "recbole" in last.parts


def _run(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="run_recbole_gacllm.py",
        description="Train and test GaCLLM, or any RecBole model, on data in RecBole's format.",
        epilog=_RUN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--dataset", required=True, help="name of the data set, such as ml-100k")
    parser.add_argument("--model", default="GaCLLM", help="GaCLLM (default) or a RecBole model")
    parser.add_argument(
        "--preset",
        choices=preset_names(),
        help="GaCLLM's settings: quick (default, minutes on a laptop), paper or best",
    )
    parser.add_argument("--config_files", default="", help='yaml files, as "a.yaml b.yaml"')
    parser.add_argument("--nproc", type=int, default=1, help="processes of RecBole's DDP")
    known, _ = _parse_with_keys(parser, arguments)

    # RecBole's import takes seconds: --help and mistakes above do not wait for it.
    from recbole_gacllm import runner

    # RecBole reads sys.argv itself.
    sys.argv[1:] = arguments
    files = known.config_files.split()
    if known.nproc == 1:
        done = runner.run(known.model, known.dataset, files)
        _print_summary(done.record, done.run_file)
    else:
        run_file = runner.run_distributed(known.model, known.dataset, files, known.nproc)
        _print_summary(json.loads(run_file.read_text("utf-8")), run_file)


def _parse_with_keys(
    parser: argparse.ArgumentParser, arguments: list[str]
) -> tuple[argparse.Namespace, dict[str, str]]:
    """The parser's own flags, and all others as keys of RecBole and GaCLLM."""
    known, others = parser.parse_known_args(arguments)
    for flag in arguments:
        if not flag.startswith("--") or flag.count("=") != 1:
            parser.error(
                f"{flag!r} is not of the form --key=value, all that RecBole reads; a value "
                "that holds '=' goes into a file for --config_files"
            )
    keys = dict(flag[2:].split("=") for flag in others)
    for key in keys:
        if not key.isidentifier():
            parser.error(f"'--{key}': the key must be a name of letters, digits and underscores")
    return known, keys


def _leaderboard(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="run_recbole_gacllm.py leaderboard",
        description="Compare models: make every run, test the differences, write the tables.",
        epilog=_LEADERBOARD_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--models",
        "--model_list",
        required=True,
        help="names with commas, such as GaCLLM,LightGCN,EASE: GaCLLM and RecBole's models",
    )
    parser.add_argument("--datasets", required=True, help="names of data sets, with commas")
    parser.add_argument(
        "--seeds", type=int, default=1, help="how many, from --seed (2020) on; default 1"
    )
    parser.add_argument(
        "--protocol",
        default="general",
        help="general (random 8:1:1 split of each user; default) or sequential (leave one out by "
        "time, for general and sequential models)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("saved/leaderboard"), help="folder of the leaderboard"
    )
    parser.add_argument(
        "--baseline", help="model that the others are tested against; default the first"
    )
    parser.add_argument("--config_files", default="", help='yaml files, as "a.yaml b.yaml"')
    known, keys = _parse_with_keys(parser, arguments)

    from recbole_gacllm.benchmark import leaderboard, plan, results, submission

    sys.argv[1:] = []  # RecBole reads it; the keys reach each run by its job
    show_progress = keys.pop("show_progress", "True") == "True"
    made = plan.make_plan(
        known.models.split(","),
        known.datasets.split(","),
        known.seeds,
        known.protocol,
        known.config_files.split(),
        keys,
    )
    leaderboard.run_leaderboard(made, known.output, show_progress)
    folder = submission.write_submission(known.output, known.baseline)
    for page in sorted((known.output / "results").glob("*.md")):
        text = page.read_text("utf-8")
        start = text.index("# Evaluation Results")
        print("\n" + text[start : text.index("# Hyper-parameters")].strip())
        print(f"\n{page}")
    print(folder)
    failures = results.Board.read(known.output).failures
    if failures:
        raise GaCLLMError(
            f"{len(failures)} of {len(made.jobs)} runs failed; start again to try them once more. "
            "Their logs: " + ", ".join(failure["log"] for failure in failures)
        )


def _print_summary(record: dict[str, Any], run_file: Path | None) -> None:
    """The result and where every file lies."""
    print(f"\n{record['model']} on {record['dataset']}, seed {record['seed']}")
    metrics = list(record["test"])
    print("         " + " ".join(f"{name:>12}" for name in metrics))
    for split in ("valid", "test"):
        values = [record[split].get(name) for name in metrics]
        cells = [f"{'-' if value is None else format(value, '.4f'):>12}" for value in values]
        print(f"{split:<9}" + " ".join(cells))
    seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in record["seconds"].items())
    print(f"time     {seconds}\n")
    for stage, figures in record.get("stages", {}).items():
        print(f"{stage:<13}{_stage_line(figures)}")
    if "leakage_audit" in record:
        audit = record["leakage_audit"]
        print(
            f"{'leakage':<13}{audit['heldout_mentions']} of {audit['n_pairs']} held-out items are "
            f"named in their user's texts, {audit['matched_mentions']} of as many matched items "
            f"(p = {audit['p_value']})"
        )
    print()
    for stage, folder in record.get("artifacts", {}).items():
        print(f"{stage:<13}{folder}")
    if record["checkpoint"]:
        print(f"{'checkpoint':<13}{record['checkpoint']}")
    print(f"{'run':<13}{run_file}")


def _stage_line(figures: dict[str, Any]) -> str:
    """One stage of ``run.json`` in a line."""
    parts = ["reused" if figures["reused"] else f"{figures.get('seconds', 0):.0f} s"]
    if figures.get("perplexity_before") is not None:
        before, after = figures["perplexity_before"], figures["perplexity_after"]
        parts.append(f"held-out perplexity {before:.1f} -> {after:.1f}")
    for number, layer in enumerate(figures.get("layers", []), 1):
        if "n_generated" in layer:
            parts.append(
                f"layer {number}: {layer['n_generated']} generated, {layer['n_from_store']} from "
                f"the store, {layer['n_failed']} failed, {layer['n_prompt_tokens']} tokens in, "
                f"{layer['n_output_tokens']} out"
            )
    return "; ".join(parts)


def _artifact_parser(prog: str, description: str, example: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m recbole_gacllm {prog}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--dataset", help="the newest descriptions of this data set")
    parser.add_argument("--run", type=Path, help="or those of a run: a run.json or its folder")
    parser.add_argument(
        "--artifact_dir", type=Path, default=Path("saved/gacllm"), help="as in the run"
    )
    return parser


def _artifacts(parser: argparse.ArgumentParser, known: argparse.Namespace) -> Any:
    from recbole_gacllm.descriptions.reading import RunDescriptions

    if (known.dataset is None) == (known.run is None):
        parser.error("give either --dataset or --run")
    if known.run is not None:
        return RunDescriptions.of_run(known.run)
    return RunDescriptions.newest(known.artifact_dir, known.dataset)


def _describe(arguments: list[str]) -> None:
    parser = _artifact_parser(
        "describe",
        "Print what was written about a node at every layer, and the neighbours it was made from.",
        "python -m recbole_gacllm describe --dataset=ml-100k --user=196",
    )
    node = parser.add_mutually_exclusive_group(required=True)
    node.add_argument("--user", help="raw token of a user, as in the .inter file")
    node.add_argument("--item", help="raw token of an item")
    known = parser.parse_args(arguments)
    found = _artifacts(parser, known)
    side, token = ("user", known.user) if known.user is not None else ("item", known.item)
    page = found.page(side, token)
    name = f", {page.name}" if page.name else ""
    print(f"{side} {token}{name}: {page.degree} training interactions")
    for number, (status, text) in enumerate(page.texts):
        print(f"\nlayer {number} ({status})")
        print(textwrap.fill(text, 96, initial_indent="  ", subsequent_indent="  "))
    print("\nneighbours in its prompts")
    for neighbor, label, text in page.neighbors:
        head = f"{neighbor}: {label + '. ' if label else ''}{text}"
        print(textwrap.fill(head, 96, initial_indent="  - ", subsequent_indent="    "))
    print(f"\n{found.folder}")


def _export_descriptions(arguments: list[str]) -> None:
    parser = _artifact_parser(
        "export-descriptions",
        "Write all descriptions to one file: side, token, layer, text, status, reason, tokens.",
        "python -m recbole_gacllm export-descriptions --dataset=ml-100k --output=texts.parquet",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="file to write; .parquet or .csv"
    )
    known = parser.parse_args(arguments)
    if known.output.suffix not in (".parquet", ".csv"):
        parser.error(f"--output {known.output}: the name must end in .parquet or .csv")
    if not known.output.resolve().parent.is_dir():
        parser.error(f"--output {known.output}: there is no folder {known.output.parent}")
    frame = _artifacts(parser, known).frame()
    if known.output.suffix == ".parquet":
        frame.to_parquet(known.output, index=False)
    else:
        frame.to_csv(known.output, index=False)
    print(f"{len(frame)} descriptions written to {known.output}")


def _export_embeddings(arguments: list[str]) -> None:
    parser = _artifact_parser(
        "export-embeddings",
        "Write the text embeddings of a layer as RecBole's files of pretrained embeddings.",
        "python -m recbole_gacllm export-embeddings --dataset=ml-1m --layer=1 --output=data/ml-1m",
    )
    parser.add_argument(
        "--layer", type=int, required=True, help="0: raw texts; l: after l layers of convolution"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write to; the files get its name"
    )
    known = parser.parse_args(arguments)
    if (known.dataset is None) == (known.run is None):
        parser.error("give either --dataset or --run")

    from recbole_gacllm.benchmark.embeddings import export_embeddings, find_embeddings

    folder = find_embeddings(known.artifact_dir, known.dataset, known.run)
    for file in export_embeddings(folder, known.layer, known.output):
        print(file)

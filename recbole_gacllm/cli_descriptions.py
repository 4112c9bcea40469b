"""The commands of the command line about descriptions and their embeddings."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recbole_gacllm import cli_batch, cli_common
from recbole_gacllm.console import say
from recbole_gacllm.descriptions.csv_cells import no_formula
from recbole_gacllm.descriptions.layers import SIDES

if TYPE_CHECKING:
    from recbole_gacllm.descriptions.reading import Unfinished

_DESCRIBE_EPILOG = """\
Without --user or --item it makes the descriptions of a run, with the run's keys as flags: features,
fine-tuning, LLM, no training. --export-batch and --import-batch let a cluster answer the prompts,
one layer after the other; README, "Bigger than one machine", has the whole way.

examples:
  python -m recbole_gacllm describe --dataset=ml-100k --user=196
  python -m recbole_gacllm describe --dataset=ml-100k --llm_n_layers=1
  python -m recbole_gacllm describe --dataset=ml-100k --export-batch batch
  python -m recbole_gacllm describe --dataset=ml-100k --import-batch answers
"""


def describe(arguments: list[str]) -> None:
    """Print what was written about a user or an item, or make the descriptions of a run."""
    parser = _artifact_parser(
        "describe",
        "Print what was written about a node at every layer, and the neighbours it was made from; "
        "or make descriptions.",
        _DESCRIBE_EPILOG,
    )
    parser.set_defaults(artifact_dir=None)
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--user", help="raw token of a user, as in the .inter file")
    actions.add_argument("--item", help="raw token of an item")
    cli_batch.add_arguments(parser, actions)
    known, keys = cli_common.parse_with_keys(parser, arguments)
    if known.user is None and known.item is None:
        cli_batch.make_descriptions(parser, known, keys)
        return
    if keys:
        parser.error(f"--{next(iter(keys))}: --user and --item take no keys of a run")
    known.artifact_dir = known.artifact_dir or cli_common.ARTIFACT_DIR
    found = _artifacts(parser, known)
    side, token = ("user", known.user) if known.user is not None else ("item", known.item)
    page = found.page(side, token)
    name = f", {page.name}" if page.name else ""
    say(f"{side} {token}{name}: {page.degree} training interactions")
    for number, (status, text) in enumerate(page.texts):
        lines = textwrap.wrap(text, 96, initial_indent="  ", subsequent_indent="  ")
        say("", f"layer {number} ({status})", *lines)
    if page.neighbors:
        say("", "neighbours in its prompts")
    for neighbor, label, text in page.neighbors:
        head = f"{neighbor}: {label + '. ' if label else ''}{text}"
        say(*textwrap.wrap(head, 96, initial_indent="  - ", subsequent_indent="    "))
    say("", found.folder)


def audit(arguments: list[str]) -> None:
    """Print, and write if asked, what each layer of a run's descriptions is like."""
    parser = cli_common.command_parser(
        "python -m recbole_gacllm audit",
        "Figures and samples of every layer of descriptions: failures, retries, "
        "lengths, copies, repetition, names of items, and the leakage audit of the run. Of a run "
        "that goes on or was killed, its finished layers, and how far the next one is.",
        "example:\n  python -m recbole_gacllm audit saved/runs/ml-100k-GaCLLM-Nov-22-2026_15-19-14",
    )
    parser.add_argument("run", type=Path, help="a run.json, its folder, or a descriptions-… folder")
    cli_common.add_artifact_dir(parser)
    parser.add_argument("--n-samples", type=int, default=10, help="of each layer")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of samples")
    parser.add_argument("--json", type=Path, help="file to write all figures to, too")
    known = cli_common.parse(parser, arguments)

    from recbole_gacllm.descriptions.quality import layer_qualities
    from recbole_gacllm.descriptions.quality_lines import quality_lines
    from recbole_gacllm.descriptions.reading import RunDescriptions

    found = RunDescriptions.of_run(known.run, True, known.artifact_dir)
    layers = list(layer_qualities(found, known.n_samples, known.seed))
    for layer in layers:
        say("", *quality_lines(layer))
    if found.manifest["stage"] == "inputs":
        say(
            "no LLM wrote anything: the run takes the texts of layer 0 as they are; describe "
            "--user or --item shows them"
        )
    if found.unfinished is not None:
        _print_unfinished(found.unfinished)
    leakage = _leakage(known.run)
    if leakage is not None:
        say("", "leakage audit " + ", ".join(f"{key} {value}" for key, value in leakage.items()))
    say("", found.folder)
    if known.json:
        figures = {
            "folder": str(found.folder),
            "leakage_audit": leakage,
            "layers": [dataclasses.asdict(layer) for layer in layers],
            "unfinished": found.unfinished and dataclasses.asdict(found.unfinished),
        }
        known.json.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", "utf-8")


def import_descriptions(arguments: list[str]) -> None:
    """Fill the layers of a run with texts from elsewhere."""
    parser = cli_common.command_parser(
        "python -m recbole_gacllm import-descriptions",
        "Check a file of descriptions (columns side, token, layer, text) against a data set and "
        "fill its layers. Where the file lacks a layer of the run, the run itself fills them, as "
        "the LLM is needed.",
        "example:\n  python -m recbole_gacllm import-descriptions texts.parquet --dataset=ml-100k",
    )
    parser.add_argument("file", type=Path, help=".parquet or .csv")
    parser.add_argument("--dataset", required=True, help="name of the data set")
    cli_common.add_config_files(parser)
    arguments = cli_common.with_equals_signs(parser, arguments)
    known, keys = cli_common.parse_with_keys(parser, arguments)
    flags = [flag for flag in arguments if flag.startswith("--")]
    flags.append(f"--text_import_file={known.file}")
    cli_common.require_key_value(parser, flags)

    from recbole_gacllm.descriptions.imported import ImportedTexts, describe

    imported = ImportedTexts.read(known.file.resolve())
    if max(imported.layers) > 0 and "llm_n_layers" not in keys:
        flags.append(f"--llm_n_layers={max(imported.layers)}")

    from recbole_gacllm import pipeline
    from recbole_gacllm.run_config import training_data

    sys.argv[1:] = flags  # RecBole reads sys.argv itself
    options, data = training_data(known.dataset, known.config_files.split())
    tokens = {side: data.graph.tokens(side).tolist() for side in SIDES}
    for report in imported.check(tokens, options.llm_n_layers):
        say(describe(report))
    to_make = set(range(1, options.llm_n_layers + 1)) - set(imported.layers)
    if to_make:
        say(f"left to the LLM of the run: layer {', '.join(map(str, sorted(to_make)))}")
    else:
        say(f"written to {pipeline.describe(options, data)}")
    say("", "to train on them", f"  python run_recbole_gacllm.py {shlex.join(flags)}")


def export_descriptions(arguments: list[str]) -> None:
    """Write all descriptions to one file."""
    parser = _artifact_parser(
        "export-descriptions",
        "Write all descriptions to one file: side, token, layer, text, status, reason, tokens.",
        "example:\n"
        "  python -m recbole_gacllm export-descriptions --dataset=ml-100k --output=texts.parquet",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="file to write; .parquet or .csv"
    )
    known = cli_common.parse(parser, arguments)
    if known.output.suffix not in (".parquet", ".csv"):
        parser.error(f"--output {known.output}: the name must end in .parquet or .csv")
    if not known.output.resolve().parent.is_dir():
        parser.error(f"--output {known.output}: there is no folder {known.output.parent}")
    frame = _artifacts(parser, known).frame()
    if known.output.suffix == ".parquet":
        frame.to_parquet(known.output, index=False)
    else:
        for name in ("token", "text"):
            frame[name] = frame[name].map(no_formula)
        frame.to_csv(known.output, index=False)
    say(f"{len(frame)} descriptions written to {known.output}")


def export_embeddings(arguments: list[str]) -> None:
    """Write a layer's text embeddings as RecBole's files."""
    parser = _artifact_parser(
        "export-embeddings",
        "Write the text embeddings of a layer as RecBole's files of pretrained embeddings.",
        "example:\n"
        "  python -m recbole_gacllm export-embeddings --dataset=ml-1m --layer=1 --output=ml-1m",
    )
    parser.add_argument(
        "--layer", type=int, required=True, help="0: raw texts; l: after l layers of convolution"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write to; the files get its name"
    )
    known = cli_common.parse(parser, arguments)
    if (known.dataset is None) == (known.run is None):
        parser.error("give either --dataset or --run")

    from recbole_gacllm.benchmark.embeddings import export_embeddings, find_embeddings

    folder = find_embeddings(known.artifact_dir, known.dataset, known.run, known.layer)
    for file in export_embeddings(folder, known.layer, known.output):
        say(file)
    say(f"from {folder}")


def _artifact_parser(prog: str, description: str, epilog: str) -> argparse.ArgumentParser:
    parser = cli_common.command_parser(f"python -m recbole_gacllm {prog}", description, epilog)
    parser.add_argument("--dataset", help="the newest descriptions of this data set")
    parser.add_argument("--run", type=Path, help="or those of a run: a run.json or its folder")
    cli_common.add_artifact_dir(parser)
    return parser


def _artifacts(parser: argparse.ArgumentParser, known: argparse.Namespace) -> Any:
    from recbole_gacllm.descriptions.reading import RunDescriptions

    if (known.dataset is None) == (known.run is None):
        parser.error("give either --dataset or --run")
    if known.run is not None:
        return RunDescriptions.of_run(known.run, artifact_dir=known.artifact_dir)
    return RunDescriptions.newest(known.artifact_dir, known.dataset)


def _leakage(run: Path) -> dict[str, Any] | None:
    file = run / "run.json" if run.is_dir() else run
    if not file.is_file():
        return None
    found = json.loads(file.read_text("utf-8")).get("leakage_audit")
    return dict(found) if found else None


def _print_unfinished(found: Unfinished) -> None:
    from recbole_gacllm.descriptions.quality_lines import token_line

    cost = dataclasses.asdict(found.cost)
    say("", f"layer {found.number} of {found.n_layers} is not finished")
    say(f"  generated       {found.cost.n_generated} prompts, for {found.n_nodes} nodes at most")
    say(f"  tokens          {token_line(cost)}")
    say("  start the run again: it goes on with what is missing")

"""The commands of the command line about descriptions and their embeddings."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recbole_gacllm.artifacts.locate import RUN_FILE, RunFiles
from recbole_gacllm.cli import common
from recbole_gacllm.cli.common import say_wrapped
from recbole_gacllm.config import preset_names
from recbole_gacllm.console import say
from recbole_gacllm.convolution.layers import SIDES, layer_name

# RecBole's import takes seconds, so those that bring it stand in the commands: --help and mistakes
# of the command line do not wait for it.
if TYPE_CHECKING:
    from recbole_gacllm.convolution.batch_job import Imported

_DESCRIBE_EPILOG = """\
Without --user or --item it makes the descriptions of a run, with the run's keys as flags: features,
fine-tuning, LLM, no training. --export-batch and --import-batch let a cluster answer the prompts,
one layer after the other; docs/descriptions.md has the whole way.

examples:
  python -m recbole_gacllm describe --dataset=ml-100k --user=196
  python -m recbole_gacllm describe --dataset=ml-100k --llm_n_layers=1
  python -m recbole_gacllm describe --dataset=ml-100k --export-batch batch
  python -m recbole_gacllm describe --dataset=ml-100k --import-batch answers
"""


def describe(argv: list[str]) -> None:
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
    actions.add_argument(
        "--export-batch",
        type=Path,
        metavar="FOLDER",
        help="write what the first incomplete layer lacks as run-batch shards",
    )
    actions.add_argument(
        "--import-batch",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="files of answers, or folders of such, to take into the store",
    )
    parser.add_argument(
        "--shard-size", type=int, default=20_000, help="requests a shard; default 20000"
    )
    parser.add_argument("--preset", choices=preset_names(), help="as in the run")
    common.add_flags(parser, "config_files")
    common.add_verbosity(parser)
    args, keys = common.parse_with_keys(parser, argv)
    if args.user is None and args.item is None:
        _make_descriptions(parser, args, keys)
        return
    if keys:
        parser.error(f"--{next(iter(keys))}: --user and --item take no keys of a run")
    args.artifact_dir = args.artifact_dir or common.ARTIFACT_DIR
    descriptions = _artifacts(parser, args)
    side, token = ("user", args.user) if args.user is not None else ("item", args.item)
    page = descriptions.page(side, token)
    name = f", {page.name}" if page.name else ""
    say(f"{side} {token}{name}: {page.degree} training interactions")
    for number, (status, text) in enumerate(page.texts):
        say("", f"{layer_name(number, descriptions.kinds[number])} ({status})")
        say_wrapped(text, "  ", "  ")
    if page.neighbors:
        say("", "neighbours in its prompts")
    for neighbor, label, text in page.neighbors:
        say_wrapped(f"{neighbor}: {label + '. ' if label else ''}{text}", "  - ", "    ")
    say("", descriptions.folder)


def _make_descriptions(
    parser: argparse.ArgumentParser, args: argparse.Namespace, keys: dict[str, str]
) -> None:
    """Run the stages up to the descriptions, export what they lack, or import answers."""
    if args.dataset is None or args.run is not None:
        parser.error("give --dataset and the keys of the run; --run goes with --user or --item")
    if args.shard_size < 1:
        parser.error(f"--shard-size {args.shard_size}: must be at least 1")
    names = ("dataset", "artifact_dir", "preset", "config_files")
    keys = {name: str(getattr(args, name)) for name in names if getattr(args, name)} | keys
    flags = common.flags_of(keys)
    common.keys_of(parser, flags)
    common.show_messages(args)
    if args.quiet:
        keys["show_progress"] = "False"

    from recbole_gacllm import pipeline
    from recbole_gacllm.run_config import training_data

    command = f"python -m recbole_gacllm describe {shlex.join(flags)}"
    with common.quiet_output(f"describe-{args.dataset}", args.quiet):
        options, data = training_data(args.dataset, args.config_files.split(), keys)
        if args.export_batch is None and args.import_batch is None:
            folder = pipeline.describe(options, data)
            say(folder, "", "to see them", f"  python -m recbole_gacllm audit {folder}")
            return
        job = pipeline.description_job(options, data)

        from recbole_gacllm.convolution import batch_job

        if args.export_batch is not None:
            to = args.export_batch
            manifest = batch_job.export_batch(job, to, args.shard_size)
            _print_exported(manifest, to, command)
        else:
            _print_imported(batch_job.import_batch(job, args.import_batch), command)


def _print_exported(manifest: dict[str, Any] | None, to: Path, command: str) -> None:
    if manifest is None:
        say("nothing to export: all layers are in the store, where a run finds them")
        return
    n_second, n_shards = manifest["n_second_attempts"], len(manifest["shards"])
    say(
        f"layer {manifest['layer']} of {manifest['n_layers']}: {manifest['n_requests']} requests "
        f"({n_second} of them second attempts) in {n_shards} shard{'s' * (n_shards > 1)} in {to}"
    )
    say(f"{'model':<9}{manifest['model_dir']}, called {manifest['model']!r} in the requests")
    if manifest["adapter_dir"]:
        say(f"{'adapter':<9}{manifest['adapter_dir']}")
    say("", "when there are answers, all or some", f"  {command} --import-batch ANSWERS")


def _print_imported(batch: Imported, command: str) -> None:
    n_taken = sum(layer.n_imported + layer.n_failed + layer.n_to_retry for layer in batch.layers)
    if batch.n_unknown and not n_taken and not batch.n_known:
        raise ValueError(
            f"--import-batch: none of the {batch.n_unknown} ids belongs to this run. Give the keys "
            "that --export-batch was given: weights, prompts, neighbours and sampling are in an id."
        )
    for layer in batch.layers:
        say(
            f"layer {layer.layer}: {layer.n_imported} descriptions imported, {layer.n_failed} "
            f"failed for good, {layer.n_to_retry} to be asked again, {layer.n_errors} with an "
            f"error, {layer.n_unanswered} without an answer"
        )
    say(
        f"answers: {batch.n_lines} lines, {batch.n_damaged} damaged, {batch.n_duplicates} double, "
        f"{batch.n_known} known before, {batch.n_unknown} unknown"
    )
    if batch.complete:
        say("all layers are in the store, where a run finds them")
    else:
        say("", "what is missing goes out with", f"  {command} --export-batch FOLDER")


def quality(argv: list[str]) -> None:
    """Print, and write if asked, what each layer of a run's descriptions is like."""
    parser = common.command_parser(
        "python -m recbole_gacllm audit",
        "Figures and samples of every layer of descriptions: failures, retries, "
        "lengths, copies, repetition, names of items, and the leakage audit of the run. Of a run "
        "that goes on or was killed, its finished layers, and how far the next one is.",
        "example:\n  python -m recbole_gacllm audit saved/runs/ml-100k-GaCLLM-Nov-22-2026_15-19-14",
    )
    parser.add_argument("run", type=Path, help="a run.json, its folder, or a descriptions-… folder")
    common.add_flags(parser, "artifact_dir")
    parser.add_argument("--n-samples", type=int, default=10, help="of each layer")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of samples")
    parser.add_argument("--json", type=Path, help="file to write all figures to, too")
    args = common.parse(parser, argv)

    from recbole_gacllm.inspection.quality import layer_qualities, quality_lines
    from recbole_gacllm.inspection.reading import RunDescriptions

    descriptions = RunDescriptions.of_run(args.run, True, args.artifact_dir)
    layers = list(layer_qualities(descriptions, args.n_samples, args.seed))
    for layer in layers:
        say("", *quality_lines(layer))
    if descriptions.manifest["stage"] == "inputs":
        say(
            "no LLM wrote anything: the run takes the texts of layer 0 as they are; describe "
            "--user or --item shows them"
        )
    if (unfinished := descriptions.unfinished) is not None:
        say("", f"layer {unfinished.number} of {unfinished.n_layers} is not finished")
        say("  start the run again: it goes on with what is missing")
    is_stage = args.run.is_dir() and not (args.run / RUN_FILE).is_file()
    leakage = None if is_stage else RunFiles.read(args.run).record.get("leakage_audit")
    if leakage:
        say("", "leakage audit " + ", ".join(f"{key} {value}" for key, value in leakage.items()))
    say("", descriptions.folder)
    if args.json:
        figures = {
            "folder": str(descriptions.folder),
            "leakage_audit": leakage,
            "layers": [dataclasses.asdict(layer) for layer in layers],
            "unfinished": unfinished and dataclasses.asdict(unfinished),
        }
        args.json.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", "utf-8")


def import_descriptions(argv: list[str]) -> None:
    """Fill the layers of a run with texts from elsewhere."""
    parser = common.command_parser(
        "python -m recbole_gacllm import-descriptions",
        "Check a file of descriptions (columns side, token, layer, text) against a data set and "
        "fill its layers. Where the file lacks a layer of the run, the run itself fills them, as "
        "the LLM is needed.",
        "example:\n  python -m recbole_gacllm import-descriptions texts.parquet --dataset=ml-100k",
    )
    parser.add_argument("file", type=Path, help=".parquet or .csv")
    common.add_flags(parser, "dataset", "config_files")
    argv = common.with_equals_signs(parser, argv)
    args, _ = common.parse_with_keys(parser, argv)
    flags = [word for word in argv if word.startswith("--")]
    keys = common.keys_of(parser, [*flags, f"--text_import_file={args.file}"])

    from recbole_gacllm.convolution.imported import ImportedTexts, in_words

    imported = ImportedTexts.read(args.file.resolve())
    has_knowledge = str(keys.get("llm_knowledge_tokens", 0)) != "0"
    if max(imported.layers) > 0 and "llm_n_layers" not in keys:
        keys["llm_n_layers"] = str(max(imported.layers) - has_knowledge)

    from recbole_gacllm import pipeline
    from recbole_gacllm.run_config import training_data

    options, data = training_data(args.dataset, args.config_files.split(), dict(keys))
    tokens = {side: data.graph.tokens(side).tolist() for side in SIDES}
    for report in imported.check(tokens, options.n_text_layers):
        say(in_words(report))
    to_make = set(range(1, options.n_text_layers + 1)) - set(imported.layers)
    if to_make:
        say(f"left to the LLM of the run: layer {', '.join(map(str, sorted(to_make)))}")
    else:
        say(f"written to {pipeline.describe(options, data)}")
    command = shlex.join(common.flags_of(keys))
    say("", "to train on them", f"  python run_recbole_gacllm.py {command}")


def export_descriptions(argv: list[str]) -> None:
    """Write all descriptions to one file."""
    parser = _artifact_parser(
        "export-descriptions",
        "Write all descriptions to one file: side, token, layer, kind (raw, knowledge or "
        "convolution), text, status, reason, tokens.",
        "example:\n"
        "  python -m recbole_gacllm export-descriptions --dataset=ml-100k --output=texts.parquet",
    )
    common.add_flags(parser, "output")
    args = common.parse(parser, argv)
    common.require_table(parser, args.output)
    frame = _artifacts(parser, args).frame()
    common.write_table(frame, args.output)
    say(f"{len(frame)} descriptions written to {args.output}")


def export_embeddings(argv: list[str]) -> None:
    """Write a layer's text embeddings as RecBole's files."""
    parser = _artifact_parser(
        "export-embeddings",
        "Write the text embeddings of a layer as RecBole's files of pretrained embeddings.",
        "example:\n"
        "  python -m recbole_gacllm export-embeddings --dataset=ml-1m --layer=1 --output=ml-1m",
    )
    parser.add_argument(
        "--layer", type=int, required=True, help="0: raw texts; l: texts of layer l"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write to; the files get its name"
    )
    args = common.parse(parser, argv)
    _require_one_source(parser, args)

    from recbole_gacllm.inspection.embeddings import export_embeddings, find_embeddings

    folder = find_embeddings(args.artifact_dir, args.dataset, args.run, args.layer)
    say(*export_embeddings(folder, args.layer, args.output), f"from {folder}")


def _artifact_parser(command: str, description: str, epilog: str) -> argparse.ArgumentParser:
    parser = common.command_parser(f"python -m recbole_gacllm {command}", description, epilog)
    parser.add_argument("--dataset", help="the newest descriptions of this data set")
    parser.add_argument("--run", type=Path, help="or those of a run: a run.json or its folder")
    common.add_flags(parser, "artifact_dir")
    return parser


def _require_one_source(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if (args.dataset is None) == (args.run is None):
        parser.error("give either --dataset or --run")


def _artifacts(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Any:
    from recbole_gacllm.inspection.reading import RunDescriptions

    _require_one_source(parser, args)
    if args.run is not None:
        return RunDescriptions.of_run(args.run, artifact_dir=args.artifact_dir)
    return RunDescriptions.newest(args.artifact_dir, args.dataset)

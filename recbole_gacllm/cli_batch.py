"""The command ``describe`` where it makes descriptions: here, or by way of a cluster."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recbole_gacllm import cli_common
from recbole_gacllm.config import preset_names
from recbole_gacllm.console import say

if TYPE_CHECKING:
    from recbole_gacllm.stage_batch import Imported


def add_arguments(parser: argparse.ArgumentParser, actions: Any) -> None:
    """The flags of these ways of ``describe``."""
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
    cli_common.add_config_files(parser)
    cli_common.add_verbosity(parser)


def make_descriptions(
    parser: argparse.ArgumentParser, known: argparse.Namespace, keys: Mapping[str, str]
) -> None:
    """Run the stages up to the descriptions, export what they lack, or import answers."""
    if known.dataset is None or known.run is not None:
        parser.error("give --dataset and the keys of the run; --run goes with --user or --item")
    if known.shard_size < 1:
        parser.error(f"--shard-size {known.shard_size}: must be at least 1")
    given = {
        name: getattr(known, name) for name in ("dataset", "artifact_dir", "preset", "config_files")
    }
    flags = [f"--{name}={value}" for name, value in {**given, **keys}.items() if value]
    cli_common.require_key_value(parser, flags)
    cli_common.show_messages(known)

    # RecBole's import takes seconds: --help and mistakes above do not wait for it.
    from recbole_gacllm import pipeline
    from recbole_gacllm.run_config import training_data

    # RecBole reads sys.argv itself.
    sys.argv[1:] = flags + (["--show_progress=False"] if known.quiet else [])
    command = f"python -m recbole_gacllm describe {shlex.join(flags)}"
    with cli_common.quiet_output(f"describe-{known.dataset}", known.quiet):
        options, data = training_data(known.dataset, known.config_files.split())
        if known.export_batch is None and known.import_batch is None:
            folder = pipeline.describe(options, data)
            say(folder, "", "to see them", f"  python -m recbole_gacllm audit {folder}")
            return
        folder, job = pipeline.description_job(options, data)

        from recbole_gacllm import stage_batch

        if known.export_batch is not None:
            to = known.export_batch
            exported = stage_batch.export_batch(folder, job, to, known.shard_size)
            _print_exported(exported, to, command)
        else:
            _print_imported(stage_batch.import_batch(folder, job, known.import_batch), command)


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


def _print_imported(done: Imported, command: str) -> None:
    n_taken = sum(layer.n_imported + layer.n_failed + layer.n_to_retry for layer in done.layers)
    if done.n_unknown and not n_taken and not done.n_known:
        raise ValueError(
            f"--import-batch: none of the {done.n_unknown} ids belongs to this run. Give the keys "
            "that --export-batch was given: weights, prompts, neighbours and sampling are in an id."
        )
    for layer in done.layers:
        say(
            f"layer {layer.layer}: {layer.n_imported} descriptions imported, {layer.n_failed} "
            f"failed for good, {layer.n_to_retry} to be asked again, {layer.n_errors} with an "
            f"error, {layer.n_unanswered} without an answer"
        )
    say(
        f"answers: {done.n_lines} lines, {done.n_damaged} damaged, {done.n_duplicates} double, "
        f"{done.n_known} known before, {done.n_unknown} unknown"
    )
    if done.complete:
        say("all layers are in the store, where a run finds them")
    else:
        say("", "what is missing goes out with", f"  {command} --export-batch FOLDER")

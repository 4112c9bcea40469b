"""The command line: ``run_recbole_gacllm.py`` and ``python -m recbole_gacllm``."""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recbole_gacllm.artifacts import launchers
from recbole_gacllm.cli import check, common, compare, descriptions, import_data, recommend
from recbole_gacllm.config import preset_names
from recbole_gacllm.console import flush, one_line, prepare, say
from recbole_gacllm.convolution.layers import layer_name
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
  import-data           make a data set of your own files: CSV, TSV, JSON lines, Parquet
  check                 read a data set as a run would, and show three texts of each side
  leaderboard           models x data sets x seeds on identical splits, with tests and tables
  tune                  search hyper-parameters with RecBole's HyperTuning
  recommend             write top-k lists of a finished run, for its users or for others
  report                write a page about a run or a leaderboard: one HTML file
  describe              print what was written about a user or an item, layer by layer; or make
                        the descriptions of a run, here or by way of a cluster (batch files)
  audit                 print failures, lengths, copies, names and samples of every layer
  export-descriptions   write all descriptions to one Parquet or CSV file
  import-descriptions   check texts from elsewhere, and how a run uses them
  export-embeddings     write a layer's text embeddings as RecBole's .useremb and .itememb files
"""

_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "import-data": import_data.import_data,
    "check": check.check,
    "leaderboard": compare.leaderboard,
    "tune": compare.tune,
    "recommend": recommend.recommend,
    "report": compare.report,
    "describe": descriptions.describe,
    "audit": descriptions.quality,
    "export-descriptions": descriptions.export_descriptions,
    "import-descriptions": descriptions.import_descriptions,
    "export-embeddings": descriptions.export_embeddings,
}


# Errors of the disk and of rights: the place that was given cannot be used.
_OF_THE_PLACE = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO),
        *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    }
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; errors of input and of stages end in one line and exit code 2 or 1."""
    prepare()
    os.environ.setdefault(*launchers.WAITING)
    program, *words = sys.argv if argv is None else [sys.argv[0], *argv]
    try:
        launchers.require_one_process()
        if words and words[0] in _COMMANDS:
            _COMMANDS[words[0]](words[1:])
        else:
            _run(program, words)
    except GaCLLMError as error:
        _fail(error, 1)
    except (ValueError, NotImplementedError) as error:  # the latter of RecBole: no such setting
        if not _is_about_input(error):
            raise
        _fail(error, 2)
    except OSError as error:
        if error.errno not in _OF_THE_PLACE:
            raise
        threading.excepthook = lambda _: None  # TensorBoard's thread would say the same, at length
        hint = "Free space or rights there, or choose another folder, and start again."
        _fail(OSError(f"{error}. {hint}"), 2)
    except ModuleNotFoundError as error:
        if error.name != "recbole":
            raise
        _fail(error, 1)
    except KeyboardInterrupt:
        print("interrupted; start again to resume: what was finished is kept", file=sys.stderr)
        sys.exit(130)
    finally:
        flush()


def _fail(error: Exception, exit_code: int) -> None:
    print(f"error: {one_line(error)}", file=sys.stderr)
    sys.exit(exit_code)


def _is_about_input(error: BaseException) -> bool:
    """Whether this package or RecBole raised it; the traceback of anything else is worth seeing."""
    last = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return last.is_relative_to(Path(__file__).parent.parent) or "recbole" in last.parts


def _run(program: str, argv: list[str]) -> None:
    command = [program, *argv]
    parser = common.command_parser(
        "run_recbole_gacllm.py",
        "Train and test GaCLLM, or any RecBole model, on data in RecBole's format.",
        _RUN_EPILOG,
    )
    common.add_flags(parser, "dataset", "model", "config_files", "nproc")
    parser.add_argument(
        "--preset",
        choices=preset_names(),
        help="GaCLLM's settings: best (default, our tuned choice) or paper (the paper's method)",
    )
    common.add_verbosity(parser)
    argv = common.with_equals_signs(parser, argv)
    args, _ = common.parse_with_keys(parser, argv)
    if args.nproc < 1:
        parser.error(f"--nproc: {args.nproc} is not allowed; give at least 1")
    # RecBole has the flags above, too, but for these.
    keys = common.keys_of(parser, [flag for flag in argv if flag not in common.VERBOSITY])
    if args.quiet:
        keys["show_progress"] = "False"
    if args.verbose:
        keys["state"] = "DEBUG"

    # RecBole's import takes seconds: --help and mistakes above do not wait for it.
    from recbole_gacllm import run as runner

    what = args.model, args.dataset, args.config_files.split()
    with common.quiet_output(f"{args.model}-{args.dataset}", args.quiet):
        if args.nproc == 1:
            run_file = runner.run(*what, keys, command=command).run_file
            assert run_file is not None  # only further processes of DDP have none
        else:
            run_file = runner.run_distributed(*what, args.nproc, keys, command)
    _print_summary(json.loads(run_file.read_text("utf-8")), run_file)


def _print_summary(record: dict[str, Any], run_file: Path) -> None:
    """The result and where every file lies."""
    say("", f"{record['model']} on {record['dataset']}, seed {record['seed']}")
    metrics = list(record["test"])
    say("         " + " ".join(f"{name:>12}" for name in metrics))
    for split in ("valid", "test"):
        values = [record[split].get(name) for name in metrics]
        cells = [f"{'-' if value is None else format(value, '.4f'):>12}" for value in values]
        say(f"{split:<9}" + " ".join(cells))
    seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in record["seconds"].items())
    say(f"time     {seconds}", "")
    for warning in (record.get("data") or {}).get("warnings", []):
        common.say_wrapped(f"warning: {warning}", later="  ")
        say("")
    for stage, figures in record.get("stages", {}).items():
        say(f"{stage:<13}{_stage_line(figures)}")
    if "leakage_audit" in record:
        from recbole_gacllm.inspection.leakage import verdict

        audit = record["leakage_audit"]
        p_value = "" if audit["p_value"] is None else f" (p = {audit['p_value']:.2g})"
        say(
            f"{'leakage':<13}{audit['heldout_mentions']} of {audit['n_pairs']} held-out pairs are "
            f"named in their texts, {audit['matched_mentions']} of as many matched pairs"
            f"{p_value}"
        )
        if verdict(audit) == "unseen":
            say(f"{'':<13}only {audit['n_checkable']} of {audit['n_heldout']} could be checked")
    say("")
    for stage, folder in record.get("artifacts", {}).items():
        say(f"{stage:<13}{folder}")
    run = shlex.quote(str(run_file.parent))
    say(f"{'checkpoint':<13}{record['checkpoint']}")
    say(f"{'lists':<13}python -m recbole_gacllm recommend {run} --output=lists.csv")
    say(f"{'run':<13}{run_file}")


def _stage_line(figures: dict[str, Any]) -> str:
    """One stage of ``run.json`` in a line."""
    parts = ["reused" if figures["reused"] else f"{figures.get('seconds', 0):.0f} s"]
    if figures.get("perplexity_before") is not None:
        before, after = figures["perplexity_before"], figures["perplexity_after"]
        parts.append(f"held-out perplexity {before:.1f} -> {after:.1f}")
    for number, layer in enumerate(figures.get("layers", []), 1):
        if "n_generated" in layer:
            parts.append(
                f"{layer_name(number, layer.get('kind'))}: {layer['n_generated']} generated, "
                f"{layer['n_from_store']} from the store, {layer['n_failed']} failed, "
                f"{layer['n_prompt_tokens']} tokens in, {layer['n_output_tokens']} out"
            )
    return "; ".join(parts)

"""What determines a run besides its configuration: the files that it reads, the code that computes.

A run's key holds digests of both, so that a changed input or a changed computation never finds an
old number. Comments, docstrings and layout of the code do not count (:func:`code_digest`). Versions
of the code that give the same numbers stand in ``properties/computations.yaml``, each with the
evidence; a key names the first of them.

    python -m recbole_gacllm.compare.identity                    # what has changed
    python -m recbole_gacllm.compare.identity same "EVIDENCE"    # …, and the numbers have not
    python -m recbole_gacllm.compare.identity new "WHY"          # …, and so have the numbers
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from recbole_gacllm.config import MODEL, MODELS, PEERS, reads_text, shipped_path
from recbole_gacllm.console import say
from recbole_gacllm.convolution.imported import ImportedTexts
from recbole_gacllm.convolution.prompts import PromptTemplates
from recbole_gacllm.literals import parse_yaml
from recbole_gacllm.llm import weights

#: Concern -> the modules whose code decides its part of a run's numbers.
CONCERNS: dict[str, tuple[str, ...]] = {
    "runs": (  # every run
        *("__init__.py", "config.py", "literals.py", "run_config.py", "run.py"),
        *("data/__init__.py", "data/atomic.py", "data/numbers.py"),
        *("plugin/__init__.py", "plugin/import_hooks.py", "plugin/registration.py"),
        *("plugin/compat.py", "plugin/compat_data.py", "plugin/compat_distributed.py"),
        *("compare/job.py", "compare/degrees.py"),
    ),
    "splits": ("plugin/splits.py",),
    "history": ("plugin/history.py",),
    "cold": (),  # unseen.py and choice.py once more, for runs whose held-out nodes are unseen
    "times": (),  # compat_data.py once more, for runs to which the order of time matters
    "fast": ("plugin/fast.py", "plugin/fast_graph.py"),
    # Other papers' models on our texts, and texts for RecBole's.
    "peers": ("peers/__init__.py", "peers/texts.py", "peers/text_init.py"),
    "AlphaRec": ("peers/alpharec.py",),
    "RLMRec": ("peers/rlmrec.py",),
    "CEASE": ("peers/cease.py",),
    "model": (  # our models
        *("model.py", "text_knn.py", "inputs.py", "convolution/graph.py"),
        *("alignment/__init__.py", "alignment/embeddings.py", "alignment/propagation.py"),
        *("objective/__init__.py", "objective/losses.py", "objective/linear.py"),
        *("objective/unseen.py", "objective/choice.py", "objective/scoring.py"),
        "objective/local.py",
    ),
    "texts": (  # layer 0 and the encoder
        *("pipeline.py", "stage.py", "job.py", "alignment/encoder.py", "artifacts/csv_cells.py"),
        *("convolution/__init__.py", "convolution/text.py", "convolution/templates.py"),
        *("convolution/values.py", "convolution/words.py", "convolution/neutralize.py"),
        "data/markup.py",
        *("convolution/layers.py", "convolution/imported.py", "convolution/setup.py"),
        *("llm/__init__.py", "llm/weights.py", "llm/hardware.py"),
    ),
    "llm": (  # layers above it
        *("convolution/batch_job.py", "convolution/batch.py", "convolution/prompts.py"),
        *("convolution/requests.py", "convolution/convolution.py", "convolution/cleaning.py"),
        *("convolution/store.py", "convolution/ray_describe.py"),
        *("llm/generator.py", "llm/engines.py", "llm/fleet.py", "llm/vllm_engine.py"),
        *("llm/transformers_engine.py", "llm/chat_api.py", "llm/server.py"),
        *("llm/chat.py", "llm/adapter.py", "llm/endpoints.py"),
        *("sft/__init__.py", "sft/pairs.py", "sft/batches.py", "sft/finetune.py"),
        *("sft/trainer.py", "sft/processes.py", "sft/merge.py"),
    ),
    "prompts": (),  # the shipped files
}
#: Modules, or folders of them, on which no number depends.
OTHERS = (
    *("__main__.py", "errors.py", "redaction.py", "console.py", "data/checks.py", "artifacts/"),
    *("plugin/key_checks.py", "plugin/run_folder.py", "plugin/threads.py", "llm/formats.py"),
    *("convolution/names.py", "data/tables.py", "data/guessing.py", "data/recipes.py"),
    *("data/recipe_rows.py", "data/sources.py", "data/interactions.py", "data/features.py"),
    *("data/describing.py", "data/importing.py", "estimate.py", "inspection/", "compare/"),
    *("report/", "cli/"),
)
#: What the first runs of this package, which hold no digests of this kind, have in their keys for
#: the code of our models (None for others'): the name of the first version of every concern.
FIRST_CODE = "4c40a0959ec716099133f613b0cf84f597bdedb04ad143ba68862d0614bca109"
#: Keys that came after those runs, with the value under which the numbers are as they were.
LATER_KEYS: dict[str, Any] = {
    **{"llm_knowledge_tokens": 0, "cold_user_share": 0.0, "known_users_only": False},
    "mask_history": False,
    **{"text_layers": "hops", "text_users": "own", "text_init": False},
    **{"text_init_frozen": False, "text_init_reduction": "pca", "few_interactions": {}},
    "text_fusion": "late",
}
_TABLE = shipped_path("properties", "computations.yaml")
_TABLE_HEAD = """\
# Versions of the code that computes (recbole_gacllm/compare/identity.py), in order. Those of
# a concern with the same `numbers` give the same numbers: `evidence` says how that is known. The
# command `python -m recbole_gacllm.compare.identity same "EVIDENCE"` adds lines.
"""


def of(config: Mapping[str, Any], sha256: Callable[[Path], str]) -> dict[str, Any]:
    """The part of a run's key that a configuration does not say: ``code``, ``data``, ``read``.

    Args:
        config: Resolved, as plain values.
        sha256: :func:`.hashing.sha256`, or one that remembers.

    Raises:
        ValueError: If an input cannot be used.
        WeightsError: If a model of a hub cannot be fetched.
    """
    read = input_digests(config, sha256)
    key = {"code": code_of(config), "data": data_digests(config, sha256)}
    return key | ({"read": read} if read else {})


def concerns_of(config: Mapping[str, Any]) -> list[str]:
    """The concerns on which the numbers of a configuration depend."""
    model, with_text = config["model"], reads_text(config)
    generated = has_layers(config)
    cold = config.get("cold_item_share"), config.get("cold_user_share")
    wanted = {
        "runs": True,
        "splits": any(cold)
        or config.get("train_share") not in (None, 1)
        or bool(config.get("known_users_only")),
        "history": bool(config.get("mask_history")),
        "times": config["eval_args"]["order"] == "TO"
        or (generated and config["neighbor_rule"] == "recent"),
        "fast": bool(config.get("fast_paths")),
        "peers": model in PEERS or bool(config.get("text_init")),
        "AlphaRec": model == "AlphaRec",
        "RLMRec": model.startswith("RLMRec"),
        "CEASE": model == "CEASE",
        "model": model in MODELS or with_text,
        "cold": model == MODEL and any(cold),
        "texts": with_text,
        "llm": generated,
        "prompts": generated and config["llm_prompts_dir"] is None,
    }
    return [concern for concern, is_wanted in wanted.items() if is_wanted]


def has_layers(config: Mapping[str, Any]) -> bool:
    """Whether a configuration has texts above layer 0."""
    return bool(
        reads_text(config)
        and config["model"] != "TextKNN"
        and config["text_source"] in ("generated", "shuffled")
        and _n_text_layers(config) > 0
    )


def code_of(config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The code in a run's key: for each of its concerns the first version with these numbers.

    Where all of them are the very first, it is what the keys of the first runs have.
    """
    table, firsts, all_first = read_table(), {}, True
    for concern in concerns_of(config):
        digest = code_digests()[concern]
        versions = [line for line in table if line["concern"] == concern]
        numbers = [line["numbers"] for line in versions if line["digest"] == digest]
        same = [line["digest"] for line in versions if line["numbers"] in numbers[:1]]
        firsts[concern] = same[0] if same else digest
        all_first &= bool(numbers) and numbers[0] == versions[0]["numbers"]
    if all_first:
        return FIRST_CODE if config["model"] in MODELS else None
    return firsts


def read_table() -> list[dict[str, Any]]:
    """The lines of ``computations.yaml``."""
    return list(parse_yaml(_TABLE.read_text("utf-8")) or [])


@functools.cache
def code_digests() -> dict[str, str]:
    """The present digest of every concern."""
    package = Path(__file__).resolve().parent.parent
    digests = {name: code_digest(package, modules) for name, modules in CONCERNS.items()}
    prompts = shipped_path("properties", "prompts").glob("*.txt")
    return digests | {
        "times": code_digest(package, ("plugin/compat_data.py",)),
        "cold": code_digest(package, ("objective/unseen.py", "objective/choice.py")),
        "prompts": _digest({file.name: file.read_text("utf-8") for file in prompts}),
    }


def code_digest(folder: Path, modules: tuple[str, ...]) -> str:
    """SHA-256 of what modules do: of their syntax trees without docstrings."""
    return _digest({name: _plain(ast.parse((folder / name).read_bytes())) for name in modules})


def _plain(node: Any) -> Any:
    """A syntax tree as JSON, the same on every Python: without docstrings, places, empty fields."""
    if isinstance(node, list):
        return [_plain(part) for part in node]
    if not isinstance(node, ast.AST):
        return node if isinstance(node, (str, int, type(None))) else repr(node)
    fields = {name: value for name, value in ast.iter_fields(node) if value not in (None, [])}
    if isinstance(node, ast.Constant):  # `None` is a value here, 1 and True are two
        return [type(node.value).__name__, repr(node.value)]
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        has_docstring = ast.get_docstring(node, clean=False) is not None
        fields["body"] = node.body[1:] if has_docstring else node.body
    return [type(node).__name__, {name: _plain(value) for name, value in fields.items()}]


def data_digests(config: Mapping[str, Any], sha256: Callable[[Path], str]) -> dict[str, str]:
    """SHA-256 of the data set's files that RecBole loads for this configuration."""
    endings = ["inter", "user", "item", *(config.get("additional_feat_suffix") or [])]
    if str(config["MODEL_TYPE"]).endswith("KNOWLEDGE"):
        endings += ["kg", "link"]
    endings += [f"{name}.inter" for name in config.get("benchmark_filename") or []]
    folder = Path(config["data_path"])
    files = [folder / f"{config['dataset']}.{ending}" for ending in endings]
    return {file.name: sha256(file) for file in files if file.is_file()}


def input_digests(config: Mapping[str, Any], sha256: Callable[[Path], str]) -> dict[str, str]:
    """Key -> digest of the file or folder that it names; embedded models are pinned in the code."""
    concerns = concerns_of(config)
    others = {"config_files", "llm_model", "encoder_model"}
    digests = {
        key: sha256(Path(value))
        for key, value in config.items()
        if key not in others and isinstance(value, str) and os.path.isfile(value)
    }
    if "texts" not in concerns:
        return {key: value for key, value in digests.items() if not key.startswith("text_")}
    if config["encoder_model"] != weights.EMBEDDED:
        folder = weights.resolve_encoder(config["encoder_model"])
        digests["encoder_model"] = weights.fingerprint(folder)
    if "llm" not in concerns or _all_imported(config):
        return digests
    if config["llm_prompts_dir"] is not None:
        nouns = config["text_user_noun"], config["text_item_noun"]
        knowledge = config.get("llm_knowledge_tokens", 0) > 0
        templates = PromptTemplates.load(Path(config["llm_prompts_dir"]), *nouns, knowledge)
        digests["llm_prompts_dir"] = _digest(templates.texts)
    if config["llm_adapter"] is not None:
        digests["llm_adapter"] = weights.fingerprint(Path(config["llm_adapter"]))
    if config["llm_model"] != weights.EMBEDDED:
        is_adapted = config["sft"] or config["llm_adapter"] is not None
        on_server = config["llm_backend"] == "server" and not is_adapted
        resolve = weights.resolve_tokenizer if on_server else weights.resolve_llm
        digests["llm_model"] = weights.fingerprint(resolve(config["llm_model"]), not on_server)
    return digests


def _all_imported(config: Mapping[str, Any]) -> bool:
    """Whether a file brings every layer above layer 0, so that no LLM is asked."""
    if config["text_import_file"] is None:
        return False
    layers = ImportedTexts.read(Path(config["text_import_file"])).layers
    return set(range(1, _n_text_layers(config) + 1)) <= set(layers)


def _n_text_layers(config: Mapping[str, Any]) -> int:
    """Of a configuration that may be older than the knowledge step."""
    return int(config["llm_n_layers"]) + int(config.get("llm_knowledge_tokens", 0) > 0)


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode("ascii")).hexdigest()


def unlisted() -> list[str]:
    """Concerns whose present code is in no line of the table."""
    listed = {(line["concern"], line["digest"]) for line in read_table()}
    return [
        concern for concern, digest in code_digests().items() if (concern, digest) not in listed
    ]


def list_present(same: bool, evidence: str) -> list[str]:
    """Add a line to the table for every concern whose code has changed; return these concerns.

    Args:
        same: Whether it gives the numbers of the version before.
        evidence: How that is known; or why the numbers are others.
    """
    lines, changed = read_table(), unlisted()
    for concern in changed:
        before = [line["numbers"] for line in lines if line["concern"] == concern]
        numbers = (before[-1] if same else max(before) + 1) if before else 1
        line = {"concern": concern, "numbers": numbers, "digest": code_digests()[concern]}
        lines.append({**line, "evidence": evidence})
    text = "".join(f"- {json.dumps(line, ensure_ascii=False)}\n" for line in lines)
    _TABLE.write_text(_TABLE_HEAD + text, "utf-8")
    return changed


def main(argv: list[str]) -> None:
    """Say which concerns have changed, or add them to the table."""
    match argv:
        case []:
            say(f"changed, in no line of {_TABLE}: {', '.join(unlisted()) or 'nothing'}")
        case ["same" | "new" as word, evidence]:
            say(f"listed: {', '.join(list_present(word == 'same', evidence)) or 'nothing'}")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])

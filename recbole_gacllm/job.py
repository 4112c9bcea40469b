"""What a stage is to do: the contract between the pipeline and its child processes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from recbole_gacllm.artifacts import disk, locate, manifests
from recbole_gacllm.config import GaCLLMConfig
from recbole_gacllm.errors import GaCLLMError

_PATHS = ("inputs", "model_dir", "adapter_dir", "encoder_dir")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One stage of one run; ``job.json`` in the stage's folder.

    Attributes:
        stage: Its name in ``stage.py``; the folder is ``<stage>-<fingerprint of key>``.
        key: All that determines its results.
        outputs: Files and folders that it makes.
        options: The run's keys.
        seed, show_progress: RecBole's.
        inputs: Folder of the training graph and layer 0.
        model_dir: The LLM that the stage trains, merges or generates with.
        model_name: What the user called it.
        adapter_dir: LoRA adapter to merge, or to generate with.
        served_model: What servers call the model.
        generator_key: What identifies the weights that generate; None if every layer is imported.
        layer_files: Layers to encode.
        encoder_dir: The encoder.
    """

    stage: str
    key: dict[str, Any]
    outputs: tuple[str, ...]
    options: GaCLLMConfig
    seed: int
    show_progress: bool
    inputs: Path
    model_dir: Path | None = None
    model_name: str | None = None
    adapter_dir: Path | None = None
    served_model: str = ""
    generator_key: dict[str, Any] | None = None
    layer_files: tuple[Path, ...] = ()
    encoder_dir: Path | None = None

    @property
    def folder(self) -> Path:
        """The stage's folder, beside that of the inputs."""
        name = f"{self.stage}-{manifests.fingerprint(self.key)[:16]}"
        return self.inputs.parent / name

    @property
    def store(self) -> Path:
        """The description store of the run."""
        return locate.store_of(self.inputs)

    def write(self, folder: Path) -> None:
        """Write ``job.json`` into a folder, which is there.

        Raises:
            GaCLLMError: If it cannot be written.
        """
        text = json.dumps(dataclasses.asdict(self), indent=2, default=str)
        disk.write_atomic(folder / manifests.JOB_FILE, text.encode())

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The job of a stage's folder.

        Raises:
            GaCLLMError: If the file is not what this release writes.
        """
        file = folder / manifests.JOB_FILE
        try:
            content = json.loads(file.read_bytes())
            content["options"] = GaCLLMConfig.from_mapping(content["options"])
            content["outputs"] = tuple(content["outputs"])
            content["layer_files"] = tuple(map(Path, content["layer_files"]))
            content |= {name: Path(content[name]) for name in _PATHS if content[name] is not None}
            return cls(**content)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise GaCLLMError(
                f"{file} is not what this release writes ({error}): start the run again, which "
                "writes it anew."
            ) from error

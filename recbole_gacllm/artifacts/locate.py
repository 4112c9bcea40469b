"""Where the files lie that other files name: a run's artefacts, a stage's inputs.

``run.json`` and ``job.json`` name folders by the paths of the machine that wrote them. They may
have been moved since, or come from a stranger. So a name that a file gives stays below the folder
that it is of, artefacts are found again relative to the file that names them, and artefact folders
hold no symbolic links. Standard library only, as :mod:`.children`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any

from recbole_gacllm.errors import GaCLLMError

#: In ``artifact_dir``, beside the folders of the data sets.
STORE_FILE = "store.sqlite"
RUN_FILE = "run.json"
_N_PARENTS = 6  # of a run.json: CHECKPOINT_DIR/runs/RUN, OUTPUT/runs/DATASET/RUN, and what is above
_NEEDED = {"model", "dataset", "seed", "test", "config", "versions", "device"}
_NEEDED_OF_CONFIG = {"model", "dataset", "data_path", "ITEM_ID_FIELD"}


def inside(folder: Path, name: object) -> Path:
    """The path of ``name`` in a folder, where a file gave the name.

    Raises:
        ValueError: If it is absolute, leaves the folder, or passes through a symbolic link.
    """
    root = folder.resolve()
    if isinstance(name, str) and name and "\0" not in name:
        path = root / name
        if path != root and path.is_relative_to(root) and path.resolve() == path:
            return folder / name
    raise ValueError(
        f"{name!r}, named by a file of {folder}, is not a plain path in this folder (absolute, "
        "above it, or through a symbolic link). The file was edited, or was not written here."
    )


def require_no_links(folder: Path) -> None:
    """Refuse symbolic links in an artefact folder: what is read or written would lie elsewhere.

    Raises:
        GaCLLMError: Names the link.
    """
    links = [folder] if folder.is_symlink() else []
    for place, folders, files in os.walk(folder):
        links += [path for name in (*folders, *files) if (path := Path(place, name)).is_symlink()]
    if links:
        raise GaCLLMError(
            f"{links[0]} is a symbolic link to {os.readlink(links[0])}; artefact folders hold "
            "files and folders only. Remove the link, or put what it leads to in its place."
        )


def beside(folder: Path, recorded: object) -> Path:
    """The folder of another stage of the same data set, which a stage's job names.

    Raises:
        ValueError: If it is no name of a folder.
        GaCLLMError: If it holds symbolic links.
    """
    other = inside(folder.parent, PurePath(str(recorded)).name)
    require_no_links(other)
    return other


def store_of(folder: Path) -> Path:
    """The description store that a stage folder's texts are in."""
    return folder.parent.parent / STORE_FILE


@dataclass(frozen=True)
class RunFiles:
    """A run's record, and where what it names lies now."""

    record: dict[str, Any]  # the run's ``run.json``
    folder: Path  # where it lies
    artifact_dir: Path | None = None  # where else to look than as recorded and around the run

    @classmethod
    def read(cls, run: Path, artifact_dir: Path | None = None) -> RunFiles:
        """Read a ``run.json``, given itself or by its folder.

        Raises:
            ValueError: If there is no such file, or it is no JSON object.
        """
        file = run / RUN_FILE if run.is_dir() else run
        if not file.is_file():
            raise ValueError(f"{file} is not a file; a run's last line of output names it.")
        try:
            record = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{file} is not the record of a run: it is no JSON ({error})."
            ) from error
        if not isinstance(record, dict):
            raise ValueError(f"{file} is not the record of a run: it is no JSON object.")
        return cls(record, file.parent, artifact_dir)

    def require_whole(self) -> None:
        """Refuse a record without what every run has.

        Raises:
            ValueError: Names what is missing.
        """
        config, test = self.record.get("config"), self.record.get("test")
        missing = _NEEDED - set(self.record)
        missing |= _NEEDED_OF_CONFIG - set(config if isinstance(config, dict) else {})
        if missing or not isinstance(test, dict) or not test:
            what = ", ".join(sorted(missing)) or "metrics in 'test'"
            file = self.folder / RUN_FILE
            raise ValueError(f"{file} is not the record of a run: it has no {what}.")

    def artifacts(self) -> dict[str, Path]:
        """Stage -> folder of its artefacts.

        Raises:
            ValueError: If they are no paths.
            GaCLLMError: If one holds symbolic links.
        """
        recorded = self.record.get("artifacts") or {}
        if not isinstance(recorded, dict) or not all(isinstance(p, str) for p in recorded.values()):
            raise ValueError(f"the run.json of {self.folder} names no paths in its 'artifacts'.")
        folders = {stage: self._find(path) for stage, path in recorded.items()}
        for folder in folders.values():
            require_no_links(folder)
        return folders

    def checkpoint(self) -> Path:
        """The checkpoint of the best epoch.

        Raises:
            GaCLLMError: If the run kept none, or it is gone.
        """
        recorded = self.record.get("checkpoint")
        if recorded is None:
            raise GaCLLMError("the run kept no checkpoint")
        file = self._find(str(recorded))
        if not file.is_file():
            raise GaCLLMError(f"the checkpoint is gone: there is no {recorded}")
        return file

    def data_path(self) -> Path:
        """The folder of the data set; ml-100k comes with RecBole."""
        config = self.record["config"]
        path = self._find(str(config["data_path"]))
        recbole = find_spec("recbole")  # its import would take seconds
        if config["dataset"] == "ml-100k" and not path.is_dir() and recbole and recbole.origin:
            return Path(recbole.origin).parent / "dataset_example" / "ml-100k"
        return path

    def _find(self, recorded: str) -> Path:
        """A recorded file or folder: there, or as near to ``run.json`` as it was.

        The longest end of the recorded path that exists in a folder around ``run.json``, or in
        ``artifact_dir``, is taken, so a tree that was moved or copied whole, or received, is found;
        if there is none, the path as recorded. A copy has its own files, not those it was made of.
        """
        path = PurePath(os.path.normpath(recorded.replace("\0", "")))
        is_moved = self._is_moved()
        if ".." in path.parts or (Path(path).exists() and not is_moved):
            return Path(path)
        here = self.folder.resolve()
        around = [here, *here.parents][:_N_PARENTS]
        if is_moved:  # from a folder that holds both, the old place is found
            around = [base for base in around if not path.is_relative_to(base)]
        around += [self.artifact_dir.resolve()] if self.artifact_dir else []
        names = path.parts[1:] if path.is_absolute() else path.parts
        for start in range(len(names)):
            for base in around:
                if (candidate := base.joinpath(*names[start:])).exists():
                    return candidate
        return Path(path)

    def _is_moved(self) -> bool:
        """Whether ``run.json`` lies elsewhere than written, which its checkpoint's folder tells."""
        checkpoint = self.record.get("checkpoint")
        if not isinstance(checkpoint, str):
            return False
        file, here = PurePath(checkpoint), self.folder.resolve()
        return not (here.is_relative_to(file.parent) or file.is_relative_to(here))

"""Where the files lie that other files name: a run's artefacts, a stage's inputs.

``run.json`` and ``job.json`` name folders by the paths of the machine that wrote them. They may
have been moved since, or come from a stranger. So a name that a file gives stays below the folder
that it is of, artefacts are found again relative to the file that names them, and artefact folders
hold no symbolic links. Standard library only, as :mod:`.artifacts`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from recbole_gacllm.errors import GaCLLMError

#: In ``artifact_dir``, beside the folders of the data sets.
STORE_FILE = "store.sqlite"
_N_PARENTS = 6  # of a run.json: CHECKPOINT_DIR/runs/RUN, OUTPUT/runs/DATASET/RUN, and what is above


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
    """
    return inside(folder.parent, PurePath(str(recorded)).name)


def store_of(folder: Path) -> Path:
    """The description store that a stage folder's texts are in."""
    return folder.parent.parent / STORE_FILE


def artifacts_of(
    record: Mapping[str, Any], run_folder: Path, artifact_dir: Path | None = None
) -> dict[str, Path]:
    """Stage -> folder of the artefacts that a run recorded, where they lie now.

    Args:
        record: The run's ``run.json``.
        run_folder: Where it lies.
        artifact_dir: Where to look for artefacts that lie neither there nor around the run.

    Raises:
        ValueError: If they are no paths.
        GaCLLMError: If one holds symbolic links.
    """
    recorded = record.get("artifacts") or {}
    if not isinstance(recorded, dict) or not all(isinstance(p, str) for p in recorded.values()):
        raise ValueError(f"the run.json of {run_folder} names no paths in its 'artifacts'.")
    folders = {stage: find(path, run_folder, artifact_dir) for stage, path in recorded.items()}
    for folder in folders.values():
        require_no_links(folder)
    return folders


def find(recorded: str, run_folder: Path, artifact_dir: Path | None = None) -> Path:
    """A file or folder that a run recorded: there, or as near to ``run.json`` as it was.

    The longest end of the recorded path that exists in a folder around ``run.json``, or in
    ``artifact_dir``, is taken, so a tree that was moved or copied whole, or received, is found; if
    there is none, the path as recorded.
    """
    path = PurePath(os.path.normpath(recorded.replace("\0", "")))
    if Path(path).exists() or ".." in path.parts:
        return Path(path)
    around = [run_folder.resolve(), *run_folder.resolve().parents][:_N_PARENTS]
    around += [artifact_dir.resolve()] if artifact_dir else []
    names = path.parts[1:] if path.is_absolute() else path.parts
    for start in range(len(names)):
        for base in around:
            if (candidate := base.joinpath(*names[start:])).exists():
                return candidate
    return Path(path)

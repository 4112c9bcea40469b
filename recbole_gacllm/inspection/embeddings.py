"""Text embeddings of one layer as RecBole's files of pretrained embeddings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from recbole_gacllm.artifacts import disk, locate, manifests
from recbole_gacllm.convolution.layers import SIDES, Layer
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.inspection.reading import read_job

_CONFIG = {
    "additional_feat_suffix": ["useremb", "itememb"],
    "alias_of_user_id": ["uid"],
    "alias_of_item_id": ["iid"],
    "preload_weight": {"uid": "user_emb", "iid": "item_emb"},
}


def find_embeddings(artifact_dir: Path, dataset: str | None, run: Path | None, layer: int) -> Path:
    """The embeddings folder of a run, or the newest one of a data set that has a layer.

    Raises:
        ValueError: If there is none.
    """
    if run is not None:
        folders = locate.RunFiles.read(run, artifact_dir).artifacts()
        if "embeddings" not in folders:
            raise ValueError(f"the run of {run} had no text embeddings.")
        return folders["embeddings"]
    manifest_files = list((artifact_dir / str(dataset)).glob("embeddings-*/manifest.json"))
    with_layer = [file for file in manifest_files if (file.parent / f"layer_{layer}.npy").is_file()]
    if not with_layer:
        n = len(manifest_files)
        what = f"layer: {layer} is in none of {n}" if n else "no"
        raise ValueError(
            f"{what} text embeddings of {dataset!r} under {artifact_dir}. Run GaCLLM on it first, "
            "or give the artifact_dir of the run."
        )
    return max(with_layer, key=lambda file: file.stat().st_mtime).parent


def export_embeddings(folder: Path, layer: int, output: Path) -> list[Path]:
    """Write ``NAME.useremb``, ``NAME.itememb`` and a yaml file that loads them.

    NAME is the name of the output folder, which is made if need be, as RecBole names the files of
    a data set. Returns the files.

    Raises:
        ValueError: If there are no finished embeddings or no such layer.
        GaCLLMError: If they are damaged.
    """
    locate.require_no_links(folder)
    if manifests.read_manifest(folder) is None:
        raise ValueError(f"{folder} holds no finished embeddings; run GaCLLM first.")
    layer_files = read_job(folder, "layer_files")["layer_files"]
    if not 0 <= layer < len(layer_files):
        raise ValueError(f"layer: {layer} is not one of 0 to {len(layer_files) - 1}.")
    inputs = locate.beside(folder, Path(layer_files[0]).parent)
    tokens = Layer.read(inputs / "layer_0.parquet").tokens
    try:
        vectors = np.load(folder / f"layer_{layer}.npy", mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise GaCLLMError(
            f"the embeddings of layer {layer} in {folder} are damaged: {error}. Start the run "
            "again: they are made anew."
        ) from error
    dataset = output.resolve().name
    contents, offset = {}, 0
    for side in SIDES:
        rows = vectors[offset : offset + len(tokens[side])].astype(np.float32)
        offset += len(rows)
        columns = {  # RecBole wants the id column of these files under a name of their own
            f"{side[0]}id:token": tokens[side],
            f"{side}_emb:float_seq": [" ".join(f"{value:.6g}" for value in row) for row in rows],
        }
        table = pd.DataFrame(columns).to_csv(sep="\t", index=False, lineterminator="\n")
        contents[f"{dataset}.{side}emb"] = table
    contents[f"{dataset}-emb.yaml"] = (
        f"# Loads {dataset}.useremb and {dataset}.itememb, which must lie beside {dataset}.inter.\n"
        "# A model takes them by dataset.get_preload_weight('uid') and ('iid'). Your load_col\n"
        "# needs useremb: [uid, user_emb] and itememb: [iid, item_emb] besides.\n"
    ) + yaml.safe_dump(_CONFIG, sort_keys=False)
    output.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        disk.write_atomic(output / name, content.encode())
    return [output / name for name in contents]

"""What is said of a list's items: their names, what of their scores came whence, and why."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn import functional as F

from recbole_gacllm.alignment.embeddings import MAX_ROWS
from recbole_gacllm.artifacts import manifests
from recbole_gacllm.convolution.layers import Layer, layer_files
from recbole_gacllm.convolution.names import NAMES, item_names, read_names
from recbole_gacllm.convolution.text import read_features
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.inspection.opened import OpenRun
from recbole_gacllm.inspection.parts import ScoreParts
from recbole_gacllm.llm import weights

_N_NEAREST = 3


def names_of_items(run: OpenRun) -> np.ndarray:
    """The name of each item by RecBole's id, its token where it has none: ``[n_items]``.

    From the run's artefacts; of a model without texts, from the ``.item`` file.

    Raises:
        ValueError: If the file cannot be read.
    """
    dataset, config = run.test._dataset, run.config
    tokens = dataset.field2id_token[dataset.iid_field].tolist()
    folders = run.files.artifacts()
    if "inputs" in folders:
        names = read_names(folders["inputs"], folders.get(NAMES))
    else:
        file = Path(config["data_path"]) / f"{config['dataset']}.item"
        reading = (config["field_separator"], config["encoding"], config["seq_separator"])
        features = None
        if file.is_file():
            features = read_features(file, dataset.iid_field, *reading, frozenset(tokens))
        names = item_names(tokens[1:], features, config["text_item_name_field"])
    return np.array([names.get(token, token) for token in tokens], dtype=object)


def intent_scores(run: OpenRun, sentence: str) -> Tensor:
    """Cosine of a sentence with each item's raw text, standardised over the items: ``[n_items]``.

    The sentence is encoded as the run's texts were: same encoder, checked by its fingerprint, same
    prompt. An item without text has 0, as padding.

    Raises:
        ValueError: If the run has no texts, or the sentence is empty.
        GaCLLMError: If its encoder has changed since.
    """
    texts, config = getattr(run.model, "texts", None), run.config
    if texts is None:
        raise ValueError(
            f"--intent: this run of {config['model']} has no texts of items; GaCLLM (with "
            "use_text: True) and TextKNN have."
        )
    if not sentence.strip():
        raise ValueError("--intent: the sentence is empty.")
    from recbole_gacllm.alignment.encoder import TextEncoder  # its import takes seconds

    folder = weights.resolve_encoder(config["encoder_model"])
    manifest = manifests.read_manifest(run.files.artifacts()["embeddings"]) or {}
    if manifest.get("key", {}).get("encoder") != weights.fingerprint(folder):
        raise GaCLLMError(
            f"--intent: encoder_model {config['encoder_model']!r} is not, or no longer, the "
            "encoder of the run's texts. Put that one in its place, or start the run again."
        )
    keys = config["encoder_dtype"], 1
    encoder = TextEncoder(folder, *keys, prompt=config["encoder_prompt"])
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "intent.npy"
        encoder.encode_to_file([sentence], file)
        vector = torch.from_numpy(np.load(file)[0]).float().to(run.model.device)
    nodes = run.model.n_users + torch.arange(run.model.n_items, device=run.model.device)
    rows = [texts.rows((0,), block) for block in nodes.split(MAX_ROWS)]
    scores = torch.cat([block @ vector for block in rows])
    has_text = torch.cat([block.any(dim=1) for block in rows])
    result = torch.zeros_like(scores)
    deviation, mean = torch.std_mean(scores[has_text])
    result[has_text] = (scores[has_text] - mean) / deviation.clamp(min=1e-12)
    return result


class Explained:
    """What of a run explains its lists.

    - ``description``: of the user, from the run's last layer of texts; empty for others.
    - ``because``: names of up to three items of what the model knows of the user that are nearest
      to the item: by the weights of the linear model; without one by the cosine of their centred
      raw texts; without texts by that of their embeddings.
    """

    def __init__(self, run: OpenRun, parts: ScoreParts | None) -> None:
        model = run.model
        self._model, self._linear = model, getattr(model, "linear", None)
        self._rows = torch.empty(0)  # [n_items, width], unit length
        if self._linear is None and model.texts is not None:
            nodes = model.n_users + torch.arange(model.n_items, device=model.device)
            texts = model.texts.rows((0,), nodes)
            has_text = texts.any(dim=1, keepdim=True)
            centred = (texts - texts.sum(0) / has_text.sum().clamp(min=1)) * has_text
            self._rows = F.normalize(centred, dim=1)
        elif self._linear is None:
            assert parts is not None
            self._rows = F.normalize(parts.item_embeddings(), dim=1)
        self.descriptions: dict[str, str] = {}
        folders = run.files.artifacts()
        if model.texts is not None:
            files = layer_files(folders.get("descriptions", folders["inputs"]))
            layer = Layer.read(files[-1])
            self.descriptions = dict(zip(layer.tokens["user"], layer.texts["user"], strict=True))

    def nearest(self, history: np.ndarray, items: np.ndarray) -> list[np.ndarray]:
        """Items of a history that are nearest to each item of a list, the nearest first.

        Shapes:
            history: ``[H]``; items: ``[k]``; result: k arrays of ids, at most three each.
        """
        if not len(history):
            return [history] * len(items)
        if self._linear is not None:
            n = self._model.n_items
            ones = np.ones(len(history), np.float32)
            alone = sparse.csr_array((ones, (np.arange(len(history)), history)), (len(history), n))
            near = self._linear.scores_of(alone)[:, items]  # [H, k]
        else:
            near = self._rows[history] @ self._rows[items].T
        values, places = near.topk(min(_N_NEAREST, len(history)), dim=0)
        return [
            history[place[value > 0].cpu().numpy()]
            for value, place in zip(values.T, places.T, strict=True)
        ]

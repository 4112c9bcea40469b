r"""CEASE: EASE whose item-item weights explain interactions and item texts at once, closed form.

.. math:: B = I - P\,\mathrm{diag}(P)^{-1}, \quad
    P = (R^T R + \gamma \bar g X X^T + \lambda I)^{-1}, \quad s(u, \cdot) = R_u B

Each dimension of the items' text embeddings ``X`` is one more row to reconstruct, as if a user;
``gamma`` is ``text_weight``, ``lambda`` is ``reg_weight``. With ``gamma = 0`` it is EASE.

Source: Jeunen, Van Balen, Goethals, "Closed-Form Models for Collaborative Filtering with
Side-Information" (RecSys 2020), the collective model; EASE: Steck (WWW 2019). Departures: side
information is text embeddings, not tags, so ``X`` is centred and scaled to rows of mean square
length 1; ``g`` is the mean number of an item's interactions, so that ``gamma`` means the same for
any encoder and any data set. Of more than 20,000 items ``B`` is nearly so (``objective/local.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from recbole.data.dataset import Dataset
from recbole.utils import InputType
from torch import Tensor

from recbole_gacllm.objective.linear import ItemItemModel
from recbole_gacllm.peers.texts import read_texts
from recbole_gacllm.pipeline import TextsOf
from recbole_gacllm.text_knn import ClosedForm


class CEASE(ClosedForm):
    """Collective EASE; see the module. Users have no text here: they are their interactions.

    Raises:
        ValueError: If ``reg_weight`` is 0: nothing says what items without interactions weigh.
    """

    input_type = InputType.POINTWISE

    def __init__(self, config: Any, dataset: Dataset, texts_of: TextsOf | None = None) -> None:
        super().__init__(config, dataset)
        if config["reg_weight"] <= 0:
            raise ValueError(f"reg_weight: {config['reg_weight']} is not allowed; it is above 0.")
        self.texts, layers, data = read_texts(config, dataset, texts_of)
        nodes = torch.arange(self.n_users, self.n_users + self.n_items, device=self.device)
        weight = config["text_weight"]
        self.linear = ItemItemModel(
            data.graph.users + 1,
            data.graph.items + 1,
            self.n_users,
            self.n_items,
            config["reg_weight"],
            self.texts.rows(layers, nodes) if weight > 0 else None,
            weight,
            self.device,
            user_power=0.0,
            denoising=0.0,
        )

    def scores(self, users: Tensor) -> Tensor:  # noqa: D102
        return self.linear.scores(users)

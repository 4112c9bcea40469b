"""TextKNN: what the items' raw texts alone recommend, as a RecBole model without training.

A baseline for items that nobody has interacted with yet; models of interactions know nothing of
them. It takes the keys of GaCLLM, and of its stages only layer 0 and the encoder run.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import GeneralRecommender
from recbole.utils import InputType, ModelType
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_gacllm.config import GaCLLMConfig
from recbole_gacllm.inputs import TrainingData
from recbole_gacllm.objective.linear import TextNeighbors, centred
from recbole_gacllm.pipeline import TextsOf, prepare


class ClosedForm(GeneralRecommender):  # type: ignore[misc]
    """A model without training, whose :meth:`scores` of a user are made for all items at once."""

    type = ModelType.TRADITIONAL  # RecBole's trainer ends after one epoch

    def __init__(self, config: Any, dataset: Dataset) -> None:
        super().__init__(config, dataset)
        self.fake_loss = nn.Parameter(torch.zeros(1))  # RecBole's optimiser needs one

    def scores(self, users: Tensor) -> Tensor:
        """Scores of users with every item. Shapes: ``[B]`` to ``[B, n_items]``."""
        raise NotImplementedError

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """Nothing to train: zero."""
        return self.fake_loss.sum() * 0

    def predict(self, interaction: Interaction) -> Tensor:
        """Scores of user-item pairs: ``[B]``."""
        user, item = interaction[self.USER_ID], interaction[self.ITEM_ID]
        distinct, place = torch.unique(user, return_inverse=True)
        return self.scores(distinct)[place, item]

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Scores of users with every item: ``[B * n_items]``, a fresh tensor."""
        return self.scores(interaction[self.USER_ID]).view(-1)


class TextKNN(ClosedForm):
    """Sum over a user's training items of the cosine of text embeddings; see ``linear.py``.

    The embeddings are centred first, which makes it better by far: what all texts share says
    nothing. Constructed as :class:`.GaCLLM` is.
    """

    input_type = InputType.PAIRWISE

    def __init__(self, config: Any, dataset: Dataset, texts_of: TextsOf | None = None) -> None:
        super().__init__(config, dataset)
        options = GaCLLMConfig.from_mapping(config.final_config_dict)
        options = dataclasses.replace(options, text_source="raw")
        data = TrainingData.from_recbole(config, dataset)
        self.texts = (texts_of or prepare)(options, data).to(self.device)
        nodes = torch.arange(self.n_users, self.n_users + self.n_items, device=self.device)
        texts = torch.from_numpy(centred(self.texts.rows((0,), nodes).double().cpu().numpy()))
        texts = F.normalize(texts.float(), dim=1).to(self.device)
        self.neighbors = TextNeighbors(
            data.graph.users + 1, data.graph.items + 1, self.n_users, texts
        )

    def scores(self, users: Tensor) -> Tensor:  # noqa: D102
        return self.neighbors.scores(users)

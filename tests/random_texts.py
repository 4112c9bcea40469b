"""Random text embeddings in the place of the stages, for tests of what comes after them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from recbole_gacllm.alignment.embeddings import TextLayers
from recbole_gacllm.inputs import TrainingData


def random_texts(_options: Any, data: TrainingData) -> TextLayers:
    """Two layers of width 12, the same for the same number of users and items."""
    n_users, n_items = len(data.graph.user_tokens), len(data.graph.item_tokens)
    rng = np.random.default_rng(3)
    shape = (n_users + n_items, 12)
    tables = [torch.tensor(rng.standard_normal(shape), dtype=torch.float16) for _ in range(2)]
    rows = [-1, *range(n_users), -1, *range(n_users, n_users + n_items)]
    return TextLayers(tables, torch.tensor(rows), {})

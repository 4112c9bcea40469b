"""What a model that only reads texts needs of the hook: one layer of embeddings of all nodes.

GaCLLM and TextKNN ask the same hook, ``(texts_of or prepare)(options, data)``, with their own
choice of layers.
"""

from __future__ import annotations

import logging
from typing import Any

from recbole_gacllm.alignment.embeddings import TextLayers
from recbole_gacllm.config import GaCLLMConfig
from recbole_gacllm.inputs import TrainingData
from recbole_gacllm.pipeline import TextsOf, prepare

logger = logging.getLogger(__name__)


def read_texts(
    config: Any, dataset: Any, texts_of: TextsOf | None = None
) -> tuple[TextLayers, tuple[int], TrainingData]:
    """Text embeddings on the model's device, the layer that ``text_layers`` names, training edges.

    ``auto`` and ``hops`` are the last layer. Users are as ``text_users`` says; where all of them
    have one and the same text, nothing is known of any, and they get the means of their items.

    Args:
        config: RecBole's configuration, with the keys of the hook.
        dataset: RecBole's training split.
        texts_of: Gives the text embeddings; None runs the stages, or reuses what they made.

    Raises:
        ValueError: If there is no such layer; and as :func:`.pipeline.prepare`.
        GaCLLMError: A stage failed; what it finished is kept.
    """
    options = GaCLLMConfig.of_hook(config.final_config_dict)
    data = TrainingData.from_recbole(config, dataset)
    texts = (texts_of or prepare)(options, data)
    layer = options.text_layers if isinstance(options.text_layers, int) else len(texts) - 1
    if layer >= len(texts):
        raise ValueError(
            f"text_layers: {layer} is not allowed; these texts have the layers 0 to "
            f"{len(texts) - 1}. Choose one of them, or auto, the last."
        )
    users = texts.tables[layer][texts.row_of_node[1 : len(data.graph.user_tokens) + 1]]
    if options.text_users == "own" and bool((users == users[:1]).all()):
        logger.warning(
            "text_users: own, but all users have the same text in layer %d, so each gets the mean "
            "of the training items' (text_users: item_mean)",
            layer,
        )
        texts = texts.with_users_as_item_means(data.graph)
    return texts.to(config["device"]), (layer,), data

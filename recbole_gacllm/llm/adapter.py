"""Where a LoRA adapter sits: the linear layers of a language model, in memory and on disk.

The names of weights on disk are not always those in memory: transformers renames the parts of
multimodal models and stacks the experts of mixtures when it loads them. So the names are those of
the model itself, made without weights, and transformers' own rules say which file entry is which.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from recbole_gacllm.llm.formats import check_safetensors, read_object, weight_files

# Numbers that a merged weight can be stored in; others are quantised, and have scales elsewhere.
_PLAIN: Final = ("F16", "BF16", "F32")
PREFIX: Final = "base_model.model."  # peft's, before the name of each layer


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer of a language model."""

    shape: tuple[int, int]  # outputs, inputs
    on_disk: str | None  # name of its weight in the files; None if it is stored in another form
    transposed: bool  # its weight is inputs by outputs, as GPT-2's


def model_without_weights(model_dir: Path) -> Any:
    """The causal language model of a folder, on the ``meta`` device.

    Raises:
        ValueError: If transformers knows no such model.
    """
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(
            f"{model_dir} is of the type {config.model_type!r}, which transformers "
            f"{transformers.__version__} does not load as a causal language model, so it cannot "
            "be fine-tuned or take an adapter. Set sft: False and llm_adapter: null, or take "
            "another llm_model."
        ) from error


def linear_layers(model_dir: Path) -> dict[str, LinearLayer]:
    """The linear layers that an adapter may sit on, by their names in memory.

    Those of the language model itself: not its head, which vLLM serves no adapter of, and not the
    parts that read images or sound, which texts alone do not train. Experts that are stacked into
    one tensor are no linear layers.

    Raises:
        ValueError: As :func:`model_without_weights`.
    """
    model = model_without_weights(model_dir)
    on_disk = _names_on_disk(model, model_dir)
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    layers = {}
    for name, module in model.named_modules():
        if id(module) not in inside or not isinstance(module, nn.Linear | Conv1D):
            continue
        transposed = isinstance(module, Conv1D)
        rows, columns = module.weight.shape
        shape = (columns, rows) if transposed else (rows, columns)
        layers[name] = LinearLayer(shape, on_disk.get(f"{name}.weight"), transposed)
    return layers


def check_adapter(model_dir: Path, adapter_dir: Path) -> None:
    """Compare a LoRA adapter with the model it shall sit on, by names and shapes only.

    Raises:
        ValueError: If a file is missing, the adapter is more than LoRA matrices of linear layers,
            or one of these has no partner of its shape.
        WeightsError: If a weight file is damaged.
    """
    check_safetensors(model_dir)
    check_safetensors(adapter_dir)
    file, config_file = (
        adapter_dir / name for name in ("adapter_model.safetensors", "adapter_config.json")
    )
    if not file.is_file() or not config_file.is_file():
        raise ValueError(
            f"{adapter_dir} is no adapter: adapter_model.safetensors and adapter_config.json are "
            "needed (peft's format). Train one with sft: True."
        )
    kind = read_object(config_file).get("peft_type")
    if kind != "LORA":
        raise ValueError(
            f"The adapter {adapter_dir} is of peft's type {kind!r}; only LORA is served. "
            + _MERGE_BY_HAND
        )
    layers = linear_layers(model_dir)
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            module, lora, part = name.removeprefix(PREFIX).partition(".lora_")
            layer = layers.get(module)
            if not lora or module.rsplit(".", 1)[-1] in ("lm_head", "embed_tokens"):
                raise ValueError(
                    f"The adapter {adapter_dir} holds {name}: besides LoRA matrices of linear "
                    "layers it changes the head, the embeddings or whole modules (modules_to_save, "
                    "lm_head, embed_tokens, bias), which vLLM does not serve. " + _MERGE_BY_HAND
                )
            shape = tensors.get_slice(name).get_shape()
            axis = 1 if part.startswith("A") else 0  # A is [rank, in], B is [out, rank]
            if layer is None or len(shape) < axis + 1 or shape[axis] != layer.shape[axis]:
                there = list(layer.shape) if layer else "no linear layer of that name"
                raise ValueError(
                    f"The adapter {adapter_dir} does not fit the model {model_dir}: {name} has "
                    f"shape {shape}, the model's {module} has {there}. Use the model it was "
                    "trained on, or train again with sft: True."
                )


_MERGE_BY_HAND: Final = (
    "Merge it with peft (PeftModel.from_pretrained(…).merge_and_unload().save_pretrained(FOLDER)) "
    "and set llm_model: FOLDER, or set llm_adapter: null and train one with sft: True."
)


def _names_on_disk(model: Any, model_dir: Path) -> dict[str, str]:
    """File entries that are loaded as they are: the name in memory of each, and that on disk."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    in_memory = model.state_dict()
    names = {}
    for shard in weight_files(model_dir):
        with safe_open(shard, framework="pt") as tensors:
            for on_disk in tensors.keys():  # noqa: SIM118
                name, converter = rename_source_key(
                    on_disk, renamings, converters, model.base_model_prefix, in_memory
                )
                if converter is None and tensors.get_slice(on_disk).get_dtype() in _PLAIN:
                    names[name] = on_disk
    return names

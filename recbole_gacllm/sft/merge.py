"""A LoRA adapter put into the weights of its model, one matrix at a time."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from recbole_gacllm.artifacts.disk import whole_folder
from recbole_gacllm.artifacts.manifests import MANIFEST_FILE
from recbole_gacllm.llm.adapter import PREFIX, LinearLayer, linear_layers
from recbole_gacllm.llm.formats import weight_files

# Files that go with a model's weights: configuration, tokenizer, chat template, licence.
_COMPANIONS = (".json", ".txt", ".model", ".jinja", ".md", "")


def merge(model_dir: Path, adapter_dir: Path, out_dir: Path) -> None:
    """Write the base model with the adapter merged into its weights, as a plain model folder.

    ``W + scale * B @ A`` in float32, stored in the number type of ``W``. Weight files keep their
    names and all other entries, and are written one after the other, so that a model needs the
    memory of its largest file, not of its weights in float32. Everything else is the base's own.
    ``out_dir`` appears complete or not at all. That the adapter fits is checked before
    (:func:`.adapter.check_adapter`).

    Raises:
        ValueError: If a weight is not stored as a plain matrix, or a merged one is not finite.
    """
    config = LoraConfig.from_pretrained(adapter_dir)
    parts: dict[str, dict[str, Tensor]] = {}  # of the adapter, by the layer each belongs to
    for name, tensor in load_file(adapter_dir / "adapter_model.safetensors").items():
        layer = name.removeprefix(PREFIX).partition(".lora_")[0]
        parts.setdefault(layer, {})[name.removeprefix(PREFIX)] = tensor
    layers = linear_layers(model_dir)
    if odd := [name for name in parts if layers[name].on_disk is None]:
        raise ValueError(
            f"llm_merge_adapter: {odd[0]} of {model_dir} is not stored as a plain matrix of "
            "float32, bfloat16 or float16 (quantised?), so nothing can be merged into it. Take the "
            "model without quantisation, or set llm_merge_adapter: False."
        )
    in_memory = {layers[name].on_disk: name for name in parts}
    with whole_folder(out_dir) as folder:
        for shard in weight_files(model_dir):
            with safe_open(shard, framework="pt") as tensors:
                merged = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
                for on_disk in merged.keys() & in_memory.keys():
                    name = in_memory[on_disk]
                    merged[on_disk] = _merged(name, merged[on_disk], layers[name], config, parts)
                save_file(merged, folder / shard.name, metadata=tensors.metadata())
        for file in model_dir.iterdir():
            if file.is_file() and file.suffix in _COMPANIONS and file.name != MANIFEST_FILE:
                shutil.copyfile(file, folder / file.name)


@torch.no_grad()
def _merged(
    name: str,
    weight: Tensor,
    layer: LinearLayer,
    config: LoraConfig,
    parts: dict[str, dict[str, Tensor]],
) -> Tensor:
    """A weight with its part of the adapter, by peft itself: in a model of this layer alone."""
    n_out, n_in = layer.shape
    with torch.device("meta"):
        module: Any = (
            Conv1D(n_out, n_in) if layer.transposed else nn.Linear(n_in, n_out, bias=False)
        )
    module.weight = nn.Parameter(weight.float(), requires_grad=False)
    model: Any = nn.Module()
    parent, (*path, leaf) = model, name.split(".")
    for step in path:
        parent.add_module(step, nn.Module())
        parent = parent.get_submodule(step)
    parent.add_module(leaf, module)
    alone = replace(
        config,
        r=config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r),
        lora_alpha=config.alpha_pattern.get(
            get_pattern_key(config.alpha_pattern, name), config.lora_alpha
        ),
        rank_pattern={},
        alpha_pattern={},
        target_modules=[name],
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        fan_in_fan_out=layer.transposed,
    )
    inject_adapter_in_model(alone, model)
    set_peft_model_state_dict(model, parts[name])
    adapted = model.get_submodule(name)
    adapted.merge(safe_merge=True)
    return adapted.get_base_layer().weight.data.to(weight.dtype)  # type: ignore[no-any-return]

"""Configuration: finds the shipped yaml files, layers them, validates them once, at the door.

Defaults live in ``properties/model/GaCLLM.yaml`` alone. RecBole merges the layers (model defaults,
preset, dataset config, the user's files, dictionary and command line); :class:`GaCLLMConfig` is the
frozen, checked view of our keys in the result.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from recbole_gacllm.redaction import api_key, redact

MODEL = "GaCLLM"
#: Our models and their modules; both take the keys of ``GaCLLM.yaml``.
MODELS = {MODEL: "recbole_gacllm.model", "TextKNN": "recbole_gacllm.text_knn"}
OUR_PREFIXES = ("llm_", "sft_", "encoder_", "align_", "text_", "neighbor_", "ssm_", "linear_")

#: Keys of ours that hold for any model; see ``splits.py``.
SPLIT_KEYS = ("train_share", "cold_item_share")


def shipped_path(*parts: str) -> Path:
    """Path of a shipped file or folder, in a checkout or in an installed wheel.

    Args:
        parts: For example ``"properties", "model", "GaCLLM.yaml"``.
    """
    package = Path(__file__).resolve().parent
    root = package if (package / "properties").is_dir() else package.parent
    return root.joinpath(*parts)


def _load_yaml(path: Path) -> dict[str, Any]:
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    return dict(loaded or {})


def preset_names() -> list[str]:
    """Names that ``--preset`` takes."""
    return sorted(path.stem for path in shipped_path("properties", "presets").glob("*.yaml"))


def model_defaults(preset: str | None = None) -> dict[str, Any]:
    """All keys of ``GaCLLM.yaml``, overridden by a preset.

    Args:
        preset: Name of a preset; None takes the one that ``GaCLLM.yaml`` names.

    Raises:
        ValueError: If there is no such preset.
    """
    defaults = _load_yaml(shipped_path("properties", "model", "GaCLLM.yaml"))
    name = defaults["preset"] if preset is None else preset
    if name not in preset_names():
        raise ValueError(f"preset: {name!r} is not one of {', '.join(preset_names())}.")
    defaults.update(_load_yaml(shipped_path("properties", "presets", f"{name}.yaml")))
    defaults["preset"] = name
    return defaults


def dataset_defaults(dataset: str) -> dict[str, Any]:
    """The shipped dataset config of a data set; empty if we ship none for it."""
    path = shipped_path("dataset_configs", f"{dataset}.yaml")
    return _load_yaml(path) if path.is_file() else {}


def check_keys(external: Mapping[str, Any], others: Collection[str] = ()) -> None:
    """Refuse a key that has one of our prefixes, or is nearly one of ours, and is none of ours.

    Args:
        external: What the user gave: files, dictionary and command line.
        others: Keys that RecBole knows; they pass however near they are.

    Raises:
        ValueError: Names the key and the nearest known ones.
    """
    known = [f.name for f in dataclasses.fields(GaCLLMConfig)]
    for key in external:
        if key in known or key in others:
            continue
        if key.startswith(OUR_PREFIXES) or difflib.get_close_matches(key, known, cutoff=0.9):
            near = difflib.get_close_matches(key, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "it has no near match."
            raise ValueError(
                f"unknown key {key!r}: {hint} All keys stand in docs/config.md and in "
                f"{shipped_path('properties', 'model', 'GaCLLM.yaml')}."
            )


def literal(text: str) -> Any:
    """What a Python literal stands for: numbers, strings, lists, tuples, dicts, None, True, False.

    Nothing is evaluated, so text of any origin may be given.

    Raises:
        ValueError: If it is anything else.
    """
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"{text!r} is not a literal value.") from error


_Check = Callable[[Any], str | None]


def _one_of(*allowed: str) -> _Check:
    return lambda v: None if v in allowed else f"allowed: {', '.join(allowed)}"


def _at_least(low: float) -> _Check:
    return lambda v: None if v >= low else f"allowed: {low} or more"


def _above(low: float) -> _Check:
    return lambda v: None if v > low else f"allowed: above {low}"


def _from_to(low: float, high: float) -> _Check:
    """Half-open: ``low <= v < high``."""
    return lambda v: None if low <= v < high else f"allowed: from {low} to below {high}"


def _share(v: float) -> str | None:
    return None if 0 < v <= 1 else "allowed: above 0, at most 1"


def _not_empty(v: Any) -> str | None:
    return None if v else "allowed: anything but empty"


def _base_urls(v: str | list[str]) -> str | None:
    urls = [v] if isinstance(v, str) else v
    # A user name or password in an address would end up in manifests.
    good = [isinstance(u, str) and re.match(r"https?://[^/@]+(/[^@?#]*)?$", u) for u in urls]
    return None if urls and all(good) else "allowed: addresses such as http://host:8000/v1"


def _dict_of_dicts(v: dict[str, Any]) -> str | None:
    good = all(isinstance(words, dict) for words in v.values())
    return None if good else "allowed: {field: {value: words}}"


def _variable_name(v: str) -> str | None:
    return None if v.isidentifier() else "allowed: the name of an environment variable"


def _key(check: _Check | None = None) -> Any:
    return field(metadata={"check": check})


@dataclass(frozen=True)
class GaCLLMConfig:
    """Our keys, checked. Meanings, types and defaults: ``properties/model/GaCLLM.yaml``."""

    preset: str = _key()
    embedding_size: int = _key(_at_least(1))
    n_layers: int = _key(_at_least(0))
    propagate_every: int = _key(_at_least(1))
    reg_weight: float = _key(_at_least(0))
    require_pow: bool = _key()
    loss_type: str = _key(_one_of("BPR", "SSM"))
    ssm_n_negatives: int = _key(_at_least(1))
    ssm_temperature: float = _key(_at_least(0.025))
    linear_weight: float = _key(_at_least(0))
    linear_reg_weight: float | None = _key(_above(0))
    linear_text_weight: float = _key(_at_least(0))
    linear_recency: float = _key(_at_least(0))
    use_text: bool = _key()
    text_source: str = _key(_one_of("generated", "raw", "item_mean", "shuffled"))
    text_hidden_size: int = _key(_at_least(0))
    text_dropout: float = _key(_from_to(0, 1))
    text_weight: float = _key(_at_least(0))
    align_weight: float = _key(_at_least(0))
    align_n_nodes: int | None = _key(_at_least(2))
    align_temperature: float = _key(_at_least(0.025))
    text_user_template: str | None = _key(_not_empty)
    text_item_template: str | None = _key(_not_empty)
    text_user_noun: str = _key(_not_empty)
    text_item_noun: str = _key(_not_empty)
    text_value_names: dict[str, dict[str, str]] | None = _key(_dict_of_dicts)
    text_item_name_field: str | None = _key(_not_empty)
    text_max_chars: int = _key(_at_least(16))
    text_allow_ids: bool = _key()
    text_import_file: str | None = _key(_not_empty)
    neighbor_rule: str = _key(_one_of("random", "recent", "rare_first"))
    n_neighbors: int = _key(_at_least(1))
    llm_model: str = _key(_not_empty)
    llm_backend: str = _key(_one_of("auto", "vllm", "transformers", "server"))
    llm_endpoints: str | list[str] | None = _key(_base_urls)
    llm_endpoint_concurrency: int = _key(_at_least(1))
    llm_served_model: str | None = _key(_not_empty)
    llm_api_key_variable: str = _key(_variable_name)
    llm_n_layers: int = _key(_at_least(0))
    llm_max_prompt_tokens: int = _key(_at_least(64))
    llm_max_neighbor_tokens: int = _key(_at_least(4))
    llm_max_new_tokens: int = _key(_at_least(4))
    llm_temperature: float = _key(_at_least(0))
    llm_repetition_penalty: float = _key(_above(0))
    llm_dtype: str = _key(_one_of("auto", "bfloat16", "float16", "float32"))
    llm_adapter: str | None = _key(_not_empty)
    llm_merge_adapter: bool = _key()
    llm_prompts_dir: str | None = _key(_not_empty)
    llm_tensor_parallel_size: int = _key(_at_least(1))
    llm_pipeline_parallel_size: int = _key(_at_least(1))
    llm_gpu_memory_utilization: float | None = _key(_share)
    sft: bool = _key()
    sft_n_pairs: int = _key(_at_least(1))
    sft_n_heldout: int = _key(_at_least(1))
    sft_epochs: int = _key(_at_least(1))
    sft_batch_size: int = _key(_at_least(1))
    sft_accumulation_steps: int = _key(_at_least(1))
    sft_learning_rate: float = _key(_above(0))
    sft_lora_rank: int = _key(_at_least(1))
    sft_lora_alpha: int = _key(_at_least(1))
    sft_lora_dropout: float = _key(_from_to(0, 1))
    sft_target_modules: str | list[str] = _key(_not_empty)
    sft_checkpoint_steps: int = _key(_at_least(1))
    sft_max_tokens: int = _key(_at_least(32))
    encoder_model: str = _key(_not_empty)
    encoder_prompt: str | None = _key()
    encoder_batch_size: int = _key(_at_least(1))
    encoder_dtype: str = _key(_one_of("auto", "bfloat16", "float16", "float32"))
    train_share: float = _key(_share)
    cold_item_share: float = _key(_from_to(0, 0.5))
    fast_paths: bool = _key()
    artifact_dir: str = _key(_not_empty)

    def __post_init__(self) -> None:
        if self.llm_backend == "server":
            api_key(self.llm_api_key_variable)  # a broken one is told before any stage
        if (self.llm_backend == "server") != (self.llm_endpoints is not None):
            raise ValueError(
                f"llm_endpoints: {self.llm_endpoints!r} does not go with llm_backend: "
                f"{self.llm_backend!r}. The addresses of servers and llm_backend: server are given "
                "together, such as --llm_backend=server --llm_endpoints=http://host:8000/v1."
            )
        named = self.llm_served_model or self.llm_merge_adapter
        if self.llm_backend == "server" and (self.sft or self.llm_adapter) and not named:
            raise ValueError(
                "llm_served_model: null does not go with llm_backend: server and "
                "llm_merge_adapter: False. Name the adapter as the servers do "
                "(vllm serve … --enable-lora --lora-modules NAME=FOLDER)."
            )
        if self.use_text and self.is_described and self.llm_n_layers > self.n_layers:
            raise ValueError(
                f"llm_n_layers: {self.llm_n_layers} is above n_layers: {self.n_layers}. Text "
                "of hop l is fused with the embedding of hop l, so there must be as many hops of "
                "graph convolution: raise n_layers or lower llm_n_layers."
            )

    @property
    def is_described(self) -> bool:
        """Whether texts beyond the raw ones are wanted: an LLM or an import writes them."""
        return self.text_source in ("generated", "shuffled") and self.llm_n_layers > 0

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> GaCLLMConfig:
        """Check our keys of a merged configuration.

        Args:
            mapping: RecBole's ``config.final_config_dict`` or any mapping that holds all our keys.

        Raises:
            ValueError: Names the key, the value found and what is allowed.
        """
        for f in dataclasses.fields(cls):
            if f.name not in mapping:
                raise ValueError(
                    f"key {f.name!r} is missing. Build the configuration with RecBole's "
                    'Config(model="GaCLLM", …) after `import recbole_gacllm`: it has all defaults.'
                )
        keys = (f.name for f in dataclasses.fields(cls))
        return cls(**{key: checked(key, mapping[key]) for key in keys})


@functools.cache
def _fields() -> dict[str, tuple[Any, _Check | None]]:
    hints = typing.get_type_hints(GaCLLMConfig)
    fields = dataclasses.fields(GaCLLMConfig)
    return {f.name: (hints[f.name], f.metadata["check"]) for f in fields}


def checked(key: str, value: Any) -> Any:
    """The value of one of our keys, of its type.

    Raises:
        ValueError: Names the key, the value found and what is allowed.
    """
    hint, check = _fields()[key]
    value = _convert(key, value, hint)
    problem = check and value is not None and check(value)
    if problem:
        raise ValueError(f"{key}: {_shown(key, value)} is not allowed; {problem}.")
    return value


def _convert(key: str, value: Any, hint: Any) -> Any:
    """Check the type of a value; an int passes as float, nothing else is converted."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if origin is int and isinstance(value, bool):
            continue
        if isinstance(value, origin):
            return value
    names = " or ".join(
        "null" if o is types.NoneType else str(getattr(o, "__name__", o)) for o in options
    )
    found = f"{_shown(key, value)} is a {type(value).__name__}"
    raise ValueError(f"{key}: {found}; it must be {names}.")


def _shown(key: str, value: Any) -> str:
    """A value in an error; where a name belongs, the key itself may stand by mistake."""
    return "what it holds" if key == "llm_api_key_variable" else redact(repr(value))

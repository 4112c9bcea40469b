"""Configuration: finds the shipped yaml files, layers them, validates them once, at the door.

Defaults live in ``properties/model/GaCLLM.yaml`` alone. RecBole merges the layers (model defaults,
preset, dataset config, the user's files, dictionary and command line); :class:`GaCLLMConfig` is the
frozen, checked view of our keys in the result.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from recbole_gacllm.literals import parse_yaml
from recbole_gacllm.redaction import api_key, redact

MODEL = "GaCLLM"
#: Models of other papers on the texts of our hook: its keys, and those of ``NAME.yaml``.
PEERS = {
    "AlphaRec": "recbole_gacllm.peers.alpharec",
    "CEASE": "recbole_gacllm.peers.cease",
    "RLMRecCon": "recbole_gacllm.peers.rlmrec",
    "RLMRecGen": "recbole_gacllm.peers.rlmrec",
}
#: Our models and their modules; the first two take all keys of ``GaCLLM.yaml``.
MODELS = {MODEL: "recbole_gacllm.model", "TextKNN": "recbole_gacllm.text_knn", **PEERS}
OUR_PREFIXES = ("llm_", "sft_", "encoder_", "align_", "text_", "neighbor_", "ssm_", "linear_")

#: Keys of ours that hold for any model; see ``splits.py``, of the last one ``history.py``.
SPLIT_KEYS = (
    *("train_share", "cold_item_share", "cold_user_share", "known_users_only"),
    "mask_history",
)


def shipped_path(*parts: str) -> Path:
    """Path of a shipped file or folder, in a checkout or in an installed wheel."""
    package = Path(__file__).resolve().parent
    root = package if (package / "properties").is_dir() else package.parent
    return root.joinpath(*parts)


def load_yaml(path: str | Path, named: str | None = None) -> dict[str, Any]:
    """The keys of a file, which an error calls by its path, or as it is ``named``.

    Raises:
        ValueError: If it is no yaml of keys.
    """
    named = named or str(path)
    try:
        content = parse_yaml(Path(path).read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{named} is not yaml in UTF-8: {error}") from error
    if content is not None and not isinstance(content, dict):
        raise ValueError(f"{named} holds no lines of the form 'key: value'.")
    return dict(content or {})


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
    defaults = load_yaml(shipped_path("properties", "model", "GaCLLM.yaml"))
    name = defaults["preset"] if preset is None else preset
    if name not in preset_names():
        raise ValueError(f"preset: {name!r} is not one of {', '.join(preset_names())}.")
    of_preset = load_yaml(shipped_path("properties", "presets", f"{name}.yaml"))
    return defaults | of_preset | {"preset": name}


def dataset_file(dataset: str, data_path: str | None = None) -> Path | None:
    """The yaml of a data set: ``data_path/NAME/NAME.yaml``, else the shipped one, if any."""
    own = [Path(data_path, dataset, f"{dataset}.yaml")] if data_path is not None else []
    files = (*own, shipped_path("dataset_configs", f"{dataset}.yaml"))
    return next((file for file in files if file.is_file()), None)


def dataset_defaults(dataset: str, data_path: str | None = None) -> dict[str, Any]:
    """What :func:`dataset_file` holds; empty if there is none.

    Raises:
        ValueError: If it is no yaml of keys.
    """
    path = dataset_file(dataset, data_path)
    return {} if path is None else load_yaml(path)


def reads_text(config: Mapping[str, Any]) -> bool:
    """Whether a run of a resolved configuration asks the preprocessing hook for texts."""
    if config["model"] == MODEL:
        return bool(config["use_text"])
    return config["model"] in MODELS or bool(config.get("text_init"))


def text_defaults(preset: str | None = None, model: str | None = None) -> dict[str, Any]:
    """The keys of :func:`model_defaults` that the hook reads; of a peer its own over them.

    Raises:
        ValueError: As :func:`model_defaults`.
    """
    defaults = model_defaults(preset)
    own = load_yaml(peer_file(model)) if model in PEERS else {}
    return {key: value for key, value in defaults.items() if key in HOOK_KEYS} | own


def peer_file(model: str) -> Path:
    """The yaml of a peer: its own keys, and where it departs from the hook's defaults."""
    return shipped_path("properties", "model", f"{model}.yaml")


def keys_of(model: str) -> set[str]:
    """Keys that one of our models reads, besides RecBole's for any model."""
    if model in PEERS:
        return {*text_defaults(model=model), *SPLIT_KEYS, "fast_paths", "n_threads"}
    return {field.name for field in dataclasses.fields(GaCLLMConfig)}


def check_keys(
    external: Mapping[str, Any], others: Collection[str] = (), model: str = MODEL
) -> None:
    """Refuse a key that has one of our prefixes, or is nearly one of ours, and is none of ours.

    Args:
        external: What the user gave: files, dictionary and command line.
        others: Keys that RecBole knows; they pass however near they are.
        model: Of ours; a peer has fewer keys than GaCLLM.

    Raises:
        ValueError: Names the key and the nearest known ones.
    """
    ours = keys_of(model)
    for key in external:
        if key in ours or key in others:
            continue
        if key.startswith(OUR_PREFIXES) or difflib.get_close_matches(key, ours, cutoff=0.9):
            near = difflib.get_close_matches(key, ours, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "it has no near match."
            raise ValueError(
                f"unknown key {key!r}: {hint} All keys stand in docs/config.md and in "
                f"{peer_file(model)}."
            )


def _base_urls(value: str | list[str]) -> str | list[str]:
    urls = [value] if isinstance(value, str) else value
    # A user name or password in an address would end up in manifests.
    if not urls or not all(re.match(r"https?://[^/@]+(/[^@?#]*)?$", url) for url in urls):
        raise ValueError("Input should be addresses such as http://host:8000/v1")
    return value


def _variable_name(value: str) -> str:
    if not value.isidentifier():
        raise ValueError("Input should be the name of an environment variable")
    return value


_Count = Annotated[int, Field(ge=1)]
_Number = Annotated[int, Field(ge=0)]
_Weight = Annotated[float, Field(ge=0)]
_Positive = Annotated[float, Field(gt=0)]
_Share = Annotated[float, Field(gt=0, le=1)]
_ColdShare = Annotated[float, Field(ge=0, lt=0.5)]
_Dropout = Annotated[float, Field(ge=0, lt=1)]
_Temperature = Annotated[float, Field(ge=0.025)]
_Text = Annotated[str, Field(min_length=1)]
_DType = Literal["auto", "bfloat16", "float16", "float32"]
_KeyOfFew = Literal[  # no stage reads these
    "n_layers", "loss_type", "ssm_temperature", "text_weight", "text_fusion", "align_weight"
]
# Strict: an int passes as float, nothing else is converted.
_CHECKS = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)


@dataclass(frozen=True, config=_CHECKS)
class GaCLLMConfig:
    """Our keys, checked. Meanings, types and defaults: ``properties/model/GaCLLM.yaml``."""

    preset: str
    embedding_size: _Count
    n_layers: _Number
    propagate_every: _Count
    reg_weight: _Weight
    require_pow: bool
    loss_type: Literal["BPR", "SSM"]
    ssm_n_negatives: _Count
    ssm_temperature: _Temperature
    linear_weight: _Weight
    linear_reg_weight: _Positive | None
    linear_text_weight: _Weight | None
    linear_recency: _Weight
    few_interactions: dict[_KeyOfFew, Any]
    use_text: bool
    text_layers: Literal["auto", "hops"] | _Number
    text_source: Literal["generated", "raw", "item_mean", "shuffled"]
    text_users: Literal["own", "item_mean"]
    text_hidden_size: _Number
    text_dropout: _Dropout
    text_weight: _Weight
    text_fusion: Literal["early", "late"]
    align_weight: _Weight
    align_n_nodes: Annotated[int, Field(ge=2)] | None
    align_temperature: _Temperature
    text_user_template: _Text | None
    text_item_template: _Text | None
    text_user_noun: _Text
    text_item_noun: _Text
    text_value_names: dict[str, dict[Any, Any]] | None
    text_item_name_field: _Text | None
    text_max_chars: Annotated[int, Field(ge=16)]
    text_allow_ids: bool
    text_init: bool
    text_init_frozen: bool
    text_init_reduction: Literal["pca", "whitened"]
    text_import_file: _Text | None
    neighbor_rule: Literal["random", "recent", "rare_first"]
    n_neighbors: _Count
    llm_model: _Text
    llm_backend: Literal["auto", "vllm", "transformers", "server"]
    llm_endpoints: Annotated[str | list[str], AfterValidator(_base_urls)] | None
    llm_endpoint_concurrency: _Count
    llm_served_model: _Text | None
    llm_api_key_variable: Annotated[str, AfterValidator(_variable_name)]
    llm_knowledge_tokens: _Number
    llm_n_layers: _Number
    llm_max_prompt_tokens: Annotated[int, Field(ge=64)]
    llm_max_neighbor_tokens: Annotated[int, Field(ge=4)]
    llm_max_new_tokens: Annotated[int, Field(ge=4)]
    llm_temperature: _Weight
    llm_repetition_penalty: _Positive
    llm_dtype: _DType
    llm_adapter: _Text | None
    llm_merge_adapter: bool
    llm_prompts_dir: _Text | None
    llm_tensor_parallel_size: _Count
    llm_pipeline_parallel_size: _Count
    llm_gpu_memory_utilization: _Share | None
    sft: bool
    sft_n_pairs: _Count
    sft_n_heldout: _Count
    sft_epochs: _Count
    sft_batch_size: _Count
    sft_accumulation_steps: _Count
    sft_learning_rate: _Positive
    sft_lora_rank: _Count
    sft_lora_alpha: _Count
    sft_lora_dropout: _Dropout
    sft_target_modules: _Text | Annotated[list[str], Field(min_length=1)]
    sft_checkpoint_steps: _Count
    sft_max_tokens: Annotated[int, Field(ge=32)]
    encoder_model: _Text
    encoder_prompt: str | None
    encoder_batch_size: _Count
    encoder_dtype: _DType
    train_share: _Share
    cold_item_share: _ColdShare
    cold_user_share: _ColdShare
    known_users_only: bool
    mask_history: bool
    fast_paths: bool
    n_threads: _Count | None
    artifact_dir: _Text

    def __post_init__(self) -> None:
        on_servers = self.llm_backend == "server"
        if on_servers:
            api_key(self.llm_api_key_variable)  # a broken one is told before any stage
        if on_servers != (self.llm_endpoints is not None):
            raise ValueError(
                f"llm_endpoints: {self.llm_endpoints!r} does not go with llm_backend: "
                f"{self.llm_backend!r}. The addresses of servers and llm_backend: server are given "
                "together, such as --llm_backend=server --llm_endpoints=http://host:8000/v1."
            )
        has_adapter = (self.sft or self.llm_adapter) and not self.llm_merge_adapter
        if on_servers and has_adapter and not self.llm_served_model:
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
        if few := self.few_interactions:  # its values are checked as any
            GaCLLMConfig.from_mapping(vars(self) | {"few_interactions": {}} | few)

    @property
    def is_described(self) -> bool:
        """Whether texts beyond the raw ones are wanted: an LLM or an import writes them."""
        return self.text_source in ("generated", "shuffled") and self.n_text_layers > 0

    @property
    def has_knowledge(self) -> bool:
        """Whether layer 1 is the knowledge step: from a node's own text alone."""
        return self.llm_knowledge_tokens > 0

    @property
    def n_text_layers(self) -> int:
        """Layers of texts above layer 0: the knowledge step, if there is one, and the L others."""
        return self.has_knowledge + self.llm_n_layers

    @classmethod
    def of_hook(cls, mapping: Mapping[str, Any]) -> GaCLLMConfig:
        """The options of a model that takes the hook's keys alone; the others are defaults.

        Raises:
            ValueError: As :meth:`from_mapping`.
        """
        keys = {key: mapping[key] for key in HOOK_KEYS if key in mapping}
        # No text is fused hop by hop, so there need not be as many hops as layers.
        return cls.from_mapping({**model_defaults(), **keys, "use_text": False})

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> GaCLLMConfig:
        """Check our keys of a merged configuration.

        Args:
            mapping: RecBole's ``config.final_config_dict`` or any mapping that holds all our keys.

        Raises:
            ValueError: Names the key, the value found and what is allowed.
        """
        keys = [f.name for f in dataclasses.fields(cls)]
        values = {key: mapping[key] for key in keys if key in mapping}
        try:
            return cls(**values)
        except ValidationError as error:
            raise ValueError(_told(error, values)) from None


#: Keys of ours that the preprocessing hook, and a model that reads its texts, takes.
HOOK_KEYS = frozenset(
    field.name
    for field in dataclasses.fields(GaCLLMConfig)
    if field.name.startswith(("text_", "neighbor_", "n_neighbors", "llm_", "sft", "encoder_"))
    or field.name in ("preset", "artifact_dir")
) - {"text_hidden_size", "text_dropout", "text_weight", "text_fusion"}  # of GaCLLM's recommender
_TYPES = typing.get_type_hints(GaCLLMConfig, include_extras=True)


def checked(key: str, value: Any) -> Any:
    """The value of one of our keys, of its type.

    Raises:
        ValueError: Names the key, the value found and what is allowed.
    """
    try:
        return TypeAdapter(_TYPES[key], config=_CHECKS).validate_python(value)
    except ValidationError as error:
        raise ValueError(_told(error, {key: value}, key)) from None


def of_any_model(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """One of our keys, :func:`checked`, in any model's configuration, which may lack it."""
    return default if (value := config[key]) is None else checked(key, value)


def _told(error: ValidationError, values: Mapping[str, Any], *path: str) -> str:
    """What is wrong, of the first key that is: its name, the value found, what is allowed."""
    problems = [((*path, *problem["loc"]), problem) for problem in error.errors()]
    place, first = problems[0]
    if not place:  # several keys that do not go together
        return str(first["ctx"]["error"])
    key = str(place[0])
    if first["type"] == "missing":
        return (
            f"key {key!r} is missing. Build the configuration with RecBole's "
            'Config(model="GaCLLM", …) after `import recbole_gacllm`: it has all defaults.'
        )
    # "Input should be a valid list", "Value error, Input should be …"; several of a union.
    allowed = dict.fromkeys(
        problem["msg"].removeprefix("Value error, ").partition(" ")[2]
        for place, problem in problems
        if place[0] == key
    )
    null = " or null" if GaCLLMConfig.__annotations__[key].endswith("None") else ""
    # Where a name belongs, the secret itself may stand by mistake.
    shown = "what it holds" if key == "llm_api_key_variable" else redact(repr(values[key]))
    return f"{key}: {shown} is not allowed; it {' or '.join(allowed)}{null}."

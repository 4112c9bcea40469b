"""Adapters on tiny random models of several families: trained, checked, merged, loaded again."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import recbole_gacllm  # noqa: F401  (hides broken torchvision before transformers is imported)
from recbole_gacllm.errors import WeightsError
from recbole_gacllm.llm.adapter import check_adapter, linear_layers
from recbole_gacllm.sft.batches import encode_pairs
from recbole_gacllm.sft.merge import merge

from .test_sft import HELDOUT, OPTIONS, PAIRS, finetune, make_model, make_tokenizer

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
}
SEES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MIXED = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}


def configs():
    """A configuration of each family."""
    t = transformers
    sees_too = {"depth": 1, "num_heads": 2, "out_hidden_size": 32, "hidden_size": 16}
    return {
        "llama": t.LlamaConfig(**TEXT, tie_word_embeddings=True),
        "qwen3": t.Qwen3Config(**TEXT),
        "gemma3": t.Gemma3Config(
            text_config={**TEXT, "model_type": "gemma3_text"},
            vision_config={**SEES, "model_type": "siglip_vision_model"},
            mm_tokens_per_image=4,
            boi_token_index=250,
            eoi_token_index=251,
            image_token_index=252,
        ),
        "qwen3_moe": t.Qwen3MoeConfig(
            **TEXT,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            decoder_sparse_step=1,
        ),
        "qwen3_5": t.Qwen3_5Config(
            text_config={**TEXT, **MIXED}, vision_config={**sees_too, "intermediate_size": 32}
        ),
    }


def make_family(folder, family):
    """A folder as published: multimodal models whole, experts one by one."""
    torch.manual_seed(0)
    config = configs()[family]
    kind = (
        transformers.AutoModelForImageTextToText
        if hasattr(config, "vision_config")
        else transformers.AutoModelForCausalLM
    )
    kind.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def tensors_of(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize(
    ("family", "layers", "renamed"),
    [
        ("llama", ATTENTION | MLP, False),
        ("qwen3", ATTENTION | MLP, False),
        ("gemma3", ATTENTION | MLP, True),
        ("qwen3_moe", ATTENTION, False),
        (
            "qwen3_5",
            ATTENTION | MLP | {f"in_proj_{part}" for part in ("qkv", "z", "a", "b")} | {"out_proj"},
            True,
        ),
    ],
)
def test_a_family_is_trained_checked_merged_and_loaded_again(tmp_path, family, layers, renamed):
    base, adapter, merged = (
        make_family(tmp_path / "base", family),
        tmp_path / "adapter",
        tmp_path / "m",
    )
    finetune(base, PAIRS[:16], HELDOUT[:2], tmp_path, replace(OPTIONS, sft_lora_dropout=0.0))
    check_adapter(base, adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    names = {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in tensors}
    assert {name.rsplit(".", 1)[-1] for name in names} == layers
    assert not [name for name in names if "vision" in name or "visual" in name]
    before = tensors_of(base)
    assert all(f"{name}.weight" in before for name in names) is not renamed

    merge(base, adapter, merged)
    after = tensors_of(merged)
    assert after.keys() == before.keys()
    assert sum(not torch.equal(before[name], after[name]) for name in before) == len(names)

    load = transformers.AutoModelForCausalLM.from_pretrained
    ids = torch.tensor([encode_pairs(base, HELDOUT, 128)[0].input_ids])
    model = load(base, dtype=torch.float32)
    plain = logits(model, ids)
    adapted = logits(peft.PeftModel.from_pretrained(model, adapter), ids)
    alone = logits(load(merged, dtype=torch.float32), ids)
    torch.testing.assert_close(alone, adapted, rtol=1e-3, atol=1e-3)
    assert (adapted - plain).abs().max() > 0.1


def random_adapter(base, folder, **options):
    """An adapter of peft's own making, with random numbers in all of its matrices."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(**{**config, **options}, task_type="CAUSAL_LM")
    )
    torch.manual_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data += 0.1 * torch.randn_like(weight)
    adapted.save_pretrained(folder)
    return folder


def merged_by_peft(base, adapter, dtype):
    """The whole model in float32, merged, and cast."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    return dict(merged.to(dtype).state_dict())


def store_as(folder, dtype, **options):
    """Store a model anew in another number type, or in several files."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, **options)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 32}},
        {"layers_to_transform": [1]},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_merging_file_by_file_gives_the_bytes_of_peft_on_the_whole_model(tmp_path, options):
    base = store_as(make_model(tmp_path / "base"), torch.bfloat16, max_shard_size="10KB")
    assert len(list(base.glob("model-*.safetensors"))) > 2
    adapter = random_adapter(base, tmp_path / "adapter", **options)
    merge(base, adapter, tmp_path / "merged")
    files = {file.name for file in base.iterdir()}
    assert {file.name for file in (tmp_path / "merged").iterdir()} == files
    before, merged = tensors_of(base), tensors_of(tmp_path / "merged")
    wanted = merged_by_peft(base, adapter, torch.bfloat16)
    assert all(torch.equal(merged[name], wanted[name]) for name in merged)
    n_changed = sum(not torch.equal(before[name], merged[name]) for name in merged)
    assert n_changed == (2 if "layers_to_transform" in options else 4)


def test_no_more_than_one_file_is_held_at_a_time(tmp_path, monkeypatch):
    base = store_as(make_model(tmp_path / "base"), torch.float32, max_shard_size="10KB")
    adapter = random_adapter(base, tmp_path / "adapter")
    held = []

    def save(tensors, file, **options):
        held.append(sum(tensor.nbytes for tensor in tensors.values()))
        save_file(tensors, file, **options)

    monkeypatch.setattr("recbole_gacllm.sft.merge.save_file", save)
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("whole")
    )
    merge(base, adapter, tmp_path / "merged")
    assert max(held) == max(tensor.nbytes for tensor in tensors_of(base).values())


def test_layers_that_store_inputs_by_outputs_are_merged_so(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=259, n_embd=32, n_layer=1, n_head=4, bos_token_id=None, eos_token_id=2
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    options = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    adapter = random_adapter(tmp_path / "base", tmp_path / "adapter", **options)
    assert linear_layers(tmp_path / "base")["transformer.h.0.attn.c_attn"].shape == (96, 32)
    merge(tmp_path / "base", adapter, tmp_path / "merged")
    wanted = merged_by_peft(tmp_path / "base", adapter, torch.float32)
    merged = tensors_of(tmp_path / "merged")
    assert all(torch.equal(merged[name], wanted[name]) for name in merged)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"modules_to_save": ["lm_head"]}, r"holds base_model\.model\.lm_head\.weight"),
        ({"target_modules": ["q_proj", "lm_head"]}, r"holds \S*lm_head\."),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"holds \S*embed_tokens\."),
        ({"bias": "lora_only", "target_modules": ["q_proj"]}, r"holds \S*q_proj\.\S*bias"),
    ],
    ids=["modules_to_save", "lm_head", "embed_tokens", "bias"],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")
def test_an_adapter_of_more_than_linear_layers_is_refused_with_what_to_do(tmp_path, options, named):
    torch.manual_seed(0)
    base = tmp_path / "base"
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT)).save_pretrained(base)
    adapter = random_adapter(base, tmp_path / "adapter", **options)
    with pytest.raises(ValueError, match=named) as error:
        check_adapter(base, adapter)
    for part in ("which vLLM does not serve", "Merge it with peft", "set llm_model: FOLDER"):
        assert part in str(error.value)
    assert "it was trained on" not in str(error.value)


def test_what_is_no_lora_adapter_or_a_damaged_one_is_refused(tmp_path):
    base = make_model(tmp_path / "base")
    adapter = random_adapter(base, tmp_path / "adapter")
    file, config_file = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(ValueError, match=r"peft's type 'IA3'; only LORA is served\. Merge it"):
        check_adapter(base, adapter)
    config_file.write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json is no JSON"):
        check_adapter(base, adapter)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=r"adapter_model\.safetensors is truncated or damaged"):
        check_adapter(base, adapter)
    file.unlink()
    with pytest.raises(ValueError, match=r"is no adapter: .*Train one with sft: True"):
        check_adapter(base, adapter)


def test_an_adapter_of_a_part_that_sees_is_refused(tmp_path):
    base = make_family(tmp_path / "base", "gemma3")
    adapter = random_adapter(base, tmp_path / "adapter", target_modules=["fc1"])
    with pytest.raises(ValueError, match=r"vision_tower\S* has no linear layer of that name"):
        check_adapter(base, adapter)


def test_quantised_weights_get_no_adapter_and_nothing_is_merged_into_them(tmp_path):
    base = make_model(tmp_path / "base")
    adapter = random_adapter(base, tmp_path / "adapter")
    tensors = load_file(base / "model.safetensors")
    for name in tensors:
        if name.endswith("q_proj.weight"):
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    check_adapter(base, adapter)  # vLLM may serve it
    with pytest.raises(ValueError, match=r"llm_merge_adapter: \S*q_proj of .* \(quantised\?\)"):
        merge(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(ValueError, match=r"sft_target_modules: \['q_proj'\] match no linear"):
        finetune(
            base, PAIRS, HELDOUT, tmp_path / "run", replace(OPTIONS, sft_target_modules="q_proj")
        )


def test_targets_are_checked_before_any_weight_is_read(tmp_path, monkeypatch):
    base = make_family(tmp_path / "base", "qwen3_moe")
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("read")
    )
    options = replace(OPTIONS, sft_target_modules=["experts"])
    with pytest.raises(ValueError, match=r"sft_target_modules: \['experts'\] match no linear"):
        finetune(base, PAIRS, HELDOUT, tmp_path / "run", options)


def test_a_model_that_transformers_cannot_load_is_named_with_its_type(tmp_path):
    config = transformers.T5Config(vocab_size=259, d_model=16, num_layers=1, num_heads=2)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"type 't5', which transformers \S+ does not load"):
        linear_layers(tmp_path)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_5"])
def test_vllm_takes_the_language_model_of_a_model_that_sees(tmp_path, family):
    pytest.importorskip("vllm")
    from recbole_gacllm.llm.vllm_engine import text_only_options

    configs()[family].save_pretrained(tmp_path)
    expected = {} if family == "llama" else {"language_model_only": True}
    assert text_only_options(tmp_path) == expected

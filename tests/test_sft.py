"""Fine-tuning on a tiny random Llama with a byte tokenizer."""

import json
import math
import os
import random
import shutil
import signal
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

import recbole_gacllm  # noqa: F401  (hides broken torchvision before transformers is imported)
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.llm.chat import ChatTokenizer
from recbole_gacllm.llm.generator import SFTPair
from recbole_gacllm.sft import finetune as sft
from recbole_gacllm.sft.batches import (
    IGNORED,
    completion_loss,
    encode_pairs,
    end_of_turn_id,
    pad_left,
    perplexity,
)
from recbole_gacllm.sft.merge import merge
from recbole_gacllm.sft.processes import finetune_on_all_cards as on_all_cards
from recbole_gacllm.sft.trainer import Progress, last_checkpoint

from .conftest import byte_tokenizer, fresh_process, our_keys

transformers = pytest.importorskip("transformers")

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPTIONS = our_keys(
    sft_epochs=2,
    sft_batch_size=4,
    sft_accumulation_steps=2,
    sft_learning_rate=0.01,
    sft_lora_rank=4,
    sft_lora_alpha=8,
    sft_lora_dropout=0.1,
    sft_target_modules="all-linear",
    sft_checkpoint_steps=2,
    sft_max_tokens=128,
    llm_dtype="float32",
)
finetune = partial(sft.finetune, seed=3)
finetune_on_all_cards = partial(on_all_cards, seed=3)


def make_tokenizer():
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(special),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[*special[1:]],
    )
    fast.chat_template = TEMPLATE
    return fast


def make_model(folder, hidden_size=32):
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.3,
        eos_token_id=[0, 2],
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_text("the model's licence")
    return folder


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny-llama")


def pair(prompt, completion):
    return SFTPair(({"role": "user", "content": prompt},), completion)


def pattern(n, seed):
    """Prompts of varied length whose completion is always made of the same few words."""
    draw = random.Random(seed)
    words = ["toy", "story", "comedy", "drama"]
    return [
        pair(
            "".join(draw.choices("abcdef", k=draw.randint(3, 12))),
            " ".join(draw.choices(words, k=2)),
        )
        for _ in range(n)
    ]


PAIRS, HELDOUT = pattern(36, seed=1), pattern(6, seed=2)
LONG = [replace(pair, completion=pair.completion * 40) for pair in PAIRS]


@pytest.fixture(scope="module")
def trained(model_dir, tmp_path_factory):
    """(folder, report) of one uninterrupted fine-tuning."""
    out_dir = tmp_path_factory.mktemp("sft") / "run"
    return out_dir, finetune(model_dir, PAIRS, HELDOUT, out_dir, OPTIONS, model_name="tiny")


def adapter_of(out_dir):
    return load_file(out_dir / "adapter" / "adapter_model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_only_the_completion_and_the_end_of_turn_are_learned(model_dir):
    tokenizer = make_tokenizer()
    ids = {
        token: tokenizer.convert_tokens_to_ids(token) for token in "uaser tin\nxyz".replace(" ", "")
    }
    (example,) = encode_pairs(model_dir, [pair("x", "yz")], 128)
    start, end, newline = 1, 2, tokenizer.encode("\n")[0]
    user, assistant = tokenizer.encode("user"), tokenizer.encode("assistant")
    prompt = [start, *user, newline, ids["x"], end, newline, start, *assistant, newline]
    assert list(example.input_ids) == [*prompt, ids["y"], ids["z"], end]
    batch = pad_left([example])
    assert batch["labels"].tolist() == [[IGNORED] * len(prompt) + [ids["y"], ids["z"], end]]


def test_padding_goes_left_and_is_neither_read_nor_learned(model_dir):
    short, long = encode_pairs(model_dir, [pair("x", "yz"), pair("xxx", "y")], 128)
    batch = pad_left([short, long])
    assert len(long.input_ids) - len(short.input_ids) == 1
    assert batch["input_ids"][0].tolist() == [0, *short.input_ids]
    assert batch["attention_mask"][0].tolist() == [0] + [1] * len(short.input_ids)
    assert batch["position_ids"][0, :3].tolist() == [0, 0, 1]
    assert batch["position_ids"][1, :3].tolist() == [0, 1, 2]
    assert (batch["labels"] != IGNORED).sum(1).tolist() == [3, 2]
    assert batch["logits_to_keep"] == 4


def test_the_end_of_turn_is_the_templates_not_the_tokenizers_eos(model_dir):
    chat = ChatTokenizer(model_dir)
    assert make_tokenizer().eos_token == "<|endoftext|>"
    assert chat.stop_token_ids == {0, 2}
    assert end_of_turn_id(chat) == 2


def test_a_model_without_end_of_turn_in_its_template_learns_to_end_with_its_stop_token(tmp_path):
    folder = make_model(tmp_path / "base")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    assert end_of_turn_id(ChatTokenizer(folder)) == 0


def test_perplexity_and_loss_equal_a_computation_one_example_at_a_time(model_dir):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    examples = encode_pairs(model_dir, HELDOUT, 128)
    total, n = 0.0, 0
    for example in examples:
        with torch.no_grad():
            log_probabilities = model(torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
        first = len(example.input_ids) - example.n_completion
        for position in range(first, len(example.input_ids)):
            total -= log_probabilities[position - 1, example.input_ids[position]].item()
            n += 1
    assert perplexity(model, examples, 4) == pytest.approx(math.exp(total / n), rel=1e-5)
    batch = pad_left(examples)
    labels = batch.pop("labels")
    loss = completion_loss(model(**batch), labels, num_items_in_batch=n)
    assert loss.item() == pytest.approx(total / n, rel=1e-5)
    whole = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    by_transformers = functional.cross_entropy(
        whole[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
    )
    assert loss.item() == pytest.approx(by_transformers.item(), rel=1e-4)


def test_perplexity_falls_on_a_pattern_that_can_be_learned(trained):
    _, report = trained
    assert report.perplexity_after < 0.5 * report.perplexity_before
    assert report.train_losses[-1] < report.train_losses[0]


def test_the_report_counts_what_was_done(model_dir, trained):
    out_dir, report = trained
    lengths = [len(e.input_ids) for e in encode_pairs(model_dir, PAIRS, 128)]
    assert (report.n_pairs, report.n_heldout, report.n_dropped) == (36, 6, 0)
    assert report.n_steps == len(report.train_losses) == 2 * math.ceil(36 / 4 / 2)
    assert report.n_tokens == 2 * sum(lengths)
    assert json.loads((out_dir / "sft.json").read_text())["report"] == json.loads(
        json.dumps(asdict(report))
    )


def test_pairs_that_are_too_long_are_counted_and_left_out(model_dir, tmp_path, caplog):
    pairs = [*PAIRS[:8], pair("x" * 200, "y")]
    options = replace(OPTIONS, sft_epochs=1)
    report = finetune(model_dir, pairs, HELDOUT[:2], tmp_path / "run", options)
    assert (report.n_pairs, report.n_dropped) == (8, 1)
    assert "1 pairs longer than sft_max_tokens=128 left out" in caplog.text


def test_no_pair_that_fits_is_an_error(model_dir, tmp_path):
    with pytest.raises(ValueError, match="sft_max_tokens=32: none of the 36 SFT pairs fits"):
        finetune(model_dir, LONG, HELDOUT, tmp_path / "run", replace(OPTIONS, sft_max_tokens=32))


def test_a_finished_folder_is_read_and_not_repeated(model_dir, trained, tmp_path):
    out_dir, report = trained
    stamp = (out_dir / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert finetune(model_dir, PAIRS, HELDOUT, out_dir, OPTIONS) == report
    assert (out_dir / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == stamp


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(
    model_dir, trained, tmp_path
):
    finetune(model_dir, PAIRS, HELDOUT, tmp_path / "same", OPTIONS)
    finetune(model_dir, PAIRS, HELDOUT, tmp_path / "other", OPTIONS, seed=4)
    assert same(adapter_of(tmp_path / "same"), adapter_of(trained[0]))
    assert not same(adapter_of(tmp_path / "other"), adapter_of(trained[0]))


def test_only_the_adapter_and_the_report_are_left(trained):
    out_dir, _ = trained
    files = sorted(str(f.relative_to(out_dir)) for f in out_dir.rglob("*") if f.is_file())
    assert files == ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "sft.json"]


def test_the_adapter_is_one_that_vllm_accepts(trained):
    config = json.loads((trained[0] / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert (config["r"], config["lora_alpha"], config["bias"]) == (4, 8, "none")
    assert not config["use_dora"]
    assert not config["use_rslora"]
    assert config["modules_to_save"] is None
    assert config["base_model_name_or_path"] == "tiny"
    assert config["target_modules"] == sorted(config["target_modules"])
    tensors = adapter_of(trained[0])
    assert len(tensors) == 2 * 7 * 2  # A and B of seven linear modules in two layers
    assert all(key.endswith(("lora_A.weight", "lora_B.weight")) for key in tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def die_at_a_checkpoint(inside, model_dir, out_dir):
    """A fine-tuning that is killed after its sixth update, in or after its checkpoint."""
    save = transformers.Trainer._save_checkpoint

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def save_or_die(self, *args, **kwargs):
        if self.state.global_step == 6 and inside:
            self._save_rng_state = die
        save(self, *args, **kwargs)
        if self.state.global_step == 6:
            die()

    transformers.Trainer._save_checkpoint = save_or_die
    torch.set_num_threads(1)
    finetune(model_dir, PAIRS, HELDOUT, out_dir, OPTIONS)


@pytest.mark.parametrize("inside", [False, True], ids=["after a checkpoint", "within a checkpoint"])
def test_killed_and_started_again_it_ends_with_the_same_adapter(
    model_dir, trained, tmp_path, inside, monkeypatch
):
    out_dir = tmp_path / "run"
    killed = fresh_process(die_at_a_checkpoint, inside, model_dir, out_dir)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert last_checkpoint(out_dir / "checkpoints", 1).name == f"checkpoint-{4 if inside else 6}"
    assert (out_dir / "checkpoints" / "checkpoint-6" / "optimizer.pt").is_file()

    perplexities = []
    monkeypatch.setattr(
        "recbole_gacllm.sft.finetune.perplexity",
        lambda *args: perplexities.append(perplexity(*args)) or perplexities[-1],
    )
    steps = count_updates(monkeypatch)
    report = finetune(model_dir, PAIRS, HELDOUT, out_dir, OPTIONS)
    assert steps[0] == (5 if inside else 7)
    assert perplexities == [report.perplexity_after]  # the one before was remembered
    assert same(adapter_of(out_dir), adapter_of(trained[0]))
    assert replace(report, seconds=0) == replace(trained[1], seconds=0)


def count_updates(monkeypatch):
    steps = []
    log = Progress.on_log

    def counting(self, args, state, control, **kwargs):
        steps.append(state.global_step)
        log(self, args, state, control, **kwargs)

    monkeypatch.setattr(Progress, "on_log", counting)
    return steps


@pytest.mark.parametrize("step", [5, 10], ids=["end of an epoch", "end of training"])
def test_interrupted_at_a_boundary_it_ends_with_the_same_adapter(
    model_dir, trained, tmp_path, step, monkeypatch
):
    save = transformers.Trainer._save_checkpoint

    def save_and_stop(self, *args, **kwargs):
        save(self, *args, **kwargs)
        if self.state.global_step == step:
            raise KeyboardInterrupt

    out_dir, options = tmp_path / "run", replace(OPTIONS, sft_checkpoint_steps=5)
    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "_save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(model_dir, PAIRS, HELDOUT, out_dir, options)
    assert not (out_dir / "adapter").exists()
    finetune(model_dir, PAIRS, HELDOUT, out_dir, options)
    assert same(adapter_of(out_dir), adapter_of(trained[0]))


def write_checkpoint(folder, n_processes=1):
    """The files that training goes on from; of several processes each has a random state."""
    folder.mkdir()
    names = ["rng_state.pth"]
    if n_processes > 1:
        names = [f"rng_state_{rank}.pth" for rank in range(n_processes)]
    for name in ["optimizer.pt", "scheduler.pt", *names]:
        torch.save({"state": torch.arange(50.0)}, folder / name)
    save_file({"a": torch.arange(50.0)}, folder / "adapter_model.safetensors")
    state = {"global_step": 2, "log_history": [{"loss": 1.0, "n_processes": n_processes}]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    """Change one byte of the last value that the file holds."""
    content = bytearray(file.read_bytes())
    content[content.index(torch.tensor(49.0).numpy().tobytes())] ^= 1
    file.write_bytes(content)


ALL_FILES = (
    *("trainer_state.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt"),
    "rng_state.pth",
)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *((file, damage) for file in ALL_FILES for damage in (cut, Path.unlink)),
        ("optimizer.pt", flip),
        ("rng_state.pth", flip),
    ],
)
def test_a_half_written_or_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    tmp_path, caplog, file, damage
):
    before, last = (write_checkpoint(tmp_path / f"checkpoint-{step}") for step in (8, 10))
    assert last_checkpoint(tmp_path, 1) == last
    assert caplog.text == ""
    damage(last / file)
    assert last_checkpoint(tmp_path, 1) == before
    assert "checkpoint-10 is half-written or damaged" in caplog.text
    damage(before / file)
    assert last_checkpoint(tmp_path, 1) is None


def test_without_a_checkpoint_there_is_none(tmp_path):
    assert last_checkpoint(tmp_path / "none", 1) is None


@pytest.mark.parametrize(("wrote", "go_on"), [(1, 2), (2, 1), (2, 4), (4, 2)])
def test_a_checkpoint_of_another_number_of_processes_will_do(tmp_path, caplog, wrote, go_on):
    caplog.set_level("INFO")
    checkpoint = write_checkpoint(tmp_path / "checkpoint-2", wrote)
    assert last_checkpoint(tmp_path, go_on) == checkpoint
    assert f"is of {wrote} processes, now there are {go_on}" in caplog.text


def test_as_many_processes_need_the_random_states_of_all(tmp_path, caplog):
    checkpoint = write_checkpoint(tmp_path / "checkpoint-2", 4)
    assert last_checkpoint(tmp_path, 4) == checkpoint
    (checkpoint / "rng_state_3.pth").unlink()
    assert last_checkpoint(tmp_path, 4) is None
    assert "random states of 3 of 4 processes" in caplog.text
    assert last_checkpoint(tmp_path, 3) == checkpoint


@pytest.mark.parametrize(("damaged", "first"), [((6,), 5), ((4, 6), 1)])
def test_with_a_damaged_checkpoint_it_ends_with_the_same_adapter(
    model_dir, trained, tmp_path, monkeypatch, caplog, damaged, first
):
    out_dir = tmp_path / "run"
    interrupt_after(6, model_dir, PAIRS, out_dir, OPTIONS)
    for step in damaged:
        cut(out_dir / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt")
    steps = count_updates(monkeypatch)
    report = finetune(model_dir, PAIRS, HELDOUT, out_dir, OPTIONS)
    assert steps[0] == first
    assert caplog.text.count("half-written or damaged") == len(damaged)
    assert same(adapter_of(out_dir), adapter_of(trained[0]))
    assert report.train_losses == trained[1].train_losses


def interrupt_after(step, model_dir, pairs, out_dir, options):
    """Train until a checkpoint is complete."""

    class Interrupted(Progress):
        def on_save(self, args, state, control, **kwargs):
            super().on_save(args, state, control, **kwargs)
            if state.global_step == step:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recbole_gacllm.sft.finetune.Progress", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(model_dir, pairs, HELDOUT, out_dir, options)


def test_merging_keeps_tokenizer_template_licence_and_dtype(model_dir, trained, tmp_path):
    base = tmp_path / "base"
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    shutil.copytree(model_dir, base)
    model.save_pretrained(base)
    (base / "manifest.json").write_text("{}")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "stale").touch()
    merge(base, trained[0] / "adapter", tmp_path / "merged")
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert names == {file.name for file in base.iterdir()} - {"manifest.json"}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "merged"]


@pytest.mark.parametrize("targets", ["q_prod", ["q_proj", "q_prod"], ["lm_head"]])
def test_target_modules_that_match_nothing_are_named_with_those_that_exist(
    model_dir, tmp_path, targets
):
    options = replace(OPTIONS, sft_target_modules=targets)
    with pytest.raises(ValueError, match=r"sft_target_modules: .*'down_proj'.*'v_proj'"):
        finetune(model_dir, PAIRS, HELDOUT, tmp_path / "run", options)


def test_listed_modules_alone_get_the_adapter_and_without_held_out_pairs_is_no_perplexity(
    model_dir, tmp_path
):
    options = replace(OPTIONS, sft_target_modules=["q_proj", "v_proj"], sft_epochs=1)
    report = finetune(model_dir, PAIRS[:8], (), tmp_path / "run", options)
    assert {key.split(".")[-3] for key in adapter_of(tmp_path / "run")} == {"q_proj", "v_proj"}
    assert report.perplexity_before is None
    assert report.perplexity_after is None


def test_a_loss_that_is_not_finite_stops_training(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "recbole_gacllm.sft.finetune.completion_loss",
        lambda *args, **kwargs: completion_loss(*args, **kwargs) * math.nan,
    )
    with pytest.raises(GaCLLMError, match=r"loss is nan at update 1; lower sft_learning_rate=0.01"):
        finetune(model_dir, PAIRS, HELDOUT, tmp_path / "run", OPTIONS)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_out_of_memory_names_the_batch_size(model_dir, tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("recbole_gacllm.sft.finetune.completion_loss", fail)
    with pytest.raises(
        GaCLLMError, match=r"ran out of memory with 4 sequences .* Lower sft_batch_size=4"
    ):
        finetune(model_dir, PAIRS, HELDOUT, tmp_path / "run", OPTIONS)


def saved_bytes_a_token(model):
    """What a forward pass keeps for the way back, weights left out, of each token more."""
    weights = {parameter.data_ptr() for parameter in model.parameters()}

    def kept(n_tokens):
        sizes = {}

        def pack(tensor):
            if tensor.data_ptr() not in weights:
                sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        ids = torch.ones(1, n_tokens, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            alive = model(ids, logits_to_keep=1)
        assert alive.logits.requires_grad
        return sum(sizes.values())

    return (kept(64) - kept(32)) / 32


def test_a_large_model_keeps_the_inputs_of_its_layers_only(tmp_path, monkeypatch):
    """A layer's input has hidden_size numbers a token: 256 bytes; all it computes has 20 kB."""
    base = make_model(tmp_path / "base", hidden_size=64)

    def model():
        return sft._load(
            base, sft._lora_config(base, OPTIONS), "float32", torch.device("cpu")
        ).train()

    plain = saved_bytes_a_token(model())
    monkeypatch.setattr(sft, "CHECKPOINTING_ABOVE", 1000)
    checkpointed = saved_bytes_a_token(model())
    assert plain > 10_000
    assert checkpointed < 0.15 * plain


def test_checkpointing_changes_no_gradient(model_dir, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "CHECKPOINTING_ABOVE", 1000)
    report = finetune(model_dir, PAIRS, HELDOUT, tmp_path / "run", OPTIONS, model_name="tiny")
    assert report.train_losses == pytest.approx(trained[1].train_losses, rel=1e-5)
    found, wanted = adapter_of(tmp_path / "run"), adapter_of(trained[0])
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4)


def test_weights_are_read_straight_to_the_device_of_the_process(model_dir, monkeypatch):
    class ReadError(Exception):
        pass

    def read(folder, **options):
        raise ReadError(options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", read)
    with pytest.raises(ReadError) as call:
        sft._load(model_dir, None, "bfloat16", torch.device("cuda:1"))
    [options] = call.value.args
    assert options["device_map"] == {"": torch.device("cuda:1")}
    assert options["use_safetensors"] is True


def test_weights_that_do_not_fit_are_not_read_again_in_vain(model_dir, tmp_path, monkeypatch):
    reads = []

    def read(folder, **options):
        reads.append(folder)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", read)
    with pytest.raises(GaCLLMError, match=r"do not fit into the memory of cpu. Take a smaller"):
        finetune_on_all_cards(model_dir, PAIRS, HELDOUT, tmp_path / "run", OPTIONS)
    assert len(reads) == 1


def test_nothing_is_printed_and_the_bar_can_be_switched_off(model_dir, tmp_path, capfd):
    options = replace(OPTIONS, sft_epochs=1)
    finetune(model_dir, PAIRS[:8], HELDOUT[:1], tmp_path / "off", options)
    assert capfd.readouterr() == ("", "")
    finetune(model_dir, PAIRS[:8], HELDOUT[:1], tmp_path / "on", options, show_progress=True)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "SFT" in printed.err
    assert "loss=" in printed.err

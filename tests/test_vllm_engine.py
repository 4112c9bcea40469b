"""How vLLM is started: its environment, its failures at the start, the names of it that we use."""

from __future__ import annotations

import importlib
import inspect
import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recbole_gacllm.errors import GenerationError, MemoryRanOutError
from recbole_gacllm.llm.engines import choose_backend
from recbole_gacllm.llm.vllm_options import CPU_SEQUENCES, PRIVATE_NAMES, cpu_options

from .test_generator_contract import save_tiny_model
from .test_hardware import CARD, smi

ROOT = Path(__file__).resolve().parent.parent
NO_ROOM = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to")
IN_THE_DARK = RuntimeError(
    "Engine core initialization failed. See root cause above. Failed core proc(s): {}"
)

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if choose_backend("auto")[0] != "vllm":
        pytest.skip("vLLM cannot run here")
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Start vLLM where its every start fails with an error; the error and the options of each."""
    import vllm
    from vllm.platforms import current_platform

    from recbole_gacllm.llm.vllm_engine import VLLMGenerator

    def start(error: Exception, model: Path, on_cpu: bool = False, **keys: Any) -> Any:
        tried: list[dict[str, Any]] = []

        def fail(**options: Any) -> None:
            tried.append(options)
            raise error

        monkeypatch.setattr(vllm, "LLM", fail)
        monkeypatch.setattr(type(current_platform), "is_cpu", lambda _self: on_cpu)
        monkeypatch.setattr(vllm.distributed, "cleanup_dist_env_and_memory", lambda: None)
        with pytest.raises(GenerationError) as caught:
            VLLMGenerator(model, **{"dtype": "float32", **keys})
        return caught.value, tried

    return start


def test_in_this_process_it_starts_once_and_says_that_memory_ran_out(
    tiny_model: Path, refuse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second start in the process would hang: what the first held is never freed."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    for n_sequences in (None, 8):
        error, tried = refuse(NO_ROOM, tiny_model, on_cpu=True, n_sequences=n_sequences)
        assert [options["max_num_seqs"] for options in tried] == [n_sequences or 32]
        assert isinstance(error, MemoryRanOutError)
        assert "did not start on" in str(error)
        assert "Memory ran out: lower llm_max" in str(error)


def test_in_a_process_of_its_own_it_tries_less_and_then_says_what_helps(
    tiny_model: Path, refuse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    error, tried = refuse(NO_ROOM, tiny_model, on_cpu=True)
    assert "Memory ran out: lower llm_max" in str(error)
    assert [options["max_num_seqs"] for options in tried] == [32, 16, 8, 4]
    caches = [options["kv_cache_memory_bytes"] for options in tried]
    assert all(b < 0.7 * a for a, b in itertools.pairwise(caches))


def test_a_failure_in_the_engines_process_is_tried_once_more_with_half(
    tiny_model: Path, refuse: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi(tmp_path, monkeypatch, CARD, driver="580.65.06")
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    error, tried = refuse(IN_THE_DARK, tiny_model)
    sizes = [(o.get("max_num_seqs"), o.get("max_num_batched_tokens")) for o in tried]
    assert sizes == [(None, None), (128, 4096)]
    assert not isinstance(error, MemoryRanOutError)
    for part in (
        "VLLM_ENABLE_V1_MULTIPROCESSING=0",
        "llm_gpu_memory_utilization: null",
        "18.0 of 24.0 GiB free",
        "580 or newer (580.65.06)",
        "llm_dtype (float32)",
        "llm_backend: transformers needs no vLLM",
    ):
        assert part in str(error)


def test_a_cpu_s_cache_takes_a_share_of_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(available=8 << 30)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    assert cpu_options(1024, CPU_SEQUENCES)["kv_cache_memory_bytes"] == 2 << 30
    assert cpu_options(1024, CPU_SEQUENCES // 2)["kv_cache_memory_bytes"] == 1 << 30
    memory.available = 64 << 30
    assert cpu_options(1024, CPU_SEQUENCES)["kv_cache_memory_bytes"] == 4 << 30


def test_any_other_failure_is_told_at_once(tiny_model: Path, refuse: Any) -> None:
    error, tried = refuse(ValueError("no such architecture"), tiny_model)
    assert len(tried) == 1
    assert "ValueError: no such architecture" in str(error)


def test_it_takes_what_the_fullest_card_has_free_or_what_the_key_says(
    tiny_model: Path, refuse: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi(tmp_path, monkeypatch, CARD)
    _, [options] = refuse(ValueError("stop"), tiny_model)
    assert options["gpu_memory_utilization"] == pytest.approx(0.73)
    _, [options] = refuse(ValueError("stop"), tiny_model, gpu_memory_utilization=0.5)
    assert options["gpu_memory_utilization"] == 0.5


def test_tensor_and_pipeline_sizes_reach_vllm(tiny_model: Path, refuse: Any) -> None:
    sizes = {"tensor_parallel_size": 2, "pipeline_parallel_size": 3}
    _, [options] = refuse(ValueError("stop"), tiny_model, **sizes)
    assert {key: options[key] for key in sizes} == sizes


FORK_RULE = """
import torch

def initialise(*_, **__):
    raise AssertionError("CUDA was initialised")

torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
torch.cuda._lazy_init = torch.cuda.init = torch._C._cuda_init = initialise
torch.version.cuda = "13.0"

from recbole_gacllm.llm import engines, hardware, vllm_options

engines._is_cpu_build = lambda: False
assert engines.choose_backend("auto")[0] == "vllm"
assert hardware.card_groups(1) == [{}]
assert hardware.resolve_dtype("auto") == "bfloat16"
assert hardware.memory_share(None) == 0.73
vllm_options.prepare_environment()
from vllm.utils.system_utils import get_mp_context
assert get_mp_context().get_start_method() == "spawn"
assert not torch.cuda.is_initialized()
"""


def test_the_engines_process_is_spawned_and_nothing_has_initialised_cuda(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork of a process that has asked whether there is a GPU cannot use it."""
    smi(tmp_path, monkeypatch, CARD)
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    ran = subprocess.run([sys.executable, "-c", FORK_RULE], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_this_vllm_has_the_names_that_are_not_its_documented_ones(name: str) -> None:
    import vllm

    said = f"vLLM {vllm.__version__} has no {name}: see PRIVATE_NAMES in llm/vllm_options.py"
    module, _, attribute = name.partition(":")
    assert importlib.util.find_spec(module) is not None, said
    inside = importlib.import_module(module)
    *outer, last = attribute.split(".")
    for part in outer:
        inside = getattr(inside, part)
    # An attribute of an instance, or a text, stands in the source only.
    assert hasattr(inside, last) or last in inspect.getsource(inside), said


def test_the_private_names_are_checked_on_a_version_that_the_package_allows() -> None:
    import vllm
    from packaging.version import Version

    assert Version("0.30") <= Version(vllm.__version__) < Version("0.35")
    assert os.environ.get("VLLM_WORKER_MULTIPROC_METHOD") in (None, "spawn")

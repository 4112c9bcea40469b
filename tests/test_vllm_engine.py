"""How vLLM is started: its environment, its failures at the start, the names of it that we use."""

import importlib
import inspect
import itertools
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import MambaConfig

from recbole_gacllm import llm
from recbole_gacllm.errors import GenerationError, MemoryRanOutError
from recbole_gacllm.llm.chat import ChatTokenizer
from recbole_gacllm.llm.engines import choose_backend
from recbole_gacllm.llm.vllm_engine import (
    CPU_WINDOW,
    PRIVATE_NAMES,
    VLLMGenerator,
    cpu_options,
    token_bytes,
)

from .test_generator_contract import OUT_OF_MEMORY, make_requests
from .test_hardware import CARD

IN_THE_DARK = RuntimeError(
    "Engine core initialization failed. See root cause above. Failed core proc(s): {}"
)

pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True, scope="module")
def _vllm():
    if choose_backend("auto")[0] != "vllm":
        pytest.skip("vLLM cannot run here")


@pytest.fixture
def environment():
    """Put back as it was: starting vLLM changes it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def refuse(monkeypatch, environment):
    """Start vLLM where its every start fails with an error; that error, and vLLM's options."""
    import vllm
    from vllm.model_executor.models import registry
    from vllm.platforms import current_platform

    monkeypatch.setattr(registry, "_run_in_subprocess", None)

    def start(error, model, on_cpu=False, **keys):
        options = {}

        def fail(**keys):
            options.update(keys)
            raise error

        monkeypatch.setattr(vllm, "LLM", fail)
        monkeypatch.setattr(type(current_platform), "is_cpu", lambda _self: on_cpu)
        with pytest.raises(GenerationError) as caught:
            VLLMGenerator(model, **{"dtype": "float32", **keys})
        return caught.value, options

    return start


@pytest.mark.parametrize("error", OUT_OF_MEMORY[1:], ids=lambda error: type(error).__name__)
def test_memory_that_runs_out_at_the_start_asks_for_a_smaller_engine(tiny_model, refuse, error):
    """Which the fleet starts, in another process: what this one held is never freed."""
    told, whole = refuse(error, tiny_model, on_cpu=True)
    assert type(told) is MemoryRanOutError
    assert "did not start on" in str(told)
    assert "Memory ran out: lower llm_max" in str(told)
    _, half = refuse(error, tiny_model, on_cpu=True, window=16)
    assert (whole["max_num_seqs"], half["max_num_seqs"]) == (32, 16)
    assert half["kv_cache_memory_bytes"] < 0.7 * whole["kv_cache_memory_bytes"]


def test_a_failure_in_the_engines_process_is_tried_once_more_with_half(tiny_model, refuse, cards):
    cards(CARD, driver="580.65.06")
    error, options = refuse(IN_THE_DARK, tiny_model)
    assert type(error) is MemoryRanOutError
    assert not {"max_num_seqs", "max_num_batched_tokens"} & options.keys()
    error, options = refuse(IN_THE_DARK, tiny_model, window=256)
    assert type(error) is GenerationError
    assert (options["max_num_seqs"], options["max_num_batched_tokens"]) == (128, 4096)
    for part in (
        "VLLM_ENABLE_V1_MULTIPROCESSING=0",
        "llm_gpu_memory_utilization: null",
        "18.0 of 24.0 GiB free",
        "580 or newer (580.65.06)",
        "llm_dtype (float32)",
        "llm_backend: transformers needs no vLLM",
    ):
        assert part in str(error)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (RuntimeError("out of blocks"), GenerationError, "RuntimeError: out of blocks. .*start ag"),
        *((error, MemoryRanOutError, "Memory ran out: lower llm_max") for error in OUT_OF_MEMORY),
        (None, MemoryRanOutError, "EngineDeadError"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("call", ["add_request", "step"])
def test_a_failure_at_work_ends_it_and_asks_for_a_smaller_one_if_that_may_do(
    tiny_model, error, kind, message, call
):
    from vllm.v1.engine.exceptions import EngineDeadError

    def fail(*_, **__):
        raise error or EngineDeadError

    engine = VLLMGenerator.__new__(VLLMGenerator)
    engine.window, engine._max_model_len, engine._lora = 4, 512, None
    engine._chat, engine._names = ChatTokenizer(tiny_model), itertools.count()
    # No request may be taken back from an engine that is dead.
    engine._engine = SimpleNamespace(**{"add_request": lambda *_, **__: None, call: fail})
    with pytest.raises(GenerationError, match=f"vLLM stopped working: .*{message}") as caught:
        list(engine.generate(make_requests(2)))
    assert type(caught.value) is kind


def test_a_cpu_s_cache_takes_what_all_sequences_fill_or_a_share_of_what_is_available(monkeypatch):
    def cache(window, n_bytes):
        return cpu_options(1024, window, n_bytes)["kv_cache_memory_bytes"]

    memory = SimpleNamespace(available=8 << 30)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    for unknown_or_large in (None, 1 << 20):
        memory.available = 8 << 30
        assert cache(CPU_WINDOW, unknown_or_large) == 2 << 30
        assert cache(CPU_WINDOW // 2, unknown_or_large) == 1 << 30
        memory.available = 64 << 30
        assert cache(CPU_WINDOW, unknown_or_large) == 4 << 30
    assert cache(CPU_WINDOW, 1000) == 1000 * (CPU_WINDOW + 1) * (1024 + 32)
    assert cache(1, 1000) == 1000 * 2 * (1024 + 32)


def test_the_bytes_of_a_token_are_told_by_the_config(tiny_model, tmp_path):
    """Two layers, two heads of keys and values of 8 numbers each."""
    assert token_bytes(tiny_model, "float32") == 2 * 2 * 2 * 8 * 4
    assert token_bytes(tiny_model, "bfloat16") == 2 * 2 * 2 * 8 * 2
    MambaConfig().save_pretrained(tmp_path)
    assert token_bytes(tmp_path, "float32") is None


def test_any_other_failure_is_told_with_what_vllm_was_to_do(tiny_model, refuse, cards):
    cards(CARD)
    sizes = {"tensor_parallel_size": 2, "pipeline_parallel_size": 3}
    error, options = refuse(ValueError("no such architecture"), tiny_model, **sizes)
    assert type(error) is GenerationError
    assert "ValueError: no such architecture" in str(error)
    assert {key: options[key] for key in sizes} == sizes
    # What the fullest card has free, or what the key says.
    assert options["gpu_memory_utilization"] == pytest.approx(0.73)
    _, options = refuse(ValueError("stop"), tiny_model, gpu_memory_utilization=0.5)
    assert options["gpu_memory_utilization"] == 0.5


def test_the_engines_process_is_spawned_and_nothing_has_initialised_cuda(
    cards, monkeypatch, environment
):
    """A fork of a process that has asked whether there is a GPU cannot use it."""
    from vllm.utils.system_utils import get_mp_context

    def initialise(*_, **__):
        raise AssertionError("CUDA was initialised")

    cards(CARD)
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for place, name in ((torch.cuda, "_lazy_init"), (torch.cuda, "init"), (torch._C, "_cuda_init")):
        monkeypatch.setattr(place, name, initialise, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    names = ("hardware", "vllm_engine", "engines")
    for name in names:  # loaded anew, in case that loading asks
        monkeypatch.setattr(llm, name, getattr(llm, name))
        monkeypatch.delitem(sys.modules, f"recbole_gacllm.llm.{name}")
    hardware, vllm_engine, engines = (
        importlib.import_module(f"recbole_gacllm.llm.{name}") for name in names
    )
    engines._is_cpu_build = lambda: False
    assert engines.choose_backend("auto")[0] == "vllm"
    assert hardware.card_groups(1) == [{}]
    assert hardware.resolve_dtype("auto") == "bfloat16"
    assert hardware.memory_share(None) == 0.73
    vllm_engine.prepare_environment()
    assert get_mp_context().get_start_method() == "spawn"
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_this_vllm_has_the_names_that_are_not_its_documented_ones(name):
    import vllm

    said = f"vLLM {vllm.__version__} has no {name}: see PRIVATE_NAMES in llm/vllm_engine.py"
    module, _, attribute = name.partition(":")
    assert importlib.util.find_spec(module) is not None, said
    inside = importlib.import_module(module)
    *outer, last = attribute.split(".")
    for part in outer:
        inside = getattr(inside, part)
    # An attribute of an instance, or a text, stands in the source only.
    assert hasattr(inside, last) or last in inspect.getsource(inside), said


def test_the_private_names_are_checked_on_a_version_that_the_package_allows():
    import vllm
    from packaging.version import Version

    assert Version("0.30") <= Version(vllm.__version__) < Version("0.35")
    assert os.environ.get("VLLM_WORKER_MULTIPROC_METHOD") in (None, "spawn")

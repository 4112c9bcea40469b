"""Batch files: a layer out to a cluster, and its answers back, whatever state they are in."""

import json
import random
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recbole_gacllm.artifacts import manifests
from recbole_gacllm.cli.main import main
from recbole_gacllm.convolution import batch_job, setup
from recbole_gacllm.convolution.batch import (
    Answers,
    answer_files,
    custom_id,
    key_of,
    request_line,
    write_shards,
)
from recbole_gacllm.convolution.layers import SIDES, Layer
from recbole_gacllm.convolution.store import DescriptionStore
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.llm.engines import open_generator
from recbole_gacllm.llm.generator import Request, Sampling

from .fake_generator import FakeGenerator
from .fake_server import chat_completion
from .test_pipeline import TINY

KEYS = [f"{number:064x}" for number in range(8)]


def good(name, text="A calm film.", finish="stop"):
    """An answer as a batch job writes it."""
    body = {
        "choices": [{"message": {"content": text}, "finish_reason": finish}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3},
    }
    response = {"status_code": 200, "request_id": "r", "body": body}
    return {"id": "x", "custom_id": name, "response": response, "error": None}


def bad(name):
    return {"custom_id": name, "response": None, "error": {"message": "out of memory"}}


def refused(name):
    return {"custom_id": name, "response": {"status_code": 400, "body": {}}, "error": None}


def write_lines(file, answers):
    file.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    return file


# Files


@given(n=st.integers(0, 40), size=st.integers(1, 15))
def test_shards_hold_every_line_once_in_order(tmp_path_factory, n, size):
    folder = tmp_path_factory.mktemp("shards")
    lines = [request_line(f"{number:064x}", {"number": number}) for number in range(n)]
    shards = write_shards(folder, 1, iter(lines), size)
    texts = [shard.read_text() for shard in shards]
    assert "".join(texts) == "".join(lines)
    assert all(text.count("\n") == size for text in texts[:-1])
    assert sorted(folder.iterdir()) == shards


def test_a_new_export_leaves_nothing_of_an_earlier_one_and_all_else(tmp_path):
    write_shards(tmp_path, 1, ["a\n", "b\n", "c\n"], 1)
    (tmp_path / "answers.jsonl").write_text("mine")
    write_shards(tmp_path, 2, ["d\n"], 1)
    assert {file.name for file in tmp_path.iterdir()} == {"answers.jsonl", "layer-2-00000.jsonl"}


def test_an_export_that_dies_leaves_no_half_shard(tmp_path):
    def dying():
        yield "a\n"
        yield "b\n"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, 1, dying(), 10)
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GaCLLMError, match=r"--export-batch .*file: cannot be written"):
        write_shards(tmp_path / "file", 1, ["a\n"], 1)


def test_answers_are_found_in_folders_beside_shards(tmp_path):
    write_shards(tmp_path, 1, ["a\n"], 1)
    for name in ("batch.json", "out-1.jsonl", "deep/part.json", ".hidden.jsonl", "x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found = {file.name for file in answer_files([tmp_path])}
    assert found == {"out-1.jsonl", "part.json"}
    with pytest.raises(ValueError, match=r"--import-batch .*none: there is no such"):
        answer_files([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \.jsonl or \.json file of answers"):
        answer_files([tmp_path / "empty"])


LINES = st.lists(
    st.one_of(
        st.sampled_from(KEYS).map(good),
        st.sampled_from(KEYS).map(bad),
        st.sampled_from(KEYS).map(refused),
        st.binary(max_size=30).filter(lambda raw: b"\n" not in raw and b"\r" not in raw),
        st.sampled_from([{}, {"custom_id": 3}, [], {"custom_id": KEYS[0], "method": "POST"}]),
    ),
    max_size=30,
)


@given(lines=LINES, cut=st.integers(0, 200), n_files=st.integers(1, 3))
def test_whatever_lies_in_the_files_good_answers_are_found_and_all_lines_counted(
    tmp_path_factory, lines, cut, n_files
):
    folder = tmp_path_factory.mktemp("answers")
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    last = json.dumps(good(KEYS[7])).encode()[: -1 - cut]  # a job that was killed
    for number in range(n_files):
        part = b"\n".join(raw[number::n_files]) + b"\n" + (last if number == 0 else b"")
        (folder / f"{number}.jsonl").write_bytes(part)
    answers = Answers.read(answer_files([folder]))
    dicts = [line for line in lines if isinstance(line, dict)]
    answered = [
        d["custom_id"] for d in dicts if (d.get("response") or {}).get("status_code") == 200
    ]
    failed = {d["custom_id"] for d in dicts if d in map(bad, KEYS) or d in map(refused, KEYS)}
    assert set(answers) == set(answered)
    assert answers.n_duplicates == len(answered) - len(set(answered))
    assert set(answers.errors) == failed - set(answered)
    n_read = len(answered) + sum(d in map(bad, KEYS) or d in map(refused, KEYS) for d in dicts)
    assert answers.n_lines == n_read + answers.n_damaged
    for name in answers:
        assert answers.body(name) == good(name)["response"]["body"]


def test_ids_name_the_address_and_the_attempt():
    assert key_of(custom_id(KEYS[1], 1)) == key_of(custom_id(KEYS[1], 2)) == KEYS[1]
    assert custom_id(KEYS[1], 1) != custom_id(KEYS[1], 2)
    for foreign in ("", "request-1", KEYS[1] + "-3", KEYS[1][:-1], KEYS[1].replace("0", "G")):
        assert key_of(foreign) is None


# A layer out and back, with a model that costs nothing


class Fakes:
    """A run on ``tiny`` up to its descriptions, and what answers its batches."""

    def __init__(self, keys, root):
        from recbole.data import create_dataset, data_preparation
        from recbole.utils import init_seed

        from recbole_gacllm import pipeline
        from recbole_gacllm.config import GaCLLMConfig
        from recbole_gacllm.inputs import TrainingData
        from recbole_gacllm.run_config import build_config

        config = build_config("GaCLLM", "tiny", config_dict=keys)
        init_seed(config["seed"], config["reproducibility"])
        train, _, _ = data_preparation(config, create_dataset(config))
        options = GaCLLMConfig.from_mapping(config.final_config_dict)
        data = TrainingData.from_recbole(config, train._dataset)
        self.job = pipeline.description_job(options, data)
        self.store = self.job.store
        self.root, self.n_exports = root, 0

    def export(self):
        self.n_exports += 1
        folder = self.root / f"batch-{self.n_exports}"
        manifest = batch_job.export_batch(self.job, folder, 7)
        files = sorted(folder.glob("layer-*.jsonl"))
        return manifest, [json.loads(line) for file in files for line in file.open()]

    def take(self, answers, name="out"):
        folder = self.root / name
        folder.mkdir(exist_ok=True)
        write_lines(folder / "a.jsonl", answers)
        return batch_job.import_batch(self.job, [folder])

    def records(self):
        with DescriptionStore(self.store) as store:
            rows = store._db.execute("SELECT key, text, status, n_attempts FROM descriptions")
            return {key: rest for key, *rest in rows}


def answer_all(requests, generator):
    answers = []
    for request in requests:
        answer = good(request["custom_id"])
        answer["response"]["body"] = chat_completion(generator, request["body"])
        answers.append(answer)
    return answers


def sometimes_empty(request):
    """A third of the first answers are no description; of the second ones, a few."""
    from .fake_generator import _hashed_words

    text = _hashed_words(request)
    seed = sum(text.encode()) + (request.sampling.temperature > 0)
    return "" if seed % (7 if request.sampling.temperature > 0 else 3) == 0 else text


@pytest.fixture
def tiny_keys(settings, tiny_model):
    return {**settings, **TINY, "llm_model": str(tiny_model), "sft": False, "llm_n_layers": 2}


@pytest.fixture
def fakes(tiny_keys, tmp_path):
    return Fakes(tiny_keys, tmp_path)


@pytest.fixture
def generator():
    return FakeGenerator(max_model_len=10**6, answer=sometimes_empty)


def local_records(fakes, store_file, generator):
    """What a run here puts into its store, both layers."""
    fakes.store = store_file
    with DescriptionStore(store_file) as store:
        graph, layer = setup.inputs_of(fakes.job)
        convolution = setup.convolution_of(fakes.job, graph, store, "transformers")
        convolution.open_generator = lambda: generator
        for number in (1, 2):
            layer, _ = convolution.next_layer(
                layer, setup.nothing_known_of(fakes.job.options), number
            )
    return fakes.records()


def test_layers_out_and_back_in_parts_leave_the_store_of_a_run_here(fakes, generator, tmp_path):
    rng = random.Random(3)
    exports = []
    while True:
        manifest, requests = fakes.export()
        if manifest is None:
            break
        exports.append((manifest["layer"], len(requests), manifest["n_second_attempts"]))
        answers = answer_all(requests, generator)
        rng.shuffle(answers)
        done = fakes.take(answers[: max(len(answers) * 2 // 3, 1)])
        assert done.n_unknown == done.n_damaged == done.n_duplicates == 0
        assert len(exports) < 60
    assert [layer for layer, *_ in exports] == sorted(layer for layer, *_ in exports)
    assert {layer for layer, *_ in exports} == {1, 2}
    assert exports[0][1] == 54
    assert any(n_second for _, _, n_second in exports)
    found = fakes.records()
    assert found == local_records(fakes, tmp_path / "local.sqlite", generator)
    assert {status for _, status, _ in found.values()} == {"ok", "failed"}


def test_an_export_holds_what_is_missing_and_says_who_must_answer(fakes, generator):
    manifest, requests = fakes.export()
    assert (manifest["layer"], manifest["n_requests"], len(manifest["shards"])) == (1, 54, 8)
    assert manifest["generator"] == fakes.job.generator_key
    assert manifest["model_dir"] == str(fakes.job.model_dir)
    first = requests[0]
    assert (first["method"], first["url"]) == ("POST", "/v1/chat/completions")
    assert first["body"]["max_tokens"] == 12
    assert [message["role"] for message in first["body"]["messages"]] == [
        "system",
        "user",
        "assistant",
    ]
    # The answer is begun; who answers goes on from there.
    assert first["body"]["continue_final_message"]
    assert not first["body"]["add_generation_prompt"]
    generator.answer = FakeGenerator().answer
    done = fakes.take(answer_all(requests[:20], generator))
    assert (done.layers[0].n_imported, done.layers[0].n_missing) == (20, 34)
    manifest, left = fakes.export()
    assert left == requests[20:]
    done = fakes.take(answer_all(left, generator), "rest")
    assert [layer.n_missing for layer in done.layers] == [0, 54]
    assert fakes.export()[0]["layer"] == 2


def test_the_job_for_the_cluster_lies_beside_the_shards(fakes):
    fakes.export()
    job = fakes.root / "batch-1" / "ray_describe.py"
    assert "ray.data.llm" in job.read_text()
    assert "ray[llm]" in job.with_name("requirements.txt").read_text()


def test_every_kind_of_line_is_counted_and_none_is_silently_lost(fakes, generator):
    generator.answer = FakeGenerator().answer
    _, requests = fakes.export()
    answers = answer_all(requests, generator)
    names = [request["custom_id"] for request in requests]
    foreign = [good("f" * 64), good("request-1"), bad("e" * 64)]
    empty = good(names[11], "")
    cut = json.loads(json.dumps(answers[12]))
    del cut["response"]["body"]["usage"]
    lines = [*answers[:10], answers[3], bad(names[10]), empty, cut, *foreign]
    done = fakes.take(lines)
    [layer] = done.layers
    assert (layer.n_imported, layer.n_to_retry, layer.n_errors) == (10, 2, 1)
    assert layer.n_unanswered == 54 - 13
    assert (done.n_lines, done.n_duplicates, done.n_unknown) == (len(lines), 1, 3)
    assert not done.complete
    again = fakes.take(lines)
    assert (again.n_known, again.layers[0].n_imported) == (10, 0)
    manifest, left = fakes.export()
    assert manifest["n_second_attempts"] == 2
    assert {request["custom_id"] for request in left} == {
        *names[10:11],
        names[11] + "-2",
        names[12] + "-2",
        *names[13:],
    }


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)
@given(data=st.data())
def test_any_mix_of_parts_adds_up(fakes, generator, data):
    """Whatever comes back, every prompt that was missing is in one count of the report."""
    manifest, requests = fakes.export()
    if manifest is None:
        return
    kinds = data.draw(st.lists(st.sampled_from("gbrn"), min_size=54, max_size=54))
    made = {"g": lambda r: answer_all([r], generator)[0], "n": lambda r: None}
    made |= {"b": lambda r: bad(r["custom_id"]), "r": lambda r: refused(r["custom_id"])}
    answers = [made[kind](request) for kind, request in zip(kinds, requests, strict=False)]
    report = fakes.take([answer for answer in answers if answer]).layers[0]
    assert len(requests) == report.n_imported + report.n_failed + report.n_missing
    used = kinds[: len(requests)]
    assert report.n_unanswered == used.count("n")
    assert report.n_errors == used.count("b") + used.count("r")


# The command


@pytest.fixture
def flags(tiny_keys, tmp_path):
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump(tiny_keys))
    return ["--dataset=tiny", "--config_files=keys.yaml"]


def run_cli(*arguments):
    sys.argv[:] = ["recbole_gacllm", "describe", *arguments]
    main(sys.argv[1:])


@pytest.mark.slow
def test_an_engine_answers_a_batch_as_a_run_here_would(tiny_keys, in_process, tmp_path, capfd):
    """Export, a model through transformers, import: the store of a local run."""
    keys = {**tiny_keys, "llm_n_layers": 1, "artifact_dir": str(tmp_path / "cluster")}
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump(keys))
    flags = ["--dataset=tiny", "--config_files=keys.yaml"]
    exported = []
    engine = None
    for number in range(3):
        run_cli(*flags, "--export-batch", f"batch-{number}", "--quiet")
        folder = tmp_path / f"batch-{number}"
        if not (folder / "batch.json").is_file():
            break
        exported.append(json.loads((folder / "batch.json").read_text()))
        requests = [
            json.loads(line) for file in sorted(folder.glob("layer-*")) for line in file.open()
        ]
        engine = engine or open_generator(
            "transformers", model_dir=Path(exported[0]["model_dir"]), dtype="float32"
        )
        answers = []
        for completion in engine.generate([as_request(line) for line in requests]):
            answer = good(completion.id, completion.text, completion.finish_reason)
            answer["response"]["body"]["usage"] = {
                "prompt_tokens": completion.n_prompt_tokens,
                "completion_tokens": completion.n_output_tokens,
            }
            answers.append(answer)
        write_lines(tmp_path / f"answers-{number}.jsonl", answers)
        run_cli(*flags, "--import-batch", f"answers-{number}.jsonl", "--quiet")
    assert "nothing to export: all layers are in the store" in capfd.readouterr().out
    assert exported[0]["n_requests"] == 54
    run_cli(*flags)
    folder = Path(capfd.readouterr().out.splitlines()[0])
    report = manifests.read_manifest(folder)["layers"][0]
    assert report["n_generated"] == 0 < report["n_retried"]  # second attempts were exported, too
    layer = Layer.read(folder / "layer_1.parquet")
    local = tmp_path / "local"
    run_cli(*flags, f"--artifact_dir={local}")
    here = Layer.read(next(local.glob("tiny/descriptions-*/layer_1.parquet")))
    assert [layer.texts, layer.statuses] == [here.texts, here.statuses]
    assert sum(layer.statuses[side].count("generated") for side in SIDES) > 30
    stores = [records_in(tmp_path / name / "store.sqlite") for name in ("cluster", "local")]
    assert stores[0] == stores[1]


def as_request(line):
    body = line["body"]
    sampling = Sampling(
        body["max_tokens"], body["temperature"], body["repetition_penalty"], body["seed"]
    )
    return Request(line["custom_id"], tuple(body["messages"]), sampling)


def records_in(store_file):
    """All but when, and what a prefix cache served."""
    with DescriptionStore(store_file) as store:
        rows = store._db.execute(
            "SELECT key, text, status, reason, finish_reason, n_prompt_tokens, n_output_tokens, "
            "n_attempts FROM descriptions"
        )
        return {key: rest for key, *rest in rows}


def test_the_command_says_what_is_missing_and_what_comes_next(flags, generator, tmp_path, capsys):
    generator.answer = FakeGenerator().answer
    run_cli(*flags, "--export-batch", "batch", "--shard-size", "20")
    out = capsys.readouterr().out
    assert "layer 1 of 2: 54 requests (0 of them second attempts) in 3 shards in batch" in out
    lines = [json.loads(line) for file in Path("batch").glob("layer-*") for line in file.open()]
    write_lines(tmp_path / "part.jsonl", answer_all(lines[:30], generator))
    run_cli(*flags, "--import-batch", "part.jsonl")
    out = capsys.readouterr().out
    assert "layer 1: 30 descriptions imported, 0 failed for good, 0 to be asked again" in out
    assert "24 without an answer" in out
    assert "--config_files=keys.yaml --export-batch FOLDER" in out


def test_answers_of_another_run_are_refused(flags, tmp_path, fails):
    write_lines(tmp_path / "foreign.jsonl", [good("a" * 64)])
    said = fails("describe", *flags, "--import-batch", "foreign.jsonl")
    assert "none of the 1 ids belongs to this run" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--export-batch", "b"], "give --dataset and the keys of the run"),
        (["--dataset=tiny", "--run=x", "--export-batch", "b"], "--run goes with --user or --item"),
        (["--dataset=tiny", "--user=1", "--export-batch", "b"], "not allowed with argument"),
        (["--dataset=tiny", "--user=1", "--llm_model=x"], "--user and --item take no keys"),
        (["--dataset=tiny", "--export-batch", "b", "--shard-size", "0"], "must be at least 1"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(arguments, message, fails):
    assert message in fails("describe", *arguments)


def test_raw_texts_leave_nothing_to_describe(flags, fails):
    said = fails("describe", *flags, "--text_source=raw", "--export-batch", "batch")
    assert "nothing to describe; set generated" in said

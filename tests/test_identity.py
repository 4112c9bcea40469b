"""A run's identity: what it reads and the code that computes; how committed runs are found."""

from __future__ import annotations

import re
import shlex
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from recbole_gacllm.compare import identity, job, leaderboard
from recbole_gacllm.compare.plan import code_version, make_plan, split_models
from recbole_gacllm.config import shipped_path
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.plugin import key_checks
from tests.conftest import add_rows

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "recbole_gacllm"


@pytest.fixture
def first_code(monkeypatch):
    """The code is the one that made the first runs."""
    firsts = {}
    present = identity.code_digests()  # of a concern that is in no line yet
    for line in identity.read_table():
        firsts.setdefault(line["concern"], line["digest"])
    firsts = {**present, **firsts}
    monkeypatch.setattr(identity, "code_digests", lambda: firsts)
    return firsts


def name_of(row, settings, **keys):
    [made] = make_plan([row], ["tiny"], 1, config_dict={**settings, **keys}).runs
    return made.name


# Code


CODE = "def f(a, b=None):\n    return [a + 1, b]\n"


@pytest.mark.parametrize(
    ("text", "is_same"),
    [
        (
            '"""What this is."""\n\n# why\n\n\ndef f(\n    a,\n    b=None,  # nothing\n):\n'
            '    """What f is."""\n    return [\n        a + 1,\n        b,\n    ]\n',
            True,
        ),
        (CODE.replace("a + 1", "a + 2"), False),
        (CODE.replace("a + 1", "a + 1.0"), False),
        (CODE.replace("a + 1", "a + True"), False),
        (CODE.replace("a + 1", "a - 1"), False),
        (CODE.replace("None", "0"), False),
        (CODE.replace("    return", "    'text'\n    'text'\n    return"), False),
        ("x = None\n" + CODE, False),
        (CODE.replace("[a + 1, b]", "{**a, b: None}"), False),
    ],
)
def test_what_is_computed_is_code_and_comments_docstrings_and_layout_are_not(
    tmp_path, text, is_same
):
    digests = []
    for content in (CODE, text):
        (tmp_path / "module.py").write_text(content)
        digests.append(identity.code_digest(tmp_path, ("module.py",)))
    assert (digests[0] == digests[1]) == is_same


def test_every_module_has_one_concern_or_is_named_as_one_without():
    modules = {file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py")}
    listed = [module for concern in identity.CONCERNS.values() for module in concern]
    assert len(listed) == len(set(listed))
    assert set(listed) <= modules
    others = tuple(other for other in identity.OTHERS if other.endswith("/"))
    unlisted = {module for module in modules - set(listed) if not module.startswith(others)}
    assert unlisted <= set(identity.OTHERS)
    assert not set(listed) & set(identity.OTHERS)


def test_the_present_code_is_in_the_table():
    """If this fails the code that computes has changed; docs/leaderboard.md says what to do."""
    assert identity.unlisted() == []


@pytest.mark.parametrize(
    ("row", "keys", "concerns"),
    [
        ("LightGCN", {}, "runs"),
        ("LightGCN:fast_paths=True", {}, "runs fast"),
        ("EASE", {"train_share": "0.5"}, "runs splits"),
        ("Pop", {"cold_item_share": "0.2"}, "runs splits"),
        ("Pop", {"known_users_only": "True"}, "runs splits"),
        ("EASE", {"mask_history": "True"}, "runs history"),
        ("GaCLLM:use_text=False", {}, "runs fast model"),
        ("GaCLLM:text_source=raw:fast_paths=False", {}, "runs model texts"),
        ("GaCLLM:text_source=shuffled:llm_n_layers=0", {}, "runs fast model texts"),
        ("GaCLLM", {}, "runs fast model texts llm prompts"),
        ("TextKNN:fast_paths=False", {}, "runs model texts"),
        ("CEASE:fast_paths=False:text_source=raw", {}, "runs model peers CEASE texts"),
        ("RLMRecCon", {}, "runs fast model peers RLMRec texts llm prompts"),
        ("AlphaRec:text_source=raw", {}, "runs fast model peers AlphaRec texts"),
        ("BPR:text_init=True:text_source=raw", {}, "runs model peers texts"),
        ("BPR:text_init=True", {}, "runs model peers texts llm prompts"),
        ("BPR:text_init=False", {}, "runs"),
    ],
)
def test_a_row_depends_on_the_code_that_it_runs(
    settings, monkeypatch, first_code, row, keys, concerns
):
    def name_with(changed):
        digests = {**first_code, **dict.fromkeys(changed, "new")}
        monkeypatch.setattr(identity, "code_digests", lambda: digests)
        return name_of(row, settings, **keys)

    name = name_with(())
    run = concerns.split()
    assert name_with(identity.CONCERNS.keys() - run) == name
    for concern in run:
        assert name_with([concern]) != name, concern


def test_code_with_the_same_numbers_keeps_the_name_and_other_code_does_not(
    settings, monkeypatch, tmp_path, first_code
):
    row = "LightGCN:fast_paths=True"
    name = name_of(row, settings)
    monkeypatch.setattr(identity, "_TABLE", tmp_path / "table.yaml")
    shutil.copy(shipped_path("properties", "computations.yaml"), tmp_path / "table.yaml")

    def names(digest):
        monkeypatch.setattr(identity, "code_digests", lambda: {**first_code, "fast": digest})
        return name_of(row, settings)

    assert names("a") != name
    assert identity.list_present(same=True, evidence="a test") == ["fast"]
    assert names("a") == name
    assert names("b") not in (name, names("c"))
    before = names("b")
    assert identity.list_present(same=False, evidence="another formula") == ["fast"]
    assert names("b") == before  # runs that were made meanwhile are found
    names("c")
    identity.list_present(same=True, evidence="a comment's worth")
    assert names("c") == before
    assert names("a") == name
    lines = yaml.safe_load((tmp_path / "table.yaml").read_text())
    assert [line["evidence"] for line in lines[-3:]] == [
        "a test",
        "another formula",
        "a comment's worth",
    ]


def test_a_later_key_changes_a_name_only_where_it_changes_the_numbers(settings, monkeypatch):
    known = {"brand_new", *key_checks.known_keys()}
    monkeypatch.setattr(key_checks, "known_keys", lambda: known)
    name = name_of("BPR", settings)
    assert name_of("BPR", settings, brand_new="3") != name
    monkeypatch.setattr(identity, "LATER_KEYS", {"brand_new": 3})
    assert name_of("BPR", settings, brand_new="3") == name
    assert name_of("BPR", settings, brand_new="4") != name


def test_the_version_of_the_code_is_known_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    version = code_version()
    assert version["commit"] is None
    assert set(version["concerns"]) == set(identity.CONCERNS)


# Inputs


def changed(file, settings, row, keys):
    """Names before and after another line in a file."""
    before = name_of(row, settings, **keys)
    with file.open("a") as lines:
        lines.write("\n")
    return before, name_of(row, settings, **keys)


@pytest.mark.parametrize(
    ("row", "keys", "ending", "is_read"),
    [
        ("CKE", {}, "kg", True),
        ("CKE", {}, "link", True),
        ("BPR", {}, "kg", False),
        ("BPR", {"benchmark_filename": ["part1", "part2", "part3"]}, "part2.inter", True),
        ("BPR", {}, "part2.inter", False),
        ("BPR", {"additional_feat_suffix": ["useremb"]}, "useremb", True),
        ("BPR", {}, "useremb", False),
        ("GaCLLM:use_text=False", {}, "user", True),
    ],
)
def test_a_run_is_addressed_by_the_files_of_the_data_set_that_it_loads(
    settings, dataset_root, row, keys, ending, is_read
):
    for name in (ending, "part1.inter", "part2.inter", "part3.inter"):
        (dataset_root / "tiny" / f"tiny.{name}").write_text("user_id:token\titem_id:token\n")
    file = dataset_root / "tiny" / f"tiny.{ending}"
    before, after = changed(file, settings, row, keys)
    assert (before != after) == is_read


IMPORTED = "side,token,layer,text\nuser,u1,1,Likes comedies.\n"


@pytest.mark.parametrize(
    ("row", "is_read"),
    [
        *(("GaCLLM", True), ("GaCLLM:use_text=False", False), ("TextKNN", True), ("BPR", False)),
        *(("AlphaRec", True), ("BPR:text_init=True", True)),
    ],
)
def test_a_run_with_texts_is_addressed_by_those_it_imports(settings, tmp_path, row, is_read):
    file = tmp_path / "texts.csv"
    file.write_text(IMPORTED)
    before = name_of(row, settings, text_import_file=str(file))
    file.write_text(IMPORTED.replace("comedies", "dramas"))
    assert (name_of(row, settings, text_import_file=str(file)) != before) == is_read


def test_a_run_is_addressed_by_its_prompts(settings, tmp_path):
    prompts = tmp_path / "prompts"
    shutil.copytree(shipped_path("properties", "prompts"), prompts)
    keys = {"llm_prompts_dir": str(prompts)}
    generated, raw = (
        changed(prompts / "user.txt", settings, row, keys)
        for row in ("GaCLLM", "GaCLLM:text_source=raw")
    )
    assert generated[0] == generated[1]  # a blank line at the end is no other prompt
    text = (prompts / "user.txt").read_text()
    (prompts / "user.txt").write_text(text.replace("person", "reader").replace("the", "some"))
    assert name_of("GaCLLM", settings, **keys) != generated[0]
    assert name_of("GaCLLM:text_source=raw", settings, **keys) == raw[0]


def model_folder(folder, content=b"weights"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "modules.json").write_text("[]")
    save_file({"a": np.frombuffer(content, np.uint8)}, folder / "model.safetensors")
    return str(folder)


@pytest.mark.parametrize("key", ["llm_model", "encoder_model", "llm_adapter"])
def test_a_run_is_addressed_by_the_weights_of_a_folder(settings, tmp_path, key):
    keys = {key: model_folder(tmp_path / "model"), "sft": "False"}
    rows = ("GaCLLM", "GaCLLM:text_source=raw", "GaCLLM:use_text=False")
    before = [name_of(row, settings, **keys) for row in rows]
    model_folder(tmp_path / "model", b"others!")
    after = [name_of(row, settings, **keys) for row in rows]
    is_read = [True, key == "encoder_model", False]
    assert [a != b for a, b in zip(after, before, strict=True)] == is_read


def test_a_run_is_addressed_by_the_file_of_recboles_own_that_it_starts_from(settings, tmp_path):
    (tmp_path / "mf.pth").write_bytes(b"1")
    before, after = changed(
        tmp_path / "mf.pth", settings, "NeuMF", {"mf_pretrain_path": str(tmp_path / "mf.pth")}
    )
    assert before != after


def test_a_run_whose_data_changes_meanwhile_keeps_no_result(
    settings, dataset_root, tmp_path, monkeypatch
):
    plan = make_plan(["Pop"], ["tiny"], 1, config_dict=settings)
    add_rows(dataset_root, "u0\ti29\t5\t1")
    monkeypatch.setattr(
        leaderboard.children, "run_child", lambda _, folder, **__: job._work(folder)
    )
    leaderboard.run_leaderboard(plan, tmp_path / "out", show_progress=False)
    [folder] = (tmp_path / "out" / "runs").iterdir()
    assert not (folder / "run.json").exists()
    assert (
        "has changed since the command was started (data: " in (folder / "failed.json").read_text()
    )


def test_what_changed_is_named_and_nothing_is_said_where_nothing_did(settings):
    [run] = make_plan(["Pop"], ["tiny"], 1, config_dict=settings).runs
    config = {**run.key["config"], "model": "Pop", "dataset": "tiny"}
    config["data_path"] = str(Path(settings["data_path"]) / "tiny")
    job._require_the_same_inputs(config, run.key)
    with pytest.raises(GaCLLMError, match="started \\(code: "):
        job._require_the_same_inputs(config, {**run.key, "code": "other"})


# Committed runs


@pytest.mark.parametrize(
    ("page", "later"),  # concerns of which the runs have the last numbers, not the first
    [
        ("general/ml-100k.md", ()),
        ("cold/ml-100k.md", ("cold",)),
        ("llm-enhanced/ml-100k.md", ("peers",)),
        pytest.param("ablation/ml-100k.md", (), marks=pytest.mark.slow),
        pytest.param("sequential/ml-100k.md", ("times",), marks=pytest.mark.slow),
    ],
)
def test_the_command_of_a_committed_page_finds_every_committed_run(page, later, first_code):
    for line in identity.read_table():
        if line["concern"] in later:
            first_code[line["concern"]] = line["digest"]
    file = ROOT / "results" / page
    if not file.is_file():
        pytest.skip("results/ is not part of a source distribution")
    command = re.search(r"run_recbole_gacllm.py leaderboard ([^`]*)`", file.read_text())[1]
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in shlex.split(command))
    flags.pop("baseline", None)
    models, datasets, seeds = (flags.pop(name) for name in ("models", "datasets", "seeds"))
    protocol = flags.pop("protocol", "general")
    plan = make_plan(split_models(models), [datasets], int(seeds), protocol, config_dict=flags)
    with tarfile.open(file.with_name(f"{file.stem}-runs.tar.xz")) as archive:
        runs = {Path(name).parent.name for name in archive.getnames() if name.endswith("run.json")}
    assert {made.name for made in plan.runs} == runs

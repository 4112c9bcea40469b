"""The command line: its checks, its help, and the pages it prints."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import runpy
import select
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from recbole_gacllm.artifacts import manifests
from recbole_gacllm.cli import common
from recbole_gacllm.cli import main as cli
from recbole_gacllm.cli.main import main
from recbole_gacllm.convolution.graph import TrainGraph
from recbole_gacllm.convolution.layers import Layer
from recbole_gacllm.run_config import build_config
from tests.conftest import ROOT, fresh_process, run_python


@pytest.fixture
def described(tmp_path):
    """Finished descriptions of two users and three items, as the stages leave them."""
    root = tmp_path / "saved" / "gacllm" / "tiny"
    inputs, folder = root / "inputs-1", root / "descriptions-1"
    inputs.mkdir(parents=True)
    folder.mkdir()
    users, items = ["u1", "u2"], ["i1", "i2", "i3"]
    graph = TrainGraph(np.array(users), np.array(items), np.array([0, 0, 1]), np.array([0, 1, 1]))
    graph.save(inputs / "graph.npz")
    tokens = {"user": users, "item": items}
    raw = Layer.raw(tokens, {"user": ["A nurse.", "A farmer."], "item": ["Rain.", "Sun.", "Fog."]})
    raw.write(inputs / "layer_0.parquet")
    above = Layer.raw(
        tokens, {"user": ["Likes rain.", "A farmer."], "item": ["Wet.", "Dry.", "Grey."]}
    )
    above.statuses["user"] = ["generated", "failed"]
    above.reasons["user"] = ["", "empty"]
    above.write(folder / "layer_1.parquet")
    (inputs / "item_names.json").write_text(
        json.dumps({"i1": "Rain Man", "i2": "Sun", "i3": "Fog"})
    )
    job = {
        "inputs": str(inputs),
        "seed": 1,
        "options": {"neighbor_rule": "rare_first", "n_neighbors": 2},
    }
    (folder / "job.json").write_text(json.dumps(job))
    manifests.write_manifest(folder, {"stage": "descriptions"})
    return folder


@pytest.mark.parametrize(
    ("node", "pieces"),
    [
        (
            "--user=u1",
            ["layer 0 (raw)\n  A nurse.", "layer 1 (generated)\n  Likes rain.", "Rain Man. Rain."],
        ),
        ("--user=u2", ["layer 1 (failed)"]),
        ("--item=i2", ["item i2, Sun: 2 training interactions", "- u1: A nurse."]),
    ],
)
def test_describe_prints_every_layer_and_the_neighbours(described, capsys, node, pieces):
    main(["describe", "--dataset=tiny", node])
    out = capsys.readouterr().out
    places = [out.index(piece) for piece in pieces]
    assert places == sorted(places)
    assert "i3" not in out


@pytest.mark.parametrize(
    ("dataset", "message"), [("tiny", "no such user"), ("other", "Run GaCLLM on it first")]
)
def test_an_unknown_node_or_data_set_says_so(described, fails, dataset, message):
    assert message in fails("describe", f"--dataset={dataset}", "--user=u3")


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_export_writes_one_row_for_each_node_and_layer(described, tmp_path, suffix):
    main(["export-descriptions", "--dataset=tiny", f"--output=texts.{suffix}"])
    file = tmp_path / f"texts.{suffix}"
    frame = pd.read_parquet(file) if suffix == "parquet" else pd.read_csv(file)
    assert len(frame) == 10
    row = frame[(frame.side == "user") & (frame.token == "u1") & (frame.layer == 1)].iloc[0]
    assert (row.text, row.status) == ("Likes rain.", "generated")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset=ml-100k", "--epochs"], "'--epochs' is not of the form --key=value or"),
        (["--dataset", "ml-100k", "3"], "'3' is not of the form --key=value or --key value"),
        (["--dataset", "ml-100k", "--text_user_noun", "a=b"], "goes into a file"),
        (["import-descriptions", "a=b.csv", "--dataset=x"], "goes into a file"),
        (["--dataset=ml-100k", "--a=b=c"], "goes into a file"),
        (["--dataset=ml-100k", "--preset=qick"], "invalid choice: 'qick'"),
        (["--dataset=ml-100k", "--epochs=3", "--epochs=4"], "--epochs is given twice"),
        (["--dataset=ml-100k", "--dataset=ml-1m"], "--dataset is given twice"),
        (["audit", "x", "--seed=1", "--seed=2"], "--seed is given twice"),
        (["audit", "x", "--seed=abc"], "invalid int value: 'abc'"),
        (["leaderboard", "--models=Pop", "--datasets=x", "--seeds=many"], "invalid int value"),
        (["--model=BPR"], "--dataset"),
        (["leaderboard", "--model_list=BRP", "--datasets=ml-100k"], "model: 'BRP'"),
        (["leaderboard", "-m", "BRP:learning_rate=0.1", "-d", "ml-100k"], "model: 'BRP'"),
        (["leaderboard", "-m=BPR", "--baseline=EASE", "--dataset=ml-100k"], "baseline: 'EASE' is"),
        (["leaderboard", "-m=BPR", "-d=ml-100k", "--epochs"], "'--epochs' is not of the form"),
        (["describe", "--user=1"], "give either --dataset or --run"),
        (["export-descriptions", "--dataset=x", "--output=a.txt"], ".parquet, .csv, .jsonl"),
    ],
)
def test_a_wrong_command_line_is_refused_with_the_reason(arguments, message, fails):
    assert message in fails(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=LightGNC"], "model: 'LightGNC' is neither GaCLLM nor a model of RecBole"),
        (["--dataset=ml-100q"], "dataset: 'ml-100q' .* ml-100k"),
        (["--config_files=none.yaml"], "config_files: 'none.yaml' is not a file"),
        (["--llm_modle=x"], "unknown key 'llm_modle': did you mean llm_model"),
        (["--config_files=list.yaml"], "config_files: 'list.yaml' holds no lines of the form"),
        (["--config_files=bad.yaml"], "config_files: 'bad.yaml' is not yaml .* line 1"),
        (["--config_files=latin.yaml"], "config_files: 'latin.yaml' is not yaml in UTF-8"),
        (
            ["--embedding_size=many"],
            "embedding_size: 'many' is not allowed; it should be a valid integer",
        ),
        (["--model=BPR", "--seed=abc"], "seed: 'abc' .* must be a"),
        (["--nproc=0"], "--nproc: 0 is not allowed; give at least 1"),
        (["--seed=abc"], "seed: 'abc' .*must be a whole number"),
        (["--seed=1.5"], "seed: 1.5 .*must be a whole number"),
        (["--seed=-1"], "seed: -1 "),
        (["--seed=4294967296"], "seed: 4294967296 .*from 0 to 4294967295"),
        (["--model=BPR", "--embedding_size=true"], "embedding_size: True .*must be a number"),
        (["--model=LightGCN", "--n_layers=two"], "n_layers: 'two' .*must be a number"),
        (["--model=BPR", "--eval_args={'order':'XX'}"], "XX"),
    ],
)
def test_a_wrong_value_ends_in_one_line_before_any_stage(
    arguments, message, capsys, monkeypatch, tmp_path
):
    arguments = [*([] if "--dataset" in arguments[0] else ["--dataset=ml-100k"]), *arguments]
    monkeypatch.setattr(sys, "argv", ["run_recbole_gacllm.py", *arguments])
    Path("list.yaml").write_text("- a")
    Path("bad.yaml").write_text("a: [1")
    Path("latin.yaml").write_bytes(b"a: \xe4")
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(message, error)


def test_keys_travel_as_a_dict_and_the_command_line_of_the_process_is_not_read(
    settings, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["another.py", "--epochs=7", "--embedding_size=9"])
    config = build_config("BPR", "tiny", config_dict={**settings, "epochs": "3"})
    assert (config["epochs"], config["embedding_size"]) == (3, 8)
    assert sys.argv == ["another.py", "--epochs=7", "--embedding_size=9"]


def test_a_blank_stands_for_the_equals_sign_of_every_flag_with_one_value():
    parser = common.command_parser("x", "", "")
    parser.add_argument("file", nargs="?")
    parser.add_argument("--dataset")
    parser.add_argument("--answers", nargs="+")
    common.add_verbosity(parser)
    arguments = ["--dataset", "tiny", "--epochs", "3", "--quiet", "a.csv", "--k", "-1", "--b=2"]
    joined = ["--dataset=tiny", "--epochs=3", "--quiet", "a.csv", "--k=-1", "--b=2"]
    assert common.with_equals_signs(parser, arguments) == joined
    assert common.with_equals_signs(parser, joined) == joined
    known, keys = common.parse_with_keys(parser, [*arguments, "--answers", "x", "y"])
    assert (known.dataset, known.file, known.quiet) == ("tiny", "a.csv", True)
    assert known.answers == ["x", "y"]
    assert keys == {"epochs": "3", "k": "-1", "b": "2"}


def test_help_names_the_presets_and_the_other_commands_and_is_quick_to_load():
    code = (
        "import sys; from recbole_gacllm.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'recbole' not in sys.modules"
    )
    printed = run_python("-c", code)
    assert "{best,paper}" in printed
    assert "export-descriptions" in printed


COMMANDS = [
    *("leaderboard", "tune", "report", "describe", "audit", "export-descriptions"),
    *("import-descriptions", "export-embeddings"),
]


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_every_help_has_an_example_and_ends_with_code_0(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*filter(None, [command]), "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    example = out[out.index("example") :]
    assert f"recbole_gacllm{'.py' if 'run_recbole' in example else ''} {command or '--'}" in example


@pytest.mark.parametrize("failure", [None, ValueError])
def test_quiet_prints_the_result_alone_and_names_the_file_when_something_fails(
    tmp_path, capfd, failure
):
    raising = pytest.raises(failure) if failure else contextlib.nullcontext()
    with raising, common.quiet_output("name", quiet=True):
        print("result")
        os.write(2, b"from a library or a child\n")
        if failure:
            raise failure
    printed = capfd.readouterr()
    assert printed.out == "result\n"
    [file] = (tmp_path / "log").iterdir()
    named = f"what was not printed lies in log/{file.name}\n"
    assert printed.err == (named if failure else "")
    assert file.read_text() == "from a library or a child\n"


def run_on(terminal, no_color, command):
    """A command on a terminal, in a process that has loaded RecBole."""
    sys.stdout = sys.stderr = open(terminal, "w")  # noqa: SIM115  (until the process ends)
    for number in (1, 2):
        os.dup2(sys.stdout.fileno(), number)
    os.environ["NO_COLOR"] = no_color
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_no_color_leaves_no_escape_sequence_on_a_terminal(settings, tmp_path, no_color, coloured):
    """Under a pseudo-terminal, where RecBole colours its messages and bars."""
    import pty

    config = {key: value for key, value in settings.items() if key != "show_progress"}
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump({**config, "epochs": 1}))
    parent, child = pty.openpty()
    command = [str(ROOT / "run_recbole_gacllm.py"), "--model=Pop", "--dataset=tiny"]
    command.append("--config_files=keys.yaml")
    run = fresh_process(run_on, os.ttyname(child), no_color, command)
    output = b""
    while run.is_alive() or select.select([parent], [], [], 0)[0]:
        if select.select([parent], [], [], 0.05)[0]:
            output += os.read(parent, 65536)
    for end in (parent, child):
        os.close(end)
    assert run.exitcode == 0, output
    assert b"test result" in output
    assert (b"\x1b[1;3" in output) == coloured
    [run_file] = (tmp_path / "saved" / "runs").glob("*/run.json")
    assert json.loads(run_file.read_text())["command"] == command
    advice = f"python -m recbole_gacllm recommend {run_file.parent} --output=lists.csv"
    assert advice.encode() in output


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
@pytest.mark.parametrize("arguments", [["--dataset=ml-100k"], ["leaderboard", "--help"]])
def test_one_of_several_processes_of_a_launcher_is_refused(monkeypatch, fails, name, arguments):
    monkeypatch.setenv(name, "2")
    assert f"error: {name}=2: a launcher" in fails(*arguments)


def test_what_a_launcher_said_is_not_passed_on(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANKING", "kept")
    with pytest.raises(SystemExit):
        main(["--help"])
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    assert "ACCELERATE_MIXED_PRECISION" not in os.environ
    assert os.environ["RANKING"] == "kept"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOTDIR])
def test_a_place_that_cannot_be_used_is_one_line(monkeypatch, fails, number):
    def fail(_):
        raise OSError(number, os.strerror(number), "/somewhere")

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setitem(cli._COMMANDS, "audit", fail)
    message = f"error: [Errno {number}] {os.strerror(number)}: '/somewhere'. Free space or rights"
    assert fails("audit").startswith(message)

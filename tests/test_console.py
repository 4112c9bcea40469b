"""What reaches a terminal: nothing that it obeys, in any encoding; a closed pipe is no error."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_gacllm import console
from recbole_gacllm.cli.main import main
from recbole_gacllm.convolution.layers import Layer
from tests.test_cli import ROOT, described  # noqa: F401

# Clears the screen, renames the window, goes up a line, begins anew, turns the text around.
HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b1A\r\x08\u202egpj.exe\u2066\u2028\x00"
ARGUMENT = HOSTILE.replace("\0", "")  # no argument of a process can hold it
OVERRIDES = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def is_obeyed(char):
    hidden = unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") and char not in "\t\n"
    return hidden or unicodedata.bidirectional(char) in OVERRIDES


@given(st.text(st.characters(exclude_categories=())))
def test_no_character_that_a_terminal_obeys_is_left(text):
    shown = console.visible(text)
    assert not any(is_obeyed(char) or char == "\n" for char in shown)
    if not any(is_obeyed(char) or char == "\n" for char in text):
        assert shown == text


def test_what_is_hidden_is_shown_as_escapes():
    assert console.visible("a\x1b[31m\u202e\n\x9b\ud800") == r"a\x1b[31m\u202e\n\x9b\ud800"
    family, hebrew = "\U0001f468\u200d\U0001f469", "שלום\u200f"
    assert console.visible(f"é\t→ {family} {hebrew}") == f"é\t→ {family} {hebrew}"


@pytest.fixture
def hostile(described):  # noqa: F811
    """The descriptions of ``described`` with a hostile item, name, text and status."""
    inputs = described.parent / "inputs-1"
    for file in (inputs / "layer_0.parquet", described / "layer_1.parquet"):
        layer = Layer.read(file)
        layer.texts["item"][0] = layer.texts["user"][0] = f"A text {HOSTILE}."
        layer.reasons["user"][1] = HOSTILE
        layer.write(file)
    names = json.loads((inputs / "item_names.json").read_text())
    (inputs / "item_names.json").write_text(json.dumps({**names, "i1": f"Rain {HOSTILE}"}))
    return described


@pytest.mark.parametrize(
    "arguments",
    [
        ["describe", "--dataset=tiny", "--item=i1"],
        ["describe", "--dataset=tiny", "--user=u1"],
        ["audit"],
    ],
)
def test_names_texts_samples_and_reasons_show_their_escape_sequences(hostile, capsys, arguments):
    main([*arguments, str(hostile)] if arguments == ["audit"] else arguments)
    printed = capsys.readouterr().out
    assert not any(map(is_obeyed, printed))
    assert r"\x1b[2J\x1b]0;owned\x07\x9b1A" in printed


def test_an_error_is_one_line_without_escape_sequences(capsys):
    with pytest.raises(SystemExit):
        main(["describe", f"--dataset={ARGUMENT}\nerror: all is well", "--user=1"])
    printed = capsys.readouterr().err
    assert not any(map(is_obeyed, printed))
    assert printed.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["describe", "--dataset=x", f"--{ARGUMENT}"])
    assert not any(map(is_obeyed, capsys.readouterr().err))


def logged(name, *arguments):
    return console.VisibleRecord(name, logging.INFO, "file", 1, *arguments, None).getMessage()


def test_messages_of_the_log_are_visible_and_recboles_keep_their_colours():
    assert logged("recbole_gacllm.sft", "%s:\n%s", ("a", HOSTILE)).startswith("a:\n\\x1b[2J\\x1b]0")
    assert logged("recbole_gacllm.x", "\x1b[1;33mloss\x1b[0m", ()) == r"\x1b[1;33mloss\x1b[0m"
    text = logged("root", "\x1b[1;33mloss\x1b[0m %s", (HOSTILE,))
    assert text.startswith("\x1b[1;33mloss\x1b[0m \\x1b[2J\\x1b]0;")
    assert not any(map(is_obeyed, re.sub("\x1b\\[[0-9;]*m", "", text)))


def test_the_programs_log_records_are_visible_ones(capsys):
    before = logging.getLogRecordFactory()
    try:
        console.prepare()
        assert logging.getLogRecordFactory() is console.VisibleRecord
    finally:
        logging.setLogRecordFactory(before)


def run_program(arguments, **others):
    command = [sys.executable, "-m", "recbole_gacllm", *arguments]
    return subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, check=False, **others)


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    ("command", "encoding"), [("audit", ASCII), ("describe", {"PYTHONIOENCODING": "latin-1"})]
)
def test_no_encoding_is_an_error(described, command, encoding):  # noqa: F811
    inputs = described.parent / "inputs-1"
    layer = Layer.read(inputs / "layer_0.parquet")
    layer.texts["user"][0] = "喜欢 → die Oper"
    layer.write(inputs / "layer_0.parquet")
    arguments = {
        "audit": ["audit", str(described)],
        "describe": ["describe", f"--run={described}", "--user=u1"],
    }[command]
    done = run_program(arguments, stdout=subprocess.PIPE, env={**os.environ, **encoding})
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\u2192" in done.stdout


def test_a_log_file_in_another_encoding_is_no_error(tmp_path):
    code = (
        "import logging; from recbole_gacllm import console; console.prepare()\n"
        "logging.getLogger().addHandler(logging.FileHandler('log.txt'))\n"
        "logging.getLogger().warning('%s', '\\u559c \\u2192')"
    )
    command, env = [sys.executable, "-c", code], {**os.environ, **ASCII}
    done = subprocess.run(command, env=env, stderr=subprocess.PIPE, check=True)
    assert done.stderr == b""
    assert (tmp_path / "log.txt").read_bytes() == b"\\u559c \\u2192\n"


@pytest.mark.parametrize("command", ["--help", "audit"])
def test_a_reader_that_leaves_ends_the_program_quietly(described, command):  # noqa: F811
    reader, writer = os.pipe()
    os.close(reader)  # as `head -1` does, a moment later
    arguments = [command] if command == "--help" else [command, str(described)]
    done = run_program(arguments, stdout=writer)
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode == {"--help": 0, "audit": 141}[command]

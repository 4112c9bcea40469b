"""The report shows what strangers wrote as text: no element, attribute or folder comes from it."""

import json
import re
from pathlib import Path

import pytest

from recbole_gacllm.report import page
from recbole_gacllm.report.folders import paths_with_blanks, without_folders
from tests.test_report import Parsed, make_board, run_with_texts

REPORT = Path(page.__file__).parent


def payload(place):
    """What a browser would take for markup, for the end of a script, of an attribute, a comment."""
    return (
        f"{place} &amp;&lt;b&gt; \u2028 \\u003c {{{{ 7 * 7 }}}} ` '\"><hostile onhostile='x' "
        'onhostile="y">\u202e</script></style></title><script>hostile()</script><!-- x --> ]]>'
    )


def parsed(run, folder):
    return Parsed(page.write_report(run, folder / "page.html").read_text("utf-8"))


def kinds_of(html):
    """Elements with the names of their attributes."""
    return {(tag, frozenset(attributes)) for tag, attributes in html.elements}


def shown_places(html):
    """Names of the places whose payload is shown whole."""
    text = "\n".join(html.shown).casefold()
    places = re.findall(r"(\w+) &amp;&lt;b", text)
    assert all(payload(place).casefold() in text for place in places)
    return set(places)


def spoil_run(file):
    """Put payloads where a stranger's run, data and LLM can."""
    record = json.loads(file.read_text())
    for key in ("model", "dataset", "seed", "device"):
        record[key] = payload(key)
    record["versions"] = {payload("package"): payload("version"), "recbole": payload("recbole")}
    record["command"] = ["run.py", f"--x={payload('flag')}"]
    for key in ("eval_args", "llm_model", "topk", "encoder_model"):
        record["config"][key] = {payload(f"inner_{key}"): [payload(key)]}
    stage = record["stages"]["descriptions"]
    stage["backend_reason"] = payload("backend")
    stage["layers"][0]["failures"] = {payload("failure"): 2}
    for layer in record["description_quality"]:
        layer["number"] = payload("number")
        layer["sides"] = {payload(side): figures for side, figures in layer["sides"].items()}
        for figures in layer["sides"].values():
            figures["statuses"] = {payload("status"): 3}
            figures["languages"] = {payload("language"): 1.0}
    file.write_text(json.dumps(record))
    names = Path(record["artifacts"]["inputs"]) / "item_names.json"
    spoiled = {token: payload("title") for token in json.loads(names.read_text())}
    names.write_text(json.dumps(spoiled))
    # Within a field that does not begin with one, a quote is a character for pandas, too.
    items = Path(record["config"]["data_path"], "tiny.item")
    spoiled = items.read_text().replace("Horror", payload("genre"))
    items.write_text(spoiled.replace("class:token_seq", f"class {payload('field')}:token"))


IN_RUN = {
    *("model", "dataset", "seed", "device", "package", "version", "recbole", "flag", "backend"),
    *("inner_eval_args", "eval_args", "llm_model", "topk", "encoder_model", "failure", "number"),
    *("user", "item", "status", "language", "title", "field"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with texts, made once."""
    return run_with_texts(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """A finished leaderboard of two models, made once."""
    return make_board(tmp_path_factory.mktemp("board"), ["BPR", "Pop"], 1)


@pytest.fixture(scope="module")
def pages(run, board, tmp_path_factory):
    """What is parsed of the pages of the run and the board as they are, then spoiled."""
    folder = tmp_path_factory.mktemp("pages")
    clean = {path: parsed(path, folder) for path in (run, board)}
    spoil_run(run)
    spoil_board(board)
    return clean, {path: parsed(path, folder) for path in (run, board)}


def spoil_board(folder):
    """The same in a leaderboard: names of models and data sets, protocol, keys, errors."""
    for file in (folder / "leaderboard.json", *folder.glob("runs/*/run.json")):
        text = file.read_text()
        for name, place in (("Pop", "model"), ("tiny", "dataset")):
            text = text.replace(f'"{name}"', json.dumps(payload(place)))
        inner = [json.dumps(payload(place))[1:-1] for place in ("dataset", "model")]
        text = text.replace("tiny/BPR", f"{inner[0]}/BPR").replace("tiny/Pop", "/".join(inner))
        file.write_text(text)
    file = folder / "leaderboard.json"
    made = json.loads(file.read_text())
    made["protocol"] = payload("protocol")
    made["given"] = {payload("key"): payload("value")}
    failed = folder / "runs" / "failed"
    failed.mkdir()
    error = {key: payload(key) for key in ("model", "dataset", "seed", "error", "log")}
    (failed / "failed.json").write_text(json.dumps(error))
    made["runs"].append("failed")
    file.write_text(json.dumps(made))


IN_BOARD = {"model", "dataset", "protocol", "key", "value", "seed", "error"}


def test_nothing_that_a_stranger_wrote_becomes_an_element_or_an_attribute(pages, run, board):
    clean, spoiled = pages
    for path, places in ((run, IN_RUN), (board, IN_BOARD)):
        assert kinds_of(spoiled[path]) <= kinds_of(clean[path]) | {("ul", frozenset())}
        assert [tag for tag, _ in spoiled[path].elements].count("script") == 2
        assert spoiled[path].comments == []
        assert places <= shown_places(spoiled[path])


def test_without_autoescape_it_would(pages, run, board, tmp_path, monkeypatch):
    engine = page._environment

    def careless(*arguments):
        environment = engine(*arguments)
        environment.autoescape = False
        return environment

    monkeypatch.setattr(page, "_environment", careless)
    for path in (run, board):
        assert "hostile" in {tag for tag, _ in parsed(path, tmp_path).elements}


def test_html_is_written_by_templates_only_and_no_text_is_declared_safe():
    for file in REPORT.rglob("*"):
        if file.suffix == ".py":
            assert not re.search(r"</?[a-z]+[ >]", file.read_text("utf-8")), file.name
            allowed = 3 if file.name == "page.py" else 0  # style, script, base64
            assert file.read_text("utf-8").count("Markup(") == allowed, file.name
        elif file.suffix == ".html":
            text = file.read_text("utf-8")
            assert not re.search(r"\|\s*safe|autoescape|xmlattr", text), file.name
            assert not re.search(r"=\{\{|='", text), f"{file.name}: an attribute without quotes"


def test_the_browsers_script_writes_text_only():
    script = (REPORT / "browser.js").read_text("utf-8")
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|srcdoc|eval\(|Function\("
    assert not re.search(ways, script)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("there is no /home/anna/saved/x.pth", "there is no …/x.pth"),
        ("[Errno 2] No such file: '/home/anna/x.pth'", "[Errno 2] No such file: '…/x.pth'"),
        ("/home/anna", "…/"),
        ("no folder /Users/anna/.", "no folder …/."),
        ("--llm_model=/models/llama/8b", "--llm_model=…/8b"),
        ("--config_files=/a/b.yaml /a/c.yaml", "--config_files=…/b.yaml …/c.yaml"),
        ("~/models/x and ~anna/models/y", "…/x and …/y"),
        (r"C:\Users\anna\models\x.bin, gone", "…/x.bin, gone"),
        ("file:///srv/data/x.inter", "…/x.inter"),
        ("['/srv/a/b', \"/srv/c/d\"]", "['…/b', \"…/d\"]"),
        ("saved/runs/x and ./a/b and ../c/d", "saved/runs/x and ./a/b and ../c/d"),
        ("https://host:8000/v1/models", "https://host:8000/v1/models"),
        ("Sci-Fi/Fantasy/Drama, 3 / 4 / 5, AC/DC", "Sci-Fi/Fantasy/Drama, 3 / 4 / 5, AC/DC"),
        (7, 7),
    ],
)
def test_the_folders_of_an_absolute_path_are_left_out(text, shown):
    assert without_folders(text) == shown


def test_a_path_with_blanks_is_known_from_the_record():
    paths = paths_with_blanks({"a": ["/home/Anna B/x y", "--z=/srv/c d/e", "no path at all"]})
    assert without_folders("no /home/Anna B/x y/z; /srv/c d/e", paths) == "no …/x y/z; …/e"


def test_the_pages_show_no_folder_of_the_machine(pages, run, tmp_path):
    record = json.loads(run.read_text())
    record["config"]["llm_model"] = f"{tmp_path}/a model"
    record["command"] = ["/usr/bin/run.py", f"--config_files={tmp_path}/a.yaml"]
    record["checkpoint"] = f"{tmp_path}/gone.pth"
    record["stages"]["descriptions"]["backend_reason"] = f"no compiler in {tmp_path}/bin"
    run.write_text(json.dumps(record))
    text = "\n".join(parsed(run, tmp_path).shown)
    for name in ("gone.pth", "a model", "a.yaml", "bin", "run.py"):
        assert f"…/{name}" in text or name == "run.py"
    for spoiled in (text, *("\n".join(html.shown) for html in pages[1].values())):
        assert str(tmp_path) not in spoiled
        assert str(Path(run).parent) not in spoiled
        assert "/usr/bin" not in spoiled

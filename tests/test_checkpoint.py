"""A stranger's checkpoint and configuration: weights are read, nothing in them is run."""

import io
import json
import os
import pickle
import re
import socket
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from recbole_gacllm import run as runner
from recbole_gacllm.artifacts.checkpoint import no_pickles, read_weights
from recbole_gacllm.artifacts.locate import RunFiles
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.inspection.opened import open_run
from recbole_gacllm.report.source import Source


class Harm:
    """What a hostile pickle holds: a call that leaves a file behind."""

    def __reduce__(self):
        return os.mkdir, ("harmed",)


def harmed():
    return Path("harmed").exists()


MODELS = {
    "BPR": {},
    "LightGCN": {"n_layers": 1},
    "EASE": {},
    "ItemKNN": {},
    "Pop": {},
    "SASRec": {"loss_type": "CE", "n_layers": 1, "n_heads": 1, "hidden_size": 8},
    "GRU4RecF": {"loss_type": "CE", "selected_features": ["class"], "hidden_size": 8},
}


@pytest.mark.filterwarnings("ignore:using .* in Series.agg:FutureWarning")  # RecBole's token_seq
@pytest.mark.parametrize("model", MODELS)
def test_a_run_is_scored_again_without_its_pickle(settings, model, monkeypatch):
    keys = settings | MODELS[model]
    if model == "GRU4RecF":
        keys["load_col"] = settings["load_col"] | {"item": ["item_id", "class"]}
    file = runner.run(model, "tiny", config_dict=keys).run_file
    record = json.loads(file.read_text())
    whole = torch.load(record["checkpoint"], weights_only=False, map_location="cpu")
    state, others = read_weights(Path(record["checkpoint"]))
    assert list(state) == list(whole["state_dict"])
    for name, value in state.items():
        assert torch.equal(value, whole["state_dict"][name])
    for name, value in others.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, whole["other_parameter"][name])
    monkeypatch.setattr(pickle, "load", None)
    scored = Source.read(file).scored
    assert not isinstance(scored, str), scored
    for name, value in record["test"].items():
        assert scored.test[name].mean() == pytest.approx(value, abs=1e-4)


def checkpoint_of(tmp_path, **entries):
    file = tmp_path / "hostile.pth"
    whole = {"state_dict": OrderedDict(w=torch.ones(2)), "other_parameter": {}, "config": None}
    torch.save({**whole, **entries}, file, pickle_protocol=4)
    return file


@pytest.mark.parametrize(
    "entries",
    [
        {"config": Harm()},
        {"other_parameter": {"cache": Harm(), "kept": torch.zeros(3)}},
        {"other_parameter": {"cache": [{"deep": (Harm(),)}], "kept": torch.zeros(3)}},
        {"optimizer": [Harm()]},
    ],
)
def test_a_call_in_a_checkpoint_is_not_made(tmp_path, entries):
    file = checkpoint_of(tmp_path, **entries)
    state, others = read_weights(file)
    assert state["w"].tolist() == [1, 1]
    assert "cache" not in others
    assert not harmed()
    torch.load(file, weights_only=False)
    assert harmed(), "the test's pickle is harmless"


@pytest.mark.parametrize("entries", [{"state_dict": {"w": Harm()}}, {"state_dict": Harm()}])
def test_weights_that_are_no_tensors_are_refused(tmp_path, entries):
    with pytest.raises(GaCLLMError, match="is not a checkpoint of RecBole"):
        read_weights(checkpoint_of(tmp_path, **entries))
    assert not harmed()


def zipped(content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x/data.pkl", content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        pickle.dumps(Harm()),
        zipped(b""),
        zipped(pickle.dumps(Harm())),
        zipped(pickle.dumps({"state_dict": 3})),
        zipped(b"cos\nsystem\n(S'mkdir harmed'\ntR."),
        zipped(b"(S'mkdir harmed'\nios\nsystem\n."),
        zipped(b"Pkey\n."),
        zipped(pickle.dumps([1]))[:40],
    ],
    ids=range(10),  # a zip file has the time in it
)
def test_what_is_no_checkpoint_ends_in_one_error(tmp_path, content):
    file = tmp_path / "x.pth"
    file.write_bytes(content)
    with pytest.raises(GaCLLMError, match=rf"{file} is not a checkpoint of RecBole"):
        read_weights(file)
    assert not harmed()


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    file = checkpoint_of(tmp_path)
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content[:4] if name.endswith("/data/0") else content)
    with pytest.raises(GaCLLMError, match="out of bounds"):
        read_weights(file)


def test_an_opened_run_has_its_record_split_and_weights_and_leaves_nothing_behind(
    settings, tmp_path
):
    file = runner.run("BPR", "tiny", config_dict=settings).run_file
    before = sorted(tmp_path.rglob("*"))
    run = open_run(RunFiles.read(file.parent))
    assert sorted(tmp_path.rglob("*")) == before
    assert run.files.record["model"] == run.config["model"] == type(run.model).__name__ == "BPR"
    assert len(run.valid._dataset) == len(run.test._dataset) == 24
    assert len(run.train._dataset) == 24 * 8
    state, _ = read_weights(run.files.checkpoint())
    assert torch.equal(run.model.user_embedding.weight, state["user_embedding.weight"])
    assert not Path(run.config["checkpoint_dir"]).exists()


@pytest.fixture
def bpr(settings, tmp_path):
    """A finished run of BPR; gives what reports about it after a change of its run.json."""
    file = runner.run("BPR", "tiny", config_dict=settings).run_file

    def scored(**keys):
        record = json.loads(file.read_text())
        changed = {**record, "config": record["config"] | keys}
        file.write_text(json.dumps(changed))
        result = Source.read(file).scored
        file.write_text(json.dumps(record))
        return result

    return scored


@pytest.mark.parametrize("key", ["dataset_save_path", "dataloaders_save_path"])
def test_caches_that_a_configuration_names_are_not_read(bpr, tmp_path, key):
    cache = tmp_path / "cache.pth"
    cache.write_bytes(pickle.dumps(Harm()))
    assert not isinstance(bpr(**{key: str(cache)}), str)
    assert not harmed()


def test_caches_in_the_checkpoint_folder_are_not_read_and_the_folder_is_not_made(bpr, tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name in ("tiny-Dataset.pth", "tiny-for-BPR-dataloader.pth"):
        (folder / name).write_bytes(pickle.dumps(Harm()))
    assert not isinstance(bpr(checkpoint_dir=str(folder)), str)
    assert not isinstance(bpr(checkpoint_dir=str(tmp_path / "new")), str)
    assert not harmed()
    assert not (tmp_path / "new").exists()


def test_pretrained_weights_that_a_configuration_names_are_not_unpickled(bpr, tmp_path):
    file = tmp_path / "mf.pth"
    torch.save({"state_dict": Harm()}, file)
    keys = {"model": "NeuMF", "use_pretrain": True, "mf_pretrain_path": str(file)}
    keys |= {"mf_embedding_size": 8, "mlp_embedding_size": 8, "mlp_hidden_size": [8]}
    keys |= {"dropout_prob": 0.1, "mf_train": True, "mlp_train": True}
    keys |= {"mlp_pretrain_path": str(file)}
    assert re.search(r"a pickle that asks for \w+\.mkdir", bpr(**keys))
    assert not harmed()


def test_a_configuration_joins_no_group_and_downloads_nothing(bpr, tmp_path):
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        listener.listen()
        listener.settimeout(0)
        group = {"local_rank": 1, "world_size": 2, "nproc": 2, "offset": 0, "ip": "localhost"}
        assert not isinstance(bpr(**group, port=listener.getsockname()[1]), str)
        with pytest.raises(BlockingIOError):
            listener.accept()
    gone = tmp_path / "gone"
    assert bpr(data_path=str(gone)) == f"the data is gone: there is no {gone}"
    assert not gone.exists()


def test_pickles_are_refused_only_while_a_run_is_read():
    content = pickle.dumps(OrderedDict(a=1))
    expected = r"a pickle that asks for collections\.OrderedDict"
    with pytest.raises(GaCLLMError, match=expected), no_pickles():
        pickle.loads(content)
    assert pickle.loads(content) == {"a": 1}

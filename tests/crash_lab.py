"""A workshop that starts the preprocessing hook over and over, to be killed at chosen moments.

Importing what the stages need takes seconds, a stage of a tiny model takes less. So one process
imports once, keeps to one thread, and forks every run and, in the run, every stage: the same
functions as in a real run, with ``fork`` in the place of a new interpreter. As a subreaper it waits
for all that a run left behind before it answers.
"""

import contextlib
import ctypes
import errno
import gc
import json
import mmap
import multiprocessing
import os
import re
import signal
import sqlite3
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import recbole_gacllm  # noqa: F401  (hides broken torchvision before transformers is imported)

import torch  # isort: skip
import transformers  # isort: skip

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: orphans of a run become ours
_POLL_SECONDS = 0.001


class Lab:
    """The test's side: a workshop in a process of its own."""

    def __init__(self, log):
        from .conftest import fresh_process

        self._log = log
        self._jobs, others = multiprocessing.Pipe()
        with others:
            self._process = fresh_process(work, others, log)

    def run(self, keys, data, record, **how):
        """Run the hook once.

        Args:
            keys: That differ from the defaults.
            data: Folder of the data set, ``data/tiny/tiny.inter`` and so on.
            record: Gets a line for each request to the LLM, update of SFT, text encoded, event.
            how: ``kill``: ``{"stage", "after", "whom"}`` or ``{"event", "nth"}``; ``full_at``: a
                pattern of events at which the disk is full.

        Returns:
            ``status`` (``done``, ``killed`` or ``error``), ``stage`` and ``event`` that it was in,
            ``error`` with ``type`` and text, ``seconds`` of each stage.
        """
        self._jobs.send({"keys": keys, "data": str(data), "record": str(record), **how})
        try:
            return self._jobs.recv()
        except EOFError:
            raise AssertionError(f"the workshop died; see {self._log}") from None

    def close(self):
        self._process.kill()
        self._process.join()
        self._jobs.close()


def save_tiny_encoder(folder):
    """A random BERT of one layer with a tokenizer of bytes."""
    import torch
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    from .conftest import byte_tokenizer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), pad_token="<|pad|>", model_max_length=256
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def training_data(data):
    """All interactions of the data set ``tiny`` as training edges."""
    import pandas as pd

    from recbole_gacllm.convolution.graph import TrainGraph
    from recbole_gacllm.inputs import TrainingData

    frame = pd.read_csv(data / "tiny" / "tiny.inter", sep="\t")
    users, user_tokens = pd.factorize(frame["user_id:token"])
    items, item_tokens = pd.factorize(frame["item_id:token"])
    return TrainingData(
        dataset="tiny",
        graph=TrainGraph(
            user_tokens=user_tokens.to_numpy(dtype=str),
            item_tokens=item_tokens.to_numpy(dtype=str),
            users=users,
            items=items,
            timestamps=frame["timestamp:float"].to_numpy(dtype=float),
        ),
        feature_files={
            "user": data / "tiny" / "tiny.user",
            "item": data / "tiny" / "tiny.item",
        },
        id_fields={"user": "user_id", "item": "item_id"},
        field_separator="\t",
        seq_separator=" ",
        encoding="utf-8",
        seed=2020,
        show_progress=False,
    )


def prepare(keys, data):
    """The hook, as ``GaCLLM.__init__`` calls it."""
    from recbole_gacllm import estimate, pipeline
    from recbole_gacllm.config import GaCLLMConfig, model_defaults

    estimate._require_room = lambda *_: None  # some runs here must meet a full disk
    pipeline.prepare(GaCLLMConfig.from_mapping({**model_defaults(), **keys}), training_data(data))


class _Shared:
    """What a run's processes and the workshop tell each other: memory that forks share."""

    def __init__(self):
        self._memory = mmap.mmap(-1, 4096)

    def put(self, **values):
        content = json.dumps({**self.get(), **values}).encode().ljust(4096, b" ")
        self._memory[:] = content

    def get(self):
        text = self._memory[:].decode().strip(" \0")
        try:
            values = json.loads(text) if text else {}
        except ValueError:  # read while it was written
            return {}
        return values

    def clear(self):
        self._memory[:] = b" " * 4096


class _Run:
    """A run's side: events, kills, and forks in the place of new interpreters."""

    def __init__(self, job, shared):
        self.shared = shared
        self.root = str(job["keys"]["artifact_dir"])
        self.record = job["record"]
        self.kill = job.get("kill") or {}
        self.full_at = job.get("full_at")
        self.counts = Counter()
        self.leader = os.getpid()
        self.stage = "inputs"

    def note(self, kind, value):
        line = json.dumps([self.stage, kind, value]) + "\n"
        descriptor = os.open(self.record, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, line.encode())
        os.close(descriptor)

    def event(self, what):
        """Something is about to happen on the disk; the moment of an exact kill."""
        name = f"{self.stage}: {what}"
        self.counts[name] += 1
        self.note("event", what)
        if self.kill.get("event") == name and self.kill["nth"] == self.counts[name]:
            self.shared.put(stage=self.stage, event=name)
            os.kill(self.leader, signal.SIGKILL)
            os.killpg(0, signal.SIGKILL)
        if self.full_at is not None and re.search(self.full_at, name):
            self.shared.put(stage=self.stage, event=name)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def enter(self, stage):
        self.stage = stage
        self.counts.clear()
        self.shared.put(stage=stage, child=os.getpid())

    def watch(self):
        """Make events of all that touches the artefacts."""
        fsync = os.fsync

        def audit(event, args):
            if event == "open" and isinstance(args[0], (str, os.PathLike)):
                writes = args[2] & (os.O_WRONLY | os.O_RDWR) if len(args) > 2 else 0
                if writes:
                    self._touch("write", args[0])
            elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
                self._touch(event[3:], args[1 if event == "os.rename" else 0])

        def synced(descriptor):
            self._touch("sync", os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        sys.addaudithook(audit)
        os.fsync = synced

    def _touch(self, how, path):
        path = os.fspath(path)
        if isinstance(path, str) and path.startswith(self.root) and not path.endswith(".lock"):
            name = os.path.basename(path) if path != self.root else "root"
            name = re.sub(r"[0-9a-f]{16,}", "#", name)
            self.event(f"{how} {re.sub('checkpoint-[0-9]+', 'checkpoint', name)}")

    def fork_stages(self):
        """Let ``run_child`` fork, and let the stages tell what they generate, learn, encode."""
        from recbole_gacllm import stage
        from recbole_gacllm.alignment.encoder import TextEncoder
        from recbole_gacllm.artifacts import children
        from recbole_gacllm.convolution import convolution, setup
        from recbole_gacllm.convolution.store import DescriptionStore
        from recbole_gacllm.sft import trainer

        run = self
        # A tiny layer takes less time than a real run lets pass between two writes.
        assert convolution._BATCH_SECONDS > 0
        convolution._BATCH, convolution._BATCH_SECONDS = 4, 0.0

        class Forked:
            """The part of ``subprocess.Popen`` that ``run_child`` needs."""

            def __init__(self, command, stdin, **_):
                self.returncode = None
                self.pid = os.fork()
                if self.pid == 0:
                    _end(lambda: self._be_a_stage(command, stdin))
                os.setpgid(self.pid, self.pid)

            def _be_a_stage(self, command, stdin):
                os.setpgid(0, 0)
                os.dup2(stdin, 0)
                os.closerange(3, 1024)
                run.enter(command[3])
                stage.main(command[3], Path(command[4]), *command[5:])

            def wait(self):
                if self.returncode is None:
                    status = os.waitpid(self.pid, 0)[1]
                    self.returncode = os.waitstatus_to_exitcode(status)
                    run.enter("between")
                return self.returncode

        class Popen:
            Popen = Forked

        children.subprocess = Popen
        open_generator = setup.open_generator

        def opened(*args, **keys):
            generator = open_generator(*args, **keys)
            generate = generator.generate

            def noting(requests):
                def noted():
                    for request in requests:
                        run.note("request", request.id)
                        yield request

                return generate(noted())

            generator.generate = noting
            return generator

        setup.open_generator = opened
        put_many = DescriptionStore.put_many

        def putting(store, *arguments):
            with contextlib.suppress(sqlite3.ProgrammingError):  # closed: it was damaged
                store._db.set_trace_callback(lambda sql: run.event(f"sql {sql.split()[0]}"))
            return put_many(store, *arguments)

        DescriptionStore.put_many = putting
        on_log = trainer.Progress.on_log

        def logging_update(self, args, state, control, **keys):
            if "loss" in state.log_history[-1]:  # and not the summary at the end
                run.note("update", state.global_step)
            on_log(self, args, state, control, **keys)

        trainer.Progress.on_log = logging_update
        encode = TextEncoder._encode

        def encoding(self, texts, *more):
            run.note("encode", len(texts))
            return encode(self, texts, *more)

        TextEncoder._encode = encoding


def _end(body):
    """Run the body of a forked process and end it, without what the workshop has on its stack."""
    code = 1
    try:
        body()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _lead(job, shared, answer):
    os.setpgid(0, 0)
    with open(os.devnull, "rb") as empty:
        os.dup2(empty.fileno(), 0)
    run = _Run(job, shared)
    run.fork_stages()
    run.watch()
    try:
        prepare(job["keys"], Path(job["data"]))
    except Exception as error:
        from recbole_gacllm.errors import GaCLLMError

        known = type(error) is ValueError or isinstance(error, GaCLLMError)
        text = {"type": type(error).__name__, "error": str(error), "known": known}
        os.write(answer, json.dumps(text).encode()[:60_000])
        if not known:
            raise
        sys.exit(1)


def _supervise(leader, kill, shared):
    """Wait for a run's end, or end it; returns the seconds of each stage, and whether it did."""
    killed = False
    seconds = Counter()
    began = last = time.monotonic()
    stage, entered = "inputs", began
    while os.waitid(os.P_PID, leader, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        time.sleep(_POLL_SECONDS)
        now = time.monotonic()
        seconds[stage] += now - last
        last = now
        told = shared.get()
        if told.get("stage", stage) != stage:
            stage, entered = told["stage"], now
        if kill.get("stage") == stage and now - entered >= kill["after"] and "event" not in kill:
            killed = True
            child = told.get("child") if stage not in ("inputs", "between") else None
            if kill["whom"] != "stage" or child is None:
                os.kill(leader, signal.SIGKILL)
            if kill["whom"] != "leader" and child is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
            os.waitid(os.P_PID, leader, os.WEXITED | os.WNOWAIT)
    return dict(seconds), killed


def _do(job, shared):
    shared.clear()
    Path(job["record"]).write_text("")
    read, write = os.pipe()
    leader = os.fork()
    if leader == 0:
        os.close(read)
        _end(lambda: _lead(job, shared, write))
    os.close(write)
    seconds, killed = _supervise(leader, job.get("kill") or {}, shared)
    code = os.waitstatus_to_exitcode(os.waitpid(leader, 0)[1])
    while True:  # guards and orphaned stages
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
    with open(read, "rb") as pipe:
        sent = pipe.read()
    told = shared.get()
    answer = {"seconds": seconds, "stage": told.get("stage", ""), "event": told.get("event", "")}
    if killed or code == -signal.SIGKILL:
        return {**answer, "status": "killed"}
    if code == 0:
        return {**answer, "status": "done"}
    return {**answer, "status": "error", **(json.loads(sent) if sent else {"error": "none told"})}


def work(jobs, log):
    """The workshop's side: an answer to each job."""
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    for name in ("AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM", "BertModel"):
        getattr(transformers, name)  # they load when they are first asked for
    gc.freeze()  # no fork copies these objects to count them
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    shared = _Shared()
    with contextlib.suppress(EOFError):  # nobody asks any more
        while True:
            jobs.send(_do(jobs.recv(), shared))

"""Where train.py runs: threads, compilers, file systems, streams, and several processes."""

import errno
import json
import os
import re
import sys
import tempfile
import types
from pathlib import Path

import pytest
import torch
from conftest import BESIDE, PROGRAMS, TINY, call, checkpoint, log, losses

import train

CPU = torch.device("cpu")

# Threads ------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """A machine of four cores, of which this process is given machine.share; it counts
    machine.threads, and machine.seconds that were spent looking."""
    machine = types.SimpleNamespace(threads=4, share=4.0, seconds=0.0)

    def set_threads(number):
        machine.threads = number

    def work(x):
        machine.seconds += 0.01

    clock = types.SimpleNamespace(
        perf_counter=lambda: machine.seconds,
        process_time=lambda: machine.share * machine.seconds,
    )
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(train, "CORES", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: machine.threads)
    monkeypatch.setattr(torch, "set_num_threads", set_threads)
    monkeypatch.setattr(torch.Tensor, "sin_", work)
    monkeypatch.setattr(train, "time", clock)
    return machine


@pytest.mark.parametrize("share,threads", [(3.9, 4), (2.9, 3), (2.0, 2), (0.4, 1)])
def test_as_many_threads_as_cores_that_are_free(machine, capsys, share, threads):
    machine.share = share
    train.choose_device("cpu")
    assert machine.threads == threads
    said = (
        f"using {threads} of 4 threads, for other programs keep the CPU busy; set OMP_NUM_THREADS "
        "to change that\n"
    )
    assert capsys.readouterr().err == ("" if threads == 4 else said)


@pytest.mark.parametrize("share,seconds", [(4.0, 0.1), (2.0, 0.3)])
def test_it_looks_longer_only_where_something_else_is_busy(machine, share, seconds):
    machine.share = share
    train.choose_device("cpu")
    assert machine.seconds == pytest.approx(seconds, abs=0.02)


def test_a_later_run_in_the_same_process_counts_all_cores_again(machine):
    train.choose_threads(1)
    assert machine.threads == 1
    train.choose_threads()
    assert machine.threads == 4


@pytest.mark.parametrize("wanted,taken", [(3, 3), (9, 4)])
def test_a_number_of_threads_that_is_given_is_taken_if_there_are_cores(machine, wanted, taken):
    machine.share = 1.0
    train.choose_threads(wanted)
    assert machine.threads == taken and machine.seconds == 0


def threads_of(out):
    return checkpoint(out)["train_config"]["threads"]


def test_a_run_keeps_its_number_of_threads(machine, folder, monkeypatch):
    monkeypatch.setattr(train, "free_cores", lambda: 3)
    assert call("train", *TINY, "--out=out/new") is None
    assert threads_of("out/new") == 3
    monkeypatch.setattr(train, "free_cores", lambda: 1)
    assert call("train", "--resume", "--out=out/new", "--max_steps=7") is None
    assert threads_of("out/new") == machine.threads == 3
    assert call("train", "--resume", "--out=out/new", "--max_steps=8", "--threads=2") is None
    assert threads_of("out/new") == machine.threads == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert call("train", "--resume", "--out=out/new", "--max_steps=9") is None
    assert threads_of("out/new") == machine.threads == 4


# Compilers ----------------------------------------------------------------------------------------


def without_a_compiler(function):
    def fail(*args):
        raise RuntimeError("Cannot find a working triton installation\nand much more")

    return fail


def test_a_compiler_that_is_missing_is_a_sentence_where_it_is_wanted(folder, monkeypatch):
    monkeypatch.setattr(torch, "compile", without_a_compiler)
    sentence = call("train", *TINY, "--compile", "--out=out/new")
    assert sentence.endswith(
        "--compile cannot be used here (Cannot find a working triton installation); "
        "take --no-compile"
    )
    assert not Path("out/new").exists()


def test_a_compiler_that_is_missing_is_a_line_where_it_is_only_the_default(monkeypatch, capsys):
    """Which it is with CUDA; here a device passes for that."""
    monkeypatch.setattr(torch, "compile", without_a_compiler)
    monkeypatch.setattr(torch, "ones", lambda *size, device: None)
    model = torch.nn.Linear(1, 1)
    assert train.compile_model(model, None, torch.device("cuda")) is model
    assert capsys.readouterr().out == (
        "training without torch.compile, which cannot be used here (Cannot find a working triton "
        "installation)\n"
    )


def test_a_compiled_model_is_used(folder, monkeypatch):
    calls = []

    def compiled(function):
        def run(*args):
            calls.append(function)
            return function(*args)

        if isinstance(function, torch.nn.Module):
            run.parameters = function.parameters
        return run

    monkeypatch.setattr(torch, "compile", compiled)
    assert call("train", *TINY, "--compile", "--out=out/new") is None
    assert len(calls) == 1 + 6, "a trial, and six steps"
    assert losses("out/new") == losses("out/run")


@pytest.mark.parametrize("wanted", [None, False])
def test_a_cpu_compiles_only_what_is_wanted(monkeypatch, wanted):
    monkeypatch.setattr(torch, "compile", None)
    model = torch.nn.Linear(1, 1)
    assert train.compile_model(model, wanted, CPU) is model


# File systems -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO])
def test_where_files_cannot_be_locked_runs_train_and_go_on(folder, monkeypatch, number):
    """As on many file systems that machines share."""

    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(train.fcntl, "flock", fail)
    assert call("train", *TINY, "--out=out/new") is None
    assert call("train", "--resume", "--out=out/new", "--max_steps=7") is None
    assert len(losses("out/new")) == 7


def test_the_lock_lies_in_the_systems_temporary_folder(folder, monkeypatch):
    """Named after the run's folder, by whatever path that is reached."""
    Path("tmp").mkdir()
    Path("link").symlink_to("out")
    monkeypatch.setattr(tempfile, "tempdir", str(Path("tmp").resolve()))
    for out in "out/run", "out/../out/run", "link/run", Path("out/run").resolve():
        assert call("train", "--resume", f"--out={out}") is None
    assert len(list(Path("tmp").glob("*.lock"))) == 1
    assert not any("lock" in path.name for path in Path("out/run").iterdir())
    assert call("train", *TINY, "--out=out/other") is None
    assert len(list(Path("tmp").glob("*.lock"))) == 2


def test_windows_locks_by_its_own_means(folder, monkeypatch):
    taken = []

    def locking(number, mode, count):
        if taken:
            raise PermissionError(errno.EACCES, "Permission denied")
        taken.append(mode)

    windows = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
    monkeypatch.setattr(train, "msvcrt", windows, raising=False)
    monkeypatch.setattr(train, "fcntl", None)
    assert call("train", "--resume", "--out=out/run", "--max_steps=7") is None
    assert taken == [2]
    assert "in use by another process" in call("train", "--resume", "--out=out/run")


@pytest.mark.parametrize("name", ["$a$^$", "two words; #'", os.fsdecode(b"\xff")])
def test_folders_of_any_name(folder, capsys, name):
    sys.stderr.reconfigure(errors="backslashreplace")  # as it is outside of tests
    assert call("train", *TINY, f"--out=out/{name}") is None
    assert call("train", "--resume", f"--out=out/{name}", "--max_steps=7") is None
    assert len(losses(Path("out", name))) == 7


# Streams ------------------------------------------------------------------------------------------

BESIDE["ascii"] = PROGRAMS / "ascii.py"


def test_where_everything_is_ascii(answer):
    """Files are UTF-8 nevertheless; on the screen, what is not ASCII is a question mark."""
    shown = answer("ascii")
    assert "?" in shown and shown.isascii()


# Several processes --------------------------------------------------------------------------------

LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "mpiexec": ("PMI_RANK", "PMI_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
}


@pytest.fixture
def alone(monkeypatch):
    """No launcher has left anything."""
    for name in [name for names in LAUNCHERS.values() for name in names]:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_say_which_of_how_many_a_process_is(alone, monkeypatch, launcher):
    assert train.rank_and_world() == (0, 1)
    rank, world = LAUNCHERS[launcher]
    monkeypatch.setenv(rank, "3")
    monkeypatch.setenv(world, "4")
    assert train.rank_and_world() == (3, 4)


def test_torchrun_under_srun_counts(alone, monkeypatch):
    """srun starts one torchrun on each machine, and that starts the processes."""
    for name, value in ("SLURM_PROCID", "1"), ("SLURM_STEP_NUM_TASKS", "2"):
        monkeypatch.setenv(name, value)
    for name, value in ("RANK", "5"), ("WORLD_SIZE", "8"):
        monkeypatch.setenv(name, value)
    assert train.rank_and_world() == (5, 8)


def test_processes_that_cannot_meet_are_refused(folder, monkeypatch):
    """Each would train a run of its own, and nobody would know."""
    monkeypatch.setattr(train, "RANK", 1)
    monkeypatch.setattr(train, "WORLD", 2)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    sentence = call("train", *TINY, "--out=out/new")
    assert "this is process 2 of 2, but none knows where to meet the others: start" in sentence
    assert "torchrun" in sentence and "MASTER_ADDR" in sentence
    assert not Path("out/new").exists()


BESIDE["two processes"] = PROGRAMS / "two_processes.py"
TWO = [*TINY, "--eval_interval=2"]


@pytest.fixture(scope="module")
def two(answer):
    return json.loads(answer("two processes"))


def test_two_processes_are_one(folder, two):
    """torchrun with gloo: the same global batch, half on each process, against one process that
    accumulates."""
    found = two["two"]
    assert call("train", *TWO, "--micro_batch_size=2", "--out=out/one") is None
    for one, other in zip(log("out/one"), found["log"], strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    state = checkpoint("out/one")
    assert state["losses"] == pytest.approx(found["losses"], rel=1e-5)
    assert state["train_config"]["optimizer"] == "muon"
    for name, weight in state["model"].items():
        expected = torch.tensor(found["weights"][name])
        torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-5)


def test_the_first_of_two_processes_alone_speaks(two):
    assert two["two"]["output"].count("step 6 of 6") == 1
    assert not two["two"]["errors"]


def test_two_processes_go_on_exactly(two):
    """With dropout, which each of them draws for itself, and micro-batches."""
    for key in "log", "losses", "weights":
        assert two["parts"][key] == two["whole"][key]


def test_two_processes_draw_different_dropout(two):
    """But weights from one seed."""
    (first, *steps), (second, *others) = two["seeds"]
    assert first == second == 1337
    assert len({*steps, *others}) == 6 + 6


def test_two_processes_train_a_fork_with_frozen_and_unused_parameters(two):
    assert len(two["partly"]["losses"]) == 6
    weights, before = two["partly"]["weights"], two["partly"]["initial"]
    changed = {name for name in weights if weights[name] != before[name]}
    still = weights.keys() - changed
    assert still == {
        f"blocks.0.attention.{name}" for name in ("q.weight", "unused_matrix", "unused_vector")
    }


def test_all_processes_begin_with_the_weights_of_the_first(two):
    """Which each draws for itself, on another kind of CPU with other last bits. Here the second
    draws quite others."""
    assert two["others"]["losses"] == pytest.approx(two["two"]["losses"], rel=1e-5)


BESIDE["failing"] = PROGRAMS / "failing.py"


def test_when_one_process_fails_both_leave_within_seconds(answer):
    """One of two is asked to stop, has a loss that is no number, cannot save, finds no data, or
    other data: rank 0, or the one that failed, says why in one sentence, and what was saved is
    there."""
    found = json.loads(answer("failing"))
    sentences = {
        "stop": r"failing.py: stopped after step 5; it is saved: go on by --resume --out=out/stop",
        "nan": r"failing.py: the loss or a weight is nan at step 5.*",
        "save": r"failing.py: the disk is full",
        "data": r"failing.py: data set 'nowhere' is missing.*",
        "other": r"failing.py: process 1 is at another step than the first, or has other data.*",
    }
    saved = {"stop": 5, "nan": 3, "save": None, "data": None, "other": None}
    speaker = {name: 1 if name == "other" else 0 for name in sentences}
    assert found.keys() == sentences.keys()
    for name, (first, second) in found.items():
        ends = [first, second]
        assert re.fullmatch(sentences[name], ends[speaker[name]]["said"]), name
        assert ends[1 - speaker[name]]["said"] == "1", f"{name}: the other leaves without a word"
        assert first["saved"] == saved[name]
        assert max(end["seconds"] for end in ends) < 60, f"{name}: not after gloo's half an hour"
        assert all(end["threads"] == 0 for end in ends), f"{name}: gloo's threads are gone"
        assert all(end["holders"] == 0 for end in ends), f"{name}: no model keeps the group"

"""How runs stop, and how they go on: exactly, whatever ended them, and from everywhere."""

import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import (
    BESIDE,
    PROGRAMS,
    ROOT,
    TINY,
    call,
    checkpoint,
    contents,
    limited_file_size,
    log,
    losses,
    on_batch,
    same,
)

import prepare
import train
from model import GPT

MORE = ["--max_steps=12", "--eval_interval=4", "--dropout=0.2", "--micro_batch_size=2"]
RESUME = ["--resume", "--out=out/run"]


@pytest.fixture(scope="module", params=["adamw", "muon"])
def whole(trained, tmp_path_factory, request):
    """The flags, checkpoint and log of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        shutil.copytree(trained / "data", folder / "data")
        patch.chdir(folder)
        flags = [*TINY, *MORE, f"--optimizer={request.param}"]
        assert call("train", *flags, "--out=whole") is None
        return flags, checkpoint("whole"), log("whole")


def assert_goes_on_as(whole, out, *flags):
    """The run in `out` goes on, and becomes bit for bit the one that nobody stopped."""
    _, state, entries = whole
    assert call("train", f"--out={out}", *flags) is None
    parts = checkpoint(out)
    assert log(out) == entries
    for key in "losses", "model", "optimizers":
        assert same(parts[key], state[key]), key


def signals(*numbers):
    """An action that sends this process these signals."""

    def send():
        for number in numbers:
            os.kill(os.getpid(), number)

    return send


def interrupt():
    raise KeyboardInterrupt


# A run that is asked to stop ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "step,number", [(3, signal.SIGINT), (6, signal.SIGHUP)], ids=["at an evaluation", "between two"]
)
def test_resume_is_exact(folder, monkeypatch, whole, step, number):
    """With dropout and micro-batches."""
    with monkeypatch.context() as patch:
        on_batch(patch, {step: signals(number)})
        sentence = call("train", *whole[0], "--out=out/parts")
    words = f"stopped after step {step + 1}; it is saved: go on by --resume --out=out/parts"
    assert sentence.endswith(words)
    assert len(losses("out/parts")) == step + 1
    assert_goes_on_as(whole, "out/parts", "--resume")


@pytest.mark.parametrize("step", [1, 5, 9])
def test_where_losses_are_read_later_a_run_stops_and_goes_on_as_exactly(
    folder, monkeypatch, whole, step
):
    """A GPU's losses, and the wish to stop, are read every tenth step; here every third."""
    monkeypatch.setattr(train, "steps_between_reads", lambda device, config: 3)
    with monkeypatch.context() as patch:
        on_batch(patch, {step: signals(signal.SIGTERM)})
        call("train", *whole[0], "--out=out/parts")
    assert len(losses("out/parts")) in (step + 1, step + 2, step + 3)
    assert_goes_on_as(whole, "out/parts", "--resume")


def test_a_loss_that_is_read_later_is_of_its_own_step(folder, monkeypatch):
    """Not of the step at which somebody looked."""
    monkeypatch.setattr(train, "steps_between_reads", lambda device, config: 10)
    step, train_step = itertools.count(1), train.train_step

    def broken(*args):
        loss = train_step(*args)
        return loss * math.nan if next(step) == 2 else loss

    monkeypatch.setattr(train, "train_step", broken)
    sentence = call("train", *TINY, "--out=out/new", "--eval_interval=6")
    assert "the loss or a weight is nan at step 2" in sentence


def test_losses_of_a_gpu_are_read_every_tenth_pass():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    config = train.TrainConfig(batch_size=64)
    assert train.steps_between_reads(cpu, config) == 1
    assert train.steps_between_reads(cuda, config) == 10
    config = train.TrainConfig(batch_size=64, micro_batch_size=16)
    assert train.steps_between_reads(cuda, config) == 2
    config = train.TrainConfig(batch_size=480, micro_batch_size=12)
    assert train.steps_between_reads(cuda, config) == 1


def test_a_second_signal_stops_at_once(folder, monkeypatch):
    before = contents()
    on_batch(monkeypatch, {6: signals(signal.SIGTERM, signal.SIGTERM)})
    assert call("train", *RESUME, "--max_steps=9") == "interrupted"
    assert contents() == before


@pytest.mark.parametrize("step", [0, 1, 6])
def test_a_crash_loses_no_more_than_the_steps_since_the_last_checkpoint(
    folder, monkeypatch, whole, step
):
    """Even before the first step a run can go on."""
    with monkeypatch.context() as patch:
        on_batch(patch, {step: interrupt})
        assert call("train", *whole[0], "--out=out/parts") == "interrupted"
    assert len(losses("out/parts")) == step // 4 * 4
    assert_goes_on_as(whole, "out/parts", "--resume")


@pytest.fixture
def made_up_clock(monkeypatch):
    """A step takes 100 s, and an evaluation 1 s."""
    clock = types.SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now

    def taking(seconds, function):
        def work(*args, **options):
            clock.now += seconds
            return function(*args, **options)

        return work

    for module in train, prepare:
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(train, "train_step", taking(100, train.train_step))
    monkeypatch.setattr(train, "evaluate", taking(1, train.evaluate))


def test_seconds_are_those_of_all_steps_and_of_no_evaluation(folder, made_up_clock):
    assert call("train", *TINY, "--out=out/new") is None
    assert call("train", "--resume", "--out=out/new", "--max_steps=8") is None
    entries = [json.loads(line) for line in Path("out/new/log.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["seconds"]) for entry in entries] == [
        (3, 300),
        (6, 600),
        (8, 800),
    ]
    assert checkpoint("out/new")["seconds"] == 800


def test_the_time_left_is_told_from_the_steps_of_this_part(folder, made_up_clock, capsys):
    """A step is of 4 windows of 16 tokens."""
    assert call("train", *RESUME, "--max_steps=9", "--batch_size=4") is None
    first, second, _ = losses("out/run")[6:]
    shown = [line for line in capsys.readouterr().err.splitlines() if "left" in line]
    assert shown[:2] == [
        f"step 7 of 9: loss {first:.3f}, 1 tokens/s, 0:03:20 left",
        f"step 8 of 9: loss {second:.3f}, 1 tokens/s, 0:01:40 left",
    ]


# In one Python process, as in a notebook ----------------------------------------------------------


def test_a_run_goes_on_again_and_again_in_one_process(folder, monkeypatch):
    """Also after what was raised in it is kept, as a notebook does: its lock is gone."""
    on_batch(monkeypatch, {6: signals(signal.SIGINT)})
    with pytest.raises(train.UserError) as kept:
        train.main([*RESUME, "--max_steps=8"])
    assert "stopped after step 7" in str(kept.value)
    for steps in 9, 10:
        train.main([*RESUME, f"--max_steps={steps}"])
        assert len(losses("out/run")) == steps


SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize(
    "action", [None, signals(signal.SIGINT), interrupt], ids=["finished", "stopped", "crashed"]
)
def test_signals_mean_again_what_they_did(folder, monkeypatch, action):
    before = handlers()
    on_batch(monkeypatch, {6: action} if action else {})
    call("train", *RESUME, "--max_steps=8")
    assert handlers() == before


def test_a_thread_trains(folder):
    """Signals reach the main thread only, and are left alone."""
    during, before, results = [], handlers(), []

    def work():
        with pytest.MonkeyPatch.context() as patch:
            on_batch(patch, {6: lambda: during.append(handlers())})
            results.append(call("train", *RESUME, "--max_steps=8"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [None] and during == [before]
    assert len(losses("out/run")) == 8


def test_two_threads_do_not_train_one_run(folder, monkeypatch):
    sentences = []
    second = lambda: sentences.append(call("train", *RESUME, "--max_steps=9"))  # noqa: E731
    on_batch(monkeypatch, {6: second})
    assert call("train", *RESUME, "--max_steps=7") is None
    assert "out/run is in use by another process" in sentences[0]


# Processes of their own ---------------------------------------------------------------------------


def start(*flags):
    """Starts train.py in a process of its own."""
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process, words):
    while words not in process.stdout.readline():
        assert process.poll() is None


LONG = [*TINY, "--max_steps=1e6", "--out=out/long", "--eval_interval=1e6"]
SAVED = [*LONG[:-1], "--eval_interval=50"]


def test_a_signal_to_a_process_of_its_own(folder):
    """It saves before it was ever validated; under nohup the end of the terminal is none of its
    business."""
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    process = start(*LONG)
    signal.signal(signal.SIGHUP, hangup)
    wait_for(process, "run:")
    for number in signal.SIGHUP, signal.SIGTERM:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.startswith("train.py: stopped after step ") and "Traceback" not in errors
    assert losses("out/long") and not Path("out/long/best.pt").exists()
    assert call("sample", "--out=out/long", "--max_new_tokens=3") is None


BESIDE["locks"] = PROGRAMS / "locks.py"


def test_of_two_that_ask_in_the_same_instant_one_has_the_folder(answer):
    if sys.platform == "linux":  # elsewhere torch may not fork
        assert json.loads(answer("locks")) == [1] * 8


def test_of_two_that_start_in_one_folder_one_trains(folder):
    """The other, and one that would go on with it, are told that it is in use; the first ends as if
    alone."""
    processes = [start(*SAVED) for _ in range(2)]
    try:
        deadline = time.monotonic() + 60
        while all(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.05)
        loser, winner = sorted(processes, key=lambda process: process.poll() is None)
        assert loser.poll() == 1
        assert re.fullmatch(
            r"train.py: out/long (is in use|holds a run already).*\n", loser.communicate()[1]
        )
        wait_for(winner, "step 50 ")
        for flags in ["--resume", "--learning_rate=9"], TINY:
            sentence = call("train", *flags, "--max_steps=1", "--out=out/long")
            assert "out/long is in use" in sentence
        winner.send_signal(signal.SIGTERM)
        assert "stopped after step " in winner.communicate(timeout=60)[1]
    finally:
        for process in processes:
            process.kill()
    state = checkpoint("out/long")
    steps = len(state["losses"])
    assert [entry["step"] for entry in log("out/long")] == [*range(50, steps + 1, 50)]
    assert state["train_config"]["learning_rate"] != 9


def test_a_run_that_was_killed_goes_on_at_once(folder):
    """No signal handler has run: its lock is gone nevertheless, and what it was writing is
    removed."""
    process = start(*SAVED)
    wait_for(process, "step 50 ")
    process.kill()
    process.communicate()
    Path("out/long/last.pt.1234.tmp").write_text("half a checkpoint")
    steps = len(losses("out/long"))
    assert steps % 50 == 0
    assert call("train", "--resume", "--out=out/long", f"--max_steps={steps + 2}") is None
    assert len(losses("out/long")) == steps + 2
    names = {path.name for path in Path("out/long").iterdir()}
    assert names == {"config.json", "log.jsonl", "best.pt", "last.pt", "loss.png"}


# kill.py, in small: what its program does in four settings and 50 times, here in one and twice.
BESIDE["kills"] = PROGRAMS / "kills.py"


def test_a_killed_run_goes_on_as_if_it_had_not_been(answer):
    words = answer("kills").strip().splitlines()[-1]
    assert words.startswith("2 kills") and " 0 resumed" not in words


# What goes on, and with which flags ---------------------------------------------------------------


def test_resume_takes_new_flags_and_the_same_ones(folder):
    flags = ["--max_steps=9", "--weight_decay=5", "--learning_rate=1e-4", "--n_kv_head=2"]
    assert call("train", *TINY, *RESUME, *flags) is None
    state = checkpoint("out/run")
    assert state["train_config"]["weight_decay"] == 5 and len(state["losses"]) == 9


def test_a_new_weight_decay_pulls(folder):
    """Given anew when a run goes on, it counts from then on, for matrices."""
    before = checkpoint("out/run")["model"]
    flags = ["--max_steps=7", "--learning_rate=1e-3", "--weight_decay=900", "--warmup_steps=0"]
    assert call("train", *RESUME, *flags) is None
    after = checkpoint("out/run")["model"]
    norms = {name: (after[name].norm() / before[name].norm()).item() for name in before}
    assert all(norm < 0.95 for name, norm in norms.items() if before[name].dim() > 1)
    assert all(norm > 0.95 for name, norm in norms.items() if before[name].dim() == 1)


KEPT = [
    "--dataset=other",
    "--preset=gpu",
    "--seed=2",
    "--batch_size=8",
    "--optimizer=adamw",
    "--beta2=0.5",
    "--eval_tokens=9",
    "--attention=qkv",
    "--pos=learned",
    "--block_size=8",
    "--n_layer=2",
    "--n_head=1",
    "--n_embd=32",
    "--dropout=0.1",
    "--n_kv_head=1",
    "--n_inner=8",
]


@pytest.mark.parametrize("flag", KEPT)
def test_what_a_run_that_goes_on_must_keep(folder, flag):
    before = contents()
    sentence = call("train", *RESUME, "--max_steps=9", flag)
    assert f"{flag} cannot change a run that has begun with " in sentence
    assert contents() == before


def test_every_flag_is_kept_or_may_change():
    """Those for other attentions are refused before."""
    kept = {flag.partition("=")[0].removeprefix("--") for flag in KEPT}
    every = {field.name for field in dataclasses.fields(train.TrainConfig)}
    assert every == train.MAY_CHANGE | (kept & every) and not train.MAY_CHANGE & kept


def test_a_finished_run_says_that_there_is_nothing_to_do(folder, capsys):
    before = losses("out/run")
    assert call("train", *RESUME) is None
    text = capsys.readouterr().out
    assert "all 6 steps are done: to go on, give a larger --max_steps" in text
    assert "python sample.py --out=out/run" in text
    assert losses("out/run") == before


def test_a_run_in_another_folder_misses_its_data_and_prepares_none(folder, monkeypatch):
    """It began with tiny Shakespeare, say, in another working directory."""
    Path("data/tiny").rename("data/shakespeare_char")
    assert call("train", "--dataset=shakespeare_char", *TINY[1:], "--out=out/new") is None
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    sentence = call("train", "--resume", "--out=../out/new", "--max_steps=9")
    assert "data set 'shakespeare_char' is missing" in sentence and "download" not in sentence
    assert not Path("data").exists()


RESTARTABLE = [*TINY, "--restartable", "--out=out/again"]


def test_a_restartable_run_begins_and_goes_on_by_one_command(folder, monkeypatch, whole):
    flags = [*whole[0], "--restartable"]
    for step in 1, 6:
        with monkeypatch.context() as patch:
            on_batch(patch, {step: interrupt})
            assert call("train", *flags, "--out=out/again") == "interrupted"
    assert_goes_on_as(whole, "out/again", *flags)
    before = checkpoint("out/again")
    assert_goes_on_as(whole, "out/again", *flags)
    assert same(checkpoint("out/again")["losses"], before["losses"])


def test_a_restartable_run_with_other_flags_is_refused(folder):
    assert call("train", *RESTARTABLE) is None
    sentence = call("train", *RESTARTABLE, "--n_embd=32")
    assert "--n_embd=32 cannot change a run that has begun with 16" in sentence


def test_a_restartable_run_needs_a_name(folder):
    sentence = call("train", *TINY, "--restartable")
    assert "--restartable needs --out, the folder in which to look for the run" in sentence


# What is written, and what cannot be --------------------------------------------------------------


def test_best_is_saved_before_last(folder, monkeypatch):
    """... and so is the log, so that last.pt, from which a run goes on, never knows of more than is
    there."""
    write = train.write_atomically

    def dying(path, write_to):
        if path.name == "last.pt":
            raise KeyboardInterrupt
        write(path, write_to)

    monkeypatch.setattr(train, "write_atomically", dying)
    assert call("train", *RESUME, "--max_steps=60") == "interrupted"
    assert [len(checkpoint("out/run", name)["losses"]) for name in ("last.pt", "best.pt")] == [6, 9]
    assert [entry["step"] for entry in log("out/run")] == [3, 6, 9]


def test_divergence_keeps_the_last_good_checkpoint(folder):
    before = Path("out/run/last.pt").read_bytes()
    flags = ["--max_steps=300", "--learning_rate=1e38", "--grad_clip=0", "--weight_decay=0"]
    sentence = call("train", *RESUME, *flags)
    assert "training has diverged" in sentence and sentence.endswith("or by --resume --out=out/run")
    assert Path("out/run/last.pt").read_bytes() == before


def test_weights_that_are_no_numbers_are_not_saved(folder, monkeypatch):
    """The step before a stop may have broken them, and its loss says nothing yet."""
    before, train_step = contents(), train.train_step

    def breaking(model, *rest):
        loss = train_step(model, *rest)
        next(model.parameters()).data[0, 0] = math.nan
        return loss

    monkeypatch.setattr(train, "train_step", breaking)
    on_batch(monkeypatch, {6: signals(signal.SIGINT)})
    assert "training has diverged" in call("train", *RESUME, "--max_steps=8")
    assert contents() == before


def test_a_full_disk_keeps_the_last_checkpoint(folder):
    before = Path("out/run/last.pt").read_bytes()
    resume = lambda: call("train", *RESUME, "--max_steps=9")  # noqa: E731
    sentence = limited_file_size(5_000, resume)
    assert "out/run/best.pt could not be written" in sentence
    assert "what was there is unchanged" in sentence
    assert Path("out/run/last.pt").read_bytes() == before
    assert not list(Path("out/run").glob("*.tmp"))


def test_what_cannot_be_written_is_said_before_the_first_step(folder, monkeypatch):
    on_batch(monkeypatch, {0: lambda: pytest.fail("a step was taken")})
    Path("out/new/log.jsonl").mkdir(parents=True)
    sentence = call("train", *TINY, "--out=out/new")
    assert "out/new/log.jsonl could not be written (Is a directory)" in sentence


def test_a_checkpoint_is_plain(folder):
    """A dict of plain values and tensors, that loads without running code."""
    state = checkpoint("out/run")
    assert set(state) == {
        "format",
        "model",
        "optimizers",
        "model_config",
        "train_config",
        "tokenizer",
        "data_sha256",
        "losses",
        "log",
        "seconds",
    }
    assert GPT.load("out/run/last.pt")[1]["losses"] == state["losses"]

"""train.py as its users run it. How they misuse it is in test_misuse.py."""

import dataclasses
import itertools
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    BESIDE,
    ROOT,
    TEXT,
    TINY,
    call,
    checkpoint,
    contents,
    limited_file_size,
    log,
    program,
)

import model
import prepare
import train
from model import ATTENTIONS, GPT, POSITIONS
from train import autocast

CPU = torch.device("cpu")


def test_prepare_and_train_from_the_command_line(tmp_path):
    """As in the README, in processes of their own: text in, tokens, training."""
    (tmp_path / "bottles.txt").write_text(TEXT)
    tiny = ["--dataset=bottles", *TINY[1:-1]]
    for command in ["prepare.py", "bottles.txt"], ["train.py", *tiny, "--max_steps=8"]:
        result = program(ROOT / command[0], *command[1:], cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    run = tmp_path / "out" / "bottles-qv_ka-agf"
    assert "python sample.py --out=out/bottles-qv_ka-agf" in result.stdout
    assert [entry["step"] for entry in log(run)] == [3, 6, 8]
    assert set(log(run)[0]) == {"step", "train_loss", "val_loss"}
    assert set(
        map(len, (line.split(", ") for line in (run / "log.jsonl").read_text().splitlines()))
    ) == {4}
    last = log(run)[-1]
    assert re.search(
        rf"^step 8: training loss {last['train_loss']:.4f}, validation loss {last['val_loss']:.4f}"
        r"( \(the best so far\))?, 0:00:0\d$",
        result.stdout,
        re.M,
    )
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    state = checkpoint(run)
    assert set(state) == set(model.CHECKPOINT) and len(state["losses"]) == 8
    best = min(log(run), key=lambda entry: entry["val_loss"])
    assert len(checkpoint(run, "best.pt")["losses"]) == best["step"]


def test_importing_does_nothing(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import prepare; assert 'torch' not in sys.modules; "
        "import sample; assert 'train' not in sys.modules; import train"
    )
    result = program("-c", code, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr, list(tmp_path.iterdir())) == (
        0,
        "",
        "",
        [],
    )


@pytest.mark.parametrize("name", ["prepare", "train", "sample"])
def test_help_teaches(name, capsys):
    assert call(name, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"python {name}.py" in text and "default" in text
    assert (
        name != "train"
        or "whatever their defaults here say" in text
        and "presets: cpu n_layer=4" in text
    )


@pytest.mark.parametrize("attention,pos", list(zip(ATTENTIONS, itertools.cycle(POSITIONS))))
def test_every_attention_trains_and_samples(folder, capsys, attention, pos):
    assert call("train", *TINY, f"--attention={attention}", f"--pos={pos}", "--out=out/new") is None
    flags = ["--prompt=wall", "--max_new_tokens=30", "--num_samples=2", "--top_k=5"]
    assert call("sample", "--out=out/new", *flags) is None
    captured = capsys.readouterr()
    assert captured.out.count("wall") >= 2 and "60 tokens" in captured.err


def test_gpt2_trains_and_streams_whole_characters(folder, gpt2, capsys):
    Path("dogs.txt").write_text("一只小狗。" * 300, encoding="utf-8")
    assert call("prepare", "dogs.txt", "--tokenizer=gpt2") is None
    assert (
        call(
            "train",
            "--dataset=dogs",
            *TINY[1:],
            "--out=out/dogs",
            "--max_steps=40",
            "--eval_interval=40",
            "--learning_rate=2e-2",
            "--warmup_steps=0",
            "--eval_tokens=50",
        )
        is None
    )
    assert checkpoint("out/dogs")["model_config"]["vocab_size"] == 50304
    capsys.readouterr()
    assert (
        call("sample", "--out=out/dogs", "--prompt=一只", "--max_new_tokens=30", "--temperature=0")
        is None
    )
    assert "小狗。一只" in capsys.readouterr().out


# Where the data comes from --------------------------------------------------------------------------------------------


def test_without_network_the_default_is_pydoc_and_a_named_data_set_is_not(
    folder, monkeypatch, capsys
):
    monkeypatch.setattr(prepare, "SHAKESPEARE_URL", "http://127.0.0.1:9/")
    assert call("train", *TINY[1:], "--out=out/default") is None
    assert "training on pydoc, Python's language reference, instead" in capsys.readouterr().out
    assert checkpoint("out/default")["train_config"]["dataset"] == "pydoc"
    assert "cannot be downloaded" in call(
        "train", *TINY[1:], "--dataset=shakespeare_char", "--out=out/named"
    )
    assert not Path("out/named").exists()


SHAKESPEARE = Path("data/shakespeare_char")


@pytest.mark.parametrize(
    "damage,words",
    [
        (
            lambda: (SHAKESPEARE / "train.bin").write_bytes(b"abcd"),
            "data set 'shakespeare_char' is missing or damaged",
        ),
        (
            lambda: (
                (SHAKESPEARE / "meta.json").unlink(),
                (SHAKESPEARE / "input.txt").write_text("x"),
            ),
            "data/shakespeare_char/input.txt is not tiny Shakespeare",
        ),
        (lambda: (shutil.rmtree(SHAKESPEARE), SHAKESPEARE.write_text("")), "could not be written"),
    ],
    ids=["damaged tokens", "another text", "no folder"],
)
def test_only_a_failed_download_has_a_substitute(folder, monkeypatch, damage, words):
    """Anything else that is wrong with the default data is said, and pydoc is not trained on instead."""
    shutil.copytree("data/tiny", "data/shakespeare_char")
    damage()
    monkeypatch.setattr(
        prepare.urllib.request, "urlopen", lambda *args, **kwargs: open("tiny.txt", "rb")
    )
    monkeypatch.setattr(
        prepare, "SHAKESPEARE_SHA256", prepare.hashlib.sha256(TEXT.encode()).hexdigest()
    )
    assert words in call("train", *TINY[1:], "--out=out/new")
    assert not Path("data/pydoc").exists() and not Path("out/new").exists()


# A step, a validation -------------------------------------------------------------------------------------------------


def test_batches_are_a_function_of_seed_and_step():
    data = np.arange(1000, dtype=np.uint16)
    one, two = train.TrainConfig(batch_size=8), train.TrainConfig(batch_size=8, seed=2)
    x, y = train.batch(data, one, 5, 7, CPU)
    assert torch.equal(x + 1, y) and x.shape == (8, 5)
    assert torch.equal(x, train.batch(data, one, 5, 7, CPU)[0])
    assert not torch.equal(x, train.batch(data, one, 5, 8, CPU)[0])
    assert not torch.equal(x, train.batch(data, two, 5, 7, CPU)[0])
    shares = [train.batch(data, one, 5, 7, CPU, rank, 2)[0] for rank in range(2)]
    assert torch.equal(torch.cat(shares), x) and not torch.equal(*shares)
    starts = {
        int(train.batch(np.arange(8, dtype=np.uint16), one, 5, step, CPU)[0][0, 0])
        for step in range(50)
    }
    assert starts == {0, 1, 2}, "every window of the data, the first and the last"


def orthogonal(x):
    """What Polar Express is meant to do to one matrix, done to its singular values."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum().sqrt() / 1.01
    for a, b, c in (
        (8.28721, -23.59589, 17.30039),
        (4.10706, -2.94785, 0.54484),
        (3.94869, -2.90890, 0.55182),
    ):
        s = a * s + b * s**3 + c * s**5
    return (u * s @ v).float()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_are_plain_gradient_descent_on_the_mean_loss(folder, optimizer):
    """In micro-batches, against two steps on the whole batch by hand: the weights, and the losses that are reported.
    Under Muon each matrix, and of W_K each head's, is moved by itself; the rest by AdamW."""
    flags = [
        "--out=out/new",
        "--micro_batch_size=2",
        "--grad_clip=0.5",
        "--warmup_steps=0",
        "--weight_decay=0.7",
    ]
    run = train.Run(train.parse([*TINY, *flags, f"--optimizer={optimizer}"]))
    twin, losses = GPT(run.model.config), []
    twin.load_state_dict(run.model.state_dict())
    moved = {
        name: torch.zeros_like(w)
        for name, w in twin.named_parameters()
        if optimizer == "muon" and w.dim() > 1 and not name.startswith(("wte", "wpe"))
    }
    others = [w for name, w in twin.named_parameters() if name not in moved]
    groups = [
        dict(params=[w for w in others if w.dim() > 1], weight_decay=0.7),
        dict(params=[w for w in others if w.dim() < 2], weight_decay=0),
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.9, run.train.beta2))
    for step in range(2):
        assert not run.step()
        _, loss = twin(*train.batch(run.splits["train"], run.train, 16, step, CPU))
        twin.zero_grad()
        loss.backward()
        losses.append(loss.item())
        assert torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5) > 0.5
        rate = train.learning_rate(step, run.train)
        for name, mean in moved.items():
            w = twin.get_parameter(name)
            mean.mul_(0.9).add_(0.1 * w.grad)
            ahead = 0.9 * mean + 0.1 * w.grad
            heads = [orthogonal(head) for head in ahead.reshape(-1, *w.shape[-2:])]
            change = 0.2 * max(w.shape[-2:]) ** 0.5 * torch.stack(heads).reshape(w.shape)
            w.data = w.data * (1 - rate * 0.7) - rate * change
            w.grad = None
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
    assert run.losses == pytest.approx(losses, rel=1e-6)
    assert {w.dim() for w in moved.values()} == ({2, 3} if optimizer == "muon" else set())
    for (name, ours), theirs in zip(run.model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-4, atol=2e-5, msg=lambda words: f"{name}: {words}"
        )


@pytest.mark.parametrize(
    "shape", [(4, 16, 16), (3, 48, 16), (3, 16, 48), (1, 5, 64), (2, 128, 512)], ids=str
)
def test_muon_makes_steps_orthogonal(shape):
    """Singular values between a and a tenth of a come near to 1, whatever a is, and singular vectors stay."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    x = u * torch.linspace(0.1, 1, u.size(2)) @ v * torch.logspace(-1, 3, shape[0])[:, None, None]
    made = train.orthogonal(x)
    values = torch.linalg.svdvals(made)
    assert made.shape == x.shape and 0.15 < values.min() and values.max() < 1.9
    cosines = torch.cosine_similarity(made.flatten(1), (u @ v).flatten(1))
    assert cosines.min() > 0.85
    for one, matrix in zip(made, x):
        torch.testing.assert_close(one, orthogonal(matrix), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "count,eval_tokens,predicted", [(83, None, 82), (81, None, 80), (10, None, 9), (83, 20, 20)]
)
def test_validation_covers_every_token_once(folder, count, eval_tokens, predicted):
    """Against the definition: each token after the first, from those before it in its window of 16; and shared."""
    network, val = (
        GPT.load("out/run/last.pt")[0].eval(),
        prepare.read_dataset("tiny")[1]["val"][:count],
    )
    losses = []
    for i in range(1, predicted + 1):
        before = torch.from_numpy(val[(i - 1) // 16 * 16 : i].astype(np.int64))
        logits = network(before[None])[0][0, -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(int(val[i]))).item())
    arguments = network, val, 2, autocast(CPU, "float32"), eval_tokens
    loss_sum, number = train.evaluate(*arguments)
    assert number == predicted and math.isclose(loss_sum, sum(losses), rel_tol=1e-5)
    shares = [train.evaluate(*arguments, rank, 2) for rank in range(2)]
    assert np.sum(shares, 0) == pytest.approx([loss_sum, number])


def test_validation_takes_no_more_tokens_at_once_than_a_micro_batch(folder, monkeypatch):
    shapes, forward = set(), GPT.forward
    monkeypatch.setattr(
        GPT,
        "forward",
        lambda self, idx, *args: shapes.add(idx.numel()) or forward(self, idx, *args),
    )
    assert (
        call("train", *TINY[:-1], "--out=out/new", "--micro_batch_size=2", "--kernel=torch") is None
    )
    assert max(shapes) == 2 * 16


def test_learning_rate_and_weight_decay():
    config = train.TrainConfig(learning_rate=1.0, warmup_steps=9, max_steps=100)
    rates = [train.learning_rate(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[100] == pytest.approx(0.1)
    assert max(rates) > 0.97 and np.argmax(rates) == 9
    network = GPT(train.GPTConfig(block_size=4, n_layer=1, n_head=1, n_embd=4))
    decayed, rest = train.make_optimizer(network, config).param_groups
    assert all(p.dim() > 1 for p in decayed["params"]) and decayed["weight_decay"] == 0.1
    assert all(p.dim() == 1 for p in rest["params"]) and rest["weight_decay"] == 0
    assert len(decayed["params"]) + len(rest["params"]) == len(list(network.parameters()))


def test_presets_are_defaults_that_flags_override():
    cpu, shape = train.configure(dict(preset="cpu", n_layer=2))
    assert (shape.n_layer, shape.n_embd, cpu.max_steps) == (
        2,
        128,
        train.PRESETS["cpu"]["max_steps"],
    )
    _, shape = train.configure(dict(preset="gpu", attention="qkv"))
    assert 10.0e6 < sum(p.numel() for p in GPT(shape).parameters()) < 11e6
    config, shape = train.configure(dict(preset="gpt2"))
    assert config.batch_size * shape.block_size == 491_520 and config.dataset == "openwebtext"


def test_an_attention_of_ones_own_has_a_flag_of_its_own(folder, monkeypatch):
    """A fork adds a field to GPTConfig, in two lines, and --help, the check and checkpoints know of it."""

    class Mine(ATTENTIONS["qv"]):
        pass

    @dataclasses.dataclass(frozen=True)
    class Config(train.GPTConfig):
        width: int | None = model.option(3, "of mine", only={"attention": ("mine",)})

    monkeypatch.setitem(ATTENTIONS, "mine", Mine)
    monkeypatch.setattr(train, "GPTConfig", Config)
    monkeypatch.setattr(model, "GPTConfig", Config)
    assert call("train", *TINY, "--attention=mine", "--width=5", "--out=out/mine") is None
    assert call("train", "--resume", "--out=out/mine", "--max_steps=7", "--width=5") is None
    assert checkpoint("out/mine")["model_config"]["width"] == 5
    words = "--width counts only with --attention=mine; leave it out"
    assert words in call("train", *TINY, "--attention=qkv", "--width=5")


# Stopping and going on ------------------------------------------------------------------------------------------------

RESUME = [
    *TINY[:-3],
    "--max_steps=12",
    "--eval_interval=4",
    "--eval_tokens=500",
    "--dropout=0.2",
    "--micro_batch_size=2",
]


@pytest.fixture(scope="module", params=["adamw", "muon"])
def whole(trained, tmp_path_factory, request):
    """The flags, checkpoint and log of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        shutil.copytree(trained / "data", folder / "data")
        patch.chdir(folder)
        flags = [*RESUME, f"--optimizer={request.param}"]
        assert call("train", *flags, "--out=whole") is None
        return flags, checkpoint("whole"), log("whole")


@pytest.mark.parametrize(
    "at,number", [(4, signal.SIGINT), (7, signal.SIGHUP)], ids=["at an evaluation", "between two"]
)
def test_resume_is_exact(folder, monkeypatch, whole, at, number):
    """A signal in a step, then --resume: bit for bit the run that was never stopped, with dropout and micro-batches."""
    steps, batch = itertools.count(1), train.batch

    def interrupting(*args):
        if next(steps) == at:
            os.kill(os.getpid(), number)
        return batch(*args)

    monkeypatch.setattr(train, "batch", interrupting)
    assert (
        call("train", *whole[0], "--out=out/parts")
        == f"stopped after step {at}; it is saved: go on by --resume --out=out/parts"
    )
    assert len(checkpoint("out/parts")["losses"]) == at
    assert call("train", "--resume", "--out=out/parts") is None
    parts = checkpoint("out/parts")
    assert log("out/parts") == whole[2] and parts["losses"] == whole[1]["losses"]
    assert all(
        torch.equal(weights, parts["model"][name]) for name, weights in whole[1]["model"].items()
    )
    assert ("mean" in parts["optimizer"]["blocks.0.mlp.up.weight"]) == (
        "--optimizer=muon" in whole[0]
    )


def start(*flags, **options):
    """Starts train.py in a process of its own."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, ROOT / "train.py", *flags], **pipes, **options)


def wait_for(process, words):
    while not process.stdout.readline().startswith(words):
        assert process.poll() is None


LONG = [*TINY[:-3], "--max_steps=1e6", "--eval_interval=1e6", "--out=out/long"]


@pytest.mark.parametrize("at", [0, 1, 6])
def test_a_crash_loses_no_more_than_the_steps_since_the_last_checkpoint(
    folder, monkeypatch, whole, at
):
    """Even before the first step a run can be resumed, and comes to the end of one that was never stopped."""
    steps, batch, (flags, state, entries) = itertools.count(), train.batch, whole

    def crashing(*args):
        if next(steps) == at:
            raise KeyboardInterrupt
        return batch(*args)

    monkeypatch.setattr(train, "batch", crashing)
    assert call("train", *flags, "--out=out/parts") == "interrupted"
    assert len(checkpoint("out/parts")["losses"]) == at // 4 * 4
    assert call("train", "--resume", "--out=out/parts") is None
    assert log("out/parts") == entries and checkpoint("out/parts")["losses"] == state["losses"]


def test_a_second_signal_stops_at_once(folder, monkeypatch):
    monkeypatch.setattr(
        train, "batch", lambda *args: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]
    )
    before = contents()
    assert call("train", "--resume", "--out=out/run", "--max_steps=9") == "interrupted"
    assert contents() == before


def test_a_signal_to_a_process_of_its_own(folder):
    """Which saves before it was ever validated; under nohup the end of the terminal is none of its business."""
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    process = start(*LONG)
    signal.signal(signal.SIGHUP, hangup)
    wait_for(process, "plan:")
    for number in signal.SIGHUP, signal.SIGTERM:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (
        process.returncode == 1
        and errors.startswith("stopped after step ")
        and "Traceback" not in errors
    )
    assert checkpoint("out/long")["losses"] and not Path("out/long/best.pt").exists()
    assert call("sample", "--out=out/long", "--max_new_tokens=3") is None


BESIDE["claims"] = """
import sys, tempfile
from multiprocessing import get_context
from pathlib import Path

sys.path.append(".")
import train

def claim(folder):
    barrier.wait()
    try:
        lock = train.claim(folder, new=True)
        won.put(1)
    except train.UserError:
        won.put(0)
    barrier.wait()

fork = get_context("fork")
barrier, won, winners = fork.Barrier(2), fork.SimpleQueue(), []
for _ in range(8):
    with tempfile.TemporaryDirectory() as folder:
        processes = [fork.Process(target=claim, args=(Path(folder),)) for _ in range(2)]
        for process in processes:
            process.start()
        winners.append(won.get() + won.get())
        for process in processes:
            process.join()
print(winners)
"""


def test_of_two_that_start_in_one_folder_one_trains(folder, answer):
    """The other, and one that would go on with it, are told that it is in use; the first ends as if alone. Also where
    both ask in the same instant."""
    if sys.platform == "linux":  # elsewhere torch may not fork
        assert json.loads(answer("claims")) == [1] * 8
    processes = [start(*LONG[:-2], "--eval_interval=50", LONG[-1]) for _ in range(2)]
    try:
        deadline = time.monotonic() + 60
        while all(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.05)
        loser, winner = sorted(processes, key=lambda process: process.poll() is None)
        assert loser.poll() == 1 and re.fullmatch(
            r"train.py: out/long (is in use|holds a run already).*\n", loser.communicate()[1]
        )
        wait_for(winner, "step 50:")
        for flags in ["--resume", "--learning_rate=9"], TINY:
            assert "out/long is in use" in (
                call("train", *flags, "--max_steps=1", "--out=out/long") or ""
            )
        winner.send_signal(signal.SIGTERM)
        assert winner.communicate(timeout=60)[1].startswith("stopped after step ")
    finally:
        for process in processes:
            process.kill()
    steps = len(checkpoint("out/long")["losses"])
    assert [entry["step"] for entry in log("out/long")] == [*range(50, steps + 1, 50)]
    assert GPT.load("out/long/last.pt")[1]["train_config"]["learning_rate"] != 9


def test_a_run_that_was_killed_goes_on_at_once(folder):
    """No signal handler has run: its lock is gone nevertheless, and what it was writing is removed."""
    process = start(*LONG[:-2], "--eval_interval=50", LONG[-1])
    wait_for(process, "step 50:")
    process.kill()
    process.communicate()
    Path("out/long/last.pt.1234.tmp").write_text("half a checkpoint")
    steps = len(checkpoint("out/long")["losses"])
    assert steps % 50 == 0
    assert call("train", "--resume", "--out=out/long", f"--max_steps={steps + 2}") is None
    assert len(checkpoint("out/long")["losses"]) == steps + 2
    assert {path.name for path in Path("out/long").iterdir()} == {
        "lock",
        "log.jsonl",
        "best.pt",
        "last.pt",
        "loss.png",
    }


def test_resume_takes_new_flags_and_the_same_ones(folder):
    flags = ["--max_steps=9", "--weight_decay=5", "--learning_rate=1e-4"]
    assert call("train", *TINY[:-3], "--resume", "--out=out/run", *flags) is None
    state = checkpoint("out/run")
    assert (
        state["train_config"]["weight_decay"] == 5 and state["optimizer"]["wte.weight"]["step"] == 9
    )
    groups = train.Run({"resume": True, "weight_decay": 7.0}).optimizer.param_groups
    assert {(group["weight_decay"], p.dim() > 1) for group in groups for p in group["params"]} == {
        (7, 1),
        (0, 0),
    }


def test_what_a_run_logs(folder, monkeypatch):
    """The training loss is the mean of 100 steps, or of all; the randomness of every step is its own."""
    seeds, seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda number: seeds.append(number) or seed(number))
    assert call("train", *TINY, "--out=out/new") is None
    state = checkpoint("out/new")
    assert [entry["train_loss"] for entry in state["log"]] == [
        np.mean(state["losses"][:n]) for n in (3, 6)
    ]
    assert seeds[0] == 1337 and len(set(seeds)) == 7
    assert state["losses"] == checkpoint("out/run")["losses"]
    assert (
        call("train", "--resume", "--out=out/new", "--max_steps=150", "--eval_interval=150") is None
    )
    assert log("out/new")[-1]["train_loss"] == pytest.approx(
        np.mean(checkpoint("out/new")["losses"][50:])
    )


def test_a_finished_run_says_again_what_it_said(folder, capsys):
    before = checkpoint("out/run")
    assert call("train", "--resume", "--out=out/run") is None
    assert "python sample.py --out=out/run" in capsys.readouterr().out
    assert checkpoint("out/run")["losses"] == before["losses"]


def test_best_is_saved_before_last(folder, monkeypatch):
    """... and so is the log, so that last.pt, from which a run goes on, never knows of more than is there."""

    def dying(path, write_to):
        if path.name == "last.pt":
            raise KeyboardInterrupt
        write(path, write_to)

    write = train.write
    monkeypatch.setattr(train, "write", dying)
    assert call("train", "--resume", "--out=out/run", "--max_steps=60") == "interrupted"
    assert [len(checkpoint("out/run", name)["losses"]) for name in ("last.pt", "best.pt")] == [6, 9]
    assert [entry["step"] for entry in log("out/run")] == [3, 6, 9]


def test_divergence_keeps_the_last_good_checkpoint(folder):
    before = Path("out/run/last.pt").read_bytes()
    sentence = call(
        "train",
        "--resume",
        "--out=out/run",
        "--max_steps=300",
        "--learning_rate=1e38",
        "--grad_clip=0",
        "--weight_decay=0",
    )
    assert "training has diverged" in sentence and sentence.endswith("or by --resume --out=out/run")
    assert Path("out/run/last.pt").read_bytes() == before


def test_weights_that_are_no_numbers_are_not_saved(folder, monkeypatch):
    """The step before a stop may have broken them, and its loss says nothing yet."""
    run, before = train.Run({"resume": True, "max_steps": 9}), contents()
    next(run.model.parameters()).data[0, 0] = math.nan
    with pytest.raises(prepare.UserError, match="training has diverged"):
        run.save("last.pt")
    assert contents() == before


def test_a_full_disk_keeps_the_last_checkpoint(folder):
    before = Path("out/run/last.pt").read_bytes()
    sentence = limited_file_size(
        5_000, lambda: call("train", "--resume", "--out=out/run", "--max_steps=9")
    )
    assert (
        "out/run/best.pt could not be written" in sentence
        and "what was there is intact" in sentence
    )
    assert Path("out/run/last.pt").read_bytes() == before
    assert not list(Path("out/run").glob("*.tmp"))


def test_what_cannot_be_written_is_said_before_the_first_step(folder, monkeypatch):
    monkeypatch.setattr(train.Run, "step", lambda *args: pytest.fail("a step was taken"))
    Path("out/new/log.jsonl").mkdir(parents=True)
    assert "out/new/log.jsonl could not be written (Is a directory)" in call(
        "train", *TINY, "--out=out/new"
    )


def test_a_new_run_never_overwrites_an_old_one(folder):
    for name in "tiny-qv-rope", "tiny-qv-rope-2":
        assert call("train", *TINY, "--attention=qv", "--pos=rope", "--max_steps=1") is None
        assert Path("out", name, "last.pt").exists()


# Where it runs --------------------------------------------------------------------------------------------------------


BESIDE["closed"] = f"""
import subprocess, sys, tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    Path(folder, "tiny.txt").write_text({TEXT!r})
    for name, *flags in ["prepare.py", "tiny.txt"], ["train.py", *{TINY}], ["sample.py", "--max_new_tokens=3"]:
        closed = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", sys.executable, Path({str(ROOT)!r}, name)]
        subprocess.run([*closed, *flags], cwd=folder, check=True)
    sys.path.append({str(ROOT)!r})
    from model import GPT
    print(GPT.load(next(Path(folder).glob("out/*/last.pt")))[1]["losses"])
"""


def test_with_standard_streams_closed(trained, answer):
    """As some schedulers start programs. What is opened next would be written into by whoever prints."""
    assert json.loads(answer("closed")) == checkpoint(trained / "out/run")["losses"]


ASCII = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from conftest import Path, TINY, call

Path("dogs.txt").write_text("\\u5c0f\\u72d7 na\\u00efve " * 200, encoding="utf-8")
assert call("prepare", "dogs.txt") is None
run = "out/compare/cpu-dogs-qv_ka-agf,seed=1337"
assert call("train", "--dataset=dogs", *TINY[1:], "--out=" + run) is None
assert call("sample", "--out=" + run, "--max_new_tokens=30") is None
import compare
compare.record(Path(run))
assert call("compare", "--report") is None
"""


BESIDE["ascii"] = f"""
import os, subprocess, sys, tempfile
from pathlib import Path

surroundings = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii")
with tempfile.TemporaryDirectory() as folder:
    subprocess.run([sys.executable, "-c", {ASCII!r}], cwd=folder, env=os.environ | surroundings, check=True)
    assert "\u00b1" in Path(folder, "out/compare/results.md").read_text(encoding="utf-8")
"""


def test_where_everything_is_ascii(answer):
    """Files are UTF-8 nevertheless; on the screen, what is not ASCII is a question mark."""
    shown = answer("ascii")
    assert "?" in shown and shown.isascii()


@pytest.mark.parametrize("name", ["$a$^$", "two words; #'", os.fsdecode(b"\xff")])
def test_folders_of_any_name(folder, capsys, name):
    sys.stderr.reconfigure(errors="backslashreplace")  # as it is outside of tests
    assert call("train", *TINY, f"--out=out/{name}") is None
    assert call("train", "--resume", f"--out=out/{name}", "--max_steps=7") is None
    assert call("sample", f"--out=out/{name}", "--max_new_tokens=3") is None
    assert len(checkpoint(Path("out", name))["losses"]) == 7


@pytest.fixture
def machine(monkeypatch):
    """A machine of four cores, of which this process is given machine.share; it counts machine.threads."""
    machine, seconds = types.SimpleNamespace(threads=4, share=4.0), [0.0]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: machine.threads)
    monkeypatch.setattr(
        torch, "set_num_threads", lambda number: setattr(machine, "threads", number)
    )
    monkeypatch.setattr(torch.Tensor, "sin_", lambda x: seconds.append(seconds[-1] + 0.1))
    monkeypatch.setattr(
        model,
        "time",
        types.SimpleNamespace(
            perf_counter=lambda: seconds[-1], process_time=lambda: machine.share * seconds[-1]
        ),
    )
    return machine


@pytest.mark.parametrize("share,threads", [(3.9, 4), (2.9, 3), (2.0, 2), (0.4, 1)])
def test_as_many_threads_as_cores_that_are_free(machine, capsys, share, threads):
    machine.share = share
    train.choose_device("cpu")
    assert machine.threads == threads
    said = (
        f"other programs use the CPU: {threads} of 4 threads (OMP_NUM_THREADS has it otherwise)\n"
    )
    assert capsys.readouterr().err == ("" if threads == 4 else said)


def test_a_number_of_threads_that_is_given_is_taken(machine, folder, monkeypatch, capsys):
    """... and kept by the run, whatever is busy then."""
    machine.share = 1.0
    assert call("train", *TINY, "--threads=3", "--out=out/new") is None
    assert machine.threads == 3 == checkpoint("out/new")["train_config"]["threads"]
    machine.threads = 4
    assert call("train", "--resume", "--out=out/new", "--max_steps=7") is None
    assert machine.threads == 3 and "threads" not in capsys.readouterr().err
    machine.threads = 4
    assert call("train", "--resume", "--out=out/new", "--max_steps=8", "--threads=2") is None
    assert machine.threads == 2
    machine.threads = 4
    assert call("train", "--resume", "--out=out/new", "--max_steps=9", "--threads=9") is None
    assert (
        machine.threads == 4
        and "9 threads are not to be had here: 4, so" in capsys.readouterr().err
    )
    assert call("train", "--resume", "--out=out/new", "--max_steps=10", "--threads=2") is None
    monkeypatch.setenv("OMP_NUM_THREADS", "4")  # which PyTorch has read
    machine.threads = 4
    assert call("train", "--resume", "--out=out/new", "--max_steps=11") is None
    assert machine.threads == 4 == checkpoint("out/new")["train_config"]["threads"]


# Several processes ----------------------------------------------------------------------------------------------------


def test_a_number_of_processes_that_nobody_can_meet_means_nothing(monkeypatch):
    """Schedulers and notebooks may leave it in the environment; only torchrun says where the others are."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for alone in True, False:
        names = runpy.run_path(str(ROOT / "train.py"), run_name="train_again")
        assert (names["RANK"], names["WORLD"]) == ((0, 1) if alone else (1, 2))
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "torchrun's")


TWO = [*TINY[:-3], "--max_steps=6", "--eval_interval=2", "--eval_tokens=500"]
BESIDE["two"] = f"""
import json, sys, tempfile
sys.path.append("tests")
from conftest import ROOT, TEXT, Path, checkpoint, log, program

with tempfile.TemporaryDirectory() as folder:
    Path(folder, "tiny.txt").write_text(TEXT)
    for command in ["prepare.py", "tiny.txt"], ["train.py", *{TWO}]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] * (command[0] == "train.py")
        result = program(*torchrun, ROOT / command[0], *command[1:], cwd=folder)
        assert result.returncode == 0, result.stderr
    assert result.stdout.count("step 6:") == 1, "rank 0 alone speaks"
    run = Path(folder, "out/tiny-qv_ka-agf")
    state = checkpoint(run)
    weights = {{name: weight.tolist() for name, weight in state["model"].items()}}
    print(json.dumps([log(run), state["losses"], weights]))
"""


def test_two_processes_are_one(folder, answer):
    """torchrun with gloo: the same global batch, half on each process, against one process that accumulates."""
    entries, losses, weights = json.loads(answer("two"))
    assert call("train", *TWO, "--micro_batch_size=2", "--out=out/one") is None
    for one, two in zip(log("out/one"), entries, strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    state = checkpoint("out/one")
    assert state["losses"] == pytest.approx(losses, rel=1e-5)
    assert state["train_config"]["optimizer"] == "muon"
    for name, weight in state["model"].items():
        torch.testing.assert_close(weight, torch.tensor(weights[name]), rtol=1e-3, atol=1e-5)


FAILING = f"""
import os, signal, sys, time
from pathlib import Path

sys.path.insert(0, {str(ROOT)!r})
import prepare, train

tasks, threads = Path("/proc/self/task"), [0]                      # of Linux; how many were gloo's, in every step

def of_gloo():
    return sum("gloo" in path.read_text() for path in tasks.glob("*/comm"))

join, batch, write = train.dist.init_process_group, train.batch, train.write
train.dist.init_process_group = lambda backend: join(
    backend, init_method=f"file://{{os.getcwd()}}/{{where}}.store", rank=train.RANK, world_size=train.WORLD)

def failing_batch(data, config, block_size, step, device):
    x, y = batch(data, config, block_size, step, device)
    threads.append(of_gloo())
    if step == 4 and train.RANK == 1 and where == "stop":
        os.kill(os.getpid(), signal.SIGTERM)
    if step == 4 and train.RANK == 1 and where == "nan":
        x, y = x, y.clone().fill_(-100)                             # nothing to predict: the mean over nothing
    return x, y

def failing_write(path, write_to):
    if where == "save" and path.name == "last.pt":
        raise prepare.UserError("the disk is full")
    if where == "stop":
        time.sleep(0.1)                                             # a slow disk: the other one has to wait
    write(path, write_to)

train.batch, train.write, sys.argv[0] = failing_batch, failing_write, "train.py"
for where in "stop", "nan", "save", "data":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        dataset = "nowhere" if where == "data" else "tiny"
        prepare.run(lambda: train.main([f"--dataset={{dataset}}", f"--out=out/{{where}}", *sys.argv[1:]]))
    except SystemExit as stop:
        checkpoints = Path("out", where).glob("last.pt")
        saved = [len(train.torch.load(path, weights_only=True)["losses"]) for path in checkpoints]
        gone = where != "stop" or threads[-1] > of_gloo() == 0 or not tasks.exists()
        print(where, gone, stop.code, *saved, sep="|", file=sys.__stdout__, flush=True)
"""
BESIDE["failing"] = f"""
import os, subprocess, sys, tempfile
from pathlib import Path

environment = os.environ | dict(TORCHELASTIC_RUN_ID="test", WORLD_SIZE="2")
flags = {[*TINY[1:-3], "--max_steps=9", "--eval_interval=3", "--eval_tokens=99"]}
with tempfile.TemporaryDirectory() as folder:
    Path(folder, "tiny.txt").write_text({TEXT!r})
    subprocess.run([sys.executable, {str(ROOT / "prepare.py")!r}, "tiny.txt"], cwd=folder, check=True)
    processes = [subprocess.Popen([sys.executable, "-c", {FAILING!r}, *flags], cwd=folder, text=True,
                                  env=environment | dict(RANK=str(rank)), stdout=subprocess.PIPE) for rank in range(2)]
    try:
        print(processes[0].communicate(timeout=60)[0])
        processes[1].terminate()                                    # as torchrun does with those that wait
        print("second:", processes[1].communicate(timeout=60)[0])
    finally:
        for process in processes:
            process.kill()
"""


def test_when_one_process_fails_both_leave(answer, processes):
    """One of two is asked to stop, has a loss that is no number, cannot save, or finds no data: nobody waits for ever,
    rank 0 says why in one sentence, and what was saved before is there."""
    first, second = answer("failing").split("second: ")
    expected = [
        "stop|True|stopped after step 5; it is saved: go",
        "nan|True|train.py: the loss is nan at step 5",
        "save|True|train.py: the disk is full",
        "data|True|train.py: data set 'nowhere' is missing",
    ]
    sentences = [
        line for line in first.splitlines() if line.startswith(("stop|", "nan|", "save|", "data|"))
    ]
    assert [line[: len(words)] for line, words in zip(sentences, expected, strict=True)] == expected
    assert [line.rpartition("|")[2] for line in sentences[:2]] == ["5", "3"], "steps that are saved"
    assert not sentences[2][-1].isdigit(), "and of the full disk none"
    assert second.split() == ["stop|True|1|5", "nan|True|1|3", "save|True|1"], (
        "gloo's threads are gone"
    )
    assert "Error" not in processes["failing"].result().stderr


# kill.py, in small: what its program does in four settings and 50 times, here in one and twice
BESIDE["kill"] = """
import random, sys, tempfile
sys.path.append("tests")
import kill

kill.FLAGS += ["--n_embd=256", "--batch_size=1", "--eval_interval=1"]      # it writes most of the time
with tempfile.TemporaryDirectory() as folder:
    kill.prepare_signs(folder)
    print(kill.trial(kill.Path(folder), "adamw", 2, random.Random(1), steps=24, early=0))
"""


def test_a_killed_run_goes_on_as_if_it_had_not_been(answer):
    words = answer("kill").strip().splitlines()[-1]
    assert words.startswith("2 kills") and " 0 resumed" not in words

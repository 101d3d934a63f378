"""prepare.py, train.py and sample.py as their users run them, and as they misuse them."""

import contextlib
import hashlib
import http.server
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TEXT, TINY, call

import prepare
import sample
import train
from model import ATTENTIONS, POSITIONS


def log(run):
    """A run's log without its times."""
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in Path(run, "log.jsonl").read_text().splitlines()]


def checkpoint(run, name="last.pt"):
    return torch.load(Path(run, name), weights_only=True)


def program(*command, **options):
    """Runs `python <command>` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=120, env=environment, **options)


@pytest.fixture(scope="module")
def gpt2():
    try:
        return prepare.GPT2Tokenizer()
    except prepare.UserError as error:
        pytest.skip(str(error))


# The way through ------------------------------------------------------------------------------------------------------


def test_prepare_train_sample_from_the_command_line(tmp_path):
    """As in the README, in processes of their own: text in, tokens, training, text out."""
    (tmp_path / "bottles.txt").write_text(TEXT)
    tiny = ["--dataset=bottles", *TINY[1:]]
    for command in ["prepare.py", "bottles.txt"], ["train.py", *tiny], ["train.py", "--resume", "--max_steps=8"]:
        result = program(ROOT / command[0], *command[1:], cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    run = tmp_path / "out" / "bottles-qv_ka-agf"
    assert "python sample.py --out=out/bottles-qv_ka-agf" in result.stdout
    assert [entry["step"] for entry in log(run)] == [3, 6, 8]
    assert set(log(run)[0]) == {"step", "train_loss", "val_loss", "tokens"}
    assert f"validation loss: {log(run)[-1]['val_loss']:.4f} at the end" in result.stdout
    assert 0.1 < float(re.search(r"^memory: (\d+\.\d) GB at the peak$", result.stdout, re.M)[1]) < 4
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    sampled = [program(ROOT / "sample.py", "--prompt=green", "--max_new_tokens=40", flag, cwd=tmp_path) for flag in ("--cache", "--no-cache")]
    assert sampled[0].stdout == sampled[1].stdout and sampled[0].stdout.startswith("green")
    assert len(sampled[0].stdout) == len("green") + 40 + 1
    assert "cache of 2,048 bytes, 128 a token" in sampled[0].stderr and "no cache" in sampled[1].stderr
    state = checkpoint(run)
    assert isinstance(state["model"], dict) and all(isinstance(value, torch.Tensor) for value in state["model"].values())


def test_importing_does_nothing(tmp_path):
    result = program("-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import model, prepare, train, sample", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr, list(tmp_path.iterdir())) == (0, "", "", [])


@pytest.mark.parametrize("name", ["prepare", "train", "sample"])
def test_help_teaches(name, capsys):
    assert call(name, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"python {name}.py" in text and "default" in text
    assert name != "train" or "whatever their defaults here say" in text and "presets: cpu n_layer=4" in text


@pytest.mark.parametrize("attention,pos", [(a, p) for a in ATTENTIONS for p in POSITIONS][::4])
def test_every_attention_trains_and_samples(folder, capsys, attention, pos):
    assert call("train", *TINY, f"--attention={attention}", f"--pos={pos}", "--out=out/new") is None
    assert call("sample", "--out=out/new", "--prompt=wall", "--max_new_tokens=30", "--num_samples=2", "--top_k=5") is None
    captured = capsys.readouterr()
    assert captured.out.count("wall") >= 2 and "60 tokens" in captured.err


# prepare.py -----------------------------------------------------------------------------------------------------------


def test_a_prepared_text_comes_back(folder):
    meta, splits = prepare.load("tiny")
    tokenizer = prepare.tokenizer_from(meta["tokenizer"])
    assert b"".join(tokenizer.decode(splits[name]) for name in ("train", "val")).decode() == TEXT
    assert len(splits["train"]) == int(0.9 * len(TEXT)) == meta["tokens"]["train"]
    assert splits["train"].dtype == np.uint16
    assert meta["sha256"] == hashlib.sha256(TEXT.encode()).hexdigest() and meta["source"] == "tiny.txt"


def test_gpt2_tokens_come_back(folder, gpt2):
    Path("mixed.txt").write_text("Ein Hündchen, 一只小狗, a puppy. " * 20)
    assert call("prepare", "mixed.txt", "--tokenizer=gpt2") is None
    meta, splits = prepare.load("mixed")
    text = b"".join(gpt2.decode(splits[name].tolist()) for name in ("train", "val")).decode()
    assert text == Path("mixed.txt").read_text() and meta["tokenizer"] == {"kind": "gpt2"}
    assert gpt2.decode([50300]) == b"", "an id that only rounds the vocabulary up"


def test_gpt2_trains_and_streams_whole_characters(folder, gpt2, capsys):
    Path("dogs.txt").write_text("一只小狗。" * 300)
    assert call("prepare", "dogs.txt", "--tokenizer=gpt2") is None
    assert call("train", "--dataset=dogs", *TINY[1:], "--out=out/dogs", "--max_steps=60", "--learning_rate=1e-2", "--warmup_steps=0") is None
    assert checkpoint("out/dogs")["model_config"]["vocab_size"] == 50304
    capsys.readouterr()
    assert call("sample", "--out=out/dogs", "--prompt=一只", "--max_new_tokens=30", "--temperature=0") is None
    assert "小狗。一只" in capsys.readouterr().out


def test_pydoc_needs_no_network(folder):
    assert call("prepare", "pydoc") is None
    meta, splits = prepare.load("pydoc")
    assert len(splits["train"]) > 300_000 and meta["source"].startswith("pydoc_data.topics of Python")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves the test's folder, in the place of the site that has tiny Shakespeare."""
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        monkeypatch.setattr(prepare, "SHAKESPEARE_URL", f"http://127.0.0.1:{httpd.server_address[1]}/tiny.txt")
        yield
        httpd.shutdown()


def test_shakespeare_is_downloaded_and_checked(folder, server, monkeypatch):
    assert "is not tiny Shakespeare: its SHA-256" in call("prepare", "shakespeare_char")
    assert not Path("data/shakespeare_char").exists()
    monkeypatch.setattr(prepare, "SHAKESPEARE_SHA256", hashlib.sha256(TEXT.encode()).hexdigest())
    assert call("train", *TINY[1:], "--out=out/default") is None                     # no --dataset: it is fetched on the way
    assert checkpoint("out/default")["train_config"]["dataset"] == "shakespeare_char"
    assert Path("data/shakespeare_char/input.txt").read_text() == TEXT
    monkeypatch.setattr(prepare, "SHAKESPEARE_URL", "http://127.0.0.1:9/")
    assert call("prepare", "shakespeare_char") is None, "from input.txt, without the network"


def test_real_shakespeare(folder):
    source = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
    if not source.exists():
        pytest.skip(f"the real tiny Shakespeare is not at ../shared/data/{source.name}")
    Path("data/shakespeare_char").mkdir()
    shutil.copy(source, "data/shakespeare_char/input.txt")
    assert call("prepare", "shakespeare_char") is None
    meta, splits = prepare.load("shakespeare_char")
    assert (len(splits["train"]), len(splits["val"]), len(meta["tokenizer"]["chars"])) == (1_003_854, 111_540, 65)


def test_without_network_the_default_is_pydoc_and_a_named_data_set_is_not(folder, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "SHAKESPEARE_URL", "http://127.0.0.1:9/")
    assert call("train", *TINY[1:], "--eval_tokens=1000", "--out=out/default") is None
    assert "training on pydoc, Python's language reference, instead" in capsys.readouterr().out
    assert checkpoint("out/default")["train_config"]["dataset"] == "pydoc"
    assert "cannot be downloaded" in call("train", *TINY[1:], "--dataset=shakespeare_char", "--out=out/named")
    assert not Path("out/named").exists()


def test_openwebtext_streams_from_parquet(folder, gpt2):
    pytest.importorskip("datasets", reason="openwebtext needs the package datasets, which is not installed")
    import pyarrow
    import pyarrow.parquet

    texts = [f"Document number {i} says {'very ' * (i % 5)}little." for i in range(2500)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), "web.parquet")
    assert call("prepare", "openwebtext", "--source=web.parquet") is None
    _, splits = prepare.load("openwebtext")
    documents = gpt2.decode(splits["val"].tolist()).decode().split("<|endoftext|>")
    assert documents == [texts[0], texts[2000], ""]
    assert gpt2.decode(splits["train"].tolist()).decode().count("<|endoftext|>") == 2498
    assert call("prepare", "openwebtext", "--source=web.parquet", "--tokens=1e3") is None
    meta, splits = prepare.load("openwebtext")
    assert len(splits["train"]) + len(splits["val"]) == sum(meta["tokens"].values()) == 1000
    Path("web.txt").write_text("One document.\n\nAnother\none.\n\nA third.")
    assert call("prepare", "openwebtext", "--source=web.txt") is None
    Path("bad.parquet").write_text("no parquet")
    assert "bad.parquet cannot be read" in call("prepare", "openwebtext", "--source=bad.parquet")
    assert prepare.load("openwebtext")[0]["documents"] == 3, "the data set before is kept"


def test_openwebtext_in_bounded_memory(folder, gpt2, monkeypatch):
    """A source without an end: only what is asked for is read."""
    seen = itertools.count()
    monkeypatch.setattr(prepare, "documents", lambda source: (f"Document {next(seen)}." for _ in itertools.count()))
    assert call("prepare", "openwebtext", "--tokens=20000") is None
    assert next(seen) < 20000


def limited_file_size(size, work):
    """Runs work() in a process that may write no file larger than size bytes: a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        return work()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_no_half_made_data_set(folder):
    before = {path.name: path.read_bytes() for path in Path("data/tiny").iterdir()}
    Path("tiny.txt").write_text(TEXT * 2)
    sentence = limited_file_size(20_000, lambda: call("prepare", "tiny.txt"))
    assert "data/tiny could not be written (File too large)" in sentence and "run the same command again" in sentence
    assert {path.name: path.read_bytes() for path in Path("data/tiny").iterdir()} == before
    limited_file_size(20_000, lambda: call("prepare", "pydoc"))
    assert list(Path("data").glob("pydoc/*")) == []
    assert "data set 'pydoc2' is not prepared" in call("train", "--dataset=pydoc2", "--device=cpu")


def test_an_interrupted_prepare_leaves_nothing(folder, monkeypatch):
    def interrupted(self, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare.CharTokenizer, "encode", interrupted)
    assert call("prepare", "pydoc") == "interrupted"
    assert list(Path("data").glob("pydoc/*")) == []


# train.py -------------------------------------------------------------------------------------------------------------

RESUME = [*TINY[:-2], "--max_steps=12", "--eval_interval=4", "--dropout=0.2", "--micro_batch_size=2"]


@pytest.mark.parametrize("at", [4, 7], ids=["at an evaluation", "between two"])
def test_resume_is_exact(folder, monkeypatch, at):
    """Ctrl-C after a step, then --resume: bit for bit the run that was never stopped, dropout included."""
    assert call("train", *RESUME, "--out=out/whole") is None
    steps, step = itertools.count(1), train.train_step

    def interrupting(*args):
        if next(steps) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(train, "train_step", interrupting)
    assert call("train", *RESUME, "--out=out/parts") == \
        f"stopped after step {at}, which is saved; to go on: python train.py --resume --out=out/parts"
    assert checkpoint("out/parts")["step"] == at
    assert call("train", "--resume", "--out=out/parts") is None
    assert log("out/parts") == log("out/whole")
    whole, parts = checkpoint("out/whole"), checkpoint("out/parts")
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_a_process_of_its_own(folder, number):
    command = [sys.executable, ROOT / "train.py", *TINY[:-2], "--max_steps=1000000", "--eval_interval=1000000", "--out=out/long"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("plan:"):
        pass
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and errors.startswith("stopped after step ") and "Traceback" not in errors
    assert checkpoint("out/long")["step"] > 0 and not Path("out/long/best.pt").exists()
    assert call("sample", "--out=out/long", "--max_new_tokens=3") is None


def test_resume_takes_new_flags(folder):
    assert call("train", "--resume", "--out=out/run", "--max_steps=9", "--weight_decay=5", "--learning_rate=1e-4") is None
    state = checkpoint("out/run")
    assert [group["weight_decay"] for group in state["optimizer"]["param_groups"]] == [5, 0]
    assert state["train_config"]["weight_decay"] == 5 and state["optimizer"]["state"][0]["step"] == 9


def test_best_is_saved_before_last(folder, monkeypatch):
    """... so that last.pt, from which a run goes on, never knows of a better one than is there; what was measured with an
    older one is removed."""
    def dying(path, write_to):
        if path.name == "last.pt":
            raise KeyboardInterrupt
        write(path, write_to)

    write, stale = train.write, Path("out/run/eval.json")
    stale.write_text("{}")
    monkeypatch.setattr(train, "write", dying)
    assert call("train", "--resume", "--out=out/run", "--max_steps=60") == "interrupted"
    assert checkpoint("out/run")["step"] == 6 and torch.load("out/run/best.pt", weights_only=True)["step"] == 9 and not stale.exists()


def test_divergence_keeps_the_last_good_checkpoint(folder):
    before = Path("out/run/last.pt").read_bytes()
    sentence = call("train", "--resume", "--out=out/run", "--max_steps=300", "--learning_rate=1e38", "--grad_clip=0", "--weight_decay=0")
    assert "training has diverged" in sentence and "--resume --out=out/run --learning_rate=" in sentence
    assert Path("out/run/last.pt").read_bytes() == before


def test_a_full_disk_keeps_the_last_checkpoint(folder):
    before = Path("out/run/last.pt").read_bytes()
    sentence = limited_file_size(5_000, lambda: call("train", "--resume", "--out=out/run", "--max_steps=9"))
    assert "out/run/best.pt could not be written" in sentence and "what was saved before is intact" in sentence
    assert Path("out/run/last.pt").read_bytes() == before
    assert not list(Path("out/run").glob("*.tmp"))


def test_a_new_run_never_overwrites_an_old_one(folder):
    for name in "tiny-qv-rope", "tiny-qv-rope-2":
        assert call("train", *TINY, "--attention=qv", "--pos=rope") is None
        assert Path("out", name, "last.pt").exists()


def test_runs_that_start_together_get_folders_of_their_own(folder):
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(train.new_folder("same"))) for _ in range(8)]
    for step in threading.Thread.start, threading.Thread.join:
        for thread in threads:
            step(thread)
    assert len(set(folders)) == 8 and all(folder.is_dir() for folder in folders)


@pytest.mark.parametrize("count,eval_tokens,predicted", [(83, None, 82), (81, None, 80), (10, None, 9), (83, 20, 20)])
def test_validation_covers_every_token_once(folder, count, eval_tokens, predicted):
    """Against the definition: each token after the first, predicted from those before it in its window of 16."""
    model, alone = train.load_checkpoint(Path("out/run/last.pt"))[1], train.Processes("cpu")
    val = prepare.load("tiny")[1]["val"][:count]
    losses = []
    for i in range(1, predicted + 1):
        before = torch.from_numpy(val[(i - 1) // 16 * 16 : i].astype(np.int64))
        losses.append(torch.nn.functional.cross_entropy(model.eval()(before[None])[0][0, -1], torch.tensor(int(val[i]))).item())
    measured = train.evaluate(model, val, 16, eval_tokens, alone, train.autocast(alone.device, torch.float32))
    assert math.isclose(measured, sum(losses) / predicted, rel_tol=1e-5)


def test_validation_says_how_far_it_is(folder, monkeypatch):
    shown = []
    monkeypatch.setattr(train.Progress, "__call__", lambda self, done, text: shown.append((done, self.total, text)))
    model, alone = train.load_checkpoint(Path("out/run/last.pt"))[1], train.Processes("cpu")
    train.evaluate(model, np.zeros(20_000, np.uint16), 16, None, alone, contextlib.nullcontext())
    assert shown[0] == (1, 4, "validating: 1 of 4 batches") and len(shown) == 4      # 8,192 tokens at a time, and the rest


def test_batches_are_a_function_of_seed_and_step():
    data, one, two = np.arange(1000, dtype=np.uint16), train.TrainConfig(batch_size=8), train.TrainConfig(batch_size=8, seed=2)
    alone = type("Processes", (), dict(rank=0, world=1, device="cpu"))
    x, y = train.batch(data, one, 5, 7, alone)
    assert torch.equal(x + 1, y) and x.shape == (8, 5)
    assert torch.equal(x, train.batch(data, one, 5, 7, alone)[0])
    assert not torch.equal(x, train.batch(data, one, 5, 8, alone)[0]) and not torch.equal(x, train.batch(data, two, 5, 7, alone)[0])
    shares = [train.batch(data, one, 5, 7, type("Processes", (), dict(rank=r, world=2, device="cpu")))[0] for r in range(2)]
    assert torch.equal(torch.cat(shares), x) and not torch.equal(*shares)


def test_two_processes_are_one(folder):
    """torchrun with gloo: the same global batch, half on each process, against one process that accumulates."""
    flags = [*TINY[:-2], "--max_steps=6", "--eval_interval=2"]
    result = program("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py", *flags)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("step 6:") == 1, "rank 0 alone speaks"
    Path("out/tiny-qv_ka-agf").rename("out/two")
    assert call("train", *flags, "--micro_batch_size=2", "--out=out/one") is None
    for one, two in zip(log("out/one"), log("out/two"), strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    one, two = (checkpoint(run) for run in ("out/one", "out/two"))
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-5)
    one, two = one["model"], two["model"]
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)


def test_learning_rate_and_weight_decay():
    config = train.TrainConfig(learning_rate=1.0, warmup_steps=9, max_steps=100)
    rates = [train.learning_rate(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[100] == pytest.approx(0.1) and max(rates) > 0.97 and np.argmax(rates) == 9
    model = train.GPT(train.GPTConfig(block_size=4, n_layer=1, n_head=1, n_embd=4))
    decayed, rest = train.make_optimizer(model, config, torch.device("cpu")).param_groups
    assert all(p.dim() > 1 for p in decayed["params"]) and decayed["weight_decay"] == 0.1
    assert all(p.dim() == 1 for p in rest["params"]) and rest["weight_decay"] == 0
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_presets_are_defaults_that_flags_override():
    cpu, model = train.resolve(dict(preset="cpu", n_layer=2))
    assert (model.n_layer, model.n_embd, cpu.max_steps) == (2, 128, train.PRESETS["cpu"]["max_steps"])
    _, model = train.resolve(dict(preset="gpu"))
    assert 10.0e6 < sum(p.numel() for p in train.GPT(train.replace(model, attention="qkv")).parameters()) < 11e6
    config, model = train.resolve(dict(preset="gpt2"))
    assert config.batch_size * model.block_size == 491_520 and config.dataset == "openwebtext"


# Many runs ------------------------------------------------------------------------------------------------------------

SWEEP = [*TINY[:-2], "--attention=qkv,qv", "--pos=agf", "--seeds=2", "--eval_interval=10"]


def sweep_log(attention, seed, steps=20):
    return log(f"out/sweep/cpu-tiny-{attention}-agf-batch_size=4-block_size=16-eval_interval=10-max_steps={steps}-n_embd=16-n_head=2-n_layer=1"
               f"-seed={seed}")


def test_a_sweep_is_stopped_and_goes_on(folder, capsys):
    """Its runs go on where they were stopped, and are those that single commands would make; finished ones are left alone."""
    flags = [*TINY[:-2], "--pos=agf", "--max_steps=2000", "--eval_interval=250"]
    command = [sys.executable, ROOT / "train.py", *flags, "--attention=qkv,qv", "--workers=2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not any(Path("out").glob("sweep/*/best.pt")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and out.startswith("runs: 2, of them finished: 0, at a time: 2\n")
    assert errors.strip().splitlines()[-1] == "stopped; 2 of 2 runs are to be finished: start the same command again"
    stopped = next(Path("out").glob("sweep/*/best.pt")).parent
    assert 250 <= checkpoint(stopped)["step"] < 2000
    assert call("train", *flags, "--attention=qkv,qv", "--workers=2") is None
    assert (stopped / "output.txt").read_text().count("step 250: ") == 1, "resumed, not begun again"
    assert capsys.readouterr().out.count("validation loss") == 2
    attention = checkpoint(stopped)["model_config"]["attention"]
    assert call("train", *flags, f"--attention={attention}", "--out=out/single") is None
    assert log("out/single") == log(stopped) and len(log(stopped)) == 8
    capsys.readouterr()
    assert call("train", *flags, "--attention=qkv,qv") is None
    assert capsys.readouterr().out.startswith("runs: 2, of them finished: 2")


def test_a_sweep_gives_a_flag_for_one_attention_to_that_one():
    runs = train.spread({"attention": "qkv,qv_ka", "d_ctx": 8, "n_layer": 1}, 2)
    assert [run.get("d_ctx") for run in runs] == [None, 8, None, 8] and all(run["n_layer"] == 1 for run in runs)


def test_a_sweep_goes_on_where_a_log_was_lost(folder):
    """Stopped between its last checkpoint and its log, a run is finished all the same."""
    flags = [*SWEEP[:-4], "--attention=qv", "--pos=agf", "--seeds=1", "--max_steps=20", "--eval_interval=10"]
    assert call("train", *flags) is None
    (log_file,) = Path("out/sweep").glob("*/log.jsonl")
    before = log_file.read_text()
    log_file.write_text(before[:-9])
    assert f"{log_file} is damaged" in call("train", *flags) and "remove it" in call("train", *flags)
    log_file.unlink()
    assert call("train", *flags) is None and log_file.read_text() == before


def test_a_run_that_fails_does_not_stop_the_sweep(folder, capsys):
    broken = train.folder_of(train.parse([*SWEEP[:-4], "--attention=qkv", "--pos=agf", "--eval_interval=10", "--max_steps=20"]), train.SWEEP)
    broken.mkdir(parents=True)
    (broken / "last.pt").write_text("hello")
    sentence = call("train", *SWEEP, "--max_steps=20", "--workers=2")
    assert sentence.endswith(f"1 of 4 runs failed; read {broken / 'output.txt'}, mend it, and start the same command again")
    assert "is damaged, or its model is not one of this model.py" in capsys.readouterr().out
    assert len(sweep_log("qv", 1337)) == len(sweep_log("qkv", 1338)) == 2


def test_validation_in_longer_windows(folder, capsys):
    """The losses of --eval_only against a sum over the windows by hand; also of learned positions, as far as they go."""
    for pos, lengths in ("agf", (8, 16, 40)), ("rope", (16, 40)), ("learned", (8, 16)):
        out = Path("out", pos)
        assert call("train", *TINY, f"--pos={pos}", f"--out={out}") is None
        _, model = train.load_checkpoint(out / "best.pt")
        _, splits = prepare.load("tiny")
        tokens = torch.from_numpy(splits["val"].astype(np.int64))
        for length in lengths:
            assert call("train", "--eval_only", f"--out={out}", "--device=cpu", f"--eval_block_size={length}") is None
            longer = train.GPT(train.replace(model.config, block_size=max(16, length)))
            longer.load_state_dict(model.state_dict())
            total = sum(longer(x[None], y[None])[1].item() * len(x) for x, y in zip(tokens[:-1].split(length), tokens[1:].split(length)))
            expected = total / (len(tokens) - 1)
            assert json.loads((out / "eval.json").read_text())[str(length)] == pytest.approx(expected, abs=1e-5)
            assert f"validation loss {expected:.4f} in windows of {length} tokens (trained on 16)" in capsys.readouterr().out
    assert "--eval_block_size=17 is more than the 16 positions that out/learned has learned" in call(
        "train", "--eval_only", "--out=out/learned", "--device=cpu", "--eval_block_size=17")
    assert json.loads(Path("out/rope/eval.json").read_text()).keys() == {"16", "40"}


def test_a_report_of_real_runs(folder, capsys):
    """Two seeds of two attentions: every figure of the table against the runs' own files, and what was stored of other presets."""
    assert call("train", *SWEEP, "--max_steps=20", "--workers=2") is None
    assert call("train", *SWEEP, "--max_steps=20", "--eval_only", "--eval_block_size=32") is None
    capsys.readouterr()
    assert call("train", "--report") is None
    text = Path("assets/results.md").read_text()
    assert text in capsys.readouterr().out
    assert "**cpu preset, tiny, batch_size=4, block_size=16, eval_interval=10, max_steps=20, n_embd=16, n_head=2, n_layer=1**" in text
    tables = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| agf")]
    losses = {name: np.array([sweep_log(name, seed)[-1]["val_loss"] for seed in (1337, 1338)]) for name in ("qkv", "qv")}
    gaps, spread = losses["qv"] - losses["qkv"], f"{losses['qv'].mean():.4f} ± {losses['qv'].std(ddof=1):.4f}"
    parameters = 3 * 16 * 16 + 2                                                     # W_Q, W_V and the output; a decay for each head
    qkv, qv, _, qv_longer = tables
    assert [cell.strip("*") for cell in qv[:7]] == ["agf", "qv", "2", spread, "20", spread, f"{gaps.mean():+.4f} ± {gaps.std(ddof=1) / 2**0.5:.4f}"]
    assert qv[7:10] == [f"{parameters:,}", f"{parameters + 8 * 16 * 16 + 3 * 16 + len(set(TEXT)) * 16:,}", "64"]
    assert qkv[9] == "128" and float(qv[10].replace(",", "")) > 0
    longer = [json.loads(path.read_text())["32"] for path in sorted(Path("out/sweep").glob("*-qv-*/eval.json"))]
    assert qv_longer == ["agf", "qv", f"{np.mean(longer):.4f} ± {np.std(longer, ddof=1):.4f}"]
    assert all(Path("assets", name).read_bytes().startswith(b"\x89PNG") for name in ("results.png", "lengths.png"))


def made_up(attention, pos, seed, loss, early, preset="gpu"):
    """A run's record, as --report stores it."""
    return dict(preset=preset, dataset="some", attention=attention, pos=pos, flags=[], seed=seed, best_val_loss=loss, best_step=seed,
                final_val_loss=loss + 0.1, early_steps=10, early_loss=early, early_curve=[early] * 5, val_loss_by_length={}, attention_parameters=1,
                parameters=2, cache_bytes_per_token=3, tokens_per_second=2 * seed, log=[[5, loss, 1.0], [9, loss + 0.1, 2.0]])


def test_a_report_of_known_numbers(folder, capsys):
    """The claims' arithmetic, paired by seed, on numbers whose answer is clear; a seed that QKV lacks is not compared."""
    Path("assets").mkdir()
    noise = {1: 0.3, 2: -0.2, 3: 0.5}                                                # of a seed, the same for all: pairing removes it
    records = [made_up(name, pos, seed, 2 + gap + noise[seed], 3 + early + noise[seed])
               for pos, gaps in (("learned", (0.0, 0.08, 0.05)), ("agf", (0.0, 0.03, 0.01)))
               for (name, early), gap in zip((("qkv", 0.0), ("qv", 0.1), ("qv_ka", -0.05)), gaps) for seed in noise]
    records.append(made_up("qv", "agf", 4, 99.0, 99.0))
    records += [made_up("qkv", "rope", seed, loss, 1.0) for seed, loss in ((1, 1.48), (2, 1.46), (3, 1.36))]
    records += [made_up("mla", "rope", seed, loss, 1.0) for seed, loss in ((1, 1.49), (2, 1.49), (3, 1.35))]
    Path("assets/results.json").write_text(json.dumps(records))
    assert call("train", "--report", "--out=out") is None                            # its run is of another preset
    text = Path("assets/results.md").read_text()
    for line in ("| claim, nats | learned | rope | agf |",
                 "| C1: qv - qkv | **+0.0800 ± 0.0000** |  | **+0.0300 ± 0.0000** |",
                 "| C2: (qv - qkv) - half of the same under learned |  |  | **-0.0100 ± 0.0000** |",
                 "| C3: qv_ka - qkv | **+0.0500 ± 0.0000** |  | **+0.0100 ± 0.0000** |",
                 "| C3: qv_ka - qv | **-0.0300 ± 0.0000** |  | **-0.0200 ± 0.0000** |",
                 "| C3: (qv_ka - qkv) - half of (qv - qkv) | **+0.0100 ± 0.0000** |  | **-0.0050 ± 0.0000** |",
                 "| qkv - qkv under rope | +0.7667 ± 0.2325 |  | +0.7667 ± 0.2325 |",
                 "| C4: qv_ka - qkv, training loss over the first fifth | **-0.0500 ± 0.0000** |  | **-0.0500 ± 0.0000** |",
                 "| learned | qkv | 3 | 2.2000 ± 0.3606 | 2 | 2.3000 ± 0.3606 | +0.0000 ± 0.0000 | 1 | 2 | 3 | 6 |  |",
                 "| rope | qkv | 3 | 1.4333 ± 0.0643 | 2 | 1.5333 ± 0.0643 | +0.0000 ± 0.0000 | 1 | 2 | 3 | 6 | 1 ± 0 |",
                 "| rope | mla | 3 | 1.4433 ± 0.0808 | 2 | 1.5433 ± 0.0808 | +0.0100 ± 0.0115 | 1 | 2 | 3 | 6 | 1 |",
                 "| agf | qv | 4 | 26.4225 ± 48.3859 | 2 | 26.5225 ± 48.3859 | **+0.0300 ± 0.0000** | 1 | 2 | 3 | 8 |  |"):
        assert line in text, line
    assert "**gpu preset, some**" in text and "**cpu preset, tiny, batch_size=4, " in text
    assert f"runs: {len(records) + 1}; finished ones in out/: 1; others, of the {len(records)} that " in capsys.readouterr().out
    stored = json.loads(Path("assets/results.json").read_text())
    assert len(stored) == len(records) + 1 and all(record in stored for record in records)
    assert call("train", "--report", "--out=out") is None and json.loads(Path("assets/results.json").read_text()) == stored


def test_the_rival_of_a_variant_is_qkv_with_its_flags_or_else_without(folder):
    runs = [{**made_up(attention, "agf", 1, loss, 1.0), "flags": flags} for attention, flags, loss in (
        ("qkv", [], 1.0), ("qkv", ["n_inner=32"], 1.5), ("qv", ["n_inner=32"], 1.7), ("qv", ["n_inner=64"], 1.8))]
    sweep = train.Sweep(["some"], runs)
    assert [sweep.gap("agf", f"qv n_inner={n}")[1].item() for n in (32, 64)] == pytest.approx([0.2, 0.8])


def test_a_report_with_nothing_to_compare_keeps_no_picture_of_something_else(folder, capsys):
    Path("assets").mkdir()
    Path("assets/results.png").write_text("of other runs")
    assert call("train", "--report", "--out=out") is None
    assert "\nwritten: results.json, results.md in assets/\n" in capsys.readouterr().out and not Path("assets/results.png").exists()


def test_the_readme_shows_what_the_stored_runs_say(tmp_path, monkeypatch):
    """Its tables are the ones that --report makes of assets/results.json, here and now, and its sentences take theirs from them."""
    shutil.copytree(ROOT / "assets", tmp_path / "assets")
    monkeypatch.chdir(tmp_path)
    assert call("train", "--report") is None
    for name in "results.md", "results.json":
        assert Path("assets", name).read_text() == (ROOT / "assets" / name).read_text()
    readme, results = (ROOT / "README.md").read_text(), Path("assets/results.md").read_text()
    assert results in readme
    quoted = re.findall(r"[+-]?\d\.\d{4} ± \d\.\d{4}", readme.replace(results, ""))
    assert len(quoted) > 10 and all(figure in results for figure in quoted)
    plain = [run for run in json.loads(Path("assets/results.json").read_text()) if not run["flags"]]
    assert f"# {len(plain)} runs, together {prepare.clock(sum(run['log'][-1][2] for run in plain))} of training" in readme


# sample.py ------------------------------------------------------------------------------------------------------------


def test_prompts_from_everywhere(folder, capsys, monkeypatch):
    Path("prompt.txt").write_text("hanging")
    texts = []
    for flags in ["--prompt=hanging"], ["--prompt_file=prompt.txt"]:
        assert call("sample", *flags, "--max_new_tokens=20") is None
        texts.append(capsys.readouterr().out)
    piped = program(ROOT / "sample.py", "--prompt_file=-", "--max_new_tokens=20", input="hanging", cwd=folder)
    assert texts == [piped.stdout] * 2
    assert call("sample", "--prompt=hanging", "--max_new_tokens=20", "--seed=2") is None
    assert capsys.readouterr().out != texts[0]


def test_a_reader_may_leave(folder):
    process = subprocess.Popen([sys.executable, ROOT / "sample.py", "--max_new_tokens=1000000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(timeout=60) == 1


def test_sampling_takes_the_newest_run(folder, capsys):
    assert call("train", *TINY, "--attention=gqa", "--out=out/newer") is None
    assert call("sample", "--max_new_tokens=2") is None
    assert "gqa, agf, out/newer" in capsys.readouterr().err


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_attention_maps_of_every_variant(folder, capsys, attention):
    assert call("train", *TINY, f"--attention={attention}", "--pos=rope", "--out=out/new") is None
    assert call("sample", "--out=out/new", "--prompt=bottles $", "--attention_map=map.png") is not None, "$ is no known character"
    assert call("sample", "--out=out/new", "--prompt=bottles", "--attention_map=map.png") is None
    assert Path("map.png").read_bytes().startswith(b"\x89PNG")
    _, model = train.load_checkpoint(Path("out/new/last.pt"))
    weights = sample.attention_weights(model.eval(), torch.arange(7)[None])
    assert weights.shape == (1, 2, 7, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 7))


def test_benchmark_prints_measured_bytes(capsys, monkeypatch):
    """And ratios, of a clock by which a token takes 1/4 s with the cache (five attentions, three tokens), and 1/2 s without (two)."""
    took = itertools.cycle([0.25] * 15 + [0.5] * 10)
    clock = itertools.accumulate(itertools.chain.from_iterable((100.0, next(took)) for _ in itertools.count()))
    monkeypatch.setattr(sample, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    shape = train.GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=64)
    sample.benchmark(shape, torch.device("cpu"), train.autocast(torch.device("cpu"), torch.float32), tokens=2, tokens_uncached=1)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [tuple(row[:2]) for row in rows[2:]] == [(p, a) for p in POSITIONS for a in ATTENTIONS]
    measured = {row[1]: int(row[2]) for row in rows if row[0] == "rope"}
    assert measured.items() >= dict(qkv=128, gqa=64, mla=144, qv=64, qv_ka=128).items()
    assert all(row[3:] == ["4", "1.00", "2.0", "2"] for row in rows[2:])


# Misuse: one sentence, a non-zero exit, nothing lost ------------------------------------------------------------------

DAMAGE = {
    "truncated checkpoint": lambda: Path("out/run/best.pt").write_bytes(Path("out/run/best.pt").read_bytes()[:3000]),
    "empty checkpoint": lambda: Path("out/run/best.pt").write_bytes(b""),
    "corrupt checkpoint": lambda: Path("out/run/best.pt").write_bytes((raw := Path("out/run/best.pt").read_bytes())[: (half := len(raw) // 2)]
                                                                      + bytes(200) + raw[half + 200 :]),
    "text for checkpoint": lambda: Path("out/run/best.pt").write_text("hello"),
    "other checkpoint": lambda: torch.save({"model": {}}, "out/run/best.pt"),
    "list for checkpoint": lambda: torch.save([1, 2], "out/run/best.pt"),
    "foreign attention": lambda: torch.save({**checkpoint("out/run"), "model_config": {**checkpoint("out/run")["model_config"],
                                                                                     "attention": "mine"}}, "out/run/best.pt"),
    "truncated data": lambda: Path("data/tiny/train.bin").write_bytes(Path("data/tiny/train.bin").read_bytes()[:-5]),
    "foreign tokens": lambda: Path("data/tiny/val.bin").write_bytes(b"\xff" * Path("data/tiny/val.bin").stat().st_size),
    "missing data": lambda: Path("data/tiny/val.bin").unlink(),
    "truncated meta": lambda: Path("data/tiny/meta.json").write_text('{"tokenizer": '),
    "meta without tokens": lambda: Path("data/tiny/meta.json").write_text('{"tokenizer": {"kind": "gpt2"}}'),
    "list for meta": lambda: Path("data/tiny/meta.json").write_text("[]"),
    "other tokenizer": lambda: (Path("tiny.txt").write_text(TEXT + "~"), call("prepare", "tiny.txt")),
    "other text": lambda: (Path("tiny.txt").write_text(TEXT[::-1]), call("prepare", "tiny.txt")),
    "no runs": lambda: shutil.rmtree("out"),
    "folder for picture": lambda: Path("map.png").mkdir(),
    "empty text": lambda: Path("empty.txt").write_text(""),
    "binary text": lambda: Path("binary.txt").write_bytes(b"abc\xff\xfe" * 50),
    "taken name": lambda: Path("pydoc.txt").write_text(TEXT),
    "short text": lambda: (Path("short.txt").write_text("abcdefghij" * 3), call("prepare", "short.txt")),
    "other input.txt": lambda: (Path("data/shakespeare_char").mkdir(), Path("data/shakespeare_char/input.txt").write_text(TEXT)),
    "damaged results": lambda: (Path("out/run/eval.json").write_text("{"), Path("assets").mkdir(), Path("assets/results.json").write_text("[")),
    "dict for results": lambda: (Path("assets").mkdir(), Path("assets/results.json").write_text("{}")),
    "file for folder": lambda: Path("taken").write_text(""),
    None: lambda: None,
}
NEW = [*TINY, "--out=out/new"]

MISUSE = [
    # program, flags, what is damaged before, words of the sentence
    ("train", [*NEW, "--attentoin=qv"], None, "unrecognized arguments: --attentoin=qv"),
    ("train", [*NEW, "--attention=qkw"], None, "--attention='qkw' is unknown; choose one of qkv, gqa, mla, qv, qv_ka"),
    ("train", [*NEW, "--attention=qkv,qkw"], None, "--attention='qkw' is unknown; choose one of qkv, gqa, mla, qv, qv_ka"),
    ("train", [*NEW, "--seeds=0"], None, "--seeds=0 must be at least 1"),
    ("train", [*NEW, "--seeds=2", "--workers=0"], None, "--workers=0 must be at least 1"),
    ("train", [*NEW, "--pos=all", "--resume"], None, "a sweep goes on when the same command is started again"),
    ("train", [*NEW, "--eval_block_size=32"], None, "--eval_block_size=32 is for --eval_only; to train with it, take --block_size"),
    ("train", ["--eval_only", "--out=out/run", "--attention=qv"], None, "--eval_only takes a run as it is, so leave --attention out"),
    ("train", ["--eval_only", "--out=out/none"], None, "there is no checkpoint out/none/last.pt; --out takes the folder of a run"),
    ("train", ["--eval_only", "--out=out/run"], "other text", "data set 'tiny' is not the one that out/run was trained on"),
    ("train", ["--eval_only", "--out=out/run"], "damaged results", "out/run/eval.json is damaged"),
    ("train", ["--eval_only", "--out=out"], None, "there is no checkpoint out/last.pt; --out takes the folder of a run that train.py has made, for example out/run"),
    ("train", [*TINY, "--eval_only", "--seeds=2"], None, "out/sweep has no run cpu-tiny-qv_ka-agf-batch_size=4-"),
    ("sample", ["--attention_map=a.png", "--no-cache", "--top_k=3"], None, "so leave --no-cache, --top_k out"),
    ("train", ["--report", "--out=taken"], "damaged results", "assets/results.json is damaged"),
    ("train", ["--report"], None, "there is no folder of a finished run in out/sweep/; train some first: python train.py --attention=all"),
    ("train", ["--eval_only", "--out=out/run", "--eval_tokens=9"], None, "--eval_only takes a run as it is, so leave --eval_tokens out"),
    ("train", ["--eval_only", "--out=out/run", "--eval_block_size=99999"], None, "--eval_block_size=99999 is more than the "),
    ("train", ["--eval_only", "--report"], None, "--report and --eval_only are two tasks; give one"),
    ("train", [*NEW, "--workers=2"], None, "--workers=2 is for a sweep; give --seeds too"),
    ("train", ["--report"], "dict for results", "assets/results.json is damaged (a dict, not a list)"),
    ("train", [*NEW, "--kernel=cuda"], None, "invalid choice: 'cuda'"),
    ("sample", ["--benchmark", "--kernel=triton"], None, "the kernel's own benchmark is python kernel.py"),
    ("train", [*NEW, "--n_layer=two"], None, "argument --n_layer: two must be a whole number below 2**63, for example 1000 or 1e3"),
    ("train", [*NEW, "--max_steps=2.5"], None, "argument --max_steps: 2.5 must be a whole number"),
    ("train", [*NEW, "--n_embd=1e30"], None, "argument --n_embd: 1e30 must be a whole number below 2**63"),
    ("train", [*NEW, "--n_layer=0"], None, "--n_layer=0 must be at least 1"),
    ("train", [*NEW, "--n_head=3"], None, "--n_embd=16 must be a multiple of n_head=3, for example 18"),
    ("train", [*NEW, "--attention=gqa", "--n_kv_head=5"], None, "--n_kv_head=5 must divide n_head=2"),
    ("train", [*NEW, "--attention=mla", "--n_kv_head=1"], None, "--n_kv_head=1 is for --attention=gqa or qv or qv_ka; with --attention=mla, leave it out"),
    ("train", [*NEW, "--attention=qkv,qv", "--d_ctx=8"], None, "--d_ctx=8 is for --attention=qv_ka; with --attention=qkv,qv, leave it out"),
    ("train", [*NEW, "--attention=mla", "--d_rope=8"], None, "--d_rope=8 is for --pos=rope; with --pos=agf, leave it out"),
    ("train", ["--report", "--out=out/run"], None, "there is no folder of a finished run in out/run/"),
    ("train", ["--report", "--seeds=3"], None, "--report takes every finished run of --out, so leave --seeds out"),
    ("train", ["--report", "--attention=qv"], None, "--report takes every finished run of --out, so leave --attention out"),
    ("sample", ["--benchmark", "--top_k=3"], None, "--benchmark compares untrained models, written in PyTorch, so leave --top_k out"),
    ("sample", ["--attention_map=a.png", "--temperature=0"], None, "draws the prompt and writes no text, so leave --temperature out"),
    ("sample", ["--attention_map=a.pdf"], None, "--attention_map=a.pdf must end in .png"),
    ("sample", ["--out=out/run/best.pt"], None, "there is no checkpoint out/run/best.pt/last.pt; --out takes the folder of a run"),
    ("train", [*NEW, "--dropout=1.5"], None, "--dropout=1.5 must lie in [0, 1)"),
    ("train", [*NEW, "--pos=rope", "--n_embd=18"], None, "--n_embd=18 gives heads of odd width 9"),
    ("train", [*NEW, "--max_steps=0"], None, "--max_steps=0 must be at least 1"),
    ("train", [*NEW, "--learning_rate=-1"], None, "--learning_rate=-1.0 must not be negative"),
    ("train", [*NEW, "--learning_rate=nan"], None, "--learning_rate=nan must not be negative, and must be finite"),
    ("train", [*NEW, "--seed=-1"], None, "--seed=-1 must lie in [0, 2**63)"),
    ("train", [*NEW, "--n_embd=100000000000"], None, "memory ran out; lower --micro_batch_size"),
    ("train", [*NEW, "--micro_batch_size=3"], None, "--batch_size=4 must be a multiple of --micro_batch_size=3 times"),
    ("train", [*NEW, "--micro_batch_size=8"], None, "--batch_size=4 must be a multiple of --micro_batch_size=8 times the number of processes, 1; lower"),
    ("train", [*TINY, "--out="], None, "--out='' must name a folder"),
    ("train", [*NEW, "--dataset=data/tiny"], None, "--dataset=data/tiny must be the name of a folder in data/, without a path"),
    ("train", [*NEW, "--device=cuda:99"], None, "--device=cuda:99 cannot be used here"),
    ("train", [*NEW, "--device=toaster"], None, "--device=toaster cannot be used here"),
    ("train", [*NEW, "--dtype=float8"], None, "invalid choice: 'float8'"),
    ("train", [*NEW, "--preset=huge"], None, "invalid choice: 'huge'"),
    ("train", [*NEW, "--dataset=nowhere"], None, "data set 'nowhere' is not prepared"),
    ("train", [*NEW, "--dataset=openwebtext"], None, "run: python prepare.py openwebtext"),
    ("train", [*NEW, "--block_size=100000"], None, "--block_size=100000 needs more than its"),
    ("train", [*NEW, "--dataset=short", "--block_size=32"], "short text", "--block_size=32 needs more than its 27 training tokens"),
    ("train", [*NEW, "--dataset=shakespeare_char"], "other input.txt", "is not tiny Shakespeare"),
    ("train", [*TINY, "--out=out/run"], None, "out/run holds a run already"),
    ("train", [*TINY, "--out=taken/run"], "file for folder", "taken/run/log.jsonl could not be written"),
    ("train", ["--resume", "--out=out/nowhere"], None, "there is no checkpoint out/nowhere/last.pt"),
    ("train", ["--resume"], "no runs", "there is no run in out/"),
    ("train", ["--resume", "--out=out/run"], None, "is at step 6 already; to train on, raise --max_steps=6"),
    ("train", ["--resume", "--out=out/run", "--max_steps=9", "--eval_tokens=9"], None, "--eval_tokens=9 cannot change a run in the middle"),
    ("train", ["--resume", "--out=out/run", "--n_embd=32"], None, "--n_embd=32 cannot change a run in the middle"),
    ("train", ["--resume", "--out=out/run", "--max_steps=9"], "other tokenizer", "is not the one that out/run was trained on"),
    ("train", ["--resume", "--out=out/run", "--max_steps=9"], "other text", "is not the one that out/run was trained on"),
    ("train", NEW, "truncated data", "data/tiny/train.bin has"),
    ("train", NEW, "foreign tokens", "token 65535 is outside its vocabulary"),
    ("train", NEW, "missing data", "data set 'tiny' is not prepared (data/tiny/val.bin is missing; prepared are: tiny)"),
    ("train", NEW, "truncated meta", "data/tiny/meta.json is damaged"),
    ("train", NEW, "meta without tokens", "data/tiny/meta.json is damaged"),
    ("train", NEW, "list for meta", "data/tiny/meta.json is damaged"),
    ("prepare", [], None, "the following arguments are required: NAME"),
    ("prepare", ["nowhere.txt"], None, "nowhere.txt cannot be read (No such file or directory)"),
    ("prepare", ["data"], None, "data cannot be read (Is a directory)"),
    ("prepare", ["empty.txt"], "empty text", "empty.txt holds 0 characters"),
    ("prepare", ["binary.txt"], "binary text", "binary.txt is not UTF-8 text (byte 3 is 0xff)"),
    ("prepare", ["pydoc.txt"], "taken name", "would overwrite the data set 'pydoc'"),
    ("prepare", ["tiny.txt", "--tokens=5"], None, "--tokens=5 is for openwebtext, and this is tiny.txt; leave it out"),
    ("prepare", ["shakespeare_char", "--tokenizer=gpt2"], None, "has its tokenizer; leave it out, or take the name shakespeare"),
    ("prepare", ["openwebtext", "--tokens=-5"], None, "--tokens=-5 must be at least 1, for example 1e9"),
    ("prepare", ["openwebtext", "--tokens=inf"], None, "inf must be a whole number"),
    ("prepare", ["openwebtext", "--tokens=many"], None, "many must be a whole number"),
    ("prepare", ["tiny.txt", "--tokenizer=words"], None, "invalid choice: 'words'"),
    ("sample", ["--out=out/nowhere"], None, "there is no checkpoint out/nowhere/last.pt"),
    ("sample", [], "no runs", "there is no run in out/"),
    ("sample", [], "truncated checkpoint", "out/run/best.pt is damaged, or its model is not one of this model.py"),
    ("sample", [], "empty checkpoint", "out/run/best.pt is damaged, or its model is not one of this model.py"),
    ("sample", [], "corrupt checkpoint", "out/run/best.pt is damaged, or its model is not one of this model.py"),
    ("sample", [], "text for checkpoint", "out/run/best.pt is damaged, or its model is not one of this model.py"),
    ("sample", [], "other checkpoint", "out/run/best.pt is damaged, or its model is not one of this model.py"),
    ("sample", [], "list for checkpoint", "out/run/best.pt is damaged, or its model is not one of this model.py"),
    ("sample", [], "foreign attention", "attention='mine' is unknown"),
    ("sample", ["--prompt=naïve"], None, "character 'ï' (number 3 of the text) is not among the"),
    ("sample", ["--prompt="], None, "--prompt is empty"),
    ("sample", ["--prompt=a", "--prompt_file=tiny.txt"], None, "--prompt and --prompt_file exclude each other"),
    ("sample", ["--prompt_file=nowhere.txt"], None, "--prompt_file=nowhere.txt cannot be read"),
    ("sample", ["--prompt_file=binary.txt"], "binary text", "--prompt_file=binary.txt is not UTF-8 text"),
    ("sample", ["--temperature=-1"], None, "--temperature=-1.0 must be at least 0"),
    ("sample", ["--top_k=0"], None, "--top_k=0 must be at least 1"),
    ("sample", ["--max_new_tokens=0"], None, "--max_new_tokens=0 must be at least 1"),
    ("sample", ["--num_samples=0"], None, "--num_samples=0 must be at least 1"),
    ("sample", ["--prompt=a", "--attention_map=map.png"], None, "takes a prompt of 2 to 16 tokens"),
    ("sample", ["--prompt=hanging on the wall", "--attention_map=map.png"], None, "and this one has 19"),
    ("sample", ["--prompt=wall", "--attention_map=map.png"], "folder for picture", "map.png could not be written (Is a directory)"),
    ("sample", ["--prompt=wall", "--attention_map=taken/map.png"], "file for folder", "taken/map.png could not be written"),
]


def contents():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.mark.parametrize("name,flags,damage,words", MISUSE, ids=[f"{name}: {words[:40]}" for name, _, _, words in MISUSE])
def test_misuse_gets_one_sentence(folder, capsys, name, flags, damage, words):
    DAMAGE[damage]()
    before = contents()
    capsys.readouterr()
    code = call(name, *flags)
    sentence = capsys.readouterr().err.strip() if isinstance(code, int) else code
    assert code not in (None, 0) and words in sentence, sentence
    assert "\n" not in sentence and "Traceback" not in sentence and len(sentence) < 500
    assert contents() == before, "nothing is lost, nothing half-made is left"

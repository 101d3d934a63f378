"""What the tests of the programs share: a folder with a small data set and a
trained run, and ways to run a program."""

import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
FOLDERS = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "experiments")]
sys.path[:0] = FOLDERS

# The tensors here are tiny: a second thread would wait more than it works, and no process need
# look how busy the machine is.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

import prepare
import train

# A shell has the one ignored in what it starts behind it, and nohup the other.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

TEXT = "".join(
    f"{i} green bottles hanging on the wall, and if {i % 7} should fall: {i * i}.\n"
    for i in range(400)
)
TINY = [
    "--dataset=tiny",
    "--preset=cpu",
    "--device=cpu",
    "--n_layer=1",
    "--n_head=2",
    "--n_embd=16",
    "--block_size=16",
    "--batch_size=4",
    "--max_steps=6",
    "--eval_interval=3",
    "--eval_tokens=500",
]


# Programs that tests ask for their answers: {name: Python code, or the path of a file}.
BESIDE = {}
PROGRAMS = ROOT / "tests" / "programs"


@pytest.fixture(scope="session", autouse=True)
def processes(request):
    """Runs them one after the other, each in a process and an empty folder of its own, beside all
    tests, if one of these asks for an answer."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(FOLDERS)}
    environment.pop("TRITON_INTERPRET", None)

    def run(code):
        command = ["-c", code] if isinstance(code, str) else [str(code)]
        with tempfile.TemporaryDirectory() as folder:
            return subprocess.run(
                [sys.executable, *command],
                cwd=ROOT if isinstance(code, str) else folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=600,
            )

    asked = any("answer" in item.fixturenames for item in request.session.items)
    with ThreadPoolExecutor(1) as pool:
        yield {name: pool.submit(run, code) for name, code in BESIDE.items() if asked}
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def answer(processes):
    """What one of them printed."""

    def wait(name):
        result = processes[name].result()
        assert result.returncode == 0, result.stderr
        return result.stdout

    return wait


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder in which `prepare.py tiny.txt` and a six-step `train.py` have run."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("tiny.txt").write_text(TEXT)
        assert call("prepare", "tiny.txt") is None
        assert call("train", *TINY, "--out=out/run") is None
    yield folder


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    """A copy of that folder, which is the current one; its data set names the copy's text as its
    source."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    meta = Path("data/tiny/meta.json")
    meta.write_text(
        json.dumps({**json.loads(meta.read_text()), "source": str(Path("tiny.txt").resolve())})
    )
    return tmp_path


@pytest.fixture
def saved_figures(monkeypatch):
    """The figures that a test has saved so far."""
    figures, savefig = [], Figure.savefig

    def keep(figure, *args, **options):
        figures.append(figure)
        savefig(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


@pytest.fixture(scope="session")
def gpt2():
    try:
        return prepare.GPT2Tokenizer()
    except prepare.UserError as error:
        pytest.skip(str(error))


def call(program, *flags):
    """Runs a program's main() as its command line would; returns its exit: None, a code or a
    sentence."""
    main = importlib.import_module(program).main
    try:
        prepare.run_program(lambda: main(list(flags)))
    except SystemExit as stop:
        return stop.code


def program(*command, **options):
    """Runs `python <command>` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        **options,
    )


def checkpoint(run, name="last.pt"):
    return torch.load(Path(run, name), weights_only=True)


def losses(run):
    return checkpoint(run)["losses"]


def same(one, other):
    """Whether two parts of checkpoints are equal, every tensor bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one == other


def on_batch(monkeypatch, actions):
    """Has train.py call actions[step]() before it makes the batch of that step."""
    batch = train.batch

    def acting(data, config, block_size, step, *rest):
        if step in actions:
            actions[step]()
        return batch(data, config, block_size, step, *rest)

    monkeypatch.setattr(train, "batch", acting)


def log(run):
    """A run's log without its times."""
    lines = Path(run, "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


def limited_file_size(size, work):
    """Runs work() in a process that may write no file larger than size bytes: a disk that is
    full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        return work()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def misused(capsys, name, flags, words):
    """Asserts that a program refuses these flags with one sentence and a non-zero exit, and changes
    no file."""
    before = contents()
    capsys.readouterr()
    code = call(name, *flags)
    sentence = capsys.readouterr().err.strip() if isinstance(code, int) else code
    assert code not in (None, 0) and words in sentence, sentence
    assert "\n" not in sentence and "Traceback" not in sentence and len(sentence) < 500
    assert contents() == before, "nothing is lost, nothing half-made is left"


def contents():
    """Every file's bytes, and of folders, pipes and the like what they are."""
    return {
        path: path.read_bytes() if path.is_file() else path.lstat().st_mode
        for path in Path().rglob("*")
    }

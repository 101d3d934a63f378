"""What the tests of the programs share: a folder with a small data set and a trained run, and a way to call main()."""

import importlib
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import prepare  # noqa: E402

torch.set_num_threads(1)    # the tensors here are tiny: a second thread would wait more than it works

TEXT = "".join(f"{i} green bottles hanging on the wall, and if {i % 7} should fall: {i * i}.\n" for i in range(400))
TINY = ["--dataset=tiny", "--device=cpu", "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4",
        "--max_steps=6", "--eval_interval=3"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder in which `prepare.py tiny.txt` and a six-step `train.py` have run."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("tiny.txt").write_text(TEXT)
        assert call("prepare", "tiny.txt") is None
        assert call("train", *TINY, "--out=out/run") is None
    return folder


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    """A copy of that folder, which is the current one."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(program, *flags):
    """Runs a program's main() as its command line would; returns what it would exit with: None, a code or a sentence."""
    main = importlib.import_module(program).main
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        prepare.run(lambda: main(list(flags)))
    except SystemExit as stop:
        return stop.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

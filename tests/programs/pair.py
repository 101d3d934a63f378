"""How a program runs train.py in two processes, several times each, without a launcher between
them: `start` starts the program twice, and in each of the two `meet` has train.py's processes meet
anew."""

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, TEXT

import train


def start(program):
    """Prepares data, runs a program in two processes, and returns what each has given to
    `answer`."""
    Path("tiny.txt").write_text(TEXT)
    prepare = [sys.executable, ROOT / "prepare.py", "tiny.txt"]
    subprocess.run(prepare, check=True, capture_output=True)
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, program],
            env={**os.environ, **meeting, "RANK": str(rank)},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            process.wait(timeout=100)
    finally:
        for process in processes:
            process.kill()
    return [json.loads(Path(f"answer-{rank}.json").read_text()) for rank in range(2)]


def answer(value):
    Path(f"answer-{train.RANK}.json").write_text(json.dumps(value))


def meet(name):
    """By a file of that name, not by a port, which somebody else may have."""
    address = f"file://{os.getcwd()}/{name}.store"

    def join(backend, rank, world_size):
        init(backend, init_method=address, rank=rank, world_size=world_size)

    train.dist.init_process_group = join


init = train.dist.init_process_group

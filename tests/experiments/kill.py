"""Kills small runs again and again, and compares them with whole ones: nothing may be lost. Run it
after a change of how train.py saves or goes on.

    python tests/experiments/kill.py              50 kills in each setting: a quarter of an hour
    python tests/experiments/kill.py --kills=10 --setting=two      two processes under torchrun

For each setting one run is trained without a break. The same command, which is restartable, is then
started in another folder, gets SIGKILL at a random moment, goes on, and so on, until it is
finished; then the next folder's turn comes, until there were enough kills. It spends a third of its
time on writing: its vocabulary is large, and it is saved at every second step. After each kill, all
checkpoints must load and the leftovers of the kill before be gone. A finished run must have what
the whole one has, every weight, moment and loss bit for bit; only the seconds may differ.
"""

import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from threading import Timer

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from model import GPT
from prepare import Progress, UserError, new_parser, parse_int, run_program

FLAGS = [
    "--dataset=signs",
    "--device=cpu",
    "--n_layer=1",
    "--n_head=2",
    "--n_embd=64",
    "--block_size=8",
    "--batch_size=4",
    "--eval_interval=2",
    "--eval_tokens=20",
]
SETTINGS = {
    "muon": ["--optimizer=muon"],
    "adamw": ["--optimizer=adamw"],
    "dropout": ["--dropout=0.2", "--micro_batch_size=2"],
    "two": ["--dropout=0.2"],
}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def prepare_signs(folder):
    """Makes the data set that all runs train on, in folder/data: of 6,004 different characters."""
    text = "".join(chr(0x4E00 + i * i % 12007) for i in range(30_000))
    Path(folder, "signs.txt").write_text(text, encoding="utf-8")
    subprocess.run(
        [sys.executable, ROOT / "prepare.py", "signs.txt"],
        cwd=folder,
        check=True,
        capture_output=True,
    )


def kill(process):
    """SIGKILL to a process and those that torchrun has started, each of which has a session of its
    own."""
    with suppress(ProcessLookupError):  # it has just ended
        os.kill(process.pid, signal.SIGSTOP)  # and starts no more of them
        found = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
        ).stdout
        for pid in *map(int, found.split()), process.pid:
            os.kill(pid, signal.SIGKILL)


def start(command, folder, seconds=math.inf, planned=True):
    """Runs a command, to its end or so many seconds, which count from train.py's plan on (or from
    its start). Returns whether it was killed, and the times when it was started, had its plan (None
    if it had none) and was over."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    begun, plan, lines = time.monotonic(), None, []
    timer = Timer(min(seconds, 1e5), kill, [process])
    try:
        if not planned:
            timer.start()
        for line in process.stdout:  # until all who share it are dead
            lines.append(line)
            if line.startswith("plan:"):
                plan = time.monotonic()
                if planned:
                    timer.start()
    except KeyboardInterrupt:  # which reaches no other session
        kill(process)
        raise
    finally:
        timer.cancel()
    if process.wait() not in (0, -signal.SIGKILL):
        raise UserError("".join(lines).strip() or f"exit status {process.returncode}")
    return process.returncode != 0, (begun, plan, time.monotonic())


def parts(out):
    """What a run has written, by name. Raises UserError where a checkpoint cannot be read."""
    lines = (out / "log.jsonl").read_text("utf-8").splitlines()
    found = {"log.jsonl": [json.loads(line) for line in lines]}
    for path in out.glob("*.pt"):
        _, checkpoint = GPT.load(path)
        found |= {f"{path.name}'s {key}": part for key, part in checkpoint.items()}
    return found


# How long it took, and how the program was called, may differ.
FREE = {"seconds", "out", "last.pt's seconds", "best.pt's seconds"}


def same(one, other):
    """Bit for bit, but for what is free."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        keys = one.keys() - FREE
        return keys == other.keys() - FREE and all(same(one[key], other[key]) for key in keys)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.numpy().tobytes() == other.numpy().tobytes()
    return one == other


def read_data(folder):
    return {path: path.read_bytes() for path in folder.glob("data/*/*")}


def trial(folder, setting, kills, chance, steps=400, early=0.2):
    """Trains one run whole and others with so many kills in all, that share of them before training
    begins, and returns a sentence about them. Raises UserError with the first thing that was
    lost."""
    data, progress = read_data(folder), Progress(kills)
    command = [sys.executable, *(TORCHRUN if setting == "two" else []), ROOT / "train.py"]
    command += [*FLAGS, *SETTINGS[setting], "--restartable", f"--max_steps={steps}", "--out"]
    _, (begun, planned, over) = start([*command, f"{setting}-whole"], folder)
    expected = parts(folder / f"{setting}-whole")
    killed, writing, resumed, runs, finished = 0, 0, 0, 0, True
    while killed < kills or not finished:
        runs += finished
        out = folder / f"{setting}-{runs}"
        left_before, resumed = {*out.glob("*.tmp")}, resumed + (out / "last.pt").exists()

        # Some kills come before training has begun, the others within a quarter of it.
        early_on = chance.random() < early
        longest = planned - begun if early_on else (over - planned) / 4
        seconds = chance.random() * longest if killed < kills else math.inf
        hit, (_, plan, _) = start([*command, out], folder, seconds, not early_on)
        killed, finished = killed + hit, not hit

        left = {*out.glob("*.tmp")}
        writing += bool(left - left_before)
        if plan and left & left_before or finished and left:
            raise UserError(
                f"after {killed} kills {min(left).name} is left, which an earlier process wrote"
            )
        found = parts(out) if (out / "last.pt").exists() else {}
        if finished and not same(found, expected):
            names = expected.keys() - FREE
            wrong = [name for name in names if not same(expected[name], found.get(name))]
            raise UserError(f"after {killed} kills these differ: {', '.join(sorted(wrong))}")
        progress(killed, f"{setting}: {killed} of {kills} kills")
    progress.clear()
    if read_data(folder) != data:
        raise UserError("data/ has changed")
    return (
        f"{killed} kills, {writing} of them while writing; {resumed} resumed, {runs} runs of "
        f"{steps} steps finished"
    )


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("--kills", type=parse_int, default=50, help="in each setting (default: 50)")
    parser.add_argument("--setting", default="all", choices=("all", *SETTINGS), help="default: all")
    parser.add_argument(
        "--seed", type=parse_int, default=1337, help="of the moments (default: 1337)"
    )
    args, failed = parser.parse_args(argv), False
    with tempfile.TemporaryDirectory() as folder:
        prepare_signs(folder)
        for setting in SETTINGS if args.setting == "all" else [args.setting]:
            try:
                words = (
                    trial(Path(folder), setting, args.kills, random.Random(args.seed))
                    + ": equal bit for bit"
                )
            except UserError as error:
                words, failed = f"FAILED {error}", True
            print(f"{setting}: {words}", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    run_program(main)

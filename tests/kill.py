"""What is lost when training is killed: nothing. Small runs are killed again and again, and compared with whole ones.

    python tests/kill.py                                 50 kills in each of four settings: half an hour
    python tests/kill.py --kills=10 --setting=two        two processes under torchrun, all killed at once

For each setting one run is trained without a break. The same command is then started in another folder, gets SIGKILL at
a random moment, goes on by --resume, and so on, until it is finished; then the next folder's turn comes, until there
were enough kills. It spends a third of its time on writing: its vocabulary is large, and it is saved at every second
step. After each kill, all checkpoints must load and the leftovers of the kill before be gone. A finished run must have
the files of the whole one, every weight, moment and loss in them bit for bit; only its seconds may differ.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from shutil import copyfile
from threading import Timer

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from model import GPT  # noqa: E402
from prepare import Progress, UserError, new_parser, run, whole  # noqa: E402

ONE = [sys.executable]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SETTINGS = {"muon": (ONE, "--optimizer=muon"),
            "adamw": (ONE, "--optimizer=adamw"),
            "dropout": (ONE, "--dropout=0.2", "--micro_batch_size=2"),
            "two": (TWO, "--dropout=0.2")}
FLAGS = ["--dataset=signs", "--device=cpu", "--n_layer=1", "--n_head=2", "--n_embd=64", "--block_size=8",
         "--batch_size=4", "--eval_interval=2", "--eval_tokens=20"]


def prepare_signs(folder):
    """Makes the data set that all runs train on, in folder/data: of 6,004 different characters."""
    text = "".join(chr(0x4E00 + i * i % 12007) for i in range(30_000))
    Path(folder, "signs.txt").write_text(text, encoding="utf-8")
    subprocess.run([sys.executable, ROOT / "prepare.py", "signs.txt"], cwd=folder, check=True, capture_output=True)


def kill(process):
    """SIGKILL to a process and those that torchrun has started, each of which has a session of its own."""
    with suppress(ProcessLookupError):                                               # it has just ended
        os.kill(process.pid, signal.SIGSTOP)                                         # and starts no more of them
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
        for pid in *map(int, found.split()), process.pid:
            os.kill(pid, signal.SIGKILL)


def start(command, folder, seconds=None, planned=True):
    """Runs a command, to its end or so many seconds, which count from train.py's plan on (or from its start). Returns
    whether it was killed, its output, and when it was started, had its plan, and was over."""
    process = subprocess.Popen(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    times, lines, timer = [time.monotonic()], [], seconds is not None and Timer(seconds, kill, [process])
    try:
        if timer and not planned:
            timer.start()
        for line in process.stdout:                                                  # until all that share it are dead
            lines.append(line)
            if line.startswith("plan:"):
                times.append(time.monotonic())
                if timer and planned:
                    timer.start()
    finally:
        if timer:
            timer.cancel()
        if sys.exc_info()[0]:                                                        # Ctrl-C does not reach it
            kill(process)
        process.wait()
    if process.returncode not in (0, -signal.SIGKILL):
        raise UserError("".join(lines).strip() or f"exit status {process.returncode}")
    return process.returncode != 0, lines, [*times, time.monotonic()]


def files(run):
    """All that a finished run has, by name, but for what may differ: its seconds and how it was called."""
    found = {"log.jsonl": [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]}
    found |= {path.name: GPT.load(path)[1] for path in run.glob("*.pt")}
    flat, rest = {}, list(found.items())
    while rest:
        name, value = rest.pop()
        if isinstance(value, (dict, list)):
            rest += [(f"{name} {key}", part) for key, part in
                     (value.items() if isinstance(value, dict) else enumerate(value))
                     if key not in ("seconds", "out", "resume")]
        else:
            flat[name] = value.numpy().tobytes() if isinstance(value, torch.Tensor) else value
    return flat


def trial(folder, setting, kills, chance, steps=120, early=0.2, progress=None):
    """Trains one run whole and others with so many kills in all, that share of them before training begins, and returns
    a sentence about them. Raises UserError with the first thing that was lost."""
    (launch, *flags), data = SETTINGS[setting], {path: path.read_bytes() for path in folder.glob("data/*/*")}
    command = [*launch, ROOT / "train.py", *FLAGS, *flags, f"--max_steps={steps}"]
    _, _, (begun, planned, ended) = start([*command, f"--out={setting}-whole"], folder)
    expected, killed, writing, resumed, runs, finished = files(folder / f"{setting}-whole"), 0, 0, 0, 0, False
    while killed < kills or not finished:
        runs += finished or not runs
        out = folder / f"{setting}-{runs}"
        if (out / "best.pt").exists() and not (out / "last.pt").exists():            # killed between the first two
            copyfile(out / "best.pt", out / "last.pt")                               # as an unreadable one's error advises
        resume, before = ["--resume"] * (out / "last.pt").exists(), set(out.glob("*.tmp"))
        asleep = chance.random() < early
        seconds = chance.random() * (planned - begun if asleep else (ended - planned) / 4) if killed < kills else None
        hit, lines, times = start([*command, *resume, f"--out={out}"], folder, seconds, not asleep)
        left, finished = set(out.glob("*.tmp")), not hit
        killed, writing, resumed = killed + hit, writing + bool(left - before), resumed + len(resume)
        where = f"after {killed} kills, in {out.name}"
        if len(times) == 3 and left & before or finished and left:
            raise UserError(f"{where}, {min(left)} is left of what an earlier process wrote")
        for path in out.glob("*.pt"):
            GPT.load(path)
        if finished and (found := files(out)) != expected:
            names = sorted(name for name in found | expected if found.get(name) != expected.get(name))
            raise UserError(f"{where}, {len(names)} of {len(expected)} values differ, {names[0]} for one")
        if progress:
            progress(killed)
    if {path: path.read_bytes() for path in folder.glob("data/*/*")} != data:
        raise UserError("data/ has changed")
    return f"{killed} kills, {writing} of them while writing; {resumed} resumed, {runs} runs of {steps} steps finished"


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("--kills", type=whole, default=50, help="in each setting (default: 50)")
    parser.add_argument("--setting", default="all", choices=("all", *SETTINGS), help="default: all")
    parser.add_argument("--seed", type=whole, default=1337, help="of the moments (default: 1337)")
    args, failed = parser.parse_args(argv), False
    names = list(SETTINGS) if args.setting == "all" else [args.setting]
    progress = Progress(args.kills * len(names))
    with tempfile.TemporaryDirectory() as folder:
        prepare_signs(folder)
        for i, name in enumerate(names):
            def tell(killed, name=name, done=i * args.kills):
                progress(done + killed, f"{name}: {killed} of {args.kills} kills")

            try:
                words = trial(Path(folder), name, args.kills, random.Random(args.seed + i), progress=tell)
                words += ": equal bit for bit"
            except UserError as error:
                words, failed = f"FAILED: {error}", True
            progress.clear()
            print(f"{name}: {words}", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    run(main)

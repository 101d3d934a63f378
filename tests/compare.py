"""Compares attentions: trains many runs by train.py, pairs them by their seeds, and reports what they show.

    python tests/compare.py                                       the paper's claims: 3 attentions, 2 positions, 5 seeds
    python tests/compare.py --attention=all --pos=rope --seeds=20 only what is not there yet is trained
    python tests/compare.py --attention=qv --n_inner=576          a variant: train.py's flags go to its runs and name it
    python tests/compare.py --lengths=1,2,4,8                     also in windows of up to 8 times the context
    python tests/compare.py --report                              trains nothing; reports the runs that are finished

A run is a folder in --out, named after its flags. It holds what train.py writes, what that prints (output.txt) and,
once it is finished, record.json: all that the report needs, so the checkpoints may then be deleted. Ctrl-C stops the
runs, each saves itself, and the same command goes on. The report is written beside the runs, by report.py: results.md,
results.json, results.png, frontier.png and lengths.png.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from report import ONLY, report  # noqa: E402

import train  # noqa: E402
from model import ATTENTIONS, GPT, POSITIONS  # noqa: E402
from prepare import (  # noqa: E402
    OUT,
    UserError,
    describe_error,
    format_time,
    load_or_prepare,
    new_parser,
    parse_int,
    run_program,
    write_atomically,
)
from train import autocast, choose_device  # noqa: E402

TRAIN, ASSETS = ROOT / "train.py", Path("assets")
UNNAMED = {
    "preset",
    "device",
    "kernel",
    "compile",
    "micro_batch_size",
}  # flags that make no variant

# --- Which runs ------------------------------------------------------------------------------------------------------


def parse(argv):
    """The flags of this program, and those for train.py, {name: the flag as it was given}."""

    def some(names):
        return lambda text: list(names) if text == "all" else list(dict.fromkeys(text.split(",")))

    def numbers(text):
        return [parse_int(part) for part in text.split(",")]

    parser = new_parser(
        __doc__,
        epilog="Any other flag goes to train.py, as --name=value; see train.py --help.\n"
        "One that counts for some attentions only, such as --d_ctx, is given to those only.",
    )
    for name, kind, default, help in (
        ("attention", some(ATTENTIONS), "qkv,qv,qv_ka", f"some of {','.join(ATTENTIONS)}; or all"),
        ("pos", some(POSITIONS), "sinusoidal,agf", f"some of {','.join(POSITIONS)}; or all"),
        (
            "seeds",
            parse_int,
            5,
            "runs of each kind; the more, the smaller a difference that can be told from chance",
        ),
        ("seed", parse_int, 1337, "the first seed, which the others follow"),
        ("dataset", str, None, "as for train.py (default: the preset's, else tiny Shakespeare)"),
        (
            "workers",
            parse_int,
            None,
            "runs at a time (default: one for each core of a CPU, or 4 on a GPU)",
        ),
        (
            "lengths",
            numbers,
            [],
            "evaluate each run in windows of so many times its context, too; but learned "
            "positions end with the context",
        ),
        ("out", Path, OUT / "compare", "the folder of the runs and of their report"),
    ):
        help = f"{help} (default: {default})" if default else help
        parser.add_argument(
            f"--{name}", type=kind, default=default, metavar=name.upper(), help=help
        )
    parser.add_argument(
        "--report", action="store_true", help="train nothing: report all finished runs of --out"
    )
    parser.add_argument(
        "--assets",
        action="store_true",
        help="write into assets/, together with the runs stored there",
    )
    args, others = parser.parse_known_args(argv)
    flags = {flag.partition("=")[0].removeprefix("--").removeprefix("no-"): flag for flag in others}
    for name, flag in flags.items():
        if name == "resume" or not flag.startswith("--"):
            raise UserError(
                f"{flag} is not for here: write --name=value, and go on with a sweep by its own command"
            )
    if not all(
        1 <= number <= 1000
        for number in (args.seeds, args.workers, *args.lengths)
        if number is not None
    ):
        raise UserError("--seeds, --workers and --lengths must lie between 1 and 1,000")
    return args, flags


def plan(args, flags):
    """All runs asked for, {folder: command line}. Those of one seed stand side by side, so that a sweep is balanced
    wherever it stops. Each gets the flags that count for it. Raises UserError for what train.py refuses."""
    preset = train.PRESETS.get(flags.get("preset", "").partition("=")[2], {})
    dataset = load_or_prepare(args.dataset or preset.get("dataset"))[
        0
    ]  # made once, before many runs need it
    runs, used = {}, set()
    seeds = range(args.seed, args.seed + args.seeds)
    for seed, pos, attention in itertools.product(seeds, args.pos, args.attention):
        kind = {"attention": attention, "pos": pos}
        own = [
            name
            for name in sorted(flags)
            if all(kind[other] in values for other, values in ONLY.get(name, {}).items())
        ]
        command = [
            f"--dataset={dataset}",
            f"--attention={attention}",
            f"--pos={pos}",
            f"--seed={seed}",
        ]
        command += [flags[name] for name in own]
        given = train.parse(command)
        training, _ = train.configure(given, None)
        variant = [f"{name}={given[name]}" for name in own if name not in UNNAMED]
        folder = ",".join(
            [f"{training.preset}-{dataset}-{attention}-{pos}", *variant, f"seed={seed}"]
        )
        runs[args.out / folder] = command
        used.update(own)
    if idle := sorted(flags.keys() - used):
        raise UserError(
            f"--{', --'.join(idle)} counts for none of these attentions and positions; leave it out"
        )
    return runs


# --- Training and evaluating them. A run is finished if, and only if, it has a record --------------------------------


def train_missing(runs, workers, threads):
    """Trains the runs that are not finished, some at a time, and returns a sentence for each that failed. However this
    function is left, the processes have been asked to save their runs, and have stopped."""
    waiting = [folder for folder in runs if not (folder / "record.json").exists()]
    print(
        f"runs: {len(runs)}, finished: {len(runs) - len(waiting)}, at a time: {workers}", flush=True
    )
    live, failed, total, began = {}, [], len(waiting), time.monotonic()
    try:
        while waiting or live:
            while waiting and len(live) < workers:
                folder = waiting.pop(0)
                live[start(folder, runs[folder], threads)] = folder
            time.sleep(0.1)
            for process in [process for process in live if process.poll() is not None]:
                words, finished = outcome(live.pop(process), process.returncode)
                if not finished:
                    failed.append(words)
                left = len(waiting) + len(live)
                seconds = (time.monotonic() - began) / (total - left) * left
                print(f"{words}; runs left: {left}, for {format_time(seconds)}", flush=True)
    except KeyboardInterrupt:
        raise UserError(
            "stopped, and each run is saved; the same command goes on with them"
        ) from None
    finally:
        for process in live:
            process.terminate()
        for process in live:
            process.wait()
    return failed


def start(folder, command, threads):
    """Starts a run, or goes on with it, in a process of its own; a terminal's Ctrl-C does not reach it."""
    resume = ["--resume"] if (folder / "last.pt").exists() else []
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "output.txt", "ab") as output:
            return subprocess.Popen(
                [sys.executable, TRAIN, *command, *resume, f"--out={folder}"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
    except OSError as error:
        raise UserError(
            f"{folder} cannot be used ({describe_error(error)}); mend that, and the same command goes on"
        ) from None


def outcome(folder, status):
    """What to say of a run whose process has ended with that exit status, and whether the run is finished now."""
    try:
        return f"{folder.name}: validation loss {record(folder)['best_val_loss']:.4f}", True
    except UserError as error:
        lines = (folder / "output.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        why = [error, *filter(str.strip, lines)][-1] if status else error
        return f"{folder.name} failed: {why}", False


def record(folder):
    """Writes and returns what the report needs of a run. Raises UserError where training has not come to its end."""
    model, checkpoint = GPT.load(folder / "last.pt")
    training, config, log = (
        checkpoint["train_config"],
        checkpoint["model_config"],
        checkpoint["log"],
    )
    steps = len(checkpoint["losses"])
    if steps < training["max_steps"]:
        raise UserError(f"it ended at step {steps} of {training['max_steps']}")
    best = min(log, key=lambda entry: entry["val_loss"])
    early = checkpoint["losses"][: -(-steps // 5)]  # of the first fifth of the steps
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    found = dict(
        preset=training["preset"],
        dataset=training["dataset"],
        attention=config["attention"],
        pos=config["pos"],
        flags=folder.name.split(",")[1:-1],
        seed=training["seed"],
        best_val_loss=best["val_loss"],
        best_step=best["step"],
        final_val_loss=log[-1]["val_loss"],
        val_loss_by_length={},
        early_steps=len(early),
        early_loss=float(np.mean(early)),
        early_curve=[
            round(float(part.mean()), 4) for part in np.array_split(early, min(25, len(early)))
        ],
        attention_parameters=sum(size for name, size in sizes.items() if "attention" in name),
        parameters=sum(sizes.values()),
        remembered=model.eval().cache_bytes()[1] // (4 * config["n_layer"]),
        tokens_per_second=round(
            steps * training["batch_size"] * config["block_size"] / checkpoint["seconds"]
        ),
        log=[(entry["step"], round(entry["val_loss"], 4), entry["seconds"]) for entry in log],
    )
    write_json(folder / "record.json", found)
    return found


def evaluate_lengths(folder, times):
    """Adds to a run's record the losses of its best.pt in windows of so many times its context: those that are not
    there yet, and that the data is long enough for."""
    found = json.loads((folder / "record.json").read_text("utf-8"))
    if found["pos"] == "learned":
        return
    model, checkpoint = GPT.load(folder / "best.pt")
    if checkpoint["log"][-1]["val_loss"] != found["best_val_loss"]:  # best.pt knows no later ones
        raise UserError(
            f"{folder} was trained on after its record.json was made; remove it, or leave --lengths out"
        )
    training, size, losses = (
        checkpoint["train_config"],
        model.config.block_size,
        found["val_loss_by_length"],
    )
    val, device = load_or_prepare(found["dataset"])[2]["val"], choose_device(training["device"])
    rows = training["micro_batch_size"] or training["batch_size"]
    for length in (n * size for n in times if str(n * size) not in losses and n * size < len(val)):
        longer = GPT(replace(model.config, block_size=length)).to(device)
        longer.load_state_dict(model.state_dict())
        context, windows = autocast(device, training["dtype"]), max(1, rows * size // length)
        total, count = train.evaluate(longer, val, windows, context, training["eval_tokens"])
        losses[str(length)] = total / count
        write_json(folder / "record.json", found)


def write_json(path, value):
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value), "utf-8"))


# --- The program -----------------------------------------------------------------------------------------------------


def stored(path):
    """The records of a results.json; none where there is no such file."""
    try:
        return json.loads(path.read_text("utf-8")) if path.exists() else []
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({describe_error(error)}); mend or remove it"
        ) from None


def main(argv=None):
    for number in signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)  # like Ctrl-C
    args, flags = parse(argv)
    older = stored(ASSETS / "results.json") if args.assets else []
    runs, failed = {} if args.report else plan(args, flags), []
    if runs:
        device = choose_device(flags.get("device", "--device=auto").partition("=")[2])
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = args.workers or (cores if device.type == "cpu" else 4)
        failed = train_missing(runs, workers, threads=max(1, cores // workers))
    for folder in runs:
        if args.lengths and (folder / "record.json").exists():
            evaluate_lengths(folder, args.lengths)
    newer = [json.loads(path.read_text("utf-8")) for path in sorted(args.out.glob("*/record.json"))]
    if older or newer or not failed:
        report(older + newer, ASSETS if args.assets else args.out)
    if failed:
        raise UserError(
            "\n".join(
                [*failed, f"{len(failed)} runs failed; mend that and give the same command again"]
            )
        )


if __name__ == "__main__":
    run_program(main)

"""Trains many runs by train.py, and reports what they show. Run it to compare attentions, your own
with ours, too, or to make assets/results.md anew.

    python tests/experiments/compare.py                qkv, qv and qv_ka, seeds 1337 to 1341
    python tests/experiments/compare.py --attention=all --pos=rope,agf --seeds=1-20
    python tests/experiments/compare.py --n_inner=576  train.py's flags go to the runs
    python tests/experiments/compare.py --part=1       the first part of the runs of results.md
    python tests/experiments/compare.py --report       trains nothing: makes results.md anew

Only runs that are not there yet are trained, nor stored in assets/. A run is a folder in --out. It
holds what train.py writes, what that prints (output.txt) and, once the run is finished,
record.json: its flags, and all that a report needs, so the checkpoints may then be deleted. Ctrl-C
stops the runs, each saves itself, and the same command goes on. Beside other work on the same
machine, put `nice` before it.
"""

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import figures
import report
import runs
import sweeps

import train
from model import ATTENTIONS, GPT, POSITIONS, GPTConfig
from prepare import (
    OUT,
    Progress,
    UserError,
    describe_error,
    format_time,
    load_or_prepare,
    new_parser,
    parse_int,
    run_program,
    write_atomically,
)

TRAIN, ASSETS = ROOT / "train.py", ROOT / "assets"

# Flags of train.py that say how a run is computed, but not what. They make no variant.
MACHINE = {"device", "threads", "kernel", "compile", "micro_batch_size"}

# Of a run's configuration, what its record names elsewhere, or what is of no interest.
NOT_RECORDED = {"attention", "pos", "dataset", "preset", "seed", "out", "resume", "vocab_size"}

CURVE_POINTS = 60

# --- The command line -----------------------------------------------------------------------------


def some_of(names):
    """A parser for a list of names, such as qkv,qv, or all."""

    def parse(text):
        chosen = names if text == "all" else text.split(",")
        for name in chosen:
            if name not in names:
                raise ArgumentTypeError(f"{name!r} is none of {', '.join(names)}; or take all")
        return list(dict.fromkeys(chosen))

    return parse


def parse_seeds(text):
    """2001-2020 are twenty seeds, and 1,5,7 are three."""
    seeds = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        seeds += range(parse_int(first), parse_int(last or first) + 1)
    if not seeds:
        raise ArgumentTypeError(f"{text} names no seed; write 2001-2020, for example")
    return list(dict.fromkeys(seeds))


def parse_numbers(text):
    """1,2,4 are three numbers."""
    return [at_least_one(part) for part in text.split(",")]


def at_least_one(text):
    number = parse_int(text)
    if number < 1:
        raise ArgumentTypeError(f"{text} must be at least 1")
    return number


def parse(argv):
    """The flags of this program, and a dict of those for train.py."""
    parser = new_parser(
        __doc__,
        epilog="Any other flag goes to train.py; see train.py --help. One that counts for some\n"
        "attentions or positions only, such as --d_ctx, is given to those only.",
    )
    add = parser.add_argument
    add(
        "--attention",
        type=some_of([*ATTENTIONS]),
        metavar="NAMES",
        help=f"attentions to compare, of {','.join(ATTENTIONS)}; or all (default: qkv,qv,qv_ka)",
    )
    add(
        "--pos",
        type=some_of([*POSITIONS]),
        metavar="NAMES",
        help=f"positions to compare them with, of {','.join(POSITIONS)}; or all (default: as for "
        "train.py)",
    )
    add(
        "--seeds",
        type=parse_seeds,
        metavar="FIRST-LAST",
        help="seeds that each of them is trained with, as 2001-2020 or 1,5,7: the more, the "
        "smaller a difference that can be told from chance (default: 1337-1341)",
    )
    add("--dataset", metavar="NAME", help="data set to train on (default: as for train.py)")
    add("--preset", choices=train.PRESETS, help="preset of all runs (default: as for train.py)")
    add(
        "--baseline",
        metavar="NAME",
        help="attention that the others are compared with, as the report names it, such as "
        "'QKV, rotated' (default: qkv, or the first that there is)",
    )
    add(
        "--lengths",
        type=parse_numbers,
        default=[],
        metavar="NUMBERS",
        help="evaluate each run also in windows of so many times its context, as 1,2,4,8; with "
        "learned positions, which end with the context, that is left out",
    )
    add(
        "--part",
        type=parse_numbers,
        metavar="NUMBERS",
        help=f"train these parts of tests/experiments/sweeps.py, 1 to {max(sweeps.PARTS)}, instead",
    )
    add(
        "--workers",
        type=at_least_one,
        metavar="NUMBER",
        help="runs at a time (default: one for each core of a CPU, or 4 on a GPU)",
    )
    add(
        "--out",
        type=Path,
        default=OUT / "compare",
        metavar="FOLDER",
        help=f"folder of the runs and of their report (default: {OUT / 'compare'})",
    )
    add(
        "--report",
        action="store_true",
        help="train nothing: make results.md and its figures, in --out, of the parts' runs that "
        "are stored in assets/, and of those in --out",
    )
    add(
        "--assets",
        action="store_true",
        help="with --report: write them to assets/, and store the parts' runs of --out there, too",
    )
    args, others = parser.parse_known_args(argv)
    flags = train.parse(others)
    check(args, flags)
    return args, flags


def check(args, flags):
    """Refuses flags that do not go together."""
    for name in ("seed", "resume"):
        if name in flags:
            raise UserError(f"--{name} is not for here; see --seeds in compare.py --help")
    if args.assets and not args.report:
        raise UserError("--assets belongs to --report; train first, then store the runs by both")
    if args.part:
        check_part(args, flags)


def check_part(args, flags):
    for number in args.part:
        if number not in sweeps.PARTS:
            raise UserError(f"--part={number} is none of the parts 1 to {max(sweeps.PARTS)}")
    ours = ("attention", "pos", "dataset", "preset", "lengths")
    given = [name for name in ours if getattr(args, name)]
    for name in [*given, *sorted(flags.keys() - MACHINE)]:
        raise UserError(f"--{name} cannot change a part, which says itself what its runs are")


# --- Which runs -----------------------------------------------------------------------------------


@dataclass
class Job:
    """A run to train: what it is, the command line that makes it, and the windows to evaluate it
    in."""

    kind: dict
    seed: int
    command: list
    lengths: list


def counts(name, kind):
    """Whether a flag counts for this kind of run; n_kv_head does not for qkv, for example."""
    needs = runs.ONLY.get(name, {})
    return all(kind[other] in values for other, values in needs.items())


def plan(args, flags):
    """All runs that the command line asks for, {folder: Job}. Raises UserError for what train.py
    refuses."""
    machine = {name: value for name, value in flags.items() if name in MACHINE}
    wanted = asked_by_parts(args) if args.part else asked_by_flags(args, flags)
    jobs = {}
    for kind, seed, lengths in wanted:
        given = {**kind, "seed": seed}
        command = command_line({**given, **machine})
        train.configure(train.parse(command))
        folder = args.out / folder_name(**given)
        if folder in jobs:  # of two parts
            lengths = sorted({*lengths, *jobs[folder].lengths})
        jobs[folder] = Job(kind, seed, command, lengths)
    # Data sets are made once, before many runs need them.
    for dataset in {job.kind["dataset"] for job in jobs.values()}:
        load_or_prepare(dataset)
    return jobs


def asked_by_parts(args):
    """(kind, seed, lengths) of each run of the parts asked for. Runs of one seed stand side by
    side, so that what is there is balanced wherever a sweep stops."""
    for number in args.part:
        part = sweeps.PARTS[number]
        for seed in args.seeds or sorted({seed for sweep in part for seed in sweep.seeds}):
            for sweep in part:
                if args.seeds or seed in sweep.seeds:
                    yield from ((kind, seed, list(sweep.lengths)) for kind in sweep.kinds)


def asked_by_flags(args, flags):
    """(kind, seed, lengths) of each run that --attention, --pos and the flags for train.py make, in
    the same order."""
    preset = args.preset or train.configure({"device": flags.get("device", "auto")})[0].preset
    dataset = load_or_prepare(args.dataset or train.PRESETS[preset].get("dataset"))[0]
    variant = {name: value for name, value in flags.items() if name not in MACHINE}
    attentions = args.attention or ["qkv", "qv", "qv_ka"]
    positions = args.pos or [GPTConfig().pos]
    kinds = []
    for pos, attention in itertools.product(positions, attentions):
        kind = dict(preset=preset, dataset=dataset, attention=attention, pos=pos)
        own = {name: value for name, value in variant.items() if counts(name, kind)}
        kinds.append({**kind, **own})
    for name in variant:
        if not any(name in kind for kind in kinds):
            raise UserError(
                f"--{name} counts for none of these attentions and positions; leave it out"
            )
    for seed in args.seeds or range(1337, 1342):
        yield from ((kind, seed, args.lengths) for kind in kinds)


def folder_name(preset, dataset, attention, pos, seed, **flags):
    """A name that tells a run from all others, to a person; no program reads it."""
    flags = [f"{name}={flags[name]}" for name in sorted(flags)]
    return ",".join([f"{preset}-{dataset}-{attention}-{pos}", *flags, f"seed={seed}"])


def command_line(flags):
    """Flags as train.py takes them."""
    words = []
    for name, value in flags.items():
        if value is True:
            words.append(f"--{name}")
        elif value is False:
            words.append(f"--no-{name}")
        else:
            words.append(f"--{name}={value}")
    return words


# --- Training them --------------------------------------------------------------------------------


def missing_lengths(found, times):
    """In which windows, of so many times the context, a record has no loss yet. Learned positions
    end with the context."""
    if found["kind"]["pos"] == "learned":
        return []
    size = found["config"]["block_size"]
    return [n * size for n in times if str(n * size) not in found["val_loss_by_length"]]


def finished(folder, job):
    """Whether a run has a record and, if that lacks losses in longer windows, the trained model."""
    if not (folder / "record.json").exists():
        return False
    return (folder / "last.pt").exists() or not missing_lengths(read(folder), job.lengths)


def restore_stored(jobs):
    """Gives runs that were not computed here the records that are stored of them."""
    stored = {}
    for found in stored_runs(ASSETS / "results.json"):
        stored[runs.key(found["kind"]), found["seed"]] = found
    for folder, job in jobs.items():
        found = stored.get((runs.key(job.kind), job.seed))
        if found is not None and not (folder / "record.json").exists():
            write_json(folder / "record.json", found)


def say_plan(jobs, workers):
    """Prints what is going to be done."""
    waiting = [folder for folder, job in jobs.items() if not finished(folder, job)]
    there = [folder for folder, job in jobs.items() if finished(folder, job)]
    kinds = {runs.key(job.kind) for job in jobs.values()}
    seeds = sorted({job.seed for job in jobs.values()})
    with_seeds = f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"
    print(
        f"{len(jobs)} runs: {len(kinds)} kinds, {with_seeds}. Finished: {len(there)}. To train: "
        f"{len(waiting)}, {workers} at a time.",
        flush=True,
    )
    if waiting and there:
        mean = statistics.mean(read(folder)["seconds"] for folder in there)
        seconds = mean * len(waiting) / workers
        print(f"If they take as long as those, they take {format_time(seconds)}.", flush=True)


def train_missing(jobs, workers, threads):
    """Trains the runs that are not finished, some at a time, and returns a sentence for each that
    failed. However this function is left, the processes have been asked to save their runs, and
    have stopped."""
    waiting = [folder for folder, job in jobs.items() if not finished(folder, job)]
    total, began = len(waiting), time.monotonic()
    live, failed = {}, []
    try:
        while waiting or live:
            while waiting and len(live) < workers:
                folder = waiting.pop(0)
                process = start(folder, jobs[folder].command, threads)
                live[process] = folder
            time.sleep(0.1)
            for process in [process for process in live if process.poll() is not None]:
                folder = live.pop(process)
                words, is_finished = outcome(folder, jobs[folder], process.returncode)
                if not is_finished:
                    failed.append(words)
                left = len(waiting) + len(live)
                seconds = (time.monotonic() - began) / (total - left) * left
                print(f"{words}. Runs left: {left}, about {format_time(seconds)}", flush=True)
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
    """Starts a run, or goes on with it, in a process of its own; a terminal's Ctrl-C does not reach
    it."""
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
            f"{folder} cannot be used ({describe_error(error)}); mend that, and the same command "
            "goes on"
        ) from None


def outcome(folder, job, status):
    """What to say of a run whose process has ended with that exit status, and whether the run is
    finished now."""
    try:
        return f"{folder.name}: validation loss {record(folder, job)['final_val_loss']:.4f}", True
    except UserError as error:
        lines = (folder / "output.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        words = [line for line in lines if line.strip()]
        reason = words[-1] if status and words else error
        return f"{folder.name} failed: {reason}", False


# --- Records --------------------------------------------------------------------------------------


def record(folder, job):
    """Writes and returns what a report needs of a run. Raises UserError where training has not come
    to its end, or where the folder holds another run."""
    model, checkpoint = GPT.load(folder / "last.pt")
    config = {**checkpoint["train_config"], **asdict(model.config.resolve())}
    for name, value in job.kind.items():
        if config[name] != value:
            raise UserError(f"{folder} holds a run with {name}={config[name]}; remove it")
    losses = checkpoint["losses"]
    steps = len(losses)
    if steps < config["max_steps"]:
        raise UserError(f"it ended at step {steps} of {config['max_steps']}")

    # Evaluations on the way may be of a part of the validation split: they have no val_loss.
    log = checkpoint["log"]
    whole = [entry for entry in log if "val_loss" in entry]
    best = min(whole, key=lambda entry: entry["val_loss"])
    early = losses[: first_fifth(steps)]
    curve = [part.mean() for part in np.array_split(losses, min(CURVE_POINTS, steps))]
    sizes = {name: weights.numel() for name, weights in model.named_parameters()}
    in_attention = [size for name, size in sizes.items() if ".attention." in name]
    tokens = steps * config["batch_size"] * config["block_size"]

    found = dict(
        kind=job.kind,
        seed=job.seed,
        final_val_loss=whole[-1]["val_loss"],
        best_val_loss=best["val_loss"],
        best_step=best["step"],
        val_loss_by_length={},
        early_loss=float(np.mean(early)),
        steps=steps,
        curve=[round(float(loss), 3) for loss in curve],
        log=[{name: round(value, 4) for name, value in entry.items()} for entry in log],
        seconds=round(checkpoint["seconds"], 1),
        tokens_per_second=round(tokens / checkpoint["seconds"]),
        attention_parameters=sum(in_attention),
        parameters=sum(sizes.values()),
        remembered=model.cache_bytes()[1] // (4 * config["n_layer"]),
        config={
            name: value
            for name, value in config.items()
            if value is not None and name not in NOT_RECORDED
        },
    )
    write_json(folder / "record.json", found)
    return found


def first_fifth(steps):
    """The number of steps in the first fifth of a run, rounded up."""
    return -(-steps // 5)


def evaluate_lengths(folder, times, device):
    """Adds to a run's record its losses in windows of so many times the context: those that are not
    there yet, and that the data is long enough for."""
    found = read(folder)
    losses, size = found["val_loss_by_length"], found["config"]["block_size"]
    wanted = missing_lengths(found, times)
    if not wanted:
        return
    model, checkpoint = GPT.load(folder / "last.pt")
    if len(checkpoint["losses"]) != found["steps"]:
        raise UserError(f"{folder} was trained on after its record.json was made; remove it")

    training = checkpoint["train_config"]
    precision = train.autocast(device, training["dtype"])
    rows = training["micro_batch_size"] or training["batch_size"]
    val = load_or_prepare(training["dataset"])[2]["val"]
    for length in wanted:
        if length < len(val):
            longer = GPT(replace(model.config, block_size=length)).to(device)
            longer.load_state_dict(model.state_dict())
            windows = max(1, rows * size // length)
            total, count = train.evaluate(longer, val, windows, precision)
            losses[str(length)] = total / count
            write_json(folder / "record.json", found)


# --- What is stored, and what is reported ---------------------------------------------------------


def read(folder):
    return json.loads((folder / "record.json").read_text("utf-8"))


def finished_runs(folder):
    return [read(path.parent) for path in sorted(folder.glob("*/record.json"))]


def stored_runs(path):
    """The records of a file; none where there is no such file."""
    return json.loads(path.read_text("utf-8")) if path.exists() else []


def first_runs():
    """The runs that were stored before flags were recorded as data: their kinds are put together
    from them."""
    return [with_kind(record) for record in stored_runs(ASSETS / "results_first.json")]


def with_kind(record):
    kind = {name: record[name] for name in ("preset", "dataset", "attention", "pos")}
    for flag in record["flags"]:
        name, _, value = flag.partition("=")
        kind[name] = float(value) if "." in value else int(value) if value.isdigit() else value
    if kind.pop("shared_wk", False):
        kind["wk"] = "shared"  # as it is called today
    return {**record, "kind": kind}


def write_text(path, text):
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))
    return path


def write_json(path, value):
    write_text(path, json.dumps(value))


def report_sweep(jobs, args):
    """Compares the finished runs of --out, of the settings that were asked for."""
    settings = [runs.setting(job.kind) for job in jobs.values()]
    records = finished_runs(args.out)
    found = runs.Runs(record for record in records if runs.setting(record["kind"]) in settings)
    if not found.records():
        return
    text = report.sweep_report(found, args.baseline)
    path = write_text(args.out / "comparison.md", text)
    drawn = figures.draw_sweep(found, args.out)
    print(f"\n{text}\nwritten: {', '.join(map(str, [path, *drawn]))}")
    if min(map(len, found.of.values())) < 5:
        print("Fewer than five seeds tell only large differences from chance; --seeds gives more.")


def report_results(args):
    """Makes results.md and its figures of the stored runs and those of --out; with --assets, stores
    these, too."""
    folder, command = args.out, "python tests/experiments/compare.py --report"
    if args.assets:
        folder, command = ASSETS, f"{command} --assets"
    folder.mkdir(parents=True, exist_ok=True)
    there = runs.Runs(stored_runs(ASSETS / "results.json") + finished_runs(args.out))
    found, first = report.planned(there), runs.Runs(first_runs())
    drawn = figures.draw_results(found, first, folder)
    names = [path.name for path in drawn]
    text = report.results(found, first, sweeps.read_speeds(), names, command)
    written = [write_text(folder / "results.md", text), *drawn]
    if args.assets and found.records():
        lines = ",\n".join(map(json.dumps, found.records()))
        written.append(write_text(ASSETS / "results.json", f"[\n{lines}\n]\n"))
    print(f"written: {', '.join(map(str, written))}")
    if others := len(there.records()) - len(found.records()):
        print(f"left out: {others} of the runs, which are of no part in sweeps.py")


# --- The program ----------------------------------------------------------------------------------


def sweep(jobs, args, flags):
    """Trains and evaluates these runs; returns a sentence for each that failed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = train.choose_device(flags.get("device", "auto"), torch.get_num_threads())
    workers = args.workers or (cores if device.type == "cpu" else 4)
    restore_stored(jobs)
    say_plan(jobs, workers)
    failed = train_missing(jobs, workers, threads=max(1, cores // workers))
    evaluate_all(jobs, workers, device)
    return failed


def evaluate_all(jobs, workers, device):
    """Evaluates all finished runs in the longer windows that were asked for, some at a time."""
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    todo = [folder for folder, job in jobs.items() if job.lengths and finished(folder, job)]
    progress = Progress(len(todo))
    pool = ThreadPoolExecutor(workers)
    try:
        done = [
            pool.submit(evaluate_lengths, folder, jobs[folder].lengths, device) for folder in todo
        ]
        for number, future in enumerate(done, start=1):
            future.result()
            progress(number, f"evaluated in longer windows: {number} of {len(todo)} runs")
    finally:
        pool.shutdown(cancel_futures=True)
        progress.clear()


def main(argv=None):
    for number in signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)  # like Ctrl-C
    args, flags = parse(argv)
    if args.report:
        return report_results(args)
    jobs = plan(args, flags)
    report.choose_baseline([job.kind for job in jobs.values()], args.baseline)
    failed = sweep(jobs, args, flags)
    report_sweep(jobs, args)
    if failed:
        words = f"{len(failed)} runs failed; mend that and give the same command again"
        raise UserError("\n".join([*failed, words]))


if __name__ == "__main__":
    run_program(main)

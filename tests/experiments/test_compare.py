"""compare.py: which runs it plans, how it trains, stops, resumes and records them, and what
it refuses."""

import json
import os
import shutil
import signal
import threading
import time
from dataclasses import asdict
from pathlib import Path

import compare
import numpy as np
import pytest
import sweeps
import torch
from conftest import ROOT, TINY, call

import prepare
from model import GPT, GPTConfig

STEPS = 42
FLAGS = [*TINY[:-3], f"--max_steps={STEPS}", "--eval_interval=6", "--eval_tokens=500"]
SWEEP = [*FLAGS, "--attention=qkv,qv", "--pos=rope+agf", "--rope_values", "--seeds=7"]
STOPPED = "stopped, and each run is saved; the same command goes on with them"


def files(folder):
    """Every file's bytes."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def rows(text):
    """The cells of every row of the tables in a Markdown text."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def record(attention):
    (path,) = Path("out/compare").glob(f"*-{attention}-*/record.json")
    return json.loads(path.read_text())


def checkpoint(attention, name="last.pt"):
    (path,) = Path("out/compare").glob(f"*-{attention}-*/{name}")
    return torch.load(path, weights_only=True)


def interrupt_when(exists, number):
    """Sends this process a signal as soon as a condition holds."""

    def wait():
        deadline = time.monotonic() + 60
        while not exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait).start()


# A sweep of two real runs, stopped and gone on with -----------------------------------------------


@pytest.fixture(scope="module")
def swept(trained, tmp_path_factory):
    """A folder in which a sweep was stopped by Ctrl-C as soon as a run had been validated, and then
    finished."""
    folder = tmp_path_factory.mktemp("sweep")
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        before = {**files("data"), **files(ROOT / "assets")}
        interrupt_when(lambda: any(Path("out/compare").glob("*/best.pt")), signal.SIGINT)
        assert call("compare", *SWEEP, "--workers=1").endswith(STOPPED)
        assert 0 < len(checkpoint("qkv")["losses"]) < STEPS
        assert not any(Path("out/compare").glob("*-qv-*")), "the next run was not begun"
        assert call("compare", *SWEEP, "--workers=1", "--lengths=1,2,1000") is None
        assert {**files("data"), **files(ROOT / "assets")} == before, "nothing but --out is touched"
    return folder


@pytest.fixture
def sweep(swept, monkeypatch):
    monkeypatch.chdir(swept)


def test_a_stopped_run_ends_as_one_that_was_not_stopped(sweep):
    given = ["--attention=qkv", "--pos=rope+agf", "--rope_values", "--seed=7"]
    assert call("train", *FLAGS, *given, "--out=out/single") is None
    single = torch.load("out/single/last.pt", weights_only=True)
    assert checkpoint("qkv")["losses"] == single["losses"]
    assert len(single["losses"]) == STEPS


def test_a_record_holds_the_flags_that_were_given_and_all_that_they_mean(sweep):
    given = dict(n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=4, max_steps=STEPS)
    given |= dict(eval_interval=6, eval_tokens=500, preset="cpu", dataset="tiny", pos="rope+agf")
    assert record("qv")["kind"] == dict(given, attention="qv")
    assert record("qkv")["kind"] == dict(given, attention="qkv", rope_values=True)
    config = record("qv")["config"]
    assert (config["n_kv_head"], config["n_inner"]) == (2, 64), "what follows from the others"
    assert (config["optimizer"], config["learning_rate"]) == ("muon", 0.01), "what the preset says"
    assert str(Path.cwd()) not in json.dumps(record("qv"))


def test_a_record_holds_the_numbers_of_its_run(sweep):
    for attention, numbers in ("qkv", 32), ("qv", 16):
        found, last = record(attention), checkpoint(attention)
        losses = last["losses"]
        whole = [entry for entry in last["log"] if "val_loss" in entry]
        assert found["seed"] == 7 and found["steps"] == STEPS
        assert found["final_val_loss"] == whole[-1]["val_loss"]
        assert found["early_loss"] == pytest.approx(sum(losses[:9]) / 9), "8.4 steps, rounded up"
        assert found["curve"] == pytest.approx(losses, abs=6e-4), "as many points as steps"
        assert found["remembered"] == numbers
        assert found["attention_parameters"] == {"qkv": 4, "qv": 3}[attention] * 16 * 16 + 2
        speed = STEPS * 4 * 16 / last["seconds"]
        assert found["tokens_per_second"] == pytest.approx(speed, abs=0.5)


def test_a_sweep_says_where_its_seeds_are_few(sweep, capsys):
    words = "Fewer than five seeds tell only large differences from chance"
    assert call("compare", *SWEEP, "--workers=1") is None
    assert words in capsys.readouterr().out
    for path in list(Path("out/compare").glob("*/record.json")):
        for seed in 1, 2, 3, 4:
            other = path.parents[1] / f"{path.parent.name}{seed}"
            other.mkdir()
            (other / "record.json").write_text(
                json.dumps({**compare.read(path.parent), "seed": seed})
            )
    try:
        assert call("compare", *SWEEP, "--workers=1") is None
    finally:
        for path in Path("out/compare").glob("*seed=7[1234]"):
            shutil.rmtree(path)
    assert words not in capsys.readouterr().out


def test_losses_in_longer_windows_are_of_the_whole_split(sweep):
    val = prepare.read_dataset("tiny")[1]["val"]
    tokens = torch.from_numpy(val.astype(np.int64))
    (path,) = Path("out/compare").glob("*-qv-*/last.pt")
    model = GPT.load(path)[0]
    measured = record("qv")["val_loss_by_length"]
    assert measured.keys() == {"16", "32"}, "the data has no 16,000 tokens"
    assert measured["16"] == pytest.approx(record("qv")["final_val_loss"])
    for length in 16, 32:
        longer = GPT(compare.replace(model.config, block_size=length)).eval()
        longer.load_state_dict(model.state_dict())
        total = 0.0
        for x, y in zip(tokens[:-1].split(length), tokens[1:].split(length)):
            total += longer(x[None], y[None])[1].item() * len(x)
        assert measured[str(length)] == pytest.approx(total / (len(tokens) - 1), abs=1e-5)


def test_a_finished_sweep_is_reported_and_not_trained_again(sweep, capsys, monkeypatch):
    monkeypatch.setattr(compare, "TRAIN", "no such program")
    assert call("compare", *SWEEP, "--lengths=1,2") is None
    out = capsys.readouterr().out
    assert out.startswith("2 runs: 2 kinds, seed 7. Finished: 2. To train: 0, ")
    text = Path("out/compare/comparison.md").read_text("utf-8")
    assert text in out
    qkv, qv = record("qkv")["final_val_loss"], record("qv")["final_val_loss"]
    early = record("qv")["early_loss"] - record("qkv")["early_loss"]
    found = {row[1]: row[2:] for row in rows(text) if row[0] == "rope+agf" and len(row) == 8}
    assert found == {
        "QKV, rotated": ["1", "32", "1,026", f"{qkv:.4f}", "(the baseline)", ""],
        "QV": [
            "1",
            "16",
            "770",
            f"{qv:.4f}",
            f"{qv - qkv:+.4f} (one seed)",
            f"{early:+.4f} (one seed)",
        ],
    }
    drawn = [path for path in Path("out/compare").glob("*.png")]
    assert sorted(path.name for path in drawn) == ["lengths.png", "positions.png"]
    assert all(str(path) in out for path in drawn)


def test_runs_of_other_settings_are_not_reported_with_a_sweep(sweep, capsys, monkeypatch, tmp_path):
    shutil.copytree("out/compare", tmp_path / "compare")
    other = record("qv")
    other["kind"]["max_steps"] = 7
    (tmp_path / "compare/other").mkdir()
    (tmp_path / "compare/other/record.json").write_text(json.dumps(other))
    monkeypatch.setattr(compare, "TRAIN", "no such program")
    assert call("compare", *SWEEP, f"--out={tmp_path / 'compare'}") is None
    out = capsys.readouterr().out
    assert "max_steps=42" in out and "max_steps=7" not in out


def test_any_attention_may_be_the_baseline(sweep):
    def baselines(name):
        assert call("compare", *SWEEP, f"--baseline={name}") is None
        text = Path("out/compare/comparison.md").read_text("utf-8")
        return [row[1] for row in rows(text) if "(the baseline)" in row]

    assert baselines("qv") == ["QV"] and baselines("QKV, rotated") == ["QKV, rotated"]


def test_a_run_of_other_flags_in_the_folder_is_refused(sweep):
    (folder,) = Path("out/compare").glob("*-qv-*")
    job = compare.Job(dict(record("qv")["kind"], attention="mla"), 7, [], [])
    with pytest.raises(prepare.UserError, match="holds a run with attention=qv; remove it"):
        compare.record(folder, job)


def test_a_run_that_was_trained_on_is_not_evaluated_in_longer_windows(sweep, tmp_path):
    (folder,) = Path("out/compare").glob("*-qv-*")
    shutil.copytree(folder, tmp_path / "run")
    longer = torch.load(tmp_path / "run/last.pt", weights_only=True)
    longer["losses"].append(1.0)
    torch.save(longer, tmp_path / "run/last.pt")
    with pytest.raises(prepare.UserError, match="was trained on after its record.json was made"):
        compare.evaluate_lengths(tmp_path / "run", [3], torch.device("cpu"))


# What it asks of train.py -------------------------------------------------------------------------

# It stands for train.py: copies a finished run, but fails for qv, and for mla waits.
FAKE = """
import json, os, shutil, sys, time
flags = dict(flag.lstrip("-").partition("=")[::2] for flag in sys.argv[1:])
with open("calls.jsonl", "a") as file:
    print(json.dumps([os.environ["OMP_NUM_THREADS"], *sys.argv[1:]]), file=file)
print("some words")
while flags["attention"] == "mla":
    time.sleep(0.01)
if flags["attention"] == "qv":
    sys.exit("no luck\\n")
shutil.copy("finished.pt", flags["out"] + "/last.pt")
"""


@pytest.fixture
def calls(folder, monkeypatch):
    """Replaces train.py by that program. A function that returns its command lines so far."""
    Path("fake.py").write_text(FAKE)
    save_finished(attention="qkv")
    monkeypatch.setattr(compare, "TRAIN", "fake.py")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return lambda: [json.loads(line) for line in Path("calls.jsonl").read_text().splitlines()]


def save_finished(attention, steps=6, **sizes):
    """Writes finished.pt: the folder's own run, as if it were one of that attention, under rope."""
    stored = torch.load("out/run/last.pt", weights_only=True)
    config = dict(stored["model_config"], attention=attention, pos="rope", **sizes)
    model = GPT(GPTConfig(**config))
    changed = dict(model_config=asdict(model.config), model=model.state_dict())
    torch.save({**stored, **changed, "losses": stored["losses"][:steps]}, "finished.pt")


def test_a_run_that_fails_does_not_stop_the_others(calls, capsys):
    flags = [*TINY, "--attention=qv,qkv", "--pos=rope", "--seeds=1-2", "--workers=1"]
    *reasons, last = call("compare", *flags).splitlines()
    assert [reason.endswith("failed: no luck") for reason in reasons] == [True, True]
    assert last == "2 runs failed; mend that and give the same command again"
    assert "Runs left: 3" in capsys.readouterr().out
    assert [line[3:6] for line in calls()] == [
        [f"--attention={attention}", "--pos=rope", "--n_layer=1"]
        for attention in ("qv", "qkv", "qv", "qkv")
    ]
    call("compare", *flags)
    again = [line[3] for line in calls()[4:]]
    assert again == ["--attention=qv"] * 2, "only those that failed are trained again"


def test_workers_share_the_cores(calls):
    cores = len(os.sched_getaffinity(0))
    for workers in 1, cores:
        flags = [
            *TINY,
            "--attention=qkv",
            "--pos=rope",
            f"--seeds={workers}",
            f"--workers={workers}",
        ]
        call("compare", *flags)
        assert calls()[-1][0] == str(cores // workers)


def test_a_run_that_ended_early_is_no_finished_one_and_is_resumed(calls):
    flags = [*TINY, "--attention=qkv", "--pos=rope", "--seeds=1"]
    save_finished(attention="qkv", steps=5)
    assert "failed: it ended at step 5 of 6" in call("compare", *flags)
    save_finished(attention="qkv")
    assert call("compare", *flags) is None
    assert ["--resume" in line for line in calls()] == [False, True]


def test_the_final_loss_is_the_last_of_the_whole_split_and_the_best_the_lowest(calls):
    flags = [*TINY, "--attention=qkv", "--pos=rope", "--seeds=1"]
    stored = torch.load("finished.pt", weights_only=True)
    stored["log"] = [
        dict(step=2, seconds=1.0, val_loss_part=0.5),
        dict(step=3, seconds=2.0, val_loss=1.25),
        dict(step=6, seconds=3.0, val_loss_part=0.5, val_loss=1.5),
    ]
    torch.save(stored, "finished.pt")
    assert call("compare", *flags) is None
    found = record("qkv")
    assert (found["final_val_loss"], found["best_val_loss"], found["best_step"]) == (1.5, 1.25, 3)
    assert found["log"] == stored["log"]


def test_numbers_remembered_are_those_of_one_layer(calls):
    save_finished(attention="qkv", n_layer=2)
    flags = [*TINY, "--n_layer=2", "--attention=qkv", "--pos=rope", "--seeds=1"]
    assert call("compare", *flags) is None
    assert record("qkv")["remembered"] == 32, "a key and a value, 16 wide each"


def test_a_run_that_is_stored_is_not_trained_again(calls, tmp_path, monkeypatch):
    """Unless it is to be evaluated in longer windows, for which nobody kept its model."""
    flags = [*TINY, "--attention=qkv", "--pos=rope", "--seeds=1"]
    call("compare", *flags)
    stored = record("qkv")
    monkeypatch.setattr(compare, "ASSETS", tmp_path / "assets")
    compare.write_text(tmp_path / "assets/results.json", json.dumps([stored]))
    elsewhere = [*flags, "--out=out/elsewhere"]
    assert call("compare", *elsewhere) is None
    assert len(calls()) == 1
    assert json.loads(next(Path("out/elsewhere").glob("*/record.json")).read_text()) == stored
    assert call("compare", *elsewhere, "--lengths=2") is None
    assert len(calls()) == 2


def test_sigterm_stops_what_runs_and_starts_nothing(calls):
    interrupt_when(Path("calls.jsonl").exists, signal.SIGTERM)
    flags = [*TINY, "--attention=mla", "--pos=rope", "--workers=1"]
    assert call("compare", *flags).endswith(STOPPED)
    assert len(calls()) == 1


# Which runs it plans ------------------------------------------------------------------------------


def plan(*flags):
    """The kinds and seeds of the runs that a command line asks for, in their order."""
    jobs = compare.plan(*compare.parse([*flags, "--device=cpu"]))
    return [(job.kind, job.seed) for job in jobs.values()]


def test_runs_of_one_seed_stand_side_by_side(folder):
    found = plan(*TINY, "--attention=qkv,qv", "--pos=rope,agf", "--seeds=3-4")
    assert [(seed, kind["pos"], kind["attention"]) for kind, seed in found] == [
        (3, "rope", "qkv"),
        (3, "rope", "qv"),
        (3, "agf", "qkv"),
        (3, "agf", "qv"),
        (4, "rope", "qkv"),
        (4, "rope", "qv"),
        (4, "agf", "qkv"),
        (4, "agf", "qv"),
    ]


def test_a_flag_goes_where_it_counts(folder):
    flags = ["--attention=qkv,qv_ka", "--pos=rope,agf", "--seeds=1", "--d_ctx=8", "--rope_values"]
    found = plan(*TINY, *flags)
    named = [
        (kind["attention"], kind["pos"], kind.get("d_ctx"), kind.get("rope_values"))
        for kind, _ in found
    ]
    assert named == [
        ("qkv", "rope", None, True),
        ("qv_ka", "rope", 8, None),
        ("qkv", "agf", None, None),
        ("qv_ka", "agf", 8, None),
    ]


@pytest.mark.parametrize("flags", [["--n_inner=8"], ["--n_inner", "8"]], ids=" ".join)
def test_a_value_follows_its_flag_with_or_without_an_equals_sign(folder, flags):
    ((kind, _),) = plan(*TINY, "--attention=qv", "--seeds=1", *flags)
    assert kind["n_inner"] == 8


def test_seeds_are_ranges_and_lists():
    assert compare.parse_seeds("2001-2003,7") == [2001, 2002, 2003, 7]


def test_flags_of_the_machine_make_no_variant(folder):
    jobs = compare.plan(
        *compare.parse([*TINY, "--attention=qv", "--seeds=1", "--micro_batch_size=2"])
    )
    ((path, job),) = jobs.items()
    assert "--micro_batch_size=2" in job.command and "micro" not in str(job.kind) + path.name


PART_SIZES = {1: 280, 2: 160, 3: 100, 4: 100, 5: 150, 6: 35, 8: 100}


@pytest.mark.parametrize("part", PART_SIZES)
def test_train_takes_the_flags_of_every_part(folder, part, monkeypatch):
    monkeypatch.setattr(compare, "load_or_prepare", lambda dataset: None)
    assert len(plan(f"--part={part}")) == PART_SIZES[part]


def test_parts_are_computed_in_their_order_and_seed_by_seed(folder, monkeypatch):
    monkeypatch.setattr(compare, "load_or_prepare", lambda dataset: None)
    found = plan("--part=1,3")
    seeds = [seed for _, seed in found]
    assert seeds[:280] == [seed for seed in range(2001, 2021) for _ in range(14)]
    assert seeds[280:] == [seed for seed in range(2001, 2011) for _ in range(10)]
    assert {kind.get("max_steps") for kind, _ in found[280:]} == {1800}


@pytest.mark.parametrize("parts", ["1,5", "5,1"])
def test_a_run_of_two_parts_is_trained_once_and_evaluated_as_both_ask(folder, monkeypatch, parts):
    monkeypatch.setattr(compare, "load_or_prepare", lambda dataset: None)
    jobs = compare.plan(*compare.parse([f"--part={parts}", "--device=cpu"]))
    lengths = [job.lengths for job in jobs.values()]
    assert len(jobs) == PART_SIZES[1] + 70, "80 of the 150 runs of part 5 are of part 1"
    assert lengths.count([1, 2, 4, 8]) == PART_SIZES[5]


# What is stored -----------------------------------------------------------------------------------


def test_runs_are_stored_in_assets_only_on_request(sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "ASSETS", tmp_path)
    kinds = [record("qkv")["kind"], record("qv")["kind"]]
    monkeypatch.setitem(sweeps.PARTS, 99, [sweeps.Sweep(kinds, range(7, 9))])
    older = dict(record("qv"), seed=8, final_val_loss=9.0)
    replaced = dict(record("qv"), final_val_loss=9.0)
    of_no_part = dict(record("qv"), seed=9)
    (tmp_path / "results.json").write_text(json.dumps([older, replaced, of_no_part]))
    before = files(tmp_path)
    assert call("compare", "--report") is None
    assert files(tmp_path) == before
    assert "Made by `python tests/experiments/compare.py --report` " in Path(
        "out/compare/results.md"
    ).read_text("utf-8")
    capsys.readouterr()
    assert call("compare", "--report", "--assets") is None
    assert "left out: 1 of the runs, which are of no part" in capsys.readouterr().out
    assert "Made by `python tests/experiments/compare.py --report --assets` " in (
        tmp_path / "results.md"
    ).read_text("utf-8")
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored == [record("qkv"), record("qv"), older], "one line for each run, sorted"
    assert len((tmp_path / "results.json").read_text().splitlines()) == 5


def test_flags_of_the_oldest_records_become_data():
    old = dict(preset="cpu", dataset="some", attention="qv_ka", pos="rope", seed=1)
    flags = ["d_ctx=32", "learning_rate=0.003", "optimizer=adamw", "shared_wk=True"]
    assert compare.with_kind(dict(old, flags=flags))["kind"] == dict(
        preset="cpu",
        dataset="some",
        attention="qv_ka",
        pos="rope",
        d_ctx=32,
        learning_rate=0.003,
        optimizer="adamw",
        wk="shared",
    )


def test_the_stored_report_is_what_the_stored_runs_say(tmp_path, monkeypatch):
    """In a fresh clone, which has no runs of its own."""
    monkeypatch.chdir(tmp_path)
    assert call("compare", "--report") is None
    made = (
        Path("out/compare/results.md").read_text("utf-8").replace("--report`", "--report --assets`")
    )
    stored = (ROOT / "assets/results.md").read_text("utf-8")
    assert made == stored, "run python tests/experiments/compare.py --report --assets"


# Misuse -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--attentoin=qv"], "unrecognized arguments: --attentoin=qv"),
        (["--attention=qkv,qkw"], "'qkw' is none of qkv, gqa, mla, qv, qv_ka"),
        (["--pos=none"], "'none' is none of learned, sinusoidal, rope, agf, rope+agf"),
        (["--seeds=2.5"], "argument --seeds: "),
        (["--seeds=5-4"], "5-4 names no seed"),
        (["--seed=5"], "--seed is not for here"),
        (["--workers=0"], "0 must be at least 1"),
        (["--lengths=1,0"], "0 must be at least 1"),
        (["--lengths=long"], "argument --lengths: "),
        (["--resume"], "--resume is not for here"),
        (["--n_layer=two"], "argument --n_layer: "),
        (["--n_head=3"], "n_embd=16 must be a multiple of n_head=3"),
        (["--attention=qkv,qv", "--d_ctx=8"], "--d_ctx counts for none of these attentions"),
        (["--baseline=mqa"], "--baseline=mqa is none of these attentions: QKV; QV; QV-Ka"),
        (["--dataset=nowhere"], "data set 'nowhere' is "),
        (["--device=toaster"], "device=toaster cannot be used here"),
        (["--out=tiny.txt"], "tiny.txt/cpu-tiny-qkv-"),
        (["--assets"], "--assets belongs to --report"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_misuse_gets_one_sentence(folder, capsys, flags, words):
    refused(capsys, [*TINY, *flags], words)


@pytest.mark.parametrize(
    "flags", [["--attention=qv"], ["--lengths=2"], ["--max_steps=3"]], ids=" ".join
)
def test_a_part_takes_no_flags_that_change_it(folder, capsys, flags):
    name = flags[0].partition("=")[0]
    refused(capsys, ["--part=1", *flags], f"{name} cannot change a part")


def test_a_part_that_does_not_exist_is_refused(folder, capsys):
    refused(capsys, [f"--part={max(sweeps.PARTS) + 1}"], "is none of the parts")


def refused(capsys, flags, words):
    before = files(".")
    code = call("compare", *flags)
    sentence = capsys.readouterr().err.strip() if isinstance(code, int) else code
    assert code not in (None, 0) and words in sentence, sentence
    assert "\n" not in sentence and len(sentence) < 500
    assert files(".") == before


def test_help_teaches(capsys):
    assert call("compare", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "python tests/experiments/compare.py --report" in text
    assert "2001-2020" in text and "default: qkv,qv,qv_ka" in text
    assert "goes to train.py" in text

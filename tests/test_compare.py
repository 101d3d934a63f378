"""tests/compare.py and tests/report.py: a small sweep of real runs, stopped and gone on with; and known numbers."""

import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import compare
import numpy as np
import pytest
import report
import torch
from conftest import ROOT, TEXT, TINY, call

import prepare
from model import GPT

STEPS = 160
FLAGS = [*TINY[:-2], f"--max_steps={STEPS}", "--eval_interval=20"]
SWEEP = [*FLAGS, "--attention=qkv,qv", "--pos=agf", "--seeds=2", "--workers=2"]


def contents(folder):
    return {
        path: hashlib.sha256(path.read_bytes()).digest()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def outside():
    """All files but those of the sweep."""
    return {
        **contents(ROOT / "assets"),
        **contents("data"),
        **contents("assets"),
        **contents("out/run"),
    }


def log(run):
    """A run's log without its times."""
    lines = Path(run, "log.jsonl").read_text().splitlines()
    return [
        {name: x for name, x in json.loads(line).items() if "second" not in name} for line in lines
    ]


def rows(text):
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def place(attention, seed):
    (folder,) = Path("out/compare").glob(f"cpu-tiny-{attention}-agf,*,seed={seed}")
    return folder


def interrupt(number, pattern):
    """Sends this process a signal as soon as the sweep's folder has such a file."""
    deadline = time.monotonic() + 60
    while not any(Path("out/compare").glob(pattern)) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(os.getpid(), number)


# A sweep --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(trained, tmp_path_factory):
    """A folder in which a sweep was stopped by Ctrl-C as soon as a run had been validated, and then finished."""
    folder = tmp_path_factory.mktemp("sweep")
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        Path("assets").mkdir()
        Path("assets/results.json").write_text("[]")
        before = outside()
        threading.Thread(target=interrupt, args=(signal.SIGINT, "*/best.pt")).start()
        sentence = call("compare", *SWEEP, "--workers=1")
        assert sentence.endswith(
            "stopped, and each run is saved; the same command goes on with them"
        )
        stopped = [
            len(torch.load(path, weights_only=True)["losses"])
            for path in Path("out/compare").glob("*/last.pt")
        ]
        assert stopped and all(0 < step < STEPS for step in stopped)
        assert call("compare", *SWEEP, "--lengths=1,2") is None
        yield folder
        assert outside() == before, "nothing but --out is touched"


@pytest.fixture
def swept(sweep, monkeypatch):
    monkeypatch.chdir(sweep)
    return sweep


def test_a_stopped_sweep_goes_on_to_what_a_single_command_makes(swept):
    output = (place("qkv", 1337) / "output.txt").read_text()
    assert output.count("step 20: ") == 1, "resumed, not begun again"
    assert (
        call("train", *FLAGS, "--attention=qkv", "--pos=agf", "--seed=1337", "--out=out/single")
        is None
    )
    assert log("out/single") == log(place("qkv", 1337)) and len(log("out/single")) == STEPS // 20


def test_every_figure_of_the_report_is_of_the_runs(swept):
    text = Path("out/compare/results.md").read_text()
    assert (
        "## cpu preset, tiny, batch_size=4, block_size=16, eval_interval=20, max_steps=160, n_embd=16, n_head=2, "
        "n_layer=1\n"
    ) in text, "what all runs share is in the title"
    losses = {
        name: np.array(
            [min(entry["val_loss"] for entry in log(place(name, seed))) for seed in (1337, 1338)]
        )
        for name in ("qkv", "qv")
    }
    half = 12.706 / 2**0.5  # Student's t, one degree of freedom

    def pm(x, form=".4f"):
        return f"{x.mean():{form}} ± {half * x.std(ddof=1):.4f}"

    gap = pm(losses["qv"] - losses["qkv"], "+.4f")
    ((claim, condition, told),) = [row for row in rows(text) if row[0].startswith("C")]
    assert (claim, condition) == ("C1: QV is worse than QKV", "qv - qkv > 0") and gap in told, (
        "and no other claim"
    )
    sizes = 3 * 16 * 16 + 2, 3 * 16 * 16 + 2 + 8 * 16 * 16 + 3 * 16 + len(set(TEXT)) * 16
    groups = {row[1]: row for row in rows(text) if row[0] == "agf" and len(row) == 11}
    assert [cell.strip("*") for cell in groups["qv"][:5]] == [
        "agf",
        "qv",
        "2",
        pm(losses["qv"]),
        gap,
    ]
    assert (
        groups["qv"][7:10] == [f"{sizes[0]:,}", f"{sizes[1]:,}", "16"] and groups["qkv"][9] == "32"
    )
    assert groups["qkv"][3:5] == [pm(losses["qkv"]), ""]
    speeds = [
        STEPS * 4 * 16 / torch.load(place("qv", seed) / "last.pt", weights_only=True)["seconds"]
        for seed in (1337, 1338)
    ]
    assert groups["qv"][10] == f"{max(speeds):,.0f}"
    last = torch.load(place("qv", 1338) / "last.pt", weights_only=True)
    stored = [
        run
        for run in json.loads(Path("out/compare/results.json").read_text())
        if run["attention"] == "qv"
    ]
    assert [run["seed"] for run in stored] == [1337, 1338] and stored[0]["flags"] == stored[1][
        "flags"
    ]
    assert stored[1]["early_loss"] == pytest.approx(np.mean(last["losses"][: STEPS // 5]))
    assert all(
        Path("out/compare", name).read_bytes().startswith(b"\x89PNG")
        for name in ("results.png", "lengths.png")
    )


def test_losses_in_longer_windows_against_a_sum_by_hand(swept):
    tokens = torch.from_numpy(prepare.read_dataset("tiny")[1]["val"].astype(np.int64))
    for attention, length in itertools.product(("qkv", "qv"), (16, 32)):
        model, _ = GPT.load(place(attention, 1337) / "best.pt")
        longer = GPT(compare.replace(model.config, block_size=length)).eval()
        longer.load_state_dict(model.state_dict())
        windows = zip(tokens[:-1].split(length), tokens[1:].split(length))
        expected = sum(longer(x[None], y[None])[1].item() * len(x) for x, y in windows) / (
            len(tokens) - 1
        )
        measured = json.loads((place(attention, 1337) / "record.json").read_text())[
            "val_loss_by_length"
        ]
        assert measured.keys() == {"16", "32"} and measured[str(length)] == pytest.approx(
            expected, abs=1e-5
        )
    text = Path("out/compare/results.md").read_text()
    assert ["positions", "attention", "loss in 16 tokens", "loss in 32 tokens"] in rows(text)


def test_lengths_are_measured_once_and_of_the_recorded_checkpoint(swept, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(compare.train, "evaluate", lambda *args: pytest.fail("evaluated again"))
        assert (
            call("compare", *SWEEP, "--lengths=1,2,1000") is None
        )  # the data has no 16,000 tokens
    folder = place("qv", 1338)
    assert call("train", "--resume", f"--out={folder}", f"--max_steps={STEPS + 40}") is None
    capsys.readouterr()
    assert call("compare", *SWEEP) is None
    assert capsys.readouterr().out.startswith("runs: 4, finished: 4, "), (
        "an extended run is finished, too"
    )
    assert f"{folder} was trained on after its record.json was made" in call(
        "compare", *SWEEP, "--lengths=3"
    )


# What it asks of train.py ---------------------------------------------------------------------------------------------

FAKE = """
import json, os, shutil, sys, time
flags = dict(flag.lstrip("-").partition("=")[::2] for flag in sys.argv[1:])
with open("calls.jsonl", "a") as file:
    print(json.dumps([os.environ["OMP_NUM_THREADS"], *sys.argv[1:]]), file=file)
print("some words")
while flags["attention"] == "gqa":
    time.sleep(0.01)
if flags["attention"] == "qv":
    sys.exit("no luck\\n")
shutil.copytree("out/run", flags["out"], dirs_exist_ok=True)
sys.exit(flags["attention"] == "mla")
"""


@pytest.fixture
def calls(folder, monkeypatch):
    """Replaces train.py by a program that copies a finished run or, for qv, fails, or, for gqa, waits. A function that
    returns its command lines so far."""
    Path("fake.py").write_text(FAKE)
    monkeypatch.setattr(compare, "TRAIN", "fake.py")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return lambda: [json.loads(line) for line in Path("calls.jsonl").read_text().splitlines()]


def test_a_run_that_fails_does_not_stop_the_others(calls, capsys):
    sentence = call(
        "compare", *FLAGS, "--attention=qv,qkv", "--pos=rope", "--seeds=2", "--workers=1"
    )
    *reasons, last = sentence.splitlines()
    assert len(reasons) == 2 and all(line.endswith(" failed: no luck") for line in reasons)
    assert last == "2 runs failed; mend that and give the same command again"
    out = capsys.readouterr().out
    assert (
        out.count("failed: no luck; runs left: ") == 2 and "runs: 1; written to out/compare/" in out
    )
    order = [(seed, attention) for seed in (1337, 1338) for attention in ("qv", "qkv")]
    assert [line[2:5] for line in calls()] == [
        [f"--attention={a}", "--pos=rope", f"--seed={s}"] for s, a in order
    ]
    again = call("compare", *FLAGS, "--attention=qv,qkv", "--pos=rope", "--seeds=2", "--workers=2")
    assert sorted(line[-40:] for line in again.splitlines()) == sorted(
        line[-40:] for line in sentence.splitlines()
    )
    assert len(calls()) == 6, "finished ones are not trained again"
    cores = len(os.sched_getaffinity(0))
    assert [line[0] for line in calls()] == [str(cores)] * 4 + [str(max(1, cores // 2))] * 2


def test_a_finished_run_without_a_record_gets_it_and_a_stopped_one_is_resumed(calls, folder):
    """train.py refuses to resume what is finished, as if it had failed: mla stands for that here."""
    flags = [*FLAGS, "--attention=mla", "--seeds=1", "--pos=rope"]
    assert call("compare", *flags) is None
    (run,) = (path.parent for path in Path("out/compare").glob("*/record.json"))
    (run / "record.json").unlink()
    assert call("compare", *flags) is None and (run / "record.json").exists()
    assert "--resume" not in calls()[0] and calls()[1] == [
        *calls()[0][:-1],
        "--resume",
        calls()[0][-1],
    ]
    unfinished = torch.load("out/run/last.pt", weights_only=True)
    torch.save({**unfinished, "losses": unfinished["losses"][:5]}, "out/run/last.pt")
    assert "failed: it ended at step 5 of 6" in call(
        "compare", *FLAGS, "--attention=qkv", "--seeds=1", "--pos=rope"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_stops_what_runs_and_starts_nothing(calls, number):
    threading.Thread(target=interrupt, args=(number, "../../calls.jsonl")).start()
    sentence = call("compare", *FLAGS, "--attention=gqa", "--pos=rope", "--workers=1")
    assert (
        sentence.endswith("stopped, and each run is saved; the same command goes on with them")
        and len(calls()) == 1
    )


def test_what_is_compared_runs_side_by_side_and_a_flag_goes_where_it_counts(folder):
    runs = compare.plan(
        *compare.parse(
            [
                *FLAGS,
                "--attention=qkv,qv_ka",
                "--pos=rope,agf",
                "--seeds=2",
                "--d_ctx=8",
                "--shared_wk",
                "--device=cpu",
            ]
        )
    )
    order = itertools.product((1337, 1338), ("rope", "agf"), ("qkv", "qv_ka"))
    assert [command[1:4] for command in runs.values()] == [
        [f"--attention={attention}", f"--pos={pos}", f"--seed={seed}"]
        for seed, pos, attention in order
    ]
    for command in runs.values():
        assert (
            ("--d_ctx=8" in command)
            == ("--shared_wk" in command)
            == ("--attention=qv_ka" in command)
        )
    name = [*runs][1].name
    assert "d_ctx=8" in name and "shared_wk=True" in name and "device" not in name


# What it makes of known numbers ---------------------------------------------------------------------------------------


def made_up(attention, pos, seed, loss, early, flags=(), lengths=(), preset="gpu"):
    """A run's record."""
    return dict(
        preset=preset,
        dataset="some",
        attention=attention,
        pos=pos,
        flags=list(flags),
        seed=seed,
        best_val_loss=loss,
        best_step=seed,
        final_val_loss=loss + 0.1,
        val_loss_by_length=dict(lengths),
        early_steps=10,
        early_loss=early,
        early_curve=[early] * 5,
        attention_parameters=1,
        parameters=2,
        remembered=3,
        tokens_per_second=2 * seed,
        log=[[5, loss, 1.0]],
    )


def test_a_report_of_known_numbers(tmp_path):
    """Claims, paired by seed, on numbers whose answer is clear; a seed that QKV lacks is not compared."""
    noise = {1: 0.3, 2: -0.2, 3: 0.5}  # the same for all: pairing removes it
    records = [
        made_up(name, pos, seed, 2 + gap + noise[seed], 3 + early + noise[seed])
        for pos, gaps in (("learned", (0.0, 0.08, 0.05)), ("agf", (0.0, 0.03, 0.01)))
        for (name, early), gap in zip((("qkv", 0.0), ("qv", 0.1), ("qv_ka", -0.05)), gaps)
        for seed in noise
    ]
    records.append(made_up("qv", "agf", 4, 99.0, 99.0))
    records += [
        made_up("qkv", "rope", seed, loss, 1.0) for seed, loss in ((1, 1.48), (2, 1.46), (3, 1.36))
    ]
    records += [
        made_up("mla", "rope", seed, loss, 1.0) for seed, loss in ((1, 1.49), (2, 1.49), (3, 1.35))
    ]
    report.report(records, tmp_path)
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    found = {tuple(row[:2]): row[2:] for row in rows(text)}
    assert found["claim (13 verdicts)", "holds if"] == ["learned", "rope", "agf"]
    assert found["C1: QV is worse than QKV", "qv - qkv > 0"] == [
        "**+0.0800 ± 0.0000** holds",
        "",
        "**+0.0300 ± 0.0000** holds",
    ]
    assert found[
        "C2: QV's gap to QKV is less than half of that with learned positions",
        "qv - qkv - 0.5 learned qv + 0.5 learned qkv < 0",
    ] == ["", "", "**-0.0100 ± 0.0000** holds"]
    assert found["C3: QV-Ka is better than QV", "qv_ka - qv < 0"] == [
        "**-0.0300 ± 0.0000** holds",
        "",
        "**-0.0200 ± 0.0000** holds",
    ]
    assert found["C3: QV-Ka closes more than half of QV's gap", "qv_ka - 0.5 qv - 0.5 qkv < 0"] == [
        "**+0.0100 ± 0.0000** does not hold",
        "",
        "**-0.0050 ± 0.0000** holds",
    ]
    assert found["C3: QV-Ka is better than QKV", "qv_ka - qkv < 0"] == [
        "**+0.0500 ± 0.0000** does not hold",
        "",
        "**+0.0100 ± 0.0000** does not hold",
    ]
    assert found[
        "C4: QV-Ka learns faster than QKV at first (training loss, mean of the first fifth)",
        "qv_ka - qkv < 0",
    ] == ["**-0.0500 ± 0.0000** holds", "", "**-0.0500 ± 0.0000** holds"]
    assert found["QKV is worse than with rope", "qkv - rope qkv > 0"] == [
        "+0.7667 ± 1.0003 undecided",
        "",
        "+0.7667 ± 1.0003 undecided",
    ]
    assert found["learned", "qkv"] == ["3", "2.2000 ± 0.8957", "", "", "2", "1", "2", "3", "6"]
    assert found["rope", "mla"] == [
        "3",
        "1.4433 ± 0.2008",
        "+0.0100 ± 0.0497",
        "+0.0000 ± 0.0000",
        "2",
        "1",
        "2",
        "3",
        "6",
    ]
    assert found["agf", "qv"] == [
        "4",
        "26.4225 ± 76.9928",
        "**+0.0300 ± 0.0000**",
        "**+0.1000 ± 0.0000**",
        "2",
        "1",
        "2",
        "3",
        "8",
    ]
    assert "sinusoidal" not in text and "QV is worse than GQA" not in text, "no claim without runs"
    assert text.startswith(report.MEANING) and "\n## gpu preset, some\n" in text
    assert json.loads((tmp_path / "results.json").read_text()) == records
    assert (tmp_path / "results.png").exists() and not (tmp_path / "lengths.png").exists()


def test_an_interval_is_student_s():
    for n, t in (2, 12.706), (5, 2.776), (20, 2.093), (30, 2.045):  # from a printed table
        values = list(np.arange(n) / 7)
        mean, half = report.interval(values)
        assert mean == pytest.approx(np.mean(values))
        assert half == pytest.approx(t * np.std(values, ddof=1) / n**0.5, rel=3e-4)
        assert report.chance(list(np.array(values) - mean + half)) == pytest.approx(0.05, rel=1e-3)
    assert report.told([1.5]) == "1.5000" and report.difference([0.5]) == "+0.5000", (
        "one seed has no interval"
    )
    assert [
        report.verdict(x, ">", report.chance(x))
        for x in ([0.5], [1.0, 2.0], [1.0, 1.1], [-1.0, -1.1])
    ] == ["undecided", "undecided", "holds", "does not hold"]
    assert report.difference([1.0, 1.0]) == "**+1.0000 ± 0.0000**" and report.difference([]) == ""


def test_verdicts_are_corrected_for_their_number(tmp_path):
    """Holm's own procedure: the smallest of m p values against 5 % / m, the next against 5 % / (m - 1), and so on."""
    assert report.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    differences = 0.010 + 0.0045 * np.array([-1, 1, -2, 2, 0])  # p = 0.035
    assert 0.03 < report.chance(list(differences)) < 0.04
    records = [
        made_up(name, pos, seed, 2 + gap, 3.0)
        for pos in ("rope", "agf")
        for seed, extra in enumerate(differences)
        for name, gap in (("qkv", 0.0), ("qv", extra if pos == "agf" else 0.0))
    ]
    report.report(records[10:], tmp_path)
    assert "± 0.0088** holds" in (tmp_path / "results.md").read_text(encoding="utf-8"), (
        "alone it is told from chance"
    )
    report.report(records, tmp_path)
    assert "± 0.0088** undecided" in (tmp_path / "results.md").read_text(encoding="utf-8"), (
        "as one of two it is not"
    )


def test_runs_are_compared_with_qkv_of_their_own_setting(tmp_path):
    """Flags of training, or of the model as a whole, make a comparison with claims of its own; others make variants."""
    records = [
        made_up(attention, "agf", seed, loss, 1.0, flags)
        for loss, attention, *flags in (
            (1.0, "qkv"),
            (0.5, "qkv", "max_steps=9"),
            (1.7, "qv", "n_inner=32"),
            (0.6, "qv_ka", "d_ctx=8", "max_steps=9"),
            (0.8, "qv", "max_steps=9"),
            (1.2, "qv_ka", "shared_wk=True"),
        )
        for seed in (1, 2)
    ]
    report.report(records, tmp_path)
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    plain, nine = text.split("\n## gpu preset, some")[1:]
    assert {row[1]: row[4] for row in rows(plain) if row[0] == "agf"} == {
        "qkv": "",
        "qv n_inner=32": "**+0.7000 ± 0.0000**",
        "qv_ka shared_wk": "**+0.2000 ± 0.0000**",
    }
    assert (
        nine.startswith(", max_steps=9\n")
        and "C1: QV is worse than QKV" in nine
        and "C1" not in plain
    )
    assert {row[1]: row[4] for row in rows(nine) if row[0] == "agf"} == {
        "qkv": "",
        "qv": "**+0.3000 ± 0.0000**",
        "qv_ka d_ctx=8": "**+0.1000 ± 0.0000**",
    }


def test_pictures_tell_attentions_and_variants_apart(tmp_path, monkeypatch):
    """A line has the colour and marker of its attention, a variant's is broken, and the legend is of all panels. Runs
    of other flags than a preset's are compared in a picture only where there are no others."""
    groups = (
        ("rope", "qkv"),
        ("rope", "qv_ka"),
        ("agf", "qkv"),
        ("agf", "qv_ka", "d_ctx=8"),
        ("agf", "qv_ka", "d_ctx=9"),
        ("agf", "mine"),
        ("agf", "qv", "n_inner=8"),
        ("agf", "qkv", "max_steps=9"),
        ("agf", "qv", "max_steps=9"),
    )
    records = [
        made_up(attention, pos, seed, 1.0, 1.0, flags, {"16": 1.0 * seed, "32": 2.0 * seed})
        for seed in (1, 2)
        for pos, attention, *flags in groups
    ]
    figures = []
    monkeypatch.setattr(
        report.Figure, "savefig", lambda self, path, **options: (figures.append(self), path.touch())
    )
    report.report(records, tmp_path)
    (gaps,), (frontier,), (part, other) = (figure.subfigs for figure in figures)
    assert [text.get_text() for text in gaps.axes[0].get_yticklabels()] == ["qv_ka", "mine"], (
        "no variants"
    )
    (panel,) = frontier.axes  # agf, which has more than rope
    points = [container.get_label() for container in panel.containers]
    assert points == ["qkv", "qv_ka", "qv_ka", "mine"], "n_inner is no memory"
    assert [text.get_text() for text in panel.texts] == ["", "d_ctx=8", "d_ctx=9", ""]
    xs = [x for container in panel.containers for x in container.lines[0].get_xdata()]
    assert xs == pytest.approx([3] * 4, rel=0.1)
    legends = [
        [text.get_text() for text in figure.legends[0].get_texts()] for figure in (part, other)
    ]
    assert legends == [
        ["qkv", "qv_ka", "qv n_inner=8", "qv_ka d_ctx=8", "qv_ka d_ctx=9", "mine"],
        ["qkv", "qv"],
    ]
    lines = {
        container.get_label(): container.lines[0]
        for panel in part.axes
        for container in panel.containers
    }
    looks = {
        label: (line.get_color(), line.get_marker(), line.get_linestyle())
        for label, line in lines.items()
    }
    assert looks.pop("qv n_inner=8") == ("#D55E00", "v", "-")
    assert looks == {
        "qkv": ("k", "o", "-"),
        "qv_ka": ("#0072B2", "D", "-"),
        "qv_ka d_ctx=8": ("#0072B2", "D", "--"),
        "qv_ka d_ctx=9": ("#0072B2", "D", ":"),
        "mine": ("0.4", "X", "-"),
    }
    assert (
        lines["qv_ka d_ctx=8"].get_markerfacecolor()
        == "white"
        != lines["qv_ka"].get_markerfacecolor()
    )
    assert lines["qkv"].get_ydata() == pytest.approx([1.5, 3.0])
    report.report([run for run in records if "max_steps=9" in run["flags"]], tmp_path)
    assert [figure.subfigs[0].get_suptitle() for figure in figures[3:]] == [
        "gpu preset, some, max_steps=9"
    ] * 3


def test_assets_are_merged_and_only_on_request(folder, capsys):
    """A run of the same identity is replaced, others stay; where nothing is compared, no older picture stays."""
    run = Path("out/compare/cpu-tiny-qv_ka-agf,seed=1337")
    run.mkdir(parents=True)
    shutil.copy("out/run/last.pt", run)
    new = compare.record(run)
    old = {**new, "best_val_loss": 9.0}
    Path("assets").mkdir()
    Path("assets/results.json").write_text(
        json.dumps([old, {**new, "seed": 7}, {**new, "flags": ["n_inner=8"]}])
    )
    Path("assets/lengths.png").write_text("of other runs")
    before = contents("assets")
    assert call("compare", "--report") is None and contents("assets") == before
    assert json.loads(Path("out/compare/results.json").read_text()) == [json.loads(json.dumps(new))]
    assert call("compare", "--report", "--assets") is None
    merged = json.loads(Path("assets/results.json").read_text())
    assert [(run["seed"], run["flags"], run["best_val_loss"] == 9.0) for run in merged] == [
        (1337, [], False),
        (7, [], False),
        (1337, ["n_inner=8"], False),
    ]
    assert Path("assets/results.md").read_text(encoding="utf-8") in capsys.readouterr().out
    assert not Path("assets/lengths.png").exists()


def test_the_readme_shows_what_the_stored_runs_say(tmp_path, monkeypatch):
    """assets/results.md and .json are what --report makes of that .json; the README's figures all stand there."""
    shutil.copytree(ROOT / "assets", tmp_path / "assets")
    monkeypatch.chdir(tmp_path)
    assert call("compare", "--report", "--assets") is None
    differ = [
        name
        for name in ("results.md", "results.json")
        if Path("assets", name).read_bytes() != (ROOT / "assets" / name).read_bytes()
    ]
    assert not differ, "run python tests/compare.py --report --assets"
    results = Path("assets/results.md").read_text(encoding="utf-8").replace("**", "")
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    told = (
        readme.partition("## Results")[2]
        .partition("## The fused kernel")[0]
        .replace("nanoGPT: 1.4697", "")
    )
    verdict = r"(?: ± \d\.\d{4}(?: holds| undecided| does not hold)?)?"
    quoted = re.findall(rf"[+-]?\d\.\d{{3,}}{verdict}|\d+,\d{{3}}|\d+(?= verdicts)", told)
    assert len(quoted) > 30 and not [figure for figure in quoted if figure not in results]


# Misuse ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--attentoin=qv"], "unrecognized arguments: --attentoin=qv"),
        (["--attention=qkv,qkw"], "'qkw'"),
        (["--pos=none"], "'none'"),
        (["--seeds=0"], "--seeds, --workers and --lengths must lie between 1 and 1,000"),
        (["--seeds=2.5"], "argument --seeds: "),
        (["--workers=0"], "--seeds, --workers and --lengths must lie between 1 and 1,000"),
        (["--lengths=1,0"], "--seeds, --workers and --lengths must lie between 1 and 1,000"),
        (["--lengths=long"], "argument --lengths: "),
        (
            ["--resume"],
            "--resume is not for here: write --name=value, and go on with a sweep by its own command",
        ),
        (["--n_inner", "8"], "8 is not for here: write --name=value"),
        (["--n_layer=two"], "argument --n_layer: "),
        (["--n_head=3"], "n_embd=16 must be a multiple of n_head=3"),
        (
            ["--attention=qkv,qv", "--d_ctx=8"],
            "--d_ctx counts for none of these attentions and positions; leave it out",
        ),
        (["--dataset=nowhere"], "data set 'nowhere' is "),
        (["--preset=gpt2"], "data set 'openwebtext' is "),
        (["--device=toaster"], "device=toaster cannot be used here"),
        (["--out=tiny.txt"], "tiny.txt/cpu-tiny-qkv-"),
        (["--assets"], "assets/results.json cannot be read"),
        (["--report", "--out=nowhere"], "there is no finished run"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_misuse_gets_one_sentence(folder, capsys, flags, words):
    Path("assets").mkdir()
    Path("assets/results.json").write_text("[")
    before = contents(".")
    code = call(
        "compare", *(flags if flags[0] in ("--report", "--preset=gpt2") else [*TINY, *flags])
    )
    sentence = capsys.readouterr().err.strip() if isinstance(code, int) else code
    assert (
        code not in (None, 0) and words in sentence and "\n" not in sentence and len(sentence) < 500
    ), sentence
    assert contents(".") == before


def test_help_teaches(capsys):
    assert call("compare", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "python tests/compare.py --report" in text
        and "default: qkv,qv,qv_ka" in text
        and "goes to train.py" in text
    )

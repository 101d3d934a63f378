"""report.py, runs.py, stats.py, speeds.py and figures.py: known numbers, whose answers are
computed by hand or from printed tables."""

import json
import re
import zlib

import figures
import numpy as np
import pytest
import report
import speeds
import stats
import sweeps
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from runs import NAMES, Runs, final_loss, label, loss_in_windows, mean_loss_of_first
from sweeps import GQA, MQA_ROTATED, QKV, QKV_ROTATED, QV, QV_1, QV_KA, kind_of

import prepare

NOISE = dict(zip(range(2001, 2021), np.random.default_rng(0).normal(0, 0.1, 20)))  # of each seed


def rows(text):
    """The cells of every row of the tables in a Markdown text."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def run(kind, seed, loss=2.0, early=3.0, **other):
    """A run's record."""
    return dict(
        kind=kind,
        seed=seed,
        final_val_loss=loss,
        best_val_loss=loss,
        val_loss_by_length={},
        early_loss=early,
        curve=[early] * 60,
        steps=600,
        attention_parameters=1000,
        remembered=128,
        **other,
    )


def several(kind, losses, seeds=range(1, 100), **other):
    return [run(kind, seed, loss, **other) for seed, loss in zip(seeds, losses)]


# Statistics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n,t", [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (20, 2.093), (30, 2.045)]
)
def test_an_interval_is_that_of_a_printed_table_of_t(n, t):
    values = list(np.arange(n) ** 2 / 7)
    mean, half = stats.interval(values)
    assert mean == pytest.approx(np.mean(values))
    assert half == pytest.approx(t * np.std(values, ddof=1) / n**0.5, rel=3e-4)


def test_one_value_has_no_interval():
    mean, half = stats.interval([1.5])
    assert mean == 1.5 and np.isnan(half)


def test_the_interval_of_a_curve_is_that_of_each_of_its_points():
    mean, half = stats.interval([np.array([1.0, 5.0]), np.array([3.0, 5.0])])
    assert mean == pytest.approx([2, 5]) and half == pytest.approx([12.706, 0], rel=3e-4)


@pytest.mark.parametrize(
    "n,t,p", [(5, 2.776, 0.05), (5, 4.604, 0.01), (10, 1.833, 0.1), (20, 2.861, 0.01)]
)
def test_a_p_value_is_that_of_a_printed_table_of_t(n, t, p):
    values = np.arange(n) - (n - 1) / 2
    values += t * np.std(values, ddof=1) / n**0.5
    assert stats.p_value(list(values)) == pytest.approx(p, rel=2e-3)
    assert stats.p_value(list(-values)) == pytest.approx(p, rel=2e-3), "of either sign"


def test_holm_takes_the_smallest_of_m_times_m_and_the_next_times_m_minus_1():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


# Names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attention,words",
    [
        (QKV, "QKV"),
        (QKV_ROTATED, "QKV, rotated"),
        (MQA_ROTATED, "MQA, rotated"),
        (GQA, "GQA"),
        (QV_1, "QV, 1 value"),
        (sweeps.DIAGONAL_32_1, "QV-Ka, 1 value, context 32, diagonal W_K"),
        (dict(attention="mla", d_latent=32), "MLA, latent 32"),
        (dict(attention="keyless", n_kv_head=2), "keyless, 2 values"),
    ],
    ids=str,
)
def test_attentions_are_named_in_words(attention, words):
    assert label(kind_of("rope", attention, max_steps=9)) == words


# The fifteen claims -------------------------------------------------------------------------------


def part_1(effects, seeds=range(2001, 2021)):
    """Runs of part 1 whose losses are 2, more what an attention's label and positions have in
    `effects`, more a seed's noise, which differences do not have; and a little of their own."""
    own = np.random.default_rng(1)
    records = []
    for kind in sweeps.FAMILY:
        effect = effects.get((label(kind), kind["pos"]), 0.0)
        for seed in seeds:
            loss = 2 + effect + NOISE[seed] + own.normal(0, 1e-6)
            records.append(run(kind, seed, loss, early=loss + 1))
    return Runs(records)


def cells(runs, **options):
    """{the first letters of a claim: {positions: its cell}}."""
    head, _, *lines = rows(report.family(runs, **options))
    return {line[0][:2]: dict(zip(head[1:], line[1:])) for line in lines}


def test_the_family_has_fifteen_verdicts_on_part_1_and_no_other():
    found = cells(part_1({}))
    judged = [(claim, pos) for claim, line in found.items() for pos, cell in line.items() if cell]
    four = ["sinusoidal", "rope", "agf", "rope+agf"]
    expected = [(f"C{number}", pos) for number in (1, 2, 3, 4) for pos in four]
    expected.remove(("C2", "sinusoidal"))
    assert judged == expected and len(judged) == 15


def test_claims_are_what_they_say():
    """QV loses 0.08 with sinusoidal positions, 0.03 with agf, gains 0.02 under rope; QV-Ka is in
    the middle or beyond."""
    effects = {
        ("QV", "sinusoidal"): 0.08,
        ("QV-Ka", "sinusoidal"): 0.05,
        ("QV", "agf"): 0.03,
        ("QV-Ka", "agf"): 0.01,
        ("QV", "rope"): -0.02,
        ("QV-Ka", "rope"): -0.03,
        ("QV", "rope+agf"): 0.05,
    }
    found = cells(part_1(effects))
    shown, opposite = "± 0.0000, shown", "± 0.0000, the opposite is shown"
    assert found["C1"] == {
        "sinusoidal": f"+0.0800 {shown}",
        "agf": f"+0.0300 {shown}",
        "rope": f"-0.0200 {opposite}",
        "rope+agf": f"+0.0500 {shown}",
    }
    assert found["C2"] == {
        "sinusoidal": "",
        "agf": f"-0.0100 {shown}",
        "rope": f"-0.0600 {shown}",
        "rope+agf": f"+0.0100 {opposite}",
    }
    assert found["C3"] == {
        "sinusoidal": f"+0.0100 {opposite}",
        "agf": f"-0.0050 {shown}",
        "rope": f"-0.0200 {shown}",
        "rope+agf": f"-0.0250 {shown}",
    }
    assert found["C4"]["sinusoidal"] == f"+0.0500 {opposite}"
    assert found["C4"]["rope"] == f"-0.0300 {shown}"


def test_under_rope_qkv_is_the_one_that_rotates_its_values():
    effects = {("QKV", pos): 0.5 for pos in ("rope", "rope+agf")}
    effects |= {("QKV, rotated", pos): -0.01 for pos in ("rope", "rope+agf")}
    found = cells(part_1(effects))
    for pos in "rope", "rope+agf":
        assert found["C1"][pos].startswith("+0.0100 ")
        assert found["C3"][pos].startswith("+0.0050 ")
        assert found["C4"][pos].startswith("+0.0100 ")


def test_c4_is_of_the_training_loss():
    runs = part_1({})
    for record in runs.records():
        record["early_loss"] += 0.07 * (record["kind"]["attention"] == "qv_ka")
    found = cells(runs)
    assert found["C4"]["agf"].startswith("+0.0700 ")
    assert found["C1"]["agf"].startswith("not told apart (-0.0000 to +0.0000)")


def test_verdicts_are_corrected_for_the_whole_family():
    values = list(0.010 + 0.0045 * np.array([-1, 1, -2, 2, 0]))
    p = stats.p_value(values)
    assert 0.03 < p < 0.04
    assert report.verdict_text(values, 1, p) == "+0.0100 ± 0.0088, shown"
    assert report.verdict_text(values, -1, p) == "+0.0100 ± 0.0088, the opposite is shown"
    corrected = stats.holm([p, 0.9])[0]
    assert report.verdict_text(values, 1, corrected) == "not told apart (+0.0012 to +0.0188)"


def test_one_clear_difference_among_fifteen_needs_a_p_value_below_a_fifteenth():
    """0.05 / 15 is 0.0033; Student's t of 20 values has it at 3.36."""
    for t, words in (3.3, "not told apart"), (3.45, "shown"):
        spread = np.tile([-1.0, 1.0], 10)
        values = spread + t * np.std(spread, ddof=1) / 20**0.5
        runs = part_1({})
        for record in runs.records():
            record["final_val_loss"] = record["early_loss"] = 2.0 + np.sin(
                record["seed"] ** 3 + len(str(record["kind"]))
            )
            if record["kind"] == kind_of("agf", QV):
                record["final_val_loss"] = values[record["seed"] - 2001]
            if record["kind"] == kind_of("agf", QKV):
                record["final_val_loss"] = 0.0
        assert words in cells(runs)["C1"]["agf"]


def test_there_are_no_verdicts_before_the_family_is_complete():
    runs = part_1({("QV", "agf"): 0.03}, seeds=range(2001, 2015))
    text = report.family(runs)
    assert "there are no verdicts yet" in text and "shown" not in text and "told" not in text
    assert cells(runs)["C1"]["agf"] == "+0.0300 ± 0.0000 (14 of 20 seeds)"
    one_is_missing = Runs(part_1({}).records()[1:])
    assert "there are no verdicts yet" in report.family(one_is_missing)


def test_other_seeds_and_kinds_do_not_count_for_the_family():
    runs = part_1({})
    others = [run(kind, seed, 99.0) for kind in sweeps.FAMILY for seed in (1337, 2021)]
    others += [run(dict(kind, max_steps=9), 2001, 99.0) for kind in sweeps.FAMILY]
    assert report.family(Runs([*runs.records(), *others])) == report.family(runs)


def test_a_claim_about_runs_that_part_1_does_not_have_is_refused():
    def misspelt(pos):
        return [(1, kind_of(pos, dict(attention="qw"))), (-1, kind_of(pos, QKV))]

    claim = report.Claim("C9", misspelt, 1, ("agf",))
    with pytest.raises(ValueError, match="C9 is about .*'qw'.* which is not in part 1"):
        report.family(part_1({}), claims=[claim])


# Differences without verdicts ---------------------------------------------------------------------


def test_a_difference_is_paired_by_seed():
    """A seed that one of the two lacks is not compared."""
    qkv = several(kind_of("agf", QKV), [1.0, 5.0, 9.0])
    qv = several(kind_of("agf", QV), [1.5, 5.5, 9.5, 99.0])
    terms = [(1, kind_of("agf", QV)), (-1, kind_of("agf", QKV))]
    found = Runs(qkv + qv).sums(terms, final_loss)
    assert found == pytest.approx([0.5, 0.5, 0.5])


@pytest.mark.parametrize(
    "values,words",
    [
        ([0.02, 0.04], "-0.0971 to +0.1571"),
        ([0.02, 0.021], "+0.0205 ± 0.0064"),
        ([-0.02, -0.021], "-0.0205 ± 0.0064"),
        ([0.02], "+0.0200 (one seed)"),
        ([], "—"),
    ],
)
def test_a_difference_that_is_not_told_from_zero_is_a_range(values, words):
    assert report.difference_text(values) == words


def test_kinds_are_compared_with_the_baseline_of_their_setting_and_positions():
    records = [
        *several(kind_of("rope", QKV), [1.0, 1.0]),
        *several(kind_of("agf", QKV), [1.1, 1.1]),
        *several(kind_of("agf", QV_1), [1.7, 1.7]),
        *several(kind_of("agf", dict(QV, n_inner=96)), [1.6, 1.6]),
        *several(kind_of("agf", QKV, max_steps=9), [0.5, 0.5]),
        *several(kind_of("agf", QV, max_steps=9), [0.8, 0.8]),
    ]
    text = report.sweep_report(Runs(records))
    plain, nine = text.split("cpu preset, shakespeare_char")[1:]
    assert nine.startswith(", max_steps=9\n")
    assert {(row[0], row[1]): row[6] for row in rows(plain)[2:]} == {
        ("rope", "QKV"): "(the baseline)",
        ("agf", "QKV"): "(the baseline)",
        ("agf", "QV, 1 value"): "+0.6000 ± 0.0000",
        ("agf", "QV, MLP 96"): "+0.5000 ± 0.0000",
    }
    assert {row[1]: row[6] for row in rows(nine)[2:]} == {
        "QKV": "(the baseline)",
        "QV": "+0.3000 ± 0.0000",
    }


def test_early_losses_are_compared_beside_the_final_ones():
    records = several(kind_of("agf", QKV), [1.0, 1.0], early=3.0)
    records += several(kind_of("agf", QV), [1.2, 1.2], early=2.5)
    row = rows(report.sweep_report(Runs(records)))[3]
    assert row[6:] == ["+0.2000 ± 0.0000", "-0.5000 ± 0.0000"]


def test_a_pair_is_the_first_less_the_second_on_the_seeds_of_both():
    qv, mqa = kind_of("rope+agf", QV), kind_of("rope+agf", MQA_ROTATED)
    records = several(qv, [1.5, 1.5, 9.0], seeds=(2001, 2002, 2011))
    records += several(mqa, [1.2, 1.2], seeds=(2001, 2002))
    row = rows(report.differences(Runs(records), [(qv, mqa)]))[2]
    assert row == ["QV", "MQA, rotated", "rope+agf", "128, 128", "2 of 10", "+0.3000 ± 0.0000"]


def test_attentions_are_compared_without_qkv_too():
    records = several(kind_of("agf", QV), [1.0, 1.0]) + several(kind_of("agf", QV_KA), [1.2, 1.2])
    found = {row[1]: row[6] for row in rows(report.sweep_report(Runs(records)))[2:]}
    assert found == {"QV": "(the baseline)", "QV-Ka": "+0.2000 ± 0.0000"}


def test_a_baseline_that_no_run_has_is_refused():
    with pytest.raises(prepare.UserError, match="--baseline=qkw is none of these attentions: QV"):
        report.choose_baseline([kind_of("agf", QV)], "qkw")


def test_the_mean_loss_of_the_first_steps_is_read_from_the_curve():
    """60 points of 10 steps each: 10 steps of the first, then 5 of the second."""
    record = dict(steps=600, curve=[4.0, 2.5, *[0.0] * 58])
    assert mean_loss_of_first(10, record) == pytest.approx(4.0)
    assert mean_loss_of_first(15, record) == pytest.approx(3.5)


# The whole of results.md --------------------------------------------------------------------------


def every_planned_run(seeds=range(2001, 2021)):
    """A record for each run of the parts, whose loss follows from its kind, with windows."""
    records = []
    for part in sweeps.PARTS.values():
        for sweep in part:
            for kind in sweep.kinds:
                loss = 1.7 + 0.0001 * (zlib.crc32(str(kind).encode()) % 499)
                lengths = {str(64 * times): loss + times for times in (1, 2, 4, 8)}
                for seed in set(sweep.seeds) & set(seeds):
                    own = NOISE[seed] / 10
                    record = run(kind, seed, loss + own)
                    record["val_loss_by_length"] = {n: x + own for n, x in lengths.items()}
                    record["remembered"] = remembered(kind)
                    record["curve"] = list(3 + loss + own - np.arange(60) / 100)
                    records.append(record)
    return Runs(records)


def remembered(kind):
    heads = kind.get("n_kv_head", 2 if kind["attention"] == "gqa" else 4)
    latent = kind.get("d_latent", 128) + 16
    context = 32 * heads + kind.get("d_ctx", 64)
    return dict(qkv=256, gqa=64 * heads, mla=latent, qv=32 * heads, qv_ka=context)[
        kind["attention"]
    ]


def measured_speed(attention, speed, *quartiles):
    return dict(attention=attention, speed=speed, quartiles=quartiles or [speed, speed])


SPEEDS = dict(
    training=[measured_speed(QKV, 1.0), measured_speed(QV, 1.1, 0.9, 1.2)],
    decoding=[measured_speed(QKV, 1.0), measured_speed(QV, 1.2, 1.1, 1.5)],
)


@pytest.fixture(scope="module", autouse=True)
def no_stored_speeds():
    """What speeds.py has stored in assets/ changes nothing here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps, "SPEEDS", sweeps.SPEEDS.with_name("none.json"))
        patch.setitem(sweeps.PARTS, 7, [sweeps.Sweep([], sweeps.seeds(10))])
        yield


@pytest.fixture(scope="module")
def text():
    return report.results(every_planned_run(), Runs([]), SPEEDS, ["frontier.png"], "some command")


def test_the_first_table_has_each_attention_in_a_row(text):
    head, _, *lines = rows(text.split("## All attentions")[1].split("**Numbers")[0])
    assert [line[0] for line in lines][:4] == [
        "QKV",
        "QKV, rotated",
        "GQA, rotated",
        "MQA, rotated",
    ]
    runs = every_planned_run()

    def mean(pos, measure=final_loss, **more):
        kind = kind_of(pos, QV, **more)
        return f"{np.mean(runs.sums([(1, kind)], measure, range(2001, 2011))):.4f}"

    qv = dict(zip(head, next(line for line in lines if line[0] == "QV")))
    assert qv == {
        "attention": "QV",
        "numbers remembered": "128",
        "sinusoidal": mean("sinusoidal"),
        "agf": mean("agf"),
        "rope": mean("rope"),
        "rope+agf": mean("rope+agf"),
        "1,800 steps": mean("rope+agf", max_steps=1800),
        "8 times the context": mean("rope+agf", loss_in_windows(512)),
        "equal time": "—",
        "weights in attention": "1,000",
        "training speed": "1.10",
        "decoding speed": "1.20",
    }


def test_the_first_table_says_how_many_seeds_there_are_where_some_are_missing():
    found = report.first_table(every_planned_run(seeds=range(2001, 2008)), SPEEDS)
    row = next(row for row in rows(found) if row[0] == "MQA, rotated")
    assert row[5].endswith(" (7)") and row[7].endswith(" (7)")
    assert next(row for row in rows(found) if row[0] == "QV")[5].endswith(" (7)")


def test_the_second_table_has_differences_from_rotated_qkv_in_each_setting():
    def two(attention, *losses, **flags):
        return several(kind_of("rope+agf", attention, **flags), losses, seeds=(2001, 2002))

    runs = Runs(
        [
            *two(QKV_ROTATED, 1.7, 1.8),
            *two(QV, 1.71, 1.81),
            *two(QV_KA, 1.8, 1.7),
            *two(QKV_ROTATED, 1.5, 1.7, max_steps=1800),
            *two(QV, 1.502, 1.704, max_steps=1800),
            *two(QKV_ROTATED, 1.2, 1.3, dataset="pydoc"),
            *two(QV, 1.1, 1.2, dataset="pydoc"),
        ]
    )
    head, _, *lines = rows(report.second_table(runs, SPEEDS))
    found = {line[0]: dict(zip(head, line)) for line in lines}
    settings = [
        "600 steps",
        "equal time",
        "1,800 steps",
        "AdamW",
        "2.7M parameters",
        "another text",
    ]
    assert head == [*head[:2], *settings, "training speed", "decoding speed"]
    losses = [found["QKV, rotated"][name] for name in settings]
    assert losses == ["1.7500", "—", "1.6000", "—", "—", "1.2500"]
    differences = [found["QV"][name] for name in settings]
    assert differences == ["+0.010 ± 0.000", "—", "-0.010 to +0.016", "—", "—", "-0.100 ± 0.000"]
    assert found["QV-Ka"]["600 steps"] == "-1.271 to +1.271"
    assert found["QV"]["training speed"] == "1.10" and found["MLA"]["600 steps"] == "—"


def test_the_second_table_gives_each_attention_its_own_steps_at_equal_time(monkeypatch):
    equal = kind_of("rope+agf", QKV_ROTATED, max_steps=590), kind_of("rope+agf", QV, max_steps=660)
    monkeypatch.setattr(sweeps, "equal_time", lambda: list(equal))
    monkeypatch.setitem(sweeps.PARTS, 7, [sweeps.Sweep(list(equal), sweeps.TABLE_SEEDS)])
    runs = [run for kind in equal for run in several(kind, [1.7, 1.7], seeds=(2001, 2002))]
    runs += several(kind_of("rope+agf", QKV), [1.8, 1.8], seeds=(2001, 2002))
    lines = {line[0]: line[3] for line in rows(report.second_table(Runs(runs), SPEEDS))}
    assert lines["QKV, rotated"] == "1.7000" and lines["QV"] == "+0.000 to +0.000"
    assert lines["QKV"] == "+0.100 ± 0.000", "its 600 steps are the measure"


def test_results_have_every_part_with_its_seeds(text):
    titles = [line for line in text.splitlines() if line.startswith("##")]
    assert titles == [
        "## All attentions",
        "## All attentions beside QKV",
        "## Fifteen claims",
        "## Exploratory: differences without verdicts",
        *(f"### {section.title}" for section in report.SECTIONS),
        "### In longer windows",
        "### At equal time",
    ]
    assert " 0 of " not in text and "14 of" not in text.split("## All attentions")[1]
    assert text.startswith("# What the runs show\n\nMade by `some command` ")
    assert "](frontier.png)" in text and "](lengths.png)" not in text
    exploratory = text.split("## Exploratory")[1]
    assert "shown" not in exploratory, "no verdicts there"


def test_every_planned_kind_is_somewhere_in_the_results(text):
    everything = {(row[0], row[1]) for row in rows(text) if len(row) > 5}
    everything |= {(row[2], name) for row in rows(text) if len(row) == 6 for name in row[:2]}
    everything |= {(pos, row[0]) for row in rows(text) if len(row) == 12 for pos in report.ALL_FOUR}
    planned = [kind for part in sweeps.PARTS.values() for sweep in part for kind in sweep.kinds]
    missing = {(kind["pos"], label(kind)) for kind in planned} - everything
    assert not missing


def test_runs_that_nobody_planned_are_left_out():
    planned = every_planned_run()
    seeds = several(kind_of("rope+agf", QV), [9.0, 9.0], seeds=(1, 2))
    kind = several(kind_of("rope+agf", QV, max_steps=7), [9.0, 9.0], seeds=(2001, 2002))
    found = report.planned(Runs([*planned.records(), *seeds, *kind]))
    assert found.records() == planned.records()


def test_runs_that_were_seen_first_stand_apart():
    planned = every_planned_run()
    first = several(kind_of("agf", QV), [8.0, 8.0], seeds=(1337, 1338))
    for record in first:
        record["best_val_loss"] = 7.0
    found = report.results(planned, Runs(first), SPEEDS, [], "some command")
    before, seen_first = found.split("## What was seen first")
    assert before == report.results(planned, Runs([]), SPEEDS, [], "some command").rstrip() + "\n\n"
    assert rows(seen_first)[2][5] == "7.0000 ± 0.0000", "the lowest of each run"


@pytest.mark.parametrize("number", [0, 1, 7])
def test_results_work_with_runs_missing(number):
    runs = every_planned_run(seeds=range(2001, 2001 + number))
    found = report.results(runs, Runs([]), SPEEDS, [], "some command")
    assert "nan" not in found and f"{number} of 20" in found and "no verdicts yet" in found


def test_equal_time_takes_as_many_steps_as_the_speed_allows(tmp_path, monkeypatch):
    (tmp_path / "speeds.json").write_text(json.dumps(SPEEDS))
    monkeypatch.setattr(sweeps, "SPEEDS", tmp_path / "speeds.json")
    assert sweeps.equal_time() == [kind_of("rope+agf", QV, max_steps=660)]


def test_at_equal_time_a_slower_attention_has_fewer_steps(tmp_path, monkeypatch):
    """QV is as fast as QKV, QV-Ka takes twice the time: 600 and 300 steps, and 120 and 60 early
    ones."""
    attentions = [QKV, QKV_ROTATED, sweeps.GQA_ROTATED, MQA_ROTATED]
    attentions += [QV, QV_1, QV_KA, sweeps.DIAGONAL, sweeps.DIAGONAL_32_1]
    training = [measured_speed(one, 0.5 if one == QV_KA else 1.0) for one in attentions]
    measured = dict(training=training, decoding=[])
    (tmp_path / "speeds.json").write_text(json.dumps(measured))
    monkeypatch.setattr(sweeps, "SPEEDS", tmp_path / "speeds.json")
    monkeypatch.setitem(sweeps.PARTS, 7, [sweeps.Sweep(sweeps.equal_time(), sweeps.seeds(10))])
    records = several(kind_of("rope+agf", QV_KA, max_steps=300), [1.9, 1.9], seeds=(2001, 2002))
    records += several(kind_of("rope+agf", QV, max_steps=600), [1.6, 1.6], seeds=(2001, 2002))
    for attention in QKV_ROTATED, QV, QV_KA:
        records += several(kind_of("rope+agf", attention), [1.7, 1.7], seeds=(2001, 2002))
    for record in records:
        record["curve"] = [4.0] * 6 + [2.0] * 54
    found = rows(report.equal_time_text(Runs(records), measured))
    differences = {(row[0], row[1]): row[5] for row in found if row[1] == "QV"}
    assert differences == {("QV-Ka", "QV"): "+1.0000 ± 0.0000"}, "of the early steps: 4 less 3"
    names = ["QV-Ka, max_steps=300", "QV, max_steps=600"]
    assert [*names, "rope+agf", "128, 128", "2 of 10", "+0.3000 ± 0.0000"] in found
    table = report.first_table(Runs(records), measured)
    assert next(row for row in rows(table) if row[0] == "QV-Ka")[8] == "1.9000 (2)"


def test_the_first_table_compares_the_same_seeds():
    """More seeds of one attention than of another change nothing."""
    kind = kind_of("agf", QV)
    ten = several(kind, [1.0] * 10, seeds=range(2001, 2011))
    more = several(kind, [9.0] * 10, seeds=range(2011, 2021))
    table, more = (report.first_table(Runs(runs), SPEEDS) for runs in (ten, ten + more))
    assert table == more and next(row for row in rows(table) if row[0] == "QV")[4] == "1.0000"


def test_the_first_table_says_how_wide_its_intervals_are_at_most():
    """Rounded up. The differences of these two are 0, 0 and -0.004, 0.004."""
    qkv = several(kind_of("agf", QKV), [1.0, 1.01], seeds=(2001, 2002))
    qv = several(kind_of("agf", QV), [1.004, 1.006], seeds=(2001, 2002))
    caption = " ".join(report.first_table(Runs(qkv + qv), SPEEDS).split())
    assert "interval is at most 0.0636, and half" in caption
    assert "paired by seed, at most 0.0509." in caption
    assert "within 0.20 (training) and 0.30 (decoding) of them" in caption


# README -------------------------------------------------------------------------------------------


def tables(text):
    """Of each table in a Markdown text its head, and its rows as {first cell: {column: cell}}."""
    found = []
    for block in text.split("\n\n"):
        head, *lines = rows(block) or [[]]
        if lines:
            found.append((head, {line[0]: dict(zip(head, line)) for line in lines[1:]}))
    return found


def wrong_cells(readme, results):
    """The cells of README's tables of attentions that are not those of the same row and column in
    a table of results.md with these columns."""
    wrong, known = [], {column for columns, _ in tables(results) for column in columns}
    for head, lines in tables(readme.replace("*", "").replace("`", "")):
        if known.isdisjoint(head[1:]) or head[0] == "claim":
            continue
        candidates = [other for columns, other in tables(results) if set(head) <= set(columns)]
        for name, line in lines.items():
            others = [other[name] for other in candidates if name in other]
            if not any(line.items() <= other.items() for other in others):
                wrong.append(line)
    return wrong


def test_a_false_cell_in_the_readme_is_found(text):
    (head, lines), *_ = tables(text)
    columns = ["attention", "numbers remembered", "agf", "rope+agf"]
    shown = [[lines[name][column] for column in columns] for name in ("QKV", "QV")]
    true = report.table(columns, shown)
    assert set(columns) < set(head) and wrong_cells(true, text) == []
    assert wrong_cells(true.replace("128", "192"), text)
    assert wrong_cells(true.replace("| QV |", "| QV-Ka |"), text)
    assert wrong_cells(report.table(columns, [shown[0], shown[0]]).replace("QKV", "QV"), text)
    assert wrong_cells(true.replace("| agf |", "| rope |"), text)


def test_the_cells_of_the_readme_are_those_of_results_md():
    root = sweeps.SPEEDS.parents[1]
    if not (root / "assets/results.json").exists():
        pytest.skip("no runs of the parts are stored yet")
    readme = (root / "README.md").read_text("utf-8")
    results = (root / "assets/results.md").read_text("utf-8")
    assert any("600 steps" in head for head, _ in tables(readme))
    assert wrong_cells(readme, results) == []


def verdicts(text):
    """{claim: {positions: verdict}} of the table of claims, in README's words."""
    (table,) = [lines for head, lines in tables(text) if head[0] == "claim"]
    words = {"shown": "yes", "the opposite is shown": "no", "": ""}
    found = {}
    for name, line in table.items():
        cells = {pos: line[pos].rpartition(", ")[2] for pos in report.ALL_FOUR}
        cells = {pos: words.get(cell, cell) for pos, cell in cells.items()}
        cells = {pos: re.sub("^not told apart.*", "undecided", cells[pos]) for pos in cells}
        found[name[:2]] = cells
    return found


def test_the_verdicts_that_the_readme_tells_are_those_of_results_md():
    root = sweeps.SPEEDS.parents[1]
    results = verdicts((root / "assets/results.md").read_text("utf-8"))
    assert results.keys() == {"C1", "C2", "C3", "C4"}
    assert results["C1"]["agf"] in ("yes", "no", "undecided"), "there are verdicts"
    assert verdicts((root / "README.md").read_text("utf-8")) == results


def test_the_sizes_of_models_that_are_told_are_those_of_the_stored_runs():
    root = sweeps.SPEEDS.parents[1]
    readme = (root / "README.md").read_text("utf-8")
    stored = Runs(json.loads((root / "assets/results.json").read_text("utf-8")))
    for kinds in sweeps.kinds_of("rope+agf", *sweeps.TABLE), sweeps.LARGER:
        sizes = [stored.fact(kind, "parameters") / 1e6 for kind in kinds]
        assert f"{min(sizes):.1f}M to {max(sizes):.1f}M" in readme
    assert f"{max(sizes):.1f}M parameters" in report.kinds_by_setting()


def test_the_differences_that_the_readme_tells_are_in_results_md():
    root = sweeps.SPEEDS.parents[1]
    if not (root / "assets/results.json").exists():
        pytest.skip("no runs of the parts are stored yet")
    readme = (root / "README.md").read_text("utf-8")
    told = re.findall(r"(?<!\d)\d\.\d{4}(?!\d)", readme)
    results = (root / "assets/results.md").read_text("utf-8")
    assert told and [number for number in told if number not in results] == []


# Speeds -------------------------------------------------------------------------------------------


def test_a_speed_is_the_median_of_qkvs_time_by_anothers_in_the_same_turn():
    seconds = np.full((3, len(sweeps.TABLE)), 2.0)
    qkv, qv = sweeps.TABLE.index(QKV), sweeps.TABLE.index(QV)
    seconds[:, qkv] = [2.0, 4.0, 6.0]
    seconds[:, qv] = [1.0, 4.0, 1.5]
    found = {label(kind_of("rope", row["attention"])): row for row in speeds.rows(seconds)}
    assert found["QKV"]["speed"] == 1.0
    assert (found["QV"]["speed"], found["QV"]["quartiles"]) == (2.0, [1.5, 3.0])
    assert found["QV"]["milliseconds"] == 1500.0


def test_the_first_turn_is_not_measured():
    calls = []
    seconds = speeds.in_turns(3, [lambda: calls.append("a"), lambda: calls.append("b")], "words")
    assert calls == ["a", "b"] * 4 and seconds.shape == (3, 2)


def test_what_is_measured_trains_and_decodes():
    data = np.random.default_rng(0).integers(65, size=500).astype(np.uint16)
    work = speeds.trainer(QV, data)
    work(), work()
    decode = speeds.decoder(sweeps.DIAGONAL_32_1, context=16, tokens=4)
    with torch.no_grad():
        tokens = [decode() for _ in range(5)]
    assert all(token.shape == (1, 1) for token in tokens)


# Figures: what they draw, read from them ----------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Draws all figures of the planned runs: {file name: Figure}."""
    found = {}

    def keep(figure, path):
        found[path.name] = figure
        return path

    first = Runs(several(kind_of("learned", QKV), [2.0, 2.2], seeds=(1337, 1338)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save", keep)
        figures.draw_results(every_planned_run(), first, tmp_path_factory.mktemp("figures"))
    return found


def bars(panel):
    """{name: (x, mean, half of the interval) of each point}."""
    found = {}
    for container in panel.containers:
        line, _, (bar,) = container.lines
        halves = [(segment[1][1] - segment[0][1]) / 2 for segment in bar.get_segments()]
        points = list(zip(*line.get_data(), halves))
        found.setdefault(container.get_label(), []).extend(points)
    return found


def expected(kind, measure=final_loss, seeds=None):
    return stats.interval(every_planned_run().sums([(1, kind)], measure, seeds))


def test_the_positions_have_a_place_each_and_an_interval_for_each_attention(drawn):
    (panel,) = drawn["positions.png"].axes
    names = [text.get_text() for text in panel.get_xticklabels()]
    assert names == ["learned\n(seen first)", "sinusoidal", "rope", "agf", "rope+agf"]
    found = bars(panel)
    for pos, place in ("sinusoidal", 1), ("rope+agf", 4):
        (point,) = [point for point in found["QV"] if round(point[0]) == place]
        assert point[1:] == pytest.approx(expected(kind_of(pos, QV)))
    (learned,) = [point for point in found["QKV"] if round(point[0]) == 0]
    assert learned[1:] == pytest.approx(stats.interval([2.0, 2.2]))
    legend = [text.get_text() for text in drawn["positions.png"].legends[0].get_texts()]
    assert legend == ["QKV", "QKV, rotated", "QV", "QV-Ka"]


def less_qkv(kind):
    """A kind's loss less that of QKV with rotated values, and half of its interval."""
    terms = [(1, kind), (-1, kind_of("rope+agf", QKV_ROTATED))]
    return stats.interval(every_planned_run().sums(terms, final_loss, sweeps.seeds_of(kind)))


def test_the_frontier_puts_differences_from_qkv_above_what_is_remembered(drawn):
    (panel,) = drawn["frontier.png"].axes
    points = {}
    for found in bars(panel).values():
        points.update({round(mean, 6): (x, half) for x, mean, half in found})
    for kind in sweeps.MEMORY:
        mean, half = less_qkv(kind)
        x, half_drawn = points[round(mean, 6)]
        assert half_drawn == pytest.approx(half)
        # Those that remember as much stand a little apart.
        assert x == pytest.approx(remembered(kind), rel=0.08)
    assert len({x for x, _ in points.values()}) == len(sweeps.MEMORY)
    assert panel.get_xscale() == "log"


def test_the_names_in_the_frontier_do_not_overlap(drawn):
    figure = drawn["frontier.png"]
    (panel,) = figure.axes
    figure.draw_without_rendering()
    names = [text.get_text().replace("\n", " ") for text in panel.texts]
    assert sorted(names) == sorted(label(kind) for kind in sweeps.MEMORY)
    boxes = [text.get_window_extent() for text in panel.texts]
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[number + 1 :]), names[number]


def test_a_line_leads_from_each_point_in_the_frontier_to_its_name(drawn):
    (panel,) = drawn["frontier.png"].axes
    lines = [line.get_xydata() for line in panel.lines]
    starts = {tuple(line[1]): line[0] for line in lines if len(line) == 2}
    point_of = {
        text.get_text().replace("\n", " "): starts[text.get_position()] for text in panel.texts
    }
    for kind in sweeps.MEMORY:
        mean, _ = less_qkv(kind)
        x, y = point_of[label(kind)]
        assert x == pytest.approx(remembered(kind), rel=0.08) and y == pytest.approx(mean)


def test_longer_windows_have_a_panel_for_each_kind_of_positions(drawn):
    rope, both = drawn["lengths.png"].axes
    assert (rope.get_title(), both.get_title()) == ("rope positions", "rope+agf positions")
    assert [text.get_text() for text in both.get_xticklabels()] == ["64", "128", "256", "512"]
    points = bars(both)["QV-Ka"]
    assert [x for x, *_ in points] == pytest.approx([64, 128, 256, 512], rel=0.1)
    for times, point in zip((1, 2, 4, 8), points):
        measure = loss_in_windows(64 * times)
        assert point[1:] == pytest.approx(expected(kind_of("rope+agf", QV_KA), measure))


def test_early_training_is_less_that_of_rotated_qkv_over_the_first_fifth(drawn):
    rope, both = drawn["early.png"].axes
    assert (rope.get_title(), both.get_title()) == ("rope positions", "rope+agf positions")
    runs = every_planned_run()
    found = bars(both)
    assert sorted(found) == ["QKV", "QV", "QV-Ka"]
    terms = [(1, kind_of("rope+agf", QV)), (-1, kind_of("rope+agf", QKV_ROTATED))]
    difference = np.mean(runs.sums(terms, final_loss))
    assert [x for x, *_ in found["QV"]] == pytest.approx(np.arange(15, 120, 10), abs=1)
    assert [mean for _, mean, _ in found["QV"]] == pytest.approx([difference] * 11)


def test_early_differences_have_intervals_and_a_line_at_zero(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(figures, "save", lambda figure, path: found.append(figure))
    qkv, qv = kind_of("rope+agf", QKV_ROTATED), kind_of("rope+agf", QV)
    records = [run(qkv, 2001, early=3.0), run(qkv, 2002, early=4.0)]
    records += [run(qv, 2001, early=3.1), run(qv, 2002, early=4.3)]
    figures.draw_early(Runs(records), [qv], tmp_path / "early.png")
    (panel,) = found[0].axes
    wanted = stats.interval([0.1, 0.3])
    assert [point[1:] for point in bars(panel)["QV"]] == [pytest.approx(wanted)] * 11
    assert [0, 0] in [list(line.get_ydata()) for line in panel.lines]


def test_a_legend_has_each_attention_in_its_own_colour(drawn):
    for name in "positions.png", "lengths.png", "early.png":
        (legend,) = drawn[name].legends
        colours = {
            text.get_text(): to_hex(handle.get_color()[0])
            for text, handle in zip(legend.get_texts(), legend.legend_handles)
        }
        for attention in QKV, QV, QV_KA:
            kind = kind_of("rope+agf", attention)
            assert colours[label(kind)] == figures.style(kind)["color"].lower(), name


def test_axes_say_what_they_show(drawn):
    names = {
        name: [(panel.get_xlabel(), panel.get_ylabel()) for panel in figure.axes]
        for name, figure in drawn.items()
    }
    loss = "validation loss (nats per token)"
    minus = "loss minus that of\nQKV, rotated (nats per token)"
    window = "tokens in a window (64 in training)"
    assert names == {
        "positions.png": [("", loss)],
        "frontier.png": [("numbers remembered per token and layer", f"validation {minus}")],
        "lengths.png": [(window, loss), (window, "")],
        "early.png": [("step (of 600)", f"training {minus}"), ("step (of 600)", "")],
    }


def test_colours_and_markers_tell_attentions_apart_and_faces_their_variants():
    looks = [figures.style(kind_of("rope", dict(attention=name))) for name in NAMES]
    assert len({look["color"] for look in looks}) == len({look["marker"] for look in looks}) == 5
    plain, variant = figures.style(kind_of("rope", QV)), figures.style(kind_of("rope", QV_1))
    assert plain["color"] == variant["color"] and plain["marker"] == variant["marker"]
    assert (plain["markerfacecolor"], variant["markerfacecolor"]) == (plain["color"], "white")
    assert figures.style(kind_of("rope", dict(attention="mine")))["color"] not in [
        look["color"] for look in looks
    ]


def test_a_figure_is_written_as_a_picture(tmp_path):
    path = figures.save(Figure(), tmp_path / "some.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_sweep_of_several_settings_has_no_figure(tmp_path):
    records = several(kind_of("agf", QV), [1.0]) + several(kind_of("agf", QV, max_steps=9), [1.0])
    assert figures.draw_sweep(Runs(records), tmp_path) == []
    assert not any(tmp_path.iterdir())

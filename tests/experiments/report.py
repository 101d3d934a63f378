"""What finished runs show, as Markdown: two tables of all attentions, fifteen claims, and many
differences. `compare.py --report` runs it.

What is claimed was fixed before the runs of sweeps.py were computed, and is tested once, on the
runs of its first part. All else is exploratory: differences with intervals, and no verdicts.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import sweeps
from runs import (
    Runs,
    attention_of,
    best_loss,
    early_loss,
    final_loss,
    key,
    label,
    loss_in_windows,
    mean_loss_of_first,
    setting,
)
from stats import holm, interval, p_value
from sweeps import (
    DIAGONAL,
    DIAGONAL_32_1,
    GQA,
    GQA_ROTATED,
    MLA_32,
    MQA_ROTATED,
    QKV,
    QKV_ROTATED,
    QV,
    QV_1,
    QV_2,
    QV_KA,
    QV_KA_1,
    QV_KA_32,
    QV_KA_32_1,
    QV_KA_32_2,
    kind_of,
)

from prepare import UserError

# --- Cells and tables -----------------------------------------------------------------------------

NOTHING = "—"
MISSING = "None of these runs is there yet."


def loss_text(values):
    """A mean, and half of its interval's width."""
    if not values:
        return NOTHING
    mean, half = interval(values)
    return f"{mean:.4f}" if len(values) == 1 else f"{mean:.4f} ± {half:.4f}"


def range_text(values, digits=4):
    mean, half = interval(values)
    return f"{mean - half:+.{digits}f} to {mean + half:+.{digits}f}"


def difference_text(values, digits=4):
    """A difference: its mean and half of its interval's width, or, if it is not told from zero, its
    range."""
    if not values:
        return NOTHING
    mean, half = interval(values)
    if len(values) == 1:
        return f"{mean:+.{digits}f} (one seed)"
    if abs(mean) <= half:
        return range_text(values, digits)
    return f"{mean:+.{digits}f} ± {half:.{digits}f}"


def verdict_text(values, side, corrected):
    """A verdict, from a p value that was corrected for the other tests of the family."""
    if corrected > 0.05:
        return f"not told apart ({range_text(values)})"
    mean, half = interval(values)
    words = "shown" if mean * side > 0 else "the opposite is shown"
    return f"{mean:+.4f} ± {half:.4f}, {words}"


def seeds_text(number, wanted):
    """A number of seeds; 14 of 20 where it is known how many there should be."""
    return f"{number}" if wanted is None else f"{number} of {len(wanted)}"


def table(head, rows):
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


# --- The claims, fixed before the runs ------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """Words; the terms to sum, a function of the positions; the sign that is claimed; where; and
    what is measured."""

    words: str
    terms: Callable
    side: int
    positions: tuple
    measure: Callable = final_loss


def qkv(pos):
    """The QKV that QV is compared with: where QV's values are rotated, so are its."""
    return kind_of(pos, QKV_ROTATED if "rope" in pos else QKV)


def gap(pos, weight=1):
    """QV less QKV."""
    return [(weight, kind_of(pos, QV)), (-weight, qkv(pos))]


def gap_less_half_the_sinusoidal(pos):
    return gap(pos) + gap("sinusoidal", weight=-0.5)


def qv_ka_less_the_middle(pos):
    return [(1, kind_of(pos, QV_KA)), (-0.5, kind_of(pos, QV)), (-0.5, qkv(pos))]


def qv_ka_less_qkv(pos):
    return [(1, kind_of(pos, QV_KA)), (-1, qkv(pos))]


ALL_FOUR = ("sinusoidal", "rope", "agf", "rope+agf")
ALL_BUT_SINUSOIDAL = ALL_FOUR[1:]
C2 = "C2: QV - QKV, minus half of the sinusoidal difference, < 0"
C4 = "C4: QV-Ka - QKV < 0, of the mean training losses of the first fifth"

CLAIMS = [
    Claim("C1: QV - QKV > 0", gap, 1, ALL_FOUR),
    Claim(C2, gap_less_half_the_sinusoidal, -1, ALL_BUT_SINUSOIDAL),
    Claim("C3: QV-Ka - (QV + QKV) / 2 < 0", qv_ka_less_the_middle, -1, ALL_FOUR),
    Claim(C4, qv_ka_less_qkv, -1, ALL_FOUR, early_loss),
]


def family(runs, claims=CLAIMS):
    """The table of all claims; with verdicts if all the runs that they need are there."""
    (part,) = sweeps.PARTS[1]
    sums = {}
    for claim in claims:
        for pos in claim.positions:
            terms = claim.terms(pos)
            for _, kind in terms:
                if kind not in part.kinds:
                    raise ValueError(f"{claim.words} is about {kind}, which is not in part 1")
            sums[claim, pos] = runs.sums(terms, claim.measure, part.seeds)

    least = min(len(values) for values in sums.values())
    if least == len(part.seeds):
        p_values = holm([p_value(values) for values in sums.values()])
        cells = {
            (claim, pos): verdict_text(values, claim.side, p)
            for ((claim, pos), values), p in zip(sums.items(), p_values)
        }
        words = f"All {len(sums)} are of the {least} seeds {part.seeds[0]} to {part.seeds[-1]}."
    else:
        cells = {
            place: f"{difference_text(values)} ({seeds_text(len(values), part.seeds)} seeds)"
            for place, values in sums.items()
        }
        words = "Runs are missing, so there are no verdicts yet."
    rows = []
    for claim in claims:
        rows.append([claim.words, *(cells.get((claim, pos), "") for pos in ALL_FOUR)])
    return f"{words}\n\n{table(['claim', *ALL_FOUR], rows)}"


# --- The first table ------------------------------------------------------------------------------

CAPTION = """\
**Numbers remembered** are for one token in one layer. The next four columns are **losses** by
positions. From *1,800 steps* to *equal time* they are under rope+agf: of runs three times as long,
in windows of 8 times the context, and after the time that 600 steps of QKV take. A loss is that of
the validation split at the end, in nats per token, here a character. It is a mean over the seeds
{seeds}, the same for all, or over as many of them as a bracket says where runs are missing.
Half of its 95 % interval is at most {loss:.4f}, and half of that of a difference from QKV
(rotated, under rope), which is paired by seed, at most {difference:.4f}.
**Speeds** are relative to QKV's, under rope+agf, on one thread of a CPU; decoding is at 1,024
tokens, by a model of 10.7M parameters. They are medians over steps that were taken in turn, and
half of the steps lie within {training} (training) and {decoding} (decoding) of them.
"""


def first_table(runs, speeds):
    """Each attention in a row: what it remembers, its losses, its size and its speed. All losses
    are of the same seeds, so they may be compared."""
    seeds, equal = sweeps.TABLE_SEEDS, kinds_at_equal_time()
    rotated = equal.get(label(QKV_ROTATED))
    widest, rows = dict(loss=0.0, difference=0.0), []

    def cell(kind, measure=final_loss, baseline=None):
        losses = runs.sums([(1, kind)], measure, seeds)
        paired = runs.sums([(1, kind), (-1, baseline or like_qkv(kind))], measure, seeds)
        for name, values in ("loss", losses), ("difference", paired):
            if len(values) > 1:
                _, half = interval(values)
                widest[name] = max(widest[name], half)
        if not losses:
            return NOTHING
        mean, _ = interval(losses)
        return f"{mean:.4f}" if len(losses) == len(seeds) else f"{mean:.4f} ({len(losses)})"

    for attention in sweeps.TABLE:
        best = kind_of("rope+agf", attention)
        weights = runs.fact(best, "attention_parameters")
        rows.append(
            [
                label(best),
                runs.fact(best, "remembered") or NOTHING,
                *(cell(kind_of(pos, attention)) for pos in ALL_FOUR),
                cell(kind_of("rope+agf", attention, **sweeps.MORE_STEPS)),
                cell(best, loss_in_windows(8 * sweeps.CONTEXT)),
                cell(equal[label(best)], baseline=rotated) if label(best) in equal else NOTHING,
                f"{weights:,}" if weights else NOTHING,
                speed_text(speeds["training"], attention),
                speed_text(speeds["decoding"], attention),
            ]
        )
    head = ["attention", "numbers remembered", *ALL_FOUR, "1,800 steps", "8 times the context"]
    head += ["equal time", "weights in attention", "training speed", "decoding speed"]
    at_most = {name: math.ceil(10_000 * half) / 10_000 for name, half in widest.items()}
    spreads = {name: spread(speeds[name]) for name in ("training", "decoding")}
    caption = CAPTION.format(seeds=f"{seeds[0]} to {seeds[-1]}", **at_most, **spreads)
    return table(head, rows) + "\n" + caption


def kinds_at_equal_time():
    """{label: kind} of the attentions that are trained for the time of 600 steps of QKV, and QKV
    itself."""
    equal = {label(kind): kind for kind in sweeps.equal_time()}
    return {**equal, label(QKV): kind_of("rope+agf", QKV)}


def speed(rows, attention):
    """How fast an attention is beside QKV, of the rows that speeds.py has measured; None where it
    has not."""
    return next((row["speed"] for row in rows if row["attention"] == attention), None)


def spread(rows):
    """How far the quartiles of a speed lie from it at most, in words."""
    gaps = [abs(row["speed"] - quartile) for row in rows for quartile in row["quartiles"]]
    return f"{max(gaps):.2f}" if gaps else NOTHING


def speed_text(rows, attention):
    found = speed(rows, attention)
    return NOTHING if found is None else f"{found:.2f}"


# --- The second table: all attentions beside QKV, in six settings ---------------------------------

BESIDE_QKV = f"""\
Losses under rope+agf, minus that of QKV, rotated, in the same setting; the row of that one has its
losses. Of how many seeds they are, the sections below say. **Equal time** is the time that
{sweeps.STEPS} steps of QKV take. **AdamW** makes {sweeps.BY_ADAMW["max_steps"]} steps; all else is
trained by Muon. **2.7M parameters** and {sweeps.LARGER_MODEL["n_head"]} heads are those of a larger
QKV; numbers remembered are of the smaller models. **Another text** is Python's language reference.
"""


def kinds_by_setting():
    """{setting: {label: kind}}: what stands in the columns of the second table."""

    def with_flags(flags):
        kinds = sweeps.kinds_of("rope+agf", *sweeps.TABLE, **flags)
        return {label(kind): kind for kind in kinds}

    return {
        "600 steps": with_flags({}),
        "equal time": kinds_at_equal_time(),
        "1,800 steps": with_flags(sweeps.MORE_STEPS),
        "AdamW": with_flags(sweeps.BY_ADAMW),
        "2.7M parameters": with_flags(sweeps.LARGER_MODEL),
        "another text": with_flags(sweeps.OTHER_TEXT),
    }


def second_table(runs, speeds):
    """Each attention in a row: its difference from QKV, rotated, in each of the settings, and its
    speed."""
    columns = kinds_by_setting()

    def cell(kinds, attention):
        kind, baseline = kinds.get(label(attention)), kinds.get(label(QKV_ROTATED))
        if kind is None or baseline is None:
            return NOTHING
        if kind == baseline:
            losses = runs.sums([(1, kind)], final_loss, sweeps.TABLE_SEEDS)
            return f"{interval(losses)[0]:.4f}" if losses else NOTHING
        seeds = {*sweeps.seeds_of(kind)} & {*sweeps.seeds_of(baseline)}
        return difference_text(runs.sums([(1, kind), (-1, baseline)], final_loss, seeds), digits=3)

    rows = []
    for attention in sweeps.TABLE:
        rows.append(
            [
                label(attention),
                runs.fact(kind_of("rope+agf", attention), "remembered") or NOTHING,
                *(cell(kinds, attention) for kinds in columns.values()),
                speed_text(speeds["training"], attention),
                speed_text(speeds["decoding"], attention),
            ]
        )
    head = ["attention", "numbers remembered", *columns, "training speed", "decoding speed"]
    return table(head, rows) + "\n" + BESIDE_QKV


# --- Differences, without verdicts ----------------------------------------------------------------


def like_qkv(kind):
    """The QKV that a kind is compared with: in the same setting, with the same positions."""
    attention = QKV_ROTATED if "rope" in kind["pos"] else QKV
    return {**setting(kind), **attention, "pos": kind["pos"]}


def all_there_are(kind):
    """Where nobody said which seeds there should be, all count."""
    return None


def comparison(runs, kinds, baseline, wanted=all_there_are, measure=final_loss):
    """A table for each setting: each kind of which there are runs, and how it differs from its
    baseline. `baseline` is a function of a kind, to another; `wanted` one to the seeds that there
    should be."""
    head = ["positions", "attention", "seeds", "numbers remembered", "weights in attention"]
    head += [
        "loss",
        "loss minus the baseline's",
        "training loss of the first fifth minus the baseline's",
    ]
    rows = {}
    for kind in kinds:
        seeds, base = wanted(kind), baseline(kind)
        losses = runs.sums([(1, kind)], measure, seeds)
        if not losses:
            continue
        weights = runs.fact(kind, "attention_parameters")
        row = [
            kind["pos"],
            label(kind),
            seeds_text(len(losses), seeds),
            runs.fact(kind, "remembered") or NOTHING,
            f"{weights:,}" if weights else NOTHING,
            loss_text(losses),
        ]
        if base == kind:
            row += ["(the baseline)", ""]
        else:
            terms = [(1, kind), (-1, base)]
            for what in (measure, early_loss):
                row.append(difference_text(runs.sums(terms, what, seeds)))
        rows.setdefault(setting_text(kind), []).append(row)
    return "\n".join(f"{words}\n\n{table(head, rows[words])}" for words in rows)


def setting_text(kind):
    """A setting in words."""
    flags = setting(kind)
    words = [f"{flags.pop('preset')} preset, {flags.pop('dataset')}"]
    return ", ".join([*words, *(f"{name}={flags[name]}" for name in sorted(flags))])


def name_beside(kind, other):
    """What a kind is called beside another: with those flags of its setting that the other does not
    have."""
    flags = setting(kind).items() - setting(other).items()
    return ", ".join([label(kind), *(f"{name}={value}" for name, value in sorted(flags))])


def differences(runs, pairs, measure=final_loss, wanted=sweeps.seeds_of):
    """A table with a row for each pair of kinds of which there are runs: the first minus the
    second."""
    rows = []
    for one, other in pairs:
        seeds = sorted(set(wanted(one)) & set(wanted(other)))
        values = runs.sums([(1, one), (-1, other)], measure, seeds)
        if not values:
            continue
        memory = [runs.fact(kind, "remembered") or NOTHING for kind in (one, other)]
        rows.append(
            [
                name_beside(one, other),
                name_beside(other, one),
                ", ".join(dict.fromkeys([one["pos"], other["pos"]])),
                ", ".join(map(str, memory)),
                seeds_text(len(values), seeds),
                difference_text(values),
            ]
        )
    head = ["attention", "minus", "positions", "numbers remembered", "seeds", "difference"]
    return table(head, rows) if rows else ""


def windows(runs, kinds, wanted=all_there_are):
    """A table of losses in windows of several lengths; nothing where there are none."""
    lengths = set()
    for kind in kinds:
        lengths.update(int(length) for length in runs.fact(kind, "val_loss_by_length") or ())
    rows = []
    for kind in kinds:
        seeds = wanted(kind)
        losses = [runs.sums([(1, kind)], loss_in_windows(n), seeds) for n in sorted(lengths)]
        if any(losses):
            number = seeds_text(min(map(len, losses)), seeds)
            rows.append([kind["pos"], label(kind), number, *map(loss_text, losses)])
    head = ["positions", "attention", "seeds", *(f"{n} tokens" for n in sorted(lengths))]
    return table(head, rows) if rows else ""


# --- The reports ----------------------------------------------------------------------------------


def choose_baseline(kinds, name=None):
    """A function from one of these kinds to that which it is compared with: of its setting and
    positions, the attention of that name or label; without a name qkv, or the first. Raises
    UserError for a name that none has."""

    def is_named(kind):
        if len(attention_of(kind)) == 1 and kind["attention"] == (name or "qkv"):
            return True
        return name is not None and label(kind).lower() == name.lower()

    if name and not any(map(is_named, kinds)):
        labels = dict.fromkeys(map(label, kinds))
        raise UserError(f"--baseline={name} is none of these attentions: {'; '.join(labels)}")

    def baseline(kind):
        beside = [other for other in kinds if key(setting(other)) == key(setting(kind))]
        beside = [other for other in beside if other["pos"] == kind["pos"]]
        return next(filter(is_named, beside), beside[0])

    return baseline


def sweep_report(runs, baseline_name=None, measure=final_loss):
    """The comparison of any runs, each with the baseline of its setting and positions."""
    kinds = runs.kinds()
    baseline = choose_baseline(kinds, baseline_name)
    text = comparison(runs, kinds, baseline, measure=measure)
    longer = windows(runs, kinds)
    return f"{text}\nLosses in longer windows:\n\n{longer}" if longer else text


@dataclass(frozen=True)
class Section:
    """An exploratory part of results.md: kinds that are compared with QKV, and pairs of kinds."""

    title: str
    words: str
    kinds: list = ()
    pairs: list = ()


def pairs(pos, *attentions, **flags):
    """Pairs of kinds, from pairs of attentions."""
    return [(kind_of(pos, one, **flags), kind_of(pos, other, **flags)) for one, other in attentions]


def pairs_of_positions(pos, others, *attentions, **flags):
    """Pairs of kinds: each attention with these positions, and with others."""
    return [
        (kind_of(pos, attention, **flags), kind_of(other, attention, **flags))
        for other in others
        for attention in attentions
    ]


SECTIONS = [
    Section(
        "Positions",
        "What rope+agf gains.",
        pairs=[
            *pairs_of_positions("rope+agf", ("sinusoidal", "agf"), QKV, QV, QV_KA),
            *pairs_of_positions("rope+agf", ("rope",), QKV, QKV_ROTATED, QV, QV_KA),
        ],
    ),
    Section(
        "Rotated values",
        "What QKV and GQA gain or lose by `--rope_values`.",
        pairs=[
            *pairs("rope", (QKV_ROTATED, QKV)),
            *pairs("rope+agf", (QKV_ROTATED, QKV), (GQA_ROTATED, GQA)),
        ],
    ),
    Section(
        "How little must be remembered",
        "All attentions under rope+agf, and differences between some of them. Where numbers of "
        "seeds differ, compare these and not the losses.",
        kinds=sweeps.MEMORY,
        pairs=[
            *pairs("rope+agf", (QV_KA, QV), (QV, GQA_ROTATED), (QV_KA, GQA_ROTATED)),
            *pairs("rope+agf", (QV, MQA_ROTATED), (QV_2, MQA_ROTATED)),
            *pairs("rope+agf", (QV_KA_32_1, MQA_ROTATED), (DIAGONAL_32_1, MQA_ROTATED)),
            *pairs("rope+agf", (QV_1, MLA_32), (QV_KA_1, QV), (QV_KA_32_2, QV)),
        ],
    ),
    Section(
        "A diagonal W_K, and a narrower context",
        "QV-Ka makes its key by a matrix for each head, or by complex numbers that multiply what "
        "is remembered.",
        pairs=[
            *pairs("agf", (DIAGONAL, QV_KA)),
            *pairs("rope", (DIAGONAL, QV_KA)),
            *pairs("rope+agf", (DIAGONAL, QV_KA), (DIAGONAL_32_1, QV_KA_32_1), (QV_KA_32, QV_KA)),
        ],
    ),
    Section(
        "Three times as long",
        "The same training with 1,800 steps.",
        kinds=sweeps.LONGER,
        pairs=[
            *pairs_of_positions("rope+agf", ("sinusoidal",), QV, QV_KA, **sweeps.MORE_STEPS),
            *pairs("rope+agf", (QV_KA, QV), (QV, GQA_ROTATED), **sweeps.MORE_STEPS),
            *pairs("rope+agf", (QV, MQA_ROTATED), (QV_KA, MQA_ROTATED), **sweeps.MORE_STEPS),
        ],
    ),
    Section(
        "Other learning rates, and AdamW",
        "All other runs are trained by Muon at a rate of 0.01.",
        kinds=[*sweeps.RATES, *sweeps.ADAMW],
        pairs=[
            *(
                (kind_of("rope+agf", attention, learning_rate=rate), kind_of("rope+agf", attention))
                for rate in (0.005, 0.02)
                for attention in (QKV_ROTATED, QV, QV_KA)
            ),
            *pairs("rope+agf", (QV, GQA_ROTATED), (QV, MQA_ROTATED), **sweeps.BY_ADAMW),
        ],
    ),
    Section(
        "A larger model",
        "Its size and its training stand above each table.",
        kinds=sweeps.LARGER,
        pairs=[
            *pairs("rope+agf", (QV_KA, QV), (QV, GQA_ROTATED), **sweeps.LARGER_MODEL),
            *pairs("rope+agf", (QV, MQA_ROTATED), (QV_KA, MQA_ROTATED), **sweeps.LARGER_MODEL),
        ],
    ),
    Section(
        "Another text",
        "The language reference of Python 3.11.7 (`prepare.py pydoc`).",
        kinds=sweeps.OTHER,
        pairs=[
            *pairs("sinusoidal", (QV_KA, QV), **sweeps.OTHER_TEXT),
            *pairs("rope+agf", (QV, GQA_ROTATED), (QV, MQA_ROTATED), **sweeps.OTHER_TEXT),
            *pairs("rope+agf", (QV_KA, QV), (DIAGONAL, QV_KA), **sweeps.OTHER_TEXT),
        ],
    ),
]


def section_text(runs, section):
    """A section; a table in it says of how many of its seeds it is."""
    tables = [
        comparison(runs, section.kinds, like_qkv, sweeps.seeds_of),
        differences(runs, section.pairs),
    ]
    found = [table for table in tables if table] or [MISSING]
    return "\n\n".join([f"### {section.title}", section.words, *found])


def equal_time_text(runs, speeds):
    """What is lost or gained after the time that QKV's 600 steps take, and after a fifth of it."""
    equal = {label(kind): kind for kind in sweeps.equal_time()}
    if not equal:
        return "### At equal time\n\nNo step times are stored; speeds.py measures them."
    textbook = kind_of("rope+agf", QKV)
    pairs_of_losses = [(one, textbook) for one in equal.values()]
    with_keys = QKV_ROTATED, GQA_ROTATED, MQA_ROTATED
    without = QV, QV_1, QV_KA, DIAGONAL
    compared = [
        *((attention, QKV_ROTATED) for attention in (GQA_ROTATED, MQA_ROTATED)),
        *itertools.product(without, with_keys),
        *((attention, QV) for attention in (QV_KA, DIAGONAL)),
        (DIAGONAL_32_1, MQA_ROTATED),
    ]
    for one, other in compared:
        pairs_of_losses.append((equal[label(one)], equal[label(other)]))
    pairs_of_early = pairs("rope+agf", (QV, QKV_ROTATED), (QV_KA, QKV_ROTATED), (QV_KA, QV))

    def early_loss_in_time(run):
        faster = speed(speeds["training"], attention_of(run["kind"]))
        return mean_loss_of_first(faster * sweeps.STEPS / 5, run)

    return "\n\n".join(
        [
            "### At equal time",
            "An attention has 600 steps times its training speed in the first table: as many as "
            "take the time of 600 steps of QKV. How sure that speed is, the intervals do not say.",
            differences(runs, pairs_of_losses) or MISSING,
            "The mean training loss during the time of the first fifth of QKV's steps:",
            differences(runs, pairs_of_early, early_loss_in_time) or MISSING,
        ]
    )


def windows_text(runs):
    def wanted(kind):
        return sweeps.seeds_of(kind, windows=True)

    losses = windows(runs, sweeps.WINDOWS, wanted)
    if not losses:
        return f"### In longer windows\n\n{MISSING}"
    longest = loss_in_windows(8 * sweeps.CONTEXT)
    compared = [
        *pairs("rope", (QKV_ROTATED, QKV), (QV, QKV_ROTATED), (QV_KA, QKV_ROTATED)),
        *pairs("rope+agf", (QKV_ROTATED, QKV), (QV, QKV_ROTATED), (QV_KA, QKV_ROTATED)),
        *pairs("rope+agf", (QV, GQA_ROTATED), (QV, MQA_ROTATED), (DIAGONAL_32_1, MQA_ROTATED)),
    ]
    return "\n\n".join(
        [
            "### In longer windows",
            losses,
            f"In windows of {8 * sweeps.CONTEXT} tokens:",
            differences(runs, compared, longest, wanted) or MISSING,
        ]
    )


MEANING = """\
# What the runs show

Made by `{command}` from the runs in results.json (by
`compare.py --part=1` and so on, to {last}), those in results_first.json, and the speeds in
speeds.json (by `speeds.py`).

- A **loss** is that of the trained model over the whole validation split, in nats per token.
- A **difference** is a mean over seeds; runs of one seed saw the same batches, and are subtracted
  first.
- **±** is half of the 95 % interval of such a mean (Student's t). A difference that is not told
  from zero is given as that interval, from one end to the other.
- **Rotated**: under rope and rope+agf QV and QV-Ka rotate what they remember, and so their values.
  With `--rope_values` QKV and GQA do the same, and are then called rotated. **MQA** is GQA with one
  key and one value for all heads.
- Each part says of how many seeds it is; 14 of 20 means that runs are missing. {number} runs are
  there.
"""

FAMILY = """\
## Fifteen claims

Fixed before their runs were computed, on seeds that nobody had seen. A claim is **shown**, or **the
opposite is shown**, if its difference is told from zero at a level of 5 % for all fifteen together
(Student's t test, Holm's correction). Intervals are of each difference alone, so one may leave out
zero although fifteen tests together do not tell it from zero. Under rope and rope+agf QKV is QKV,
rotated.
"""

EXPLORATORY = """\
## Exploratory: differences without verdicts

Nothing here was claimed before. Where nothing differs, one interval in twenty leaves out zero by
chance. The baseline is QKV: under rope and rope+agf QKV, rotated.
"""

FIRST = """\
## What was seen first

These runs were there before the claims were fixed, and led to them. They decide nothing. Their QKV
does not rotate its values. Their losses are the lowest of each run's evaluations, which flatters
long runs.
"""


def planned(runs):
    """Those of the runs that sweeps.py asks for."""
    return Runs(
        record for record in runs.records() if record["seed"] in sweeps.seeds_of(record["kind"])
    )


# The figures that figures.py draws, and what they show.
FIGURES = {
    "positions.png": "The losses by positions; differences, paired by seed, vary less than these",
    "frontier.png": "What each attention loses, by what it remembers (rope+agf)",
    "lengths.png": "The losses in longer windows",
    "early.png": "Early in training, where the paper has QV-Ka learn faster than QKV",
}


def results(runs, first, speeds, drawn, command):
    """The whole of results.md. `drawn` are the names of the figures beside it."""
    parts = [
        MEANING.format(command=command, last=max(sweeps.PARTS), number=len(runs.records())),
        "## All attentions",
        first_table(runs, speeds),
        "## All attentions beside QKV",
        second_table(runs, speeds),
        *(f"![{FIGURES[name]}]({name})\n\n*{FIGURES[name]}*" for name in drawn),
        FAMILY,
        family(runs),
        EXPLORATORY,
        *(section_text(runs, section) for section in SECTIONS),
        windows_text(runs),
        equal_time_text(runs, speeds),
    ]
    if first.records():
        parts += [FIRST, sweep_report(first, measure=best_loss)]
    return "\n\n".join(part.strip() for part in parts) + "\n"

"""What finished runs show: results.md, results.json, results.png, frontier.png and lengths.png, from the records that
compare.py makes: a dict for each run, with its `attention`, `pos`, `seed`, the `flags` that make it a variant, etc.

Runs of one seed saw the same batches. So attentions are compared seed by seed: such differences vary less than losses.
"""

import json
import math
import re
from collections import defaultdict
from dataclasses import fields
from statistics import multimode

import numpy as np
from matplotlib.figure import Figure

from model import ATTENTIONS, POSITIONS, GPTConfig
from prepare import UserError, write_atomically

ONLY = {
    field.name: field.metadata["only"] for field in fields(GPTConfig)
}  # {flag: {other: values that it needs}}
# Flags by which an attention is unlike qkv, or, by n_inner, as large. All others make a comparison of its own.
VARIANT = {*(name for name, only in ONLY.items() if only), "n_inner"}
MEMORY = VARIANT - {"n_inner", "shared_wk"}  # of these, what changes the memory

# A claim; a sum over runs of one seed, and of the positions at hand or those named; on which side of zero it must be;
# and, if not the loss, which number of the records is summed. What the table of claims shows is what is computed.
CLAIMS = [
    ("C1: QV is worse than QKV", "qv - qkv", ">"),
    (
        "C2: QV's gap to QKV is less than half of that with learned positions",
        "qv - qkv - 0.5 learned qv + 0.5 learned qkv",
        "<",
    ),
    (
        "C2: QV's gap to QKV is less than half of that with sinusoidal positions",
        "qv - qkv - 0.5 sinusoidal qv + 0.5 sinusoidal qkv",
        "<",
    ),
    ("C3: QV-Ka is better than QV", "qv_ka - qv", "<"),
    ("C3: QV-Ka closes more than half of QV's gap", "qv_ka - 0.5 qv - 0.5 qkv", "<"),
    ("C3: QV-Ka is better than QKV", "qv_ka - qkv", "<"),
    (
        "C4: QV-Ka learns faster than QKV at first (training loss, mean of the first fifth)",
        "qv_ka - qkv",
        "<",
        "early_loss",
    ),
    ("QV is worse than GQA, which remembers as much", "qv - gqa", ">"),
    (
        "QV with 2 values is worse than MQA, which remembers as much",
        "qv n_kv_head=2 - gqa n_kv_head=1",
        ">",
    ),
    (
        "QV-Ka with 1 value is better than MQA, which remembers as much",
        "qv_ka d_ctx=32 n_kv_head=1 - gqa n_kv_head=1",
        "<",
    ),
    (
        "QV-Ka with one W_K for all heads is worse than with one each",
        "qv_ka shared_wk - qv_ka",
        ">",
    ),
    (
        "QV-Ka with a context half as wide, of a head's width, is worse",
        "qv_ka d_ctx=32 - qv_ka",
        ">",
    ),
    ("QKV is worse than with rope", "qkv - rope qkv", ">"),
]
TERM = re.compile(rf"(?:^|([+-]) )([\d.]+ )?(?:({'|'.join(POSITIONS)}) )?(\w+(?: \w+(?:=\S+)?)*)")

MEANING = """\
Made by `python tests/compare.py --report` from the results.json beside it.

- A **loss** is the best that a run reached, in nats per token over the whole validation split (preset gpt2: over its
  first 2,000,000 tokens). A **difference** is of runs of one seed, which saw the same batches, averaged over seeds.
- **±** is half the width of the 95 % interval of a mean over seeds (Student's t), here and in the figures. Two losses
  whose intervals overlap may still differ clearly: look at their difference, **bold** where its interval leaves out
  zero. Where nothing differs, one in twenty is bold by chance.
- A claim **holds**, or **does not hold**, if its difference is told from zero, on its side or the other, at a level of
  5 % for all verdicts of a table together (Student's t test, Holm's correction); else it is **undecided**.
- **Remembered** are numbers for one token in one layer. **Tokens/s** are the most of any seed, on a machine in use.
"""

# --- Statistics ------------------------------------------------------------------------------------------------------


def student(n):
    """Student's t for n values, as arrays: sizes of t, and the chance that a larger one, of either sign, comes up where
    there is no difference. With t = sqrt(n - 1) tan(x), the density of x is proportional to cos(x)^(n - 2)."""
    x = (np.arange(100_000) + 0.5) * (math.pi / 2 / 100_000)
    density = np.cos(x) ** (n - 2)
    return math.sqrt(n - 1) * np.tan(x), 1 - (np.cumsum(density) - density / 2) / density.sum()


def interval(values):
    """The mean of numbers or arrays, one for each seed, and half the width of its 95 % interval; nan for one seed."""
    n, mean = len(values), np.mean(values, 0)
    if n == 1:
        return mean, math.nan * mean
    t, beyond = student(n)
    return mean, np.interp(-0.05, -beyond, t) * np.std(values, 0, ddof=1) / math.sqrt(n)


def chance(values):
    """The p value of a difference: how likely one as clear is where there is none; 1 for a single seed."""
    mean, half = interval(values)
    if len(values) == 1 or half == 0:
        return float(half != 0 or mean == 0)
    t, beyond = student(len(values))
    return np.interp(abs(mean) / np.std(values, ddof=1) * math.sqrt(len(values)), t, beyond)


def holm(chances):
    """Holm's correction: each p value, times the number of those that are not smaller."""
    order, corrected = np.argsort(chances), np.empty(len(chances))
    corrected[order] = np.maximum.accumulate(np.sort(chances) * np.arange(len(chances), 0, -1))
    return corrected


def told(values, form=".4f"):
    """mean ± half width, as text; nothing where there are no values."""
    if not values:
        return ""
    mean, half = interval(values)
    return f"{mean:{form}}" + ("" if math.isnan(half) else f" ± {half:.4f}")


def difference(values):
    """The same of a difference, which has a sign, and is bold if its interval leaves out zero."""
    bold = "**" if values and np.greater(*np.abs(interval(values))) else ""
    return bold + told(values, "+.4f") + bold


def verdict(values, side, corrected):
    agrees = (np.mean(values) > 0) == (side == ">")
    return "undecided" if corrected > 0.05 else "holds" if agrees else "does not hold"


# --- Tables and figures ----------------------------------------------------------------------------------------------

STYLES = defaultdict(
    lambda: ("0.4", "X"),
    qkv=("k", "o"),
    gqa=("#E69F00", "s"),
    mla=("#009E73", "^"),
    qv=("#D55E00", "v"),
    qv_ka=("#0072B2", "D"),
)  # Okabe and Ito's colours, for all eyes


def table(head, rows):
    """A Markdown table; nothing where it would have no rows."""
    lines = [head, ["---"] * len(head), *rows] if rows else []
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def unique(names):
    return list(dict.fromkeys(names))


def place(run):
    """Where a run stands in tables and figures; a fork's own attentions and positions come last."""
    names = [*POSITIONS, *ATTENTIONS, run["pos"], run["attention"]]
    return names.index(run["pos"]), names.index(run["attention"]), run["attention"], run["flags"]


def setting(run):
    """What all runs of a comparison share: the preset, the data, and those of its flags that make no variant."""
    return (
        run["preset"],
        run["dataset"],
        *(flag for flag in run["flags"] if flag.partition("=")[0] not in VARIANT),
    )


class Comparison:
    """The finished runs of one setting: groups[pos, label] = {seed: record}. A label is an attention or its variant."""

    def __init__(self, runs):
        preset, dataset, *self.flags = setting(runs[0])
        self.title, self.groups = ", ".join([f"{preset} preset", dataset, *self.flags]), {}
        for run in sorted(runs, key=place):
            own = [flag for flag in run["flags"] if flag not in self.flags]
            label = " ".join([run["attention"], *own]).replace(
                "=True", ""
            )  # --shared_wk, as it is given
            by_length = {int(length): loss for length, loss in run["val_loss_by_length"].items()}
            self.groups.setdefault((run["pos"], label), {})[run["seed"]] = {**run, **by_length}
        self.positions, self.labels = (unique(names) for names in zip(*self.groups))
        self.lengths = sorted({int(length) for run in runs for length in run["val_loss_by_length"]})

    def values(self, formula, pos, name="best_val_loss"):
        """What a formula, such as qv - qkv, makes of that number of the records, for each seed that all terms have."""
        terms = [
            (
                float(factor or 1) * (-1 if sign == "-" else 1),
                self.groups.get((there or pos, label), {}),
            )
            for sign, factor, there, label in TERM.findall(formula)
        ]
        seeds = set.intersection(
            *({seed for seed, run in group.items() if name in run} for _, group in terms)
        )
        return [
            sum(weight * np.array(group[seed][name]) for weight, group in terms)
            for seed in sorted(seeds)
        ]

    def gap(self, pos, label, name="best_val_loss"):
        """The differences to qkv."""
        return [] if label == "qkv" else self.values(f"{label} - qkv", pos, name)

    def longer(self, pos, label):
        """{tokens in a window: the losses}, where they were measured."""
        return {
            length: losses for length in self.lengths if (losses := self.values(label, pos, length))
        }

    def claims(self):
        """A row for each claim that the runs tell of: for each kind of positions, the difference and a verdict."""
        rows = [
            (
                claim,
                formula,
                side,
                [
                    [] if f" {pos} " in formula else self.values(formula, pos, *name)
                    for pos in self.positions
                ],
            )
            for claim, formula, side, *name in CLAIMS
        ]
        corrected = iter(holm([chance(values) for *_, cells in rows for values in cells if values]))
        for claim, formula, side, cells in rows:
            if any(cells):
                told = (
                    f"{difference(cell)} {verdict(cell, side, next(corrected))}" if cell else ""
                    for cell in cells
                )
                yield claim, f"{formula} {side} 0", *told

    def markdown(self):
        """The claims, every group, and the losses in longer windows, as tables."""
        groups, longer = [], []
        for (pos, label), runs in self.groups.items():
            step, *sizes = (
                f"{np.median([run[name] for run in runs.values()]):,.0f}"
                for name in ("best_step", "attention_parameters", "parameters", "remembered")
            )
            speed = max(run["tokens_per_second"] for run in runs.values())
            gaps = difference(self.gap(pos, label)), difference(self.gap(pos, label, "early_loss"))
            groups.append(
                [
                    pos,
                    label,
                    len(runs),
                    told(self.values(label, pos)),
                    *gaps,
                    step,
                    *sizes,
                    f"{speed:,}",
                ]
            )
            if losses := self.longer(pos, label):
                longer.append([pos, label, *(told(losses.get(length)) for length in self.lengths)])
        claims = list(self.claims())
        verdicts = sum(cell != "" for _, _, *cells in claims for cell in cells)
        tables = (
            table([f"claim ({verdicts} verdicts)", "holds if", *self.positions], claims),
            table(
                [
                    "positions",
                    "attention",
                    "seeds",
                    "loss",
                    "loss - qkv's",
                    "training loss, first fifth - qkv's",
                    "at step",
                    "parameters in attention",
                    "in all",
                    "remembered",
                    "training tokens/s",
                ],
                groups,
            ),
            table(
                ["positions", "attention", *(f"loss in {n} tokens" for n in self.lengths)], longer
            ),
        )
        return "\n".join([f"## {self.title}\n", *filter(None, tables)])

    def style(self, label):
        """Colour and marker tell the attention; hollow markers and broken lines tell its variants."""
        attention = label.split()[0]
        number = [other for other in self.labels if other.split()[0] == attention].index(label)
        (colour, marker), line = STYLES[attention], ("-", "--", ":", "-.")[number % 4]
        return dict(
            color=colour,
            marker=marker,
            markerfacecolor="white" if number else colour,
            linestyle=line,
        )

    def draw_gaps(self, figure):
        """Above, the differences to qkv, and each seed's as a faint dot; below, how they develop early in training."""
        labels = unique(label for pos, label in self.groups if self.gap(pos, label))
        labels = [
            label for label in labels if " " not in label
        ] or labels  # variants where there is no other
        axes = figure.subplots(
            2,
            len(self.positions),
            sharex="row",
            sharey="row",
            squeeze=False,
            height_ratios=(len(labels) + 3, 9),
        )
        for pos, above, below in zip(self.positions, *axes):
            for row, label in enumerate(labels):
                if gap := self.gap(pos, label):
                    (mean, half), style = interval(gap), self.style(label)
                    above.plot(gap, [row] * len(gap), ".", color=style["color"], alpha=0.35)
                    above.errorbar(mean, row, xerr=half, capsize=3, **style)
                    mean, half = interval(self.gap(pos, label, "early_curve"))
                    steps = (
                        (np.arange(len(mean)) + 0.5)
                        / len(mean)
                        * self.values(label, pos, "early_steps")[0]
                    )
                    below.plot(steps, mean, label=label, markevery=4, **style)
                    below.fill_between(
                        steps, mean - half, mean + half, color=style["color"], alpha=0.12, lw=0
                    )
            above.axvline(0, color="k", lw=1)
            above.set(
                title=f"{pos} positions",
                xlabel="loss - qkv's",
                yticks=range(len(labels)),
                yticklabels=labels,
            )
            above.locator_params(axis="x", nbins=3)
            above.set_ymargin(0.15)
            below.axhline(0, color="k", lw=1)
            below.set(xlabel="step (the first fifth)")
        above.invert_yaxis()
        axes[1, 0].set(ylabel="training loss - qkv's")

    def draw_frontier(self, figure):
        """The loss against what a token leaves behind, for every attention and its variants, which are named."""
        groups = [
            (pos, label)
            for pos, label in self.groups
            if {flag.partition("=")[0] for flag in label.split()[1:]} <= MEMORY
        ] or self.groups
        positions = multimode(pos for pos, label in groups)  # those with most groups
        attentions = unique(label.split()[0] for _, label in groups)
        for pos, panel in zip(
            positions, figure.subplots(1, len(positions), sharey=True, squeeze=False)[0]
        ):
            for label in (label for there, label in groups if there == pos):
                (attention, *variant), (mean, half) = (
                    label.split(),
                    interval(self.values(label, pos)),
                )
                x = self.values(label, pos, "remembered")[0] * 1.02 ** (
                    attentions.index(attention) - 2
                )
                colour, marker = STYLES[attention]
                panel.errorbar(
                    x,
                    mean,
                    half,
                    label=attention,
                    capsize=3,
                    color=colour,
                    marker=marker,
                    linestyle="none",
                )
                panel.annotate(
                    "\n".join(variant), (x, mean), (5, 3), textcoords="offset points", fontsize=6
                )
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter("{x:.0f}")
            panel.set(
                title=f"{pos} positions",
                xlabel="remembered per token and layer (moved apart)",
                xmargin=0.1,
            )
        figure.axes[0].set(ylabel="best validation loss (intervals of 95 %)")

    def draw_lengths(self, figure):
        """The losses in windows of several lengths; the points of a label stand a little apart from those of others."""
        positions, labels = map(
            unique, zip(*(group for group in self.groups if self.longer(*group)))
        )
        for pos, panel in zip(positions, figure.subplots(1, len(positions), squeeze=False)[0]):
            for number, label in enumerate(labels):
                if (pos, label) in self.groups and (losses := self.longer(pos, label)):
                    windows = np.array([*losses]) * 1.03 ** (number - (len(labels) - 1) / 2)
                    means, halves = zip(*map(interval, losses.values()))
                    panel.errorbar(
                        windows, means, halves, label=label, capsize=3, **self.style(label)
                    )
            panel.set_xscale("log", base=2)
            panel.set(
                title=f"{pos} positions (scales differ)",
                xlabel="tokens in a window",
                ylabel="loss",
                xticks=self.lengths,
                xticklabels=self.lengths,
            )


def draw(path, comparisons, method, height):
    """Draws comparisons one below the other, each with a legend for its panels; without any, an older picture goes."""
    if not comparisons:
        return path.unlink(missing_ok=True)
    figure = Figure(figsize=(10, height * len(comparisons)), layout="constrained")
    for comparison, part in zip(comparisons, np.atleast_1d(figure.subfigures(len(comparisons)))):
        part.suptitle(comparison.title)
        method(comparison, part)
        lines = {}
        for panel in part.axes:
            panel.grid(alpha=0.3)
            lines.update(zip(*reversed(panel.get_legend_handles_labels())))
        if lines:
            part.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=5)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def report(records, folder):
    """Writes all that to `folder`; of several records of one run the last counts. Raises UserError if there is none."""
    if not records:
        raise UserError(
            f"there is no finished run for {folder}/results.md; train some first: python tests/compare.py"
        )
    identity = "preset", "dataset", "pos", "attention", "seed", "flags"
    runs = {str([run[name] for name in identity]): run for run in records}
    settings = sorted({setting(run) for run in runs.values()})
    comparisons = [
        Comparison([run for run in runs.values() if setting(run) == one]) for one in settings
    ]
    text = "\n".join([MEANING, *(comparison.markdown() for comparison in comparisons)])
    lines = "[\n" + ",\n".join(json.dumps(run) for run in runs.values()) + "\n]\n"
    write_atomically(
        folder / "results.json", lambda temporary: temporary.write_text(lines, encoding="utf-8")
    )
    write_atomically(
        folder / "results.md", lambda temporary: temporary.write_text(text, encoding="utf-8")
    )
    compared = [
        one for one in comparisons if any(len(one.gap(*group)) > 1 for group in one.groups)
    ]  # intervals
    compared = [one for one in compared if not one.flags] or compared  # presets as they are, if any
    draw(folder / "results.png", compared, Comparison.draw_gaps, 7)
    draw(folder / "frontier.png", compared, Comparison.draw_frontier, 5.5)
    draw(
        folder / "lengths.png",
        [one for one in comparisons if one.lengths],
        Comparison.draw_lengths,
        4,
    )
    print(
        f"{text}\nruns: {len(runs)}; written to {folder}/: results.md, results.json and the figures"
    )


def write(records, args):
    """For the moment: the mean loss of each kind of run."""
    groups = {}
    for record in records:
        groups.setdefault(json.dumps(record["kind"]), []).append(record["final_val_loss"])
    for kind, losses in groups.items():
        print(f"{np.mean(losses):.4f} ({len(losses)} seeds) {kind}")

"""The figures of what finished runs show, each to be read in ten seconds at the width of a page.
`compare.py --report` draws them.

Colours are those of Okabe and Ito, which colour-blind people tell apart; markers say the same in
print. Every error bar or band is the 95 % interval of a mean over seeds.
"""

import itertools
import math

import numpy as np
import sweeps
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from report import like_qkv
from runs import attention_of, final_loss, key, label, loss_in_windows, place, setting
from stats import interval
from sweeps import CONTEXT, QKV, QKV_ROTATED, QV, QV_KA, kinds_of

from model import POSITIONS
from prepare import save_figure

COLOURS = {
    "qkv": "#000000",
    "gqa": "#E69F00",
    "mla": "#009E73",
    "qv": "#D55E00",
    "qv_ka": "#0072B2",
}
MARKERS = {"qkv": "o", "gqa": "s", "mla": "^", "qv": "v", "qv_ka": "D"}
LOSS = "validation loss (nats per token)"
MINUS_QKV = "{} loss minus that of\nQKV, rotated (nats per token)"
FOUR = (QKV, QKV_ROTATED, QV, QV_KA)


def style(kind):
    """An attention's colour and marker; those of variants are hollow."""
    colour = COLOURS.get(kind["attention"], "#CC79A7")
    is_variant = len(attention_of(kind)) > 1
    return dict(
        color=colour,
        marker=MARKERS.get(kind["attention"], "P"),
        markerfacecolor="white" if is_variant else colour,
        capsize=3,
        linewidth=1.5,
    )


def new_figure(height, panels=1):
    """A figure as wide as a page, and its panels, which share their loss axis."""
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    for panel in axes:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def add_legend(figure, axes):
    """One legend above all panels, with each name once, in the order of the alphabet."""
    entries = {}
    for panel in axes:
        handles, names = panel.get_legend_handles_labels()
        entries.update(zip(names, handles))
    names = sorted(entries)
    handles = [entries[name] for name in names]
    figure.legend(handles, names, loc="outside upper center", ncols=4)


def use_powers_of_two(panel, numbers):
    """A logarithmic axis with these numbers on it."""
    panel.set_xscale("log", base=2)
    panel.set_xticks(numbers, [str(number) for number in numbers])
    panel.minorticks_off()


def save(figure, path):
    save_figure(figure, path)
    return path


# --- Losses by positions --------------------------------------------------------------------------


def draw_positions(groups, path):
    """The losses of each attention, for each kind of positions. `groups` are (name of the
    positions, kind, losses)."""
    figure, axes = new_figure(4)
    positions = list(dict.fromkeys(pos for pos, *_ in groups))
    for number, pos in enumerate(positions):
        here = [(kind, losses) for there, kind, losses in groups if there == pos]
        for aside, (kind, losses) in enumerate(here):
            x = number + 0.15 * (aside - (len(here) - 1) / 2)
            mean, half = interval(losses)
            axes[0].errorbar(x, mean, half, label=label(kind), linestyle="none", **style(kind))
    axes[0].set_xticks(range(len(positions)), positions)
    axes[0].set_ylabel(LOSS)
    add_legend(figure, axes)
    return save(figure, path)


# --- Losses and memory ----------------------------------------------------------------------------


def draw_frontier(runs, kinds, path):
    """What each kind loses beside QKV, which is paired by seed, against what a token leaves behind,
    with its name beside it. Kinds that leave behind as much stand a little apart."""
    figure, (axes,) = new_figure(5)
    remembered = [runs.fact(kind, "remembered") for kind in kinds]
    points = []
    for number, kind in enumerate(kinds):
        before = remembered[:number].count(remembered[number])
        after = remembered[number + 1 :].count(remembered[number])
        x = remembered[number] * 1.02 ** (before - after)
        losses = runs.sums([(1, kind), (-1, like_qkv(kind))], final_loss, sweeps.seeds_of(kind))
        mean, half = interval(losses)
        axes.errorbar(x, mean, half, linestyle="none", **style(kind))
        points.append((x, mean, half, in_lines(label(kind))))
    use_powers_of_two(axes, [32, 64, 128, 256])
    axes.margins(x=0.16, y=0.12)
    axes.axhline(0, color="black", linewidth=1)
    axes.set(xlabel="numbers remembered per token and layer", ylabel=MINUS_QKV.format("validation"))
    place_names(figure, axes, points)
    return save(figure, path)


def in_lines(name):
    """A name with more than two parts, in two lines."""
    first, *rest = name.split(", ")
    return name if len(rest) < 2 else f"{first}, {rest[0]},\n{', '.join(rest[1:])}"


def place_names(figure, axes, points):
    """Writes a name beside each point (x, mean, half of the interval, name): where it covers
    nothing else, nor the line at zero, if it can."""
    axes.autoscale(False)
    figure.draw_without_rendering()
    inside = axes.get_window_extent()
    taken = [box_of_point(axes, *point[:3]) for point in points]
    _, zero = axes.transData.transform((1.0, 0.0))
    taken.append(Bbox.from_extents(inside.x0, zero - 2, inside.x1, zero + 2))
    for x, y, _, name in points:
        for shift in PLACES:
            pixels = axes.transData.transform((x, y)) + shift
            place = axes.transData.inverted().transform(pixels)
            side = "left" if shift[0] > 0 else "right"
            text = axes.text(*place, name, ha=side, va="center", fontsize=9)
            box = text.get_window_extent()
            fits = inside.x0 < box.x0 and box.x1 < inside.x1
            if fits and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:
            text = axes.text(*place, name, ha=side, va="center", fontsize=9)
        taken.append(text.get_window_extent())
        axes.plot([x, place[0]], [y, place[1]], color="0.6", linewidth=0.8, zorder=0)


def box_of_point(axes, x, mean, half):
    """What a marker and its error bar cover, in pixels."""
    half = 0 if np.isnan(half) else half
    left, below = axes.transData.transform((x, mean - half))
    right, above = axes.transData.transform((x, mean + half))
    return Bbox.from_extents(left - 6, below - 6, right + 6, above + 6)


# Where a name may stand, nearest first: how far to the right of its point and above it, in pixels.
ASIDE = (14, -14, 30, -30, 50, -50, 70, -70)
PLACES = sorted(itertools.product(ASIDE, range(-150, 151, 6)), key=lambda shift: math.hypot(*shift))


# --- Losses in longer windows ---------------------------------------------------------------------


def draw_lengths(runs, kinds, path):
    """The losses in windows of several lengths, a panel for each kind of positions."""
    positions = [pos for pos in POSITIONS if any(kind["pos"] == pos for kind in kinds)]
    figure, panels = new_figure(4, len(positions))
    for pos, panel in zip(positions, panels):
        for number, kind in enumerate(kind for kind in kinds if kind["pos"] == pos):
            lengths = sorted(map(int, runs.fact(kind, "val_loss_by_length")))
            losses = [runs.sums([(1, kind)], loss_in_windows(n)) for n in lengths]
            means, halves = zip(*map(interval, losses))
            aside = 1.04 ** (number - 1.5)
            x = [aside * length for length in lengths]
            panel.errorbar(x, means, halves, label=label(kind), **style(kind))
        use_powers_of_two(panel, lengths)
        panel.set(title=f"{pos} positions", xlabel=f"tokens in a window ({CONTEXT} in training)")
    panels[0].set_ylabel(LOSS)
    add_legend(figure, panels)
    return save(figure, path)


# --- Early in training ----------------------------------------------------------------------------


def first_fifth_of_curve(run):
    curve = np.array(run["curve"])
    return curve[: len(curve) // 5]


def draw_early(runs, kinds, path):
    """How the training losses of the first fifth of the steps differ from QKV's, a panel for each
    kind of positions. Of its points the first is left out, which varies far more than the rest."""
    positions = list(dict.fromkeys(kind["pos"] for kind in kinds))
    figure, panels = new_figure(3.5, len(positions))
    for pos, panel in zip(positions, panels):
        for number, kind in enumerate(kind for kind in kinds if kind["pos"] == pos):
            terms = [(1, kind), (-1, like_qkv(kind))]
            mean, half = interval(runs.sums(terms, first_fifth_of_curve, sweeps.seeds_of(kind)))
            total = runs.fact(kind, "steps")
            steps = (np.arange(len(mean)) + 0.5) * total / 5 / len(mean) + number - 1
            looks = dict(label=label(kind), **style(kind))
            panel.errorbar(steps[1:], mean[1:], half[1:], **looks)
        panel.axhline(0, color="black", linewidth=1)
        panel.set(title=f"{pos} positions", xlabel=f"step (of {total})")
    panels[0].set_ylabel(MINUS_QKV.format("training"))
    add_legend(figure, panels)
    return save(figure, path)


# --- All of them ----------------------------------------------------------------------------------


def is_beside_qkv(runs, kind):
    """Whether there are runs of a kind and of the QKV that it is compared with."""
    return bool(runs.sums([(1, kind), (-1, like_qkv(kind))], final_loss))


def draw_results(runs, first, folder):
    """Draws what results.md shows, as far as it is there; returns the paths of what was drawn."""
    drawn = []

    # All five kinds of positions; learned ones were seen first.
    groups = []
    for kind in kinds_of("learned", QKV, QV, QV_KA):
        groups.append(("learned\n(seen first)", kind, first.sums([(1, kind)], final_loss)))
    for kind in sorted(sweeps.FAMILY, key=place):
        groups.append((kind["pos"], kind, runs.sums([(1, kind)], final_loss)))
    groups = [group for group in groups if group[2]]
    if groups:
        drawn.append(draw_positions(groups, folder / "positions.png"))

    remembered = [kind for kind in sweeps.MEMORY if is_beside_qkv(runs, kind)]
    if remembered:
        drawn.append(draw_frontier(runs, remembered, folder / "frontier.png"))

    longest = loss_in_windows(8 * sweeps.CONTEXT)
    windows = kinds_of("rope", *FOUR) + kinds_of("rope+agf", *FOUR)
    windows = [kind for kind in windows if runs.values(kind, longest)]
    if windows:
        drawn.append(draw_lengths(runs, windows, folder / "lengths.png"))

    early = kinds_of("rope", QKV, QV, QV_KA) + kinds_of("rope+agf", QKV, QV, QV_KA)
    early = [kind for kind in early if is_beside_qkv(runs, kind)]
    if early:
        drawn.append(draw_early(runs, early, folder / "early.png"))
    return drawn


def draw_sweep(runs, folder):
    """Draws the losses of any runs of one setting, and those in longer windows; returns the paths
    of what was drawn."""
    drawn = []
    found = runs.kinds()
    if len({key(setting(kind)) for kind in found}) > 1:
        return drawn
    groups = [(kind["pos"], kind, runs.sums([(1, kind)], final_loss)) for kind in found]
    drawn.append(draw_positions(groups, folder / "positions.png"))
    longer = [kind for kind in found if runs.fact(kind, "val_loss_by_length")]
    if longer:
        drawn.append(draw_lengths(runs, longer, folder / "lengths.png"))
    return drawn

"""The runs that assets/results.md is made of: eight parts, in the order in which they are computed.

`compare.py --part=1` trains the runs of a part that are not there yet. A part is a list of sweeps,
and a sweep trains each of its kinds with each of its seeds. A kind is all that makes a run but its
seed: a dict of train.py's flags, as they are given. Nobody had seen a run of these seeds when the
claims of report.py were chosen.
"""

import json
from dataclasses import dataclass
from pathlib import Path

CPU = dict(preset="cpu", dataset="shakespeare_char")
STEPS, CONTEXT = 600, 64  # of that preset

# How fast attentions are beside QKV: what speeds.py has measured.
SPEEDS = Path(__file__).resolve().parents[2] / "assets" / "speeds.json"


@dataclass(frozen=True)
class Sweep:
    """Kinds of runs, the seeds of each, and in windows of how many times the context they are
    evaluated, too."""

    kinds: list
    seeds: range
    lengths: tuple = ()


def seeds(number):
    return range(2001, 2001 + number)


def kind_of(pos, attention, **flags):
    """The kind of run of an attention's own flags, its positions, and other flags."""
    return dict(CPU, **attention, pos=pos, **flags)


def kinds_of(pos, *attentions, **flags):
    return [kind_of(pos, attention, **flags) for attention in attentions]


# Attentions, as train.py's flags. MQA is GQA with one key and value for all heads.
QKV = dict(attention="qkv")
QKV_ROTATED = dict(attention="qkv", rope_values=True)
GQA = dict(attention="gqa")
GQA_ROTATED = dict(attention="gqa", rope_values=True)
MQA_ROTATED = dict(attention="gqa", n_kv_head=1, rope_values=True)
MLA = dict(attention="mla")
MLA_64 = dict(attention="mla", d_latent=64)
MLA_32 = dict(attention="mla", d_latent=32)
QV = dict(attention="qv")
QV_2 = dict(attention="qv", n_kv_head=2)
QV_1 = dict(attention="qv", n_kv_head=1)
QV_KA = dict(attention="qv_ka")
QV_KA_1 = dict(attention="qv_ka", n_kv_head=1)
QV_KA_32 = dict(attention="qv_ka", d_ctx=32)
QV_KA_32_2 = dict(attention="qv_ka", d_ctx=32, n_kv_head=2)
QV_KA_32_1 = dict(attention="qv_ka", d_ctx=32, n_kv_head=1)
DIAGONAL = dict(attention="qv_ka", wk="diagonal")
DIAGONAL_32_1 = dict(attention="qv_ka", wk="diagonal", d_ctx=32, n_kv_head=1)

FAMILY = [
    *kinds_of("sinusoidal", QKV, QV, QV_KA),
    *kinds_of("agf", QKV, QV, QV_KA),
    *kinds_of("rope", QKV, QKV_ROTATED, QV, QV_KA),
    *kinds_of("rope+agf", QKV, QKV_ROTATED, QV, QV_KA),
]

FRONTIER = [
    *kinds_of("rope+agf", GQA, GQA_ROTATED, MQA_ROTATED, MLA, MLA_32, MLA_64, QV_1, QV_2),
    *kinds_of("rope+agf", QV_KA_32, QV_KA_32_2, QV_KA_32_1, QV_KA_1, DIAGONAL_32_1, DIAGONAL),
    *kinds_of("agf", DIAGONAL),
    *kinds_of("rope", DIAGONAL),
]

# All that is compared by what it remembers.
MEMORY = [kind for kind in [*FAMILY, *FRONTIER] if kind["pos"] == "rope+agf"]

# What is compared in other settings, too: with more steps, another optimizer, model and text.
MAIN = [QKV_ROTATED, GQA_ROTATED, MQA_ROTATED, QV, QV_1, QV_KA, DIAGONAL]

MORE_STEPS = dict(max_steps=3 * STEPS)
LONGER = [
    *kinds_of("sinusoidal", QKV, QV, QV_KA, **MORE_STEPS),
    *kinds_of("rope+agf", *MAIN, **MORE_STEPS),
]

RATES = [
    *kinds_of("rope+agf", QKV_ROTATED, QV, QV_KA, learning_rate=0.005),
    *kinds_of("rope+agf", QKV_ROTATED, QV, QV_KA, learning_rate=0.02),
]

BY_ADAMW = dict(
    optimizer="adamw",
    max_steps=780,
    learning_rate=0.003,
    warmup_steps=200,
    weight_decay=0.1,
    beta2=0.98,
)
ADAMW = kinds_of("rope+agf", *MAIN, **BY_ADAMW)

# The rows of the first tables of results.md, and the seeds that they share.
TABLE = [
    QKV,
    QKV_ROTATED,
    GQA_ROTATED,
    MQA_ROTATED,
    MLA,
    QV,
    QV_1,
    QV_KA,
    DIAGONAL,
    QV_KA_32_1,
    DIAGONAL_32_1,
]
TABLE_SEEDS = seeds(10)

WINDOWS = [
    *kinds_of("rope", QKV, QKV_ROTATED, QV, QV_KA),
    *kinds_of("rope+agf", *TABLE),
]

LARGER_MODEL = dict(n_layer=6, n_head=6, n_embd=192, block_size=128, batch_size=16, max_steps=500)
LARGER = kinds_of("rope+agf", *MAIN, **LARGER_MODEL)

# The text that needs no download: the language reference of the Python at hand.
OTHER_TEXT = dict(dataset="pydoc")
OTHER = [
    *kinds_of("sinusoidal", QKV, QV, QV_KA, **OTHER_TEXT),
    *kinds_of("rope+agf", *MAIN, **OTHER_TEXT),
]


def read_speeds():
    """{"training": rows, "decoding": rows}, each row with an attention and its speed beside
    QKV's."""
    if not SPEEDS.exists():
        return {"training": [], "decoding": []}
    return json.loads(SPEEDS.read_text("utf-8"))


def equal_time():
    """The attentions of the first table under rope+agf, each with as many steps as take the time of
    QKV's 600: one for each training speed that was measured."""
    rows = read_speeds()["training"]
    others = [row for row in rows if row["attention"] != QKV]
    return [
        kind_of("rope+agf", row["attention"], max_steps=round(STEPS * row["speed"]))
        for row in others
    ]


PARTS = {
    1: [Sweep(FAMILY, seeds(20))],
    2: [Sweep(FRONTIER, seeds(10))],
    3: [Sweep(LONGER, seeds(10))],
    4: [Sweep(RATES, seeds(5)), Sweep(ADAMW, seeds(10))],
    5: [Sweep(WINDOWS, TABLE_SEEDS, lengths=(1, 2, 4, 8))],
    6: [Sweep(LARGER, seeds(5))],
    7: [Sweep(equal_time(), TABLE_SEEDS)],
    8: [Sweep(OTHER, TABLE_SEEDS)],
}


def seeds_of(kind, windows=False):
    """The seeds that the parts train this kind with, or, with windows, evaluate it in longer
    windows with."""
    found = set()
    for part in PARTS.values():
        for sweep in part:
            if kind in sweep.kinds and (sweep.lengths or not windows):
                found.update(sweep.seeds)
    return sorted(found)

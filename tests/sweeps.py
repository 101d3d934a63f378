"""The runs that assets/results.md is made of: seven parts, in the order in which they are computed.

`python tests/compare.py --part=1` trains the runs of a part that are not there yet. A part is a list of sweeps, and a
sweep trains each of its kinds with each of its seeds. A kind is a dict of train.py's flags; whatever it does not name
has the value of `--preset=cpu`. Nobody had seen a run of these seeds when the claims of report.py were chosen.
"""

import json
from dataclasses import dataclass
from pathlib import Path

PRESET, DATASET = "cpu", "shakespeare_char"
STEPS = 600  # of that preset
STEP_TIMES = Path(__file__).parents[1] / "assets" / "steps.json"


@dataclass(frozen=True)
class Sweep:
    """Kinds of runs, the seeds of each, and in windows of how many times the context they are evaluated, too."""

    kinds: list
    seeds: range
    lengths: tuple = ()


def seeds(number):
    return range(2001, 2001 + number)


def kinds(pos, *attentions, **flags):
    """The kinds of these attentions, each with its own flags and with those that all of them share."""
    return [dict(attention, pos=pos, **flags) for attention in attentions]


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
    *kinds("sinusoidal", QKV, QV, QV_KA),
    *kinds("agf", QKV, QV, QV_KA),
    *kinds("rope", QKV, QKV_ROTATED, QV, QV_KA),
    *kinds("rope+agf", QKV, QKV_ROTATED, QV, QV_KA),
]

FRONTIER = [
    *kinds("rope+agf", GQA, GQA_ROTATED, MQA_ROTATED, MLA, MLA_32, MLA_64, QV_1, QV_2),
    *kinds("rope+agf", QV_KA_32, QV_KA_32_2, QV_KA_32_1, QV_KA_1, DIAGONAL_32_1, DIAGONAL),
    *kinds("agf", DIAGONAL),
    *kinds("rope", DIAGONAL),
]

LONGER = [
    *kinds("sinusoidal", QKV, QV, QV_KA, max_steps=1800),
    *kinds("rope+agf", QKV_ROTATED, QV, QV_KA, DIAGONAL, MQA_ROTATED, max_steps=1800),
]

RATES = [
    *kinds("rope+agf", QKV_ROTATED, QV, QV_KA, learning_rate=0.005),
    *kinds("rope+agf", QKV_ROTATED, QV, QV_KA, learning_rate=0.02),
]

BY_ADAMW = dict(
    optimizer="adamw",
    max_steps=780,
    learning_rate=0.003,
    warmup_steps=200,
    weight_decay=0.1,
    beta2=0.98,
)
ADAMW = kinds("rope+agf", QKV_ROTATED, QV, QV_KA, **BY_ADAMW)

WINDOWS = [kind for kind in FAMILY if kind["pos"] in ("rope", "rope+agf")]

LARGER_MODEL = dict(n_layer=6, n_head=6, n_embd=192, block_size=128, batch_size=16, max_steps=500)
LARGER = kinds("rope+agf", QKV_ROTATED, QV, QV_KA, DIAGONAL, MQA_ROTATED, **LARGER_MODEL)


def equal_time():
    """Each attention of the first table under rope+agf, with as many steps as take the time of 600 steps of QKV.

    The step times are those that tests/steps.py has measured and stored; without them there is no such kind."""
    if not STEP_TIMES.exists():
        return []
    measured = json.loads(STEP_TIMES.read_text("utf-8"))["training"]
    found = []
    for row in measured:
        steps = round(STEPS / row["times_qkv"])
        if row["kind"] != QKV:
            found.append(dict(row["kind"], pos="rope+agf", max_steps=steps))
    return found


PARTS = {
    1: [Sweep(FAMILY, seeds(20))],
    2: [Sweep(FRONTIER, seeds(10))],
    3: [Sweep(LONGER, seeds(10))],
    4: [Sweep(RATES, seeds(5)), Sweep(ADAMW, seeds(10))],
    5: [Sweep(WINDOWS, seeds(10), lengths=(1, 2, 4, 8))],
    6: [Sweep(LARGER, seeds(5))],
    7: [Sweep(equal_time(), seeds(10))],
}

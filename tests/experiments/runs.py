"""Finished runs: what kinds there are, what they are called, and what is measured of each of them.

compare.py makes a record of each run, a dict. Its `kind` is all that makes the run but its seed:
preset, data set, attention, positions, and the flags that were given. Runs of one seed saw the same
batches, so kinds are compared seed by seed: such differences vary less than the losses do.
"""

from dataclasses import fields

import numpy as np

from model import ATTENTIONS, POSITIONS, GPTConfig

# --- Kinds of runs --------------------------------------------------------------------------------

# {a flag of the model: {another: the values that it needs}}. Such flags, and n_inner, which can
# make an attention as large as qkv, make a variant of an attention. All others make a setting,
# within which attentions are compared.
ONLY = {field.name: field.metadata["only"] for field in fields(GPTConfig)}
VARIANT = {*(name for name, needs in ONLY.items() if needs), "n_inner"}

# What attentions, and the flags of their variants, are called in tables and figures.
NAMES = {"qkv": "QKV", "gqa": "GQA", "mla": "MLA", "qv": "QV", "qv_ka": "QV-Ka"}
WORDS = {
    "n_kv_head": "{} values",
    "d_ctx": "context {}",
    "d_latent": "latent {}",
    "wk": "{} W_K",
    "rope_values": "rotated",
    "n_inner": "MLP {}",
}


def setting(kind):
    """What must be equal where attentions are compared; positions are not among it."""
    apart = VARIANT | {"attention", "pos"}
    return {name: value for name, value in kind.items() if name not in apart}


def attention_of(kind):
    """A kind's attention and the flags of its variant."""
    return {name: kind[name] for name in kind if name == "attention" or name in VARIANT}


def label(kind):
    """An attention and its variant in words, such as MQA, or QV, 1 value."""
    name = NAMES.get(kind["attention"], kind["attention"])
    in_order = [*WORDS, *sorted(VARIANT - WORDS.keys())]
    flags = {flag: kind[flag] for flag in in_order if flag in kind}
    if name == "GQA" and flags.get("n_kv_head") == 1:
        name = "MQA"
        del flags["n_kv_head"]
    words = [WORDS.get(flag, f"{flag}={{}}").format(value) for flag, value in flags.items()]
    return ", ".join([name, *words]).replace("1 values", "1 value")


def key(kind):
    return frozenset(kind.items())


def place(kind):
    """Where a kind stands in tables: positions and attentions in model.py's order, one's own ones
    last."""
    positions = [*POSITIONS, kind["pos"]]
    attentions = [*ATTENTIONS, kind["attention"]]
    return positions.index(kind["pos"]), attentions.index(kind["attention"]), label(kind)


# --- Runs, and measures of them -------------------------------------------------------------------


class Runs:
    """Finished runs, by their kinds and seeds. Of several records of one run the last counts."""

    def __init__(self, records):
        self.of = {}
        for record in records:
            self.of.setdefault(key(record["kind"]), {})[record["seed"]] = record

    def records(self):
        """All of them, sorted."""
        found = []
        for kind in self.kinds():
            by_seed = self.of[key(kind)]
            found += [by_seed[seed] for seed in sorted(by_seed)]
        return found

    def kinds(self):
        """The kinds that there are, in the order of tables."""
        return sorted((dict(kind) for kind in self.of), key=place)

    def values(self, kind, measure, seeds=None):
        """{seed: what is measured of its run}, of these seeds, or of all, as far as it was
        measured."""
        runs = self.of.get(key(kind), {})
        found = {seed: measure(run) for seed, run in runs.items() if seeds is None or seed in seeds}
        return {seed: number for seed, number in found.items() if number is not None}

    def sums(self, terms, measure, seeds=None):
        """The weighted sum of terms, (weight, kind), for each seed that all of them have."""
        parts = [(weight, self.values(kind, measure, seeds)) for weight, kind in terms]
        shared = set.intersection(*(set(values) for _, values in parts))
        return [sum(weight * values[seed] for weight, values in parts) for seed in sorted(shared)]

    def fact(self, kind, name):
        """What is the same in all runs of a kind, such as its number of weights; None without a
        run."""
        runs = self.of.get(key(kind), {}).values()
        return next((run[name] for run in runs), None)


def final_loss(run):
    return run["final_val_loss"]


def best_loss(run):
    """The lowest loss of all evaluations of the whole split."""
    return run["best_val_loss"]


def early_loss(run):
    """The mean training loss of the first fifth of the steps."""
    return run["early_loss"]


def loss_in_windows(length):
    """The measure of the loss in windows of so many tokens."""
    return lambda run: run["val_loss_by_length"].get(str(length))


def mean_loss_of_first(steps, run):
    """The mean training loss of a run's first steps; their number need not be whole."""
    curve = run["curve"]
    sums = np.append(0, np.cumsum(curve)) * run["steps"] / len(curve)
    grid = np.linspace(0, run["steps"], len(sums))
    return float(np.interp(steps, grid, sums)) / steps

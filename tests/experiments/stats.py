"""Statistics over seeds: how far a mean of few runs can be trusted. By numpy alone; tests hold it
against tables."""

import functools
import math

import numpy as np


@functools.cache
def student(n):
    """Student's t for n values, as two arrays: sizes of t, and the chance that a larger one, of
    either sign, comes up where there is no difference. With t = sqrt(n - 1) tan(x), the density of
    x is proportional to cos(x)^(n - 2)."""
    pieces = 100_000
    x = (np.arange(pieces) + 0.5) * (math.pi / 2 / pieces)
    density = np.cos(x) ** (n - 2)
    below = (np.cumsum(density) - density / 2) / density.sum()
    return math.sqrt(n - 1) * np.tan(x), 1 - below


def interval(values):
    """The mean of numbers or arrays, one for each seed, and half the width of its 95 % interval;
    nan for one seed."""
    n = len(values)
    mean = np.mean(values, axis=0)
    if n == 1:
        return mean, math.nan * mean
    t, chance_beyond = student(n)
    t_95 = np.interp(-0.05, -chance_beyond, t)
    return mean, t_95 * np.std(values, axis=0, ddof=1) / math.sqrt(n)


def p_value(values):
    """How likely a mean as far from zero is where there is no difference."""
    n, deviation = len(values), np.std(values, ddof=1)
    if deviation == 0:
        return float(np.mean(values) == 0)
    t, chance_beyond = student(n)
    size = abs(np.mean(values)) / deviation * math.sqrt(n)
    return float(np.interp(size, t, chance_beyond))


def holm(p_values):
    """Holm's correction for many tests: each p value, times the number of those that are not
    smaller."""
    order = np.argsort(p_values)
    times = np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.maximum.accumulate(np.array(p_values)[order] * times)
    return corrected

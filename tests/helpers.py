"""What the tests of model.py share: the attentions and positions to test, and small models."""

from itertools import product

import pytest
import torch

from model import ATTENTIONS, GPT, POSITIONS, GPTConfig

SMALL = {"block_size": 24, "vocab_size": 31, "n_layer": 2, "n_head": 4, "n_embd": 32}

# The five attentions, and what flags make of them. A test's `attention` is one of these names.
VARIANTS = {name: {"attention": name} for name in ATTENTIONS} | {
    "qkv, rotated values": {"attention": "qkv", "rope_values": True},
    "gqa, rotated values": {"attention": "gqa", "rope_values": True},
    "mqa": {"attention": "gqa", "n_kv_head": 1},
    "qv, one value": {"attention": "qv", "n_kv_head": 1},
    "qv, two values": {"attention": "qv", "n_kv_head": 2},
    "qv_ka, one value": {"attention": "qv_ka", "n_kv_head": 1},
    "qv_ka, two values": {"attention": "qv_ka", "n_kv_head": 2},
    "qv_ka, shared": {"attention": "qv_ka", "wk": "shared"},
    "qv_ka, diagonal": {"attention": "qv_ka", "wk": "diagonal"},
    "qv_ka, diagonal, one value": {"attention": "qv_ka", "wk": "diagonal", "n_kv_head": 1},
}

# All attentions with all positions; and what flags make of them with some positions each.
EVERY = list(product([*ATTENTIONS, "qv_ka, diagonal"], POSITIONS))
SOME = [
    ("qkv, rotated values", "rope"),
    ("qkv, rotated values", "rope+agf"),
    ("gqa, rotated values", "rope"),
    ("gqa, rotated values", "rope+agf"),
    ("mqa", "agf"),
    ("mqa", "rope+agf"),
    ("qv, one value", "learned"),
    ("qv, one value", "rope"),
    ("qv, two values", "agf"),
    ("qv, two values", "rope+agf"),
    ("qv_ka, one value", "rope"),
    ("qv_ka, one value", "agf"),
    ("qv_ka, two values", "sinusoidal"),
    ("qv_ka, two values", "rope+agf"),
    ("qv_ka, shared", "agf"),
    ("qv_ka, shared", "rope"),
    ("qv_ka, diagonal, one value", "agf"),
    ("qv_ka, diagonal, one value", "rope+agf"),
]
CASES = pytest.mark.parametrize("attention,pos", EVERY + SOME)

# Those that are written out as formulas. A fork has more attentions: these are in CASES, too.
OURS = ("qkv", "gqa", "mla", "qv", "qv_ka")
FORMULAS = pytest.mark.parametrize(
    "attention,pos",
    [case for case in EVERY + SOME if VARIANTS[case[0]]["attention"] in OURS],
)

# Each attention once, and each kind of positions: for slow tests.
FEW = pytest.mark.parametrize(
    "attention,pos",
    [
        ("qkv", "learned"),
        ("gqa, rotated values", "rope+agf"),
        ("mla", "rope"),
        ("qv", "sinusoidal"),
        ("qv_ka", "agf"),
        ("qv_ka, diagonal", "rope+agf"),
    ],
)


def config(attention, pos, **changes):
    """The configuration of a small model; `attention` is one of VARIANTS, or one of its own."""
    variant = VARIANTS.get(attention, {"attention": attention})
    return GPTConfig(pos=pos, **{**SMALL, **variant, **changes})


def small(attention, pos, **changes):
    """A small model in float64, in which only mistakes make a difference of 1e-10."""
    torch.manual_seed(0)
    return GPT(config(attention, pos, **changes)).double().eval()


def tokens(*shape, vocab_size=SMALL["vocab_size"]):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


def vectors(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def logits(model, idx):
    """Logits (B, T, V) at every position, without a cache."""
    return model(idx, idx)[0]


def cached_logits(model, idx, chunks):
    """The same, reading idx in chunks of these sizes into a cache."""
    cache = model.new_cache()
    return torch.cat([model(part, part, cache=cache)[0] for part in idx.split(chunks, dim=1)], 1)


def assert_equal_functions(one, other):
    """Asserts that two models give the same logits, without a cache and with one."""
    idx = tokens(2, 24)
    expected = logits(other, idx)
    torch.testing.assert_close(logits(one, idx), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        cached_logits(one, idx, [5, 1, 18]), expected, rtol=1e-10, atol=1e-12
    )


def attention_weights(attention, x, start=0):
    """The weights (B, T, H, S) of the last tokens of x (B, S, C), from `start` on: what attention
    answers where the values are the rows of the identity."""
    memory = attention.write(x, 0)
    pairs, v = attention.read(attention.query(x[:, start:]), memory, start)
    identity = torch.eye(v.size(1)).type_as(v)[None, :, None]
    return attention.attend(pairs, identity.expand(len(x), -1, v.size(2), -1))

"""Every attention with every kind of positions: formulas, what may be seen, what equals what."""

import math

import pytest
import torch
from helpers import (
    CASES,
    FORMULAS,
    OURS,
    POSITIONS,
    assert_equal_functions,
    attention_weights,
    logits,
    small,
    tokens,
    vectors,
)

from model import ATTENTIONS

# The formulas, pair by pair of positions ----------------------------------------------------------


def rotate(x, by):
    """RoPE on x (..., width) by complex numbers: pair k times exp(i `by` theta_k)."""
    theta = 10000.0 ** (-torch.arange(0, x.size(-1), 2).double() / x.size(-1))
    rotated = torch.complex(*x.chunk(2, dim=-1)) * torch.exp(1j * by[..., None] * theta)
    return torch.cat([rotated.real, rotated.imag], dim=-1)


def complex_product(w, x):
    """w of a real and an imaginary part (..., width / 2), x (..., width): pairs as above."""
    product = torch.complex(*w) * torch.complex(*x.chunk(2, dim=-1))
    return torch.cat([product.real, product.imag], dim=-1)


def textbook(attention, x, config):
    """One sequence x (T, C) to (T, C):

        y_i = sum_j softmax_j(q_i . k_ij / sqrt(width of q) - a log(1 + i - j)) v_ij

    with the key k_ij and the value v_ij that token j shows to token i."""
    a, name, T = attention, config.attention, len(x)
    H, D = a.n_head, a.d_head
    behind = torch.arange(T).double() - torch.arange(T).double()[:, None]  # (i, j): j - i

    def shown(m):
        """What is remembered of token j, m (j, heads, width), as token i sees it: (i, j, ..)."""
        return m.expand(T, *m.shape)

    def shown_rotated(m):
        return rotate(shown(m), behind[:, :, None]) if "rope" in config.pos else shown(m)

    def for_each_head(m):
        return m.repeat_interleave(H // m.size(-2), dim=-2)

    q = (x @ a.q.weight.T).view(T, H, -1)
    if name in ("qkv", "gqa"):
        k, v = ((x @ w.weight.T).view(T, -1, D) for w in (a.k, a.v))
        k = shown_rotated(k)
        v = shown_rotated(v) if config.rope_values else shown(v)
    if name == "mla":
        c, r = (x @ a.down.weight.T).split(a.widths, dim=-1)
        c = c / (c.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        k, v = (shown(torch.einsum("jl,hld->jhd", c, up)) for up in (a.up_k, a.up_v))
        k = torch.cat([k, for_each_head(shown_rotated(r[:, None]))], dim=-1)
    if name in ("qv", "qv_ka"):
        k = v = for_each_head(shown_rotated((x @ a.v.weight.T).view(T, -1, D)))
    if name == "qv_ka":
        width = a.d_ctx if config.pos in ("learned", "sinusoidal", "agf") else D
        g = shown_rotated((x @ a.ctx.weight.T).view(T, -1, width))  # under rope in pieces
        g = for_each_head(g.flatten(2)[:, :, None])
        memory = torch.cat([g, v], dim=-1)  # (i, j, h, E + D)
        if config.wk == "diagonal":
            weights = a.w_k.unflatten(1, (2, -1)).unbind(1)  # real, imaginary: (H, pieces, D / 2)
            k = complex_product(weights, memory.unflatten(-1, (-1, D))).sum(-2)
        else:
            k = torch.einsum("ijhe,hed->ijhd", memory, a.w_k.expand(H, -1, -1))
    score = torch.einsum("ihd,ijhd->hij", q, for_each_head(k)) / math.sqrt(q.size(-1))
    weight = score.exp()
    if "agf" in config.pos:
        weight = weight * (1 + behind.abs()) ** -a.decay.log_a.exp()[:, None, None]
    weight = weight.tril()
    weight = weight / weight.sum(-1, keepdim=True)
    y = torch.einsum("hij,ijhd->ihd", weight, for_each_head(v))
    return y.flatten(1) @ a.out.weight.T


@FORMULAS
def test_attention_is_the_textbooks(attention, pos):
    model = small(attention, pos)
    module, x = model.blocks[0].attention, vectors(2, 17, 32)
    expected = torch.stack([textbook(module, row, model.config.resolve()) for row in x])
    # Angles and logarithms of distances are kept in float32.
    tolerance = 1e-10 if pos in ("learned", "sinusoidal") else 1e-6
    torch.testing.assert_close(module(x), expected, rtol=tolerance, atol=tolerance)


def test_agf_is_a_power_law_of_distance():
    """With queries of zero nothing else counts."""
    module = small("qkv", "agf", n_head=2).blocks[0].attention
    module.q.weight.data.zero_()
    module.decay.log_a.data = torch.tensor([1.0, 2.0]).double().log()
    weights = attention_weights(module, vectors(1, 3, 32))[0, 2]  # of the third token
    expected = torch.tensor([[1 / 3, 1 / 2, 1], [1 / 9, 1 / 4, 1]]).double()
    torch.testing.assert_close(weights, expected / expected.sum(1, keepdim=True), rtol=1e-6, atol=0)


def test_decay_starts_between_a_quarter_and_four():
    a = small("qv", "agf").blocks[0].attention.decay.exponents()
    torch.testing.assert_close(a[[0, -1]], torch.tensor([0.25, 4.0]).double())
    torch.testing.assert_close(a[1:] / a[:-1], (a[1] / a[0]).expand(3))


# What may be seen ---------------------------------------------------------------------------------


@CASES
def test_no_token_sees_a_later_one(attention, pos):
    model, idx = small(attention, pos), tokens(1, 24)
    changed = idx.clone()
    changed[0, 13] = (changed[0, 13] + 1) % 31
    before, after = logits(model, idx), logits(model, changed)
    assert torch.equal(before[:, :13], after[:, :13])
    assert (before[:, 13:] != after[:, 13:]).any(dim=-1).all(), "a later token must see the change"


@CASES
def test_gradient_reaches_every_parameter(attention, pos):
    model, idx = small(attention, pos), tokens(2, 24)
    model(idx, idx.roll(-1, dims=1))[1].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any(), name


# What equals what ---------------------------------------------------------------------------------


def rename(model, changes):
    """The weights of a model under other names: {end of a name: the end that it gets}."""
    state = {}
    for name, weights in model.state_dict().items():
        for old, new in changes.items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        state[name] = weights
    return state


@pytest.mark.parametrize("pos", POSITIONS)
@pytest.mark.parametrize("G", [1, 2, 4])
def test_qv_is_gqa_whose_key_is_its_value(pos, G):
    """With values rotated, where there are rotations."""
    qv = small("qv", pos, n_kv_head=G)
    gqa = small("gqa", pos, n_kv_head=G, rope_values="rope" in pos)
    gqa.load_state_dict(qv.state_dict() | rename(qv, {"attention.v.weight": "attention.k.weight"}))
    assert_equal_functions(gqa, qv)


@pytest.mark.parametrize("pos", POSITIONS)
@pytest.mark.parametrize("G", [1, 4])
@pytest.mark.parametrize("wk", ["per_head", "shared", "diagonal"])
def test_qv_ka_that_ignores_the_context_is_qv(pos, G, wk):
    """W_K is [0 ; I]; a diagonal one has 0 for the contexts and 1 for the value."""
    qv, qv_ka = small("qv", pos, n_kv_head=G), small("qv_ka", pos, n_kv_head=G, wk=wk)
    qv_ka.load_state_dict(qv.state_dict(), strict=False)
    for block in qv_ka.blocks:
        w_k = block.attention.w_k.data
        w_k.zero_()
        if wk == "diagonal":
            w_k[:, 2] = 1.0  # of 3 real and 3 imaginary parts, the value's real part
        else:
            w_k[:, 16:] = torch.eye(8)
    assert_equal_functions(qv_ka, qv)


@pytest.mark.parametrize("pos", POSITIONS)
@pytest.mark.parametrize("wk", ["per_head", "diagonal"])
def test_shared_values_are_equal_values(pos, wk):
    """Two values that serve two heads each are four values of which some are equal."""
    shared, full = small("qv_ka", pos, n_kv_head=2, wk=wk), small("qv_ka", pos, wk=wk)
    state = shared.state_dict()
    for name in state:
        if name.endswith("attention.v.weight"):
            state[name] = state[name].view(2, 1, 8, 32).expand(-1, 2, -1, -1).reshape(32, 32)
    full.load_state_dict(state)
    assert_equal_functions(shared, full)


@pytest.mark.parametrize("pos", POSITIONS)
def test_a_shared_wk_is_every_heads_wk(pos):
    shared, per_head = small("qv_ka", pos, wk="shared"), small("qv_ka", pos)
    state = shared.state_dict()
    for name in state:
        if name.endswith("w_k"):
            state[name] = state[name].expand(4, -1, -1)
    per_head.load_state_dict(state)
    assert_equal_functions(shared, per_head)


@pytest.mark.parametrize("pos", ["learned", "sinusoidal", "agf"])
def test_a_diagonal_wk_is_a_matrix_of_diagonals(pos):
    """(a + ib)(x + iy): the real part of the product takes a x - b y, the imaginary b x + a y."""
    diagonal, dense = small("qv_ka", pos, wk="diagonal"), small("qv_ka", pos)
    state = diagonal.state_dict()
    for name in state:
        if name.endswith("w_k"):
            real, imag = (part.diag_embed() for part in state[name].chunk(2, dim=1))
            rows = [torch.cat([real, imag], dim=-1), torch.cat([-imag, real], dim=-1)]
            state[name] = torch.cat(rows, dim=-2).flatten(1, 2)  # (H, E + D, D)
    dense.load_state_dict(state)
    assert_equal_functions(diagonal, dense)


@pytest.mark.parametrize("pos", POSITIONS)
@pytest.mark.parametrize("attention", ["gqa", "mla", "qv_ka"])
def test_other_widths(attention, pos):
    d_ctx = 48 if "rope" in pos else 10
    sizes = {"n_kv_head": 1, "d_latent": 5, "d_rope": 6, "d_ctx": d_ctx, "n_inner": 17, "n_head": 2}
    model = small(attention, pos, **sizes)
    assert_equal_functions(model, model)


def test_the_switch_lists_five_attentions_and_five_positions():
    assert set(ATTENTIONS) >= set(OURS)
    assert list(POSITIONS) == ["learned", "sinusoidal", "rope", "agf", "rope+agf"]

"""Causal attention in one fused kernel: with keys or without, and with a power law of distance.

    s_ij = scale (q_i . k_j + q_ctx_i . g_j) - a_h log(1 + i - j)
    p_ij = softmax over j <= i of s_ij
    o_i  = sum_j p_ij v_j

The second product and the last term are there only if asked for, and scale is 1 / sqrt(D) unless
another one is given. A context g_j is a key that all heads share. The value v_j may be the key,
too: then no k exists, and a tile of V, once loaded, serves both products. So this is every
attention of model.py:

    qkv, gqa   attention(q, v, k)
    mla        attention(q, v, k), under rope with q_ctx and ctx for its rotary key
    qv         attention(q, v)
    qv_ka      attention(q, v, k) with keys [g; v] W_K that were made before; or, where they cannot
               be made, attention(q_v, v, q_ctx=q_ctx, ctx=g) with the query [q_ctx; q_v] = q W_K^T

The softmax is computed tile by tile and no score leaves the chip (FlashAttention, arXiv:2205.14135
and 2307.08691). What is saved for the backward pass is o and lse_i = log sum_j exp(s_ij), from
which p_ij = exp(s_ij - lse_i) is computed again. With delta_i = dO_i . o_i,

    ds_ij    = scale p_ij (dO_i . v_j - delta_i)     the gradient of the products, q_i . k_j + ...
    dq_i     = sum_j ds_ij k_j
    dq_ctx_i = sum_j ds_ij g_j
    dv_j     = sum_i p_ij dO_i
    dk_j     = sum_i ds_ij q_i                       added to dv_j where the value is the key
    dg_j     = sum_h sum_i ds_ij q_ctx_i
    da_h     = - sum_ij ds_ij log(1 + i - j) / scale

Backward is two kernels, one for sums over tokens j, one for sums over queries i. They compute 7
products of tiles where one kernel would compute 5, but each number is summed by one program in a
fixed order, without atomics, and is the same in every run.

Letters: B batch, T queries (the last T of the S tokens), S remembered tokens, H heads, G heads of
keys and values (query head h asks head h // (H / G)), D head width, K width of the keys (D, or 0
where the value is the key), E width of the contexts (0: there are none); M x N is a tile: M queries
by N tokens. A GPU's exponential has base 2, so of exponents the kernels keep

    log2(e) s_ij = scale2 (q_i . k_j + q_ctx_i . g_j - a log2(1 + i - j))

with scale2 = log2(e) scale and a = a_h / scale2: one multiply-add for the distance, and one for
what the exponential takes.

    python kernel.py      time and memory, by tests/experiments/benchmark.py; without a GPU, what
                          the compiler made
"""

from __future__ import annotations  # so that no `tl` is looked for where Triton is missing

import functools
import math
import os
import sys

import torch

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError:  # importing this file always works; calls say what is missing
    triton = None


def jit(function):
    """triton.jit, for which a size that changes from call to call is no reason to compile anew.
    (Triton would, for a size of 1 and for multiples of 16.)"""
    if triton is None:
        return function
    return triton.jit(function, do_not_specialize=("T", "S", "H", "G"))


def attention_plain(q, v, k=None, q_ctx=None, ctx=None, decay=None, scale=None):
    """`attention` in plain PyTorch, with all T x S scores in memory: what the kernels compute."""
    (_, T, H, D), (S, G) = q.shape, v.shape[1:3]
    v = v.repeat_interleave(H // G, dim=2)  # (B, S, H, D)
    k = v if k is None else k.repeat_interleave(H // G, dim=2)
    s = torch.einsum("bthd,bshd->bhts", q, k)
    if ctx is not None:
        s = s + torch.einsum("bthe,bse->bhts", q_ctx, ctx)
    s = s * (D**-0.5 if scale is None else scale)
    position = torch.arange(S, device=q.device)
    distance = position[S - T :, None] - position  # (T, S)
    if decay is not None:
        s = s - decay[:, None, None] * torch.log1p(distance.clamp(min=0).to(s.dtype))
    p = s.masked_fill(distance < 0, -math.inf).softmax(-1)  # (B, H, T, S)
    return torch.einsum("bhts,bshd->bthd", p, v)


def decode_plain(q, v, q_ctx=None, ctx=None, decay=None, lengths=None):
    """`decode` likewise, one sequence after the other."""
    lengths = [v.size(1)] * len(v) if lengths is None else lengths.tolist()
    outs = []
    for b, n in enumerate(lengths):
        sequence = slice(b, b + 1)
        q_b, v_b = q[sequence], v[sequence, :n]
        q_ctx_b = None if ctx is None else q_ctx[sequence]
        ctx_b = None if ctx is None else ctx[sequence, :n]
        outs.append(attention_plain(q_b, v_b, q_ctx=q_ctx_b, ctx=ctx_b, decay=decay))
    return torch.cat(outs)  # (B, 1, H, D)


# -----------------------------------------------------------------------------
# Pieces of the kernels. A tensor (B, rows, heads, width) reaches them as a tuple: its pointer, and
# the strides of its sequences, rows and heads. A context, (B, rows, width), has one head, number 0.
# What was not given is None, all through. Positions are floats, exact ones: to convert integers,
# tile after tile, is slow on a GPU.


@jit
def sequence_and_head(H):
    """Those that a program is for: the first axis of the grid has B H programs."""
    program = tl.program_id(0).to(tl.int64)
    return program // H, program % H


@jit
def rows(x, b, h, start, R: tl.constexpr, W: tl.constexpr, HEADS: tl.constexpr):
    """Pointers to R rows of HEADS heads side by side, (R, HEADS W)."""
    pointer, x_b, x_row, x_h = x
    row = tl.cast(start, tl.int64) + tl.arange(0, R)[:, None]
    column = tl.arange(0, HEADS * W).to(tl.int64)[None, :]
    if HEADS > 1:
        column = column // W * x_h + column % W
    return pointer + b * x_b + row * x_row + h * x_h + column


@jit
def load(x, b, h, start, stop, R: tl.constexpr, W: tl.constexpr,
         EDGE: tl.constexpr = True, HEADS: tl.constexpr = 1):  # fmt: skip
    """A tile of R rows from `start` on, (R, HEADS W); at a tensor's EDGE, 0 from `stop` on."""
    at = rows(x, b, h, start, R, W, HEADS)
    if EDGE:
        tile = tl.load(at, mask=start + tl.arange(0, R)[:, None] < stop, other=0.0)
    else:
        tile = tl.load(at)
    return tile


@jit
def store(x, tile, b, h, start, stop, R: tl.constexpr, W: tl.constexpr):
    """Writes a tile's rows below `stop`."""
    inside = start + tl.arange(0, R)[:, None] < stop
    tl.store(rows(x, b, h, start, R, W, 1), tile, mask=inside)


@jit
def dot(x, y, acc):
    """acc + x y: a product in y's precision (float32 is not cut to TF32), summed in float32."""
    return tl.dot(x.to(y.dtype), y, acc, input_precision="ieee")


# TRITON_INTERPRET=1, set before the first import of triton, runs the kernels on the CPU. All of
# triton's functions are of another kind then.
if triton:
    INTERPRETED = tl.constexpr(not isinstance(tl.sum, triton.JITFunction))
    LOG2_E = tl.constexpr(math.log2(math.e))


@jit
def scores(x, y, x_ctx, y_ctx, span, a, MASK: tl.constexpr):
    """log2(e) s_ij / scale2 of a tile; and, under decay, log2 of its spans, 1 + i - j.
    x are queries and y tokens, or the other way round. Without MASK no query meets the future."""
    s = None if x_ctx is None else dot(x_ctx, tl.trans(y_ctx), None)
    s = dot(x, tl.trans(y), s)
    log_span = 0.0
    if a is not None:
        past = tl.maximum(span, 1.0) if MASK else span
        # fast_log2f is one instruction, right to 2^-22; tl.log2 takes twenty for the last bits.
        log_span = tl.log2(past) if INTERPRETED else libdevice.fast_log2f(past)
        s -= a * log_span
    if MASK:
        s = tl.where(span > 0, s, -float("inf"))
    return s, log_span


@jit
def attend(acc, l_i, m_i, s, v_tile, scale2):
    """Adds N tokens to a running softmax over M rows: acc (M, D) is the weighted sum of the values
    so far, l_i (M, 1) the sum of the weights, and m_i (M, 1) the largest exponent."""
    m_new = tl.maximum(m_i, tl.max(s, 1, keep_dims=True) * scale2)
    p = tl.exp2(s * scale2 - m_new)
    alpha = tl.exp2(m_i - m_new)
    return dot(p, v_tile, acc * alpha), l_i * alpha + tl.sum(p, 1, keep_dims=True), m_new


# -----------------------------------------------------------------------------
# Forward: one program for each head and M queries, which walks over the tokens that they see.
# Loops are compiled twice: with masks for the tiles on the diagonal, then without for the FULL
# ones, which all queries see. (In the other order, the compiler has Hopper's tensor cores wait
# after each single product.)


@jit
def forward_kernel(inputs, T, S, H, G, scale, out, lse,
                   D: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
                   M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    q, v, k, q_ctx, ctx, decay = inputs
    scale2 = scale * LOG2_E
    b, h = sequence_and_head(H)
    kv_head = h // (H // G)
    a = None if decay is None else tl.load(decay + h).to(tl.float32) / scale2
    t0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * M  # those that see most tokens start first
    i = S - T + t0 + tl.arange(0, M).to(tl.float32)[:, None]
    q_tile = load(q, b, h, t0, T, M, D)  # (M, D)
    q_ctx_tile = None if ctx is None else load(q_ctx, b, h, t0, T, M, E)  # (M, E)
    acc = tl.zeros([M, D], tl.float32)
    l_i = tl.zeros([M, 1], tl.float32)
    m_i = tl.full([M, 1], -float("inf"), tl.float32)
    edge = (S - T + t0) // N * N  # all M queries see all tokens before it
    end = tl.minimum(S - T + t0 + M, S)
    for FULL in tl.static_range(2):
        for j0 in range(0 if FULL else edge, edge if FULL else end, N):
            v_tile = load(v, b, kv_head, j0, S, N, D, not FULL)  # (N, D), the only load of V
            k_tile = v_tile if k is None else load(k, b, kv_head, j0, S, N, K, not FULL)
            ctx_tile = None if ctx is None else load(ctx, b, 0, j0, S, N, E, not FULL)  # (N, E)
            span = 1 + i - j0 - tl.arange(0, N).to(tl.float32)[None, :]  # (M, N)
            s, _ = scores(q_tile, k_tile, q_ctx_tile, ctx_tile, span, a, not FULL)
            acc, l_i, m_i = attend(acc, l_i, m_i, s, v_tile, scale2)
    store(out, acc / l_i, b, h, t0, T, M, D)
    store(lse, m_i + tl.log2(l_i), b, h, t0, T, M, 1)  # in base 2


# -----------------------------------------------------------------------------
# Backward: scale delta, then the tokens' gradients by programs that each own N tokens of a query
# head, then the queries' by programs like forward's. What several heads share gets a gradient from
# each of them: summed in PyTorch. `rest` is lse beside scale delta, (M, 2): where a tile has fewer
# numbers than a program has threads, Triton 3.6 loads each of them many times.


@jit
def delta_kernel(out, d_out, lse, rest, T, H, scale, D: tl.constexpr, M: tl.constexpr):
    b, h = sequence_and_head(H)
    t0 = tl.program_id(1) * M
    o = load(out, b, h, t0, T, M, D).to(tl.float32)
    delta = tl.sum(o * load(d_out, b, h, t0, T, M, D).to(tl.float32), 1)  # (M,)
    lse_tile = tl.reshape(load(lse, b, h, t0, T, M, 1), (M,))
    store(rest, tl.join(lse_tile, scale * delta), b, h, t0, T, M, 2)


@jit
def token_backward_kernel(inputs, T, S, H, G, scale, d_out, rest, d_v, d_k, d_ctx,
                          D: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
                          M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """Scores lie on their side here, (N, M), so that p and ds come out of one product as the next
    one needs them. Queries from T on add nothing: their dO and delta are 0, and their p is at most
    1, as their q and lse are 0 and a_h > 0."""
    q, v, k, q_ctx, ctx, decay = inputs
    scale2 = scale * LOG2_E
    b, h = sequence_and_head(H)
    kv_head = h // (H // G)
    a = None if decay is None else tl.load(decay + h).to(tl.float32) / scale2
    j0 = tl.program_id(1) * N
    j = j0 + tl.arange(0, N).to(tl.float32)[:, None]
    v_tile = load(v, b, kv_head, j0, S, N, D)  # (N, D)
    k_tile = v_tile if k is None else load(k, b, kv_head, j0, S, N, K)
    ctx_tile = None if ctx is None else load(ctx, b, 0, j0, S, N, E)  # (N, E)
    d_v_tile = tl.zeros([N, D], tl.float32)
    d_k_tile = None if k is None else tl.zeros([N, K], tl.float32)
    d_ctx_tile = None if ctx is None else tl.zeros([N, E], tl.float32)
    start = tl.maximum(j0 - (S - T), 0) // M * M  # here queries begin to see some of the N tokens
    edge = tl.cdiv(tl.maximum(j0 + N - 1 - (S - T), 0), M) * M  # and here all of them
    edge = tl.minimum(edge, tl.cdiv(T, M) * M)
    for FULL in tl.static_range(2):
        for t0 in range(edge if FULL else start, T if FULL else edge, M):
            q_tile = load(q, b, h, t0, T, M, D)  # (M, D)
            q_ctx_tile = None if ctx is None else load(q_ctx, b, h, t0, T, M, E)  # (M, E)
            d_out_tile = load(d_out, b, h, t0, T, M, D)  # (M, D)
            lse, scaled_delta = tl.split(load(rest, b, h, t0, T, M, 2))  # (M,)
            span = 1 + S - T + t0 + tl.arange(0, M).to(tl.float32)[None, :] - j  # (N, M)
            s, _ = scores(k_tile, q_tile, ctx_tile, q_ctx_tile, span, a, not FULL)
            p = tl.exp2(s * scale2 - lse[None, :])
            d_v_tile = dot(p, d_out_tile, d_v_tile)
            d_p = dot(v_tile, tl.trans(d_out_tile), None)
            ds = p * (d_p * scale - scaled_delta[None, :])
            if k is None:
                d_v_tile = dot(ds, q_tile, d_v_tile)  # as a key, in the same sum
            else:
                d_k_tile = dot(ds, q_tile, d_k_tile)
            if ctx is not None:
                d_ctx_tile = dot(ds, q_ctx_tile, d_ctx_tile)
    store(d_v, d_v_tile, b, h, j0, S, N, D)
    if k is not None:
        store(d_k, d_k_tile, b, h, j0, S, N, K)
    if ctx is not None:
        store(d_ctx, d_ctx_tile, b, h, j0, S, N, E)


@jit
def query_backward_kernel(inputs, T, S, H, G, scale, d_out, rest, d_q, d_q_ctx, d_decay,
                          D: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
                          M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    q, v, k, q_ctx, ctx, decay = inputs
    scale2 = scale * LOG2_E
    b, h = sequence_and_head(H)
    kv_head = h // (H // G)
    a = None if decay is None else tl.load(decay + h).to(tl.float32) / scale2
    t0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * M
    i = S - T + t0 + tl.arange(0, M).to(tl.float32)[:, None]
    q_tile = load(q, b, h, t0, T, M, D)  # (M, D)
    q_ctx_tile = None if ctx is None else load(q_ctx, b, h, t0, T, M, E)  # (M, E)
    d_out_tile = load(d_out, b, h, t0, T, M, D)  # (M, D)
    lse, scaled_delta = tl.split(load(rest, b, h, t0, T, M, 2))  # (M,)
    d_q_tile = tl.zeros([M, D], tl.float32)
    d_q_ctx_tile = None if ctx is None else tl.zeros([M, E], tl.float32)
    d_a = None if decay is None else tl.zeros([M, 1], tl.float32)
    edge = (S - T + t0) // N * N
    end = tl.minimum(S - T + t0 + M, S)
    for FULL in tl.static_range(2):
        for j0 in range(0 if FULL else edge, edge if FULL else end, N):
            v_tile = load(v, b, kv_head, j0, S, N, D, not FULL)  # (N, D)
            k_tile = v_tile if k is None else load(k, b, kv_head, j0, S, N, K, not FULL)
            ctx_tile = None if ctx is None else load(ctx, b, 0, j0, S, N, E, not FULL)  # (N, E)
            span = 1 + i - j0 - tl.arange(0, N).to(tl.float32)[None, :]  # (M, N)
            s, log_span = scores(q_tile, k_tile, q_ctx_tile, ctx_tile, span, a, not FULL)
            p = tl.exp2(s * scale2 - lse[:, None])
            d_p = dot(d_out_tile, tl.trans(v_tile), None)
            ds = p * (d_p * scale - scaled_delta[:, None])
            d_q_tile = dot(ds, k_tile, d_q_tile)
            if ctx is not None:
                d_q_ctx_tile = dot(ds, ctx_tile, d_q_ctx_tile)
            if decay is not None:
                d_a += tl.sum(ds * log_span, 1, keep_dims=True)
    store(d_q, d_q_tile, b, h, t0, T, M, D)
    if ctx is not None:
        store(d_q_ctx, d_q_ctx_tile, b, h, t0, T, M, E)
    if decay is not None:
        store(d_decay, d_a, b, h, t0, T, M, 1)  # summed, and turned to base e, in PyTorch


# -----------------------------------------------------------------------------
# Decoding: one query per sequence, so reading the cache is all that takes time. A program reads
# part of a sequence for a few value heads that lie side by side: a row of 4 heads of width 64 is
# 512 bytes in one piece. So that tensor cores can multiply such rows, the queries stand on a block
# diagonal,
#
#     [q_1  0    0  ]     [v_1]     [q_1 . v_1]
#     [ 0  q_2   0  ]  x  [v_2]  =  [q_2 . v_2]
#     [ 0   0   q_3 ]     [v_3]     [q_3 . v_3]
#
# where v_g is a column of D numbers and there is a row q_g for each head that asks it. Of P V,
# which is all values by all weights, the diagonal blocks are the answer. (One head's infinite
# value is NaN for the others.)


@jit
def decode_kernel(inputs, S, H, G, scale, lengths, out, lse, D: tl.constexpr, E: tl.constexpr,
                  HEADS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    q, v, q_ctx, ctx, decay = inputs
    scale2 = scale * LOG2_E
    # Which sequence, which value heads, which query heads (a row each), which part of the tokens.
    program, split, n_split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    b, kv_head = program // (G // HEADS), program % (G // HEADS) * HEADS  # the first of them
    first, end = kv_head * (H // G), (kv_head + HEADS) * (H // G)
    h, column = first + tl.arange(0, M)[:, None], tl.arange(0, HEADS * D)[None, :]
    diagonal = h // (H // G) == kv_head + column // D  # (M, HEADS D)
    length = S if lengths is None else tl.minimum(tl.load(lengths + b), S).to(tl.int32)
    part = tl.cdiv(tl.cdiv(length, N), n_split) * N  # equal parts of each sequence;
    start, stop = split * part, tl.minimum(split * part + part, length)  # the last may be empty

    q_tile = tl.load(q[0] + b * q[1] + h * q[3] + column % D, mask=diagonal, other=0.0)
    q_ctx_tile, a = None, None
    if ctx is not None:
        heads_as_rows = q_ctx[0], q_ctx[1], q_ctx[3], 0
        q_ctx_tile = load(heads_as_rows, b, 0, first, end, M, E)  # (M, E)
    if decay is not None:
        a = tl.load(decay + h, mask=h < end, other=0.0).to(tl.float32) / scale2  # (M, 1)
    acc = tl.zeros([M, HEADS * D], tl.float32)
    l_i = tl.zeros([M, 1], tl.float32)
    m_i = tl.full([M, 1], -float("inf"), tl.float32)
    for j0 in range(start, stop, N):
        v_tile = load(v, b, kv_head, j0, stop, N, D, True, HEADS)  # (N, HEADS D)
        ctx_tile = None if ctx is None else load(ctx, b, 0, j0, stop, N, E)  # (N, E)
        span = length - j0 - tl.arange(0, N).to(tl.float32)[None, :]  # (1, N), 1 for the newest
        s, _ = scores(q_tile, v_tile, q_ctx_tile, ctx_tile, span, a, True)
        acc, l_i, m_i = attend(acc, l_i, m_i, s, v_tile, scale2)
    # An empty part answers 0, with the weight 2^-inf.
    at = (b * n_split + split) * H + h
    tl.store(out + at * D + column % D, acc / tl.where(l_i > 0, l_i, 1.0), mask=diagonal)
    tl.store(lse + at, m_i + tl.log2(l_i), mask=h < end)


# -----------------------------------------------------------------------------
# Launching them.

# M, N, warps, pipeline stages and, in one case, how many registers a thread may have at most, so
# that two programs fit on a multiprocessor. They are chosen by a rule (see `options`), so that no
# first call waits for a search. In 16 bits no registers are spilled, except where K = E = 128, and
# by Triton 3.6 eight bytes in decoding where D = 128.
KERNELS = ["forward", "token_backward", "query_backward", "decode", "delta"]
TILES = {
    "float32": [(16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 2), (64,)],
    "A100 narrow": [(128, 64, 8, 2), (32, 64, 4, 2), (64, 32, 4, 2), (16, 32, 4, 3), (64,)],
    "A100 wide": [(64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (16, 32, 4, 3), (64,)],
    "A100 wider": [(64, 32, 4, 2), (16, 32, 4, 2), (32, 16, 4, 2), (16, 32, 4, 3), (64,)],
    "H100 narrow": [(128, 64, 8, 3, 128), (64, 64, 4, 2), (64, 64, 4, 3), (16, 64, 4, 3), (64,)],
    "H100 wide": [(128, 64, 8, 3), (32, 128, 8, 2), (128, 32, 8, 2), (16, 64, 4, 3), (64,)],
    "H100 wider": [(128, 64, 8, 3), (16, 128, 8, 2), (128, 32, 8, 2), (16, 64, 4, 3), (64,)],
}


def options(kernel, dtype, capability, constants):
    """All that a kernel is compiled with, for a GPU of that compute capability."""
    D, K, E = (constants.get(letter, 0) for letter in "DKE")
    if D <= 64 and D + K + E <= 128:
        width = "narrow"
    elif D <= 64 or E == 0:
        width = "wide"
    else:
        width = "wider"
    gpu = "H100" if capability in (9, 10) else "A100"  # 12 has no more shared memory than 8
    row = TILES["float32" if dtype == torch.float32 else f"{gpu} {width}"]
    tile = row[KERNELS.index(kernel.removesuffix("_kernel"))]
    named = dict(zip(("M", "N", "num_warps", "num_stages", "maxnreg"), tile))
    # Products and sums become one multiply-add, whatever Triton's default is.
    return named | constants | dict(enable_fp_fusion=True)


def launch(kernel, grid, q, *args, **constants):
    """Runs a kernel on the device, and with the options for the precision, of q."""
    capability = torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 8
    if q.is_cuda and torch.version.hip or capability < 8:
        raise ValueError(
            "the fused kernel needs an NVIDIA GPU of compute capability 8.0 (A100, RTX 30) or "
            f"newer, and this is {torch.cuda.get_device_name(q.device)}"
        )
    with torch.cuda.device_of(q):
        kernel[grid](*args, **options(kernel.fn.__name__, q.dtype, capability, constants))


def strided(*tensors):
    """Tensors as the kernels take them."""
    return tuple(None if x is None else (x, *x.stride()[:3]) for x in tensors)


def width(x):
    return 0 if x is None else x.size(-1)


def grid(heads, length, letter):
    """Programs: for each head as many as tiles of M queries, or of N tokens, cover the length."""
    return lambda tile: (heads, triton.cdiv(length, tile[letter]))


def empty_float32(q, width):
    """Room for (B, T, H, width) in float32. Heads start at multiples of 64 numbers, so that no
    length T is reason to compile anew."""
    B, T, H, _ = q.shape
    made = q.new_empty(B, H, (T + 63) // 64 * 64, width, dtype=torch.float32)
    return made[:, :, :T].transpose(1, 2)


def run_forward(q, v, k, q_ctx, ctx, decay, scale, launch=launch):
    """The output, (B, T, H, D), and log2 sum_j exp(s_ij) for the backward pass, (B, T, H, 1)."""
    (B, T, H, D), (S, G) = q.shape, v.shape[1:3]
    widths = dict(D=D, K=width(k), E=width(ctx))
    inputs = *strided(q, v, k, q_ctx, ctx), decay
    out, lse = q.new_empty(q.shape), empty_float32(q, 1)
    args = inputs, T, S, H, G, scale, *strided(out, lse)
    launch(forward_kernel, grid(B * H, T, "M"), q, *args, **widths)
    return out, lse


def run_backward(d_out, q, v, k, q_ctx, ctx, decay, out, lse, scale, launch=launch):
    """The gradients of all six tensors; an empty one for each that is None."""
    (B, T, H, D), (S, G) = q.shape, v.shape[1:3]
    widths = dict(D=D, K=width(k), E=width(ctx))
    inputs = *strided(q, v, k, q_ctx, ctx), decay
    by_queries, by_tokens = grid(B * H, T, "M"), grid(B * H, S, "N")

    d_out = d_out.contiguous()  # sum().backward() hands down one number
    rest = empty_float32(q, 2)
    launch(delta_kernel, by_queries, q, *strided(out, d_out, lse, rest), T, H, scale, D=D)
    args = inputs, T, S, H, G, scale, *strided(d_out, rest)

    # Every query head has gradients for the tokens: (B, S, H, width), summed over those that share.
    d_v, d_k, d_ctx = (None if x is None else q.new_empty(B, S, H, x.size(-1)) for x in (v, k, ctx))
    launch(token_backward_kernel, by_tokens, q, *args, *strided(d_v, d_k, d_ctx), **widths)
    if G < H:
        d_v = d_v.unflatten(2, (G, -1)).sum(3)  # (B, S, G, D)
        d_k = None if k is None else d_k.unflatten(2, (G, -1)).sum(3)
    d_ctx = None if ctx is None else d_ctx.sum(2)  # (B, S, E)

    d_q, d_q_ctx = (None if x is None else q.new_empty(x.shape) for x in (q, q_ctx))
    d_decay = None if decay is None else empty_float32(q, 1)
    args = *args, *strided(d_q, d_q_ctx, d_decay)
    launch(query_backward_kernel, by_queries, q, *args, **widths)
    if decay is not None:
        d_decay = (d_decay.sum((0, 1, 3)) * -math.log(2) / scale).type_as(decay)  # (H,)
    found = d_q, d_v, d_k, d_q_ctx, d_ctx, d_decay
    return tuple(q.new_empty(0) if x is None else x for x in found)


@functools.cache
def parts(programs, tiles, at_once):
    """How many parts each sequence is read in, so that the GPU is done first: it runs at_once
    programs at a time, wave after wave, and a program takes the time of its tiles and about three
    more."""

    def time(n):
        waves = triton.cdiv(programs * n, at_once)
        return waves * (triton.cdiv(tiles, n) + 3)

    return min(range(1, min(tiles, 64) + 1), key=time)


def run_decode(q, v, q_ctx, ctx, decay, lengths, launch=launch):
    """The output, (B, 1, H, D): of parts of a sequence, the mean."""
    (B, _, H, D), (S, G) = q.shape, v.shape[1:3]

    # A program reads as many value heads as fit 256 columns and 16 query heads.
    heads = 1
    for n in 2, 4, 8, 16:
        if G % n == 0 and n * D <= 256 and n * H // G <= 16:
            heads = n
    M = max(16, triton.next_power_of_2(heads * H // G))  # 16 rows are the least for tl.dot
    processors = 4
    if q.is_cuda:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    at_once = processors * (3 if ctx is None else 2)  # what their shared memory has room for
    programs = B * G // heads
    n_split = parts(programs, triton.cdiv(S, 64), at_once)

    out = q.new_empty(B, n_split, H, D, dtype=torch.float32)
    lse = q.new_empty(B, n_split, H, dtype=torch.float32)
    inputs = *strided(q, v, q_ctx, ctx), decay
    args = inputs, S, H, G, D**-0.5, lengths, out, lse
    widths = dict(D=D, E=width(ctx), HEADS=heads, M=M)
    launch(decode_kernel, (programs, n_split), q, *args, **widths)
    weight = torch.softmax(lse * math.log(2), 1)[..., None]  # by each part's sum of exponentials
    return (out * weight).sum(1, keepdim=True).to(q.dtype)


# -----------------------------------------------------------------------------
# As operators of PyTorch, which torch.compile need not look into.

INPUTS = "Tensor q, Tensor v, Tensor? k, Tensor? q_ctx, Tensor? ctx, Tensor? decay"
operator = functools.partial(torch.library.custom_op, mutates_args=())
attention_op = operator(
    "qv::attention",
    schema=f"({INPUTS}, float scale) -> (Tensor, Tensor)",
)(run_forward)
backward_op = operator(
    "qv::backward",
    schema=f"(Tensor d_out, {INPUTS}, Tensor out, Tensor lse, float scale)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)(run_backward)
decode_op = operator(
    "qv::decode",
    schema="(Tensor q, Tensor v, Tensor? q_ctx, Tensor? ctx, Tensor? decay, Tensor? lengths)"
    " -> Tensor",
)(run_decode)
attention_op.register_fake(lambda q, *others: (q.new_empty(q.shape), empty_float32(q, 1)))
decode_op.register_fake(lambda q, *others: q.new_empty(q.shape))


@backward_op.register_fake
def _(d_out, q, v, k, q_ctx, ctx, decay, out, lse, scale):
    inputs = q, v, k, q_ctx, ctx, decay
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def save(ctx, inputs, output):  # here ctx is autograd's; PyTorch gives it by that name
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)  # no zeros for lse, which has none


def differentiate(ctx, d_out, _):
    *inputs, out, lse = ctx.saved_tensors  # once, as checkpointing demands
    gradients = backward_op(d_out, *inputs, out, lse, ctx.scale)
    return *(None if x is None else d_x for x, d_x in zip(inputs, gradients)), None


attention_op.register_autograd(differentiate, setup_context=save)


# -----------------------------------------------------------------------------
# What to call.


def attention(q, v, k=None, q_ctx=None, ctx=None, decay=None, scale=None):
    """Causal attention, differentiable in its six tensors (equations: top of this file).

    q       (B, T, H, D)  queries; query t stands at position S - T + t and sees the tokens up to it
    v       (B, S, G, D)  values of S >= T tokens; query head h attends to value head h // (H / G)
    k       (B, S, G, D)  keys, or None: a token's value is its key
    q_ctx   (B, T, H, E)  the part of the query that asks for contexts, or None
    ctx     (B, S, E)     contexts, keys that the heads share, or None
    decay   (H,)          exponents a_h > 0 of the power law by which distance counts, or None
    scale   a number      multiplies the products; None: 1 / sqrt(D)

    Returns (B, T, H, D). All tensors are float32 (computed as such, not as TF32), float16 or
    bfloat16, decay any of these; on CUDA; only the last dimension has to be contiguous. Memory
    beyond inputs, output and gradients: O(B H T) numbers; and in the backward pass, of what heads
    share, the gradients by each head. Raises ValueError for any other input."""
    check({}, q=q, v=v, k=k, q_ctx=q_ctx, ctx=ctx, decay=decay)
    if scale is None:
        scale = q.size(-1) ** -0.5
    if not scale > 0:
        refuse("scale", scale, "a number above 0")
    return attention_op(q, v, k, q_ctx, ctx, decay, scale)[0]


def decode(q, v, q_ctx=None, ctx=None, decay=None, lengths=None):
    """The same without keys for the newest token of each sequence, straight from a cache of which a
    part is filled. No gradients.

    q       (B, 1, H, D)  a query per sequence, that of its last token; likewise q_ctx (B, 1, H, E)
    v       (B, S, G, D)  a buffer for S tokens, and ctx (B, S, E) another; what stands behind a
                          sequence's length is never used, not even if it is NaN
    lengths (B,)          how many tokens each sequence remembers, 1 to S (not checked), int32 or
                          int64; or None: all of S

    Returns (B, 1, H, D). All else is as in `attention`. Sequences are read in parts, of which a
    mean is taken, as in Flash-Decoding (https://pytorch.org/blog/flash-decoding/)."""
    check({"T": 1}, q=q, v=v, q_ctx=q_ctx, ctx=ctx, decay=decay, lengths=lengths)
    return decode_op(q, v, q_ctx, ctx, decay, lengths)


LETTERS = dict(q="BTHD", v="BSGD", k="BSGD", q_ctx="BTHE", ctx="BSE", decay="H", lengths="B")
FLOATS = torch.float32, torch.float16, torch.bfloat16
DTYPES = dict(q=FLOATS, decay=FLOATS, lengths=(torch.int32, torch.int64))  # others: as q


def refuse(name, value, rule):
    raise ValueError(f"the fused kernel cannot take {name}={value}: it should be {rule}")


def check(sizes, **inputs):
    """Raises ValueError unless the inputs are as `attention` and `decode` say. A letter's size is
    the one in `sizes`, or in the first tensor that has it. Texts are made only for what is refused:
    torch.compile would take a length in one for a constant."""
    check_triton()
    q = inputs["q"]
    if (inputs["q_ctx"] is None) != (inputs["ctx"] is None):
        missing = "ctx" if inputs["ctx"] is None else "q_ctx"
        refuse(missing, None, "a tensor, as q_ctx and ctx go together")
    for name, x in inputs.items():
        if x is None and name not in ("q", "v"):
            continue
        if not isinstance(x, torch.Tensor):
            refuse(name, x, "a tensor")
        types = DTYPES.get(name, (q.dtype,))
        if x.dtype not in types:
            refuse(f"{name}.dtype", x.dtype, " or ".join(map(str, types)))
        if x.device != q.device:
            refuse(f"{name}.device", x.device, f"{q.device} as q's")
        check_shape(name, x, sizes)
        if x.size(-1) > 1 and x.stride(-1) != 1:
            refuse(f"{name}.stride()", x.stride(), "1 at the end: tensor.contiguous()")
    if sizes["H"] % sizes["G"] or sizes["H"] > 64 * sizes["G"]:
        refuse("G", sizes["G"], f"a divisor of H={sizes['H']} and at least H / 64")
    if sizes["T"] > sizes["S"]:
        refuse("S", sizes["S"], f"at least T={sizes['T']}")
    if INTERPRETED and q.dtype == torch.bfloat16:
        refuse("q.dtype", q.dtype, "float32 or float16 to be interpreted")
    if not (INTERPRETED or q.is_cuda):
        rule = "a CUDA device; to run the kernels on the CPU, slowly, set TRITON_INTERPRET=1"
        refuse("q.device", q.device, f"{rule} before the first import of triton")


def check_triton():
    """Kernels take tuples from Triton 3.4 on."""
    version = triton.__version__ if triton else "none"
    if version == "none" or [int(number) for number in version.split(".")[:2]] < [3, 4]:
        raise ValueError(
            "the fused kernel needs the package triton, 3.4 or newer, "
            f"and {version} is installed; model.py does without"
        )


def check_shape(name, x, sizes):
    letters = LETTERS[name]
    if x.dim() != len(letters):
        refuse(f"{name}.shape", tuple(x.shape), f"({', '.join(letters)})")
    for letter, size in zip(letters, x.shape):
        if size != sizes.setdefault(letter, size):
            rule = f"{sizes[letter]}"
        elif letter in "DE" and size not in (16, 32, 64, 128):
            rule = "16, 32, 64 or 128"
        elif not 0 < size < 10**6:
            rule = "from 1 to 999,999"
        else:
            continue
        shape = f"({', '.join(letters)})"
        refuse(f"{name}.shape", tuple(x.shape), f"{shape} with {letter} {rule}")


if __name__ == "__main__":
    benchmark = __file__.replace("kernel.py", "tests/experiments/benchmark.py")
    os.execv(sys.executable, [sys.executable, benchmark, *sys.argv[1:]])

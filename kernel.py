"""Attention without keys in one fused kernel: K is never in memory, because it never exists.

QV and QV-Ka (see model.py) score a query against what is remembered of token j: its value v_j and, for QV-Ka, a context
vector g_j that all heads share. With [q_ctx ; q] = W_K q, the query into which QV-Ka folds its W_K,

    s_ij = (q_ctx_i . g_j + q_i . v_j) / sqrt(D) - a_h log(1 + i - j)         the last term only under decay
    p_ij = softmax over j <= i of s_ij
    o_i  = sum_j p_ij v_j

so a tile of V, once loaded, serves both products: V is the key and the value. The softmax is computed tile by tile and
no score leaves the chip (FlashAttention, arXiv:2205.14135, 2307.08691). What is saved for the backward pass is o and
lse_i = log sum_j exp(s_ij), from which p_ij = exp(s_ij - lse_i) is computed again. With delta_i = dO_i . o_i,

    ds_ij    = p_ij (dO_i . v_j - delta_i) / sqrt(D)          the gradient of the products, q_ctx_i . g_j + q_i . v_j
    dq_i     = sum_j ds_ij v_j
    dq_ctx_i = sum_j ds_ij g_j
    dv_j     = sum_i p_ij dO_i + ds_ij q_i                    as a value and as a key: one sum
    dg_j     = sum_h sum_i ds_ij q_ctx_i
    da_h     = - sqrt(D) sum_ij ds_ij log(1 + i - j)

Backward is two kernels, one for sums over queries, one for sums over tokens: 7 products of tiles where one kernel has
5, but then each number is summed by one program in a fixed order, without atomics, and is the same in every run.

Letters: B batch, T queries (the last T of the S tokens), S remembered tokens, H heads, G value heads (query head h asks
value head h // (H / G)), D head width, E width of the context (0: none); M x N, a tile: M queries by N tokens.
A GPU's exponential has base 2, so scores are kept as s_ij log2(e): `scale`, log2(e) / sqrt(D), multiplies the products,
and the distance's logarithm has base 2, too; a_h stays what it is.

    python kernel.py      tests/benchmark.py: time and memory; without a GPU, what the compiler made
"""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys

import torch

from prepare import UserError, describe_error

try:
    import triton
    import triton.language as tl
    from triton.errors import TritonError
    from triton.language.extra import libdevice
except ImportError:  # importing this file always works; calls say what is missing
    triton, TritonError = None, RuntimeError

# Sizes that change from call to call are no reason to compile anew. (Triton would, for a 1 and for multiples of 16.)
jit = (
    functools.partial(triton.jit, do_not_specialize=("T", "S", "H", "G"))
    if triton
    else lambda function: function
)
TOLERANCE = {
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}  # what `trial` takes for rounding


def qv_attention_plain(q, v, q_ctx=None, ctx=None, decay=None):
    """qv_attention in plain PyTorch, with all T x S scores in memory: what the kernels have to compute."""
    (_, T, H, D), (S, G) = q.shape, v.shape[1:3]
    v = v.repeat_interleave(H // G, dim=2)  # (B, S, H, D)
    s = torch.einsum("bthd,bshd->bhts", q, v)
    if ctx is not None:
        s = s + torch.einsum("bthe,bse->bhts", q_ctx, ctx)
    s = s / math.sqrt(D)
    distance = torch.arange(S - T, S, device=q.device)[:, None] - torch.arange(
        S, device=q.device
    )  # (T, S)
    if decay is not None:
        s = s - decay[:, None, None] * torch.log1p(distance.clamp(min=0).to(s.dtype))
    p = s.masked_fill(distance < 0, -math.inf).softmax(-1)  # (B, H, T, S)
    return torch.einsum("bhts,bshd->bthd", p, v)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces of the kernels. A tensor (B, rows, heads, width) reaches them as a tuple: its pointer, and the strides of its
# sequences, rows and heads. One without width, (B, T, H), has a number per query: a width of 1. Positions are floats,
# exact ones: to convert integers, tile after tile, is slow on a GPU.


@jit
def rows(x, b, h, start, R: tl.constexpr, W: tl.constexpr, HEADS: tl.constexpr):
    """Pointers to R rows of HEADS heads side by side, (R, HEADS W)."""
    pointer, x_b, x_row, x_h = x
    row, column = (
        tl.cast(start, tl.int64) + tl.arange(0, R)[:, None],
        tl.arange(0, HEADS * W).to(tl.int64)[None, :],
    )
    if HEADS > 1:
        column = column // W * x_h + column % W
    return pointer + b * x_b + row * x_row + h * x_h + column


@jit
def load(
    x,
    b,
    h,
    start,
    stop,
    R: tl.constexpr,
    W: tl.constexpr,
    EDGE: tl.constexpr = True,
    HEADS: tl.constexpr = 1,
):
    """R rows from `start` on as a tile, (R, HEADS W). At a tensor's EDGE, those from `stop` on are 0."""
    at = rows(x, b, h, start, R, W, HEADS)
    return (
        tl.load(at, mask=start + tl.arange(0, R)[:, None] < stop, other=0.0)
        if EDGE
        else tl.load(at)
    )


@jit
def store(x, tile, b, h, start, stop, R: tl.constexpr, W: tl.constexpr):
    """Writes a tile's rows below `stop`."""
    if W > 0:
        tl.store(rows(x, b, h, start, R, W, 1), tile, mask=start + tl.arange(0, R)[:, None] < stop)


@jit
def dot(x, y, acc):
    """acc + x y: a product in y's precision (float32 is not cut to TF32), summed in float32."""
    return tl.dot(x.to(y.dtype), y, acc, input_precision="ieee")


# TRITON_INTERPRET=1, set before the first import of triton, runs these kernels on the CPU: `jit` is another one then.
INTERPRETED = tl.constexpr(not isinstance(dot, triton.JITFunction)) if triton else False


@jit
def scores(
    x, y, x_ctx, y_ctx, span, a, scale, E: tl.constexpr, DECAY: tl.constexpr, MASK: tl.constexpr
):
    """s_ij log2(e) of a tile, and log2 of its spans, 1 + i - j. x are queries and y tokens, or the other way round."""
    s = dot(x, tl.trans(y), None)
    s = (dot(x_ctx, tl.trans(y_ctx), s) if E > 0 else s) * scale
    log_span = 0.0
    if (
        DECAY
    ):  # fast_log2f is one instruction, right to 2^-22; tl.log2 takes twenty for the last bits
        log_span = (
            tl.log2(tl.maximum(span, 1.0))
            if INTERPRETED
            else libdevice.fast_log2f(tl.maximum(span, 1.0))
        )
        s -= a * log_span
    s = tl.where(span > 0, s, -float("inf")) if MASK else s  # else no query meets the future
    return s, log_span


@jit
def attend(
    acc,
    l_i,
    m_i,
    q,
    q_ctx,
    i,
    a,
    v,
    ctx,
    b,
    g,
    j0,
    stop,
    scale,
    D: tl.constexpr,
    E: tl.constexpr,
    DECAY: tl.constexpr,
    N: tl.constexpr,
    EDGE: tl.constexpr,
    HEADS: tl.constexpr = 1,
):
    """Adds N tokens to a running softmax over M rows: acc (M, D), their sum l_i and maximum m_i so far, (M, 1)."""
    v_tile = load(v, b, g, j0, stop, N, D, EDGE, HEADS)  # (N, D), the only load of V
    ctx_tile = load(ctx, b, 0, j0, stop, N, E, EDGE) if E > 0 else 0.0  # (N, E)
    span = 1 + i - j0 - tl.arange(0, N).to(tl.float32)[None, :]
    s, _ = scores(q, v_tile, q_ctx, ctx_tile, span, a, scale, E, DECAY, EDGE)  # (M, N)
    m_new = tl.maximum(m_i, tl.max(s, 1, keep_dims=True))
    p = tl.exp2(s - m_new)
    alpha = tl.exp2(m_i - m_new)
    return dot(p, v_tile, acc * alpha), l_i * alpha + tl.sum(p, 1, keep_dims=True), m_new


# ---------------------------------------------------------------------------------------------------------------------
# Forward: one program per head and M queries, which walks over the tokens that they see. Loops are compiled twice: with
# masks for the tiles on the diagonal, then without for the FULL ones, which all queries see. (In the other order, the
# compiler has Hopper's tensor cores wait after each single product.)


@jit
def forward_kernel(
    q,
    v,
    q_ctx,
    ctx,
    decay,
    T,
    S,
    H,
    G,
    scale,
    out,
    lse,
    D: tl.constexpr,
    E: tl.constexpr,
    DECAY: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    b, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0).to(tl.int64) % H
    t0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * M  # those that see most tokens start first
    i = S - T + t0 + tl.arange(0, M).to(tl.float32)[:, None]
    a = tl.load(decay + h).to(tl.float32) if DECAY else 0.0
    q_tile = load(q, b, h, t0, T, M, D)  # (M, D)
    q_ctx_tile = load(q_ctx, b, h, t0, T, M, E) if E > 0 else 0.0  # (M, E)
    acc, l_i = tl.zeros([M, D], tl.float32), tl.zeros([M, 1], tl.float32)
    m_i = tl.full([M, 1], -float("inf"), tl.float32)
    edge, end = (
        (S - T + t0) // N * N,
        tl.minimum(S - T + t0 + M, S),
    )  # all M queries see all before the edge
    for FULL in tl.static_range(2):
        for j0 in range(0 if FULL else edge, edge if FULL else end, N):
            acc, l_i, m_i = attend(
                acc,
                l_i,
                m_i,
                q_tile,
                q_ctx_tile,
                i,
                a,
                v,
                ctx,
                b,
                h // (H // G),
                j0,
                S,
                scale,
                D,
                E,
                DECAY,
                N,
                not FULL,
            )
    store(out, acc / l_i, b, h, t0, T, M, D)
    store(lse, m_i + tl.log2(l_i), b, h, t0, T, M, 1)  # in base 2


# ---------------------------------------------------------------------------------------------------------------------
# Backward: delta, then the tokens' gradients by programs that each own N tokens of a query head, then the queries' by
# programs like forward's. What several heads share, a context or a value, gets a gradient from each: summed in PyTorch.


@jit
def delta_kernel(out, d_out, delta, T, H, D: tl.constexpr, M: tl.constexpr):
    b, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0).to(tl.int64) % H
    t0 = tl.program_id(1) * M
    product = load(out, b, h, t0, T, M, D).to(tl.float32) * load(d_out, b, h, t0, T, M, D).to(
        tl.float32
    )
    store(delta, tl.sum(product, 1, keep_dims=True), b, h, t0, T, M, 1)


@jit
def token_backward_kernel(
    q,
    v,
    q_ctx,
    ctx,
    decay,
    T,
    S,
    H,
    G,
    scale,
    d_out,
    lse,
    delta,
    d_v,
    d_ctx,
    D: tl.constexpr,
    E: tl.constexpr,
    DECAY: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Scores lie on their side here, (N, M), so that p and ds come out of one product as the next one needs them.
    Queries from T on add nothing, for their dO and delta are 0, and p is at most 1, as q and lse are 0 and a_h > 0."""
    b, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0).to(tl.int64) % H
    j0 = tl.program_id(1) * N
    j = j0 + tl.arange(0, N).to(tl.float32)[:, None]
    a = tl.load(decay + h).to(tl.float32) if DECAY else 0.0
    v_tile = load(v, b, h // (H // G), j0, S, N, D)  # (N, D)
    ctx_tile = load(ctx, b, 0, j0, S, N, E) if E > 0 else 0.0  # (N, E)
    d_v_tile = tl.zeros([N, D], tl.float32)
    d_ctx_tile = tl.zeros([N, E], tl.float32) if E > 0 else 0.0
    start = tl.maximum(j0 - (S - T), 0) // M * M  # here queries begin to see some of
    edge = (
        tl.minimum(tl.cdiv(tl.maximum(j0 + N - 1 - (S - T), 0), M), tl.cdiv(T, M)) * M
    )  # N; and here, all N
    for FULL in tl.static_range(2):
        for t0 in range(edge if FULL else start, T if FULL else edge, M):
            q_tile = load(q, b, h, t0, T, M, D)  # (M, D)
            q_ctx_tile = load(q_ctx, b, h, t0, T, M, E) if E > 0 else 0.0  # (M, E)
            d_out_tile = load(d_out, b, h, t0, T, M, D)  # (M, D)
            span = 1 + S - T + t0 + tl.arange(0, M).to(tl.float32)[None, :] - j  # (N, M)
            s, _ = scores(v_tile, q_tile, ctx_tile, q_ctx_tile, span, a, scale, E, DECAY, not FULL)
            p = tl.exp2(s - tl.trans(load(lse, b, h, t0, T, M, 1)))
            d_v_tile = dot(p, d_out_tile, d_v_tile)  # as a value ...
            d_p = dot(v_tile, tl.trans(d_out_tile), None)
            ds = p * (d_p - tl.trans(load(delta, b, h, t0, T, M, 1))) * D**-0.5
            d_v_tile = dot(ds, q_tile, d_v_tile)  # ... and as a key, in the same sum
            if E > 0:
                d_ctx_tile = dot(ds, q_ctx_tile, d_ctx_tile)
    store(d_v, d_v_tile, b, h, j0, S, N, D)
    store(d_ctx, d_ctx_tile, b, h, j0, S, N, E)


@jit
def query_backward_kernel(
    q,
    v,
    q_ctx,
    ctx,
    decay,
    T,
    S,
    H,
    G,
    scale,
    d_out,
    lse,
    delta,
    d_q,
    d_q_ctx,
    d_decay,
    D: tl.constexpr,
    E: tl.constexpr,
    DECAY: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    b, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0).to(tl.int64) % H
    t0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * M
    i = S - T + t0 + tl.arange(0, M).to(tl.float32)[:, None]
    a = tl.load(decay + h).to(tl.float32) if DECAY else 0.0
    q_tile = load(q, b, h, t0, T, M, D)  # (M, D)
    q_ctx_tile = load(q_ctx, b, h, t0, T, M, E) if E > 0 else 0.0  # (M, E)
    d_out_tile = load(d_out, b, h, t0, T, M, D)  # (M, D)
    lse_tile = load(lse, b, h, t0, T, M, 1)  # (M, 1)
    delta_tile = load(delta, b, h, t0, T, M, 1)  # (M, 1)
    d_q_tile, d_a = tl.zeros([M, D], tl.float32), tl.zeros([M, 1], tl.float32)
    d_q_ctx_tile = tl.zeros([M, E], tl.float32) if E > 0 else 0.0
    edge, end = (S - T + t0) // N * N, tl.minimum(S - T + t0 + M, S)
    for FULL in tl.static_range(2):
        for j0 in range(0 if FULL else edge, edge if FULL else end, N):
            v_tile = load(v, b, h // (H // G), j0, S, N, D, not FULL)  # (N, D)
            ctx_tile = load(ctx, b, 0, j0, S, N, E, not FULL) if E > 0 else 0.0  # (N, E)
            span = 1 + i - j0 - tl.arange(0, N).to(tl.float32)[None, :]  # (M, N)
            s, log_span = scores(
                q_tile, v_tile, q_ctx_tile, ctx_tile, span, a, scale, E, DECAY, not FULL
            )
            p = tl.exp2(s - lse_tile)
            ds = p * (dot(d_out_tile, tl.trans(v_tile), None) - delta_tile) * D**-0.5
            d_q_tile = dot(ds, v_tile, d_q_tile)
            if E > 0:
                d_q_ctx_tile = dot(ds, ctx_tile, d_q_ctx_tile)
            d_a += tl.sum(ds * log_span, 1, keep_dims=True) if DECAY else 0.0
    store(d_q, d_q_tile, b, h, t0, T, M, D)
    store(d_q_ctx, d_q_ctx_tile, b, h, t0, T, M, E)
    store(d_decay, d_a, b, h, t0, T, M, 1)  # summed, to base e, in PyTorch


# ---------------------------------------------------------------------------------------------------------------------
# Decoding: one query per sequence, so reading the cache is all that takes time. A program reads part of a sequence for
# a few value heads that lie side by side: a row of 4 heads of width 64 is 512 bytes in one piece. So that tensor cores
# can multiply such rows, the queries stand on a block diagonal,
#
#     [q_1  0    0  ]     [v_1]     [q_1 . v_1]
#     [ 0  q_2   0  ]  x  [v_2]  =  [q_2 . v_2]         v_g: a column of D numbers; q_g: a row per head asking it,
#     [ 0   0   q_3 ]     [v_3]     [q_3 . v_3]
#
# and of P V, all values by all weights, the diagonal blocks are the answer. (One head's infinite value is others' NaN.)


@jit
def decode_kernel(
    q,
    v,
    q_ctx,
    ctx,
    decay,
    T,
    S,
    H,
    G,
    scale,
    lengths,
    out,
    lse,
    D: tl.constexpr,
    E: tl.constexpr,
    DECAY: tl.constexpr,
    HEADS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    program, split, n_split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    b, g = (
        program // (G // HEADS),
        program % (G // HEADS) * HEADS,
    )  # its sequence and first value head
    first, end = g * (H // G), (g + HEADS) * (H // G)  # its query heads, a row each
    h, column = first + tl.arange(0, M)[:, None], tl.arange(0, HEADS * D)[None, :]
    diagonal = h // (H // G) == g + column // D  # (M, HEADS D)
    q_tile = tl.load(q[0] + b * q[1] + h * q[3] + column % D, mask=diagonal, other=0.0)
    q_ctx_tile = (
        load((q_ctx[0], q_ctx[1], q_ctx[3], 0), b, 0, first, end, M, E) if E > 0 else 0.0
    )  # (M, E)
    a = tl.load(decay + h, mask=h < end, other=0.0).to(tl.float32) if DECAY else 0.0
    length = tl.minimum(tl.load(lengths + b), S).to(tl.int32)
    part = tl.cdiv(tl.cdiv(length, N), n_split) * N  # equal parts of each sequence;
    start, stop = (
        split * part,
        tl.minimum(split * part + part, length),
    )  # the last ones may be empty
    acc, l_i = tl.zeros([M, HEADS * D], tl.float32), tl.zeros([M, 1], tl.float32)
    m_i = tl.full([M, 1], -float("inf"), tl.float32)
    for j0 in range(start, stop, N):
        acc, l_i, m_i = attend(
            acc,
            l_i,
            m_i,
            q_tile,
            q_ctx_tile,
            (length - 1).to(tl.float32),
            a,
            v,
            ctx,
            b,
            g,
            j0,
            stop,
            scale,
            D,
            E,
            DECAY,
            N,
            True,
            HEADS,
        )
    at = (b * n_split + split) * H + h
    tl.store(
        out + at * D + column % D, acc / tl.where(l_i > 0, l_i, 1.0), mask=diagonal
    )  # an empty part: 0,
    tl.store(lse + at, m_i + tl.log2(l_i), mask=h < end)  # of weight 2^-inf


# ---------------------------------------------------------------------------------------------------------------------
# Launching them: M, N, warps, pipeline stages and, so that two programs fit a multiprocessor, most registers a thread.
# By rule, so that no first call waits for a search; in 16 bits nothing spills registers (Triton 3.9).
TILES = {  #             float32         16 bits, D and E up to 64: A100, H100     16 bits, beyond: A100, H100
    "forward_kernel": (
        (16, 16, 4, 1),
        (128, 64, 8, 2),
        (128, 64, 8, 3, 128),
        (64, 32, 4, 2),
        (128, 64, 8, 3),
    ),
    "delta_kernel": 5 * ((64,),),
    "token_backward_kernel": (
        (16, 16, 4, 1),
        (32, 64, 4, 2),
        (64, 64, 4, 2),
        (32, 32, 4, 2),
        (32, 128, 8, 2),
    ),
    "query_backward_kernel": (
        (16, 16, 4, 1),
        (64, 32, 4, 2),
        (64, 64, 4, 3),
        (32, 32, 4, 2),
        (128, 32, 8, 2),
    ),
    "decode_kernel": (
        (16, 16, 4, 2),
        (16, 32, 4, 3),
        (16, 64, 4, 3),
        (16, 32, 4, 3),
        (16, 64, 4, 3),
    ),
}


def options(kernel, dtype, capability, constants):
    """All that a kernel is compiled with, for a GPU of that compute capability."""
    hopper = capability in (9, 10)  # 10 has as much shared memory as Hopper, 12 has not
    column = (
        0
        if dtype == torch.float32
        else 1 + hopper + 2 * (max(constants["D"], constants.get("E", 0)) > 64)
    )
    tile = dict(zip(("M", "N", "num_warps", "num_stages", "maxnreg"), TILES[kernel][column]))
    return tile | constants | dict(enable_fp_fusion=True)  # not left to Triton's default


def launch(kernel, grid, *args, **constants):
    """Runs a kernel on the device, and with the options for the precision, of its first argument."""
    x = args[0][0]
    capability = torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 8
    if x.is_cuda and torch.version.hip or capability < 8:
        raise UserError(
            "the fused kernel needs an NVIDIA GPU of compute capability 8.0 (A100, RTX 30) or newer, and "
            f"this is {torch.cuda.get_device_name(x.device)}"
        )
    with torch.cuda.device_of(x):
        kernel[grid](*args, **options(kernel.fn.__name__, x.dtype, capability, constants))


def strided(*tensors):
    """Tensors as the kernels take them. A context, (B, S, E), has one head, the only one asked for."""
    return [x if x is None else (x, *x.stride()[:3]) for x in tensors]


def arguments(q, v, q_ctx, ctx, decay):
    """What the kernels take first, and what they are compiled for."""
    (_, T, H, D), (S, G) = q.shape, v.shape[1:3]
    constants = dict(D=D, E=0 if ctx is None else ctx.size(-1), DECAY=decay is not None)
    return (
        *strided(q, v, q_ctx, ctx),
        decay,
        T,
        S,
        H,
        G,
        math.log2(math.e) / math.sqrt(D),
    ), constants


def forward(q, v, q_ctx, ctx, decay, launch=launch):
    """out (B, T, H, D) and, for the backward pass, log2 sum exp of the scores, (B, T, H) float32."""
    (B, T, H, _), (args, constants) = q.shape, arguments(q, v, q_ctx, ctx, decay)
    out, lse = q.new_empty(q.shape), numbers(q)
    launch(
        forward_kernel,
        lambda tile: (B * H, triton.cdiv(T, tile["M"])),
        *args,
        *strided(out, lse),
        **constants,
    )
    return out, lse


def backward(d_out, q, v, q_ctx, ctx, decay, out, lse, launch=launch):
    """The gradients of all five inputs, also (empty, or 0) of those that are None."""
    (B, T, H, D), (S, G), (args, constants) = (
        q.shape,
        v.shape[1:3],
        arguments(q, v, q_ctx, ctx, decay),
    )
    by_queries = lambda tile: (B * H, triton.cdiv(T, tile["M"]))
    by_tokens = lambda tile: (B * H, triton.cdiv(S, tile["N"]))
    d_out, delta = d_out.contiguous(), numbers(q)  # sum().backward() hands down one number
    launch(delta_kernel, by_queries, *strided(out, d_out, delta), T, H, D=D)
    args, E = (*args, *strided(d_out, lse, delta)), constants["E"]
    d_v, d_ctx = q.new_empty(B, S, H, D), q.new_empty(B, S, H, E)
    launch(token_backward_kernel, by_tokens, *args, *strided(d_v, d_ctx), **constants)
    d_v, d_ctx = d_v.unflatten(2, (G, -1)).sum(3), d_ctx.sum(2)  # (B, S, G, D), (B, S, E)
    d_q, d_q_ctx, d_decay = q.new_empty(B, T, H, D), q.new_empty(B, T, H, E), numbers(q)
    launch(query_backward_kernel, by_queries, *args, *strided(d_q, d_q_ctx, d_decay), **constants)
    d_decay = d_decay.sum((0, 1)) * -math.log(2) * math.sqrt(D)  # (H,)
    return d_q, d_v, d_q_ctx, d_ctx, d_decay.type_as(lse if decay is None else decay)


def decode(q, v, q_ctx, ctx, decay, lengths, launch=launch):
    """(B, 1, H, D): in as many parts as the GPU can read at once, of which the mean is taken."""
    (B, _, H, D), (S, G) = q.shape, v.shape[1:3]
    heads = next(
        n for n in (16, 8, 4, 2, 1) if n == 1 or G % n == 0 and n * D <= 256 and n * H // G <= 16
    )
    processors = (
        torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
    )
    at_once = processors * (3 if ctx is None else 2)  # what shared memory has room for
    n_split = max(1, min(at_once // (B * G // heads), 64, triton.cdiv(S, 64)))
    out, lse = (
        q.new_empty(B, n_split, H, D, dtype=torch.float32),
        q.new_empty(B, n_split, H, dtype=torch.float32),
    )
    args, constants = arguments(q, v, q_ctx, ctx, decay)
    launch(
        decode_kernel,
        (B * G // heads, n_split),
        *args,
        lengths,
        out,
        lse,
        **constants,
        HEADS=heads,
        M=max(16, triton.next_power_of_2(heads * H // G)),
    )  # 16 rows are the least for tl.dot
    weight = torch.softmax(lse * math.log(2), 1)[..., None]  # a part's sum of exponentials
    return (out * weight).sum(1, keepdim=True).to(q.dtype)


def numbers(q):
    """(B, T, H) float32, where heads start at multiples of 64, so that no length T is reason to compile anew."""
    B, T, H, _ = q.shape
    return q.new_empty(B, H, (T + 63) // 64 * 64, dtype=torch.float32)[:, :, :T].mT


# As operators of PyTorch, which torch.compile need not look into.
INPUTS = "Tensor q, Tensor v, Tensor? q_ctx, Tensor? ctx, Tensor? decay"
operator = functools.partial(torch.library.custom_op, mutates_args=())
attention_op = operator("qv::attention", schema=f"({INPUTS}) -> (Tensor, Tensor)")(forward)
backward_op = operator(
    "qv::backward",
    schema=f"(Tensor d_out, {INPUTS}, Tensor out, Tensor lse)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)(backward)
decode_op = operator("qv::decode", schema=f"({INPUTS}, Tensor lengths) -> Tensor")(decode)
attention_op.register_fake(lambda q, *others: (q.new_empty(q.shape), numbers(q)))
decode_op.register_fake(lambda q, *others: q.new_empty(q.shape))


@backward_op.register_fake
def _(d_out, q, v, q_ctx, ctx, decay, out, lse):
    (B, T, H, _), S, E = q.shape, v.size(1), 0 if ctx is None else ctx.size(-1)
    d_decay = (lse if decay is None else decay).new_empty(H)
    return (
        q.new_empty(q.shape),
        v.new_empty(v.shape),
        q.new_empty(B, T, H, E),
        q.new_empty(B, S, E),
        d_decay,
    )


def save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)  # no zeros for lse, which has none


def differentiate(ctx, d_out, _):
    saved = ctx.saved_tensors  # once, as checkpointing demands
    return tuple(None if x is None else d_x for x, d_x in zip(saved, backward_op(d_out, *saved)))


attention_op.register_autograd(differentiate, setup_context=save)


# ---------------------------------------------------------------------------------------------------------------------
# What to call.


def qv_attention(q, v, q_ctx=None, ctx=None, decay=None):
    """Causal attention over values and, if given, contexts, differentiable in all five (equations: top of this file).

    q       (B, T, H, D)  queries; query t stands at position S - T + t and sees the tokens up to there
    v       (B, S, G, D)  what is remembered of S >= T tokens; query head h attends to value head h // (H / G)
    q_ctx   (B, T, H, E)  the half of the query that asks for contexts, or None: QV
    ctx     (B, S, E)     contexts, shared by the heads, or None
    decay   (H,)          exponents a_h > 0 of the power law by which distance counts; without them it does not

    Returns (B, T, H, D). All float32 (computed as such, not as TF32), float16 or bfloat16, decay any of these; on CUDA;
    only the last dimension has to be contiguous. Memory beyond inputs, output, gradients: O(B H T) numbers; if S > T,
    in the backward pass also the gradients of v and ctx by each head. Raises UserError for any other input."""
    check({}, q=q, v=v, q_ctx=q_ctx, ctx=ctx, decay=decay)
    return attention_op(q, v, q_ctx, ctx, decay)[0]


def qv_decode(q, v, q_ctx=None, ctx=None, decay=None, lengths=None):
    """The same for the newest token of each sequence, straight from a cache of which a part is filled. No gradients.

    q         (B, 1, H, D)  one query per sequence, that of its last remembered token; q_ctx likewise (B, 1, H, E)
    v         (B, S, G, D)  buffer for S tokens; what stands behind a sequence's length is never used, not even if NaN
    lengths   (B,)          int32 or int64: how many tokens each sequence remembers, 1 to S (not checked)

    Returns (B, 1, H, D). All else is as in qv_attention. Sequences are read in parts, of which a mean is taken, as in
    Flash-Decoding (https://pytorch.org/blog/flash-decoding/)."""
    check({"T": 1}, q=q, v=v, q_ctx=q_ctx, ctx=ctx, decay=decay, lengths=lengths)
    return decode_op(q, v, q_ctx, ctx, decay, lengths)


def refuse(name, value, rule):
    raise UserError(f"{name}={value} should be {rule}")


def check(sizes, **inputs):
    """Raises UserError unless the inputs are as qv_attention says, with letters' sizes as those given.
    Texts are made only for what is refused: torch.compile would take a length in one for a constant."""
    if triton is None or [*map(int, triton.__version__.split(".")[:2])] < [
        3,
        4,
    ]:  # which passes tuples to kernels
        raise UserError(
            "the fused kernel needs the package triton, 3.4 or newer, and "
            f"{triton.__version__ if triton else 'none'} is installed; model.py does without"
        )
    q, letters = (
        inputs["q"],
        dict(q="BTHD", v="BSGD", q_ctx="BTHE", ctx="BSE", decay="H", lengths="B"),
    )
    optional = ("decay", "q_ctx", "ctx") if inputs["q_ctx"] is inputs["ctx"] is None else ("decay",)
    for name, x in (
        (name, x) for name, x in inputs.items() if x is not None or name not in optional
    ):
        if not isinstance(x, torch.Tensor):
            refuse(name, x, "a tensor" + "; q_ctx and ctx go together" * (name in ("q_ctx", "ctx")))
        known, named = dict(sizes), [*zip(letters[name], x.shape)]
        if x.dim() != len(letters[name]) or not all(
            n == sizes.setdefault(letter, n)
            and (n in (16, 32, 64, 128) if letter in "DE" else 0 < n < 10**6)
            for letter, n in named
        ):
            refuse(
                f"{name}.shape",
                tuple(x.shape),
                f"({', '.join(letters[name])}) with D and E 16, 32, 64 or 128, all "
                "others from 1 to 999,999, and "
                + ", ".join(f"{letter}={n}" for letter, n in known.items()),
            )
        types = dict(q=TOLERANCE, decay=TOLERANCE, lengths=(torch.int32, torch.int64)).get(
            name, (q.dtype,)
        )
        if x.dtype not in types:
            refuse(f"{name}.dtype", x.dtype, " or ".join(map(str, types)))
        if x.device != q.device:
            refuse(f"{name}.device", x.device, f"{q.device} as q's")
        if x.size(-1) > 1 and x.stride(-1) != 1:
            refuse(f"{name}.stride()", x.stride(), "1 at the end: tensor.contiguous()")
    if sizes["H"] % sizes["G"] or sizes["H"] > 64 * sizes["G"]:
        refuse("G", sizes["G"], f"a divisor of H={sizes['H']} and at least H / 64")
    if sizes["T"] > sizes["S"]:
        refuse("S", sizes["S"], f"at least T={sizes['T']}")
    if not (q.is_cuda or INTERPRETED):
        refuse(
            "q.device",
            q.device,
            "a CUDA device; to run the kernels on the CPU, slowly, set TRITON_INTERPRET=1 "
            "before the first import of triton",
        )
    if INTERPRETED and q.dtype == torch.bfloat16:
        refuse("q.dtype", q.dtype, "float32 or float16 to be interpreted")


def trial(T, H, G, D, E=0, decay=False, dtype=torch.bfloat16, device="cuda", training=True):
    """Tries the kernels at a model's sizes before it depends on them: forward, backward if it trains, and decoding, for
    a sequence of T tokens (16 to 1,024: they are compiled for all lengths), beside qv_attention_plain in float64. Takes
    seconds, most of them to compile. Raises UserError: what failed, or which tensor came out wrong, and by how much."""
    T, random = min(max(T, 16), 1024), torch.Generator(device).manual_seed(0)
    shapes = dict(q=(1, T, H, D), v=(1, T, G, D)) | (
        dict(q_ctx=(1, T, H, E), ctx=(1, T, E)) if E else {}
    )
    inputs = {
        name: torch.randn(shape, generator=random, device=device).to(dtype)
        for name, shape in shapes.items()
    }
    inputs |= dict(decay=torch.logspace(-2, 2, H, base=2, device=device)) if decay else {}
    last = {name: x[:, -1:] if name in ("q", "q_ctx") else x for name, x in inputs.items()}
    where = f"with Triton {triton and triton.__version__} on {device}"

    def results(function, inputs):
        inputs = {name: x.detach().requires_grad_(training) for name, x in inputs.items()}
        out = function(**inputs)
        gradients = (
            torch.autograd.grad(out, [*inputs.values()], inputs["q"].detach().flip(1))
            if training
            else ()
        )
        return [out[:, -1:], out, *gradients]

    try:
        expected = results(qv_attention_plain, {name: x.double() for name, x in inputs.items()})
        found = [
            qv_decode(**last, lengths=torch.tensor([T], device=device)),
            *results(qv_attention, inputs)[1:],
        ]
        errors = [((x - y).norm() / y.norm()).item() for x, y in zip(found, expected)]
    except (TritonError, RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        raise UserError(
            f"the fused kernel fails {where} ({type(error).__name__}: {describe_error(error)})"
        ) from None
    for name, error in zip(
        ("a decoded token", "the output", *(f"the gradient of {name}" for name in inputs)), errors
    ):
        if not error < TOLERANCE[dtype]:  # nor is NaN
            raise UserError(
                f"the fused kernel computes wrong numbers {where}: {name} is off by {error:.1%}"
            )


if __name__ == "__main__":
    os.execv(
        sys.executable,
        [sys.executable, __file__.replace("kernel.py", "tests/benchmark.py"), *sys.argv[1:]],
    )

"""Attention without keys in one fused kernel: K is never in memory, because it never exists.

QV and QV-Ka (see model.py) score a query against what is remembered of token j, its value v_j and, for QV-Ka, a context
vector g_j that the heads share. With [q_ctx ; q] = W_K q, the query into which QV-Ka folds its W_K,

    s_ij = (q_ctx_i . g_j + q_i . v_j) / sqrt(D) - a_h log(1 + i - j)         the last term only under decay
    p_ij = softmax over j <= i of s_ij
    o_i  = sum_j p_ij v_j

so a tile of V, once loaded, serves both products: V is the key and the value. The softmax is computed tile by tile and
no score leaves the chip (FlashAttention, arXiv:2205.14135, 2307.08691). What is saved for the backward pass is o and
L_i = log sum_j exp(s_ij), from which p_ij = exp(s_ij - L_i) is computed again. With delta_i = dO_i . o_i,

    ds_ij  = p_ij (dO_i . v_j - delta_i)
    dq_i     = sum_j ds_ij v_j / sqrt(D)
    dq_ctx_i = sum_j ds_ij g_j / sqrt(D)
    dv_j     = sum_i p_ij dO_i + ds_ij q_i / sqrt(D)          as a value and as a key: one sum
    dg_j     = sum_h sum_i ds_ij q_ctx_i / sqrt(D)
    da_h     = - sum_ij ds_ij log(1 + i - j)

Everything here is deterministic: each number is summed by one program in a fixed order, nothing is added atomically.

Letters: B batch, T queries (the last T of the S tokens), S remembered tokens, H heads, D head width, E width of the
context (0: none); M x N, a tile of scores: M queries by N tokens. Exponents are in base 2, where exp is an instruction.
Scores in the code are s_ij sqrt(D), exponents are that times `scale` = log2(e) / sqrt(D), and a_h is divided by scale.

    python kernel.py      the benchmark and assets/kernel.png; without a GPU, what the compiler makes of the kernels
"""

from __future__ import annotations

import functools
import math
import re
import subprocess
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError:                   # importing this file always works; calling it without Triton says what is missing
    triton = tl = None
jit = triton.jit if triton else lambda kernel: kernel

LOG2_E = math.log2(math.e)
WIDTHS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# ---------------------------------------------------------------------------------------------------------------------
# The same in plain PyTorch: what the kernels have to compute.


def qv_attention_plain(q, v, q_ctx=None, ctx=None, decay=None):
    """qv_attention with all T x S scores in memory, in any precision: the text that the kernels are checked against."""
    T, S = q.size(1), v.size(1)
    s = torch.einsum("bthd,bshd->bhts", q, v)
    if ctx is not None:
        s = s + torch.einsum("bthe,bse->bhts", q_ctx, ctx)
    s = s / math.sqrt(q.size(-1))
    distance = torch.arange(S - T, S, device=q.device)[:, None] - torch.arange(S, device=q.device)         # (T, S)
    if decay is not None:
        s = s - decay[:, None, None] * torch.log1p(distance.clamp(min=0).to(s.dtype))
    p = s.masked_fill(distance < 0, -math.inf).softmax(-1)                           # (B, H, T, S)
    return torch.einsum("bhts,bshd->bthd", p, v)


def qv_decode_plain(q, v_cache, q_ctx=None, ctx_cache=None, decay=None, lengths=None):
    """qv_decode, one sequence after the other."""
    outs = []
    for b, n in enumerate(lengths.tolist()):
        context = (None, None) if ctx_cache is None else (q_ctx[b, None], ctx_cache[b, None, :n])
        outs.append(qv_attention_plain(q[b, None], v_cache[b, None, :n], *context, decay))                # (1, 1, H, D)
    return torch.cat(outs)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces of the kernels.


@jit
def load(x, start, stop, stride, R: tl.constexpr, W: tl.constexpr, EDGE: tl.constexpr):
    """Rows start .. start + R of a matrix of width W, (R, W); at its EDGE, rows from `stop` on are zero."""
    row = tl.arange(0, R)
    x += tl.cast(start, tl.int64) * stride                                     # may pass 2^31, offsets in a tile do not
    at = x + row[:, None] * stride + tl.arange(0, W)[None, :]
    if EDGE:
        return tl.load(at, mask=(start + row < stop)[:, None], other=0.0)
    return tl.load(at)


@jit
def store(x, value, start, stop, stride, R: tl.constexpr, W: tl.constexpr):
    """Writes (R, W) values where `load` with an EDGE would read."""
    row = tl.arange(0, R)
    x += tl.cast(start, tl.int64) * stride
    tl.store(x + row[:, None] * stride + tl.arange(0, W)[None, :], value.to(x.dtype.element_ty),
             mask=(start + row < stop)[:, None])


# TRITON_INTERPRET=1, set before the first import of triton, runs these kernels on the CPU: `jit` is another one then.
INTERPRETED = triton is not None and not isinstance(load, triton.JITFunction)

if INTERPRETED:
    @jit
    def log2(x):
        return tl.log2(x)
else:
    @jit
    def log2(x):
        return libdevice.fast_log2f(x)   # one instruction, right to 2^-22, where tl.log2 takes twenty for the last bits


@jit
def score(x, y, x_ctx, y_ctx, distance, slope, E: tl.constexpr, DECAY: tl.constexpr, DIAGONAL: tl.constexpr):
    """s_ij sqrt(D) of one tile and log2(1 + i - j). x are the queries and y the tokens, or the other way round."""
    s = tl.dot(x, tl.trans(y), input_precision="ieee")
    if E > 0:
        s = tl.dot(x_ctx, tl.trans(y_ctx), s, input_precision="ieee")
    log_r = s
    if DECAY:
        # `distance` is a float: the subtraction is exact, and converting integers is slow on a GPU.
        log_r = log2(1.0 + (tl.maximum(distance, 0.0) if DIAGONAL else distance))
        s -= slope * log_r
    if DIAGONAL:                                                                # only here does a query meet the future
        s = tl.where(distance >= 0, s, -float("inf"))
    return s, log_r


# ---------------------------------------------------------------------------------------------------------------------
# Forward: one program per head and M queries, which walks over the tokens that they see: full tiles, then the diagonal.


@jit
def attend(acc, top, total, q, q_ctx, i, j0, v, ctx, v_t, c_t, slope, scale, S,
           D: tl.constexpr, E: tl.constexpr, DECAY: tl.constexpr, N: tl.constexpr, DIAGONAL: tl.constexpr):
    """Adds N tokens to the running softmax: acc (M, D) and total (M,), relative to the top score so far, (M,)."""
    v_tile = load(v, j0, S, v_t, N, D, DIAGONAL)                                     # (N, D), the only load of V
    ctx_tile = load(ctx, j0, S, c_t, N, E, DIAGONAL) if E > 0 else None              # (N, E)
    distance = i[:, None] - (j0 + tl.arange(0, N)).to(tl.float32)[None, :]
    s, _ = score(q, v_tile, q_ctx, ctx_tile, distance, slope, E, DECAY, DIAGONAL)    # (M, N)
    new_top = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s * scale - (new_top * scale)[:, None])
    shrink = tl.exp2((top - new_top) * scale)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
    return acc, new_top, total


@jit
def forward_kernel(q, v, q_ctx, ctx, decay, out, lse,
                   q_b, q_t, q_h, v_b, v_t, v_h, x_b, x_t, x_h, c_b, c_t, T, S, H, scale,
                   D: tl.constexpr, E: tl.constexpr, DECAY: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    b, h = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    t0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * M                        # those that see most tokens start first
    i = S - T + t0 + tl.arange(0, M)                                                 # (M,): absolute positions
    v += b * v_b + h * v_h
    q_tile = load(q + b * q_b + h * q_h, t0, T, q_t, M, D, True)                     # (M, D)
    q_ctx_tile = load(q_ctx + b * x_b + h * x_h, t0, T, x_t, M, E, True) if E > 0 else None                # (M, E)
    context = ctx + b * c_b if E > 0 else None
    slope = tl.load(decay + h).to(tl.float32) / scale if DECAY else 0.0

    acc = tl.zeros([M, D], tl.float32)
    top, total = tl.full([M], -float("inf"), tl.float32), tl.zeros([M], tl.float32)
    full = (S - T + t0 + 1) // N * N                                           # all M queries see the tokens up to here
    for j0 in range(0, full, N):
        acc, top, total = attend(acc, top, total, q_tile, q_ctx_tile, i.to(tl.float32), j0, v, context, v_t, c_t, slope,
                                 scale, S, D, E, DECAY, N, False)
    for j0 in range(full, tl.minimum(S - T + t0 + M, S), N):
        acc, top, total = attend(acc, top, total, q_tile, q_ctx_tile, i.to(tl.float32), j0, v, context, v_t, c_t, slope,
                                 scale, S, D, E, DECAY, N, True)

    store(out + (b * T * H + h) * D, acc / total[:, None], t0, T, H * D, M, D)       # out is (B, T, H, D), contiguous
    t = t0 + tl.arange(0, M)
    tl.store(lse + (b * H + h) * T + t, top * scale + tl.log2(total), mask=t < T)    # (B, H, T), in base 2


# ---------------------------------------------------------------------------------------------------------------------
# Backward: the queries' gradients, by programs like forward's, and the tokens', by programs that each own N tokens.


@jit
def query_step(d_q, d_x, d_a, q, q_ctx, d_out, delta, lse, i, j0, v, ctx, v_t, c_t, slope, scale, S,
               D: tl.constexpr, E: tl.constexpr, DECAY: tl.constexpr, N: tl.constexpr, DIAGONAL: tl.constexpr):
    """Adds what N tokens contribute to the gradients of M queries, (M, D) and (M, E), and of the decay, (M,)."""
    v_tile = load(v, j0, S, v_t, N, D, DIAGONAL)                                     # (N, D)
    ctx_tile = load(ctx, j0, S, c_t, N, E, DIAGONAL) if E > 0 else None              # (N, E)
    distance = i[:, None] - (j0 + tl.arange(0, N)).to(tl.float32)[None, :]
    s, log_r = score(q, v_tile, q_ctx, ctx_tile, distance, slope, E, DECAY, DIAGONAL)                      # (M, N)
    p = tl.exp2(s * scale - lse[:, None])
    ds = p * (tl.dot(d_out, tl.trans(v_tile), input_precision="ieee") - delta[:, None])
    d_q = tl.dot(ds.to(v_tile.dtype), v_tile, d_q, input_precision="ieee")
    if E > 0:
        d_x = tl.dot(ds.to(ctx_tile.dtype), ctx_tile, d_x, input_precision="ieee")
    if DECAY:
        d_a += tl.sum(ds * log_r, 1)
    return d_q, d_x, d_a


@jit
def query_backward_kernel(q, v, q_ctx, ctx, decay, out, lse, d_out, delta, d_q, d_q_ctx, d_decay,
                          q_b, q_t, q_h, v_b, v_t, v_h, x_b, x_t, x_h, c_b, c_t, T, S, H, scale,
                          D: tl.constexpr, E: tl.constexpr, DECAY: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    b, h = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    t0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * M
    i = (S - T + t0 + tl.arange(0, M)).to(tl.float32)
    v += b * v_b + h * v_h
    q_tile = load(q + b * q_b + h * q_h, t0, T, q_t, M, D, True)                     # (M, D)
    q_ctx_tile = load(q_ctx + b * x_b + h * x_h, t0, T, x_t, M, E, True) if E > 0 else None                # (M, E)
    context = ctx + b * c_b if E > 0 else None
    slope = tl.load(decay + h).to(tl.float32) / scale if DECAY else 0.0
    own = (b * T * H + h) * D                                                    # this head in (B, T, H, D), contiguous
    d_out_tile = load(d_out + own, t0, T, H * D, M, D, True)                         # (M, D)
    out_tile = load(out + own, t0, T, H * D, M, D, True)                             # (M, D)
    delta_tile = tl.sum(d_out_tile.to(tl.float32) * out_tile.to(tl.float32), 1)      # (M,)
    t = t0 + tl.arange(0, M)
    row = (b * H + h) * T + t
    tl.store(delta + row, delta_tile, mask=t < T)                                    # the next kernel needs it too
    lse_tile = tl.load(lse + row, mask=t < T, other=0.0)                             # (M,)

    d_q_tile, d_a = tl.zeros([M, D], tl.float32), tl.zeros([M], tl.float32)
    d_x = tl.zeros([M, E], tl.float32) if E > 0 else 0.0
    full = (S - T + t0 + 1) // N * N
    for j0 in range(0, full, N):
        d_q_tile, d_x, d_a = query_step(d_q_tile, d_x, d_a, q_tile, q_ctx_tile, d_out_tile, delta_tile, lse_tile, i, j0,
                                        v, context, v_t, c_t, slope, scale, S, D, E, DECAY, N, False)
    for j0 in range(full, tl.minimum(S - T + t0 + M, S), N):
        d_q_tile, d_x, d_a = query_step(d_q_tile, d_x, d_a, q_tile, q_ctx_tile, d_out_tile, delta_tile, lse_tile, i, j0,
                                        v, context, v_t, c_t, slope, scale, S, D, E, DECAY, N, True)

    per_score = scale * 0.6931471805599453                                           # 1 / sqrt(D)
    store(d_q + own, d_q_tile * per_score, t0, T, H * D, M, D)
    if E > 0:
        store(d_q_ctx + (b * T * H + h) * E, d_x * per_score, t0, T, H * E, M, E)
    if DECAY:                                                                        # (B, H, T): summed in PyTorch
        tl.store(d_decay + row, d_a * -0.6931471805599453, mask=t < T)


@jit
def token_step(d_v, d_c, v, ctx, j, t0, q, q_ctx, d_out, delta, lse, q_t, x_t, slope, scale, T, S, H,
               D: tl.constexpr, E: tl.constexpr, DECAY: tl.constexpr, M: tl.constexpr, DIAGONAL: tl.constexpr):
    """Adds what M queries contribute to the gradients of N tokens, d_v (N, D) and d_c (N, E). Scores lie on their side,
    (N, M), so that p and ds come out of one product as the next one needs them. Queries from T on have q = dO = 0, so
    they add nothing."""
    q_tile = load(q, t0, T, q_t, M, D, True)                                         # (M, D)
    q_ctx_tile = load(q_ctx, t0, T, x_t, M, E, True) if E > 0 else None              # (M, E)
    d_out_tile = load(d_out, t0, T, H * D, M, D, True)                               # (M, D)
    t = t0 + tl.arange(0, M)
    lse_tile = tl.load(lse + t, mask=t < T, other=0.0)                               # (M,)
    delta_tile = tl.load(delta + t, mask=t < T, other=0.0)                           # (M,)
    distance = (S - T + t).to(tl.float32)[None, :] - j[:, None]
    s, _ = score(v, q_tile, ctx, q_ctx_tile, distance, slope, E, DECAY, DIAGONAL)    # (N, M)
    p = tl.exp2(s * scale - lse_tile[None, :])
    d_v = tl.dot(p.to(v.dtype), d_out_tile, d_v, input_precision="ieee")             # as a value ...
    d_p = tl.dot(v, tl.trans(d_out_tile), input_precision="ieee")                    # (N, M)
    ds = (p * (d_p - delta_tile[None, :]) * (scale * 0.6931471805599453)).to(v.dtype)
    d_v = tl.dot(ds, q_tile, d_v, input_precision="ieee")                            # ... and as a key, in the same sum
    if E > 0:
        d_c = tl.dot(ds, q_ctx_tile, d_c, input_precision="ieee")
    return d_v, d_c


@jit
def token_backward_kernel(q, v, q_ctx, ctx, decay, lse, d_out, delta, d_v, d_ctx,
                          q_b, q_t, q_h, v_b, v_t, v_h, x_b, x_t, x_h, c_b, c_t, T, S, H, scale,
                          D: tl.constexpr, E: tl.constexpr, DECAY: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    b, h = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    j0 = tl.program_id(1) * N
    j = (j0 + tl.arange(0, N)).to(tl.float32)
    q += b * q_b + h * q_h
    d_out += (b * T * H + h) * D
    lse += (b * H + h) * T
    delta += (b * H + h) * T
    v_tile = load(v + b * v_b + h * v_h, j0, S, v_t, N, D, True)                     # (N, D)
    ctx_tile = load(ctx + b * c_b, j0, S, c_t, N, E, True) if E > 0 else None        # (N, E)
    asked = q_ctx + b * x_b + h * x_h if E > 0 else None
    slope = tl.load(decay + h).to(tl.float32) / scale if DECAY else 0.0

    d_v_tile = tl.zeros([N, D], tl.float32)
    d_c = tl.zeros([N, E], tl.float32) if E > 0 else 0.0
    first = tl.maximum(j0 - (S - T), 0) // M * M                                # the first queries that see any of them
    full = tl.minimum(tl.cdiv(tl.maximum(j0 + N - 1 - (S - T), 0), M) * M, tl.cdiv(T, M) * M)          # ... all of them
    for t0 in range(first, full, M):
        d_v_tile, d_c = token_step(d_v_tile, d_c, v_tile, ctx_tile, j, t0, q, asked, d_out, delta, lse, q_t, x_t, slope,
                                   scale, T, S, H, D, E, DECAY, M, True)
    for t0 in range(full, T, M):
        d_v_tile, d_c = token_step(d_v_tile, d_c, v_tile, ctx_tile, j, t0, q, asked, d_out, delta, lse, q_t, x_t, slope,
                                   scale, T, S, H, D, E, DECAY, M, False)

    store(d_v + (b * S * H + h) * D, d_v_tile, j0, S, H * D, N, D)
    if E > 0:                                                                        # (B, S, H, E): summed in PyTorch
        store(d_ctx + (b * S * H + h) * E, d_c, j0, S, H * E, N, E)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding: one query per sequence, so each byte of the cache is needed once, and reading it is all that takes time. A
# program reads a part of a sequence for a few heads that lie side by side: a row of 4 heads of width 64 is 512 bytes in
# one piece, and G is read once for all of them. So that tensor cores can multiply such rows, the queries stand on a
# block diagonal,
#
#     [q_1  0    0  ]     [v_1]     [q_1 . v_1]
#     [ 0  q_2   0  ]  x  [v_2]  =  [q_2 . v_2]         each v_h a column of D numbers,
#     [ 0   0   q_3 ]     [v_3]     [q_3 . v_3]
#
# and of P V, which mixes every head's values by every head's weights, the diagonal blocks are what was asked for.


@jit
def decode_kernel(q, v, q_ctx, ctx, decay, lengths, out, lse, q_b, q_h, v_b, v_t, v_h, x_b, x_h, c_b, c_t, S, H, scale,
                  D: tl.constexpr, E: tl.constexpr, DECAY: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr):
    groups = tl.cdiv(H, HEADS)
    b, h0 = (tl.program_id(0) // groups).to(tl.int64), (tl.program_id(0) % groups * HEADS).to(tl.int64)
    split, n_split = tl.program_id(1), tl.num_programs(1)
    length = tl.minimum(tl.load(lengths + b), S).to(tl.int32)
    part = tl.cdiv(tl.cdiv(length, N), n_split) * N                                  # equal parts of each sequence;
    start, stop = split * part, tl.minimum(split * part + part, length)              # the last ones may be empty

    row, column = tl.arange(0, 16), tl.arange(0, HEADS * D)                       # 16 rows: the least that tl.dot takes
    diagonal = row[:, None] == column[None, :] // D                                  # (16, HEADS D)
    exists = h0 + column // D < H                                                    # H need not be a multiple of HEADS
    q_row = tl.load(q + b * q_b + h0 * q_h + column // D * q_h + column % D, mask=exists, other=0.0)
    q_tile = tl.where(diagonal, q_row[None, :], 0.0).to(q_row.dtype)                 # (16, HEADS D)
    v += b * v_b + h0 * v_h + column // D * v_h + column % D                         # (HEADS D,)
    mine = (row < HEADS) & (h0 + row < H)
    slope = tl.load(decay + h0 + row, mask=mine, other=0.0).to(tl.float32) / scale if DECAY else None
    if E > 0:
        asked = q_ctx + b * x_b + h0 * x_h + row[:, None] * x_h + tl.arange(0, E)[None, :]
        q_ctx_tile = tl.load(asked, mask=mine[:, None], other=0.0)                      # (16, E)
        ctx += b * c_b

    acc = tl.zeros([16, HEADS * D], tl.float32)
    top, total = tl.full([16], -float("inf"), tl.float32), tl.zeros([16], tl.float32)
    for j0 in range(start, stop, N):
        j = j0 + tl.arange(0, N)
        at = v[None, :] + tl.cast(j0, tl.int64) * v_t + tl.arange(0, N)[:, None] * v_t
        v_tile = tl.load(at, mask=(j < stop)[:, None] & exists[None, :], other=0.0)  # (N, HEADS D)
        s = tl.dot(q_tile, tl.trans(v_tile), input_precision="ieee")                 # (16, N)
        if E > 0:
            ctx_tile = load(ctx, j0, stop, c_t, N, E, True)                          # (N, E)
            s = tl.dot(q_ctx_tile, tl.trans(ctx_tile), s, input_precision="ieee")
        if DECAY:                                                                  # the query is the last of the tokens
            s -= slope[:, None] * log2((length - tl.minimum(j, length - 1)).to(tl.float32))[None, :]
        s = tl.where((j < stop)[None, :], s, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2((s - new_top[:, None]) * scale)
        shrink = tl.exp2((top - new_top) * scale)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
        top = new_top

    acc /= tl.where(total > 0, total, 1.0)[:, None]                               # an empty part is zeros with weight 0
    out += ((b * n_split + split) * H + h0) * D                                      # (B, parts, H, D)
    tl.store(out + column, tl.sum(tl.where(diagonal, acc, 0.0), 0), mask=exists)
    tl.store(lse + (b * n_split + split) * H + h0 + row, top * scale + tl.log2(total), mask=mine)        # (B, parts, H)


@jit
def merge_kernel(out, lse, merged, H, n_split, D: tl.constexpr, PARTS: tl.constexpr):
    """A mean of the parts (PARTS >= n_split, a power of 2) in which each counts as much as its sum of exponentials."""
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    part = tl.arange(0, PARTS)
    row = (b * n_split + part) * H + h
    column = tl.arange(0, D)
    weight = tl.load(lse + row, mask=part < n_split, other=-float("inf"))            # (PARTS,)
    weight = tl.exp2(weight - tl.max(weight, 0))
    each = tl.load(out + row[:, None] * D + column[None, :], mask=(part < n_split)[:, None], other=0.0)    # (PARTS, D)
    mean = tl.sum(each * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(merged + (b * H + h) * D + column, mean.to(merged.dtype.element_ty))


# ---------------------------------------------------------------------------------------------------------------------
# Launching them.


def tiles(kernel, dtype, D, E, hopper):
    """How a kernel is cut and compiled: its M, N, warps and pipeline stages."""
    if kernel == "decode_kernel":
        return dict(N=16 if dtype == torch.float32 else 64, num_warps=4, num_stages=3 if hopper else 2)
    if dtype == torch.float32:                          # exact float32 has no tensor cores, so its tiles take registers
        return dict(M=16, N=16, num_warps=4, num_stages=1)
    wide = D + E > 128                                                    # spills registers unless tiles are smaller
    if hopper:
        M, N, num_warps, num_stages = {
            "forward_kernel": (128, 64, 8, 3),
            "query_backward_kernel": (128, 32, 8, 2) if wide else (64, 64, 4, 3),
            "token_backward_kernel": (32, 128, 8, 2) if wide else (64, 128, 8, 2) if D + E > 64 else (64, 64, 4, 2),
        }[kernel]
    else:
        M, N, num_warps, num_stages = {
            "forward_kernel": (64, 64, 4, 2) if wide else (128, 64, 8, 2),
            "query_backward_kernel": (64, 32, 8, 2) if wide else (64, 32, 4, 2),
            "token_backward_kernel": (32, 32, 4, 2) if wide else (32, 64, 4, 2),
        }[kernel]
    return dict(M=M, N=N, num_warps=num_warps, num_stages=num_stages)


def launch(kernel, grid, *args, **constants):
    """Runs a kernel; its first argument says where and in which precision."""
    if "E" in constants:
        hopper = args[0].is_cuda and torch.cuda.get_device_capability(args[0].device)[0] >= 9
        constants |= tiles(kernel.fn.__name__, args[0].dtype, constants["D"], constants["E"], hopper)
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **constants)


def layout(q, v, q_ctx, ctx):
    """What the kernels are told about their inputs: strides, sizes and scale; and what they are compiled for."""
    (_, T, H, D), S = q.shape, v.size(1)
    context = (0,) * 5 if ctx is None else (*q_ctx.stride()[:3], *ctx.stride()[:2])
    numbers = *q.stride()[:3], *v.stride()[:3], *context, T, S, H, LOG2_E / math.sqrt(D)
    return numbers, dict(D=D, E=0 if ctx is None else ctx.size(-1))


def forward(q, v, q_ctx, ctx, decay, launch=launch):
    """out (B, T, H, D) and, for the backward pass, log2 sum exp of the scores, (B, H, T) float32."""
    (B, T, H, D), (numbers, widths) = q.shape, layout(q, v, q_ctx, ctx)
    out, lse = q.new_empty(B, T, H, D), q.new_empty(B, H, T, dtype=torch.float32)
    launch(forward_kernel, lambda config: (B * H, triton.cdiv(T, config["M"])),
           q, v, q_ctx, ctx, decay, out, lse, *numbers, **widths, DECAY=decay is not None)
    return out, lse


def backward(d_out, q, v, q_ctx, ctx, decay, out, lse, launch=launch):
    """The gradients of all five inputs; an empty tensor for one that is None."""
    (B, T, H, D), S, (numbers, widths) = q.shape, v.size(1), layout(q, v, q_ctx, ctx)
    E, nothing = widths["E"], q.new_empty(0)
    widths["DECAY"] = decay is not None
    d_out = d_out.contiguous()                                                  # sum().backward() hands down one number
    delta = torch.empty_like(lse)
    d_q, d_v = q.new_empty(B, T, H, D), q.new_empty(B, S, H, D)
    d_q_ctx, d_ctx = (q.new_empty(B, T, H, E), q.new_empty(B, S, H, E)) if E else (None, None)
    d_decay = torch.empty_like(lse) if widths["DECAY"] else None
    launch(query_backward_kernel, lambda config: (B * H, triton.cdiv(T, config["M"])),
           q, v, q_ctx, ctx, decay, out, lse, d_out, delta, d_q, d_q_ctx, d_decay, *numbers, **widths)
    launch(token_backward_kernel, lambda config: (B * H, triton.cdiv(S, config["N"])),
           q, v, q_ctx, ctx, decay, lse, d_out, delta, d_v, d_ctx, *numbers, **widths)
    return (d_q, d_v, d_q_ctx if E else nothing, d_ctx.sum(2) if E else nothing.clone(),
            nothing.clone() if decay is None else d_decay.sum((0, 2)).type_as(decay))


def decode(q, v_cache, q_ctx, ctx_cache, decay, lengths, launch=launch):
    """(B, 1, H, D): as many parts of the sequences as keep the GPU busy, then their mean."""
    (B, _, H, D), (numbers, widths) = q.shape, layout(q, v_cache, q_ctx, ctx_cache)
    q_b, _, q_h, v_b, v_t, v_h, x_b, _, x_h, c_b, c_t, _, S, _, scale = numbers
    HEADS = min(256 // D, triton.next_power_of_2(H))
    programs = B * triton.cdiv(H, HEADS)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
    n_split = max(1, min(4 * processors // programs, 64, triton.cdiv(S, 64)))
    out = q.new_empty(B, n_split, H, D, dtype=torch.float32)
    lse = q.new_empty(B, n_split, H, dtype=torch.float32)
    merged = q.new_empty(B, 1, H, D)
    launch(decode_kernel, (programs, n_split), q, v_cache, q_ctx, ctx_cache, decay, lengths, out, lse,
           q_b, q_h, v_b, v_t, v_h, x_b, x_h, c_b, c_t, S, H, scale, **widths, DECAY=decay is not None, HEADS=HEADS)
    launch(merge_kernel, (B * H,), out, lse, merged, H, n_split, D=D, PARTS=triton.next_power_of_2(n_split))
    return merged


# As operators of PyTorch, which torch.compile need not look into.

INPUTS = "Tensor q, Tensor v, Tensor? q_ctx, Tensor? ctx, Tensor? decay"
operator = functools.partial(torch.library.custom_op, mutates_args=())


@operator("qv::attention", schema=f"({INPUTS}) -> (Tensor, Tensor)")
def attention_op(q, v, q_ctx, ctx, decay):
    return forward(q, v, q_ctx, ctx, decay)


@operator("qv::attention_backward",
          schema=f"(Tensor d_out, {INPUTS}, Tensor out, Tensor lse) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
def attention_backward_op(d_out, q, v, q_ctx, ctx, decay, out, lse):
    return backward(d_out, q, v, q_ctx, ctx, decay, out, lse)


@operator("qv::decode", schema=f"({INPUTS}, Tensor lengths) -> Tensor")
def decode_op(q, v, q_ctx, ctx, decay, lengths):
    return decode(q, v, q_ctx, ctx, decay, lengths)


@attention_op.register_fake
def _(q, v, q_ctx, ctx, decay):
    B, T, H, D = q.shape
    return q.new_empty(B, T, H, D), q.new_empty(B, H, T, dtype=torch.float32)


@attention_backward_op.register_fake
def _(d_out, q, v, q_ctx, ctx, decay, out, lse):
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, v, q_ctx, ctx, decay))


@decode_op.register_fake
def _(q, v, q_ctx, ctx, decay, lengths):
    return q.new_empty(q.shape)


def save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def differentiate(ctx, d_out, _):
    inputs = ctx.saved_tensors[:5]
    gradients = attention_backward_op(d_out, *ctx.saved_tensors)
    return tuple(None if x is None else d_x for x, d_x in zip(inputs, gradients))


attention_op.register_autograd(differentiate, setup_context=save)


# ---------------------------------------------------------------------------------------------------------------------
# What to call.


def qv_attention(q, v, q_ctx=None, ctx=None, decay=None):
    """Causal attention over values and, if given, contexts, differentiable in all five (equations: top of this file).

    q       (B, T, H, D)  queries; query t stands at position S - T + t and sees the tokens up to there
    v       (B, S, H, D)  what is remembered of S >= T tokens; D is 16, 32, 64 or 128
    q_ctx   (B, T, H, E)  the half of the query that asks for contexts; E is 16, 32, 64 or 128. Without it and ctx: QV
    ctx     (B, S, E)     contexts, shared by the heads
    decay   (H,)          exponents a_h > 0 of the power law by which distance counts; without them it does not

    Returns (B, T, H, D). All float32 (computed as such, not as TF32), float16 or bfloat16, decay any of these; on a
    CUDA device; only the last dimension has to be contiguous. Memory beyond inputs, outputs and gradients: O(B H T)
    numbers, and (B, S, H, E) in the backward pass with contexts. Raises ValueError for any other input (name, value,
    rule) and RuntimeError without Triton."""
    check({"q": "BTHD", "v": "BSHD", "q_ctx": "BTHE", "ctx": "BSE", "decay": "H"},
          q=q, v=v, q_ctx=q_ctx, ctx=ctx, decay=decay)
    require(v.size(1) >= q.size(1), "v.shape", tuple(v.shape), f"should remember S >= T={q.size(1)} tokens")
    return attention_op(q, v, q_ctx, ctx, decay)[0]


def qv_decode(q, v_cache, q_ctx=None, ctx_cache=None, decay=None, lengths=None):
    """The same for the newest token of each sequence, straight from a cache of which a part is filled. No gradients.

    q          (B, 1, H, D)  one query per sequence, that of its last remembered token
    v_cache    (B, S, H, D)  buffer for S tokens; what stands behind a sequence's length is never used, not even if NaN
    q_ctx      (B, 1, H, E)  as in qv_attention, or None
    ctx_cache  (B, S, E)     as in qv_attention, or None
    decay      (H,)          as in qv_attention, or None
    lengths    (B,)          int32 or int64: how many tokens each sequence remembers, 1 to S (not checked)

    Returns (B, 1, H, D). Types, strides and errors as in qv_attention. The sequences are read in parts that are merged
    (Flash-Decoding, https://pytorch.org/blog/flash-decoding/)."""
    check({"q": "B1HD", "v_cache": "BSHD", "q_ctx": "B1HE", "ctx_cache": "BSE", "decay": "H", "lengths": "B"},
          q=q, v_cache=v_cache, q_ctx=q_ctx, ctx_cache=ctx_cache, decay=decay, lengths=lengths)
    return decode_op(q, v_cache, q_ctx, ctx_cache, decay, lengths)


def require(ok, name, value, rule):
    if not ok:
        raise ValueError(f"{name}={value} {rule}")


def check(letters, **inputs):
    """Raises ValueError unless each input has the dimensions that its letters give, and what else qv_attention says."""
    if triton is None:
        raise RuntimeError("the fused kernel needs the package triton, which is not installed; model.py does without")
    context = [name for name in letters if "E" in letters[name]]
    together = any(inputs[name] is not None for name in context)
    sizes, first = {"1": (1, "every call")}, inputs["q"]
    for name, x in inputs.items():
        if x is None and (name == "decay" or name in context and not together):
            continue
        hint = f"; {' and '.join(context)} go together" if x is None and name in context else ""
        require(isinstance(x, torch.Tensor), name, x, "should be a tensor" + hint)
        rule = f"should be ({', '.join(letters[name])})"
        require(x.dim() == len(letters[name]), f"{name}.shape", tuple(x.shape), rule)
        for letter, n in zip(letters[name], x.shape):
            size, source = sizes.setdefault(letter, (n, name))
            require(n == size, f"{name}.shape", tuple(x.shape), f"{rule} with {letter}={size} as in {source}")
            require(n > 0, f"{name}.shape", tuple(x.shape), f"{rule} with {letter} at least 1")
            if letter in "DE":
                require(n in WIDTHS, f"{name}.shape", tuple(x.shape), f"{rule} with {letter} one of {WIDTHS}")
        types = {"q": DTYPES, "decay": DTYPES, "lengths": (torch.int32, torch.int64)}.get(name, (first.dtype,))
        require(x.dtype in types, f"{name}.dtype", x.dtype, f"should be {' or '.join(map(str, types))}")
        require(x.stride(-1) == 1 or x.size(-1) == 1, f"{name}.stride()", x.stride(), "should end in 1")
        require(max([0, *(step for step, n in zip(x.stride()[1:], x.shape[1:]) if n > 1)]) < 2**24, f"{name}.stride()",
                x.stride(), "should be below 2**24 within a sequence")
        require(x.is_cuda or INTERPRETED, f"{name}.device", x.device, "should be a CUDA device; to run the kernels on "
                "the CPU, slowly, set TRITON_INTERPRET=1 before triton is first imported")
        require(x.device == first.device, f"{name}.device", x.device, f"should be {first.device} as q's")
        require(not INTERPRETED or x.dtype != torch.bfloat16, f"{name}.dtype", x.dtype, "cannot be interpreted")


# ---------------------------------------------------------------------------------------------------------------------
# What the compiler makes of the kernels, for a GPU that need not be there.


def compiled(kernel, arch, *args, **constants):
    """Compiles a kernel for arch 80 (A100) or 90 (H100, H200) as for a launch with these arguments, whose tensors may
    be on device "meta". Returns a row for the report: registers and spilled bytes per thread, bytes of shared memory,
    and the number of wgmma instructions (Hopper's tensor cores) in the PTX."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if "E" in constants:
        constants |= tiles(kernel.__name__, args[0].dtype, constants["D"], constants["E"], arch >= 90)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    cut = " x ".join(str(constants[name]) for name in "MN" if name in constants)
    types = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32",
             float: "fp32", int: "i32"}
    signature, aligned = {}, {}
    for i, (name, x) in enumerate(zip(kernel.arg_names, args)):
        if x is None or isinstance(x, int) and x == 1:                               # as Triton does at a launch
            constants[name] = x
            continue
        signature[name] = types[x.dtype if isinstance(x, torch.Tensor) else type(x)]
        if isinstance(x, torch.Tensor) or x % 16 == 0:
            aligned[(i,)] = [["tt.divisibility", 16]]
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, spilled = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return dict(kernel=kernel.__name__, arch=arch, tile=cut, **options, registers=registers, spilled=spilled,
                shared=binary.metadata.shared, wgmma=binary.asm["ptx"].count("wgmma.mma_async"))


def compile_report(arch, D, E, decay, dtype=torch.bfloat16):
    """Yields a row for each kernel of a training step and of a decoding step."""
    rows, B, T, H = [], 2, 1024, 12
    empty = lambda *shape, dtype=dtype: torch.empty(*shape, dtype=dtype, device="meta")
    launch = lambda kernel, grid, *args, **constants: rows.append(compiled(kernel, arch, *args, **constants))
    q, v, d_out, lengths = empty(B, T, H, D), empty(B, T, H, D), empty(B, T, H, D), empty(B, dtype=torch.int32)
    q_ctx, ctx = (empty(B, T, H, E), empty(B, T, E)) if E else (None, None)
    a = empty(H, dtype=torch.float32) if decay else None
    out, lse = forward(q, v, q_ctx, ctx, a, launch=launch)
    backward(d_out, q, v, q_ctx, ctx, a, out, lse, launch=launch)
    decode(q[:, :1], v, q_ctx[:, :1] if E else None, ctx, a, lengths, launch=launch)
    return [dict(D=D, E=E, decay=decay, dtype=str(dtype).removeprefix("torch."), **row) for row in rows]


def print_compile_report():
    for arch, D, (E, decay) in product((80, 90), (64, 128), ((0, False), (0, True), (64, True), (128, True))):
        for row in compile_report(arch, D, E, decay):
            print("  ".join(f"{name} {x}" for name, x in row.items()), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark: bf16, medians of launches timed by the GPU.

N_HEAD, WIDTH, TOKENS, SECONDS = 12, 64, 16384, 480    # TOKENS in each batch; after SECONDS nothing new is timed
BEGIN = time.monotonic()


def timed(run, repeat=20):
    """Median milliseconds of run() on the GPU, which starts with a cold cache and never waits for Python: it sleeps
    until all of run's launches are queued."""
    events, cold = [], torch.empty(2**28, dtype=torch.uint8, device="cuda")
    for i in range(repeat + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cold.zero_()
        torch.cuda._sleep(4_000_000)                                                 # cycles: about two milliseconds
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in events[3:])


def attempt(measure, name):
    """measure(), or None and one line that says why not: rivals may lack memory or support."""
    if time.monotonic() - BEGIN > SECONDS:
        return None
    try:
        return measure()
    except Exception as error:                                                       # whatever a rival can think of
        print(f"    {name}: {type(error).__name__}: {' '.join(str(error).split())[:90]}", flush=True)
    finally:
        torch.cuda.empty_cache()


def training(make, inputs):
    """Milliseconds forward, and forward + backward, and bytes at the peak of the latter beyond the inputs."""
    before = torch.cuda.memory_allocated()
    run = make()                                                                     # brings the mask, if it needs one
    d_out = torch.randn_like(run())
    both = lambda: torch.autograd.grad(run(), inputs, d_out)
    forward_ms, both_ms = timed(run), timed(both)
    torch.cuda.reset_peak_memory_stats()
    both()
    return forward_ms, both_ms, torch.cuda.max_memory_allocated() - before - d_out.nbytes


@functools.cache
def flex():
    from torch.nn.attention.flex_attention import flex_attention                     # slow to import

    for limit in "recompile_limit", "cache_size_limit":                             # it is compiled anew for each shape
        if hasattr(torch._dynamo.config, limit):
            setattr(torch._dynamo.config, limit, 64)
    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def power_law():
    """Exponents for all heads, constants, and the same as flex_attention wants it."""
    decay = torch.logspace(-2, 2, N_HEAD, base=2, device="cuda")
    return decay, lambda score, b, h, i, j: score - decay[h] * torch.log1p((i - j).abs().float())


def rivals(T, E, decay):
    """The contestants at one shape, name: (make, inputs). All start from q, v, ctx and W_K: ours folds W_K into q, the
    others make K. `decay` is a constant here, for rivals would need a gradient of all of their mask."""
    random = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    heads_first = lambda *tensors: [x.transpose(1, 2) for x in tensors]           # (B, T, H, D) -> (B, H, T, D), a view
    B, H, D = TOKENS // T, N_HEAD, WIDTH
    q, v, other = (random(B, T, H, D) for _ in range(3))
    ctx, w_k = random(B, T, E), random(H, E + D, D) / 8
    inputs = [x.requires_grad_() for x in ([q, v, ctx, w_k] if E else [q, v])]

    def key():
        if not E:
            return v
        return torch.einsum("bse,hed->bshd", ctx, w_k[:, :E]) + torch.einsum("bshc,hcd->bshd", v, w_k[:, E:])

    def fused():
        q_ctx, q_v = (q.transpose(1, 2) @ w_k.mT).transpose(1, 2).split([E, D], dim=-1) if E else (None, q)
        return qv_attention(q_v, v, q_ctx, ctx if E else None, decay)

    def make_sdpa():
        mask = None
        if decay is not None:
            i = torch.arange(T, device="cuda", dtype=torch.float32)
            distance = i[:, None] - i
            mask = q.new_empty(1, H, T, T)                                           # head by head, to spare memory
            for h in range(H):
                mask[0, h] = (-decay[h] * torch.log1p(distance.abs())).masked_fill_(distance < 0, -math.inf)
        return lambda: F.scaled_dot_product_attention(*heads_first(q, key(), v), attn_mask=mask, is_causal=mask is None)

    def make_flex():
        from torch.nn.attention.flex_attention import create_block_mask
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device="cuda")
        score_mod = None if decay is None else power_law()[1]
        return lambda: flex()(*heads_first(q, key(), v), score_mod=score_mod, block_mask=mask)

    flash = lambda: F.scaled_dot_product_attention(*heads_first(q, other, v), is_causal=True)
    found = {"fused": (lambda: fused, inputs), "sdpa": (make_sdpa, inputs), "flex": (make_flex, inputs)}
    return found if E or decay is not None else found | {"qkv": (lambda: flash, [q, other.requires_grad_(), v])}


def bench_training(E, results):
    """One line per shape and contestant; results[T, E, decayed, name] = forward ms, both ms, peak bytes, or None."""
    for T, decayed in product((256, 1024, 4096, 16384), (False, True)):
        for name, (make, inputs) in rivals(T, E, power_law()[0] if decayed else None).items():
            result = results[T, E, decayed, name] = attempt(lambda: training(make, inputs), name)
            flop = 4 * N_HEAD * TOKENS * T * WIDTH / 2
            cells = ["-"] * 3 if result is None else [
                f"{result[0]:8.3f} ms {flop / result[0] / 1e9:4.0f}",
                f"{result[1]:8.3f} ms {3.5 * flop / result[1] / 1e9:4.0f}", f"{result[2] / 2**20:7.0f} MB"]
            print(f"T {T:5}  d_ctx {E:3}  decay {'yes' if decayed else 'no ':3}  {name:5} "
                  + "  ".join(f"{cell:>16}" for cell in cells), flush=True)


def bench_decoding(results):
    """One line per batch and context; results[B, S] = QV's share of copy bandwidth, and how many times as fast it is as
    the fastest QKV."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    H, D, E = 32, WIDTH, 128
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / timed(lambda: target.copy_(source)) / 1e6        # GB/s, read and written
    del source, target
    print(f"copy bandwidth {bandwidth:.0f} GB/s\n batch context    QV us  share  QV-Ka us  share   QKV us (fastest)")
    for B, S in product((1, 8, 64), (1024, 4096, 16384, 65536)):
        random = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
        try:
            q, q_ctx, ctx = random(B, 1, H, D), random(B, 1, H, E), random(B, S, E)
            k, v = random(B, S, H, D), random(B, S, H, D)
        except torch.OutOfMemoryError:
            continue
        lengths = torch.full((B,), S, device="cuda", dtype=torch.int32)
        q1, k1, v1 = (x.transpose(1, 2) for x in (q, k, v))

        def sdpa(backend):
            with sdpa_kernel(backend):
                return timed(lambda: F.scaled_dot_product_attention(q1, k1, v1))

        qv = attempt(lambda: timed(lambda: qv_decode(q, v, lengths=lengths)), "qv")
        ka = attempt(lambda: timed(lambda: qv_decode(q, v, q_ctx, ctx, lengths=lengths)), "qv_ka")
        qkv = {b.name: attempt(lambda: sdpa(b), b.name) for b in
               (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)}
        qkv["flex"] = attempt(lambda: timed(lambda: flex()(q1, k1, v1)), "flex")
        qkv = min((ms, name) for name, ms in qkv.items() if ms) if any(qkv.values()) else None
        share = lambda nbytes, ms: nbytes / ms / 1e6 / bandwidth
        results[B, S] = qv and share(v.nbytes, qv), qv and qkv and qkv[0] / qv
        cells = ["-" if ms is None else f"{1000 * ms:8.1f}  {share(n, ms):5.0%}"
                 for n, ms in ((v.nbytes, qv), (v.nbytes + ctx.nbytes, ka))]
        cells += [f"{1000 * qkv[0]:8.1f} ({qkv[1].lower()})" if qkv else "-"]
        print(f"{B:6} {S:7} {cells[0]:>16} {cells[1]:>16} {cells[2]}", flush=True)


def goals(train, decoding):
    """Prints what was hoped for, what was measured, and whether that is enough; a missing figure misses."""
    def goal(text, figures, enough, form="{:.2f}"):
        figures = list(figures)
        known = bool(figures) and None not in figures
        print(f"{'met' if known and all(map(enough, figures)) else 'missed':6}  {text}: "
              + ", ".join("-" if x is None else form.format(x) for x in figures))

    def ratio(key, rival, i):
        ours, theirs = train.get((*key, "fused")), train.get((*key, rival))
        return theirs[i] / ours[i] if ours and theirs else None

    sizes = sorted({T for T, *_ in train})
    goal("QV, forward + backward, times as fast as flex_attention (>= 1), by T",
         (ratio((T, 0, False), "flex", 1) for T in sizes), lambda x: x >= 1)
    ours = train.get((4096, 0, False, "fused"))
    goal("QV, forward TFLOP/s at T = 4096 (>= 300)",
         [ours and 2 * N_HEAD * TOKENS * 4096 * WIDTH / ours[0] / 1e9], lambda x: x >= 300, "{:.0f}")
    goal("QV with decay, forward + backward, times as fast as SDPA with a mask (>= 3), by T",
         (ratio((T, 0, True), "sdpa", 1) for T in sizes), lambda x: x >= 3)
    for E in sorted({E for _, E, *_ in train}):
        lean = [ratio(key[:3], key[3], 2) for key in train if key[1] == E and key[3] in ("sdpa", "flex")]
        goal(f"least of the rivals' peak memory / ours at d_ctx = {E} (>= 1)",
             [min((x for x in lean if x), default=None)], lambda x: x >= 1)
    large = [x for (B, S), x in decoding.items() if B * S >= 2**18]
    goal("QV decoding, share of copy bandwidth from 256k tokens on (>= 85 %)",
         (x[0] for x in large), lambda x: x >= 0.85, "{:.0%}")
    goal("QV decoding, times as fast as the fastest QKV there (>= 1.7)", (x[1] for x in large), lambda x: x >= 1.7)


def draw(train, decoding, path):
    """Two panels of training speed over T, without and with decay, and one of decoding speed over context."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    labels = dict(fused="fused (this file)", sdpa="SDPA", flex="flex_attention", qkv="QKV by SDPA")
    for axis, decayed in zip(axes, (False, True)):
        for name, label in labels.items():
            points = [(T, 3.5 * 2 * N_HEAD * TOKENS * T * WIDTH / x[1] / 1e9) for (T, E, d, n), x in train.items()
                      if (E, d, n) == (0, decayed, name) and x]
            if points:
                axis.plot(*zip(*sorted(points)), "o-", label=label)
        title = f"QV {'with' if decayed else 'without'} decay, forward + backward"
        axis.set(title=title, xlabel="T", ylabel="TFLOP/s", ylim=0)
        axis.set_xscale("log", base=2)
        axis.legend()
    for B in sorted({B for B, _ in decoding}):
        points = [(S, x[1]) for (b, S), x in decoding.items() if b == B and x[1]]
        if points:
            axes[2].plot(*zip(*points), "o-", label=f"batch {B}")
    axes[2].axhline(2, color="gray", linewidth=0.8)
    axes[2].set(title="Decoding: QV against the fastest QKV", xlabel="context", ylabel="times as fast", ylim=0)
    axes[2].set_xscale("log", base=2)
    axes[2].legend()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"drew {path}")


def main():
    if triton is None:
        return print("The kernels need the package triton, which is not installed.")
    if not torch.cuda.is_available():
        if not INTERPRETED:
            print_compile_report()
        return print("The benchmark needs a CUDA GPU, and there is none here.")
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; "
          f"H {N_HEAD}, D {WIDTH}, {TOKENS} tokens\n"
          "forward ms and TFLOP/s, forward + backward ms and TFLOP/s, peak memory beyond inputs")
    train, decoding = {}, {}
    bench_training(0, train)
    bench_decoding(decoding)
    bench_training(64, train)
    bench_training(128, train)
    goals(train, decoding)
    draw(train, decoding, Path(__file__).parent / "assets" / "kernel.png")


if __name__ == "__main__":
    main()

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
Scores in the code are s_ij sqrt(D), exponents are that times `scale` = log2(e) / sqrt(D); there the decay's slope is
a_h / scale for each log2(1 + i - j).

    python kernel.py      tests/benchmark.py: time, memory and assets/kernel.png; without a GPU, what the compiler made
"""

from __future__ import annotations

import functools
import math
import sys
from pathlib import Path

import torch

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError:                   # importing this file always works; calling it without Triton says what is missing
    triton = tl = None
jit = triton.jit if triton else lambda kernel: kernel

WIDTHS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOG2_E = math.log2(math.e)

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
# Pieces of the kernels. A tensor (B, rows, heads, width) reaches them as a tuple: its pointer, and the strides of its
# sequences, rows and heads. A tile is some rows of one sequence's head; a missing context is a tensor of width W = 0.


@jit
def rows(x, b, h, start, R: tl.constexpr, W: tl.constexpr, HEADS: tl.constexpr):
    """Pointers to rows start .. start + R of HEADS heads side by side, (R, HEADS W), and the rows' numbers, (R, 1)."""
    x, x_b, x_row, x_h = x
    row, column = tl.arange(0, R)[:, None], tl.arange(0, HEADS * W)[None, :]
    x += b * x_b + h * x_h + tl.cast(start, tl.int64) * x_row                # 64 bits; in a tile, 32 do: see `check`
    if HEADS > 1:
        column = column // W * tl.cast(x_h, tl.int64) + column % W
    return x + row * x_row + column, start + row


@jit
def load(x, b, h, start, stop, R: tl.constexpr, W: tl.constexpr, EDGE: tl.constexpr = True, HEADS: tl.constexpr = 1,
         BEYOND: tl.constexpr = 0.0):
    """A tile, (R, HEADS W); at a tensor's EDGE, rows from `stop` on are BEYOND."""
    if W == 0:
        return 0.0
    else:
        at, row = rows(x, b, h, start, R, W, HEADS)
        return tl.load(at, mask=row < stop, other=BEYOND) if EDGE else tl.load(at)


@jit
def store(x, value, b, h, start, stop, R: tl.constexpr, W: tl.constexpr, HEADS: tl.constexpr = 1):
    """Writes a tile's rows below `stop`."""
    if W > 0:
        at, row = rows(x, b, h, start, R, W, HEADS)
        tl.store(at, value.to(x[0].dtype.element_ty), mask=row < stop)


@jit
def dot(x, y, acc):
    """acc + x y: a product in y's precision (float32 is not cut to TF32), summed in float32."""
    return tl.dot(x.to(y.dtype), y, acc, input_precision="ieee")


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
def score(x, y, x_ctx, y_ctx, span, slope, E: tl.constexpr, DECAY: tl.constexpr, DIAGONAL: tl.constexpr):
    """s_ij sqrt(D) of a tile, and log2 of its spans, 1 + i - j. x are the queries and y the tokens, or the other way round."""
    s = dot(x, tl.trans(y), None)
    if E > 0:
        s = dot(x_ctx, tl.trans(y_ctx), s)
    log_r = 0.0
    if DECAY:
        log_r = log2(tl.maximum(span, 1.0) if DIAGONAL else span)
        s -= slope * log_r
    if DIAGONAL:                                                                # only here does a query meet the future
        s = tl.where(span > 0, s, -float("inf"))
    return s, log_r


@jit
def positions(start, N: tl.constexpr):
    """As floats, whose differences are exact: to convert integers, tile after tile, is slow on a GPU."""
    return (start + tl.arange(0, N)).to(tl.float32)


@jit
def spans(i, j0, N: tl.constexpr, DECAY: tl.constexpr):
    """1 + i - j for N tokens from j0 on, (M, N), above 0 where the query sees the token; i, (M, 1), is counted from 1."""
    if DECAY:                                                     # in every tile: worth registers for the columns' numbers
        return i - j0 - positions(0, N)[None, :]
    else:
        return i - positions(j0, N)[None, :]


@jit
def attend(acc, top, total, q, q_ctx, i, slope, v, ctx, b, h, j0, stop, scale, D: tl.constexpr, E: tl.constexpr,
           DECAY: tl.constexpr, N: tl.constexpr, DIAGONAL: tl.constexpr, HEADS: tl.constexpr = 1):
    """Adds N tokens to a running softmax: acc (M, D), and its highest score and sum of exponentials so far, (M, 1)."""
    v_tile = load(v, b, h, j0, stop, N, D, EDGE=DIAGONAL, HEADS=HEADS)               # (N, D), the only load of V
    ctx_tile = load(ctx, b, 0, j0, stop, N, E, EDGE=DIAGONAL)                        # (N, E)
    s, _ = score(q, v_tile, q_ctx, ctx_tile, spans(i, j0, N, DECAY), slope, E, DECAY, DIAGONAL)            # (M, N)
    new_top = tl.maximum(top, tl.max(s, 1, keep_dims=True))
    p = tl.exp2(s * scale - new_top * scale)
    shrink = tl.exp2((top - new_top) * scale)
    total = total * shrink + tl.sum(p, 1, keep_dims=True)
    return dot(p, v_tile, acc * shrink), new_top, total


# ---------------------------------------------------------------------------------------------------------------------
# Forward: one program per head and M queries, which walks over the tokens that they see. Each loop body is compiled
# twice: first come the tiles on the diagonal, in which each query sees a token at least, then, without masks, those that
# all of the queries see. (The other way round, the compiler has Hopper's tensor cores wait after each single product.)


@jit
def sequence_and_head(H):
    """Which are a program's; in 64 bits, for they are multiplied by strides."""
    return (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)


@jit
def queries(q, q_ctx, decay, T, S, H, scale, D: tl.constexpr, E: tl.constexpr, DECAY: tl.constexpr, M: tl.constexpr):
    """A program's sequence, head, first query and, (M, .), their positions from 1, two halves, and the decay's slope."""
    b, h = sequence_and_head(H)
    t0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * M                        # those that see most tokens start first
    slope = tl.load(decay + h).to(tl.float32) / scale if DECAY else 0.0
    return (b, h, t0, positions(S - T + t0 + 1, M)[:, None],
            load(q, b, h, t0, T, M, D), load(q_ctx, b, h, t0, T, M, E), slope)


@jit
def seen(t0, T, S, M: tl.constexpr, N: tl.constexpr):
    """Where the tiles on the diagonal begin, a multiple of N, and where they end: each of M queries sees the token at the
    first of these numbers and all before, and none sees the one at the second or any after."""
    return (S - T + t0) // N * N, tl.minimum(S - T + t0 + M, S)


@jit
def forward_kernel(q, v, q_ctx, ctx, decay, out, lse, T, S, H, scale,
                   D: tl.constexpr, E: tl.constexpr, DECAY: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    b, h, t0, i, q_tile, q_ctx_tile, slope = queries(q, q_ctx, decay, T, S, H, scale, D, E, DECAY, M)
    acc = tl.zeros([M, D], tl.float32)
    top, total = tl.full([M, 1], -float("inf"), tl.float32), tl.zeros([M, 1], tl.float32)
    full, end = seen(t0, T, S, M, N)
    for DIAGONAL in tl.static_range(1, -1, -1):
        for j0 in range(full if DIAGONAL else 0, end if DIAGONAL else full, N):
            acc, top, total = attend(acc, top, total, q_tile, q_ctx_tile, i, slope, v, ctx, b, h, j0, S, scale,
                                     D, E, DECAY, N, DIAGONAL)
    store(out, acc / total, b, h, t0, T, M, D)
    store(lse, top * scale + tl.log2(total), b, h, t0, T, M, 1)                      # in base 2


# ---------------------------------------------------------------------------------------------------------------------
# Backward: delta, then the tokens' gradients by programs that each own N tokens, then the queries' by programs like
# forward's.


@jit
def delta_kernel(out, d_out, delta, T, H, D: tl.constexpr, M: tl.constexpr):
    b, h = sequence_and_head(H)
    t0 = tl.program_id(1) * M
    product = load(out, b, h, t0, T, M, D).to(tl.float32) * load(d_out, b, h, t0, T, M, D).to(tl.float32)
    store(delta, tl.sum(product, 1, keep_dims=True) * D**-0.5, b, h, t0, T, M, 1)    # divided by sqrt(D), as all `ds` are


@jit
def token_backward_kernel(q, v, q_ctx, ctx, decay, lse, d_out, delta, d_v, d_ctx, T, S, H, scale, D: tl.constexpr,
                          E: tl.constexpr, DECAY: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Scores lie on their side here, (N, M), so that p and ds come out of one product as the next one needs them.
    Queries from T on add nothing, for their dO and delta are 0, and p is at most 1, as q and lse are 0 and a_h > 0."""
    b, h = sequence_and_head(H)
    j0 = tl.program_id(1) * N
    j = positions(j0, N)[:, None]
    slope = tl.load(decay + h).to(tl.float32) / scale if DECAY else 0.0
    v_tile = load(v, b, h, j0, S, N, D)                                              # (N, D)
    ctx_tile = load(ctx, b, 0, j0, S, N, E)                                          # (N, E)
    d_v_tile = tl.zeros([N, D], tl.float32)
    d_ctx_tile = tl.zeros([N, E], tl.float32) if E > 0 else 0.0
    at_first, at_last = j0 - (S - T), j0 + N - 1 - (S - T)                           # the queries at the first and last token
    first = tl.maximum(at_first, 0) // M * M                                         # from this tile on, queries see some of N
    full = tl.minimum(tl.cdiv(tl.maximum(at_last, 0), M), tl.cdiv(T, M)) * M         # tokens; from this one on, all see all N
    for DIAGONAL in tl.static_range(1, -1, -1):
        for t0 in range(first if DIAGONAL else full, full if DIAGONAL else T, M):
            q_tile = load(q, b, h, t0, T, M, D)                                      # (M, D)
            q_ctx_tile = load(q_ctx, b, h, t0, T, M, E)                              # (M, E)
            d_out_tile = load(d_out, b, h, t0, T, M, D)                              # (M, D)
            span = positions(1, M)[None, :] - (j - (S - T + t0))                     # 1 + i - j
            s, _ = score(v_tile, q_tile, ctx_tile, q_ctx_tile, span, slope, E, DECAY, DIAGONAL)            # (N, M)
            p = tl.exp2(s * scale - tl.trans(load(lse, b, h, t0, T, M, 1)))
            d_v_tile = dot(p, d_out_tile, d_v_tile)                                  # as a value ...
            d_p = dot(v_tile, tl.trans(d_out_tile), None)
            ds = p * (d_p * D**-0.5 - tl.trans(load(delta, b, h, t0, T, M, 1)))
            d_v_tile = dot(ds, q_tile, d_v_tile)                                     # ... and as a key, in the same sum
            if E > 0:
                d_ctx_tile = dot(ds, q_ctx_tile, d_ctx_tile)
    store(d_v, d_v_tile, b, h, j0, S, N, D)
    store(d_ctx, d_ctx_tile, b, h, j0, S, N, E)                                      # (B, S, H, E): summed in PyTorch


@jit
def query_backward_kernel(q, v, q_ctx, ctx, decay, lse, d_out, delta, d_q, d_q_ctx, d_decay, T, S, H, scale,
                          D: tl.constexpr, E: tl.constexpr, DECAY: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    b, h, t0, i, q_tile, q_ctx_tile, slope = queries(q, q_ctx, decay, T, S, H, scale, D, E, DECAY, M)
    d_out_tile = load(d_out, b, h, t0, T, M, D)                                      # (M, D)
    lse_tile = load(lse, b, h, t0, T, M, 1)                                          # (M, 1)
    delta_tile = load(delta, b, h, t0, T, M, 1)                                      # (M, 1)
    d_q_tile, d_a = tl.zeros([M, D], tl.float32), tl.zeros([M, 1], tl.float32)
    d_q_ctx_tile = tl.zeros([M, E], tl.float32) if E > 0 else 0.0
    full, end = seen(t0, T, S, M, N)
    for DIAGONAL in tl.static_range(1, -1, -1):
        for j0 in range(full if DIAGONAL else 0, end if DIAGONAL else full, N):
            v_tile = load(v, b, h, j0, S, N, D, EDGE=DIAGONAL)                       # (N, D)
            ctx_tile = load(ctx, b, 0, j0, S, N, E, EDGE=DIAGONAL)                   # (N, E)
            s, log_r = score(q_tile, v_tile, q_ctx_tile, ctx_tile, spans(i, j0, N, DECAY), slope, E, DECAY, DIAGONAL)
            p = tl.exp2(s * scale - lse_tile)
            ds = p * (dot(d_out_tile, tl.trans(v_tile), None) * D**-0.5 - delta_tile)
            d_q_tile = dot(ds, v_tile, d_q_tile)
            if E > 0:
                d_q_ctx_tile = dot(ds, ctx_tile, d_q_ctx_tile)
            if DECAY:
                d_a += tl.sum(ds * log_r, 1, keep_dims=True)

    store(d_q, d_q_tile, b, h, t0, T, M, D)
    store(d_q_ctx, d_q_ctx_tile, b, h, t0, T, M, E)
    if DECAY:
        store(d_decay, d_a, b, h, t0, T, M, 1)                                       # times -ln 2 sqrt(D), summed: in PyTorch


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
# and of P V, which mixes every head's values by every head's weights, the diagonal blocks are what was asked for. (A
# value that is infinite makes its neighbours' zeros NaN.) Where a tile has a row per head, heads stand for rows: q_ctx
# and lse come with those two axes swapped.


@jit
def decode_kernel(q, v, q_ctx, ctx, decay, lengths, out, lse, S, H, scale,
                  D: tl.constexpr, E: tl.constexpr, DECAY: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr):
    b, group = sequence_and_head(H // HEADS)
    h = group * HEADS                                                                # the first of this program's
    length = tl.minimum(tl.load(lengths + b), S).to(tl.int32)
    split, n_split = tl.program_id(1), tl.num_programs(1)
    part = tl.cdiv(tl.cdiv(length, N), n_split) * N                                  # equal parts of each sequence;
    start, stop = split * part, tl.minimum(split * part + part, length)              # the last ones may be empty

    row = tl.arange(0, 16)[:, None]                                    # a row per head, and 16 is the least for tl.dot
    diagonal = row == tl.arange(0, HEADS * D)[None, :] // D                          # (16, HEADS D)
    q_row = load(q, b, h, 0, 1, 1, D, HEADS=HEADS)                                   # (1, HEADS D)
    q_tile = tl.where(diagonal, q_row, 0.0).to(q_row.dtype)                          # (16, HEADS D)
    q_ctx_tile = load(q_ctx, b, 0, h, h + HEADS, 16, E)                              # (16, E)
    slope = tl.load(decay + h + row, mask=row < HEADS, other=0.0).to(tl.float32) / scale if DECAY else 0.0

    acc = tl.zeros([16, HEADS * D], tl.float32)
    top, total = tl.full([16, 1], -float("inf"), tl.float32), tl.zeros([16, 1], tl.float32)
    for j0 in range(start, stop, N):
        acc, top, total = attend(acc, top, total, q_tile, q_ctx_tile, length.to(tl.float32), slope, v, ctx, b, h,
                                 j0, stop, scale, D, E, DECAY, N, True, HEADS)
    acc /= tl.where(total > 0, total, 1.0)                                        # an empty part is zeros with weight 0
    mine = tl.sum(tl.where(diagonal, acc, 0.0), 0, keep_dims=True)                   # (1, HEADS D)
    store(out, mine, b, h, split, n_split, 1, D, HEADS=HEADS)
    store(lse, top * scale + tl.log2(total), b, split, h, h + HEADS, 16, 1)


@jit
def merge_kernel(out, lse, merged, H, n_split, D: tl.constexpr, PARTS: tl.constexpr):
    """A mean of the parts (PARTS >= n_split, a power of 2) in which each counts as much as its sum of exponentials."""
    b, h = sequence_and_head(H)
    weight = load(lse, b, h, 0, n_split, PARTS, 1, BEYOND=-float("inf"))             # (PARTS, 1)
    weight = tl.exp2(weight - tl.max(weight, 0, keep_dims=True))
    mean = tl.sum(load(out, b, h, 0, n_split, PARTS, D) * weight, 0, keep_dims=True) / tl.sum(weight, 0, keep_dims=True)
    store(merged, mean, b, h, 0, 1, 1, D)


# ---------------------------------------------------------------------------------------------------------------------
# Launching them.

# By kernel and whether on Hopper, where D + E is up to 64, where D and E are, and beyond: M, N, warps, pipeline stages and,
# so that two programs fit one multiprocessor, the most registers that a thread may take.
TILES = {
    ("forward_kernel", True): ((128, 64, 8, 3, 128), (128, 64, 8, 3, 128), (128, 64, 8, 3)),
    ("forward_kernel", False): ((128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
    ("query_backward_kernel", True): ((64, 64, 4, 3), (64, 64, 4, 3), (128, 32, 8, 2)),
    ("query_backward_kernel", False): ((64, 32, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2)),
    ("token_backward_kernel", True): ((64, 64, 4, 2), (64, 128, 8, 2), (32, 128, 8, 2)),
    ("token_backward_kernel", False): ((32, 64, 4, 2), (32, 64, 4, 2), (32, 32, 4, 2)),
}


def tiles(kernel, dtype, D, E, hopper):
    """A kernel's M, N, warps and so on: by rule, so that no first call waits for a search. With 16 bits next to none spills."""
    if kernel == "decode_kernel":
        return dict(N=16 if dtype == torch.float32 else 64, num_warps=4, num_stages=3 if hopper else 2)
    if dtype == torch.float32:                          # exact float32 has no tensor cores, so its tiles take registers
        return dict(M=16, N=16, num_warps=4, num_stages=1)
    column = 2 if max(D, E) > 64 else 1 if D + E > 64 else 0
    return dict(zip(("M", "N", "num_warps", "num_stages", "maxnreg"), TILES[kernel, hopper][column]))


def options(kernel, dtype, capability, widths):
    """All that a kernel is compiled with, for a GPU of that compute capability (9 is Hopper)."""
    hopper = capability in (9, 10)                                       # 10 has as much shared memory as Hopper, 12 has not
    cut = tiles(kernel, dtype, widths["D"], widths["E"], hopper) if "E" in widths else {}
    return widths | cut | dict(enable_fp_fusion=True)                                # not left to Triton: defaults differ


def launch(kernel, grid, *args, **widths):
    """Runs a kernel on the device, and with the options for the precision, of its first argument."""
    x = args[0][0]
    capability = torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else None
    with torch.cuda.device_of(x):
        kernel[grid](*args, **options(kernel.fn.__name__, x.dtype, capability, widths))


def strided(*tensors):
    """Tensors (B, rows, heads, ...) as the kernels take them. A context, (B, S, E), has one head: the only one asked for."""
    return [x if x is None else (x, *x.stride()[:3]) for x in tensors]


def constants(q, ctx, decay):
    """What the kernels are compiled for."""
    return dict(D=q.size(-1), E=0 if ctx is None else ctx.size(-1), DECAY=decay is not None)


def forward(q, v, q_ctx, ctx, decay, launch=launch):
    """out (B, T, H, D) and, for the backward pass, log2 sum exp of the scores, (B, T, H) float32."""
    (B, T, H, D), S = q.shape, v.size(1)
    out, lse = attention_fake(q, v, q_ctx, ctx, decay)
    launch(forward_kernel, lambda config: (B * H, triton.cdiv(T, config["M"])), *strided(q, v, q_ctx, ctx), decay,
           *strided(out, lse), T, S, H, LOG2_E / math.sqrt(D), **constants(q, ctx, decay))
    return out, lse


def backward(d_out, q, v, q_ctx, ctx, decay, out, lse, launch=launch):
    """The gradients of all five inputs; an empty tensor for one that is None."""
    (B, T, H, D), S, widths = q.shape, v.size(1), constants(q, ctx, decay)
    sizes = T, S, H, LOG2_E / math.sqrt(D)
    inputs, by_queries = (*strided(q, v, q_ctx, ctx), decay), lambda config: (B * H, triton.cdiv(T, config["M"]))
    d_out, delta = d_out.contiguous(), torch.empty_like(lse)                    # sum().backward() hands down one number
    launch(delta_kernel, by_queries, *strided(out, d_out, delta), T, H, D=D, M=64)

    d_v, d_ctx = v.new_empty(v.shape), None if ctx is None else ctx.new_empty(B, S, H, ctx.size(-1))
    launch(token_backward_kernel, lambda config: (B * H, triton.cdiv(S, config["N"])), *inputs,
           *strided(lse, d_out, delta, d_v, d_ctx), *sizes, **widths)
    d_ctx = None if ctx is None else d_ctx.sum(2)                               # and its largest tensor is gone again

    d_q, d_q_ctx = q.new_empty(q.shape), None if ctx is None else q_ctx.new_empty(q_ctx.shape)
    d_decay = None if decay is None else torch.empty_like(lse)
    launch(query_backward_kernel, by_queries, *inputs, *strided(lse, d_out, delta, d_q, d_q_ctx, d_decay), *sizes, **widths)
    d_decay = None if decay is None else (d_decay.sum((0, 1)) * -math.log(2) * math.sqrt(D)).type_as(decay)
    return tuple(q.new_empty(0) if x is None else x for x in (d_q, d_v, d_q_ctx, d_ctx, d_decay))


def decode(q, v_cache, q_ctx, ctx_cache, decay, lengths, launch=launch):
    """(B, 1, H, D): in as many parts as the GPU can read at once, of which the mean is taken."""
    (B, _, H, D), S = q.shape, v_cache.size(1)
    HEADS = math.gcd(H, 256 // D)                                                    # side by side, in rows of up to 256 numbers
    programs = B * H // HEADS
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
    at_once = processors * (3 if ctx_cache is None else 2)                           # what shared memory has room for
    n_split = max(1, min(at_once // programs, 64, triton.cdiv(S, 64)))
    out, lse = (q.new_empty(B, n_split, H, n, dtype=torch.float32) for n in (D, 1))
    merged = q.new_empty(B, 1, H, D)
    q_ctx = None if q_ctx is None else q_ctx.transpose(1, 2)                         # heads are rows of one tile
    launch(decode_kernel, (programs, n_split), *strided(q, v_cache, q_ctx, ctx_cache), decay, lengths,
           *strided(out, lse.transpose(1, 2)), S, H, LOG2_E / math.sqrt(D), **constants(q, ctx_cache, decay), HEADS=HEADS)
    launch(merge_kernel, (B * H,), *strided(out, lse, merged), H, n_split, D=D, PARTS=triton.next_power_of_2(n_split))
    return merged


# As operators of PyTorch, which torch.compile need not look into.

INPUTS = "Tensor q, Tensor v, Tensor? q_ctx, Tensor? ctx, Tensor? decay"
operator = functools.partial(torch.library.custom_op, mutates_args=())


attention_op = operator("qv::attention", schema=f"({INPUTS}) -> (Tensor, Tensor)")(forward)
attention_backward_op = operator(
    "qv::attention_backward", schema=f"(Tensor d_out, {INPUTS}, Tensor out, Tensor lse) -> ({', '.join(5 * ['Tensor'])})")(backward)
decode_op = operator("qv::decode", schema=f"({INPUTS}, Tensor lengths) -> Tensor")(decode)


@attention_op.register_fake
def attention_fake(q, v, q_ctx, ctx, decay):
    B, T, H, D = q.shape
    return q.new_empty(B, T, H, D), q.new_empty(B, H, T, dtype=torch.float32).mT     # a tile's rows lie side by side


@attention_backward_op.register_fake
def _(d_out, q, v, q_ctx, ctx, decay, out, lse):
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, v, q_ctx, ctx, decay))


@decode_op.register_fake
def _(q, v, q_ctx, ctx, decay, lengths):
    return q.new_empty(q.shape)


def save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def differentiate(ctx, d_out, _):
    saved = ctx.saved_tensors                                                        # looked at once, as checkpointing demands
    return tuple(None if x is None else d_x for x, d_x in zip(saved, attention_backward_op(d_out, *saved)))


attention_op.register_autograd(differentiate, setup_context=save)


# ---------------------------------------------------------------------------------------------------------------------
# What to call.


def qv_attention(q, v, q_ctx=None, ctx=None, decay=None):
    """Causal attention over values and, if given, contexts, differentiable in all five (equations: top of this file).

    q       (B, T, H, D)  queries; query t stands at position S - T + t and sees the tokens up to there
    v       (B, S, H, D)  what is remembered of S >= T tokens, below 10^6; D is 16, 32, 64 or 128
    q_ctx   (B, T, H, E)  the half of the query that asks for contexts; E is 16, 32, 64 or 128. Without it and ctx: QV
    ctx     (B, S, E)     contexts, shared by the heads
    decay   (H,)          exponents a_h > 0 of the power law by which distance counts; without them it does not

    Returns (B, T, H, D), H below 2^16. All float32 (computed as such, not as TF32), float16 or bfloat16, decay any of
    these; on a CUDA device; only the last dimension has to be contiguous. Memory beyond inputs, output and gradients: O(B H T)
    numbers; if S > T, the backward pass may for a while need (B, S - T, H, E) more. Raises ValueError for any other
    input (name, value, rule) and RuntimeError without Triton, or with one that is too old."""
    check({"q": "BTHD", "v": "BSHD", "q_ctx": "BTHE", "ctx": "BSE", "decay": "H"},
          q=q, v=v, q_ctx=q_ctx, ctx=ctx, decay=decay)
    if v.size(1) < q.size(1):
        refuse("v.shape", tuple(v.shape), f"should remember S >= T={q.size(1)} tokens")
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


def refuse(name, value, rule):
    raise ValueError(f"{name}={value} {rule}")


LEAST_TRITON = "3.4"                                                                 # passes tuples to kernels as they are here
MOST = {"T": 10**6, "S": 10**6, "H": 2**16}                         # float32 positions, a grid's size, 32-bit offsets in a tile


def check_shape(name, x, letters, sizes):
    """A dimension for each letter, as large as that letter was in the inputs before: sizes, {letter: (n, its input)}."""
    rule = f"should be ({', '.join(letters)})"
    if x.dim() != len(letters):
        refuse(f"{name}.shape", tuple(x.shape), rule)
    for letter, n in zip(letters, x.shape):
        size, source = sizes.setdefault(letter, (n, name))
        if n != size:
            refuse(f"{name}.shape", tuple(x.shape), f"{rule} with {letter}={size} as in {source}" if source else rule)
        if not 0 < n < MOST.get(letter, 2**31):
            refuse(f"{name}.shape", tuple(x.shape), f"{rule} with {letter} at least 1 and below {MOST.get(letter, 2**31)}")
        if letter in "DE" and n not in WIDTHS:
            refuse(f"{name}.shape", tuple(x.shape), f"{rule} with {letter} one of {WIDTHS}")


def check(letters, **inputs):
    """Raises ValueError unless each input has the dimensions that its letters give, and what else qv_attention says.
    Texts are made only for what is refused: torch.compile would take a length in one for a constant."""
    if triton is None:
        raise RuntimeError("the fused kernel needs the package triton, which is not installed; model.py does without")
    if [*map(int, triton.__version__.split(".")[:2])] < [*map(int, LEAST_TRITON.split("."))]:
        raise RuntimeError(f"the fused kernel needs Triton {LEAST_TRITON} or newer, and this is {triton.__version__}; model.py does without")
    context = [name for name in letters if "E" in letters[name]]
    together = any(inputs[name] is not None for name in context)
    sizes, first = {"1": (1, None)}, inputs["q"]
    for name, x in inputs.items():
        if x is None and (name == "decay" or name in context and not together):
            continue
        if not isinstance(x, torch.Tensor):
            refuse(name, x, "should be a tensor" + f"; {' and '.join(context)} go together" * (x is None and name in context))
        check_shape(name, x, letters[name], sizes)
        types = {"q": DTYPES, "decay": DTYPES, "lengths": (torch.int32, torch.int64)}.get(name, (first.dtype,))
        if x.dtype not in types:
            refuse(f"{name}.dtype", x.dtype, f"should be {' or '.join(map(str, types))}")
        if x.size(-1) > 1 and x.stride(-1) != 1:
            refuse(f"{name}.stride()", x.stride(), "should end in 1")
        row = "H" if "1" in letters[name] else "TS"                                  # of a tile; in decoding, a query has one per head
        for letter, n, step in zip(letters[name], x.shape, x.stride()):
            if letter in row and n > 1 and step >= 2**24:
                refuse(f"{name}.stride()", x.stride(), f"should be below 2**24 along {letter}")
        if x.device != first.device:
            refuse(f"{name}.device", x.device, f"should be {first.device} as q's")
        if not (x.is_cuda or INTERPRETED):
            refuse(f"{name}.device", x.device, "should be a CUDA device; to run the kernels on the CPU, slowly, set "
                   "TRITON_INTERPRET=1 before triton is first imported")
        if INTERPRETED and x.dtype == torch.bfloat16:
            refuse(f"{name}.dtype", x.dtype, "cannot be interpreted")


if __name__ == "__main__":
    sys.modules["kernel"] = sys.modules["__main__"]                                  # what the benchmark imports is this
    sys.path.insert(0, str(Path(__file__).parent / "tests"))
    from benchmark import main
    from prepare import run

    run(main)

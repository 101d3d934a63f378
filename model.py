"""A GPT whose attention is chosen by one flag: qkv, gqa, mla, qv or qv_ka.

Attention compares a query with the keys of all earlier tokens and mixes their values by how well they match:

    y_i = sum_j p_ij v_j,    p_ij = softmax over j <= i of  q_i . k_j / sqrt(D)

"QV May Be Enough" (arXiv:2603.15665) asks whether the key has to exist. This file turns that question into another:
*what must a token leave behind, so that later tokens can attend to it?* An attention here says two things: what it
remembers of each token (`write`: exactly what a KV cache stores), and how keys and values are read from that memory
(`read`). The rest is shared (but for how MLA and QV-Ka ask), and training is the same forward pass with no past.

    attention   remembered per token           key           value     numbers per token and layer
    qkv         k, v                           k             v         2 H D
    gqa         k, v of G heads                k             v         2 G D
    mla         latent c, rotary key r         [up_k(c); r]  up_v(c)   d_latent (+ d_rope under rope)
    qv          v of G heads                   v             v         G D
    qv_ka       v of G heads, context g        [g; v] W_K    v         G D + d_ctx

Letters in shapes, all of them: B batch, T new tokens, S remembered tokens (the T new ones are the last of them),
C n_embd, H heads, G heads of keys or values (G divides H, and each serves H / G heads), D = C / H head width,
L d_latent, R d_rope, E d_ctx, V vocabulary. (In the paper's formulas G and V are the contexts g and values v of all.)
"""

import math
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from prepare import UserError, describe_error, tokenizer_size

LOGITS_STD = 0.3  # of an untrained model: its loss is within 0.1 of ln(V)

# --- Positions -------------------------------------------------------------------------------------------------------
# A table is added at the input, learned (GPT-2) or of sinusoids; or one of two modules works in attention.


def frequencies(width):
    """Of width / 2 waves, from 2 pi to nearly 10000 * 2 pi tokens long."""
    return 10000.0 ** (-torch.arange(0, width, 2) / width)


class Sinusoids(nn.Module):
    """The fixed table of "Attention Is All You Need" (arXiv:1706.03762, section 3.5), the paper's baseline, scaled to
    the size that embeddings start with (GPT.init). Unscaled it is 20 times as large or more, and the first LayerNorm
    would leave next to nothing of the tokens; the original multiplies embeddings by sqrt(C) instead."""

    def __init__(self, block_size, width):
        super().__init__()
        angle = torch.arange(block_size)[:, None] * frequencies(
            width
        )  # (block_size, C/2, rounded up)
        waves = torch.cat([angle.sin(), angle.cos()], dim=-1)[:, :width]  # of mean square 1/2
        self.register_buffer("weight", LOGITS_STD * math.sqrt(2 / width) * waves, persistent=False)


class Rotary(nn.Module):
    """RoPE (arXiv:2104.09864): turn pairs of numbers, one from each half of the vector, by angles that grow with the
    token's position, so that the dot product of two rotated vectors depends on their distance alone."""

    def __init__(self, width, block_size):
        super().__init__()
        angle = torch.arange(block_size)[:, None, None] * frequencies(
            width
        )  # (block_size, 1, width/2)
        self.register_buffer("cos", torch.cat([angle.cos(), angle.cos()], dim=-1), persistent=False)
        self.register_buffer(
            "sin", torch.cat([-angle.sin(), angle.sin()], dim=-1), persistent=False
        )

    def forward(self, x, start, turn=1):
        """x (B, T, heads, width), whose first token stands at absolute position `start`; the same shape comes back.
        The pair (a, b) becomes (a cos - b sin, b cos + a sin); turn = -1 undoes that."""
        cos, sin = (
            table[start : start + x.size(1)] for table in (self.cos, self.sin)
        )  # (T, 1, width)
        swapped = x.roll(x.size(-1) // 2, dims=-1)  # (b, a)
        return torch.addcmul(x * cos, swapped, sin, value=turn).type_as(x)


class Decay(nn.Module):
    """Our reading of AGF (arXiv:2603.04805; the source of its exact formula is not public): a key at distance r counts
    (1 + r)^(-a_h) times what one at distance 0 does. Each head learns its exponent a_h > 0, kept positive as
    exp(log_a); they start between 1/4, which sees far, and 4, which sees little but the token itself."""

    def __init__(self, n_head, block_size):
        super().__init__()
        self.block_size = block_size
        self.log_a = nn.Parameter(torch.linspace(math.log(0.25), math.log(4.0), n_head))
        distance = torch.arange(block_size - 1, -block_size, -1).clamp(
            min=0
        )  # the farthest key first, then the future
        self.register_buffer(
            "minus_log", -torch.log1p(distance), persistent=False
        )  # (2 block_size - 1,)

    def forward(self, T, S):
        """The power law as an additive logit bias, -a_h log(1 + r): (H, T, S), float32 under autocast, too."""
        first, last = self.block_size - S, self.block_size + T - 1
        rows = (
            self.minus_log[first:last].unfold(0, S, 1).flip(0)
        )  # (T, S): the last query reads from
        return self.log_a.exp()[:, None, None] * rows  # `first` on, the others from later on


# --- Attention: what all five share, then what each of them remembers and reads --------------------------------------


class Attention(nn.Module):
    """Causal self-attention. A subclass defines

    write(x, start)    what the T new tokens x (B, T, C) leave behind: a tuple of tensors (B, T, ...)
    read(q, memory)    q, k, v for `attend`, and optionally a score to add; memory is a tuple of (B, S, ...)
    """

    def __init__(self, config, d_query=None, d_rotary=None):
        super().__init__()
        C, H, D = config.n_embd, config.n_head, config.n_embd // config.n_head
        self.n_head, self.d_head, self.p_dropout = H, D, config.dropout
        self.scale = (d_query or D) ** -0.5
        self.q = nn.Linear(C, H * (d_query or D), bias=False)
        self.out = nn.Linear(C, C, bias=False)
        self.rotary = Rotary(d_rotary or D, config.block_size) if config.pos == "rope" else None
        self.decay = Decay(H, config.block_size) if config.pos == "agf" else None

    def forward(self, x, start=0, cache=None):
        q, memory = self.query(x, start), self.write(x, start)
        if cache is not None:
            memory = cache.append(memory)  # the past, then the T new tokens
        y = self.mix(q, memory)  # (B, T, H, D)
        return F.dropout(self.out(y.flatten(2)), self.p_dropout, self.training)  # (B, T, C)

    def query(self, x, start):
        return self.rotate(self.heads(self.q(x)), start)  # (B, T, H, D)

    def mix(self, q, memory):
        return self.attend(*self.read(q, memory))

    def attend(self, q, k, v, score=None):
        """softmax(scale q k^T + score + decay) v over the keys that a query may see.

        q (B, T, H, *), k and v (B, S, G, *), score (B, H, 1, S) only where T = 1 < S; returns (B, T, H, width of v).
        Query t stands at position S - T + t and sees the keys up to there. Under autocast, score and decay stay in
        float32."""
        T, S, G, width = q.size(1), k.size(1), k.size(2), v.size(-1)
        bias = score
        if self.decay is not None:
            bias = (
                self.decay(T, S) if score is None else score + self.decay(T, S)
            )  # (H, T, S) or (B, H, T, S)
        if T == 1 < S:
            return self.attend_once(q, k, v, bias)
        # SDPA's own mask is right only if T == S. (It takes no symbol for it, which torch.compile makes of `T == S`.)
        is_causal = True if bias is None and T == S else False
        if not is_causal:
            future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
            bias = (q.new_zeros(T, S) if bias is None else bias).masked_fill(future, -math.inf)
            q, k, v = (x.type_as(bias) for x in (q, k, v))
        if width < k.size(-1):
            v = F.pad(v, (0, k.size(-1) - width))  # SDPA is fast for equal widths only
        with torch.autocast(q.device.type, enabled=False):
            y = F.scaled_dot_product_attention(
                q.transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                attn_mask=bias,
                is_causal=is_causal,
                dropout_p=self.p_dropout if self.training else 0.0,
                scale=self.scale,
                enable_gqa=G != self.n_head,
            )
        return y[..., :width].transpose(1, 2)

    def attend_once(self, q, k, v, bias):
        """`attend` for the one query of a decoding step, which sees all keys. The H / G query heads that share a key
        head become H / G queries of one head: then no key has to be copied for each of them."""
        q = q.view(len(q), k.size(2), -1, q.size(-1))  # (B, 1, H, *) -> (B, G, H/G, *)
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, G, S, *)
        if bias is not None:
            bias = bias.reshape(
                -1, *q.shape[1:3], k.size(2)
            )  # (B or 1, H, 1, S) -> (.., G, H/G, S)
        if k.size(1) > 1 and (bias is None or bias.dtype == q.dtype):
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        else:  # SDPA would give a head to one thread, and round a float32 bias
            scores = (k @ (self.scale * q).mT).mT  # (B, G, H/G, S)
            y = (scores if bias is None else scores + bias).softmax(-1) @ v
        return y.flatten(1, 2)[:, None]  # (B, 1, H, *)

    def heads(self, x):
        return x.view(*x.shape[:-1], -1, self.d_head)  # (B, T, H D) -> (B, T, H, D)

    def rotate(self, x, start, turn=1):
        return x if self.rotary is None else self.rotary(x, start, turn)


class QKV(Attention):
    """Multi-head attention (arXiv:1706.03762): every head has a key and a value of its own. Or, if G < H, grouped-query
    attention (arXiv:2305.13245), where H / G query heads share one; G = 1 is MQA."""

    def __init__(self, config):
        super().__init__(config)
        self.k = nn.Linear(config.n_embd, config.n_kv_head * self.d_head, bias=False)
        self.v = nn.Linear(config.n_embd, config.n_kv_head * self.d_head, bias=False)

    def write(self, x, start):
        return self.rotate(self.heads(self.k(x)), start), self.heads(self.v(x))  # 2 x (B, T, G, D)

    def read(self, q, memory):
        return q, *memory


class MLA(Attention):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, eq. 9-11 and 14-19): keys and values of all heads are
    read from one small latent c, which is normalised. Queries are not compressed, as in DeepSeek-V2-Lite. In decoding,
    up_k folds into the query and up_v into the output, and attention runs straight over the latents. RoPE on the keys
    would forbid that, so position gets a key r of its own, which the heads share."""

    def __init__(self, config):
        D, L, R = (
            config.n_embd // config.n_head,
            config.d_latent,
            config.d_rope if config.pos == "rope" else 0,
        )
        super().__init__(config, d_query=D + R, d_rotary=R)
        self.widths = L, R
        self.down = nn.Linear(config.n_embd, L + R, bias=False)
        self.up_k = nn.Parameter(torch.empty(config.n_head, L, D))
        self.up_v = nn.Parameter(torch.empty(config.n_head, L, D))

    def query(self, x, start):
        q, q_r = self.q(x).unflatten(-1, (self.n_head, -1)).tensor_split([self.d_head], dim=-1)
        if start > 0:  # T < S, few queries: fold, for q . up_k(c) = up_k^T(q) . c
            q = per_head(self.up_k, q)
        return self.join(q, q_r, start)  # (B, T, H, D + R or L + R)

    def write(self, x, start):
        c, r = self.down(x)[:, :, None].split(self.widths, dim=-1)
        c = F.rms_norm(c, c.shape[-1:], eps=1e-6)  # without a gain: up_k and up_v have one
        return (self.join(c, r, start),)  # (B, T, 1, L + R)

    def join(self, x, r, start):
        return x if self.rotary is None else torch.cat([x, self.rotary(r, start)], dim=-1)

    def read(self, q, memory):
        c, r = memory[0].split(self.widths, dim=-1)  # (B, S, 1, L), (B, S, 1, R)
        k = torch.einsum("bsl,hld->bshd", c[:, :, 0], self.up_k)
        v = torch.einsum("bsl,hld->bshd", c[:, :, 0], self.up_v)
        return (
            q,
            torch.cat([k, r.expand(-1, -1, self.n_head, -1)], dim=-1),
            v,
        )  # (B, S, H, D + R), (B, S, H, D)

    def mix(self, q, memory):
        if q.size(1) == memory[0].size(1):
            return super().mix(q, memory)  # (B, T, H, D)
        y = self.attend(
            q, *memory, *memory
        )  # folded: [c; r] is one head's key and value, and y a mean of it;
        return per_head(
            self.up_v.mT, y[..., : self.widths[0]]
        )  # the mean of up_v(c) is up_v of c's mean


class QV(Attention):
    """Attention without keys (arXiv:2603.15665): softmax(Q V^T / sqrt(D)) V. A token is found by what it is remembered
    for. With G < H, a value serves several heads (Grouped-Tied Attention, arXiv:2505.21487).

    Under RoPE a value is rotated once, when it is written, and the answer is turned back by the query's position i:

        score  (R_i q_i) . (R_j v_j) = q_i . R_(j-i) v_j,      answer  R_i^T sum_j p_ij R_j v_j = sum_j p_ij R_(j-i) v_j

    So all depends on distances alone, and one memory still serves as key and as value. The price: a value arrives
    turned by its distance; position is not kept out of it, as it is under agf."""

    kernel, d_ctx = None, 0  # kernel.py, if GPT.use_kernel says so

    def __init__(self, config):
        super().__init__(config)
        self.v = nn.Linear(config.n_embd, config.n_kv_head * self.d_head, bias=False)

    def write(self, x, start):
        return (self.rotate(self.heads(self.v(x)), start),)  # (B, T, G, D)

    def read(self, q, memory):
        return q, *memory, *memory

    def mix(self, q, memory):
        y = super().mix(q, memory) if self.kernel is None else self.fused(q, *memory)
        return self.rotate(y, memory[0].size(1) - q.size(1), turn=-1)  # (B, T, H, D)

    def fused(self, q, v, ctx=None):
        """What `attend` computes, by kernel.py, which loads each value once, as key and as value."""
        q_ctx, q = (None, q) if ctx is None else q.tensor_split([self.d_ctx], dim=-1)
        inputs = q, v, q_ctx, ctx, None if self.decay is None else self.decay.log_a.exp()
        if q.size(1) > 1 or torch.is_grad_enabled():
            return self.kernel.qv_attention(*inputs)
        return self.kernel.qv_decode(
            *inputs, q.new_full(q.shape[:1], v.size(1), dtype=torch.int32)
        )  # all remember S


class QVKa(QV):
    """QV-Ka, "Key-after-value & ctx" (arXiv:2603.15665): K = [G ; V] W_K, made from the values and from one small
    context vector per token, G = x W_ctx, which the heads share. Because a key is linear in the memory (here columns),

        q . k_j  =  q . W_K^T [g_j ; v_j]  =  (W_K q) . [g_j ; v_j]  =  q_ctx . g_j  +  q_v . v_j,

    it never has to be remembered: QV-Ka is QV plus a score from the context. Under RoPE, g and v are rotated when they
    are written and both halves of W_K q when they ask; the answer is turned back, as in QV."""

    def __init__(self, config):
        super().__init__(config)
        self.d_ctx = config.d_ctx
        self.ctx = nn.Linear(config.n_embd, config.d_ctx, bias=False)
        n_wk = 1 if config.shared_wk else config.n_head
        self.w_k = nn.Parameter(torch.empty(n_wk, config.d_ctx + self.d_head, self.d_head))

    def query(self, x, start):
        """q (B, T, H, D), which asks for keys; or, where none are made, W_K q = [q_ctx ; q_v] (B, T, H, E + D)."""
        q = self.heads(self.q(x))
        if start == 0 and self.rotary is None and self.kernel is None:
            return q
        return self.rotate_pieces(per_head(self.w_k, q), start)

    def write(self, x, start):
        if self.rotary is None:
            return self.heads(self.v(x)), self.ctx(x)  # (B, T, G, D), (B, T, E)
        row = self.rotate_pieces(torch.cat([self.ctx(x), self.v(x)], dim=-1), start)
        return self.heads(row[..., self.d_ctx :]), row[..., : self.d_ctx]

    def rotate_pieces(self, x, start):
        """Rotates x (B, T, .., n D) in pieces of width D: under RoPE, a context is E / D more heads."""
        return (
            x
            if self.rotary is None
            else self.rotary(x.reshape(*x.shape[:2], -1, self.d_head), start).view(x.shape)
        )

    def read(self, q, memory):
        v, g = memory
        G, H = v.size(2), self.n_head
        if (
            q.size(-1) == self.d_head
        ):  # training: K by one matmul costs less than T scores that are wider
            w_g, w_v = self.w_k.expand(H, -1, -1).tensor_split(
                [self.d_ctx], dim=1
            )  # (H, E, D), (H, D, D)
            k_v = torch.einsum(
                "bsgc,ghcd->bsghd", v, w_v.unflatten(0, (G, -1))
            )  # (B, S, G, H/G, D)
            k = torch.einsum("bse,hed->bshd", g, w_g) + k_v.flatten(2, 3)
            return q, k, v.repeat_interleave(H // G, dim=2)  # (B, S, H, D)
        if q.size(1) > 1:  # many queries: [g; v] is a key
            return (
                q,
                torch.cat([g[:, :, None].expand(-1, -1, G, -1), v], dim=-1),
                v,
            )  # (B, S, G, E + D), (B, S, G, D)
        q_ctx, q_v = q.tensor_split([self.d_ctx], dim=-1)  # one: v is, and g adds a score
        score = exact_product(g, self.scale * q_ctx[:, 0].mT).mT  # (B, H, S)
        return q_v, v, v, score[:, :, None]


def per_head(w, x):
    """Each head's matrix times its vector: w (H or 1, m, n), x (B, T, H, n) to (B, T, H, m)."""
    y = x.flatten(0, 1).transpose(0, 1) @ w.mT  # (H, B T, m)
    return y.transpose(0, 1).view(*x.shape[:3], -1)


def exact_product(x, y):
    """x y, in float32 also where autocast takes less."""
    if x.dtype.itemsize >= 4:
        return x @ y
    with torch.autocast(x.device.type, enabled=False):
        return x.float() @ y.float()


ATTENTIONS = {"qkv": QKV, "gqa": QKV, "mla": MLA, "qv": QV, "qv_ka": QVKa}
POSITIONS = ("learned", "sinusoidal", "rope", "agf")


# --- The KV cache: it stores whatever `write` returns and knows no variant -------------------------------------------


class Cache:
    """One layer's memory: `length` tokens so far, in buffers for block_size of them, made when the first arrive."""

    def __init__(self, block_size):
        self.block_size, self.length, self.buffers = block_size, 0, ()

    def append(self, memory):
        """Stores the T new tokens' memory, a tuple of (B, T, ...); returns that of all S, as views (B, S, ...)."""
        start, self.length = self.length, self.length + memory[0].size(1)
        if not self.buffers:
            self.buffers = tuple(
                m.new_empty(m.size(0), self.block_size, *m.shape[2:]) for m in memory
            )
        for buffer, m in zip(self.buffers, memory):
            buffer[:, start : self.length] = m
        return tuple(buffer[:, : self.length] for buffer in self.buffers)


# --- The model: GPT-2 with any of these attentions -------------------------------------------------------------------


def option(default, help, choices=None, only=None):
    """A configuration field that explains itself: the help text is both its comment and what --help prints. `only` says
    with which values of other fields it counts, for example {"attention": ("qv_ka", "mine")}."""
    help = (
        f"{' under '.join('/'.join(values) for values in only.values())}: {help}" if only else help
    )
    return field(default=default, metadata={"help": help, "choices": choices, "only": only or {}})


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. None stands for a default that depends on the other fields and is filled in. Raises UserError
    (field, value, rule, a value that works) where the fields do not fit together."""

    attention: str = option(
        "qv_ka", "what a token leaves behind for later ones to attend to", ATTENTIONS
    )
    pos: str = option(
        "agf",
        "positions: a learned table (GPT-2), a table of sinusoids, rotary, or agf: a learned "
        "power law of distance",
        POSITIONS,
    )
    block_size: int = option(256, "context: how many tokens the model sees at once")
    vocab_size: int = option(65, "number of different tokens")
    n_layer: int = option(6, "number of blocks")
    n_head: int = option(6, "attention heads in each block")
    n_embd: int = option(384, "width of the residual stream; the heads share it equally")
    dropout: float = option(0.0, "fraction of activations dropped in training")
    n_kv_head: int | None = option(
        None,
        "heads of keys or values, a divisor of n_head; 1 is MQA, or one value for "
        "all (default: n_head; for gqa half of it, or 1 if it is odd)",
        only=dict(attention=("gqa", "qv", "qv_ka")),
    )
    d_latent: int | None = option(
        None, "width of the latent (default: 4 x head width)", only=dict(attention=("mla",))
    )
    d_rope: int | None = option(
        None,
        "width of the rotary key (default: half the head width)",
        only=dict(attention=("mla",), pos=("rope",)),
    )
    d_ctx: int | None = option(
        None, "width of the context (default: 2 x head width)", only=dict(attention=("qv_ka",))
    )
    shared_wk: bool = option(
        False, "one W_K for all heads instead of one each", only=dict(attention=("qv_ka",))
    )
    n_inner: int | None = option(None, "width of the MLP (default: 4 x n_embd)")

    def __post_init__(self):
        def check(ok, name, rule):
            if not ok:
                raise UserError(f"{name}={getattr(self, name)!r} {rule}")

        for name, choices in ("attention", ATTENTIONS), ("pos", POSITIONS):
            check(
                getattr(self, name) in choices,
                name,
                f"is unknown; choose one of {', '.join(choices)}",
            )
        for name in "block_size", "vocab_size", "n_layer", "n_head", "n_embd":
            check(getattr(self, name) >= 1, name, "must be at least 1")
        check(0 <= self.dropout < 1, "dropout", "must lie in [0, 1), for example 0.1")
        C, H = self.n_embd, self.n_head
        check(
            C % H == 0, "n_embd", f"must be a multiple of n_head={H}, for example {-(-C // H) * H}"
        )
        D, half = C // H, H // 2 if H % 2 == 0 else 1
        derived = dict(
            n_kv_head=half if self.attention == "gqa" else H,
            d_latent=4 * D,
            d_rope=max(2, D // 4 * 2),
            d_ctx=2 * D,
            n_inner=4 * C,
        )
        for name, default in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
            check(getattr(self, name) >= 1, name, f"must be at least 1, for example {default}")
        check(
            H % self.n_kv_head == 0,
            "n_kv_head",
            f"must divide n_head={H}, for example {derived['n_kv_head']}",
        )
        if self.pos == "rope":
            check(
                D % 2 == 0,
                "n_embd",
                f"gives heads of odd width {D}, but rope turns pairs; take {H * (D + 1)}",
            )
            check(
                self.d_rope % 2 == 0,
                "d_rope",
                f"must be even under rope, for example {derived['d_rope']}",
            )
            check(
                self.d_ctx % D == 0,
                "d_ctx",
                f"must be a multiple of the head width {D} under rope, such as {2 * D}",
            )


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=False)
        self.attention = ATTENTIONS[config.attention](config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=False)
        self.mlp = nn.Sequential(
            OrderedDict(
                up=nn.Linear(config.n_embd, config.n_inner, bias=False),
                gelu=nn.GELU(),
                out=nn.Linear(config.n_inner, config.n_embd, bias=False),
                dropout=nn.Dropout(config.dropout),
            )
        )

    def forward(self, x, start, cache):
        x = x + self.attention(self.ln_1(x), start, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 (pre-norm, GELU, tied embeddings), without biases."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        with NaNForEmpty():
            self.wte = nn.Embedding(config.vocab_size, config.n_embd)
            table = {"learned": nn.Embedding, "sinusoidal": Sinusoids}.get(config.pos)
            self.wpe = table and table(config.block_size, config.n_embd)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
            self.ln_f = nn.LayerNorm(config.n_embd, bias=False)
        for name, parameter in self.named_parameters():
            self.init(name, parameter)

    def init(self, name, parameter):
        """Matrices keep the scale of what they multiply, std 1/sqrt(fan_in), so a K or V made in two steps starts as
        large as one made in one; those that add to the residual stream start smaller, as in GPT-2. Embeddings are
        tied to the output, so they set the logits' size. Vectors keep what their module gave."""
        if parameter.dim() > 1:  # (V, C), (fan_out, fan_in), or per head (H, fan_in, fan_out)
            std = parameter.size(1) ** -0.5
            if name.startswith("w"):  # wte, wpe
                std *= LOGITS_STD
            if name.endswith("out.weight"):
                std /= math.sqrt(2 * self.config.n_layer)
            nn.init.normal_(parameter, std=std)
        elif parameter.isnan().any():
            raise UserError(
                f"{name} has no values: only matrices are drawn, so make it of torch.zeros or the like"
            )

    def forward(self, idx, targets=None, cache=None):
        """Next-token logits and loss.

        idx (B, T) int64; with a cache, the T tokens after those that it holds. With targets (B, T) int64: logits
        (B, T, V) and the mean cross-entropy in nats. Without: logits of the last position only, (B, 1, V), and None.
        Raises ValueError where the tokens outgrow the context."""
        start = 0 if cache is None else cache[0].length
        T, block_size = idx.size(1), self.config.block_size
        if start + T > block_size:
            raise ValueError(
                f"{start} + {T} tokens are more than the context of block_size={block_size}; crop them"
            )
        x = self.wte(idx)  # (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe.weight[start : start + T]
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.blocks):
            x = block(x, start, None if cache is None else cache[i])
        if targets is None:
            x = x[:, -1:]
        logits = F.linear(self.ln_f(x), self.wte.weight)  # (B, T or 1, V): tied embeddings
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    def new_cache(self):
        return [Cache(self.config.block_size) for _ in self.blocks]

    @torch.no_grad()  # not inference_mode: there autocast would convert every weight anew for every token
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, use_cache=True):
        """Yields max_new_tokens tokens (B, 1), one at a time, that continue idx (B, T >= 1). Call eval() first, for
        dropout. temperature 0 takes the likeliest token; top_k leaves only the k likeliest to be drawn. When the
        context is full its last half is read again and generation goes on from there, with a cache and without."""
        window, block_size = idx, self.config.block_size
        cache, unread = None, window
        for _ in range(max_new_tokens):
            if window.size(1) > block_size:
                window, cache = window[:, -max(1, block_size // 2) :], None
            if cache is None:
                cache, unread = self.new_cache() if use_cache else None, window
            logits, _ = self(unread, cache=cache)
            token = sample(logits[:, -1], temperature, top_k)
            yield token
            window, unread = torch.cat([window, token], dim=1), token

    @torch.no_grad()
    def cache_bytes(self):
        """Bytes of the cache for a whole context, and for a token of it: measured, in the autocast context at hand."""
        cache = self.new_cache()
        self(torch.zeros(1, 1, dtype=torch.int64, device=self.wte.weight.device), cache=cache)
        nbytes = sum(buffer.nbytes for layer in cache for buffer in layer.buffers)
        return nbytes, nbytes // self.config.block_size

    def use_kernel(self, name, context):
        """Has QV or QV-Ka attend by kernel.py if `name` is triton, after a trial in that autocast context. Returns what
        is used, torch or triton; auto is torch: the kernel gains in long sequences with agf. Raises UserError."""
        if name != "triton":
            return "torch"
        import kernel

        config, attention = self.config, self.blocks[0].attention
        try:
            if not isinstance(attention, QV) or self.training and config.dropout:
                raise UserError("it is for qv and qv_ka, and has no dropout in training")
            with torch.no_grad(), context:
                q = attention.q(self.wte.weight[:1])  # has the dtype that products have
            kernel.trial(
                config.block_size,
                config.n_head,
                config.n_kv_head,
                attention.d_head,
                attention.d_ctx,
                attention.decay is not None,
                q.dtype,
                q.device,
                self.training,
            )
        except UserError as error:
            raise UserError(
                f"--kernel=triton cannot be used here: {error}; take --kernel=torch"
            ) from None
        for block in self.blocks:
            block.attention.kernel = kernel
        return name

    @classmethod
    def load(cls, path, device="cpu"):
        """The model of a checkpoint file, on the device, and the checkpoint itself: a dict of what CHECKPOINT lists.
        Raises UserError where there is none, or one that is damaged, older, or of another model.py."""
        if not Path(path).is_file():
            raise UserError(
                f"there is no checkpoint {path}; --out takes the folder of a run that train.py has made"
            )
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load looks at no checksum
                if name := archive.testzip():
                    raise ValueError(f"{name} in it is not what was written")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
                raise ValueError("it was written by older code")
            if wrong := [
                key for key, kind in CHECKPOINT.items() if not isinstance(checkpoint.get(key), kind)
            ]:
                raise ValueError(f"{', '.join(wrong)} in it cannot be used")
            model = cls(GPTConfig(**checkpoint["model_config"]))
            model.load_state_dict(checkpoint["model"])
            for name, weights in model.named_parameters():
                if not weights.isfinite().all():
                    raise ValueError(f"not all weights of {name} are numbers")
                shapes = {tensor.shape for tensor in checkpoint["optimizer"][name].values()}
                if checkpoint["losses"] and {(), *shapes} != {
                    (),
                    weights.shape,
                }:  # PyTorch would not look
                    raise ValueError(f"its optimizer's state does not fit {name}")
            if tokenizer_size(checkpoint["tokenizer"]) > model.config.vocab_size:
                raise ValueError("its tokenizer knows more tokens than its model")
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({describe_error(error)}); mend that and try again"
            ) from None
        except (
            zipfile.BadZipFile,
            pickle.UnpicklingError,
            RuntimeError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
        ) as error:
            raise UserError(
                f"{path} is damaged, or of another model.py ({describe_error(error)}); take another run by --out, "
                "or copy the other of last.pt and best.pt over it, or train again"
            ) from None
        return model.to(device), checkpoint


class NaNForEmpty(TorchFunctionMode):
    """torch.empty gives NaN: so a parameter that nobody gave values is found out."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        return made.fill_(math.nan) if function is torch.empty else made


def sample(logits, temperature, top_k):
    """Draws one token (B, 1) for each row of logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    logits = (
        logits.float() - logits.max(-1, keepdim=True).values
    )  # at most 0, whatever it is divided by
    return torch.multinomial(torch.softmax(logits / max(temperature, 1e-30), dim=-1), 1)


# --- What a checkpoint holds -------------------------------------------------------------------------------------

CHECKPOINT_FORMAT = 3  # goes up when old checkpoints would mean something else
CHECKPOINT = dict(
    format=int,
    model=dict,
    optimizer=dict,
    model_config=dict,
    train_config=dict,
    tokenizer=dict,
    data_sha256=dict,
    losses=list,
    log=list,
    seconds=float,
)

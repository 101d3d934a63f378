"""A GPT whose attention is chosen by one flag: qkv, gqa, mla, qv or qv_ka.

Attention compares a query with the keys of all earlier tokens and mixes their values by how well they match:

    y_i = sum_j p_ij v_j,    p_ij = softmax over j <= i of  q_i . k_j / sqrt(D)

"QV May Be Enough" (arXiv:2603.15665) asks whether the key has to exist. This file turns that question into another:
*what must a token leave behind, so that later tokens can attend to it?* An attention here says two things: what it
remembers of each token (`write`: exactly what a KV cache stores), and how keys and values are read from that memory
(`read`). The rest is shared (but for how MLA and QV-Ka ask), and training is the same forward pass with no past.

    attention   remembered per token           key           value     numbers per token and layer
    qkv         k, v                           k             v         2 H D
    gqa         k, v of G heads, G divides H   k             v         2 G D
    mla         latent c, rotary key r         [up_k(c); r]  up_v(c)   d_latent (+ d_rope under rope)
    qv          v                              v             v         H D
    qv_ka       v, and a context g             [g; v] W_K    v         H D + d_ctx

Letters in shapes, all of them: B batch, T new tokens, S remembered tokens (the T new ones are the last of them),
C n_embd, H heads, G key/value heads, D = C / H head width, L d_latent, R d_rope, E d_ctx, V vocabulary. (In the paper's
formulas G and V are also the contexts g and the values v of all tokens, as matrices.)
"""

import math
import os
import pickle
import zipfile
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from prepare import UserError, reason

# ---------------------------------------------------------------------------------------------------------------------
# Positions: a GPT-2 style table added at the input (`learned`, in class GPT), or one of these two inside attention.


class Rotary(nn.Module):
    """RoPE (arXiv:2104.09864): turn pairs of numbers, one from each half of the vector, by angles that grow with the token's
    position, so that the dot product of two rotated vectors depends on their distance alone."""

    def __init__(self, width, block_size):
        super().__init__()
        frequency = 10000.0 ** (-torch.arange(0, width, 2) / width)                  # (width/2,)
        angle = torch.arange(block_size)[:, None, None] * frequency                  # (block_size, 1, width/2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x, start):
        """x (B, T, heads, width), whose first token stands at absolute position `start`; the same shape comes back."""
        cos, sin = (table[start : start + x.size(1)] for table in (self.cos, self.sin))   # (T, 1, width/2)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


class Decay(nn.Module):
    """Our reading of AGF (arXiv:2603.04805; the source of its exact formula is not public): a key at distance r counts
    (1 + r)^(-a_h) times what one at distance 0 does. Each head learns its exponent a_h > 0, kept positive as exp(log_a); they start between
    1/4, which sees far, and 4, which sees little but the token itself."""

    def __init__(self, n_head):
        super().__init__()
        self.log_a = nn.Parameter(torch.linspace(math.log(0.25), math.log(4.0), n_head))

    def forward(self, T, S):
        """The power law as an additive logit bias, -a_h log(1 + r): (1, H, T, S)."""
        i, j = (torch.arange(n, device=self.log_a.device) for n in (T, S))
        distance = (i[:, None] + S - T - j).clamp(min=0)                             # the last query is the last key
        return -self.log_a.exp()[None, :, None, None] * torch.log1p(distance.to(self.log_a.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Attention: what all five share, then what each of them remembers and reads.


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
        self.decay = Decay(H) if config.pos == "agf" else None

    def forward(self, x, start=0, cache=None):
        q, memory = self.query(x, start), self.write(x, start)
        if cache is not None:
            memory = cache.append(memory)                                            # the past, then the T new tokens
        y = self.mix(q, memory)                                                      # (B, T, H, D)
        return F.dropout(self.out(y.flatten(2)), self.p_dropout, self.training)      # (B, T, C)

    def query(self, x, start):
        return self.rotate(self.heads(self.q(x)), start)                             # (B, T, H, D)

    def mix(self, q, memory):
        return self.attend(*self.read(q, memory))

    def attend(self, q, k, v, score=None):
        """softmax(scale q k^T + score) v over the keys that a query may see.

        q (B, T, H, *), k and v (B, S, G, *) where G divides H, score (B, H, T, S); returns (B, T, H, width of v).
        Query t stands at absolute position S - T + t and sees the keys up to there."""
        T, S, G = q.size(1), k.size(1), k.size(2)
        if self.decay is not None:
            decay = self.decay(T, S).type_as(q)                                      # (1, H, T, S)
            score = decay if score is None else score + decay
        # SDPA aligns its own mask to the first key: right only if T == S. (torch.compile may make a symbol of `1 < T == S`
        # where T varies, but not of an `if`, and SDPA takes no symbol.)
        is_causal = True if score is None and 1 < T == S else False
        if T > 1 and not is_causal:
            future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
            score = (q.new_zeros(T, S) if score is None else score).masked_fill(future, -math.inf)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))                             # (B, heads, tokens, width)
        if T == 1:
            # H/G query heads ask a key head for one token: as good as one head asking for H/G tokens, all of which see all S.
            # SDPA then need not copy the key for every head, as enable_gqa does on a CPU.
            q = q.unflatten(1, (G, -1)).squeeze(3)                                   # (B, H, 1, *) -> (B, G, H/G, *)
            score = None if score is None else score.unflatten(1, (G, -1)).squeeze(3)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=score, is_causal=is_causal, dropout_p=self.p_dropout if self.training else 0.0,
            scale=self.scale, enable_gqa=q.size(1) != G)
        return y.reshape(-1, self.n_head, T, v.size(-1)).transpose(1, 2)

    def weights(self, x):
        """The weights (B, H, T, T) by which the tokens x (B, T, C) attend to each other: with the identity for values,
        the output of attention is its weights."""
        q, k, v, *score = self.read(self.query(x, 0), self.write(x, 0))
        identity = torch.eye(x.size(1)).type_as(v)[None, :, None].expand(len(v), -1, v.size(2), -1)        # (B, T, G, T)
        return self.attend(q, k, identity, *score).transpose(1, 2)

    def heads(self, x):
        return x.unflatten(-1, (-1, self.d_head))                                    # (B, T, H D) -> (B, T, H, D)

    def rotate(self, x, start):
        return x if self.rotary is None else self.rotary(x, start)


class QKV(Attention):
    """Multi-head attention (arXiv:1706.03762): every head has a key and a value of its own."""

    def __init__(self, config, n_kv_head=None):
        super().__init__(config)
        width = (n_kv_head or self.n_head) * self.d_head
        self.k = nn.Linear(config.n_embd, width, bias=False)
        self.v = nn.Linear(config.n_embd, width, bias=False)

    def write(self, x, start):
        return self.rotate(self.heads(self.k(x)), start), self.heads(self.v(x))     # 2 x (B, T, G, D)

    def read(self, q, memory):
        return q, *memory


class GQA(QKV):
    """Grouped-query attention (arXiv:2305.13245): H / G query heads share one key and value head. G = 1 is MQA."""

    def __init__(self, config):
        super().__init__(config, config.n_kv_head)


class MLA(Attention):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, eq. 9-19): keys and values of all heads are read from
    one small latent c. When decoding, up_k folds into the query and up_v into the output, and attention runs straight over
    the latents. RoPE on the keys would forbid that, so position gets a key r of its own, which the heads share."""

    def __init__(self, config):
        D, L, R = config.n_embd // config.n_head, config.d_latent, config.d_rope if config.pos == "rope" else 0
        super().__init__(config, d_query=D + R, d_rotary=R)
        self.widths = L, R
        self.down = nn.Linear(config.n_embd, L + R, bias=False)
        self.up_k = nn.Parameter(torch.empty(config.n_head, L, D))
        self.up_v = nn.Parameter(torch.empty(config.n_head, L, D))

    def query(self, x, start):
        q, q_r = self.q(x).unflatten(-1, (self.n_head, -1)).tensor_split([self.d_head], dim=-1)
        return torch.cat([q, self.rotate(q_r, start)], dim=-1)                       # (B, T, H, D + R)

    def write(self, x, start):
        c, r = self.down(x)[:, :, None].split(self.widths, dim=-1)
        return (torch.cat([c, self.rotate(r, start)], dim=-1),)                      # (B, T, 1, L + R)

    def read(self, q, memory):
        if has_past(q, memory):                    # q . up_k(c) = up_k^T(q) . c: the memory is the one head's key and value
            q, q_r = q.tensor_split([self.d_head], dim=-1)
            q = torch.einsum("bthd,hld->bthl", q, self.up_k)
            return torch.cat([q, q_r], dim=-1), *memory, *memory                     # (B, T, H, L + R), (B, S, 1, L + R)
        c, r = memory[0].split(self.widths, dim=-1)                                  # (B, S, 1, L), (B, S, 1, R)
        k = torch.einsum("bsl,hld->bshd", c[:, :, 0], self.up_k)
        v = torch.einsum("bsl,hld->bshd", c[:, :, 0], self.up_v)
        return q, torch.cat([k, r.expand(-1, -1, self.n_head, -1)], dim=-1), v       # (B, S, H, D + R), (B, S, H, D)

    def mix(self, q, memory):
        y = super().mix(q, memory)
        if has_past(q, memory):                    # y is a mean of memories [c ; r]; the mean of up_v(c) is up_v of the mean
            y = torch.einsum("bthl,hld->bthd", y[..., : self.widths[0]], self.up_v)
        return y                                                                     # (B, T, H, D)


class QV(Attention):
    """Attention without keys (arXiv:2603.15665): softmax(Q V^T / sqrt(D)) V. What a token is remembered for is also what
    it is found by. It stays unrotated as a value, so under RoPE the copy that is scored is rotated when read."""

    kernel = None                                                                    # kernel.py, if GPT.use_kernel was called

    def __init__(self, config, **widths):
        super().__init__(config, **widths)
        self.v = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def write(self, x, start):
        return (self.heads(self.v(x)),)                                              # (B, T, H, D)

    def read(self, q, memory):
        (v,) = memory
        return q, self.rotate(v, 0), v

    def mix(self, q, memory):
        return super().mix(q, memory) if self.kernel is None else self.fused(q, *memory)

    def fused(self, q, v, q_ctx=None, ctx=None):
        """`mix` by kernel.py, which loads each value once, as key and as value. Raises ValueError for what it cannot do."""
        if self.rotary is not None and ctx is None:
            raise ValueError("pos='rope' scores a rotated copy of QV's values, and the fused kernel has no copy; take agf or learned")
        if self.training and self.p_dropout:
            raise ValueError(f"dropout={self.p_dropout} of attention weights is not in the fused kernel; train with dropout=0")
        decay = None if self.decay is None else self.decay.log_a.exp()               # (H,)
        if q.size(1) > 1 or torch.is_grad_enabled():
            return self.kernel.qv_attention(q, v, q_ctx, ctx, decay)                 # (B, T, H, D)
        lengths = q.new_full(q.shape[:1], v.size(1), dtype=torch.int32)              # (B,): all remember S tokens
        return self.kernel.qv_decode(q, v, q_ctx, ctx, decay, lengths)               # (B, 1, H, D)


class QVKa(QV):
    """QV-Ka, "Key-after-value & ctx" (arXiv:2603.15665): K = [G ; V] W_K, made from the values and from one small context
    vector per token, G = x W_ctx, which the heads share. Because the key is linear in the memory,

        q . k_j  =  q . W_K^T [g_j ; v_j]  =  (W_K q) . [g_j ; v_j]  =  q_ctx . g_j  +  q_v . v_j,

    it never has to exist: QV-Ka is QV plus a score from the context. RoPE turns g and q_ctx: position lives in the
    context, meaning in the value."""

    def __init__(self, config):
        super().__init__(config, d_rotary=config.d_ctx)
        self.widths = config.d_ctx, self.d_head                                      # E, D
        self.ctx = nn.Linear(config.n_embd, config.d_ctx, bias=False)
        n_wk = 1 if config.shared_wk else config.n_head
        self.w_k = nn.Parameter(torch.empty(n_wk, sum(self.widths), self.d_head))

    def query(self, x, start):
        return self.heads(self.q(x))                                                 # rotated in `read`, once folded

    def write(self, x, start):
        ctx = self.rotate(self.ctx(x)[:, :, None], start).squeeze(2)
        return *super().write(x, start), ctx                                         # (B, T, H, D), (B, T, E)

    def read(self, q, memory):
        v, ctx = memory                                                              # (B, S, H, D), (B, S, E)
        if self.rotary is None and not has_past(q, memory):                          # training: K by one matmul, used T times,
            w_ctx, w_v = self.w_k.expand(self.n_head, -1, -1).split(self.widths, dim=1)          # (H, E, D), (H, D, D)
            k = torch.einsum("bse,hed->bshd", ctx, w_ctx) + torch.einsum("bshc,hcd->bshd", v, w_v)
            return q, k, v                                                           # costs less than T wider scores
        q_v, q_ctx = self.fold(q, ctx)
        score = self.scale * q_ctx.flatten(1, 2) @ ctx.mT                            # (B, T H, S)
        return q_v, v, v, score.unflatten(1, (-1, self.n_head)).transpose(1, 2)

    def fold(self, q, ctx):
        """W_K q: q_v (B, T, H, D), which asks for values, and q_ctx (B, T, H, E), which asks for contexts."""
        folded = torch.einsum("bthd,hcd->bthc", q, self.w_k)                         # (B, T, H, E + D)
        q_ctx, q_v = folded.split(self.widths, dim=-1)
        return q_v, self.rotate(q_ctx, ctx.size(1) - q.size(1))

    def fused(self, q, v, ctx):
        q_v, q_ctx = self.fold(q, ctx)
        return super().fused(q_v, v, q_ctx, ctx)


def has_past(q, memory):
    """Whether tokens before the new ones are remembered. Then, as a rule, the queries are few, and it is cheaper to fold
    up-projections into them than to apply them to all S memories."""
    return q.size(1) < memory[0].size(1)


ATTENTIONS = {"qkv": QKV, "gqa": GQA, "mla": MLA, "qv": QV, "qv_ka": QVKa}
POSITIONS = ("learned", "rope", "agf")


# ---------------------------------------------------------------------------------------------------------------------
# The KV cache: it stores whatever `write` returns and knows no variant.


class LayerCache:
    """One layer's memory: buffers of block_size tokens, made when the first tokens arrive."""

    def __init__(self, block_size):
        self.block_size, self.length, self.buffers = block_size, 0, ()

    def append(self, memory):
        """Stores the T new tokens' memory, a tuple of (B, T, ...); returns that of all S, as views (B, S, ...)."""
        start, self.length = self.length, self.length + memory[0].size(1)
        if not self.buffers:
            self.buffers = tuple(m.new_empty(m.size(0), self.block_size, *m.shape[2:]) for m in memory)
        for buffer, m in zip(self.buffers, memory):
            buffer[:, start : self.length] = m
        return tuple(buffer[:, : self.length] for buffer in self.buffers)


class Cache:
    """What generation remembers: `length` tokens so far, in buffers of `nbytes` bytes for `block_size` of them."""

    def __init__(self, n_layer, block_size):
        self.layers = [LayerCache(block_size) for _ in range(n_layer)]
        self.block_size = block_size

    @property
    def length(self):
        return self.layers[0].length

    @property
    def nbytes(self):
        return sum(buffer.nbytes for layer in self.layers for buffer in layer.buffers)


# ---------------------------------------------------------------------------------------------------------------------
# The model: GPT-2 with any of these attentions.


def option(default, help, choices=None, only=None):
    """A configuration field that explains itself: the help text is both its comment and what --help prints. `only` says with
    which values of other fields this one counts: {"attention": ("gqa", "mine")}."""
    help = f"{' under '.join('/'.join(values) for values in only.values())}: {help}" if only else help
    return field(default=default, metadata={"help": help, "choices": choices, "only": only or {}})


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. None stands for a default that depends on the other fields and is filled in. Raises UserError
    (field, value, rule, a value that works) where the fields do not fit together."""

    attention: str = option("qv_ka", "what a token leaves behind for later ones to attend to", ATTENTIONS)
    pos: str = option("agf", "positions: a learned table (GPT-2), rotary, or agf: a learned power law of distance", POSITIONS)
    block_size: int = option(256, "context: how many tokens the model sees at once")
    vocab_size: int = option(65, "number of different tokens")
    n_layer: int = option(6, "number of blocks")
    n_head: int = option(6, "attention heads in each block")
    n_embd: int = option(384, "width of the residual stream; the heads share it equally")
    dropout: float = option(0.0, "fraction of activations dropped in training")
    n_kv_head: int | None = option(None, "key/value heads, 1 is MQA (default: half the heads, so as much cache as qv)", only=dict(attention=("gqa",)))
    d_latent: int | None = option(None, "width of the latent (default: 4 x head width, as in DeepSeek-V2)", only=dict(attention=("mla",)))
    d_rope: int | None = option(None, "width of the rotary key (default: half the head width, likewise)", only=dict(attention=("mla",), pos=("rope",)))
    d_ctx: int | None = option(None, "width of the context vector (default: 2 x head width)", only=dict(attention=("qv_ka",)))
    shared_wk: bool = option(False, "one W_K for all heads instead of one each", only=dict(attention=("qv_ka",)))
    n_inner: int | None = option(None, "width of the MLP (default: 4 x n_embd)")

    def __post_init__(self):
        def check(ok, name, rule):
            if not ok:
                raise UserError(f"{name}={getattr(self, name)!r} {rule}")

        for name, choices in ("attention", ATTENTIONS), ("pos", POSITIONS):
            check(getattr(self, name) in choices, name, f"is unknown; choose one of {', '.join(choices)}")
        for name in "block_size", "vocab_size", "n_layer", "n_head", "n_embd":
            check(getattr(self, name) >= 1, name, "must be at least 1")
        check(0 <= self.dropout < 1, "dropout", "must lie in [0, 1), for example 0.1")
        H = self.n_head
        check(self.n_embd % H == 0, "n_embd", f"must be a multiple of n_head={H}, for example {-(-self.n_embd // H) * H}")
        D = self.n_embd // H
        derived = dict(n_kv_head=H // 2 if H % 2 == 0 else 1, d_latent=4 * D, d_rope=max(2, D // 4 * 2), d_ctx=2 * D,
                       n_inner=4 * self.n_embd)
        for name, default in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
            check(getattr(self, name) >= 1, name, f"must be at least 1, for example {default}")
        check(H % self.n_kv_head == 0, "n_kv_head", f"must divide n_head={H}, for example {derived['n_kv_head']}")
        if self.pos == "rope":
            check(D % 2 == 0, "n_embd", f"gives heads of odd width {D}, but rope turns pairs; take {2 * H * -(-D // 2)}")
            for name in "d_rope", "d_ctx":
                check(getattr(self, name) % 2 == 0, name, f"must be even under rope, for example {derived[name]}")


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.out = nn.Linear(config.n_inner, config.n_embd, bias=False)
        self.p_dropout = config.dropout

    def forward(self, x):
        return F.dropout(self.out(F.gelu(self.up(x), approximate="tanh")), self.p_dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=False)
        self.attention = ATTENTIONS[config.attention](config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=False)
        self.mlp = MLP(config)

    def forward(self, x, start, cache):
        x = x + self.attention(self.ln_1(x), start, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 (pre-norm, GELU, tied embeddings), without biases."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.pos == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=False)
        for name, parameter in self.named_parameters():
            self.init(name, parameter)

    def init(self, name, parameter):
        """Matrices keep the scale of what they multiply, std 1/sqrt(fan_in), so a K or V made in two steps starts as large
        as one made in one; those that add to the residual stream start smaller, as in GPT-2. Embeddings, tied to the
        output, start with logits of std 0.3: a loss within 0.1 of ln(V). Vectors keep the values that their module gave."""
        if parameter.dim() > 1:                            # (V, C), (fan_out, fan_in), or per head (H, fan_in, fan_out)
            std = parameter.size(1) ** -0.5
            if name.startswith("w"):                                                 # wte, wpe
                std *= 0.3
            if name.endswith("out.weight"):
                std /= math.sqrt(2 * self.config.n_layer)
            nn.init.normal_(parameter, std=std)

    def forward(self, idx, targets=None, cache=None):
        """Next-token logits and loss.

        idx (B, T) int64; with a cache, the T tokens after those that it holds. With targets (B, T) int64: logits
        (B, T, V) and the mean cross-entropy in nats. Without: logits of the last position only, (B, 1, V), and None.
        Raises ValueError where the tokens outgrow the context."""
        start = 0 if cache is None else cache.length
        T, block_size = idx.size(1), self.config.block_size
        if start + T > block_size:
            raise ValueError(f"{start} + {T} tokens are more than the context of block_size={block_size}; crop them")
        x = self.wte(idx)                                                            # (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe.weight[start : start + T]
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.blocks):
            x = block(x, start, None if cache is None else cache.layers[i])
        if targets is None:
            x = x[:, -1:]
        logits = F.linear(self.ln_f(x), self.wte.weight)                             # (B, T or 1, V): tied embeddings
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    def use_kernel(self, name, context):
        """Lets QV or QV-Ka attend by kernel.py where `name` is triton; returns what is used, torch or triton (auto is torch:
        no GPU has measured yet where the kernel is faster). Raises UserError where a trial in that autocast context fails."""
        if name != "triton":
            return "torch"
        device = self.wte.weight.device
        try:
            kernel = import_module("kernel")
            if device.type != "cuda" and not kernel.INTERPRETED:
                raise ValueError(f"it needs a CUDA GPU, and this is {device}")
            if not isinstance(self.blocks[0].attention, QV):
                raise ValueError(f"attention={self.config.attention!r} has keys; the fused kernel is for qv and qv_ka")
            for block in self.blocks:
                block.attention.kernel = kernel
            with torch.no_grad(), context:
                self(torch.zeros(1, min(2, self.config.block_size), dtype=torch.int64, device=device))
        except (ValueError, RuntimeError) as error:
            raise UserError(f"--kernel=triton cannot be used here: {reason(error)}; or take --kernel=torch") from None
        return "triton"

    @classmethod
    def load(cls, path, device="cpu"):
        """The model of a checkpoint file, on the device, and the checkpoint itself: a dict as CHECKPOINT lists it. Raises
        UserError where there is none, or one that is damaged, older, or of another model.py."""
        path = Path(path)
        if not path.is_file():
            runs = sorted(str(run.parent) for run in path.parent.rglob("last.pt"))
            raise UserError(f"there is no checkpoint {path}; --out takes the folder of a run that train.py has made"
                            + (f", for example {runs[0]}" if runs else ""))
        try:
            with zipfile.ZipFile(path) as archive:                                   # torch.load looks at no checksum
                if name := archive.testzip():
                    raise ValueError(f"{name} in it is not what was written")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
                raise ValueError(f"its format is not {CHECKPOINT_FORMAT}")
            if wrong := [key for key, kind in CHECKPOINT.items() if not isinstance(checkpoint.get(key), kind)]:
                raise ValueError(f"{', '.join(wrong)} in it cannot be used")
            model = cls(GPTConfig(**checkpoint["model_config"]))
            model.load_state_dict(checkpoint["model"])
        except OSError as error:
            raise UserError(f"{path} cannot be read ({reason(error)}); mend that and try again") from None
        except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged, or of another model.py ({reason(error)}); copy the other of last.pt and "
                            "best.pt over it, or train again") from None
        return model.to(device), checkpoint

    def new_cache(self):
        return Cache(self.config.n_layer, self.config.block_size)

    @torch.no_grad()
    def cache_bytes(self):
        """Bytes of the cache's buffers, for a whole context and for one token of it: measured, in the autocast context at hand."""
        cache = self.new_cache()
        self(torch.zeros(1, 1, dtype=torch.int64, device=self.wte.weight.device), cache=cache)
        return cache.nbytes, cache.nbytes // cache.block_size

    @torch.no_grad()                     # not inference_mode: there autocast would convert every weight anew for every token
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, use_cache=True):
        """Yields max_new_tokens tokens (B, 1), one at a time, that continue idx (B, T >= 1). Call eval() first, for dropout.

        temperature 0 takes the likeliest token; top_k leaves only the k likeliest to be drawn. When the context is full
        its last half is read again and generation goes on from there, with a cache and without."""
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


def sample(logits, temperature, top_k):
    """Draws one token (B, 1) for each row of logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    logits = logits.float() - logits.max(-1, keepdim=True).values                    # at most 0, whatever it is divided by
    return torch.multinomial(torch.softmax(logits / max(temperature, 1e-30), dim=-1), 1)


# ---------------------------------------------------------------------------------------------------------------------
# What every program needs to run a model: a device, a precision, and what a checkpoint file holds.


def choose_device(name):
    """The torch.device of that name; auto is CUDA or MPS where there is one, else the CPU. Each process of torchrun's has a
    GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        torch.empty(1, device=name).tolist()
    except (RuntimeError, AssertionError) as error:                                  # no such backend, or none in this build
        raise UserError(f"--device={name} cannot be used here ({reason(error)}); take --device=cpu or leave it out") from None
    torch.set_float32_matmul_precision("high")                                       # TF32, where a GPU has it
    return torch.device(name)


def autocast(device, dtype):
    """The context of a forward pass: matrix products in that dtype, all else in float32. auto is bfloat16 where a CUDA device
    has it, else float32."""
    if dtype == "auto":
        bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if bfloat16 else "float32"
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")


CHECKPOINT_FORMAT = 1                 # goes up when old weights would compute something else
CHECKPOINT = {"format": int, "model": dict, "optimizer": dict, "model_config": dict, "train_config": dict, "tokenizer": dict,
              "data_sha256": str, "step": int, "seconds": float, "best_val_loss": float, "losses": list, "log": list}

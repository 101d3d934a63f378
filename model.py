"""A GPT whose attention is chosen by one flag: qkv, gqa, mla, qv or qv_ka.

Attention compares a query with the keys of all earlier tokens and mixes their values by how well
they match:

    y_i = sum_j p_ij v_j,    p_ij = softmax over j <= i of  q_i . k_j / sqrt(D)

"QV May Be Enough" (arXiv:2603.15665) asks whether the key has to exist. This file turns that
question into another: what must a token leave behind, so that later tokens can attend to it?
Each attention says what it remembers of a token (`write`: exactly what a KV cache stores), and how
a query meets what is remembered (`read`). Everything else is shared, and training is the same
forward pass with an empty past.

    attention  remembered per token         key           value    numbers per token and layer
    qkv        k, v                         k             v        2 H D
    gqa        k, v of G heads              k             v        2 G D
    mla        latent c, rotary key r       [up_k(c); r]  up_v(c)  d_latent (+ d_rope under rope)
    qv         v of G heads                 v             v        G D
    qv_ka      v of G heads, context g      [g; v] W_K    v        G D + d_ctx

Letters in shapes: B batch, T new tokens, S remembered tokens (the T new ones are the last of them),
C n_embd, H heads, D = C / H head width, G heads of keys or values (each serves H / G query heads),
L d_latent, R d_rope, E d_ctx, V vocabulary.
"""

import math
import pickle
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from prepare import UserError, describe_error

# The logits of an untrained model have this standard deviation: its loss is within 0.1 of ln(V).
LOGITS_STD = 0.3

# --- Positions ------------------------------------------------------------------------------------
# A table is added to the embeddings (learned or sinusoidal), or modules work inside attention:
# Rotary (rope), Decay (agf), or both (rope+agf).

POSITIONS = ("learned", "sinusoidal", "rope", "agf", "rope+agf")
ROPE = ("rope", "rope+agf")
AGF = ("agf", "rope+agf")


def frequencies(width):
    """The frequencies of width / 2 waves, from 2 pi to nearly 10000 * 2 pi tokens long."""
    return 10000.0 ** (-torch.arange(0, width, 2) / width)


class Sinusoids(nn.Module):
    """The fixed table of "Attention Is All You Need" (arXiv:1706.03762, section 3.5), which is the
    paper's baseline. It is scaled down to the size that embeddings start with. Unscaled it would be
    27 times as large at a width of 128, and more in wider models: the first LayerNorm would leave
    next to nothing of the tokens."""

    def __init__(self, block_size, width):
        super().__init__()
        angle = torch.arange(block_size)[:, None] * frequencies(width)
        waves = torch.cat([angle.sin(), angle.cos()], dim=-1)[:, :width]  # (block_size, width)
        # A wave's mean square is 1/2, an embedding's is LOGITS_STD^2 / width.
        table = LOGITS_STD * math.sqrt(2 / width) * waves
        self.register_buffer("weight", table, persistent=False)


class Rotary(nn.Module):
    """RoPE (arXiv:2104.09864): rotates pairs of numbers, one from each half of a vector, by angles
    that grow with the token's position. The dot product of two rotated vectors then depends on the
    distance of their tokens alone."""

    def __init__(self, width, block_size):
        super().__init__()
        angle = torch.arange(block_size)[:, None, None] * frequencies(width)
        cos, sin = angle.cos(), angle.sin()  # (block_size, 1, width / 2)
        self.register_buffer("cos", torch.cat([cos, cos], dim=-1), persistent=False)
        self.register_buffer("sin", torch.cat([-sin, sin], dim=-1), persistent=False)

    def forward(self, x, start, inverse=False):
        """Rotates x (B, T, heads, width), whose first token stands at position `start`: the pair
        (a, b) becomes (a cos - b sin, b cos + a sin). `inverse` rotates back."""
        cos = self.cos[start : start + x.size(1)]
        sin = self.sin[start : start + x.size(1)]
        swapped = x.roll(x.size(-1) // 2, dims=-1)  # (b, a)
        return torch.addcmul(x * cos, swapped, sin, value=-1 if inverse else 1).type_as(x)


class Decay(nn.Module):
    """Our reading of AGF (arXiv:2603.04805; its exact formula is in no source that we could read).
    A key at distance r counts (1 + r)^-a times what it would count at distance 0. Each head learns
    its exponent a > 0, stored as log a. At the start they lie between 1/4, which sees far, and 4,
    which sees little but the token itself."""

    def __init__(self, n_head):
        super().__init__()
        self.log_a = nn.Parameter(torch.linspace(math.log(0.25), math.log(4.0), n_head))

    def exponents(self):
        return self.log_a.exp()  # (H,)

    def forward(self, T, S):
        """What the power law adds to the scores, -a log(1 + r), as (H, T, S)."""
        position = torch.arange(S, device=self.log_a.device, dtype=torch.float32)
        distance = (position[S - T :, None] - position).clamp(min=0)  # (T, S)
        return -self.exponents()[:, None, None] * torch.log1p(distance)


# --- Attention: what all five share, then what each of them remembers and reads -------------------


class Attention(nn.Module):
    """Causal self-attention. A subclass defines

    write(x, start)            what the new tokens x (B, T, C) leave behind: a tuple of tensors
                               (B, T, heads, width)
    read(q, memory, start)     how queries q (B, T, H, D) meet what is remembered, a tuple of
                               tensors (B, S, heads, width): returns pairs and values

    A score is a sum of products, one for each pair (query part (B, T, H, width), key part
    (B, S, heads, width)). The answer is a mean of the values (B, S, heads, D), weighted by the
    softmax of the scores. `start` is the position of the first new token. It is 0 in training, for
    a prompt and without a cache: then all tokens are new, and keys may be made from what they leave
    behind. Comments call that training, and all else decoding.
    """

    # The module kernel.py, after GPT.use_kernel.
    kernel = None
    # Whether it decodes for this attention, too: only where the value is the key.
    decodes_fused = False
    # Whether values are rotated, so that answers have to be rotated back.
    rotates_values = False

    def __init__(self, config, d_query=None, d_rotary=None):
        super().__init__()
        C, H, D = config.n_embd, config.n_head, config.n_embd // config.n_head
        self.n_head, self.d_head, self.p_dropout = H, D, config.dropout
        d_query = d_query or D
        self.scale = d_query**-0.5
        self.q = nn.Linear(C, H * d_query, bias=False)
        self.out = nn.Linear(C, C, bias=False)
        self.rotary = Rotary(d_rotary or D, config.block_size) if config.pos in ROPE else None
        self.decay = Decay(H) if config.pos in AGF else None

    def forward(self, x, start=0, cache=None):
        q = self.query(x)  # (B, T, H, D)
        memory = self.write(x, start)
        if cache is not None:
            memory = cache.append(memory)  # the past, then the new tokens
        pairs, v = self.read(q, memory, start)
        y = self.finish(self.attend(pairs, v), start)  # (B, T, H, D)
        return F.dropout(self.out(y.flatten(2)), self.p_dropout, self.training)  # (B, T, C)

    def query(self, x):
        return self.q(x).unflatten(-1, (self.n_head, -1))  # (B, T, H, D)

    def finish(self, y, start):
        """A mean of rotated values, rotated back by the query's position i, is a mean of values
        that are rotated by their distance: R_i^T sum_j p_ij R_j v_j = sum_j p_ij R_(j-i) v_j."""
        return self.rotate(y, start, inverse=True) if self.rotates_values else y

    def attend(self, pairs, v):
        """A mean of v (B, S, G, width), weighted by the softmax of scale * (the sum of the products
        of all pairs) + decay. Of S tokens, the queries are the last T, and each sees no later one.
        Under autocast the softmax and what is added to the scores stay in float32.
        Returns (B, T, H, width)."""
        T, S = pairs[0][0].size(1), v.size(1)
        if self.kernel is not None and (T == S or self.decodes_fused):
            return self.attend_fused(pairs, v)
        if T == 1 < S:
            return self.attend_one(pairs, v)
        return self.attend_many(pairs, v)

    def attend_many(self, pairs, v):
        """`attend` for many queries, in training and for a prompt: joins the pairs to one query and
        one key, and lets PyTorch do the rest."""
        G, width, dtype = v.size(2), v.size(-1), v.dtype
        q = join([q for q, _ in pairs])  # (B, T, H, width)
        k = join([k.expand(-1, -1, G, -1) for _, k in pairs])  # (B, S, G, width)
        T, S = q.size(1), k.size(1)

        # PyTorch's own causal mask serves where all tokens are new and there is no decay. It has to
        # be told by a bool, and under torch.compile T == S may be a symbol.
        is_causal = True if self.decay is None and T == S else False
        bias = None
        if not is_causal:
            future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
            bias = q.new_zeros(T, S) if self.decay is None else self.decay(T, S)
            bias = bias.masked_fill(future, -math.inf)  # (T, S) or (H, T, S)
            q, k, v = q.type_as(bias), k.type_as(bias), v.type_as(bias)

        # PyTorch's attention is fast only where keys and values have one width.
        v = F.pad(v, (0, max(0, k.size(-1) - width)))
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
        return y.transpose(1, 2)[..., :width].to(dtype)

    def attend_one(self, pairs, v):
        """`attend` for the one query of a decoding step, which sees all S tokens. What they left
        behind is long, so nothing of it is copied: the products are added up, and the H / G query
        heads that share a key head become H / G queries of that head."""
        (q, k), *others = pairs
        S, G = k.size(1), k.size(2)
        q = q.view(len(q), G, self.n_head // G, -1)  # (B, G, H / G, width)
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, G, S, width)

        # What is added to the scores of the first pair: those of the other pairs, and the decay.
        bias = None if self.decay is None else self.decay(1, S)  # (H, 1, S)
        for pair in others:
            score = self.shared_product(*pair)  # (B, H, 1, S)
            bias = score if bias is None else score + bias
        if bias is not None:
            bias = bias.reshape(-1, *q.shape[1:3], S)  # (B or 1, G, H / G, S)

        # PyTorch's attention computes a head in one thread, so a single head would have one thread
        # only; and it rounds a bias to the numbers of q, which are shorter under autocast.
        if G > 1 and (bias is None or bias.dtype == q.dtype):
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        else:
            scores = (k @ (self.scale * q).mT).mT  # (B, G, H / G, S)
            scores = scores if bias is None else scores + bias
            y = scores.softmax(-1).type_as(v) @ v
        return y.flatten(1, 2)[:, None]  # (B, 1, H, width)

    def shared_product(self, q, k):
        """scale q k^T, (B, H, 1, S), of q (B, 1, H, width) and k (B, S, 1, width), which the heads
        share: in float32 also where autocast takes less."""
        q, k = q[:, 0], k[:, :, 0]  # (B, H, width) and (B, S, width)
        if k.dtype.itemsize < 4:
            q, k = q.float(), k.float()
        with torch.autocast(k.device.type, enabled=False):
            return (k @ (self.scale * q).mT).mT[:, :, None]

    def attend_fused(self, pairs, v):
        """`attend` by kernel.py, where a score is a product with a key and, if there is a second
        pair, one with what the heads share."""
        if self.training and self.p_dropout:
            raise UserError(
                "the fused kernel has no dropout of attention weights; take --dropout=0"
            )
        (q, k), *shared = pairs
        q_ctx, ctx = shared[0] if shared else (None, None)
        ctx = None if ctx is None else ctx[:, :, 0]  # (B, S, width)
        decay = None if self.decay is None else self.decay.exponents()
        if q.size(1) == 1 < v.size(1) and not torch.is_grad_enabled():
            return self.kernel.decode(q, v, q_ctx, ctx, decay)
        return self.kernel.attention(q, v, None if k is v else k, q_ctx, ctx, decay, self.scale)

    def split_heads(self, x):
        return x.unflatten(-1, (-1, self.d_head))  # (B, T, G D) -> (B, T, G, D)

    def rotate(self, x, start, inverse=False):
        return x if self.rotary is None else self.rotary(x, start, inverse)


class QKV(Attention):
    """Multi-head attention (arXiv:1706.03762): every head has a key and a value of its own. Or, if
    G < H, grouped-query attention (arXiv:2305.13245), where H / G query heads share one; G = 1 is
    MQA. With rope_values, RoPE rotates values, too, and answers are rotated back ("VO-RoPE", Su
    Jianlin, kexue.fm/archives/10862): a value then arrives rotated by its distance."""

    def __init__(self, config):
        super().__init__(config)
        self.rotates_values = config.rope_values
        self.k = nn.Linear(config.n_embd, config.n_kv_head * self.d_head, bias=False)
        self.v = nn.Linear(config.n_embd, config.n_kv_head * self.d_head, bias=False)

    def write(self, x, start):
        k = self.rotate(self.split_heads(self.k(x)), start)
        v = self.split_heads(self.v(x))
        if self.rotates_values:
            v = self.rotate(v, start)
        return k, v  # 2 x (B, T, G, D)

    def read(self, q, memory, start):
        k, v = memory
        return [(self.rotate(q, start), k)], v


class MLA(Attention):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, eq. 9-11 and 14-19): keys and
    values of all heads are computed from one small latent c, which is normalised. Queries are not
    compressed, as in DeepSeek-V2-Lite. In decoding no key is made: up_k folds into the query and
    up_v into the output, and attention runs straight over the latents. RoPE on keys would forbid
    that, so position gets a key r of its own, which the heads share."""

    def __init__(self, config):
        D, L = config.n_embd // config.n_head, config.d_latent
        R = config.d_rope if config.pos in ROPE else 0
        super().__init__(config, d_query=D + R, d_rotary=R)
        self.widths = L, R
        self.down = nn.Linear(config.n_embd, L + R, bias=False)
        self.up_k = nn.Parameter(torch.empty(config.n_head, L, D))
        self.up_v = nn.Parameter(torch.empty(config.n_head, L, D))

    def write(self, x, start):
        c, r = self.down(x)[:, :, None].split(self.widths, dim=-1)
        c = F.rms_norm(c, c.shape[-1:], eps=1e-6)  # without a gain, for up_k and up_v have one
        return (torch.cat([c, self.rotate(r, start)], dim=-1),)  # (B, T, 1, L + R)

    def read(self, q, memory, start):
        (latents,) = memory  # (B, S, 1, L + R)
        q_c, q_r = q.tensor_split([self.d_head], dim=-1)
        q_r = self.rotate(q_r, start)  # (B, T, H, R)

        # Training: make the keys and values of all heads.
        if start == 0:
            c, r = latents.split(self.widths, dim=-1)
            k = torch.einsum("bsl,hld->bshd", c[:, :, 0], self.up_k)
            v = torch.einsum("bsl,hld->bshd", c[:, :, 0], self.up_v)
            return [(q_c, k)] if self.rotary is None else [(q_c, k), (q_r, r)], v

        # Decoding: q . up_k(c) = up_k^T(q) . c, so [c; r] is one head's key, and its value.
        q = torch.cat([per_head(self.up_k, q_c), q_r], dim=-1)  # (B, T, H, L + R)
        return [(q, latents)], latents

    def finish(self, y, start):
        # Training: y is a mean of values already.
        if start == 0:
            return y
        # Decoding: y is a mean of [c; r], and a mean of up_v(c) is up_v of the mean of c.
        return per_head(self.up_v.mT, y[..., : self.widths[0]])


class QV(Attention):
    """Attention without keys (arXiv:2603.15665): softmax(Q V^T / sqrt(D)) V. A token is found by
    what it is remembered for. With G < H, a value serves several heads (Grouped-Tied Attention,
    arXiv:2505.21487).

    Under RoPE a value is rotated once, when it is written, and answers are rotated back. So scores
    and answers depend on distances alone, and one memory still serves as key and as value:

        score  (R_i q_i) . (R_j v_j) = q_i . R_(j-i) v_j,      answer  sum_j p_ij R_(j-i) v_j

    A value then arrives rotated, which QKV can have, too (rope_values): compare with that."""

    decodes_fused = rotates_values = True

    def __init__(self, config):
        super().__init__(config)
        self.v = nn.Linear(config.n_embd, config.n_kv_head * self.d_head, bias=False)

    def write(self, x, start):
        return (self.rotate(self.split_heads(self.v(x)), start),)  # (B, T, G, D)

    def read(self, q, memory, start):
        (v,) = memory
        return [(self.rotate(q, start), v)], v


class QVKa(QV):
    """QV-Ka, "Key-after-value & ctx" (arXiv:2603.15665): a key is [g ; v] W_K, computed from the
    value v and from one small context vector g = x W_ctx, which the heads share. A key is linear in
    what is remembered, so W_K can move over to the query, and no key has to exist:

        q . k_j  =  q . ([g_j ; v_j] W_K)  =  (q W_K^T) . [g_j ; v_j]  =  q_ctx . g_j  +  q_v . v_j

    So QV-Ka is QV plus a score from the context. Under RoPE, g and v are rotated when they are
    written, and q W_K^T when it asks. A score is then

        (q_i W_K^T) . R_(j-i) [g_j ; v_j]  =  q_i . ((R_(j-i) [g_j ; v_j]) W_K)

    A key like that on the right depends on the position i of the query, so no single one serves all
    queries: training folds W_K into the query, too."""

    def __init__(self, config):
        super().__init__(config)
        self.d_ctx = config.d_ctx
        self.makes_keys = self.rotary is None
        self.ctx = nn.Linear(config.n_embd, config.d_ctx, bias=False)
        self.w_k = nn.Parameter(torch.empty(self.shape_of_w_k(config)))

    def shape_of_w_k(self, config):
        n_matrices = 1 if config.wk == "shared" else config.n_head
        return n_matrices, config.d_ctx + self.d_head, self.d_head  # (H or 1, E + D, D)

    def write(self, x, start):
        (v,) = super().write(x, start)
        g = self.rotate_pieces(self.ctx(x), start)
        return v, g[:, :, None]  # (B, T, G, D), (B, T, 1, E)

    def read(self, q, memory, start):
        v, g = memory
        # Training: making keys costs less than scores that are E numbers wider.
        if start == 0 and self.makes_keys:
            keys = self.keys(v, g)  # (B, S, H, D)
            return [(self.rotate(q, start), keys)], repeat_heads(v, self.n_head)

        # Decoding, and training where no keys can be made: fold W_K into the query.
        q = self.rotate_pieces(self.fold(q), start)  # (B, T, H, E + D)
        q_ctx, q_v = q.tensor_split([self.d_ctx], dim=-1)
        return [(q_v, v), (q_ctx, g)], v

    def keys(self, v, g):
        """[g ; v] W_K: v (B, S, G, D) and g (B, S, 1, E) to (B, S, H, D)."""
        H, G = self.n_head, v.size(2)
        w_g, w_v = self.w_k.expand(H, -1, -1).tensor_split([self.d_ctx], dim=1)
        w_v = w_v.unflatten(0, (G, H // G))
        k_g = torch.einsum("bse,hed->bshd", g[:, :, 0], w_g)
        k_v = torch.einsum("bsgc,ghcd->bsghd", v, w_v)
        return k_g + k_v.flatten(2, 3)

    def fold(self, q):
        """q W_K^T: q (B, T, H, D) to (B, T, H, E + D)."""
        return per_head(self.w_k, q)

    def rotate_pieces(self, x, start):
        """Rotates x (B, T, .., n D) in pieces of width D: a context is as wide as several heads."""
        if self.rotary is None:
            return x
        pieces = x.reshape(*x.shape[:2], -1, self.d_head)
        return self.rotary(pieces, start).view(x.shape)


class DiagonalQVKa(QVKa):
    """QV-Ka with a diagonal W_K. [g ; v] falls into P = E / D + 1 pieces m_p of width D. Read each
    pair of numbers that RoPE rotates as one complex number. Then a head has a complex weight w_p
    for each number of a piece, and number by number

        k_j = sum_p w_p m_pj,        q . k_j = sum_p (conj(w_p) q) . m_pj

    A rotation multiplies by a complex number, too, so it may come before w_p or after it: keys can
    be made under RoPE. W_K has E + D numbers a head, where a matrix has (E + D) D."""

    def __init__(self, config):
        super().__init__(config)
        self.makes_keys = True

    def shape_of_w_k(self, config):
        # P real parts, then P imaginary ones. 2 P is the fan-in, too, which GPT.init reads: each
        # number of a key is a sum of 2 P products.
        P = config.d_ctx // self.d_head + 1
        return config.n_head, 2 * P, self.d_head // 2

    def weights(self):
        return as_complex(self.w_k, dim=1)  # (H, P, D / 2)

    def keys(self, v, g):
        pieces = [*g.split(self.d_head, dim=-1), repeat_heads(v, self.n_head)]
        k = 0.0
        for w, piece in zip(self.weights().unbind(1), pieces):
            k = k + w * as_complex(piece)
        return as_real(k).type_as(v)  # (B, S, H, D)

    def fold(self, q):
        folded = self.weights().conj() * as_complex(q[:, :, :, None])  # (B, T, H, P, D / 2)
        return as_real(folded).flatten(3).type_as(q)


def as_complex(x, dim=-1):
    """The pairs that RoPE rotates as complex numbers: the first half of x along `dim` holds their
    real parts, the second half their imaginary parts."""
    x = x if x.dtype == torch.float64 else x.float()
    return torch.complex(*x.chunk(2, dim=dim))


def as_real(x):
    return torch.cat([x.real, x.imag], dim=-1)


def per_head(w, x):
    """x w^T for each head: x (B, T, H, n) and w (H or 1, m, n) to (B, T, H, m)."""
    y = x.flatten(0, 1).transpose(0, 1) @ w.mT  # (H, B T, m)
    return y.transpose(0, 1).view(*x.shape[:3], -1)


def repeat_heads(x, n_head):
    """(B, S, G, D) to (B, S, H, D)."""
    G = x.size(2)
    return x if G == n_head else x.repeat_interleave(n_head // G, dim=2)


def join(parts):
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def qv_ka(config):
    return DiagonalQVKa(config) if config.wk == "diagonal" else QVKa(config)


ATTENTIONS = {"qkv": QKV, "gqa": QKV, "mla": MLA, "qv": QV, "qv_ka": qv_ka}


# --- The KV cache: it stores whatever `write` returns and knows no variant ------------------------


class Cache:
    """One layer's memory: `length` tokens so far, in buffers that have room for block_size. They
    are made when the first tokens arrive."""

    def __init__(self, block_size):
        self.block_size, self.length, self.buffers = block_size, 0, ()

    def append(self, memory):
        """Stores what T new tokens leave behind, a tuple of (B, T, ...). Returns what all S tokens
        have left, as views (B, S, ...)."""
        start = self.length
        self.length += memory[0].size(1)
        if not self.buffers:
            self.buffers = tuple(
                m.new_empty(m.size(0), self.block_size, *m.shape[2:]) for m in memory
            )
        for buffer, m in zip(self.buffers, memory):
            buffer[:, start : self.length] = m
        return tuple(buffer[:, : self.length] for buffer in self.buffers)


# --- The model: GPT-2 with any of these attentions ------------------------------------------------


def option(default, help, choices=None, only=None):
    """A field of a configuration that explains itself: the help text is its comment, and what
    --help prints. `only` says with which values of other fields the field counts, for example
    {"attention": ("qv_ka", "mine")}."""
    if only:
        help = f"{' under '.join('/'.join(values) for values in only.values())}: {help}"
    return field(default=default, metadata={"help": help, "choices": choices, "only": only or {}})


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. A size that is None follows from the others (`resolve`). Where the fields
    do not fit together, raises UserError, which names the field, its value, the rule and, if it
    can, a value that works."""

    attention: str = option(
        "qv",
        "what a token leaves behind for later ones to attend to; of qv and qv_ka, qv has the lower "
        "loss after equal times (cpu preset)",
        ATTENTIONS,
    )
    pos: str = option(
        "rope+agf",
        "how positions are told: by a learned table (GPT-2), by sinusoids, by rotations (rope), by "
        "a learned power law of distance (agf), or by both of these",
        POSITIONS,
    )
    block_size: int = option(256, "context: how many tokens the model sees at once")
    vocab_size: int = option(65, "number of different tokens")
    n_layer: int = option(6, "number of blocks")
    n_head: int = option(6, "number of attention heads in each block")
    n_embd: int = option(384, "width of the residual stream, which the heads share equally")
    dropout: float = option(0.0, "fraction of activations dropped in training")
    n_kv_head: int | None = option(
        None,
        "number of heads of keys or values, a divisor of n_head; 1 is MQA, or one value for all "
        "(default: n_head; for gqa half of it, or 1 if it is odd)",
        only={"attention": ("gqa", "qv", "qv_ka")},
    )
    rope_values: bool = option(
        False,
        "rotate values, too, and answers back, as qv and qv_ka do",
        only={"attention": ("qkv", "gqa"), "pos": ROPE},
    )
    d_latent: int | None = option(
        None, "width of the latent (default: 4 x head width)", only={"attention": ("mla",)}
    )
    d_rope: int | None = option(
        None,
        "width of the rotary key (default: half the head width)",
        only={"attention": ("mla",), "pos": ROPE},
    )
    d_ctx: int | None = option(
        None, "width of the context (default: 2 x head width)", only={"attention": ("qv_ka",)}
    )
    wk: str = option(
        "per_head",
        "W_K, which makes keys: a matrix for each head, one that all share, or a diagonal one for "
        "each head",
        ("per_head", "shared", "diagonal"),
        only={"attention": ("qv_ka",)},
    )
    n_inner: int | None = option(None, "width of the MLP (default: 4 x n_embd)")

    def sizes(self):
        """The sizes that may be None, as they are or as they follow from the others."""
        C, H, D = self.n_embd, self.n_head, self.n_embd // self.n_head
        half = H // 2 if H % 2 == 0 else 1
        derived = {
            "n_kv_head": half if self.attention == "gqa" else H,
            "d_latent": 4 * D,
            "d_rope": max(2, D // 4 * 2),
            "d_ctx": 2 * D,
            "n_inner": 4 * C,
        }
        given = {name: getattr(self, name) for name in derived if getattr(self, name) is not None}
        return derived | given

    def resolve(self):
        """The same configuration with all sizes filled in."""
        return replace(self, **self.sizes())

    def __post_init__(self):
        def check(ok, name, rule):
            if not ok:
                value = getattr(self, name)
                value = self.sizes()[name] if value is None else value
                raise UserError(f"{name}={value!r} {rule}")

        for name in "attention", "pos", "wk":
            choices = self.__dataclass_fields__[name].metadata["choices"]
            is_known = getattr(self, name) in choices
            check(is_known, name, f"is unknown; choose one of {', '.join(choices)}")
        for name in "block_size", "vocab_size", "n_layer", "n_head", "n_embd":
            check(getattr(self, name) >= 1, name, "must be at least 1")
        check(0 <= self.dropout < 1, "dropout", "must lie in [0, 1), for example 0.1")

        C, H, D = self.n_embd, self.n_head, self.n_embd // self.n_head
        check(
            C % H == 0, "n_embd", f"must be a multiple of n_head={H}, for example {-(-C // H) * H}"
        )
        sizes = self.sizes()
        for name, size in sizes.items():
            check(size >= 1, name, "must be at least 1")
        check(H % sizes["n_kv_head"] == 0, "n_kv_head", f"must divide n_head={H}")

        # RoPE and a diagonal W_K work on pairs of numbers, in pieces of width D.
        rope, diagonal = self.pos in ROPE, self.wk == "diagonal"
        why = "under rope" if rope else "with wk=diagonal"
        if rope or diagonal:
            even = H * (D + 1)
            check(D % 2 == 0, "n_embd", f"gives heads of odd width {D} {why}; take {even}")
            whole = sizes["d_ctx"] % D == 0
            check(
                whole, "d_ctx", f"must be a multiple of the head width {D} {why}, such as {2 * D}"
            )
        if rope:
            check(sizes["d_rope"] % 2 == 0, "d_rope", "must be even, for rope rotates pairs")


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
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """GPT-2 (pre-norm, GELU, tied embeddings), without biases."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        config = config.resolve()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = None  # rope and agf work inside attention
        if config.pos == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        if config.pos == "sinusoidal":
            self.wpe = Sinusoids(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=False)
        for name, parameter in self.named_parameters():
            self.init(name, parameter)

    def init(self, name, parameter):
        """Draws matrices so that they keep the scale of what they multiply, with a standard
        deviation of 1 / sqrt(fan_in): then a K or V made in two steps starts as large as one made
        in one. Vectors keep what their module gave them."""
        if parameter.dim() < 2:
            return
        # The fan-in is the second size: of a matrix (fan_out, fan_in), and of a stack of matrices,
        # one for each head, (H, fan_in, fan_out). For embeddings (V, C), which are the output's
        # weights, too, it is C.
        std = parameter.size(1) ** -0.5
        # Embeddings are tied to the output, so they set the size of the logits.
        if name in ("wte.weight", "wpe.weight"):
            std *= LOGITS_STD
        # What is added to the residual stream starts smaller, as in GPT-2.
        if name.endswith("out.weight"):
            std /= math.sqrt(2 * self.config.n_layer)
        nn.init.normal_(parameter, std=std)

    def embed(self, idx, start=0):
        """Tokens idx (B, T), of which the first stands at position `start`, to (B, T, C)."""
        x = self.wte(idx)
        if self.wpe is not None:
            x = x + self.wpe.weight[start : start + idx.size(1)]
        return F.dropout(x, self.config.dropout, self.training)

    def forward(self, idx, targets=None, cache=None):
        """Next-token logits and loss.

        idx (B, T) int64; with a cache, the T tokens after those that it holds. With targets (B, T)
        int64: logits (B, T, V) and the mean cross-entropy in nats. Without: logits of the last
        position only, (B, 1, V), and None. Raises ValueError where tokens outgrow the context."""
        start = 0 if cache is None else cache[0].length
        T, block_size = idx.size(1), self.config.block_size
        if start + T > block_size:
            raise ValueError(
                f"{start} + {T} tokens are more than the context of {block_size}; crop them"
            )
        x = self.embed(idx, start)
        for i, block in enumerate(self.blocks):
            x = block(x, start, None if cache is None else cache[i])
        if targets is None:
            x = x[:, -1:]
        logits = F.linear(self.ln_f(x), self.wte.weight)  # (B, T or 1, V): tied embeddings
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def new_cache(self):
        return [Cache(self.config.block_size) for _ in self.blocks]

    # Not inference_mode: in it, autocast would convert every weight anew for every token.
    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, use_cache=True):
        """Yields max_new_tokens tokens (B, 1), one at a time, that continue idx (B, T >= 1). Call
        eval() first, for dropout. temperature 0 takes the likeliest token; top_k leaves only the k
        likeliest to be drawn. When the context is full, its last half is read again and generation
        goes on from there, with a cache and without."""
        block_size = self.config.block_size
        window, cache = idx, None
        for _ in range(max_new_tokens):
            if window.size(1) > block_size:
                window, cache = window[:, -max(1, block_size // 2) :], None
            if cache is None:  # nothing of the window has been read, or all is read again
                unread = window
                cache = self.new_cache() if use_cache else None
            logits, _ = self(unread, cache=cache)
            token = sample(logits[:, -1], temperature, top_k)
            yield token
            window, unread = torch.cat([window, token], dim=1), token

    @torch.no_grad()
    def cache_bytes(self):
        """Bytes of the cache for a whole context, and for one token: measured, in the autocast
        context at hand."""
        cache = self.new_cache()
        self(torch.zeros(1, 1, dtype=torch.int64, device=self.wte.weight.device), cache=cache)
        total = sum(buffer.nbytes for layer in cache for buffer in layer.buffers)
        return total, total // self.config.block_size

    def use_kernel(self, on=True):
        """Has attention computed by kernel.py, on a GPU, or by PyTorch again. kernel.py raises
        ValueError for widths and devices that it cannot take; qv and qv_ka decode by it, too."""
        import kernel

        for block in self.blocks:
            block.attention.kernel = kernel if on else None

    @classmethod
    def load(cls, path):
        """The model of a checkpoint that train.py wrote, on the CPU and ready to sample, and the
        checkpoint itself, a dict. Raises UserError."""
        checkpoint = read_checkpoint(path)
        try:
            model = cls(GPTConfig(**checkpoint["model_config"]))
            model.load_state_dict(checkpoint["model"])
        except (UserError, TypeError, RuntimeError) as error:
            raise UserError(
                f"{path} was written by another version of model.py ({describe_error(error)}); "
                "load it with that one"
            ) from None
        return model.eval(), checkpoint


def sample(logits, temperature, top_k):
    """Draws one token (B, 1) for each row of logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    # Less the largest one, which a small temperature could otherwise make infinite.
    logits = logits.float() - logits.max(-1, keepdim=True).values
    return torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1)


# This number goes up when older checkpoints would be misread.
CHECKPOINT_FORMAT = 4


def read_checkpoint(path, mmap=False):
    """What train.py wrote there, a dict; with mmap, weights stay on disk until they are used.
    Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint {path}; train a model first: python train.py")
    unreadable = OSError, EOFError, RuntimeError, LookupError, TypeError, pickle.UnpicklingError
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if checkpoint["format"] != CHECKPOINT_FORMAT:
            raise LookupError
    except unreadable:
        raise UserError(
            f"{path} cannot be read, or is no checkpoint of this code; take another, or train again"
        ) from None
    return checkpoint

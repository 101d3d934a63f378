"""Measures what a KV cache costs and saves: memory and tokens a second of untrained models.
Run it, on an idle machine, after a change of how model.py decodes.

    python tests/experiments/decoding.py                  some minutes on two idle cores
    python tests/experiments/decoding.py --context=4096   the bytes of the cache weigh more
    python tests/experiments/decoding.py --draw=assets/memory.png      README's picture

Each model makes one token in turn, again and again, so that all of them meet the same state of the
machine. Speeds are medians over tokens at the end of the context, memory is that of the cache's
buffers for one token, in all layers.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import sweeps
from runs import label

from model import ATTENTIONS, GPT, POSITIONS, GPTConfig
from prepare import Progress, new_parser, parse_int, run_program, save_figure
from train import PRESETS, autocast, choose_device

# The five attentions, and those of them that can share, with one head of keys or values.
VARIANTS = {name: dict(attention=name, n_kv_head=None) for name in ATTENTIONS} | {
    f"{name}, one {what}": dict(attention=name, n_kv_head=1)
    for name, what in (("gqa", "k, v"), ("qv", "v"), ("qv_ka", "v"))
}

# What README's picture shows: attentions of its table, in the model of its table.
MQA = dict(attention="gqa", n_kv_head=1)
PICTURE = [
    sweeps.QKV,
    sweeps.GQA,
    MQA,
    sweeps.MLA,
    sweeps.QV,
    sweeps.QV_1,
    sweeps.QV_KA,
    sweeps.QV_KA_32_1,
]
SMALL = GPTConfig(**{name: PRESETS["cpu"][name] for name in ("n_head", "n_embd")})


def parse(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument(
        "--pos", default=",".join(POSITIONS), help="kinds of positions, with commas (default: all)"
    )
    parser.add_argument(
        "--context",
        type=parse_int,
        default=1024,
        help="tokens remembered at the end (default: 1024)",
    )
    parser.add_argument(
        "--tokens", type=parse_int, default=64, help="tokens measured with the cache (default: 64)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps ... (default: auto)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="of matrix products (default: auto)",
    )
    parser.add_argument(
        "--draw", metavar="FILE.png", type=Path, help="draw what a token leaves behind, instead"
    )
    args = parser.parse_args(argv)
    if unknown := set(args.pos.split(",")) - set(POSITIONS):
        parser.error(f"--pos={unknown.pop()} is unknown; take one or more of {','.join(POSITIONS)}")
    if not 0 < args.tokens < args.context - 1:
        parser.error(
            f"--tokens={args.tokens} must be at least 1 and below --context={args.context} - 1"
        )
    return args


def seconds_per_token(models, prompt, count, use_cache):
    """For each model, the median over `count` tokens after a first one. Without a cache, each token
    takes a pass over the whole prompt."""
    streams = {
        name: model.generate(prompt, count + 1, use_cache=use_cache)
        for name, model in models.items()
    }
    progress = Progress(len(models))
    for number, tokens in enumerate(streams.values(), 1):
        int(next(tokens))
        progress(number, f"{number} of {len(models)} models have read the prompt")

    words = "with a cache" if use_cache else "without one"
    times, progress = {name: [] for name in models}, Progress(count)
    for number in range(1, count + 1):
        for name, tokens in streams.items():
            started = time.perf_counter()
            int(next(tokens))  # waits for the device
            times[name].append(time.perf_counter() - started)
        progress(number, f"token {number} of {count}, {words}")
    progress.clear()
    return {name: median(seconds) for name, seconds in times.items()}


HEAD = (
    "| positions | attention | cache, bytes/token | tokens/s | times qkv's | without cache "
    "| times qkv's |\n|---|---|---|---|---|---|---|"
)


def benchmark(shape, positions, device, precision, tokens, uncached=9):
    """Prints a table with bytes and speeds, for each kind of positions and each attention, of
    models of the GPTConfig `shape`."""
    print(
        f"{shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} wide, "
        f"{shape.block_size:,} tokens of context; {device}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}\n\n{HEAD}"
    )
    for pos in positions:
        models = {
            name: GPT(replace(shape, pos=pos, **variant)).to(device).eval()
            for name, variant in VARIANTS.items()
        }
        prompt = torch.randint(shape.vocab_size, (1, shape.block_size - tokens - 1), device=device)
        with precision:  # keeps weights that it converts
            cached = seconds_per_token(models, prompt, tokens, use_cache=True)
            plain = seconds_per_token(models, prompt, uncached, use_cache=False)
            nbytes = {name: model.cache_bytes()[1] for name, model in models.items()}
        for name in models:
            print(
                f"| {pos} | {name} | {nbytes[name]:,} "
                f"| {1 / cached[name]:.0f} | {cached['qkv'] / cached[name]:.2f} "
                f"| {1 / plain[name]:.1f} | {plain['qkv'] / plain[name]:.2f} |",
                flush=True,
            )


def remembered(shape, variant):
    """What a token leaves behind in one layer under rope: [(letter, numbers)], one for each head's
    vector."""
    attention = GPT(replace(shape, pos="rope", n_layer=1, **variant)).blocks[0].attention
    memory = [m[0, 0] for m in attention.write(torch.zeros(1, 1, shape.n_embd), 0)]
    if variant["attention"] == "mla":
        return [
            (letter, m.size(-1))
            for letter, m in zip("cr", memory[0].split(attention.widths, dim=-1))
        ]
    letters = {"qkv": "kv", "gqa": "kv", "qv": "v", "qv_ka": "vg"}[variant["attention"]]
    return [
        (letter, m.size(-1))
        for letter, m in zip(letters, memory)
        for _ in range(m.numel() // m.size(-1))
    ]


def draw(shape, attentions, path):
    """A bar for each attention, as long as what a token leaves behind, in a box for each vector."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    kinds = {
        "k": ("key", "#555555", ""),
        "v": ("value", "#E69F00", ""),
        "c": ("latent", "#56B4E9", "//"),
        "r": ("rotary key (rope only)", "#009E73", ""),
        "g": ("context", "#CC79A7", ".."),
    }  # Okabe and Ito's colours
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    longest = 0
    for row, attention in enumerate(attentions):
        left = 0
        for letter, width in remembered(shape, attention):
            _, colour, hatch = kinds[letter]
            looks = dict(color=colour, hatch=hatch, edgecolor="white", linewidth=1)
            axes.barh(row, width, 0.7, left, **looks)
            shade = "white" if letter == "k" else "black"
            centred = dict(ha="center", va="center")
            axes.text(left + width / 2, row, letter, fontsize=8, color=shade, **centred)
            left += width
        axes.text(left, row, f"  {left}", va="center", fontsize=9)
        longest = max(longest, left)
    axes.set(
        yticks=range(len(attentions)),
        yticklabels=[label(attention) for attention in attentions],
        xlim=(0, 1.1 * longest),
        xlabel="numbers remembered per token "
        f"and layer ({shape.n_head} heads of width {shape.n_embd // shape.n_head})",
    )
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    handles = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=f"{letter}: {word}")
        for letter, (word, colour, hatch) in kinds.items()
    ]
    axes.legend(handles=handles, loc="center right", fontsize=9)
    save_figure(figure, path)
    print(f"drew {path}")


def main(argv=None):
    args = parse(argv)
    if args.draw:
        return draw(SMALL, PICTURE, args.draw)
    shape = GPTConfig(block_size=args.context)
    device = choose_device(args.device)
    torch.manual_seed(0)
    benchmark(shape, args.pos.split(","), device, autocast(device, args.dtype), args.tokens)


if __name__ == "__main__":
    run_program(main)

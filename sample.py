"""Writes text with a trained GPT.

    python sample.py                                                from the newest run
    python sample.py --prompt="ROMEO:" --temperature=0.8
    cat letter.txt | python sample.py --prompt_file=-
    python sample.py --prompt="ROMEO:" --attention_map=out/map.png  what every head attends to

Text goes to standard output while it is made. What was read, and what it cost, goes to standard
error.
"""

import codecs
import contextlib
import sys
import time
from argparse import BooleanOptionalAction
from pathlib import Path

import numpy as np
import torch

from model import GPT, read_checkpoint
from prepare import (
    UserError,
    new_parser,
    newest_run,
    parse_int,
    read_text,
    run_program,
    save_figure,
    tokenizer_from,
)
from train import autocast, choose_device, choose_kernel


def parse(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the run, of which best.pt is read, or else last.pt; or the path of one of "
        "its checkpoints (default: the newest run in out/)",
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="text to go on from (default: a line break)")
    prompt.add_argument(
        "--prompt_file", help="UTF-8 file with the text to go on from; - is standard input"
    )
    parser.add_argument(
        "--num_samples", type=parse_int, default=1, help="number of texts (default: %(default)s)"
    )
    parser.add_argument(
        "--max_new_tokens",
        type=parse_int,
        default=500,
        help="number of tokens in each text (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="boldness of the draws: below 1 is more cautious, above 1 wilder, and 0 always takes "
        "the likeliest token (default: %(default)s)",
    )
    parser.add_argument(
        "--top_k", type=parse_int, help="draw from the k likeliest tokens only (default: from all)"
    )
    parser.add_argument(
        "--seed", type=parse_int, default=1337, help="seed of the draws (default: %(default)s)"
    )
    parser.add_argument(
        "--cache",
        action=BooleanOptionalAction,
        default=True,
        help="remember what was read (default), or read it all again for each token: the same text "
        "(in bfloat16 but for rounding), only slower",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, mps ...")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="precision of matrix products (default: auto, bfloat16 where CUDA has it)",
    )
    parser.add_argument(
        "--kernel",
        default="auto",
        choices=("auto", "torch", "triton"),
        help="what computes attention, as in train.py (default: auto)",
    )
    parser.add_argument(
        "--attention_map",
        metavar="FILE.png",
        type=Path,
        help="write no text, but draw every head's attention weights over the prompt's tokens",
    )

    args = parser.parse_args(argv)
    least = dict(num_samples=1, max_new_tokens=1, temperature=0, top_k=1, seed=0)
    for name, minimum in least.items():
        value = getattr(args, name)
        if value is not None and not minimum <= value < 2**63:
            parser.error(f"--{name}={value} must be at least {minimum} and below 2**63")
    if args.attention_map and args.attention_map.suffix != ".png":
        parser.error(f"--attention_map={args.attention_map} must end in .png")
    return args


def find_checkpoint(out):
    """The file to read: `out` itself, or in that folder best.pt, or last.pt where a run was stopped
    before it was validated."""
    if out.is_file():
        return out
    best = out / "best.pt"
    return best if best.exists() else out / "last.pt"


def describe(path, model, checkpoint):
    """What is read, and whether the run went on from there."""
    config, steps = model.config, len(checkpoint["losses"])
    words = (
        f"{path}: {config.attention}, {config.pos}, {config.n_layer} layers, {config.n_embd} wide, "
        f"{steps:,} steps"
    )
    last = path.with_name("last.pt")
    # Perhaps there is none, or none that can be read.
    with contextlib.suppress(UserError):
        steps_of_last = len(read_checkpoint(last, mmap=True)["losses"])
        if steps_of_last > steps:
            words += f"; last.pt has {steps_of_last:,} steps, take it by --out={last}"
    return words


def read_prompt(args, tokenizer):
    """The text to go on from: by default a line break, or a character that the model knows."""
    if args.prompt_file is not None:
        text = read_text(args.prompt_file)
    elif args.prompt is not None:
        text = args.prompt
    else:
        chars = tokenizer.spec.get("chars", "\n")
        text = "\n" if "\n" in chars else chars[0]
    if not text:
        raise UserError("the prompt is empty; give at least one character to go on from")
    return text


def stream(tokens, tokenizer):
    """Writes tokens (1, 1) to standard output as they come, in whole characters."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        text = decoder.decode(tokenizer.decode_bytes(token[0]))
        print(text, end="", flush=True)
    print(decoder.decode(b"", final=True))


# --- What the heads attend to ---------------------------------------------------------------------


@torch.no_grad()
def attention_weights(model, idx):
    """How much each token of idx (1, T) attends to each, in every layer and head: a tensor
    (n_layer, H, T, T). Attention mixes values. Where these are the rows of the identity, what it
    makes of them are the weights themselves."""
    T, layers = idx.size(1), []
    x = model.embed(idx)  # (1, T, C)
    for block in model.blocks:
        attention, normed = block.attention, block.ln_1(x)
        memory = attention.write(normed, 0)
        pairs, v = attention.read(attention.query(normed), memory, 0)
        identity = torch.eye(T).type_as(v)[None, :, None]  # (1, T, 1, T)
        weights = attention.attend(pairs, identity.expand(-1, -1, v.size(2), -1))  # (1, T, H, T)
        layers.append(weights[0].transpose(0, 1))  # (H, T, T)
        x = block(x, 0, None)
    return torch.stack(layers).float().cpu()


def label(text):
    """A token as a picture shows it: what has no sign, in general or in the font, has a code."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font, signs = get_font(findfont(FontProperties())), []
    for char in text:
        if not char.isprintable():
            char = repr(char)[1:-1]  # \n, \r, \x00
        elif font.get_char_index(ord(char)) == 0:
            char = f"U+{ord(char):04X}"
        signs.append(char)
    return "".join(signs)


def draw_attention(model, tokenizer, idx):
    """A figure: a row for each layer, with a square for each head, in which each token of idx
    (1, T) has a row, and what it attends to lies across. Raises UserError where T does not fit."""
    from matplotlib.figure import Figure

    T, config = idx.size(1), model.config
    if not 2 <= T <= config.block_size:
        raise UserError(
            f"--attention_map takes a prompt of 2 to {config.block_size} tokens, the model's "
            f"context, and this one has {T}; give another --prompt"
        )
    # Beside a long prompt nobody could read them.
    labels = [label(tokenizer.decode([token])) for token in idx[0].tolist()] if T <= 48 else []
    ticks = range(len(labels))
    rotation = 90 if any(len(text) > 2 for text in labels) else 0
    inches = max(1.6, 0.13 * T) if labels else 2.2
    size = inches * config.n_head, inches * config.n_layer + 0.5
    figure = Figure(size, layout="constrained")
    grid = figure.subplots(config.n_layer, config.n_head, squeeze=False)
    weights = attention_weights(model, idx).numpy()
    for (layer, head), axes in np.ndenumerate(grid):
        image = axes.imshow(weights[layer, head], vmin=0, vmax=1, cmap="magma_r")
        axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=7)
        axes.set_xticks(ticks, labels, fontsize=5, parse_math=False, rotation=rotation)
        axes.set_yticks(ticks, labels, fontsize=5, parse_math=False)
    title = (
        f"{config.attention}, {config.pos}\nhow much each token (a row) attends to each (a column)"
    )
    figure.suptitle(title, fontsize=9)
    figure.colorbar(image, ax=grid, fraction=0.02)
    return figure


# --- The program ----------------------------------------------------------------------------------


def main(argv=None):
    args = parse(argv)
    device = choose_device(args.device)
    path = find_checkpoint(args.out or newest_run())
    model, checkpoint = GPT.load(path)
    model.to(device)
    print(describe(path, model, checkpoint), file=sys.stderr, flush=True)
    tokenizer = tokenizer_from(checkpoint["tokenizer"])
    prompt = read_prompt(args, tokenizer)
    idx = torch.tensor(tokenizer.encode(prompt), device=device)[None]  # (1, T)

    if args.attention_map:
        save_figure(draw_attention(model, tokenizer, idx), args.attention_map)
        print(f"{args.attention_map}: attention weights over {idx.size(1)} tokens")
        return

    precision = autocast(device, args.dtype)
    kernel = choose_kernel(model, args.kernel, precision)
    torch.manual_seed(args.seed)
    started = time.perf_counter()
    with precision:
        for number in range(args.num_samples):
            if number > 0:
                print("-" * 80)
            print(prompt, end="", flush=True)
            tokens = model.generate(
                idx, args.max_new_tokens, args.temperature, args.top_k, args.cache
            )
            stream(tokens, tokenizer)
        seconds = time.perf_counter() - started
        total, each = model.cache_bytes()

    count = args.num_samples * args.max_new_tokens
    memory = f"cache of {total:,} bytes, {each:,} a token" if args.cache else "no cache"
    print(
        f"{count:,} tokens in {seconds:.1f} s, {count / seconds:.0f} tokens/s; {memory}; attention "
        f"by {kernel}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    run_program(main)

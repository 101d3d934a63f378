"""Writes text with a trained GPT.

    python sample.py                                                from the newest run
    python sample.py --prompt="ROMEO:" --temperature=0.8
    cat letter.txt | python sample.py --prompt_file=-
    python sample.py --prompt="ROMEO:" --attention_map=out/map.png  what every head attends to, as a picture

Text goes to standard output as it is made; what it cost, speed and memory, goes to standard error.
"""

import codecs
import sys
import time
from argparse import BooleanOptionalAction
from pathlib import Path

import torch

from model import GPT
from prepare import (
    UserError,
    new_parser,
    newest_run,
    parse_int,
    read_text,
    run_program,
    tokenizer_from,
    write_atomically,
)
from train import autocast, choose_device


def parse(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        help="the run's folder (default: the newest in out/): its best.pt, or else "
        "last.pt, is read",
    )
    parser.add_argument("--prompt", help="what to go on from (default: a line break)")
    parser.add_argument("--prompt_file", help="the same, from a UTF-8 file; - is standard input")
    parser.add_argument(
        "--num_samples", type=parse_int, default=1, help="how many texts (default: 1)"
    )
    parser.add_argument(
        "--max_new_tokens", type=parse_int, default=500, help="tokens in each (default: 500)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="below 1 more cautious, above 1 wilder, 0 always the likeliest token (default: 0.8)",
    )
    parser.add_argument(
        "--top_k", type=parse_int, help="draw from the k likeliest tokens only (default: all)"
    )
    parser.add_argument("--seed", type=parse_int, default=1337, help="of the draws (default: 1337)")
    parser.add_argument(
        "--cache",
        action=BooleanOptionalAction,
        default=True,
        help="remember what was read (default), "
        "or read it all again for each token: the same text (in bfloat16 but for rounding), slower",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps ... (default: auto)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="of matrix products (default: auto)",
    )
    parser.add_argument(
        "--kernel",
        default="auto",
        choices=("auto", "torch", "triton"),
        help="what computes qv and qv_ka, as in train.py (default: auto)",
    )
    parser.add_argument(
        "--attention_map",
        metavar="FILE.png",
        type=Path,
        help="write no text, but draw every head's attention weights over the prompt's tokens",
    )
    args = parser.parse_args(argv)
    for name, least in (
        ("num_samples", 1),
        ("max_new_tokens", 1),
        ("top_k", 1),
        ("temperature", 0),
        ("seed", 0),
    ):
        value = getattr(args, name)
        if value is not None and not least <= value < 2**63:
            parser.error(f"--{name}={value} must be at least {least} and below 2**63")
    if args.prompt is not None and args.prompt_file is not None:
        parser.error("--prompt and --prompt_file exclude each other; give one")
    if args.attention_map and args.attention_map.suffix != ".png":
        parser.error(f"--attention_map={args.attention_map} must end in .png")
    return args


def read_prompt(args, tokenizer):
    """The prompt's text, from wherever the flags say; without any, a line break, or a first character that is known."""
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
    """Writes tokens to standard output as they come, in whole characters; returns the seconds that it took."""
    decoder, started = codecs.getincrementaldecoder("utf-8")(errors="replace"), time.time()
    for token in tokens:
        print(decoder.decode(tokenizer.decode(token[0].tolist())), end="", flush=True)
    print(decoder.decode(b"", final=True))
    return time.time() - started


def attention_weights(model, idx):
    """Every layer's and head's weights over the tokens idx (1, T): (n_layer, H, T, T). Where values are the rows of the
    identity, what attention mixes of them is its weights."""
    layers = []

    def watch(attention, inputs):
        q, k, v = attention.read(attention.query(inputs[0], 0), attention.write(inputs[0], 0))
        identity = (
            torch.eye(v.size(1)).type_as(v)[None, :, None].expand(-1, -1, v.size(2), -1)
        )  # (1, T, G, T)
        layers.append(attention.attend(q, k, identity)[0].transpose(0, 1))  # (H, T, T)

    for block in model.blocks:
        block.attention.register_forward_pre_hook(watch)
    with torch.no_grad():
        model(idx)
    return torch.stack(layers).float().cpu()


def draw_attention(model, tokenizer, idx, path):
    """Draws a grid of heads, a row a layer: how much each token of the prompt (down) attends to each (across)."""
    from matplotlib.figure import Figure

    T, config = idx.size(1), model.config
    if not 2 <= T <= config.block_size:
        raise UserError(
            f"--attention_map takes a prompt of 2 to {config.block_size} tokens, the model's context, and "
            f"this one has {T}; give another --prompt"
        )
    labels = [
        tokenizer.decode([token]).decode(errors="replace").replace("\n", "\\n")
        for token in idx[0].tolist()
    ]
    size, (ticks, labels) = (max(1.6, 0.13 * T), (range(T), labels)) if T <= 48 else (2.2, ([], []))
    figure = Figure((size * config.n_head, size * config.n_layer + 0.5), layout="constrained")
    grid = figure.subplots(config.n_layer, config.n_head, squeeze=False)
    for layer, (row, weights) in enumerate(zip(grid, attention_weights(model, idx).numpy()), 1):
        for head, axes in enumerate(row):
            image = axes.imshow(weights[head], vmin=0, vmax=1, cmap="magma_r")
            axes.set_title(f"layer {layer}, head {head + 1}", fontsize=7)
            axes.set_xticks(ticks, labels, fontsize=5, parse_math=False)
            axes.set_yticks(ticks, labels, fontsize=5, parse_math=False)
    figure.suptitle(
        f"{config.attention}, {config.pos}: weight of each token (across) for each (down)",
        fontsize=9,
    )
    figure.colorbar(image, ax=grid, fraction=0.02)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
    print(f"{path}: {config.n_layer} layers x {config.n_head} heads over {T} tokens")


def main(argv=None):
    args = parse(argv)
    device, out = choose_device(args.device), args.out or newest_run()
    path = out / "best.pt"
    model, checkpoint = GPT.load(
        path if path.exists() else out / "last.pt", device
    )  # stopped before it was validated
    tokenizer, context = tokenizer_from(checkpoint["tokenizer"]), autocast(device, args.dtype)
    kernel = model.eval().use_kernel(args.kernel, context)
    prompt = read_prompt(args, tokenizer)
    idx = torch.from_numpy(tokenizer.encode(prompt).astype("int64"))[None].to(device)
    if args.attention_map:
        return draw_attention(model, tokenizer, idx, args.attention_map)
    torch.manual_seed(args.seed)
    seconds, count = 0.0, args.num_samples * args.max_new_tokens
    with context:
        for number in range(args.num_samples):
            print("-" * 80 + "\n" + prompt if number else prompt, end="", flush=True)
            tokens = model.generate(
                idx, args.max_new_tokens, args.temperature, args.top_k, args.cache
            )
            seconds += stream(tokens, tokenizer)
        total, each = model.cache_bytes()
    memory = f"cache of {total:,} bytes, {each:,} a token" if args.cache else "no cache"
    print(
        f"{model.config.attention}, {model.config.pos}, {out}: {count:,} tokens in {seconds:.1f} s, "
        f"{count / seconds:.0f} tokens/s; {memory}, attention by {kernel}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    run_program(main)

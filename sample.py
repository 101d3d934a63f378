"""Writes text with a trained GPT.

    python sample.py                                            from the newest run
    python sample.py --prompt="ROMEO:" --temperature=0.8
    cat letter.txt | python sample.py --prompt_file=-
    python sample.py --prompt="ROMEO:" --attention_map=map.png  what every head attends to, as a picture
    python sample.py --benchmark                                what the cache costs and saves, all attentions side by side

Text goes to standard output as it is made; what it cost, speed and memory, goes to standard error.
"""

import codecs
import sys
import time
from argparse import BooleanOptionalAction
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from model import ATTENTIONS, POSITIONS, GPT, GPTConfig
from prepare import Parser, UserError, named, reason, run, tokenizer_from
from train import autocast, best_checkpoint, cache_bytes, choose_device, choose_dtype, choose_kernel, load_checkpoint, newest_run, pyplot, write


def parse(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, help="the run's folder (default: the newest in out/); its best.pt is read")
    parser.add_argument("--prompt", help="what to go on from (default: a line break)")
    parser.add_argument("--prompt_file", help="the same, from a UTF-8 file; - is standard input")
    parser.add_argument("--num_samples", type=int, default=1, help="how many texts (default: 1)")
    parser.add_argument("--max_new_tokens", type=int, default=500, help="tokens in each (default: 500)")
    parser.add_argument("--temperature", type=float, default=0.8, help="below 1 more cautious, above 1 wilder, 0 always the likeliest "
                        "token (default: 0.8)")
    parser.add_argument("--top_k", type=int, default=None, help="draw from the k likeliest tokens only (default: all)")
    parser.add_argument("--seed", type=int, default=1337, help="of the draws (default: 1337)")
    parser.add_argument("--cache", action=BooleanOptionalAction, default=True, help="remember what was read (default), or read it "
                        "all again for each token: the same text (in bfloat16 but for rounding), slower")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps ... (default: auto)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of matrix products (default: auto)")
    parser.add_argument("--kernel", default="auto", choices=("auto", "torch", "triton"), help="what computes qv and qv_ka, as in train.py "
                        "(default: auto)")
    parser.add_argument("--attention_map", metavar="FILE.png", type=Path, help="draw every head's attention weights over the "
                        "prompt's tokens instead of writing text")
    parser.add_argument("--benchmark", action="store_true", help="measure speed and memory of all attentions in the 10.7M model "
                        "at 1,024 tokens of context, untrained")
    args = parser.parse_args(argv)
    for name, least in ("num_samples", 1), ("max_new_tokens", 1), ("top_k", 1), ("temperature", 0), ("seed", 0):
        value = getattr(args, name)
        if value is not None and not least <= value < 2**63:
            parser.error(f"--{name}={value} must be at least {least} and below 2**63")
    if args.prompt is not None and args.prompt_file is not None:
        parser.error("--prompt and --prompt_file exclude each other; give one")
    changed = {f"no-{name}" if value is False else name for name, value in vars(args).items() if value != parser.get_default(name)}
    if args.benchmark and (idle := changed - {"benchmark", "device", "dtype", "seed"}):
        parser.error(f"--benchmark compares untrained models, written in PyTorch, so leave {named(idle)} out; the kernel's own "
                     "benchmark is python kernel.py")
    if args.attention_map and (idle := changed & {"num_samples", "max_new_tokens", "temperature", "top_k", "seed", "no-cache", "dtype"}):
        parser.error(f"--attention_map draws the prompt and writes no text, so leave {named(idle)} out")
    if args.attention_map and args.attention_map.suffix != ".png":
        parser.error(f"--attention_map={args.attention_map} must end in .png")
    return args


def read_prompt(args, tokenizer):
    """The prompt's text, from wherever the flags say; without any, a line break, or a first character that the model knows."""
    if args.prompt_file is None:
        chars = tokenizer.spec.get("chars", "\n")
        text, name = args.prompt if args.prompt is not None else "\n" if "\n" in chars else chars[0], "--prompt"
    else:
        name = f"--prompt_file={args.prompt_file}"
        try:
            raw = sys.stdin.buffer.read() if args.prompt_file == "-" else Path(args.prompt_file).read_bytes()
            text = raw.decode("utf-8-sig")
        except OSError as error:
            raise UserError(f"{name} cannot be read ({reason(error)}); give the path of a text file, or - for standard input") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{name} is not UTF-8 text (byte {error.start}); convert it first, for example with iconv") from None
    if not text:
        raise UserError(f"{name} is empty; give at least one character to go on from")
    return text


def stream(model, tokenizer, prompt, idx, args, context):
    """Writes one sample to standard output, token by token; returns the seconds it took."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")                # a token may end inside a character
    print(prompt, end="", flush=True)
    started = time.time()
    with context:
        for token in model.generate(idx, args.max_new_tokens, args.temperature, args.top_k, args.cache):
            print(decoder.decode(tokenizer.decode(token[0].tolist())), end="", flush=True)
    print(decoder.decode(b"", final=True))
    return time.time() - started


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of attention


def attention_weights(model, idx):
    """Every layer's and head's weights over the tokens idx (1, T): (n_layer, H, T, T)."""
    layers = []
    for block in model.blocks:
        block.attention.register_forward_pre_hook(lambda attention, inputs: layers.append(attention.weights(inputs[0])[0]))
    with torch.no_grad():
        model(idx)
    return torch.stack(layers).float().cpu()


def draw_attention(model, tokenizer, idx, path):
    """Draws a grid of heads, a row a layer: how much each token of the prompt (down) attends to each (across)."""
    T = idx.size(1)
    if not 2 <= T <= model.config.block_size:
        raise UserError(f"--attention_map takes a prompt of 2 to {model.config.block_size} tokens, the model's context, and this "
                        f"one has {T}; give another --prompt")
    weights = attention_weights(model, idx).numpy()
    labels = [tokenizer.decode([token]).decode(errors="replace").replace("\n", "\\n").replace("$", r"\$") for token in idx[0].tolist()]
    plt, (rows, columns) = pyplot(), weights.shape[:2]
    size = max(1.6, 0.13 * T) if T <= 48 else 2.2
    figure, grid = plt.subplots(rows, columns, figsize=(size * columns, size * rows + 0.5), squeeze=False, layout="constrained")
    for layer, row in enumerate(grid):
        for head, axes in enumerate(row):
            image = axes.imshow(weights[layer, head], vmin=0, vmax=1, cmap="magma_r")
            axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=7)
            axes.set_xticks(range(T) if T <= 48 else [], labels if T <= 48 else [], fontsize=5)
            axes.set_yticks(range(T) if T <= 48 else [], labels if T <= 48 else [], fontsize=5)
    figure.suptitle(f"{model.config.attention}, {model.config.pos}: weight of each token (across) for each query (down)", fontsize=9)
    figure.colorbar(image, ax=grid, fraction=0.02)
    write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
    print(f"{path}: {rows} layers x {columns} heads over {T} tokens")


# ---------------------------------------------------------------------------------------------------------------------
# What the cache costs and saves


def benchmark(shape, device, context, tokens=64, tokens_uncached=6):
    """Prints, for a GPTConfig's shape with each attention and kind of positions, tokens a second with and without the cache
    at the end of the context (medians over tokens that the five attentions made in turn), and the cache's measured bytes for
    a token, in all layers together."""
    print(f"{shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} wide, {shape.block_size:,} tokens of context; {device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}\n\n"
          "| positions | attention | cache, bytes/token | tokens/s with cache | relative to qkv | tokens/s without | with : without |\n"
          "|---|---|---|---|---|---|---|")
    for pos in POSITIONS:
        models = {name: GPT(replace(shape, attention=name, pos=pos)).to(device).eval() for name in ATTENTIONS}
        idx = torch.randint(shape.vocab_size, (1, shape.block_size - tokens - 1), device=device)
        seconds = {}
        for use_cache, count in (True, tokens), (False, tokens_uncached):
            runs = {name: model.generate(idx, count + 1, use_cache=use_cache) for name, model in models.items()}
            times = {name: [] for name in models}
            with context:                                                            # it keeps converted weights to its end
                for _ in range(count + 1):                                           # the first also reads the prompt
                    for name, tokens_of in runs.items():
                        started = time.perf_counter()
                        int(next(tokens_of))                                         # waits for the device
                        times[name].append(time.perf_counter() - started)
            seconds[use_cache] = {name: median(times[name][1:]) for name in models}
        for name, model in models.items():
            cached, uncached = seconds[True][name], seconds[False][name]
            with context:
                nbytes = cache_bytes(model)[1]
            print(f"| {pos} | {name} | {nbytes:,} | {1 / cached:.0f} | {seconds[True]['qkv'] / cached:.2f} | "
                  f"{1 / uncached:.1f} | {uncached / cached:.0f} |", flush=True)


def main(argv=None):
    args = parse(argv)
    sys.stdout.reconfigure(errors="replace")                                         # a terminal may lack a character
    device = choose_device(args.device)
    context = autocast(device, choose_dtype(args.dtype, device))
    torch.manual_seed(args.seed)
    if args.benchmark:
        return benchmark(GPTConfig(block_size=1024), device, context)
    out = args.out or newest_run()
    checkpoint, model = load_checkpoint(best_checkpoint(out), device)
    kernel = choose_kernel(args.kernel, model.eval(), context)
    tokenizer = tokenizer_from(checkpoint["tokenizer"])
    prompt = read_prompt(args, tokenizer)
    idx = torch.from_numpy(tokenizer.encode(prompt).astype("int64"))[None].to(device)
    if args.attention_map:
        return draw_attention(model, tokenizer, idx, args.attention_map)
    seconds = 0.0
    for number in range(args.num_samples):
        if number:
            print("-" * 80)
        seconds += stream(model, tokenizer, prompt, idx, args, context)
    count = args.num_samples * args.max_new_tokens
    with context:
        total, each = cache_bytes(model)
    memory = f"cache of {total:,} bytes, {each:,} a token" if args.cache else "no cache"
    print(f"{model.config.attention}, {model.config.pos}, {out}: {count:,} tokens in {seconds:.1f} s, {count / seconds:.0f} tokens/s; "
          f"{memory}, attention by {kernel}", file=sys.stderr)


if __name__ == "__main__":
    run(main)

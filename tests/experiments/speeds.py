"""Measures how fast the attentions of results.md train and decode beside QKV, and stores it in
assets/speeds.json. Run it after a change of how fast model.py is, before `compare.py --report`.

    python tests/experiments/speeds.py                    some minutes, on an idle machine

Each model makes one step, or one token, in turn, again and again, so that all of them meet the same
state of the machine. A speed is the median over turns of QKV's time by the model's. Training is
that of the runs in sweeps.py, decoding is by GPTConfig's 10.7M model, untrained, after 1,024
tokens; both under rope+agf. That model's heads are twice as wide, and so are contexts and latents.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import sweeps

import train
from model import GPT, GPTConfig
from prepare import (
    Progress,
    load_or_prepare,
    new_parser,
    parse_int,
    run_program,
    write_atomically,
)


def parse(argv):
    parser = new_parser(__doc__)
    for name, default, words in (
        ("steps", 100, "training steps that each model makes"),
        ("tokens", 64, "tokens that each model decodes"),
        ("context", 1024, "tokens in the context when the last one is decoded"),
        ("threads", 1, "threads of the CPU; the sweeps give one to each run"),
    ):
        help = f"{words} (default: {default:,})"
        parser.add_argument(f"--{name}", type=parse_int, default=default, metavar="N", help=help)
    return parser.parse_args(argv)


def in_turns(turns, works, words):
    """Calls each of the functions once a turn, and returns the seconds of all calls (turns,
    functions). A first turn, in which they warm up, does not count."""
    seconds = np.empty((turns + 1, len(works)))
    progress = Progress(turns + 1)
    for turn in range(turns + 1):
        for number, work in enumerate(works):
            started = time.perf_counter()
            work()
            seconds[turn, number] = time.perf_counter() - started
        progress(turn + 1, f"{words}: turn {turn + 1} of {turns + 1}")
    progress.clear()
    return seconds[1:]


def trainer(attention, data):
    """A function that makes the next training step of a new model."""
    kind = sweeps.kind_of("rope+agf", attention)
    settings, config = train.configure({**kind, "seed": 1, "device": "cpu"})
    model = GPT(config)
    optimizers = train.make_optimizers(model, settings)
    device, precision = torch.device("cpu"), train.autocast(torch.device("cpu"), "float32")
    step = 0

    def work():
        nonlocal step
        x, y = train.batch(data, settings, config.block_size, step, device)
        train.train_step(model, optimizers, settings, step, x, y, precision)
        step += 1

    return work


def decoder(attention, context, tokens):
    """A function that decodes the next token of a new model; the first call reads the prompt."""
    config = GPTConfig(pos="rope+agf", block_size=context)
    widths = {name: 2 * size for name, size in attention.items() if name in ("d_ctx", "d_latent")}
    model = GPT(replace(config, **{**attention, **widths})).eval()
    prompt = torch.zeros(1, context - tokens - 1, dtype=torch.int64)
    stream = model.generate(prompt, tokens + 1)
    return lambda: next(stream)


def rows(seconds):
    """What is stored: for each attention its speed beside QKV's, and the quartiles of that."""
    qkv = sweeps.TABLE.index(sweeps.QKV)
    found = []
    for number, attention in enumerate(sweeps.TABLE):
        low, speed, high = np.quantile(seconds[:, qkv] / seconds[:, number], [0.25, 0.5, 0.75])
        milliseconds = 1000 * np.median(seconds[:, number])
        found.append(
            dict(
                attention=attention,
                speed=round(speed, 4),
                quartiles=[round(low, 4), round(high, 4)],
                milliseconds=round(milliseconds, 3),
            )
        )
    return found


def main(argv=None):
    args = parse(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    data = load_or_prepare(sweeps.CPU["dataset"])[2]["train"]
    trainers = [trainer(attention, data) for attention in sweeps.TABLE]
    training = rows(in_turns(args.steps, trainers, "training"))
    with torch.no_grad():
        decoders = [decoder(attention, args.context, args.tokens) for attention in sweeps.TABLE]
        decoding = rows(in_turns(args.tokens, decoders, "decoding"))
    found = dict(
        training=training, decoding=decoding, threads=args.threads, torch=torch.__version__
    )
    text = json.dumps(found, indent=1)
    write_atomically(sweeps.SPEEDS, lambda temporary: temporary.write_text(text, "utf-8"))
    for row, other in zip(training, decoding):
        print(f"{row['speed']:.2f} {other['speed']:.2f} {row['attention']}")


if __name__ == "__main__":
    run_program(main)

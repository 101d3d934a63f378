"""Trains a GPT with any of the five attentions.

    python train.py                                         tiny Shakespeare: a minute on a laptop's CPU
    python train.py --preset=gpu                            nanoGPT's 10.7M baby GPT (the default where there is CUDA)
    torchrun --nproc_per_node=8 train.py --preset=gpt2      GPT-2 124M on OpenWebText
    python train.py --resume                                goes on with the newest run, exactly

A run is a folder: log.jsonl (a line for each evaluation), loss.png, and the checkpoints last.pt and best.pt. What is
random in step i is a function of (seed, i): its batch, however many processes share it, and in each process its
dropout. So a run that was stopped and resumed computes the same numbers as one that was not.
"""

import json
import math
import os
import shlex
import signal
import sqlite3
import sys
import time
from argparse import SUPPRESS, BooleanOptionalAction
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import prepare
from model import CHECKPOINT_FORMAT, GPT, GPTConfig, option
from prepare import (
    OUT,
    Progress,
    UserError,
    describe_error,
    format_time,
    new_parser,
    newest_run,
    parse_int,
    write_atomically,
)

# This process among those that torchrun starts. Each has the whole model, and computes on its share of every batch.
RANK, WORLD = (
    (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    if dist.is_torchelastic_launched()
    else (0, 1)
)

# --- Configuration: defaults, under a preset, under flags. The two dataclasses are the command line ------------------

PRESETS = {
    "cpu": dict(
        n_layer=4,
        n_head=4,
        n_embd=128,
        block_size=64,
        batch_size=12,
        max_steps=600,
        optimizer="muon",
        learning_rate=1e-2,
        warmup_steps=20,
        weight_decay=0.2,
        beta2=0.95,
        eval_interval=600,
    ),
    "gpu": dict(
        n_layer=6,
        n_head=6,
        n_embd=384,
        block_size=256,
        batch_size=64,
        max_steps=5000,
        learning_rate=1e-3,
        dropout=0.2,
        eval_interval=250,
    ),
    "gpt2": dict(
        dataset="openwebtext",
        n_layer=12,
        n_head=12,
        n_embd=768,
        block_size=1024,
        batch_size=480,
        micro_batch_size=12,
        max_steps=600_000,
        learning_rate=6e-4,
        warmup_steps=2000,
        beta2=0.95,
        eval_interval=1000,
        eval_tokens=2_000_000,
    ),
}


@dataclass(frozen=True)
class TrainConfig:
    """How to train it: a preset (below) sets many flags, whatever their defaults here say; the flags you give win."""

    preset: str | None = option(
        None, "see below (default: gpu where there is CUDA, else cpu)", PRESETS
    )
    dataset: str | None = option(
        None, "a folder of data/ (default: tiny Shakespeare, or pydoc if there is no network)"
    )
    out: str | None = option(None, "the run's folder (default: a new one in out/)")
    resume: bool = option(
        False, "go on with the run in --out, or with the newest, from its last.pt"
    )
    seed: int = option(1337, "of weights, batches and dropout")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps ...")
    threads: int | None = option(
        None, "on a CPU (default: OMP_NUM_THREADS, or as many as cores, less the busy ones)"
    )
    dtype: str = option(
        "auto",
        "of matrix products (auto: bfloat16 if CUDA has it)",
        ("auto", "float32", "bfloat16"),
    )
    kernel: str = option(
        "auto",
        "of qv and qv_ka (triton: kernel.py, CUDA; auto: torch)",
        ("auto", "torch", "triton"),
    )
    compile: bool | None = option(None, "torch.compile the model (default: on CUDA only)")
    batch_size: int = option(
        64, "sequences in one optimizer step, over all processes and micro-batches together"
    )
    micro_batch_size: int | None = option(
        None,
        "sequences in one forward pass of one process; gradients are "
        "accumulated up to batch_size (default: all at once)",
    )
    max_steps: int = option(5000, "optimizer steps")
    optimizer: str = option(
        "adamw", "of all matrices but embeddings; the rest has AdamW", ("adamw", "muon")
    )
    learning_rate: float = option(
        1e-3, "without warm-up; falls by a cosine to a tenth at max_steps"
    )
    warmup_steps: int = option(
        100, "first steps, in which the rate is scaled by a factor that grows to 1"
    )
    weight_decay: float = option(0.1, "on matrices only")
    beta2: float = option(0.99, "AdamW's second moment; beta1 is 0.9")
    grad_clip: float = option(1.0, "largest norm of the gradient; 0 is no limit")
    eval_interval: int = option(250, "steps from one evaluation, and checkpoint, to the next")
    eval_tokens: int | None = option(
        None, "validate on so many tokens only (default: the whole validation split)"
    )

    def __post_init__(self):
        for name, value in vars(self).items():
            least = name in (
                "threads",
                "batch_size",
                "micro_batch_size",
                "max_steps",
                "eval_interval",
                "eval_tokens",
            )
            end = {"beta2": 1, "batch_size": 2**20}.get(name, math.inf)
            if isinstance(value, (int, float)) and not least <= value < end:
                raise UserError(
                    f"{name}={value} must be at least {int(least)}, and less than {end}"
                )
        unit = WORLD * (self.micro_batch_size or 1)
        if self.batch_size % unit:
            raise UserError(
                f"batch_size={self.batch_size} must be a multiple of {unit}, micro_batch_size x processes"
            )


# How a flag is read, by its type; and the flags that a resumed run may be given anew. Without them it goes on exactly.
READ = {
    int: parse_int,
    int | None: parse_int,
    float: float,
    float | None: float,
    str: str,
    str | None: str,
}
MAY_CHANGE = {
    "out",
    "resume",
    "device",
    "threads",
    "dtype",
    "kernel",
    "compile",
    "micro_batch_size",
    "max_steps",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "grad_clip",
    "eval_interval",
}


def parse(argv=None):
    """The flags that were given, as a dict."""
    presets = (
        f"  {name:5} " + " ".join(f"{k}={v}" for k, v in preset.items())
        for name, preset in PRESETS.items()
    )
    parser = new_parser(
        __doc__, argument_default=SUPPRESS, epilog="\n".join(["presets:", *presets])
    )
    for config in TrainConfig, GPTConfig:
        group = parser.add_argument_group(config.__name__, config.__doc__.split(". ")[0])
        for field in fields(config):
            flag, choices = f"--{field.name}", field.metadata["choices"]
            help = field.metadata["help"] + (
                "" if field.default is None else f" (default: {field.default})"
            )
            if field.type in (bool, bool | None):
                group.add_argument(flag, action=BooleanOptionalAction, help=help)
            elif field.name != "vocab_size":  # that is the data set's to say
                group.add_argument(flag, type=READ[field.type], choices=choices, help=help)
    return vars(parser.parse_args(argv))


def configure(given, past=None):
    """TrainConfig and GPTConfig: defaults, under a preset or the checkpoint of a run to resume, under given flags."""
    if past is None:
        preset = given.get(
            "preset", "gpu" if torch.cuda.is_available() and given.get("device") != "cpu" else "cpu"
        )
        stored = {**PRESETS[preset], "preset": preset}
    else:
        stored = {**past["train_config"], **past["model_config"]}
        for name in sorted(given.keys() - MAY_CHANGE):
            if given[name] != stored[name]:
                raise UserError(
                    f"--{name}={given[name]} cannot change a run in the middle, which has {stored[name]}"
                )
    values = {**stored, **({"threads": None} if "OMP_NUM_THREADS" in os.environ else {}), **given}
    train, config = (
        kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})
        for kind in (TrainConfig, GPTConfig)
    )
    for field in fields(GPTConfig):
        for other, wanted in field.metadata["only"].items():
            if field.name in given and getattr(config, other) not in wanted:
                raise UserError(
                    f"--{field.name} counts only with --{other}={' or '.join(wanted)}; leave it out"
                )
    return train, config


# --- The machine: a device, its threads and a precision ---------------------------------------------------------


def choose_device(name, threads=None):
    """The torch.device of that name; auto is CUDA or MPS where there is one, else the CPU. Raises UserError. A CPU
    computes with so many threads; None is up to choose_threads."""
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: a GPU for each process
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        torch.empty(1, device=name).tolist()
    except (RuntimeError, AssertionError) as error:  # no such backend, or none in this build
        raise UserError(
            f"--device={name} cannot be used here ({describe_error(error)}); take --device=cpu"
        ) from None
    torch.set_float32_matmul_precision("high")  # TF32, where a GPU has it
    if name == "cpu":
        choose_threads(threads)
    return torch.device(name)


def choose_threads(wanted=None):
    """Threads wait for one another after every product: beside a program that keeps a core busy, one for each core are
    many times slower than fewer. Where no number is `wanted`, nor OMP_NUM_THREADS set, measures for 0.3 s how many
    cores this process is given, and takes as many threads."""
    cores = torch.get_num_threads()
    if wanted is None and "OMP_NUM_THREADS" not in os.environ and cores > 1:
        x, wall, cpu = torch.zeros(cores << 16), time.perf_counter(), time.process_time()
        while time.perf_counter() - wall < 0.3:
            x.sin_()  # work for all of them
        wanted = max(1, int((time.process_time() - cpu) / (time.perf_counter() - wall) + 0.3))
        if wanted < cores:
            print(
                f"other programs use the CPU: {wanted} of {cores} threads (OMP_NUM_THREADS has it otherwise)",
                file=sys.stderr,
            )
    elif wanted is not None and wanted > os.cpu_count():
        print(
            f"{wanted} threads are not to be had here: {cores}, so the last digits may differ",
            file=sys.stderr,
        )
        wanted = cores
    torch.set_num_threads(wanted or cores)


def autocast(device, dtype):
    """The context of a forward pass: matrix products in that dtype, all else in float32. auto is bfloat16 where a CUDA
    device has it, else float32."""
    if dtype == "auto":
        bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if bfloat16 else "float32"
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")


# --- One step: its data, its rate, its gradients; and the measure of what was learned --------------------------------


def windows(data, starts, length, device):
    """Inputs and targets (len(starts), length): the tokens from each start on, and those one further."""
    tokens = torch.from_numpy(data[starts[:, None] + np.arange(length + 1)].astype(np.int64)).to(
        device
    )
    return tokens[:, :-1], tokens[:, 1:]


def batch(data, train, block_size, step, device, rank=RANK, world=WORLD):
    """This process's share of a step's sequences (batch_size / world, block_size), a function of (seed, step) alone."""
    starts = np.random.default_rng((train.seed, step)).integers(
        len(data) - block_size, size=train.batch_size
    )
    return windows(data, np.split(starts, world)[rank], block_size, device)


def learning_rate(step, train):
    """Linear warm-up, then half a cosine down to a tenth at max_steps."""
    warmup = min(1.0, (step + 1) / (train.warmup_steps + 1))
    return (
        train.learning_rate
        * warmup
        * (0.55 + 0.45 * math.cos(math.pi * min(1.0, step / train.max_steps)))
    )


class Muon(torch.optim.AdamW):
    """For groups marked `muon`, which are of one shape, Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon):
    momentum, made orthogonal, and scaled to the size of AdamW's steps (arXiv:2502.16982). For the others AdamW."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if group["muon"]:
                weights, rate = group["params"], group["lr"]
                means = [
                    self.state[w].setdefault("mean", torch.zeros_like(w)).lerp_(w.grad, 0.1)
                    for w in weights
                ]
                steps = torch.stack(
                    [w.grad.lerp(mean, 0.9) for w, mean in zip(weights, means)]
                )  # Nesterov's
                steps = orthogonal(steps.flatten(0, -3)).view_as(steps) * (
                    0.2 * max(steps.shape[-2:]) ** 0.5
                )
                for w, step in zip(weights, steps):
                    w.mul_(1 - rate * group["weight_decay"]).sub_(step, alpha=rate)
                    w.grad = None  # nothing is left for AdamW to do
        super().step()


def orthogonal(x):
    """Matrices x (N, m, n), with singular values brought near 1: Polar Express (arXiv:2505.16932), its first steps."""
    if x.size(1) > x.size(2):
        return orthogonal(x.mT).mT
    x = x / (1.01 * x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in (
        (8.28721, -23.59589, 17.30039),
        (4.10706, -2.94785, 0.54484),
        (3.94869, -2.90890, 0.55182),
    ):
        square = x @ x.mT  # x <- (a + b x x^T + c (x x^T)^2) x
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


def make_optimizer(model, train):
    """Weight decay pulls on matrices, not on gains and exponents; Muon moves matrices, but for embeddings."""
    groups = {}
    for name, weights in model.named_parameters():
        decay = train.weight_decay if weights.dim() > 1 else 0.0
        muon = (
            train.optimizer == "muon" and weights.dim() > 1 and not name.startswith("w")
        )  # wte, wpe
        groups.setdefault((decay, muon and weights.shape), []).append(weights)
    groups = [
        dict(params=weights, weight_decay=decay, muon=bool(shape))
        for (decay, shape), weights in groups.items()
    ]
    return Muon(
        groups,
        lr=0.0,
        betas=(0.9, train.beta2),
        fused=groups[0]["params"][0].device.type in ("cuda", "cpu"),
    )


def add_up(numbers):
    """Replaces a tensor in every process by the sum of all of them."""
    if WORLD > 1:
        dist.all_reduce(numbers)
    return numbers


@torch.no_grad()
def evaluate(model, data, batch_size, context, eval_tokens=None, rank=RANK, world=WORLD):
    """Predicts the first eval_tokens tokens of data, or all, each once, from those before it in windows of block_size,
    batch_size windows at a time. Returns the sum of the losses in this process's share, in nats, and their number."""
    model.eval()
    block_size, predicted = model.config.block_size, min(len(data) - 1, eval_tokens or len(data))
    starts = np.arange(0, predicted - block_size + 1, block_size)
    parts = [(starts[i : i + batch_size], block_size) for i in range(0, len(starts), batch_size)]
    if rest := predicted % block_size:
        parts.append((np.array([predicted - rest]), rest))  # a shorter window
    loss_sum, count = 0.0, 0
    for part in parts[rank::world]:
        x, y = windows(data, *part, model.wte.weight.device)
        with context:
            loss_sum += model(x, y)[1].item() * y.numel()
        count += y.numel()
    model.train()
    return loss_sum, count


# --- A run, from its first step, or from where it was stopped, to its last -------------------------------------------


def claim(folder, new):
    """Makes a run's folder its own: locks it until this process ends, however it does, and removes what one that was
    killed there was writing. Raises UserError where another has it, or where there is a run in a new one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = sqlite3.connect(
            folder / "lock", timeout=0.5
        )  # the system's own; with no wait, two at once both fail
        lock.execute("BEGIN EXCLUSIVE")
    except (OSError, sqlite3.Error) as error:
        raise UserError(
            f"{folder} is in use or cannot be written ({describe_error(error)}); wait, or change --out"
        ) from None
    if new and any(folder.glob("*.pt")):
        raise UserError(
            f"{folder} holds a run already; go on with it by --resume, or choose another --out"
        )
    for rest in folder.glob("*.tmp"):
        rest.unlink(missing_ok=True)
    return lock


def plot(losses, log, path):
    """Draws a run: the training loss of every step, and the validation loss where it was measured."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(6, 4), layout="constrained").subplots()
    axes.plot(range(1, len(losses) + 1), losses, linewidth=0.5, label="training")
    axes.plot(
        [entry["step"] for entry in log],
        [entry["val_loss"] for entry in log],
        "o--",
        label="validation",
    )
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.legend()
    write_atomically(path, lambda temporary: axes.figure.savefig(temporary, format="png", dpi=150))


class Run:
    """A run in progress: its configurations, data, model and optimizer, and what has happened so far."""

    def __init__(self, given):
        self.out, self.asked, past = None, [], None
        if given.get("resume"):
            self.out = Path(given["out"]) if "out" in given else newest_run()
            if RANK == 0 and (self.out / "last.pt").exists():
                self.lock = claim(self.out, new=False)
            self.model, past = GPT.load(self.out / "last.pt")
        train, config = configure(given, past)
        dataset, meta, self.splits = prepare.load_or_prepare(train.dataset)
        self.device = choose_device(train.device, train.threads)
        self.train = replace(train, dataset=dataset, threads=torch.get_num_threads())
        if past is None:
            if (tokens := len(self.splits["train"])) <= config.block_size:
                raise UserError(
                    f"block_size={config.block_size} must be less than the {tokens} training tokens"
                )
            past = dict(
                tokenizer=meta["tokenizer"],
                data_sha256=meta["sha256"],
                losses=[],
                log=[],
                seconds=0.0,
            )
            torch.manual_seed(train.seed)
            size = prepare.tokenizer_size(meta["tokenizer"])  # GPUs multiply round numbers faster
            self.model = GPT(
                replace(config, vocab_size=size if size < 1000 else -(-size // 64) * 64)
            )
        elif (past["tokenizer"], past["data_sha256"]) != (meta["tokenizer"], meta["sha256"]):
            raise UserError(
                f"data set {dataset!r} is not the one that {self.out} was trained on; prepare that again"
            )
        self.past, self.losses, self.log, self.seconds = (
            past,
            past["losses"],
            past["log"],
            past["seconds"],
        )
        self.context = autocast(self.device, train.dtype)
        self.kernel = self.model.to(self.device).use_kernel(train.kernel, self.context)
        compile = self.device.type == "cuda" if train.compile is None else train.compile
        self.compiled = torch.compile(self.model) if compile else self.model
        self.optimizer = make_optimizer(self.model, train)
        for name, weights in self.model.named_parameters():
            state = past["optimizer"][name] if self.losses else {}
            self.optimizer.state[weights] = {
                key: tensor.to(self.device) for key, tensor in state.items()
            }
        if RANK == 0 and self.out is None:
            names = (
                f"{dataset}-{config.attention}-{config.pos}" + f"-{n}" * (n > 1)
                for n in range(1, sys.maxsize)
            )
            self.out = (
                Path(train.out)
                if train.out
                else next(OUT / name for name in names if not (OUT / name).exists())
            )
            self.lock = claim(self.out, new=True)

    def ask(self, number, frame):
        """A signal: the run is to stop after this step; at a second one, at once (but torchrun sends each twice)."""
        if self.asked and WORLD == 1:
            raise KeyboardInterrupt
        self.asked.append(number)

    def step(self):
        """One step: what is random in it follows from seed and number alone. Returns whether to stop after it."""
        train, model, step, started = self.train, self.model, len(self.losses), time.perf_counter()
        torch.manual_seed(
            int(np.random.SeedSequence((train.seed, step, RANK)).generate_state(1)[0])
        )  # dropout
        x, y = batch(self.splits["train"], train, model.config.block_size, step, self.device)
        micro, loss_sum = train.micro_batch_size or len(x), 0.0
        for x_part, y_part in zip(x.split(micro), y.split(micro)):
            with self.context:
                _, loss = self.compiled(x_part, y_part)
            loss = loss * (micro / train.batch_size)  # its part of the mean over all sequences
            loss.backward()  # gradients add up
            loss_sum += loss.detach()
        for parameter in model.parameters():
            add_up(parameter.grad)
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, train)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss, stop = add_up(torch.tensor([loss_sum, len(self.asked)], dtype=torch.float64)).tolist()
        self.losses.append(loss)
        self.seconds += time.perf_counter() - started
        self.check_finite(loss)
        return stop

    def check_finite(self, number):
        """Where a loss, or the sum of all weights, is no number any more, all processes leave. Rank 0 says why."""
        if not math.isfinite(number):
            raise (
                SystemExit(1)
                if RANK
                else UserError(
                    f"the loss is {number} at step {len(self.losses):,}: training has diverged; take a smaller "
                    f"--learning_rate, from the start or by --resume --out={self.out}"
                )
            )

    def validate(self):
        """Measures the validation loss, adds it to the log and saves the run."""
        train, micro = self.train, self.train.micro_batch_size or self.train.batch_size // WORLD
        part = evaluate(self.model, self.splits["val"], micro, self.context, train.eval_tokens)
        loss_sum, count = add_up(torch.tensor(part, dtype=torch.float64)).tolist()
        self.check_finite(loss_sum)
        step, recent = len(self.losses), self.losses[-100:]
        entry = dict(
            step=step,
            train_loss=sum(recent) / len(recent),
            val_loss=loss_sum / count,
            seconds=self.seconds,
        )
        best = all(entry["val_loss"] < other["val_loss"] for other in self.log)
        self.log.append(entry)
        self.save(*["best.pt"] * best, "last.pt")
        print(
            f"step {step:,}: training loss {entry['train_loss']:.4f}, validation loss {entry['val_loss']:.4f}"
            f"{' (the best so far)' if best else ''}, {format_time(self.seconds)}",
            flush=True,
        )

    def save(self, *names):
        """Writes log.jsonl and checkpoints of these names; last.pt is the last, and knows of no more than is there."""
        self.check_finite(
            sum(parameter.detach().sum().item() for parameter in self.model.parameters())
        )
        if RANK == 0:
            lines = "".join(json.dumps(entry) + "\n" for entry in self.log)
            write_atomically(
                self.out / "log.jsonl",
                lambda temporary: temporary.write_text(lines, encoding="utf-8"),
            )
            checkpoint = dict(
                self.past,
                format=CHECKPOINT_FORMAT,
                model=self.model.state_dict(),
                optimizer={
                    name: self.optimizer.state[w] for name, w in self.model.named_parameters()
                },
                model_config=asdict(self.model.config),
                train_config=asdict(self.train),
                seconds=self.seconds,
            )
            for name in names:
                write_atomically(
                    self.out / name, lambda temporary: torch.save(checkpoint, temporary)
                )
        add_up(torch.zeros(1))  # nobody leaves before that is done

    def go(self):
        """Steps until max_steps, or until somebody asks to stop; every eval_interval steps validates and saves."""
        train, config = self.train, self.model.config
        for number in signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, self.ask)
        tokens, size = (
            train.batch_size * config.block_size,
            sum(weights.numel() for weights in self.model.parameters()),
        )
        epochs, dtype = (
            tokens * train.max_steps / len(self.splits["train"]),
            str(self.context.fast_dtype)[6:],
        )
        print(
            f"model: {config.attention} attention, {config.pos} positions, {config.n_layer} layers, {config.n_head} "
            f"heads, {config.n_embd} wide: {size:,} parameters, trained for {len(self.losses):,} steps\n"
            f"plan:  {train.max_steps:,} steps of {tokens:,} tokens, {epochs:.2g} epochs of {train.dataset}, on "
            f"{WORLD} x {self.device}, {train.threads} threads, {dtype}, attention by {self.kernel}",
            flush=True,
        )
        self.save(*["last.pt"] * (not self.losses))  # if that fails, now and not in an hour
        progress = Progress(train.max_steps, len(self.losses))
        while len(self.losses) < train.max_steps:
            stop, step = self.step(), len(self.losses)
            if RANK == 0:
                progress(
                    step,
                    f"step {step:,} of {train.max_steps:,}: loss {self.losses[-1]:.3f}, "
                    f"{tokens * progress.rate(step):,.0f} tokens/s",
                )
            if step % train.eval_interval == 0 or step == train.max_steps:
                progress.clear()
                self.validate()
            if stop and step < train.max_steps:
                progress.clear()
                self.save("last.pt")
                sys.exit(
                    1
                    if RANK
                    else f"stopped after step {step:,}; it is saved: go on by --resume --out={self.out}"
                )
        if RANK == 0:
            plot(self.losses, self.log, self.out / "loss.png")
        print(
            f"curves: {self.out}/loss.png; to sample from it: python sample.py --out={shlex.quote(str(self.out))}"
        )


def main(argv=None):
    given = parse(argv)
    sys.stdout = open(os.devnull, "w") if RANK else sys.stdout  # the first alone speaks
    try:
        run = Run(given) if RANK == 0 else None  # the first prepares the data, or says
        if WORLD > 1:  # what is wrong, while the others wait
            from torch.distributed import nn  # noqa: F401 (later, it keeps the group)

            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        (run or Run(given)).go()
    except (MemoryError, RuntimeError) as error:
        if any(
            words in str(error) for words in ("by peer", "remote process")
        ):  # it has left, and said why
            sys.exit(1)
        if "memory" not in f"{type(error)} {error}".lower():
            raise
        raise UserError(
            "memory ran out; lower --micro_batch_size, or else --n_embd, --n_layer, --block_size"
        ) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    prepare.run_program(main)

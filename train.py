"""Trains a GPT with any of the five attentions.

    python train.py                                         tiny Shakespeare: a minute on a laptop's CPU
    python train.py --attention=qkv --pos=learned           the same, with GPT-2's attention
    python train.py --preset=gpu                            nanoGPT's 10.7M baby GPT (the default where there is CUDA)
    torchrun --nproc_per_node=8 train.py --preset=gpt2      GPT-2 124M on OpenWebText
    python train.py --resume                                goes on with the newest run, exactly

A run is a folder: log.jsonl (a line for each evaluation), loss.png, and the checkpoints last.pt and best.pt. What is
random in step i is a function of (seed, i): its batch, however many processes share it, and in each process its
dropout. So a run that was stopped and resumed computes the same numbers as one that was not.
"""

import itertools
import json
import math
import os
import shlex
import signal
import sys
import time
from argparse import SUPPRESS, BooleanOptionalAction
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import prepare
from model import CHECKPOINT_FORMAT, GPT, GPTConfig, autocast, choose_device, option
from prepare import OUT, Parser, Progress, UserError, clock, newest_run, reason, whole, write

# This process among those that torchrun starts. Each has the whole model, and computes on its share of every batch.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# ---------------------------------------------------------------------------------------------------------------------
# Configuration: defaults, under a preset, under the flags that are given. The two dataclasses are the command line.

PRESETS = {
    "cpu": dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12, max_steps=780, learning_rate=3e-3,
                warmup_steps=200, beta2=0.98, eval_interval=260),
    "gpu": dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64, max_steps=5000, learning_rate=1e-3,
                dropout=0.2, eval_interval=250),
    "gpt2": dict(dataset="openwebtext", n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=480,
                 micro_batch_size=12, max_steps=600_000, learning_rate=6e-4, warmup_steps=2000, beta2=0.95,
                 eval_interval=1000, eval_tokens=2_000_000),
}


@dataclass(frozen=True)
class TrainConfig:
    """How to train it: a preset (below) sets many flags, whatever their defaults here say; the flags you give win."""

    preset: str | None = option(None, "cpu: 0.8M parameters, a minute; gpu: 10.7M, minutes; gpt2: 124M on OpenWebText, "
                                "days (default: gpu where there is CUDA, else cpu)", PRESETS)
    dataset: str | None = option(None, "a folder of data/ (default: tiny Shakespeare, or pydoc if there is no network)")
    out: str | None = option(None, "the run's folder (default: a new one in out/)")
    resume: bool = option(False, "go on with the run in --out, or with the newest, from its last.pt")
    seed: int = option(1337, "of weights, batches and dropout")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps ...")
    dtype: str = option("auto", "of matrix products (auto: bfloat16 if CUDA has it)", ("auto", "float32", "bfloat16"))
    kernel: str = option("auto", "of qv and qv_ka (triton: kernel.py, CUDA; auto: torch)", ("auto", "torch", "triton"))
    compile: bool | None = option(None, "torch.compile the model (default: on CUDA only)")
    batch_size: int = option(64, "sequences in one optimizer step, over all processes and micro-batches together")
    micro_batch_size: int | None = option(None, "sequences in one forward pass of one process: lower it if memory runs "
                                          "out; gradients are accumulated up to batch_size (default: all at once)")
    max_steps: int = option(5000, "optimizer steps")
    learning_rate: float = option(1e-3, "at step 0; falls by a cosine to a tenth at max_steps")
    warmup_steps: int = option(100, "first steps, in which the rate is scaled by a factor that grows to 1")
    weight_decay: float = option(0.1, "on matrices only")
    beta2: float = option(0.99, "AdamW's second moment; beta1 is 0.9")
    grad_clip: float = option(1.0, "largest norm of the gradient; 0 is no limit")
    eval_interval: int = option(250, "steps from one evaluation, and checkpoint, to the next")
    eval_tokens: int | None = option(None, "validate on so many tokens only (default: the whole validation split)")

    def __post_init__(self):
        for name, value in vars(self).items():
            least = name in ("batch_size", "micro_batch_size", "max_steps", "eval_interval", "eval_tokens")
            end = 1 if name == "beta2" else math.inf
            if isinstance(value, (int, float)) and not least <= value < end:
                raise UserError(f"{name}={value} must be at least {int(least)}, and less than {end}")
        unit = WORLD * (self.micro_batch_size or 1)
        if self.batch_size % unit:
            raise UserError(f"batch_size={self.batch_size} must be a multiple of {unit}, micro_batch_size x processes")


# How a flag is read, by its type; and the flags that a resumed run may be given anew. Without them it goes on exactly.
READ = {int: whole, int | None: whole, float: float, float | None: float, str: str, str | None: str}
MAY_CHANGE = {"out", "resume", "device", "dtype", "kernel", "compile", "micro_batch_size", "max_steps", "learning_rate",
              "warmup_steps", "weight_decay", "grad_clip", "eval_interval"}


def parse(argv=None):
    """The flags that were given, as a dict."""
    presets = (f"  {name:5} " + " ".join(f"{k}={v}" for k, v in preset.items()) for name, preset in PRESETS.items())
    parser = Parser(__doc__, argument_default=SUPPRESS, epilog="\n".join(["presets:", *presets]))
    for config in TrainConfig, GPTConfig:
        group = parser.add_argument_group(config.__name__, config.__doc__.split(". ")[0])
        for field in fields(config):
            flag, choices = f"--{field.name}", field.metadata["choices"]
            help = field.metadata["help"] + ("" if field.default is None else f" (default: {field.default})")
            if field.type in (bool, bool | None):
                group.add_argument(flag, action=BooleanOptionalAction, help=help)
            elif field.name != "vocab_size":                                         # that is the data set's to say
                group.add_argument(flag, type=READ[field.type], choices=choices, help=help)
    return vars(parser.parse_args(argv))


def configure(given, past=None):
    """TrainConfig and GPTConfig: defaults, under a preset or the checkpoint of a run to resume, under given flags."""
    if past is None:
        preset = given.get("preset", "gpu" if torch.cuda.is_available() and given.get("device") != "cpu" else "cpu")
        stored = {**PRESETS[preset], "preset": preset}
    else:
        stored = {**past["train_config"], **past["model_config"]}
        for name in sorted(given.keys() - MAY_CHANGE):
            if given[name] != stored[name]:
                raise UserError(f"--{name}={given[name]} cannot change a run in the middle, which has {stored[name]}")
    values = {**stored, **given}
    train, config = (kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})
                     for kind in (TrainConfig, GPTConfig))
    for field in fields(GPTConfig):
        for other, wanted in field.metadata["only"].items():
            if field.name in given and getattr(config, other) not in wanted:
                raise UserError(f"--{field.name} counts only with --{other}={' or '.join(wanted)}, and this is "
                                f"{getattr(config, other)}; leave it out")
    return train, config


# ---------------------------------------------------------------------------------------------------------------------
# One step: its data, its rate, its gradients; and the measure of what was learned

def find_data(name, tell):
    """The data set's name, meta and splits. Small ones are prepared on the way; only the default has a substitute."""
    if name is None:
        try:
            return find_data("shakespeare_char", tell)
        except prepare.DownloadError as error:
            tell(f"{error}; training on pydoc, Python's language reference, instead")
            return find_data("pydoc", tell)
    if name in prepare.SOURCES and not (prepare.DATA / name / "meta.json").exists():
        prepare.prepare_text(name, *prepare.SOURCES[name])
    return name, *prepare.load(name)


def windows(data, starts, length, device):
    """Inputs and targets (len(starts), length): the tokens from each start on, and those one further."""
    tokens = torch.from_numpy(data[starts[:, None] + np.arange(length + 1)].astype(np.int64)).to(device)
    return tokens[:, :-1], tokens[:, 1:]


def batch(data, train, block_size, step, device, rank=RANK, world=WORLD):
    """This process's share of a step's sequences (batch_size / world, block_size), a function of (seed, step) alone."""
    starts = np.random.default_rng((train.seed, step)).integers(len(data) - block_size, size=train.batch_size)
    return windows(data, np.split(starts, world)[rank], block_size, device)


def learning_rate(step, train):
    """Linear warm-up, then half a cosine down to a tenth at max_steps."""
    warmup = min(1.0, (step + 1) / (train.warmup_steps + 1))
    return train.learning_rate * warmup * (0.55 + 0.45 * math.cos(math.pi * min(1.0, step / train.max_steps)))


def make_optimizer(model, train):
    """AdamW; weight decay pulls on matrices, not on gains and exponents."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [dict(params=matrices, weight_decay=train.weight_decay), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, train.beta2), fused=matrices[0].device.type in ("cuda", "cpu"))


def add_up(numbers):
    """Replaces a tensor in every process by the sum of all of them. Where one process has left, the others do, too."""
    if WORLD > 1:
        try:
            dist.all_reduce(numbers)
        except RuntimeError as error:                                                # the one that left has said why
            sys.exit(1 if "by peer" in str(error) else f"train.py: the processes lost each other ({reason(error)})")
    return numbers


@torch.no_grad()
def evaluate(model, data, block_size, batch_size, context, eval_tokens=None, rank=RANK, world=WORLD):
    """Predicts the first eval_tokens tokens of data, or all, each once, from those before it in windows of block_size,
    batch_size windows at a time. Returns the sum of the losses in this process's share, in nats, and their number."""
    model.eval()
    device, predicted = next(model.parameters()).device, min(len(data) - 1, eval_tokens or len(data))
    starts = np.arange(0, predicted - block_size + 1, block_size)
    parts = [(starts[i : i + batch_size], block_size) for i in range(0, len(starts), batch_size)]
    if rest := predicted % block_size:
        parts.append((np.array([predicted - rest]), rest))                           # a shorter window
    loss_sum, count = 0.0, 0
    for part in parts[rank::world]:
        x, y = windows(data, *part, device)
        with context:
            loss_sum += model(x, y)[1].item() * y.numel()
        count += y.numel()
    model.train()
    return loss_sum, count


# ---------------------------------------------------------------------------------------------------------------------
# A run, from its first step, or from where it was stopped, to its last

def listen():
    """A list, to which Ctrl-C, SIGTERM and the end of the terminal (but for nohup) add; a second one stops at once."""
    asked = []

    def ask(number, frame):
        asked.append(number)
        if WORLD == 1:                                                               # torchrun sends every signal twice
            signal.signal(number, signal.default_int_handler)

    for name in "SIGINT", "SIGTERM", "SIGHUP":
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:
            signal.signal(getattr(signal, name), ask)
    return asked


def new_folder(out, name):
    """The folder of a new run: `out`, or one in out/ that no other has, not even one that starts at the same moment."""
    if out and any(Path(out).glob("*.pt")):
        raise UserError(f"{out} holds a run already; go on with it by --resume, or choose another --out")
    for number in itertools.count(1):
        folder = Path(out) if out else OUT / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True, exist_ok=bool(out))
            return folder
        except OSError as error:
            if out or not folder.is_dir():
                raise UserError(f"{folder} cannot be made ({reason(error)}); choose another --out") from None


def plot(losses, log, path):
    """Draws a run: the training loss of every step, and the validation loss where it was measured."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, linewidth=0.5, label="training")
    axes.plot([entry["step"] for entry in log], [entry["val_loss"] for entry in log], "o--", label="validation")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.legend()
    write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def peak_memory(device):
    """Bytes at the peak so far, of a GPU's memory or of the whole process; 0 on Windows, which does not say."""
    if device.type == "cuda" or sys.platform == "win32":
        return torch.cuda.max_memory_allocated()
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Run:
    """A run in progress: its configurations, data, model and optimizer, and what has happened so far."""

    def __init__(self, given):
        self.out = past = None
        if given.get("resume"):
            self.out = Path(given["out"]) if "out" in given else newest_run()
            self.model, past = GPT.load(self.out / "last.pt")
        train, config = configure(given, past)
        dataset, meta, self.splits = find_data(train.dataset, print)
        self.train, self.device = replace(train, dataset=dataset), choose_device(train.device)
        if len(self.splits["train"]) <= config.block_size:
            raise UserError(f"block_size={config.block_size} must be less than the {len(self.splits['train'])} tokens")
        if past is None:
            past = dict(tokenizer=meta["tokenizer"], data_sha256=meta["sha256"], losses=[], log=[], seconds=0.0)
            torch.manual_seed(train.seed)
            size = prepare.tokenizer_size(meta["tokenizer"])                   # GPUs multiply round numbers faster
            self.model = GPT(replace(config, vocab_size=size if size < 1000 else -(-size // 64) * 64))
        elif (past["tokenizer"], past["data_sha256"]) != (meta["tokenizer"], meta["sha256"]):
            raise UserError(f"data set {dataset!r} is not the one that {self.out} was trained on; prepare that again")
        self.past, self.losses, self.log, self.seconds = past, past["losses"], past["log"], past["seconds"]
        self.context = autocast(self.device, train.dtype)
        self.kernel = self.model.to(self.device).use_kernel(train.kernel, self.context)
        compile = self.device.type == "cuda" and find_spec("triton") if train.compile is None else train.compile
        self.compiled = torch.compile(self.model) if compile else self.model
        self.optimizer = make_optimizer(self.model, train)
        if "optimizer" in past:                                                # but its flags may be new
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": past["optimizer"]["state"]})
        if RANK == 0 and self.out is None:
            self.out = new_folder(train.out, f"{dataset}-{config.attention}-{config.pos}")

    def step(self, asked):
        """One step: what is random in it follows from seed and number alone. Returns whether to stop after it."""
        train, model, step, started = self.train, self.model, len(self.losses), time.perf_counter()
        torch.manual_seed(int(np.random.SeedSequence((train.seed, step, RANK)).generate_state(1)[0]))    # dropout
        x, y = batch(self.splits["train"], train, model.config.block_size, step, self.device)
        micro, loss_sum = train.micro_batch_size or len(x), 0.0
        for x_part, y_part in zip(x.split(micro), y.split(micro)):
            with self.context:
                _, loss = self.compiled(x_part, y_part)
            loss = loss * (micro / train.batch_size)                           # its part of the mean over all sequences
            loss.backward()                                                    # gradients add up
            loss_sum += loss.detach()
        for parameter in model.parameters():
            add_up(parameter.grad)
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, train)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss, stop = add_up(torch.tensor([loss_sum, len(asked)], dtype=torch.float64)).tolist()
        self.losses.append(loss)
        self.seconds += time.perf_counter() - started
        self.check_finite(loss)
        return stop

    def check_finite(self, number):
        """Where a loss, or the sum of all weights, is no number any more, all processes leave. Rank 0 says why."""
        if not math.isfinite(number):
            raise SystemExit(1) if RANK else UserError(
                f"the loss is {number} at step {len(self.losses):,}: training has diverged; begin again with a smaller "
                f"--learning_rate" + f", or go on by --resume --out={self.out}" * (self.out / "last.pt").exists())

    def validate(self):
        """Measures the validation loss, adds it to the log and saves the run."""
        train, step, block_size = self.train, len(self.losses), self.model.config.block_size
        micro, old = train.micro_batch_size or train.batch_size // WORLD, (self.log or [dict(step=0, seconds=0.0)])[-1]
        part = evaluate(self.model, self.splits["val"], block_size, micro, self.context, train.eval_tokens)
        loss_sum, count = add_up(torch.tensor(part, dtype=torch.float64)).tolist()
        self.check_finite(loss_sum)
        new, tokens = self.losses[old["step"] :], train.batch_size * block_size
        entry = dict(step=step, train_loss=sum(new) / len(new), val_loss=loss_sum / count, tokens=step * tokens,
                     seconds=self.seconds, tokens_per_second=round(len(new) * tokens / (self.seconds - old["seconds"])))
        best = all(entry["val_loss"] < other["val_loss"] for other in self.log)
        self.log.append(entry)
        self.save(*["best.pt"] * best, "last.pt")
        print(f"step {step:,}: training loss {entry['train_loss']:.4f}, validation loss {entry['val_loss']:.4f}"
              f"{' (the best so far)' if best else ''}, {clock(self.seconds)}", flush=True)

    def save(self, *names):
        """Writes log.jsonl and checkpoints of these names; last.pt is the last, and knows of no more than is there."""
        self.check_finite(sum(parameter.detach().sum().item() for parameter in self.model.parameters()))
        if RANK == 0:
            lines = "".join(json.dumps(entry) + "\n" for entry in self.log)
            write(self.out / "log.jsonl", lambda temporary: temporary.write_text(lines, encoding="utf-8"))
            checkpoint = dict(self.past, format=CHECKPOINT_FORMAT, model=self.model.state_dict(),
                              optimizer=self.optimizer.state_dict(), model_config=asdict(self.model.config),
                              train_config=asdict(self.train), step=len(self.losses), seconds=self.seconds,
                              best_val_loss=min((entry["val_loss"] for entry in self.log), default=math.inf))
            for name in names:
                write(self.out / name, lambda temporary: torch.save(checkpoint, temporary))
        add_up(torch.zeros(1))                                                 # nobody leaves before that is done

    def go(self):
        """Steps until max_steps, or until somebody asks to stop; every eval_interval steps validates and saves."""
        train, config, data, asked = self.train, self.model.config, self.splits["train"], listen()
        tokens, parameters = train.batch_size * config.block_size, sum(p.numel() for p in self.model.parameters())
        print(f"model: {config.attention} attention, {config.pos} positions, {config.n_layer} layers, {config.n_head} "
              f"heads, {config.n_embd} wide: {parameters:,} parameters\nplan:  {train.max_steps:,} steps of {tokens:,} "
              f"tokens, {tokens * train.max_steps / len(data):.2g} x {train.dataset}, on {WORLD} x {self.device} in "
              f"{str(self.context.fast_dtype).removeprefix('torch.')}, attention by {self.kernel}", flush=True)
        self.save()                                                            # if that fails, now and not in an hour
        progress = Progress(train.max_steps, len(self.losses))
        while len(self.losses) < train.max_steps:
            stop, step = self.step(asked), len(self.losses)
            if RANK == 0:
                progress(step, f"step {step:,} of {train.max_steps:,}: loss {self.losses[-1]:.3f}, "
                               f"{tokens * progress.rate(step):,.0f} tokens/s")
            if step % train.eval_interval == 0 or step == train.max_steps:
                progress.clear()
                self.validate()
            if stop and step < train.max_steps:
                progress.clear()
                self.save("last.pt")
                sys.exit(1 if RANK else f"stopped after step {step:,}, which is saved; to go on: python train.py "
                         f"--resume --out={self.out}")
        if RANK == 0:
            plot(self.losses, self.log, self.out / "loss.png")
        best = min(self.log, key=lambda entry: entry["val_loss"])
        print(f"validation loss: {self.log[-1]['val_loss']:.4f} at the end, {best['val_loss']:.4f} at best (step "
              f"{best['step']:,}), over {f'{train.eval_tokens:,} tokens' if train.eval_tokens else 'the whole split'}\n"
              f"memory: {peak_memory(self.device) / 1e9:.1f} GB at the peak\n"
              f"curves: {self.out}/loss.png; to sample from it: python sample.py --out={shlex.quote(str(self.out))}")


def main(argv=None):
    given = parse(argv)
    sys.stdout = open(os.devnull, "w") if RANK else sys.stdout                 # the first alone speaks
    try:
        run = Run(given) if RANK == 0 else None                                # the first prepares the data, or says
        if WORLD > 1:                                                          # what is wrong, while the others wait
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        (run or Run(given)).go()
    except (MemoryError, RuntimeError) as error:
        if "memory" not in f"{type(error)} {error}".lower():
            raise
        raise UserError("memory ran out; lower --micro_batch_size (without dropout it changes nothing that is learned) "
                        "or --n_embd, --n_layer, --block_size") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    prepare.run(main)

"""Trains a GPT with any of the five attentions.

    python train.py                                             tiny Shakespeare: a minute on a laptop's CPU
    python train.py --attention=qkv --pos=learned               the same, with GPT-2's attention
    python train.py --preset=gpu                                nanoGPT's 10.7M baby GPT (the default where there is CUDA)
    torchrun --nproc_per_node=8 train.py --preset=gpt2          GPT-2 124M on OpenWebText
    python train.py --resume                                    goes on with the newest run, exactly
    python train.py --attention=all --pos=rope,agf --seeds=5    many runs, several at a time; go on by the same command
    python train.py --report                                    what they say: assets/results.{json,md,png}

A run is a folder: log.jsonl (one line an evaluation), loss.png, and the checkpoints last.pt and best.pt. Whatever is
random in step i, its batch and its dropout, is a pure function of (seed, i). So a run that was stopped and resumed
computes the same numbers as one that was not, and its batches do not depend on how many processes share them.
That is told up to `train_one`; then follow many runs (`sweep`), and what they say (`report`).
"""

import contextlib
import itertools
import json
import math
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from argparse import SUPPRESS, BooleanOptionalAction
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, fields, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import get_args

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import prepare
from model import ATTENTIONS, POSITIONS, GPT, GPTConfig, option
from prepare import Parser, Progress, UserError, clock, named, reason

OUT = Path("out")
SWEEP = OUT / "sweep"

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
    """How to train it: a preset (listed below) sets many flags at once, whatever their defaults here say, and flags that you
    give win over it."""

    preset: str = option("auto", "cpu: 0.8M parameters, a minute; gpu: 10.7M, minutes; gpt2: 124M on OpenWebText, days "
                         "(auto: gpu where there is CUDA, else cpu)", ("auto", *PRESETS))
    dataset: str | None = option(None, "a folder of data/ that prepare.py made (default: tiny Shakespeare by character, "
                                 "or pydoc where that cannot be downloaded)")
    out: str | None = option(None, "the run's folder (default: a new one in out/); of a sweep, that of its runs' folders (default: out/sweep)")
    resume: bool = option(False, "go on with the run in --out, or with the newest, from its last.pt")
    seed: int = option(1337, "of weights, batches and dropout")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps ...")
    dtype: str = option("auto", "of matrix products (auto: bfloat16 where a CUDA device has it, else float32)",
                        ("auto", "float32", "bfloat16"))
    kernel: str = option("auto", "what computes qv and qv_ka: torch, or triton: the fused kernel of kernel.py, on CUDA, without dropout "
                         "(auto: where it was measured to be faster; nowhere yet, so torch)", ("auto", "torch", "triton"))
    compile: bool | None = option(None, "torch.compile the model (default: on CUDA only)")
    batch_size: int = option(64, "sequences in one optimizer step, over all processes and accumulation steps together")
    micro_batch_size: int | None = option(None, "sequences in one forward pass on one device: lower it if memory runs out; "
                                          "gradients are accumulated up to batch_size (default: all at once)")
    max_steps: int = option(5000, "optimizer steps")
    learning_rate: float = option(1e-3, "at step 0; falls by a cosine to a tenth at max_steps")
    warmup_steps: int = option(100, "first steps, in which the learning rate is scaled by a factor that grows from nearly 0 to 1")
    weight_decay: float = option(0.1, "on matrices only")
    beta2: float = option(0.99, "AdamW's second moment; beta1 is 0.9")
    grad_clip: float = option(1.0, "largest norm of the gradient; 0 is no limit")
    eval_interval: int = option(250, "steps from one evaluation, and checkpoint, to the next")
    eval_tokens: int | None = option(None, "validate on so many tokens only (default: the whole validation split)")

    def __post_init__(self):
        for name in "batch_size", "micro_batch_size", "max_steps", "eval_interval", "eval_tokens":
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in "learning_rate", "weight_decay", "grad_clip", "warmup_steps":
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative, and must be finite")
        if self.out == "":
            raise ValueError("out='' must name a folder, for example out/mine")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must lie in [0, 2**63), for example 1337")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2={self.beta2} must lie in [0, 1), for example 0.99")


@dataclass(frozen=True)
class Task:
    """More runs than one (--attention and --pos take lists with commas, or all, for a sweep), and what else to do with runs."""

    seeds: int | None = option(None, "repeat with so many seeds: --seed and the next ones; whatever the attention, the same seed "
                               "means the same batches")
    workers: int | None = option(None, "runs of a sweep that go on at once (default: one for each of the CPU's cores, or 4 on a GPU)")
    report: bool = option(False, "train nothing: gather the finished runs of --out, write assets/results.json, .md and .png")
    eval_only: bool = option(False, "train nothing: validate the best.pt of the run in --out, of the newest, or of a sweep's runs")
    eval_block_size: int | None = option(None, "with --eval_only: in windows of so many tokens (default: block_size), also longer ones "
                                         "than the model was trained on, under rope and agf")

    def __post_init__(self):
        for name in "seeds", "workers", "eval_block_size":
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.report and self.eval_only:
            raise ValueError("report and --eval_only are two tasks; give one")
        if self.eval_block_size and not self.eval_only:
            raise ValueError(f"eval_block_size={self.eval_block_size} is for --eval_only; to train with it, take --block_size")


# ---------------------------------------------------------------------------------------------------------------------
# The command line is the dataclasses


LISTS = {"attention": ATTENTIONS, "pos": POSITIONS}                                  # flags that take several names, for sweeps
ONLY = {field.name: field.metadata["only"] for field in fields(GPTConfig)}          # {flag: what else it takes to count}


def parse(argv=None):
    """The flags that were given, as a dict; the rest is left to the preset and the defaults."""
    parser = Parser(description=__doc__, argument_default=SUPPRESS, epilog="presets:\n" + "\n".join(
        f"  {name:5} " + " ".join(f"{k}={v}" for k, v in preset.items()) for name, preset in PRESETS.items()))
    for config in TrainConfig, GPTConfig, Task:
        group = parser.add_argument_group(config.__name__, config.__doc__.split(". ")[0])
        for field in fields(config):
            if field.name == "vocab_size":                                           # is the data set's to say
                continue
            kind = next(iter(get_args(field.type)), field.type)                      # int | None -> int
            help = field.metadata["help"] + ("" if field.default is None else f" (default: {field.default})")
            if field.name in LISTS:
                group.add_argument(f"--{field.name}", help=help, metavar=",".join(LISTS[field.name]) + " or all")
            elif kind is bool:
                group.add_argument(f"--{field.name}", action=BooleanOptionalAction, help=help)
            else:
                group.add_argument(f"--{field.name}", type=kind, choices=field.metadata["choices"], help=help,
                                   metavar=None if field.metadata["choices"] else kind.__name__.upper())
    return vars(parser.parse_args(argv))


def listed(given, name):
    """The names that a flag lists, each once."""
    names = given.get(name, getattr(GPTConfig, name))
    return [*LISTS[name]] if names == "all" else [*dict.fromkeys(re.split(r"\s*,\s*", names))]


def check_use(given):
    """Refuses a flag for an attention, or positions, that are not asked for."""
    for name, (other, values) in ((name, item) for name in given for item in ONLY.get(name, {}).items()):
        if not set(values) & set(listed(given, other)):
            raise UserError(f"--{name}={given[name]} is for --{other}={' or '.join(values)}; with --{other}={','.join(listed(given, other))}, leave it out")


@contextlib.contextmanager
def naming_flags():
    """What a configuration refuses, "field=value rule", becomes a sentence about the flag of that name."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"--{error}") from None


def preset_of(given):
    """The preset that is meant, which is not auto."""
    if given.get("preset", "auto") != "auto":
        return given["preset"]
    return "gpu" if given.get("device", "auto").startswith(("auto", "cuda")) and torch.cuda.is_available() else "cpu"


def resolve(given):
    """The two configurations: defaults, under the preset, under the given flags. vocab_size is for `Run.begin` to fill in."""
    preset = preset_of(given)
    values = {**PRESETS[preset], **given, "preset": preset}
    return tuple(config(**{f.name: values[f.name] for f in fields(config) if f.name in values})
                 for config in (TrainConfig, GPTConfig))


# ---------------------------------------------------------------------------------------------------------------------
# Where it runs: one process, or as many as torchrun starts


def choose_device(name):
    """The torch.device of that name; auto is CUDA or MPS where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name).tolist()
    except (RuntimeError, AssertionError) as error:                                  # no such backend, or none in this build
        raise UserError(f"--device={name} cannot be used here ({reason(error)}); take --device=cpu or leave it out") from None
    return torch.device(name)


def choose_dtype(name, device):
    """The dtype of matrix products; auto is bfloat16 where a CUDA device has it, else float32."""
    if name == "auto":
        bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if bfloat16 else "float32"
    return getattr(torch, name)


@torch.no_grad()
def choose_kernel(name, model, context):
    """Has the model attend by kernel.py if it is asked for by name, and tries it; returns torch or triton. No GPU has measured
    yet where the kernel is faster, so auto is torch."""
    if name != "triton":
        return "torch"
    kernel, device = import_module("kernel"), model.wte.weight.device
    if device.type != "cuda" and not kernel.INTERPRETED:
        raise UserError(f"--kernel=triton needs a CUDA GPU, and this is {device}; take --kernel=torch")
    try:
        model.use_kernel(kernel)
        with context:
            model(torch.zeros(1, min(2, model.config.block_size), dtype=torch.int64, device=device))
    except (ValueError, RuntimeError) as error:                                      # kernel.py says what it needs
        raise UserError(f"--kernel=triton cannot be used here: {reason(error)}; or take --kernel=torch") from None
    return "triton"


def autocast(device, dtype):
    """The context of a forward pass: matrix products in that dtype, everything else in float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def peak_memory(device):
    """Bytes at the peak so far, of a GPU's memory or of the whole process; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if find_spec("resource") is None:                                                # on Windows
        return None
    resource = import_module("resource")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Processes:
    """This process among those that torchrun started; a single one if it did not."""

    def __init__(self, device):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.world > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        self.device = choose_device(device)
        if self.world > 1:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def sum(self, *numbers):
        """These numbers, summed over all processes."""
        if self.world == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    @contextlib.contextmanager
    def first(self):
        """The first process goes through the body alone, then the others together."""
        if self.rank:
            dist.barrier()
        yield
        if self.world > 1 and self.rank == 0:
            dist.barrier()

    def print(self, *args, **kwargs):
        if self.rank == 0:
            print(*args, **kwargs, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Data


def find_data(name, tell):
    """The data set's name, meta and splits. Small ones are prepared on the way; only the default has a substitute."""
    if name is None:
        try:
            return find_data("shakespeare_char", tell)
        except UserError as error:
            tell(f"{error}; training on pydoc, Python's language reference, instead")
            return find_data("pydoc", tell)
    if name in prepare.SOURCES and not (prepare.DATA / name / "meta.json").exists():
        prepare.prepare_text(name, *prepare.SOURCES[name])
    return name, *prepare.load(name)


def batch(data, train, block_size, step, processes):
    """This process's share of the sequences of a step: inputs and targets, (batch_size / processes, block_size) int64.

    Where they start is drawn uniformly from all of the data, as a function of (seed, step) alone."""
    starts = np.random.default_rng((train.seed, step)).integers(len(data) - block_size, size=train.batch_size)
    share = np.split(starts, processes.world)[processes.rank]
    return windows(data, share, block_size, processes.device)


def windows(data, starts, length, device):
    """Inputs and targets (len(starts), length): the tokens from each start on, and those one further."""
    tokens = torch.from_numpy(data[starts[:, None] + np.arange(length + 1)].astype(np.int64)).to(device)
    return tokens[:, :-1], tokens[:, 1:]


@torch.no_grad()
def evaluate(model, data, block_size, eval_tokens, processes, context):
    """Mean cross-entropy, in nats a token, over the first eval_tokens tokens of data, or all: each predicted once, from
    those before it in windows of block_size side by side. The processes share the work."""
    model.eval()
    predicted = min(len(data) - 1, eval_tokens or len(data))
    starts = np.arange(0, predicted - block_size + 1, block_size)
    rows = max(1, 8192 // block_size)
    chunks = [(starts[i : i + rows], block_size) for i in range(0, len(starts), rows)]
    if predicted % block_size:                                                       # the rest, a shorter window
        chunks.append((np.array([predicted - predicted % block_size]), predicted % block_size))
    total, progress = 0.0, Progress(len(chunks))
    for i in range(processes.rank, len(chunks), processes.world):
        x, y = windows(data, *chunks[i], processes.device)
        with context:
            total += model(x, y)[1].item() * y.numel()
        if processes.rank == 0:
            progress(i + 1, f"validating: {i + 1:,} of {len(chunks):,} batches")
    progress.clear()
    model.train()
    return processes.sum(total)[0] / predicted


# ---------------------------------------------------------------------------------------------------------------------
# A run's folder


def new_folder(name):
    """Makes a folder in out/ that no other run has, not even one that starts at the same moment."""
    for number in itertools.count(1):
        folder = OUT / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{folder} cannot be made ({reason(error)}); run where you may write, or choose --out") from None


def newest_run():
    """The folder of out/ whose checkpoint is the youngest. Raises UserError where there is none."""
    runs = sorted(OUT.rglob("last.pt"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError(f"there is no run in {OUT}/; train one first: python train.py")
    return runs[-1].parent


def write(path, write_to):
    """Writes a file under a temporary name and renames it, so that what was there before is lost only to what is whole."""
    if not path.name:
        raise UserError(f"{str(path)!r} is no name for a file; give one")
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_to(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                                         # torch.save raises either
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written ({reason(error)}); what was saved before is intact: make room, "
                        "fix the permissions, or name another place, and try again") from None


# What a checkpoint holds. `losses` is the training loss of every step so far; `log` is what log.jsonl has.
CHECKPOINT = ("model", "optimizer", "model_config", "train_config", "tokenizer", "data_sha256", "step", "seconds", "best_val_loss", "losses", "log")


def load_checkpoint(path, device="cpu"):
    """A checkpoint, a dict with the keys above, and its model on the device. Raises UserError where the file is not one."""
    try:
        with zipfile.ZipFile(path) as archive:                                       # torch's format, with checksums that torch
            if damaged := archive.testzip():                                         # itself does not look at
                raise ValueError(f"checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        for key in CHECKPOINT:
            checkpoint[key]                                                          # a KeyError, if it has none
        model = GPT(GPTConfig(**checkpoint["model_config"]))
        model.load_state_dict(checkpoint["model"])
    except (FileNotFoundError, NotADirectoryError):
        runs = sorted(path.parent.rglob("last.pt"))
        raise UserError(f"there is no checkpoint {path}; --out takes the folder of a run that train.py has made"
                        + (f", for example {runs[0].parent}" if runs else "")) from None
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, zipfile.BadZipFile,
            pickle.UnpicklingError) as error:
        raise UserError(f"{path} is damaged, or its model is not one of this model.py ({type(error).__name__}: {reason(error)}); copy the "
                        "other of last.pt and best.pt over it, or train again") from None
    return checkpoint, model.to(device)


def best_checkpoint(out):
    """A run's best.pt; its last.pt where it was stopped before it was ever validated."""
    return out / ("best.pt" if (out / "best.pt").exists() else "last.pt")


def count_parameters(model, part=""):
    """Numbers that training learns, in all or in the modules of that name."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if part in name)


@torch.no_grad()
def cache_bytes(model):
    """Bytes that the KV cache's buffers take for a whole context, and for one token of it; measured, under autocast if need be."""
    cache = model.new_cache()
    model(torch.zeros(1, 1, dtype=torch.int64, device=model.wte.weight.device), cache=cache)
    return cache.nbytes, cache.nbytes // cache.block_size


def check_same_data(checkpoint, meta, out):
    if (checkpoint["tokenizer"], checkpoint["data_sha256"]) != (meta["tokenizer"], meta["sha256"]):
        raise UserError(f"data set {checkpoint['train_config']['dataset']!r} is not the one that {out} was trained on (its text or its "
                        f"tokenizer, which was {checkpoint['tokenizer']['kind']}, differs); prepare that one again")


def read_json(path, default):
    """What a JSON file holds, or the default where there is none."""
    try:
        value = json.loads(path.read_text()) if path.exists() else default
        if type(value) is not type(default):
            raise ValueError(f"a {type(value).__name__}, not a {type(default).__name__}")
        return value
    except ValueError as error:
        raise UserError(f"{path} is damaged ({reason(error)}); remove it, and it will be made anew") from None


def pyplot():
    """matplotlib, drawing to files; imported when there is something to draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def plot(losses, log, path):
    """Draws a run: the training loss, a hundred means over all its steps, and the validation loss wherever it was measured."""
    plt = pyplot()
    width = -(-len(losses) // 100)
    bins = [losses[i : i + width] for i in range(0, len(losses), width)]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot([width * (i + 0.5) for i in range(len(bins))], [sum(bin) / len(bin) for bin in bins], label="training")
    axes.plot([entry["step"] for entry in log], [entry["val_loss"] for entry in log], "o--", label="validation")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=path.parent.name)
    axes.grid(alpha=0.3)
    axes.legend()
    write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def learning_rate(step, train):
    """Linear warm-up, then half a cosine down to a tenth at max_steps."""
    warmup = min(1.0, (step + 1) / (train.warmup_steps + 1))
    return train.learning_rate * warmup * (0.55 + 0.45 * math.cos(math.pi * min(1.0, step / train.max_steps)))


def make_optimizer(model, train, device):
    """AdamW; weight decay pulls on matrices, not on gains and exponents."""
    decayed = {True: [], False: []}
    for parameter in model.parameters():
        decayed[parameter.dim() > 1].append(parameter)
    groups = [dict(params=decayed[True], weight_decay=train.weight_decay), dict(params=decayed[False], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, train.beta2), fused=device.type in ("cuda", "cpu"))


def train_step(model, optimizer, train, x, y, context):
    """One optimizer step on this process's sequences x, y (n, block_size), a micro-batch at a time; returns the mean loss
    as a tensor, so that nobody waits for the device. DistributedDataParallel averages the gradients in the last backward."""
    micro = train.micro_batch_size or len(x)
    parts, loss_sum = len(x) // micro, 0.0
    for part, (x_part, y_part) in enumerate(zip(x.split(micro), y.split(micro))):
        more = part < parts - 1 and isinstance(model, DistributedDataParallel)
        with model.no_sync() if more else contextlib.nullcontext():
            with context:
                _, loss = model(x_part, y_part)
            (loss / parts).backward()
        loss_sum += loss.detach()
    if train.grad_clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss_sum / parts


class Interrupt:
    """Ctrl-C, a scheduler's SIGTERM, or the end of the terminal (but for nohup), asks training to stop after the step in
    hand; a second one stops at once."""

    def __init__(self):
        self.asked = False
        self.handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            self.handlers[signal.SIGHUP] = signal.SIG_DFL
        for number in self.handlers:
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        self.asked = True
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def accelerate(model, train, processes):
    """The model as training calls it: compiled where asked for, and one of several where there are several."""
    compile, cuda = train.compile, processes.device.type == "cuda"
    if compile is None:
        compile = cuda and find_spec("triton") is not None
        if cuda and not compile:
            processes.print("triton is not installed here, so the model is not compiled: slower, and otherwise the same")
    if compile and not cuda and not (which("c++") or which("clang++") or which("cl")):
        raise UserError("--compile on this device needs a C++ compiler, and none was found; install one or leave --compile out")
    if compile:
        model = torch.compile(model)
    return DistributedDataParallel(model) if processes.world > 1 else model


# The flags that a resumed run may be given anew. With none of them, it goes on exactly.
MAY_CHANGE = {"out", "resume", "device", "dtype", "kernel", "compile", "micro_batch_size", "max_steps", "learning_rate", "warmup_steps",
              "weight_decay", "grad_clip", "eval_interval"}


@naming_flags()
def configure(given):
    """The configurations and folder of a run, and, if it is to be resumed, its (checkpoint, model): (train, config, out,
    resumed). Of a new run, what depends on the data set is still to come, and resumed is None."""
    if not given.get("resume"):
        train, config = resolve(given)
        return train, config, train.out and Path(train.out), None
    out = Path(given["out"]) if "out" in given else newest_run()
    checkpoint, model = load_checkpoint(out / "last.pt")
    stored = {**checkpoint["train_config"], **checkpoint["model_config"]}
    for name in given.keys() - MAY_CHANGE:
        if given[name] != stored[name]:
            raise UserError(f"--{name}={given[name]} cannot change a run in the middle: {out} has {name}={stored[name]}; leave "
                            "the flag out, or start a new run")
    values = {**stored, **given}
    return TrainConfig(**{f.name: values[f.name] for f in fields(TrainConfig) if f.name in values}), model.config, out, (checkpoint, model)


class Run:
    """A run in progress: its configurations, data, model and optimizer, and what has happened so far."""

    def __init__(self, given):
        self.train, config, self.out, resumed = configure(given)
        self.processes = Processes(self.train.device)
        self.device = self.processes.device
        with self.processes.first():
            dataset, meta, self.splits = find_data(self.train.dataset, self.processes.print)
        self.train = replace(self.train, dataset=dataset)
        self.check_fit(config)
        model = self.begin(config, meta) if resumed is None else self.go_on(*resumed, meta)
        self.model = model.to(self.device)
        self.config = self.model.config
        self.dtype = choose_dtype(self.train.dtype, self.device)
        self.kernel = choose_kernel(self.train.kernel, self.model, autocast(self.device, self.dtype))
        self.optimizer = make_optimizer(self.model, self.train, self.device)
        if resumed is not None:
            state = resumed[0]["optimizer"]["state"]                                 # but flags may be new, such as --weight_decay
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.parallel = accelerate(self.model, self.train, self.processes)
        self.averaged = len(self.losses)
        if resumed is None:
            self.claim_folder()
        self.write_log()                                                             # fail now, if writing fails, not in an hour
        self.lap = self.step, time.perf_counter()

    def begin(self, config, meta):
        """A new model, and nothing that has happened."""
        self.tokenizer, self.data_sha256 = meta["tokenizer"], meta["sha256"]
        self.step, self.seconds, self.best_val_loss, self.losses, self.log = 0, 0.0, math.inf, [], []
        vocab_size = prepare.tokenizer_size(self.tokenizer)
        if vocab_size > 1000:
            vocab_size = -(-vocab_size // 64) * 64                                   # GPUs multiply round numbers faster
        torch.manual_seed(self.train.seed)
        return GPT(replace(config, vocab_size=vocab_size))

    def claim_folder(self):
        """The folder of a new run: one of its own."""
        if self.out is None:
            name = f"{self.train.dataset}-{self.config.attention}-{self.config.pos}"
            self.out = new_folder(name) if self.processes.rank == 0 else OUT / name
        elif any(self.out.glob("*.pt")):
            raise UserError(f"{self.out} holds a run already; go on with it by --resume, or choose another --out")

    def write_log(self):
        if self.processes.rank == 0:
            lines = "".join(json.dumps(entry) + "\n" for entry in self.log)
            write(self.out / "log.jsonl", lambda temporary: temporary.write_text(lines))

    def go_on(self, checkpoint, model, meta):
        """The checkpoint's model, and all that had happened when it was written."""
        for name in "tokenizer", "data_sha256", "step", "seconds", "best_val_loss", "losses", "log":
            setattr(self, name, checkpoint[name])
        check_same_data(checkpoint, meta, self.out)
        if self.step >= self.train.max_steps:
            self.write_log()                                                         # in case it was stopped just before
            raise UserError(f"{self.out} is at step {self.step} already; to train on, raise --max_steps={self.train.max_steps}")
        return model

    def check_fit(self, config):
        """Raises UserError where batch, processes and data do not go together."""
        train, world = self.train, self.processes.world
        share, rest = divmod(train.batch_size, world)
        if rest or share % (train.micro_batch_size or share):
            micro = train.micro_batch_size or 1
            rule = f"--batch_size={train.batch_size} must be a multiple of --micro_batch_size={micro} times the number of processes, {world}"
            if not rest and micro > share:
                raise UserError(f"{rule}; lower --micro_batch_size, to {share} at most")
            raise UserError(f"{rule}; take for example --batch_size={-(-train.batch_size // (micro * world)) * micro * world}")
        if len(self.splits["train"]) <= config.block_size:
            raise UserError(f"--block_size={config.block_size} needs more than its {len(self.splits['train'])} training tokens; "
                            "take a smaller one, or more text")
        if len(self.splits["val"]) < 2:
            raise UserError(f"the validation split has {len(self.splits['val'])} tokens and needs 2; prepare more text")

    def describe(self):
        """Says in a few lines what is about to be trained, on what, and how."""
        train, config, splits = self.train, self.config, self.splits
        self.processes.print(
            f"model: {config.attention} attention, {config.pos} positions, {config.n_layer} layers, {config.n_head} heads, "
            f"{config.n_embd} wide: {count_parameters(self.model):,} parameters, {count_parameters(self.model, 'attention'):,} of them in attention\n"
            f"data:  {train.dataset}, {len(splits['train']):,} training and {len(splits['val']):,} validation tokens\n"
            f"plan:  {train.max_steps:,} steps of {train.batch_size} x {config.block_size} = {self.tokens(1):,} tokens, "
            f"{self.tokens(train.max_steps) / len(splits['train']):.2g} times the data, on {self.processes.world} x {self.device} in "
            f"{str(self.dtype).removeprefix('torch.')}, attention by {self.kernel}")

    def tokens(self, steps):
        return steps * self.train.batch_size * self.config.block_size

    def advance(self):
        """One step: a function of the weights, the seed and the step's number alone."""
        torch.manual_seed(int(np.random.SeedSequence((self.train.seed, self.step, self.processes.rank)).generate_state(1)[0]))
        x, y = batch(self.splits["train"], self.train, self.config.block_size, self.step, self.processes)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.train)
        self.losses.append(train_step(self.parallel, self.optimizer, self.train, x, y, autocast(self.device, self.dtype)))
        self.step += 1

    def average_losses(self):
        """Makes the losses since the last time numbers, and each the mean over all processes."""
        new = self.processes.sum(*map(float, self.losses[self.averaged :]))
        self.losses[self.averaged :] = [loss / self.processes.world for loss in new]
        self.averaged = len(self.losses)

    def validate(self):
        """Measures the validation loss, logs it and saves the run."""
        since = self.log[-1]["step"] if self.log else 0
        self.average_losses()
        train_loss = sum(self.losses[since:]) / (self.step - since)
        speed = self.tokens(self.step - self.lap[0]) / (time.perf_counter() - self.lap[1])   # of training: the losses are here
        val_loss = evaluate(self.model, self.splits["val"], self.config.block_size, self.train.eval_tokens, self.processes,
                            autocast(self.device, self.dtype))
        self.check_finite(train_loss, val_loss)
        best, self.best_val_loss = val_loss < self.best_val_loss, min(val_loss, self.best_val_loss)
        self.log.append(dict(step=self.step, train_loss=train_loss, val_loss=val_loss, tokens=self.tokens(self.step),
                             seconds=round(self.seconds, 1), tokens_per_second=round(speed)))
        if best:                                                                     # first: what last.pt knows of is there
            self.save("best.pt")
            if self.processes.rank == 0:
                (self.out / "eval.json").unlink(missing_ok=True)                         # was of an older one
        self.save("last.pt")
        self.write_log()
        self.processes.print(f"step {self.step:,}: training loss {train_loss:.4f}, validation loss {val_loss:.4f}"
                             f"{' (the best so far)' if best else ''}, {clock(self.seconds)}")
        self.lap = self.step, time.perf_counter()

    def check_finite(self, *losses):
        if not all(map(math.isfinite, losses)):
            good = (self.out / "last.pt").exists()
            raise UserError(f"the loss is {float(sum(losses))} at step {self.step:,}: training has diverged; "
                            + (f"go on from the last checkpoint, which is intact, with a smaller rate: --resume --out={self.out} "
                               if good else "begin again with a smaller rate: ") + f"--learning_rate={self.train.learning_rate / 3:.1g}")

    def save(self, name):
        """Writes a checkpoint, unless the weights are no numbers any more."""
        self.check_finite(*(parameter.detach().sum() for parameter in self.model.parameters()))
        self.average_losses()
        checkpoint = {**{name: getattr(self, name, None) for name in CHECKPOINT}, "model": self.model.state_dict(),
                      "optimizer": self.optimizer.state_dict(), "model_config": asdict(self.config), "train_config": asdict(self.train)}
        if self.processes.rank == 0:
            write(self.out / name, lambda temporary: torch.save(checkpoint, temporary))

    def finish(self):
        """The picture, and what to do next."""
        if self.processes.rank == 0:
            plot(self.losses, self.log, self.out / "loss.png")
        best, eval_tokens = min(self.log, key=lambda entry: entry["val_loss"]), self.train.eval_tokens
        peak = peak_memory(self.device)
        self.processes.print(
            f"validation loss: {self.log[-1]['val_loss']:.4f} at the end, {best['val_loss']:.4f} at best (step {best['step']:,}), over "
            f"{f'the first {eval_tokens:,} tokens' if eval_tokens and eval_tokens < len(self.splits['val']) else 'the whole split'}\n"
            + (f"memory: {peak / 1e9:.1f} GB at the peak\n" if peak else "") +
            f"checkpoints: {self.out / 'last.pt'} and {self.out / 'best.pt'}; curves: {self.out / 'loss.png'}\n"
            f"to sample from it: python sample.py --out={shlex.quote(str(self.out))}")


def train_one(given):
    """Trains one run, from its flags."""
    torch.set_float32_matmul_precision("high")                                       # TF32, where a GPU has it
    run, interrupt = Run(given), Interrupt()
    run.describe()
    train, alone = run.train, run.processes.world == 1
    patience = 10 if run.tokens(1) < 100_000 else 1                                  # steps; torchrun itself waits for half a minute
    progress, started = Progress(train.max_steps, run.step), time.time() - run.seconds
    while run.step < train.max_steps:
        run.advance()
        run.seconds = time.time() - started
        if run.step < 10 or run.step % 10 == 0:                                      # seldom: looking at a loss waits for the GPU
            run.check_finite(run.losses[-1])
            if run.processes.rank == 0:
                progress(run.step, f"step {run.step:,} of {train.max_steps:,}: loss {run.losses[-1]:.3f}, "
                                   f"{run.tokens(1) * progress.rate(run.step):,.0f} tokens/s")
        if run.step % train.eval_interval == 0 or run.step == train.max_steps:
            progress.clear()
            run.validate()
        if run.step == train.max_steps:
            break
        if interrupt.asked if alone else run.step % patience == 0 and run.processes.sum(interrupt.asked)[0]:
            progress.clear()
            run.save("last.pt")
            words = f"stopped after step {run.step:,}, which is saved; to go on: python train.py --resume --out={run.out}"
            sys.exit(words if run.processes.rank == 0 else 1)
    run.finish()
    if not alone:
        dist.barrier()                                                               # nobody leaves while another still works
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Many runs


def spread(given, seeds):
    """The flags of every run that lists of attentions and positions, and a number of seeds, ask for, each without the
    flags that do not count in it. What is compared comes one after the other, so that it runs side by side."""
    first = given.get("seed", TrainConfig.seed)
    runs = [{**given, "attention": attention, "pos": pos, "seed": seed} for seed in range(first, first + (seeds or 1))
            for pos in listed(given, "pos") for attention in listed(given, "attention")]
    counts = lambda run, name: all(run[other] in values for other, values in ONLY.get(name, {}).items())
    return [{name: x for name, x in run.items() if counts(run, name)} for run in runs]


# What does not change what is learned, or has its own place in a run's name.
UNNAMED = {"preset", "dataset", "attention", "pos", "seed", "out", "resume", "device", "kernel", "compile", "micro_batch_size"}


@naming_flags()
def folder_of(given, out):
    """The folder of a sweep's run. Its name is what the run was asked to be."""
    train, config = resolve(given)
    rest = (f"{name}={given[name]}" for name in sorted(given.keys() - UNNAMED))
    return out / "-".join([train.preset, train.dataset, config.attention, config.pos, *rest, f"seed={train.seed}"])


def logged(folder):
    """A run's log: a dict for each evaluation."""
    path = folder / "log.jsonl"
    try:
        return [entry for line in path.read_text().splitlines() if (entry := json.loads(line))["step"]] if path.exists() else []
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({reason(error)}); remove it, and it is made anew from the checkpoint beside it") from None


def steps_done(folder):
    log = logged(folder)
    return log[-1]["step"] if log else 0


def train_apart(given, folder, threads, interrupt):
    """Trains a run, or goes on with it, in a process of its own, by the command that a user would give; returns its exit
    status, or None where it was asked to stop. What it prints goes to output.txt."""
    if interrupt.asked:
        return None
    flags = [f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}" for name, value in given.items()]
    if (folder / "last.pt").exists():
        flags.append("--resume")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "ab") as output:
        process = subprocess.Popen([sys.executable, __file__, *flags, f"--out={folder}"], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                   env={"OMP_NUM_THREADS": str(threads), **os.environ}, start_new_session=True)
    while process.poll() is None:
        time.sleep(0.2)
        if interrupt.asked:
            process.terminate()                                                      # it saves before it leaves
            process.wait()
            return None
    return process.returncode


def sweep(runs, workers):
    """Trains all runs, {folder: flags}, that are not finished, some at a time. One that fails does not stop the others; Ctrl-C
    stops, and saves, them all. Started again, the sweep goes on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    steps = {folder: resolve(given)[0].max_steps for folder, given in runs.items()}
    waiting = [folder for folder in runs if steps_done(folder) < steps[folder]]
    on_gpu = torch.cuda.is_available() and not any(given.get("device") == "cpu" for given in runs.values())
    workers = workers or (4 if on_gpu else cores)
    print(f"runs: {len(runs)}, of them finished: {len(runs) - len(waiting)}, at a time: {workers}", flush=True)
    interrupt, progress = Interrupt(), Progress(sum(steps.values()), sum(map(steps_done, runs)))
    with ThreadPoolExecutor(workers) as pool:
        jobs = {pool.submit(train_apart, runs[folder], folder, max(1, cores // workers), interrupt): folder for folder in waiting}
        pending, failed = set(jobs), []
        while pending:
            ended, pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
            for job in ended:
                folder, status = jobs[job], job.result()
                progress.clear()
                if steps_done(folder) >= steps[folder]:
                    print(f"{folder.name}: validation loss {logged(folder)[-1]['val_loss']:.4f}", flush=True)
                elif status is not None:
                    failed.append(folder)
                    words = (folder / "output.txt").read_text(errors="replace").strip().splitlines()
                    print(f"{folder.name} failed: {words[-1] if words else f'exit status {status}'}", flush=True)
            if (done := sum(map(steps_done, runs))) > progress.first:
                progress(done, f"{sum(steps_done(folder) == steps[folder] for folder in runs)} of {len(runs)} runs finished")
    left = sum(steps_done(folder) < steps[folder] for folder in runs)
    if interrupt.asked:
        sys.exit(f"stopped; {left} of {len(runs)} runs are to be finished: start the same command again")
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed; read {failed[0] / 'output.txt'}, mend it, and start the same command again")
    seconds = sum(logged(folder)[-1]["seconds"] for folder in runs)
    print(f"all are finished, after {clock(seconds)} of training, all together; what they say: python train.py --report --out={next(iter(runs)).parent}")


@torch.no_grad()
def eval_only(folder, device, block_size):
    """Validates a run's best.pt in windows of block_size tokens, otherwise as in its training; prints the loss and adds it to
    the run's eval.json, {block_size: loss}. Raises UserError where the positions, or the data, end before block_size."""
    checkpoint, model = load_checkpoint(best_checkpoint(folder))
    config, stored = model.config, TrainConfig(**checkpoint["train_config"])
    block_size = block_size or config.block_size
    if block_size > config.block_size:
        if config.pos == "learned":
            raise UserError(f"--eval_block_size={block_size} is more than the {config.block_size} positions that {folder} has learned; take no "
                            "more, or a model with rope or agf")
        longer = GPT(replace(config, block_size=block_size))
        longer.load_state_dict(model.state_dict())
        model = longer
    processes = Processes(device)
    _, meta, splits = find_data(stored.dataset, processes.print)
    check_same_data(checkpoint, meta, folder)
    predicted = min(stored.eval_tokens or math.inf, len(splits["val"]) - 1)
    if block_size > predicted:
        raise UserError(f"--eval_block_size={block_size} is more than the {predicted} tokens to predict; take a smaller one")
    context = autocast(processes.device, choose_dtype(stored.dtype, processes.device))
    loss = evaluate(model.to(processes.device), splits["val"], block_size, stored.eval_tokens, processes, context)
    path = folder / "eval.json"
    losses = {**read_json(path, {}), str(block_size): loss}
    write(path, lambda temporary: temporary.write_text(json.dumps(losses)))
    print(f"{folder}: validation loss {loss:.4f} in windows of {block_size} tokens (trained on {config.block_size})", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# What the runs say. Runs of one seed saw the same batches, so they are compared seed by seed: the difference of two
# attentions varies less than either. Losses are mean ± standard deviation over seeds, differences mean ± standard error.

ASSETS = Path("assets")
STYLES = {"qkv": ("k", "o", "-"), "gqa": ("#E69F00", "s", ":"), "mla": ("#009E73", "^", "-."), "qv": ("#D55E00", "v", "--"),
          "qv_ka": ("#0072B2", "D", "-")}                                            # Okabe and Ito's colours, for all eyes
OTHER = ("0.4", "x", "-")                                                            # an attention of your own
NANOGPT = {"gpu": 1.4697}                                                            # its best validation loss with that preset
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31}  # two-sided 95 % quantiles by number of seeds
OF_ATTENTION = {"n_kv_head", "d_latent", "d_rope", "d_ctx", "shared_wk", "n_inner"}  # flags that QKV need not share to be compared


def record(folder):
    """What the report needs of a run: a dict of plain values; None where it is not finished."""
    checkpoint, model = load_checkpoint(folder / "last.pt")
    flags, log, losses = {**checkpoint["train_config"], **checkpoint["model_config"]}, checkpoint["log"], checkpoint["losses"]
    if len(losses) < flags["max_steps"]:
        return None
    same = {name: flags[name] for name in ("preset", "dataset", "attention", "pos")}
    (train, config), (_, wide) = resolve(same), resolve({**same, "n_head": flags["n_head"], "n_embd": flags["n_embd"]})
    preset = {**asdict(train), **asdict(config), **{name: getattr(wide, name) for name in OF_ATTENTION}}    # some follow from others
    changed = [f"{name}={flags[name]}" for name in sorted(flags.keys() - UNNAMED - {"vocab_size"}) if flags[name] != preset[name]]
    best, fifth = min(log, key=lambda entry: entry["val_loss"]), losses[: -(-len(losses) // 5)]
    return dict(
        **same, flags=changed, seed=flags["seed"],
        best_val_loss=best["val_loss"], best_step=best["step"], final_val_loss=log[-1]["val_loss"],
        val_loss_by_length=read_json(folder / "eval.json", {}),
        early_steps=len(fifth), early_loss=float(np.mean(fifth)),
        early_curve=[round(float(part.mean()), 4) for part in np.array_split(fifth, min(25, len(fifth)))],
        attention_parameters=count_parameters(model, "attention"), parameters=count_parameters(model),
        cache_bytes_per_token=cache_bytes(model.eval())[1],
        tokens_per_second=max(entry["tokens_per_second"] for entry in log),
        log=[(entry["step"], round(entry["val_loss"], 4), entry["seconds"]) for entry in log])


def minus(ours, theirs, share=1.0):
    """ours - share * theirs, for the seeds that both have; both {seed: number or array}."""
    return {seed: ours[seed] - share * theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}


def mean_and_error(by_seed):
    """The mean over seeds, and its standard error (0 for a single seed)."""
    x = np.array(list(by_seed.values()))
    return x.mean(0), x.std(0, ddof=1) / math.sqrt(len(x)) if len(x) > 1 else 0 * x[0]


def standard_deviation(by_seed, form):
    """mean ± standard deviation, as text; nothing where there are no seeds."""
    return plus_minus(by_seed, form, math.sqrt(len(by_seed)))


def plus_minus(by_seed, form, times=1.0):
    """mean ± `times` its standard error, as text."""
    if not by_seed:
        return ""
    mean, error = mean_and_error(by_seed)
    return f"{mean:{form}}" + (f" ± {error * times:{form.replace('+', '')}}" if len(by_seed) > 1 else "")


def difference(by_seed):
    """A difference's mean ± standard error, as text; bold where chance alone would seldom be so far from zero (Student's t, 95 %)."""
    text = plus_minus(by_seed, "+.4f")
    if len(by_seed) < 2:
        return text
    mean, error = mean_and_error(by_seed)
    return f"**{text}**" if abs(mean) > STUDENT.get(len(by_seed), 2.26) * error else text


def table(head, rows):
    """A Markdown table."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


class Sweep:
    """The finished runs of one preset on one data set, as groups[pos, label] = {seed: run}. A label is the attention, and those
    flags beyond the preset that are not common to all the runs."""

    def __init__(self, title, runs):
        self.targets = [NANOGPT[runs[0]["preset"]]] if runs[0]["preset"] in NANOGPT else []
        common = set.intersection(*(set(run["flags"]) for run in runs))
        self.title = ", ".join([*title, *sorted(common)])
        place, self.groups = {name: i for i, name in enumerate([*POSITIONS, *ATTENTIONS])}, {}
        for run in sorted(runs, key=lambda run: (place[run["pos"]], place.get(run["attention"], 99), run["flags"], run["seed"])):
            label = " ".join([run["attention"], *(flag for flag in run["flags"] if flag not in common)])
            self.groups.setdefault((run["pos"], label), {})[run["seed"]] = run
        self.positions, self.labels = (list(dict.fromkeys(names)) for names in zip(*self.groups))
        self.compared = [group for group in self.groups if group[1].split()[0] != "qkv" and self.gap(*group)]
        self.lengths = sorted({int(length) for run in runs for length in run["val_loss_by_length"]})
        self.lengthened = [group for group in self.groups if any(self.at_length(*group, length) for length in self.lengths)]

    def of(self, pos, label, name):
        """One thing of a group's runs, {seed: number or array}."""
        return {seed: np.array(run[name]) for seed, run in self.groups.get((pos, label), {}).items()}

    def at_length(self, pos, label, length):
        """A group's validation losses in windows of so many tokens, {seed: number}, where they were measured."""
        group = {seed: run["val_loss_by_length"] for seed, run in self.groups[pos, label].items()}
        return {seed: by_length[str(length)] for seed, by_length in group.items() if str(length) in by_length}

    def time_to(self, pos, label, target):
        """Seconds from the start until a group's validation loss was first at the target, {seed: number}, where it ever was."""
        times = {seed: [time for _, loss, time in run["log"] if loss <= target] for seed, run in self.groups[pos, label].items()}
        return {seed: reached[0] for seed, reached in times.items() if reached}

    def gap(self, pos, label, name="best_val_loss"):
        """The differences to QKV, {seed: number or array}; QKV with the same flags or, if there is none, without those of the
        attention."""
        flags = label.split()[1:]
        rival = " ".join(["qkv", *flags])
        if (pos, rival) not in self.groups:
            rival = " ".join(["qkv", *(flag for flag in flags if flag.split("=")[0] not in OF_ATTENTION)])
        return minus(self.of(pos, label, name), self.of(pos, rival, name))

    def markdown(self):
        """The claims C1 to C4 and what they leave out, every group, and the losses at other lengths of context, as tables."""
        claims = {
            "C1: qv - qkv": lambda pos: self.gap(pos, "qv"),
            "C2: (qv - qkv) - half of the same under learned":
                lambda pos: minus(self.gap(pos, "qv"), self.gap("learned", "qv"), 0.5) if pos != "learned" else {},
            "C3: qv_ka - qkv": lambda pos: self.gap(pos, "qv_ka"),
            "C3: qv_ka - qv": lambda pos: minus(self.gap(pos, "qv_ka"), self.gap(pos, "qv")),
            "C3: (qv_ka - qkv) - half of (qv - qkv)": lambda pos: minus(self.gap(pos, "qv_ka"), self.gap(pos, "qv"), 0.5),
            "C4: qv_ka - qkv, training loss over the first fifth": lambda pos: self.gap(pos, "qv_ka", "early_loss"),
            "qv - gqa, which remembers as little": lambda pos: minus(self.gap(pos, "qv"), self.gap(pos, "gqa")),
            "qkv - qkv under rope":
                lambda pos: minus(*(self.of(p, "qkv", "best_val_loss") for p in (pos, "rope"))) if pos != "rope" else {},
        }
        tables = [table(["claim, nats", *self.positions],
                        [[name, *(difference(claim(pos)) for pos in self.positions)] for name, claim in claims.items()])]
        rows = []
        for (pos, label), group in self.groups.items():
            loss, final = (standard_deviation(self.of(pos, label, name), ".4f") for name in ("best_val_loss", "final_val_loss"))
            step, *sizes = (f"{np.median([run[name] for run in group.values()]):,.0f}" for name in (
                "best_step", "attention_parameters", "parameters", "cache_bytes_per_token"))
            speed = max(run["tokens_per_second"] for run in group.values())          # least disturbed by others on the machine
            rows.append([pos, label, len(group), loss, step, final, difference(self.gap(pos, label)), *sizes, f"{speed:,}",
                         *(standard_deviation(self.time_to(pos, label, target), ",.0f") for target in self.targets)])
        tables.append(table(["positions", "attention", "seeds", "best validation loss", "at step", "at the end", "gap to qkv", "parameters in attention",
                             "in all", "cache, bytes/token", "training tokens/s", *(f"seconds to {target}" for target in self.targets)], rows))
        if self.lengthened:
            tables.append(table(["positions", "attention", *(f"{length} tokens" for length in self.lengths)],
                                [[pos, label, *(standard_deviation(self.at_length(pos, label, length), ".4f") for length in self.lengths)]
                                 for pos, label in self.lengthened]))
        return f"**{self.title}**\n\n" + "\n\n".join(tables) + "\n"

    def draw(self, figure):
        """Above, the paired gaps to QKV; below, how they develop in the first fifth of training. A column for each kind of
        positions; bars and bands are standard errors, faint dots the seeds."""
        labels = list(dict.fromkeys(label for _, label in self.compared))
        axes = figure.subplots(2, len(self.positions), sharex="row", sharey="row", squeeze=False, height_ratios=(len(labels) / 8 + 0.5, 1))
        for pos, above, below in zip(self.positions, *axes):
            for row, label in enumerate(labels):
                gap, plain = self.gap(pos, label), " " not in label
                colour, marker, line = STYLES.get(label.split()[0], OTHER)
                if gap:
                    mean, error = mean_and_error(gap)
                    above.plot(list(gap.values()), [row] * len(gap), ".", color=colour, alpha=0.35)
                    above.errorbar(mean, row, xerr=error, fmt=marker, color=colour, mfc=colour if plain else "white", capsize=3)
                if gap and plain:
                    mean, error = mean_and_error(self.gap(pos, label, "early_curve"))
                    steps = (np.arange(len(mean)) + 0.5) / len(mean) * max(self.of(pos, label, "early_steps").values())
                    below.plot(steps, mean, line, color=colour, label=label)
                    below.fill_between(steps, mean - error, mean + error, color=colour, alpha=0.15, lw=0)
            above.axvline(0, color="k", lw=1)
            above.set(title=f"{pos} positions", xlabel="best validation loss minus QKV's", yticks=range(len(labels)), yticklabels=labels)
            above.grid(alpha=0.3)
            below.axhline(0, color="k", lw=1)
            below.set(xlabel="step")
            below.grid(alpha=0.3)
        axes[0, 0].invert_yaxis()
        axes[1, 0].set(ylabel="training loss minus QKV's")
        lines = {line.get_label(): line for axis in axes[1] for line in axis.get_legend_handles_labels()[0]}
        if lines:
            axes[1, -1].legend(lines.values(), lines.keys(), fontsize="small", ncols=2)

    def draw_lengths(self, figure):
        """Validation loss in longer windows than the models were trained on; bars are standard deviations."""
        positions = list(dict.fromkeys(pos for pos, _ in self.lengthened))
        axes = dict(zip(positions, figure.subplots(1, len(positions), squeeze=False)[0]))
        for pos, label in self.lengthened:
            by_length = {length: losses for length in self.lengths if (losses := self.at_length(pos, label, length))}
            means, errors = zip(*map(mean_and_error, by_length.values()))
            deviations = [error * math.sqrt(len(losses)) for error, losses in zip(errors, by_length.values())]
            colour, marker, line = STYLES.get(label, OTHER)
            axes[pos].errorbar(by_length.keys(), means, deviations, fmt=marker + line, color=colour, label=label, capsize=3)
        for pos, axis in axes.items():
            axis.set_xscale("log", base=2)
            axis.set(title=f"{pos} positions", xlabel="tokens in a window", xticks=self.lengths, xticklabels=self.lengths, ylabel="validation loss")
            axis.grid(alpha=0.3)
        axes[positions[0]].legend(fontsize="small")


def report(out, needed=False):
    """Gathers the finished runs in `out` into results.json, beside those that it has already, from wherever they came (a run
    replaces its like); the tables and pictures are made from it alone. Raises UserError where there is none, `needed` even if
    results.json has some."""
    folders, path = sorted(path.parent for path in out.glob("*/last.pt")), ASSETS / "results.json"

    def identity(run):
        return run["preset"], run["dataset"], run["pos"], run["attention"], *run["flags"], run["seed"]

    runs = {identity(run): run for run in read_json(path, [])}
    stored, progress, found = len(runs), Progress(len(folders)), 0
    for done, folder in enumerate(folders, 1):
        try:
            if run := record(folder):
                runs[identity(run)], found = run, found + 1
        except UserError as error:
            print(f"left out: {error}")
        progress(done, f"read {done} of {len(folders)} runs")
    progress.clear()
    if not runs or needed and not found:
        raise UserError(f"there is no folder of a finished run in {out}/; train some first: python train.py --attention=all --pos=all --seeds=5")
    print(f"runs: {len(runs)}; finished ones in {out}/: {found}; others, of the {stored} that {path} had: {len(runs) - found}")

    def kind(run):
        return run["preset"], run["dataset"]

    runs = sorted(runs.values(), key=kind)
    sweeps = [Sweep([f"{preset} preset", dataset], list(group)) for (preset, dataset), group in itertools.groupby(runs, kind)]
    text = "\n".join(sweep.markdown() for sweep in sweeps)
    lines = ",\n".join(json.dumps(run) for sweep in sweeps for group in sweep.groups.values() for run in group.values())
    write(path, lambda temporary: temporary.write_text(f"[\n{lines}\n]\n"))
    write(ASSETS / "results.md", lambda temporary: temporary.write_text(text))
    draw(ASSETS / "results.png", [sweep for sweep in sweeps if sweep.compared], Sweep.draw, 6.5)
    draw(ASSETS / "lengths.png", [sweep for sweep in sweeps if sweep.lengthened], Sweep.draw_lengths, 3.5)
    print(f"\n{text}\nwritten: {', '.join(path.name for path in sorted(ASSETS.glob('results.*')) + sorted(ASSETS.glob('lengths.png')))} in {ASSETS}/")


def draw(path, sweeps, method, height):
    """Draws sweeps one below the other; where there is none, an older picture goes."""
    if not sweeps:
        return path.unlink(missing_ok=True)
    plt = pyplot()
    figure = plt.figure(figsize=(10, height * len(sweeps)), layout="constrained")
    for sweep, part in zip(sweeps, np.atleast_1d(figure.subfigures(len(sweeps)))):
        part.suptitle(sweep.title)
        method(sweep, part)
    write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# The program


@contextlib.contextmanager
def explaining_memory():
    """Says what to lower where the memory of the device or the machine does not suffice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:                                     # the CPU's allocator raises the latter
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
            raise UserError("memory ran out; lower --micro_batch_size (it changes nothing that is learned), or --n_embd, --n_layer "
                            "or --block_size; in validation, --eval_block_size") from None
        raise


@explaining_memory()
def main(argv=None):
    given = parse(argv)
    with naming_flags():
        task = Task(**{field.name: given.pop(field.name) for field in fields(Task) if field.name in given})
    many = task.seeds is not None or any(given.get(name) == "all" or "," in given.get(name, "") for name in LISTS)
    if "WORLD_SIZE" in os.environ and (many or task.report or task.eval_only):
        raise UserError("torchrun is for training one run; start this with python, and a sweep with --workers")
    if task.report:
        if idle := given.keys() - {"out"} | {name for name in ("seeds", "workers") if getattr(task, name)}:
            raise UserError(f"--report takes every finished run of --out, so leave {named(idle)} out")
        return report(Path(given.get("out", SWEEP)), needed="out" in given)
    if not given.get("resume"):                                                      # a run knows its attention
        check_use(given)
    if task.workers and not many:
        raise UserError(f"--workers={task.workers} is for a sweep; give --seeds too, or lists of --attention or --pos")
    if many:
        if given.get("resume"):
            raise UserError("--resume is for one run; a sweep goes on when the same command is started again")
        dataset, out = find_data(given.get("dataset"), print)[0], Path(given.pop("out", SWEEP))
        runs = {folder_of(run, out): run for run in spread({**given, "dataset": dataset, "preset": preset_of(given)}, task.seeds)}
        if task.eval_only and (missing := [folder.name for folder in runs if not folder.exists()]):
            raise UserError(f"{out} has no run {missing[0]}; give all the flags that the sweep was trained with")
    if not task.eval_only:
        return sweep(runs, task.workers) if many else train_one(given)
    if not many:
        if fixed := given.keys() - {"out", "device"}:
            raise UserError(f"--eval_only takes a run as it is, so leave {named(fixed)} out; or name a sweep's runs by all of its flags")
        runs = [Path(given["out"]) if "out" in given else newest_run()]
    progress = Progress(len(runs))
    for done, folder in enumerate(runs, 1):
        eval_only(folder, given.get("device", "auto"), task.eval_block_size)
        progress(done, f"validated {done} of {len(runs)} runs")


if __name__ == "__main__":
    prepare.run(main)

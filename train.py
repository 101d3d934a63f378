"""Trains a GPT with any of the five attentions.

    python train.py                                     tiny Shakespeare: half a minute on two cores
    python train.py --preset=gpu                        nanoGPT's 10.7M baby GPT (default with CUDA)
    torchrun --nproc_per_node=8 train.py --preset=gpt2  GPT-2 124M on OpenWebText
    python train.py --resume                            goes on with the newest run, exactly

A run is a folder: config.json, log.jsonl (a line for each evaluation), loss.png and the checkpoints
last.pt and best.pt. All that is random in step i follows from (seed, i): its batch, however many
processes share it, and in each process its dropout. So a run that was stopped and resumed computes
the same numbers as one that was not. `main`, at the end of this file, is the whole story.
"""

import contextlib
import gc
import hashlib
import json
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from argparse import SUPPRESS, ArgumentTypeError
from collections import defaultdict
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

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
    save_figure,
    write_atomically,
)

try:
    import fcntl
except ImportError:  # on Windows
    import msvcrt

    fcntl = None


# --- Configuration: defaults, under a preset, under flags. The dataclasses are the command line ---

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
        eval_interval=120,
        eval_tokens=4096,
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
    """How to train it. A preset sets many flags, whatever their defaults here say; the flags that
    you give win."""

    preset: str | None = option(
        None,
        "a set of defaults, listed below (default: gpu where there is CUDA, else cpu)",
        PRESETS,
    )
    dataset: str | None = option(
        None, "a folder of data/ (default: tiny Shakespeare, or pydoc if there is no network)"
    )
    out: str | None = option(
        None, "the run's folder (default: a new one in out/, named after the flags that are given)"
    )
    resume: bool = option(
        False, "go on with the run in --out, or else with the newest, from its last.pt"
    )
    restartable: bool = option(
        False,
        "begin the run in --out, or go on with it if it has begun: for queues and for torchrun "
        "--max_restarts, which give the same command again",
    )
    seed: int = option(1337, "the number that weights, batches and dropout follow from")
    device: str = option("auto", "what computes: auto, cpu, cuda, cuda:1, mps ...")
    threads: int | None = option(
        None,
        "threads that a CPU computes with (default: OMP_NUM_THREADS, or one for each core that is "
        "not busy)",
    )
    dtype: str = option(
        "auto",
        "the numbers in matrix products (auto: bfloat16 if CUDA has it, else float32)",
        ("auto", "float32", "bfloat16"),
    )
    kernel: str = option(
        "auto",
        "what computes attention: torch, or triton for kernel.py, on CUDA (auto: torch)",
        ("auto", "torch", "triton"),
    )
    compile: bool | None = option(
        None, "make the model faster by torch.compile (default: on CUDA only)"
    )
    batch_size: int = option(
        64, "sequences in one optimizer step, over all processes and micro-batches together"
    )
    micro_batch_size: int | None = option(
        None,
        "sequences in one forward pass of one process; gradients are accumulated up to batch_size "
        "(default: all at once)",
    )
    max_steps: int = option(5000, "optimizer steps")
    optimizer: str = option(
        "adamw",
        "what moves the matrices in the blocks; AdamW moves all else",
        ("adamw", "muon"),
    )
    learning_rate: float = option(1e-3, "peak learning rate; decays by a cosine to a tenth")
    warmup_steps: int = option(100, "first steps, in which the learning rate grows to its peak")
    weight_decay: float = option(0.1, "decay of matrices; vectors have none")
    beta2: float = option(0.99, "decay of AdamW's second moment; beta1 is 0.9")
    grad_clip: float = option(1.0, "largest norm of the gradient; 0 sets no limit")
    eval_interval: int = option(250, "steps from one evaluation, and checkpoint, to the next")
    eval_tokens: int | None = option(
        None,
        "tokens of the validation split that each evaluation predicts; the last one predicts all "
        "(default: all)",
    )

    def __post_init__(self):
        for name in "batch_size", "micro_batch_size", "max_steps", "eval_interval", "eval_tokens":
            self.check_range(name, least=1)
        self.check_range("threads", least=1)
        for name in "seed", "learning_rate", "warmup_steps", "weight_decay", "beta2", "grad_clip":
            self.check_range(name, least=0)
        if self.beta2 >= 1:
            raise UserError(f"beta2={self.beta2} must be less than 1")
        unit = WORLD * (self.micro_batch_size or 1)
        if self.batch_size % unit:
            raise UserError(
                f"batch_size={self.batch_size} must be a multiple of {unit}, "
                "micro_batch_size x processes"
            )

    def check_range(self, name, least):
        value = getattr(self, name)
        if value is not None and not least <= value < math.inf:
            raise UserError(f"{name}={value} must be a number of at least {least}")

    def rows(self):
        """Sequences in a forward pass."""
        return self.micro_batch_size or self.batch_size // WORLD


# Flags that say how a run is computed, but not what: its folder is not named after them.
HOW = {
    "out",
    "resume",
    "restartable",
    "device",
    "threads",
    "dtype",
    "kernel",
    "compile",
    "micro_batch_size",
}
# Flags that may be others when a run goes on. If none of them is changed, it goes on exactly.
MAY_CHANGE = HOW | {
    "max_steps",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "grad_clip",
    "eval_interval",
}


def parse_bool(text):
    """The bool of a flag such as --compile=False."""
    if text.lower() not in ("true", "false"):
        raise ArgumentTypeError(f"{text} must be True or False")
    return text.lower() == "true"


# How the text of a flag is read, by the flag's type.
PARSERS = {
    int: parse_int,
    int | None: parse_int,
    float: float,
    float | None: float,
    str: str,
    str | None: str,
    bool: parse_bool,
    bool | None: parse_bool,
}


def parse(argv=None):
    """The flags that were given, as a dict."""
    presets = ["presets:"]
    for name, preset in PRESETS.items():
        settings = " ".join(f"{key}={value}" for key, value in preset.items())
        presets.append(f"  {name:5} {settings}")
    parser = new_parser(__doc__, argument_default=SUPPRESS, epilog="\n".join(presets))
    for config in TrainConfig, GPTConfig:
        group = parser.add_argument_group(config.__name__, config.__doc__.split(". ")[0])
        for field in fields(config):
            if field.name == "vocab_size":  # the data set's to say
                continue
            help, choices = field.metadata["help"], field.metadata["choices"]
            if field.default is not None:
                in_a_preset = any(field.name in preset for preset in PRESETS.values())
                whose = "the preset's, or else " if in_a_preset else ""
                help += f" (default: {whose}{field.default})"
            options = dict(type=PARSERS[field.type], choices=choices)
            if field.type in (bool, bool | None):  # --compile, --compile=False, --no-compile
                no = dict(action="store_false", help=SUPPRESS)
                group.add_argument(f"--no-{field.name}", dest=field.name, **no)
                options |= dict(nargs="?", const=True, metavar="False")
            group.add_argument(f"--{field.name}", help=help, **options)
    return vars(parser.parse_args(argv))


def configure(given, checkpoint=None):
    """TrainConfig and GPTConfig: the given flags, over a preset and defaults or, where a run goes
    on, over its checkpoint. Raises UserError for flags that do not fit."""
    if checkpoint is None:
        cuda = torch.cuda.is_available() and given.get("device") != "cpu"
        preset = given.get("preset", "gpu" if cuda else "cpu")
        stored = {**PRESETS[preset], "preset": preset}
    else:
        stored = {**checkpoint["train_config"], **checkpoint["model_config"]}
    if "OMP_NUM_THREADS" in os.environ:
        stored["threads"] = None  # it counts more than the number that a run has had so far
    values = {**stored, **given}
    train, config = select(TrainConfig, values), select(GPTConfig, values)
    refuse_idle_flags(given, config)
    if checkpoint is not None:
        refuse_changes(given, stored, values)
    return train, config


def select(kind, values):
    """A dataclass of that kind, made of those values that are its fields."""
    return kind(
        **{field.name: values[field.name] for field in fields(kind) if field.name in values}
    )


def refuse_idle_flags(given, config):
    """Raises UserError where a flag does not count with the others, such as --d_ctx for qkv."""
    for field in fields(config):
        for other, wanted in field.metadata["only"].items():
            value = getattr(config, other)
            if field.name in given and value not in wanted:
                raise UserError(
                    f"--{field.name} counts only with --{other}={' or '.join(wanted)}, as its "
                    f"`only` in model.py says, and this is {value}; leave it out"
                )


def refuse_changes(given, stored, values):
    """Raises UserError where a given flag would change what a run that goes on has to keep."""

    def with_sizes(values):
        # To give a size that follows from the others anyway changes nothing.
        return {**values, **asdict(select(GPTConfig, values).resolve())}

    old, new = with_sizes(stored), with_sizes(values)
    for name in sorted(given.keys() - MAY_CHANGE):
        if new[name] != old[name]:
            raise UserError(
                f"--{name}={given[name]} cannot change a run that has begun with {old[name]}; "
                "leave it out, or begin a new run"
            )


# --- Processes: each has the whole model, and computes on its share of every batch ----------------


def rank_and_world():
    """This process's number among those that torchrun, mpirun or srun started, and how many these
    are."""
    for rank, world in (
        ("RANK", "WORLD_SIZE"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("PMI_RANK", "PMI_SIZE"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ):
        if rank in os.environ and world in os.environ:
            return int(os.environ[rank]), int(os.environ[world])
    return 0, 1


RANK, WORLD = rank_and_world()


@contextlib.contextmanager
def process_group():
    """Inside, the processes can exchange numbers. Raises UserError where they cannot meet."""
    if WORLD == 1:
        yield
        return
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise UserError(
            f"this is process {RANK + 1} of {WORLD}, but none knows where to meet the others: "
            "start them by torchrun, or set MASTER_ADDR and MASTER_PORT to the first one's address"
        )
    # DistributedDataParallel imports this module, whose functions take the group that there is then
    # as their default. Imported before there is one, they keep none.
    from torch.distributed import nn  # noqa: F401

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, rank=RANK, world_size=WORLD)
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # these have the model, which has the group
        raise
    finally:
        gc.collect()  # a model that is freed after its group would wait for ever
        dist.destroy_process_group()


def say(*words):
    """Prints, in the first process only."""
    if RANK == 0:
        print(*words, flush=True)


def in_first(function, *arguments):
    """Calls a function in the first process only. Returns in all what it gave there."""
    results = [function(*arguments) if RANK == 0 else None]
    if WORLD > 1:
        dist.broadcast_object_list(results)
    return results[0]


def add_up(*numbers):
    """The sum of each number over all processes."""
    sums = torch.tensor(numbers, dtype=torch.float64)
    if WORLD > 1:
        dist.all_reduce(sums)
    return sums.tolist()


def leave(sentence):
    """Ends the run in all processes, for a reason that all of them know. The first one says it."""
    if RANK > 0:
        sys.exit(1)
    raise UserError(sentence)


@contextlib.contextmanager
def explained_errors():
    """Makes sentences of what may go wrong anywhere: memory that runs out, a process that is
    gone."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = f"{type(error).__name__}: {error}"
        if re.search("by peer|remote process", words):  # another process has failed, and said why
            sys.exit(1)
        if re.search("memoryerror|out of memory|(not enough|allocate) memory", words.lower()):
            raise UserError(
                "memory ran out; lower --micro_batch_size, or else --n_embd, --n_layer, "
                "--block_size"
            ) from None
        raise


@contextlib.contextmanager
def stop_requests():
    """Inside, Ctrl-C and the like only add to a list, which is given. A second one interrupts at
    once (but torchrun sends each twice). Signals reach the main thread only, and leave any other
    alone."""
    requests, handlers = [], {}

    def note(number, frame):
        if requests and WORLD == 1:
            raise KeyboardInterrupt
        requests.append(number)

    if threading.current_thread() is threading.main_thread():
        for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                handlers[number] = signal.signal(number, note)
    try:
        yield requests
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# --- The machine: a device, its threads, a precision, a kernel, a compiler ------------------------


def choose_device(name, threads=None):
    """The torch.device of that name; auto is CUDA or MPS where there is one, else the CPU. Raises
    UserError. A CPU computes with so many threads; None leaves that to choose_threads."""
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    try:
        if name == "cuda" and WORLD > 1:  # a GPU for each process
            torch.cuda.set_device(RANK % torch.cuda.device_count())
        torch.empty(1, device=name).tolist()
    except (RuntimeError, AssertionError, ArithmeticError) as error:  # no such device or backend
        raise UserError(
            f"--device={name} cannot be used here ({describe_error(error)}); take --device=cpu"
        ) from None
    torch.set_float32_matmul_precision("high")  # TF32, where a GPU has it
    if name == "cpu":
        choose_threads(threads)
    return torch.device(name)


CORES = torch.get_num_threads()  # PyTorch's own choice: a thread for each core, or OMP_NUM_THREADS


def choose_threads(wanted=None):
    """Sets the number of threads, to no more than there are cores. All threads wait for the slowest
    one after every product: where another program keeps a core busy, a thread for each core can be
    many times slower than fewer threads. So where no number is wanted, nor OMP_NUM_THREADS set, as
    many are taken as there are cores that are free."""
    if wanted is None:
        wanted = CORES
        if "OMP_NUM_THREADS" not in os.environ and CORES > 1:
            wanted = free_cores()
        if wanted < CORES:
            print(
                f"using {wanted} of {CORES} threads, for other programs keep the CPU busy; set "
                "OMP_NUM_THREADS to change that",
                file=sys.stderr,
            )
    torch.set_num_threads(min(wanted, max(CORES, os.cpu_count())))


def free_cores():
    """How many cores this process is given when it asks for all: measured for 0.1 s, and for 0.3 s
    if it did not get them all."""
    torch.set_num_threads(CORES)
    x = torch.zeros(CORES << 16)
    wall, cpu = time.perf_counter(), time.process_time()
    for seconds in 0.1, 0.3:
        while time.perf_counter() - wall < seconds:
            x.sin_()  # work for all of them
        share = (time.process_time() - cpu) / (time.perf_counter() - wall)
        if share > CORES - 0.3:
            return CORES
    return max(1, int(share + 0.3))


def autocast(device, dtype):
    """The precision of a forward pass, which runs inside it: matrix products in that dtype, all
    else in float32. auto is bfloat16 where a CUDA device has it, else float32."""
    if dtype == "auto":
        bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if bfloat16 else "float32"
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")


def choose_kernel(model, name, precision):
    """Has the model attend by kernel.py if `name` is triton, once a trial in that precision gave
    what PyTorch gives. Returns what is used, torch or triton; auto is torch, as long as nobody has
    timed this version of the kernel. Raises UserError, and leaves the model with PyTorch."""
    if name != "triton":
        return "torch"
    tolerance = 1e-2 if precision.fast_dtype == torch.float32 else 1e-1
    try:
        expected = try_model(model, precision)
        model.use_kernel()
        for what, result in try_model(model, precision).items():
            if result is None:
                continue
            error = (result - expected[what]).norm() / expected[what].norm()
            if not error < tolerance:  # nor is NaN
                raise ValueError(f"{what} is off by {error:.1%}")
    except Exception as error:  # a compiler's errors are of many kinds
        model.use_kernel(False)
        raise UserError(
            f"--kernel=triton cannot be used here ({describe_error(error)}); take --kernel=torch"
        ) from None
    return name


def try_model(model, precision):
    """What the model computes of a text of random tokens, {what: tensor}: a loss, and in training
    all gradients (None, of parameters that are not used), otherwise the logits of a token that is
    decoded by a cache."""
    device, config = model.wte.weight.device, model.config
    random = torch.Generator().manual_seed(0)
    length = min(config.block_size, 1024)
    idx = torch.randint(config.vocab_size, (1, length), generator=random).to(device)
    with precision:
        _, loss = model(idx, idx.roll(-1, dims=1))
    results = {"the loss": loss.detach()}
    if model.training:
        learning = {name: w for name, w in model.named_parameters() if w.requires_grad}
        gradients = torch.autograd.grad(loss, learning.values(), allow_unused=True)
        results |= {f"the gradient of {name}": g for name, g in zip(learning, gradients)}
    else:
        cache = model.new_cache()
        with precision, torch.no_grad():
            model(idx[:, :-1], cache=cache)
            results["a decoded token"], _ = model(idx[:, -1:], cache=cache)
    return results


def compile_model(model, wanted, device):
    """The model by torch.compile if that is wanted, or None and there is CUDA. Raises UserError
    where it is wanted but has no compiler here; where it is only the default, goes on without."""
    if wanted is None and device.type != "cuda" or wanted is False:
        return model
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(4, device=device))
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        if wanted:
            raise UserError(
                f"--compile cannot be used here ({reason}); take --no-compile"
            ) from None
        say(f"training without torch.compile, which cannot be used here ({reason})")
        return model
    return torch.compile(model)


def share_gradients(model, forward, precision):
    """The forward pass of a process among others: all begin with the weights of the first, and each
    backward pass ends with the mean of their gradients."""
    if WORLD == 1:
        return forward
    unused = any(tensor is None for tensor in try_model(model, precision).values())
    with warnings.catch_warnings():  # of a new name for broadcast_buffers
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            forward, broadcast_buffers=False, find_unused_parameters=unused
        )


# --- Optimizers: Muon for the matrices in the blocks, AdamW for all else --------------------------


def undecorated(method):
    """A method of PyTorch's optimizers without the decorator that imports PyTorch's compiler first,
    which takes a second or two."""
    return getattr(method, "__wrapped__", method)


class QuickStart:
    add_param_group = undecorated(torch.optim.Optimizer.add_param_group)
    state_dict = undecorated(torch.optim.Optimizer.state_dict)
    load_state_dict = undecorated(torch.optim.Optimizer.load_state_dict)
    zero_grad = undecorated(torch.optim.Optimizer.zero_grad)


class AdamW(QuickStart, torch.optim.AdamW):
    step = torch.no_grad()(undecorated(torch.optim.AdamW.step))


class Muon(QuickStart, torch.optim.Optimizer):
    """Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon), for matrices, or stacks of
    them: momentum, made orthogonal, and scaled to the size of AdamW's steps (arXiv:2502.16982)."""

    def __init__(self, params, lr=1e-2, weight_decay=0.1, momentum=0.9):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            # Matrices of one shape are made orthogonal together.
            by_shape = defaultdict(list)
            for w in group["params"]:
                if w.grad is not None:
                    by_shape[w.shape].append(w)
            for weights in by_shape.values():
                self.move(weights, group)

    def move(self, weights, group):
        ahead = []
        for w in weights:
            mean = self.state[w].setdefault("mean", torch.zeros_like(w))
            mean.lerp_(w.grad, 1 - group["momentum"])
            ahead.append(w.grad.lerp(mean, group["momentum"]))  # Nesterov's
        ahead = torch.stack(ahead)  # (number, m, n) or (number, heads, m, n)
        steps = orthogonal(ahead.flatten(0, -3)).view_as(ahead)
        steps *= 0.2 * max(ahead.shape[-2:]) ** 0.5
        for w, step in zip(weights, steps):
            w.mul_(1 - group["lr"] * group["weight_decay"])
            w.sub_(step, alpha=group["lr"])


def orthogonal(x):
    """Matrices x (N, m, n), with singular values s brought near 1: Polar Express
    (arXiv:2505.16932), its first three steps, s <- a s + b s^3 + c s^5. For matrices a step is
    x <- f x with f = a + b g + c g^2 and g = x x^T. The next g is f g f, so the loop multiplies
    small matrices (N, m, m) only, and x itself once, by the product of all f."""
    if x.size(1) > x.size(2):
        return orthogonal(x.mT).mT
    x = x / (1.01 * x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    product, f, g = None, None, x @ x.mT  # (N, m, m)
    for a, b, c in (
        (8.28721, -23.59589, 17.30039),
        (4.10706, -2.94785, 0.54484),
        (3.94869, -2.90890, 0.55182),
    ):
        if product is not None:
            g = f @ g @ f
        f = torch.baddbmm(g, g, g, beta=b, alpha=c)  # b g + c g^2
        f.diagonal(dim1=1, dim2=2).add_(a)
        product = f if product is None else f @ product
    return product @ x


def make_optimizers(model, train):
    """Muon, if it is wanted, and AdamW. Weight decay pulls on matrices, not on gains and
    exponents."""
    for_muon, matrices, vectors = [], [], []
    for name, w in model.named_parameters():
        if w.dim() < 2:
            vectors.append(w)
        elif train.optimizer == "muon" and name.startswith("blocks."):
            for_muon.append(w)
        else:
            matrices.append(w)
    groups = [
        dict(params=matrices, weight_decay=train.weight_decay),
        dict(params=vectors, weight_decay=0.0),
    ]
    fused = model.wte.weight.device.type in ("cuda", "cpu")
    optimizers = [AdamW(groups, lr=0.0, betas=(0.9, train.beta2), fused=fused)]
    if for_muon:
        optimizers.insert(0, Muon(for_muon, lr=0.0, weight_decay=train.weight_decay))
    return optimizers


# --- One step: its batch, its rate, its gradients; and the measure of what was learned ------------


def windows(data, starts, length, device):
    """Inputs and targets (len(starts), length): the tokens from each start on, and those one
    further. They are copied to a GPU from pinned memory, while it and Python go on."""
    tokens = torch.from_numpy(data[starts[:, None] + np.arange(length + 1)].astype(np.int64))
    if device.type == "cuda":
        tokens = tokens.pin_memory().to(device, non_blocking=True)
    else:
        tokens = tokens.to(device)
    return tokens[:, :-1], tokens[:, 1:]


def batch(data, train, block_size, step, device, rank=RANK, world=WORLD):
    """This process's share of a step's sequences (batch_size / world, block_size), a function of
    (seed, step) alone."""
    random = np.random.default_rng((train.seed, step))
    starts = random.integers(len(data) - block_size, size=train.batch_size)
    return windows(data, np.split(starts, world)[rank], block_size, device)


def learning_rate(step, train):
    # 1. A cosine takes the rate from its peak to a tenth of that, at max_steps.
    done = step / train.max_steps
    rate = train.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))
    # 2. In the first steps it is multiplied by a factor that grows to 1.
    if step < train.warmup_steps:
        rate *= (step + 1) / (train.warmup_steps + 1)
    return rate


def train_step(model, optimizers, train, step, x, y, precision):
    """Moves the weights by one step on a batch. Returns the mean loss of this process's share, in
    nats: a tensor on the device, which nobody has waited for."""
    seeds = np.random.SeedSequence((train.seed, step, RANK))
    torch.manual_seed(int(seeds.generate_state(1)[0]))  # of dropout
    micro, mean_loss = train.rows(), 0.0
    for start in range(0, len(x), micro):
        if WORLD > 1:  # gradients are exchanged once, after the last micro-batch
            model.require_backward_grad_sync = start + micro == len(x)
        with precision:
            _, loss = model(x[start : start + micro], y[start : start + micro])
        loss = loss * (micro / len(x))  # its part of the mean
        loss.backward()  # gradients add up
        mean_loss += loss.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip or math.inf)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, train)
        optimizer.step()
        optimizer.zero_grad()
    return mean_loss


@torch.no_grad()
def evaluate(model, data, batch_size, precision, eval_tokens=None, rank=RANK, world=WORLD):
    """Predicts the first eval_tokens tokens of data, or all, each once, from those before it in
    windows of block_size, batch_size windows at a time. Returns the sum of the losses in this
    process's share, in nats, and their number."""
    block_size = model.config.block_size
    predicted = min(len(data) - 1, eval_tokens or len(data))
    starts = np.arange(0, predicted - block_size + 1, block_size)
    batches = [(starts[i : i + batch_size], block_size) for i in range(0, len(starts), batch_size)]
    if rest := predicted % block_size:
        batches.append((np.array([predicted - rest]), rest))  # a shorter window
    progress, loss_sum, count = Progress(len(batches)), 0.0, 0
    model.eval()
    for number in range(rank, len(batches), world):
        if rank == 0:
            progress(number, "validating ...")
        x, y = windows(data, *batches[number], model.wte.weight.device)
        with precision:
            _, loss = model(x, y)
        loss_sum += loss.item() * y.numel()
        count += y.numel()
    progress.clear()
    model.train()
    return loss_sum, count


# --- A run's folder -------------------------------------------------------------------------------


@dataclass
class Run:
    """What a checkpoint holds besides the weights and the states of the optimizers."""

    out: Path
    train: TrainConfig
    tokenizer: dict  # the data set's, as in its meta.json
    data_sha256: dict
    losses: list  # of each step, in nats a token
    log: list  # of each evaluation, a dict
    seconds: float  # in all steps


@contextlib.contextmanager
def lock_run_folder(folder):
    """Inside, the folder is this process's own, and what one that was killed there was writing is
    removed. The lock is a file in the system's temporary folder, for file systems that machines
    share may have no locks; it ends with the process, however that ends. Raises UserError where
    another process has the folder."""
    if RANK > 0:  # the first process has it for all
        yield
        return
    user = os.getuid() if hasattr(os, "getuid") else ""
    digest = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()
    with open(Path(tempfile.gettempdir(), f"train-{user}-{digest[:16]}.lock"), "ab") as file:
        try:
            if fcntl is None:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"{folder} is in use by another process; wait for that, or change --out"
            ) from None
        except OSError:  # no locks even there: better without than not at all
            pass
        for rest in folder.glob("*.tmp"):
            rest.unlink(missing_ok=True)
        yield


def choose_run(given):
    """The folder of the run that is to go on, and None; or the folder of a new one, and its data
    set, which is prepared if it is a small one that is missing. Raises UserError."""
    if given.get("restartable") and "out" not in given:
        raise UserError("--restartable needs --out, the folder in which to look for the run")
    begun = "out" in given and Path(given["out"], "last.pt").exists()
    if given.get("resume") or (given.get("restartable") and begun):
        return Path(given["out"]) if "out" in given else newest_run(), None
    train, config = configure(given)
    # By default the data set depends on whether there is a network.
    dataset = prepare.load_or_prepare(train.dataset)[0]
    return name_run(given, replace(train, dataset=dataset), config), dataset


def name_run(given, train, config):
    """The folder of a new run: --out, or one in out/ that is named after the data, the attention,
    the positions and the flags that were given."""
    if train.out is not None:
        return Path(train.out)
    named = given.keys() - HOW - {"dataset", "attention", "pos"}
    flags = [f"{name}={given[name]}" for name in sorted(named)]
    name = ",".join([f"{train.dataset}-{config.attention}-{config.pos}", *flags])[:120]
    folder, number = OUT / name, 1
    while folder.exists():
        number += 1
        folder = OUT / f"{name}-{number}"
    return folder


def begin_run(out, dataset, given):
    """A new run, its model, and what its optimizers remember: nothing. The run's folder is not made
    before something is saved in it. Raises UserError."""
    train, config = configure(given)
    train = replace(train, dataset=dataset)
    if RANK == 0 and any(out.glob("*.pt")):
        raise UserError(
            f"{out} holds a run already; go on with it by --resume, or choose another --out"
        )
    meta, _ = prepare.read_dataset(dataset)
    size = prepare.tokenizer_size(meta["tokenizer"])
    if size >= 1000:  # GPUs multiply round numbers faster
        size = -(-size // 64) * 64
    torch.manual_seed(train.seed)
    model = GPT(replace(config, vocab_size=size))
    run = Run(out, train, meta["tokenizer"], meta["sha256"], losses=[], log=[], seconds=0.0)
    return run, model, []


def load_run(out, given):
    """A run to go on with, its model, and what its optimizers remember. Raises UserError."""
    model, checkpoint = GPT.load(out / "last.pt")
    train, _ = configure(given, checkpoint)
    names = "tokenizer", "data_sha256", "losses", "log", "seconds"
    run = Run(out, train, **{name: checkpoint[name] for name in names})
    return run, model, checkpoint["optimizers"]


def read_data(run, block_size):
    """The run's data set, {"train": ids, "val": ids}. Raises UserError where it is another than the
    run began with, or than the first process has."""
    dataset = run.train.dataset
    meta, splits = prepare.read_dataset(dataset)
    if (meta["tokenizer"], meta["sha256"]) != (run.tokenizer, run.data_sha256):
        raise UserError(
            f"data set {dataset!r} is not the one that {run.out} was trained on; prepare that again"
        )
    if len(splits["train"]) <= block_size:
        raise UserError(
            f"block_size={block_size} must be less than the {len(splits['train'])} training "
            "tokens; give more text, or a smaller --block_size"
        )
    here = len(run.losses), meta["sha256"]
    if in_first(lambda: here) != here:
        raise UserError(
            f"process {RANK} is at another step than the first, or has other data: all machines "
            "need the same data/, and to go on with a run they need a folder that they share"
        )
    return splits


def save(run, model, optimizers, *names):
    """Writes config.json, log.jsonl and checkpoints of these names. The last of them is last.pt,
    from which a run goes on: all that it tells of is on disk before it."""
    total = sum(weights.detach().sum() for weights in model.parameters())
    check_finite(total.item(), run)
    if RANK == 0:
        config = dict(train=asdict(run.train), model=asdict(model.config.resolve()))
        log = "".join(json.dumps(entry) + "\n" for entry in run.log)
        for name, text in ("config.json", json.dumps(config, indent=1)), ("log.jsonl", log):
            write_atomically(run.out / name, lambda file: file.write_text(text, encoding="utf-8"))
        checkpoint = dict(
            format=CHECKPOINT_FORMAT,
            model=model.state_dict(),
            optimizers=[optimizer.state_dict()["state"] for optimizer in optimizers],
            model_config=asdict(model.config),
            train_config=asdict(run.train),
            tokenizer=run.tokenizer,
            data_sha256=run.data_sha256,
            losses=run.losses,
            log=run.log,
            seconds=run.seconds,
        )
        for name in names:
            write_atomically(run.out / name, lambda file: torch.save(checkpoint, file))
    add_up(0)  # nobody leaves before that is done


def check_finite(number, run):
    """Ends a run whose loss, or sum of all weights, is infinite or not a number."""
    if not math.isfinite(number):
        leave(
            f"the loss or a weight is {number} at step {len(run.losses):,}: training has diverged; "
            f"take a smaller --learning_rate, from the start or by --resume --out={run.out}"
        )


def draw_losses(losses, log, part=None):
    """A picture of a run: its training and validation losses, without the steep first twentieth."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(6, 4), layout="constrained").subplots()
    first = len(losses) // 20
    axes.plot(range(first + 1, len(losses) + 1), losses[first:], linewidth=0.5, label="training")
    kinds = {"val_loss": "validation, all tokens"}
    if part is not None:
        kinds["val_loss_part"] = f"validation, the first {part:,} tokens"
    for key, label in kinds.items():
        shown = [entry for entry in log if entry["step"] > first and key in entry]
        steps = [entry["step"] for entry in shown]
        axes.plot(steps, [entry[key] for entry in shown], "o-", label=label)
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.legend()
    return axes.figure


# --- The whole story ------------------------------------------------------------------------------


def validate(run, model, data, part, precision):
    """Measures the losses of this step: of training, on the first `part` tokens of the validation
    data, and at the end on all of them. Returns them as an entry of the log."""
    step, train, recent = len(run.losses), run.train, run.losses[-100:]

    def loss_of(eval_tokens):
        loss_sum, count = add_up(*evaluate(model, data, train.rows(), precision, eval_tokens))
        check_finite(loss_sum, run)
        return loss_sum / count

    # best.pt is chosen by val_loss_part, which is of all tokens if eval_tokens says no less.
    entry = dict(step=step, train_loss=sum(recent) / len(recent), seconds=run.seconds)
    entry["val_loss_part"] = loss_of(part)
    if part is None:
        entry["val_loss"] = entry["val_loss_part"]
    elif step == train.max_steps:
        entry["val_loss"] = loss_of(None)
    return entry


def announce(run, model, data, device, precision, kernel):
    """Says what is trained, and how."""
    config, train, step = model.config, run.train, len(run.losses)
    size = sum(weights.numel() for weights in model.parameters())
    tokens = train.batch_size * config.block_size
    epochs = tokens * train.max_steps / len(data["train"])
    dtype = str(precision.fast_dtype).removeprefix("torch.")
    say(
        f"model: {config.attention} attention, {config.pos} positions, {config.n_layer} layers, "
        f"{config.n_head} heads, {config.n_embd} wide: {size:,} parameters, trained for {step:,} "
        f"steps\nplan:  {train.max_steps:,} steps of {tokens:,} tokens, {epochs:.2g} epochs of "
        f"{train.dataset}, on {WORLD} x {device}, {train.threads} threads, {dtype}, attention by "
        f"{kernel}\nrun:   {run.out}"
    )
    if step >= train.max_steps:
        say(f"all {step:,} steps are done: to go on, give a larger --max_steps")


def describe(run, part):
    """A line on the newest step and, if there was one, on its evaluation."""
    step, recent = len(run.losses), run.losses[-100:]
    words = (
        f"step {step:,} of {run.train.max_steps:,}, {format_time(run.seconds)}: training loss "
        f"{sum(recent) / len(recent):.4f} (mean of the last {len(recent)} steps)"
    )
    if not run.log or run.log[-1]["step"] < step:
        return words
    entry, best = run.log[-1], " (the best so far)" if is_best(run.log) else ""
    if part is None:
        return f"{words}, validation loss {entry['val_loss']:.4f}{best}"
    words += f", validation loss {entry['val_loss_part']:.4f} on {part:,} tokens{best}"
    if "val_loss" in entry:
        words += f" and {entry['val_loss']:.4f} on all"
    return words


def is_best(log):
    """Whether the newest evaluation found the least loss; only those of the same tokens compare."""
    *earlier, newest = [entry["val_loss_part"] for entry in log]
    return newest < min(earlier, default=math.inf)


def show_progress(progress, run, block_size):
    if RANK == 0:
        step = len(run.losses)
        rate = run.train.batch_size * block_size * progress.rate(step)
        words = f"step {step:,} of {run.train.max_steps:,}: loss {run.losses[-1]:.3f}"
        progress(step, f"{words}, {rate:,.0f} tokens/s")


def read_losses(run, unread, requests):
    """Adds to the run's losses those of the newest steps, which are waited for. Returns how many
    requests to stop there were in all processes: all learn that at the same step."""
    *losses, stop = add_up(*(loss.item() / WORLD for loss in unread), len(requests))
    for loss in losses:
        run.losses.append(loss)
        check_finite(loss, run)
    return stop


def tenths(step, train):
    """How many tenths of the run are over."""
    return 10 * step // train.max_steps


def steps_between_reads(device, train):
    """Python runs ahead of a GPU, and waits for its results after every tenth forward pass only. On
    a CPU it reads them after each step."""
    if device.type == "cpu":
        return 1
    passes = train.batch_size // WORLD // train.rows()
    return max(1, 10 // passes)


@explained_errors()
@process_group()
def main(argv=None):
    """Trains, as the flags say: a list of strings, or else this program's own."""
    given = parse(argv)
    # A new run has a data set to begin with; one that goes on has its own.
    out, dataset = in_first(choose_run, given)
    with lock_run_folder(out):
        if dataset is None:
            run, model, states = load_run(out, given)
        else:
            run, model, states = begin_run(out, dataset, given)
        config = model.config
        data = read_data(run, config.block_size)

        # The machine, and the model on it. `forward` is the model, too, made fast and shared.
        device = choose_device(run.train.device, run.train.threads)
        # A run goes on exactly only with as many threads as before, so they are kept.
        run.train = train = replace(run.train, threads=torch.get_num_threads())
        precision = autocast(device, train.dtype)
        model.to(device).train()
        kernel = choose_kernel(model, train.kernel, precision)
        forward = compile_model(model, train.compile, device)
        forward = share_gradients(model, forward, precision)
        optimizers = make_optimizers(model, train)
        # Optimizers go on with what they remember, but with the flags' rates and decays. On a GPU
        # they copy it, and what was loaded is freed.
        for optimizer in optimizers[: len(states)]:
            optimizer.load_state_dict({**optimizer.state_dict(), "state": states.pop(0)})

        step = len(run.losses)
        read_every = steps_between_reads(device, train)
        # How many tokens all evaluations but the last one predict; None is all.
        part = train.eval_tokens
        if part is not None and part >= len(data["val"]) - 1:
            part = None
        with stop_requests() as requests:
            announce(run, model, data, device, precision, kernel)
            if step == 0:
                save(run, model, optimizers, "last.pt")  # if that fails, now and not in an hour
            progress, told, unread = Progress(train.max_steps, step), tenths(step, train), []
            started = time.perf_counter()
            while step < train.max_steps:
                x, y = batch(data["train"], train, config.block_size, step, device)
                unread.append(train_step(forward, optimizers, train, step, x, y, precision))
                step += 1
                evaluating = step % train.eval_interval == 0 or step == train.max_steps
                if step % read_every != 0 and not evaluating:
                    continue

                # Python waits for what was computed, and looks whether somebody asked to stop.
                stop = read_losses(run, unread, requests)
                unread.clear()
                run.seconds += time.perf_counter() - started
                show_progress(progress, run, config.block_size)

                if evaluating:
                    run.log.append(validate(run, model, data["val"], part, precision))
                    names = ["best.pt", "last.pt"] if is_best(run.log) else ["last.pt"]
                    save(run, model, optimizers, *names)
                elif stop:
                    save(run, model, optimizers, "last.pt")
                if evaluating or tenths(step, train) > told:
                    progress.clear()
                    say(describe(run, part))
                told = tenths(step, train)
                if stop and step < train.max_steps:
                    progress.clear()
                    leave(
                        f"stopped after step {step:,}; it is saved: go on by --resume "
                        f"--out={run.out}"
                    )
                started = time.perf_counter()

        if RANK == 0:
            save_figure(draw_losses(run.losses, run.log, part), run.out / "loss.png")
        say(
            f"curves: {run.out}/loss.png; to sample from it: "
            f"python sample.py --out={shlex.quote(str(run.out))}"
        )


if __name__ == "__main__":
    prepare.run_program(main)

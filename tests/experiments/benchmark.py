"""What kernel.py costs. Run it, as `python kernel.py`, after a change of kernel.py, of Triton or
of PyTorch, on the GPU that you train on.

On a GPU it measures time and memory of training, beside what else PyTorch has for the same
attention, and time and share of the copy bandwidth of decoding; with --models, whole models as
users run them. Without a GPU it says what the compiler makes of each kernel: registers, spills,
shared memory, instructions."""

from __future__ import annotations

import functools
import gc
import math
import re
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import kernel
from kernel import triton
from model import GPT, GPTConfig
from prepare import Progress, UserError, describe_error, new_parser, run_program

DEVICE, DTYPE = "cuda", torch.bfloat16

# Training: heads, their width, the context's width, tokens in each batch, and the lengths to which
# they are cut.
H, D, E, TOKENS = 12, 64, 128, 16384
LENGTHS = 16384, 4096, 1024

# Decoding: query heads, value heads if shared, the context's width; sequences, and tokens of each.
DECODE_H, DECODE_G, DECODE_E = 32, 8, 128
BATCHES, CONTEXTS = (1, 8, 64), (1024, 4096, 16384, 65536)

# Whole models: training steps that are measured; and sizes, with the sequences of a step.
STEPS = 20
MODELS = {
    "gpt2": (12, dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257)),
    "gpu": (64, dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65)),
}

# -----------------------------------------------------------------------------
# What the compiler makes of the kernels, for a GPU that need not be there.


class Absent:
    """Stands in for the driver of a GPU of compute capability arch / 10, to compile for it."""

    def __init__(self, arch):
        from triton.backends.compiler import GPUTarget

        self.get_current_target = lambda: GPUTarget("cuda", arch, 32)
        self.get_current_device = lambda: arch  # one cache of kernels for each
        self.get_current_stream = lambda device: None


def disassemble(cubin):
    """What NVIDIA's cuobjdump says of a compiled kernel: its resources and its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions_a_tile(dump):
    """How many instructions the last loop has: that for tiles without masks, where time goes."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", dump)]
    length = 0
    for at, text in code:
        jump = re.search(r"BRA.* 0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < at:
            inside = sum(int(jump[1], 16) <= other <= at for other, _ in code)
            length = inside if inside > 20 else length  # shorter ones only wait
    return length


def compiled(arch, function, tensor, *args, **constants):
    """A row of the report: compiles a kernel as for a launch with these arguments."""
    options = kernel.options(function.__name__, tensor.dtype, arch // 10, constants)
    binary = function.warmup(*args, **options, grid=(1,))
    dump = disassemble(binary.asm["cubin"])
    return dict(
        kernel=function.__name__.removesuffix("_kernel"),
        tile=" x ".join(str(options[letter]) for letter in "MN" if letter in options),
        warps=binary.metadata.num_warps,
        stages=binary.metadata.num_stages,
        registers=int(re.search(r"REG:(\d+)", dump)[1]),
        spilled=int(re.search(r"STACK:(\d+)", dump)[1]),
        shared=binary.metadata.shared,
        wgmma=binary.asm["ptx"].count("wgmma.mma_async"),
        waits=dump.count("WARPGROUP.DEPBAR"),
        code=instructions_a_tile(dump),
    )


def compile_report(arch, D, keys, E, decay, B=2, T=1024, H=H, G=None, only=""):
    """A row for each kernel of a training step and, without keys, of a decoding step. arch is 80
    (A100) or 90 (H100, H200)."""
    triton.runtime.driver.set_active(Absent(arch))
    rows = []

    def empty(*shape, dtype=DTYPE):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def launch(function, grid, tensor, *args, **constants):
        if only in function.__name__:
            rows.append(compiled(arch, function, tensor, *args, **constants))

    q, v = empty(B, T, H, D), empty(B, T, G or H, D)
    k = empty(*v.shape) if keys else None
    q_ctx, ctx = (empty(B, T, H, E), empty(B, T, E)) if E else (None, None)
    a = empty(H, dtype=torch.float32) if decay else None
    inputs = q, v, k, q_ctx, ctx, a
    out, lse = kernel.run_forward(*inputs, scale=D**-0.5, launch=launch)
    kernel.run_backward(out, *inputs, out, lse, scale=D**-0.5, launch=launch)
    if not keys:
        lengths = empty(B, dtype=torch.int32)
        last, last_ctx = (x if x is None else x[:, -1:] for x in (q, q_ctx))
        kernel.run_decode(last, v, last_ctx, ctx, a, lengths, launch=launch)
    yes_or_no = {True: "yes", False: "no"}
    form = dict(arch=arch, D=D, E=E, keys=yes_or_no[keys], decay=yes_or_no[decay])
    return [form | row for row in rows]


def print_compile_report():
    print(
        "bfloat16. arch 80: A100, 90: H100 and H200; D, E: widths of heads and of the context;\n"
        "keys no: the value is the key; tile: queries x tokens; registers and spilled bytes of a\n"
        "thread; bytes of shared memory; wgmma: instructions for Hopper's tensor cores (decoding\n"
        "takes mma); waits: for them, the fewer the better; code: instructions a tile\n"
    )
    columns = (
        "{:>4} {:>4} {:>4} {:>4} {:>5}  {:14} {:>8} {:>5} {:>6} {:>9} {:>7} {:>6} {:>5} {:>5} {:>4}"
    )
    forms = (False, 0), (True, 0), (False, 128), (True, 32)  # keys, and E
    cases = list(product((80, 90), (64, 128), forms, (False, True)))
    progress, spilling = Progress(len(cases)), 0
    for done, (arch, D, (keys, E), decay) in enumerate(cases, 1):
        rows = compile_report(arch, D, keys, E, decay)
        spilling += sum(row["spilled"] > 0 for row in rows)
        progress.clear()
        if done == 1:
            print(columns.format(*rows[0]))
        for row in rows:
            print(columns.format(*row.values()), flush=True)
        progress(done, f"compiled {done} of {len(cases)} shapes")
    progress.clear()
    print(f"\n{spilling or 'none'} of them spill registers")


# -----------------------------------------------------------------------------
# Measuring on a GPU.


def timed(run, repeat=20):
    """Median milliseconds of run() on the GPU, which starts with a cold cache and never waits for
    Python: it sleeps until all of run's launches are queued."""
    events = []
    cold = torch.zeros(2**26, device=DEVICE)
    cycles = 2**22  # about two milliseconds
    run()  # compiles
    while len(events) < repeat + 3:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cold.sum()
        torch.cuda._sleep(cycles)
        start.record()
        run()
        end.record()
        if start.query() and cycles < 2**28:  # it woke too early: again
            cycles *= 2
        else:
            events.append((start, end))
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in events[3:])


def peak_memory(run):
    """Bytes at the peak of run()."""
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated()


class Measuring:
    """Measures one thing after the other until the time is up, and says how far it is."""

    def __init__(self, total, seconds):
        self.progress, self.until, self.done = Progress(total), time.monotonic() + seconds, 0

    def __call__(self, name, measure):
        """measure(), or None: the time is up, or a line says what a rival lacks."""
        self.done += 1
        if time.monotonic() > self.until:
            return None
        self.progress(self.done, f"measured {self.done} of {self.progress.total}")
        try:
            return measure()
        except Exception as error:  # whatever a rival can think of
            print(f"    {name}: {type(error).__name__}: {describe_error(error)[:90]}", flush=True)
        finally:
            self.progress.clear()
            if DEVICE == "cuda":
                torch.cuda.empty_cache()


def random(*shape):
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def heads_first(*tensors):
    return [x.transpose(1, 2) for x in tensors]  # (B, T, H, D) -> (B, H, T, D)


# -----------------------------------------------------------------------------
# Training. A form says which tensors an attention starts from, and how the kernel and its rivals
# compute it: all that the form needs is in the measured time, for everybody. The decay is a
# constant here, for rivals would need a gradient of all of their mask.


class QKV:
    """Keys of their own."""

    def __init__(self, B, T):
        self.q, self.k, self.v = (random(B, T, H, D).requires_grad_() for _ in range(3))
        self.inputs = [self.q, self.k, self.v]

    def fused(self, decay):
        return kernel.attention(self.q, self.v, self.k, decay=decay)

    def joined(self):
        """Query, key and value as the rivals take them, with as many heads and equally wide
        queries and keys."""
        return self.q, self.k, self.v


class QV(QKV):
    """The value is the key."""

    def __init__(self, B, T):
        self.q, self.v = (random(B, T, H, D).requires_grad_() for _ in range(2))
        self.inputs = [self.q, self.v]

    def fused(self, decay):
        return kernel.attention(self.q, self.v, decay=decay)

    def joined(self):
        return self.q, self.v, self.v


class QVKa(QKV):
    """Keys [g; v] W_K, which are made first: as QV-Ka trains without RoPE."""

    def __init__(self, B, T):
        self.q, self.v = (random(B, T, H, D).requires_grad_() for _ in range(2))
        self.ctx = random(B, T, E).requires_grad_()
        self.w_k = (random(H, E + D, D) / 8).requires_grad_()
        self.inputs = [self.q, self.v, self.ctx, self.w_k]

    def keys(self):
        of_contexts = torch.einsum("bse,hed->bshd", self.ctx, self.w_k[:, :E])
        return of_contexts + torch.einsum("bshc,hcd->bshd", self.v, self.w_k[:, E:])

    def fused(self, decay):
        return kernel.attention(self.q, self.v, self.keys(), decay=decay)

    def joined(self):
        return self.q, self.keys(), self.v


class Folded(QKV):
    """The query [q_ctx; q_v] = q W_K^T: as QV-Ka trains under RoPE. Rivals need the key [g; v] for
    every head."""

    def __init__(self, B, T):
        self.q = random(B, T, H, E + D).requires_grad_()
        self.v = random(B, T, H, D).requires_grad_()
        self.ctx = random(B, T, E).requires_grad_()
        self.inputs = [self.q, self.v, self.ctx]

    def fused(self, decay):
        q_ctx, q_v = self.q.split([E, D], dim=-1)
        return kernel.attention(q_v, self.v, q_ctx=q_ctx, ctx=self.ctx, decay=decay, scale=D**-0.5)

    def joined(self):
        contexts = self.ctx[:, :, None].expand(-1, -1, H, -1)
        return self.q, torch.cat([contexts, self.v], dim=-1), self.v


FORMS = {"qv": QV, "qv_ka": QVKa, "qkv": QKV, "folded": Folded}


def decay_mask(T, decay):
    """What SDPA adds to the scores, (1, H, T, T)."""
    position = torch.arange(T, device=DEVICE, dtype=torch.float32)
    distance = position[:, None] - position
    mask = torch.empty(1, len(decay), T, T, device=DEVICE, dtype=DTYPE)
    for h, a in enumerate(decay):  # head by head, to spare memory
        mask[0, h] = (-a * torch.log1p(distance.abs())).masked_fill_(distance < 0, -math.inf)
    return mask


def sdpa(form, decay, pad=False):
    """PyTorch's fused attention. It has its fastest kernel only for values as wide as the keys:
    `pad` fills them up."""
    mask = None if decay is None else decay_mask(form.v.size(1), decay)

    def run():
        q, k, v = form.joined()
        if pad:
            v = F.pad(v, (0, k.size(-1) - v.size(-1)))
        out = F.scaled_dot_product_attention(
            *heads_first(q, k, v), attn_mask=mask, is_causal=mask is None, scale=D**-0.5
        )
        return out.transpose(1, 2)[..., :D]

    return run


@functools.cache
def flex_attention():
    from torch.nn.attention.flex_attention import flex_attention  # slow to import

    for limit in "recompile_limit", "cache_size_limit":  # it is compiled anew for each shape
        if hasattr(torch._dynamo.config, limit):
            setattr(torch._dynamo.config, limit, 64)
    return torch.compile(flex_attention, dynamic=False)


def flex(form, decay):
    """PyTorch's FlexAttention, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask

    T = form.v.size(1)
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=DEVICE)

    def power_law(score, b, h, i, j):
        return score - decay[h] * torch.log1p((i - j).abs().float())

    def run():
        score_mod = None if decay is None else power_law
        inputs = heads_first(*form.joined())
        out = flex_attention()(*inputs, score_mod=score_mod, block_mask=mask, scale=D**-0.5)
        return out.transpose(1, 2)

    return run


def contestants(form, decay):
    """name: a function that makes what is made once, such as a mask, and returns the attention to
    be timed: a function without arguments, whose result (B, T, H, D) has gradients for
    form.inputs."""
    found = {
        "fused": lambda: functools.partial(form.fused, decay),
        "sdpa": lambda: sdpa(form, decay),
        "flex": lambda: flex(form, decay),
    }
    if isinstance(form, Folded):
        found["padded"] = lambda: sdpa(form, decay, pad=True)
    return found


def measure_training(form, make):
    """Milliseconds forward, and forward + backward; bytes at its peak beyond the inputs."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    run = make()
    d_out = torch.randn_like(run())

    def both():
        return torch.autograd.grad(run(), form.inputs, d_out)

    return timed(run), timed(both), peak_memory(both) - before - d_out.nbytes


def flop(T):
    """Of a forward pass by the usual convention: 4 B H T T D, halved as it is causal. Backward:
    2.5 times as many."""
    return 4 * H * TOKENS * T * D / 2


def print_training(title, T, results):
    """A line for each contestant."""
    for name, result in results.items():
        if result is None:
            print(f"{title}  {name:6}  -", flush=True)
            continue
        forward, both, peak = result
        speed = flop(T) / forward / 1e9, 3.5 * flop(T) / both / 1e9
        cells = f"{forward:8.3f} ms {speed[0]:4.0f}  {both:8.3f} ms {speed[1]:4.0f}"
        ratio = f"{results['fused'][1] / both:5.2f}" if results["fused"] else "    -"
        print(f"{title}  {name:6}  {cells}  {peak / 2**20:6.0f} MiB  {ratio}", flush=True)


def bench_training(measuring, name):
    """The lines of one form; returns the kernel's time as a share of SDPA's and of
    FlexAttention's, for each shape."""
    ratios = {}
    for decayed, T in product((True, False), LENGTHS):
        form = measuring("their inputs", lambda: FORMS[name](TOKENS // T, T))
        if form is None:
            continue
        decay = torch.logspace(-2, 2, H, base=2, device=DEVICE) if decayed else None
        results = {}
        for rival, make in contestants(form, decay).items():
            results[rival] = measuring(rival, lambda: measure_training(form, make))
        yes_or_no = "yes" if decayed else "no"
        print_training(f"{name:6}  T {T:5}  decay {yes_or_no:3}", T, results)
        both = {rival: result[1] for rival, result in results.items() if result}
        if "padded" in both:
            both["sdpa"] = min(both.get("sdpa", math.inf), both["padded"])
        for rival in "sdpa", "flex":
            if "fused" in both and rival in both:
                ratios[name, yes_or_no, T, rival] = both["fused"] / both[rival]
    return ratios


def print_ratios(ratios):
    """The kernel's time, forward and backward, as a share of its rivals'."""
    print("\nfused / rival, forward + backward" + "".join(f"{f'T {T}':>9}" for T in LENGTHS))
    for name, decay, rival in product(FORMS, ("yes", "no"), ("sdpa", "flex")):
        shares = [ratios.get((name, decay, T, rival)) for T in LENGTHS]
        if any(shares):
            cells = "".join(f"{share:9.2f}" if share else f"{'-':>9}" for share in shares)
            print(f"{name:6}  decay {decay:3}  of {rival:12}{cells}")


# -----------------------------------------------------------------------------
# Decoding: one token for each of a batch of sequences, all equally long.


def attentions_to_decode(B, S):
    """name: a function without arguments. QV and QV-Ka by the kernel; and QKV by all that PyTorch
    has for it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, q_ctx = random(B, 1, DECODE_H, D), random(B, 1, DECODE_H, DECODE_E)
    k, v, ctx = random(B, S, DECODE_H, D), random(B, S, DECODE_H, D), random(B, S, DECODE_E)
    shared = random(B, S, DECODE_G, D)
    lengths = torch.full((B,), S, device=DEVICE, dtype=torch.int32)
    qkv = heads_first(q, k, v)

    def by(backend):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*qkv)

    backends = (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
    )
    return {
        "QV": lambda: kernel.decode(q, v, lengths=lengths),
        "QV-Ka": lambda: kernel.decode(q, v, q_ctx, ctx, lengths=lengths),
        "QV, shared": lambda: kernel.decode(q, shared, lengths=lengths),
        **{backend.name.lower(): functools.partial(by, backend) for backend in backends},
    }


def copy_bandwidth():
    """GB/s, read and written."""
    source = torch.empty(2**31 if DEVICE == "cuda" else 2**20, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source)) / 1e6


def bench_decoding(measuring):
    """A line for each batch and context."""
    bandwidth = measuring("copying", copy_bandwidth)
    if bandwidth is None:
        return
    numbers = {  # of 16 bits, that are remembered of a token
        "QV": DECODE_H * D,
        "QV-Ka": DECODE_H * D + DECODE_E,
        "QV, shared": DECODE_G * D,
    }
    print(
        f"\ncopy bandwidth {bandwidth:.0f} GB/s; shared: {DECODE_G} values for {DECODE_H} heads\n"
        " batch context         QV us  share      QV-Ka us  share  QV, shared us share"
        "   QKV us (fastest)             QKV / QV"
    )
    for B, S in product(BATCHES, CONTEXTS):
        runs = (
            measuring("their inputs", lambda: attentions_to_decode(B, S)) or {}
        )  # 34 GB at the end
        ms = {name: measuring(name, lambda: timed(run)) for name, run in runs.items()}
        cells = []
        for name, n in numbers.items():
            if ms.get(name):
                share = 2 * B * S * n / ms[name] / 1e6 / bandwidth
                cells.append(f"{1000 * ms[name]:8.1f}  {share:5.0%}")
            else:
                cells.append("-")
        rivals = [(x, name) for name, x in ms.items() if x and name not in numbers]
        if rivals:
            fastest, name = min(rivals)
            cells.append(f"{1000 * fastest:8.1f} ({name})")
            cells.append(f"{fastest / ms['QV']:.2f}" if ms["QV"] else "-")
        else:
            cells += ["-", "-"]
        row = (
            f"{B:6} {S:7} {cells[0]:>19} {cells[1]:>19} {cells[2]:>19} {cells[3]:30} {cells[4]:>6}"
        )
        print(row, flush=True)


# -----------------------------------------------------------------------------
# Whole models, as users run them: seconds by the clock, in which the host's time counts.


def clock(run):
    """Seconds of run(), the host's time included."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def measure_model(fused, batch, config):
    """Seconds of the first compiled training step, milliseconds of the others, MiB at their peak,
    and tokens/s of generation: of one sequence, not compiled."""
    model = GPT(config).to(DEVICE)
    model.use_kernel(fused)
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters())
    idx = torch.randint(config.vocab_size, (batch, config.block_size), device=DEVICE)
    n = config.block_size - 1

    def step():
        optimizer.zero_grad()
        with torch.autocast(DEVICE, DTYPE):
            loss = compiled(idx, idx)[1]
        loss.backward()
        optimizer.step()

    def generate():
        with torch.autocast(DEVICE, DTYPE):
            return sum(1 for _ in model.eval().generate(idx[:1, :1], n))

    first = clock(step)
    milliseconds = 1000 * min(clock(step) for _ in range(STEPS))
    peak = peak_memory(step) / 2**20
    return first, milliseconds, peak, n / min(clock(generate) for _ in range(2))


def bench_models(seconds):
    """A line for each size, attention, positions, and way to compute them."""
    attentions, positions = ("qkv", "qv", "qv_ka"), ("agf", "rope+agf")
    cases = list(product(MODELS, attentions, positions, ("torch", "triton")))
    measuring = Measuring(len(cases), seconds)
    print("size attention pos      kernel   first s   step ms  peak MiB  tokens/s")
    for size, attention, pos, name in cases:
        batch, sizes = MODELS[size]
        config = GPTConfig(attention=attention, pos=pos, **sizes)
        result = measuring(name, lambda: measure_model(name == "triton", batch, config))
        torch.compiler.reset()
        cells = "".join(f"{x:10.1f}" for x in result) if result else "         -"
        print(f"{size:4} {attention:9} {pos:8} {name:6}{cells}", flush=True)


# -----------------------------------------------------------------------------


def benchmark(seconds):
    """First what is least known, for the time may be up before the end."""
    torch.manual_seed(0)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE
    print(
        f"{device}, torch {torch.__version__}, triton {triton.__version__}\n"
        f"{H} heads of {D}, {TOKENS} tokens; forward: ms and TFLOP/s; forward + backward: ms and\n"
        "TFLOP/s; peak memory beyond inputs (and SDPA's mask); the kernel's time, forward +\n"
        "backward, as a share of this one\n"
    )
    warm = random(64, 64).requires_grad_()
    (warm @ warm).sum().backward()  # cuBLAS takes its memory, once
    shapes = 2 * len(LENGTHS)
    measuring = Measuring(shapes * (4 * 4 + 1) + 1 + 7 * len(BATCHES) * len(CONTEXTS), seconds)
    ratios = bench_training(measuring, "qv") | bench_training(measuring, "qv_ka")
    bench_decoding(measuring)
    print()
    ratios |= bench_training(measuring, "folded") | bench_training(measuring, "qkv")
    print_ratios(ratios)


def main(flags=None):
    parser = new_parser(__doc__, prog="kernel.py")
    parser.add_argument(
        "--compile_report",
        action="store_true",
        help="print what the compiler makes of the kernels, though there is a GPU",
    )
    parser.add_argument(
        "--models", action="store_true", help="measure whole models instead of attention alone"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=480,
        help="seconds after which nothing new is measured (default: 480)",
    )
    args = parser.parse_args(flags)
    if triton is None:
        raise UserError(
            "the kernels need the package triton, which is not installed; model.py does without"
        )
    if kernel.INTERPRETED:
        raise UserError("TRITON_INTERPRET=1 leaves nothing to compile, or to measure; unset it")
    if args.compile_report or not torch.cuda.is_available():
        if not torch.cuda.is_available():
            print(
                "There is no CUDA GPU here, so nothing is timed. What the compiler makes of them:\n"
            )
        print_compile_report()
    elif args.models:
        bench_models(args.seconds)
    else:
        benchmark(args.seconds)


if __name__ == "__main__":
    run_program(main)

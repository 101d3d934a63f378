"""What kernel.py costs; `python kernel.py` runs this file.

On a GPU: time and peak memory of training, beside what else PyTorch offers for the same attention; time and share of
the copy bandwidth of decoding; with --models, whole models as users run them, by either kernel. Without a GPU: what the
compiler makes of each kernel (registers, spills, shared memory, tensor-core instructions)."""

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

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import kernel  # noqa: E402
from kernel import qv_attention, qv_decode, triton  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from prepare import Progress, UserError, describe_error, new_parser, run_program  # noqa: E402

DEVICE, DTYPE = "cuda", torch.bfloat16
H, D, TOKENS = 12, 64, 16384  # training: heads, their width, tokens in each batch
LENGTHS, WIDTHS = (1024, 4096, 16384), (0, 128)  # ... T and d_ctx
DECODE_H, DECODE_G, DECODE_E = 32, 8, 128  # decoding: heads, values if shared, d_ctx of QV-Ka
BATCHES, CONTEXTS = (1, 8, 64), (1024, 4096, 16384, 65536)
STEPS = 20  # of a model
SHAPES = {  # models, with the batch of a step: train.py's presets
    "gpt2": (12, dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257)),
    "gpu": (64, dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65)),
}

# ---------------------------------------------------------------------------------------------------------------------
# What the compiler makes of the kernels, for a GPU that need not be there.


class Absent:
    """Stands in for the driver of a GPU of compute capability arch / 10, as far as compiling needs one."""

    def __init__(self, arch):
        from triton.backends.compiler import GPUTarget

        self.get_current_target = lambda: GPUTarget("cuda", arch, 32)
        self.get_current_device = lambda: arch  # one cache of kernels for each
        self.get_current_stream = lambda device: None


def compiled(arch, function, *args, **constants):
    """Compiles a kernel as for a launch with these arguments. A row for the report: registers and spilled bytes of a
    thread, bytes of shared memory, wgmma instructions (Hopper's tensor cores) in the PTX, and waits for them in machine
    code: as many as there are instructions where the assembler did not dare to let them overlap."""
    options = kernel.options(function.__name__, args[0][0].dtype, arch // 10, constants)
    binary = function.warmup(*args, **options, grid=(1,))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, spilled = (int(re.search(rf"{name}:(\d+)", dump)[1]) for name in ("REG", "STACK"))
    made, tile = binary.metadata, " x ".join(str(options[name]) for name in "MN" if name in options)
    return dict(
        kernel=function.__name__,
        tile=tile,
        warps=made.num_warps,
        stages=made.num_stages,
        registers=registers,
        spilled=spilled,
        shared=made.shared,
        wgmma=binary.asm["ptx"].count("wgmma.mma_async"),
        waits=dump.count("WARPGROUP.DEPBAR"),
    )


def compile_report(arch, D, E, decay, dtype=DTYPE, B=2, T=1024, H=H, G=None, only=""):
    """A row for each kernel of a training step and of a decoding step; arch is 80 (A100) or 90 (H100, H200)."""
    triton.runtime.driver.set_active(Absent(arch))
    rows, empty = [], lambda *shape, dtype=dtype: torch.empty(*shape, dtype=dtype, device="meta")

    def launch(function, grid, *args, **constants):
        if only in function.__name__:
            rows.append(compiled(arch, function, *args, **constants))

    q, v, lengths = empty(B, T, H, D), empty(B, T, G or H, D), empty(B, dtype=torch.int32)
    q_ctx, ctx = (empty(B, T, H, E), empty(B, T, E)) if E else (None, None)
    a = empty(H, dtype=torch.float32) if decay else None
    out, lse = kernel.forward(q, v, q_ctx, ctx, a, launch=launch)
    kernel.backward(out, q, v, q_ctx, ctx, a, out, lse, launch=launch)
    kernel.decode(q[:, :1], v, q_ctx[:, :1] if E else None, ctx, a, lengths, launch=launch)
    return [dict(arch=arch, D=D, d_ctx=E, decay="yes" if decay else "no") | row for row in rows]


def print_compile_report():
    form = "{:>4} {:>4} {:>5} {:>5}  {:21} {:>8} {:>5} {:>6} {:>9} {:>7} {:>6} {:>5} {:>5}"
    cases = list(product((80, 90), (64, 128), ((0, False), (0, True), (64, True), (128, True))))
    print(
        "bfloat16; arch 80: A100, 90: H100 and H200; D: head width; d_ctx: 0 is QV, else QV-Ka; tile: queries x\n"
        "tokens; registers and spilled bytes of a thread; bytes of shared memory; wgmma: instructions for Hopper's\n"
        "tensor cores (decoding takes mma); waits: for them, the fewer the better\n"
    )
    progress, spilling = Progress(len(cases)), []
    for done, (arch, D, (E, decay)) in enumerate(cases, 1):
        rows = compile_report(arch, D, E, decay)
        progress.clear()
        if done == 1:
            print(form.format(*rows[0]))
        for row in rows:
            print(form.format(*row.values()), flush=True)
        spilling += [row for row in rows if row["spilled"]]
        progress(done, f"compiled {done} of {len(cases)} shapes")
    progress.clear()
    print(f"\n{len(spilling) or 'none'} of them spill registers")


# ---------------------------------------------------------------------------------------------------------------------
# Measuring on a GPU.


def timed(run, repeat=20):
    """Median milliseconds of run() on the GPU, which starts with a cold cache and never waits for Python: it sleeps
    until all of run's launches are queued."""
    events, cold, cycles = (
        [],
        torch.zeros(2**26, device=DEVICE),
        2**22,
    )  # cycles: about two milliseconds
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
        """measure(), or None and one line that says why not: rivals may lack memory or support."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Training: everybody starts from q, v and, for QV-Ka, ctx and W_K. The fused kernel folds W_K into the query; the
# others make the keys. The decay is a constant here, for rivals would need a gradient of all of their mask.


def random(*shape):
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def heads_first(*tensors):
    return [x.transpose(1, 2) for x in tensors]  # (B, T, H, D) -> (B, H, T, D)


@functools.cache
def flex_attention():
    from torch.nn.attention.flex_attention import flex_attention  # slow to import

    for limit in "recompile_limit", "cache_size_limit":  # it is compiled anew for each shape
        if hasattr(torch._dynamo.config, limit):
            setattr(torch._dynamo.config, limit, 64)
    return torch.compile(flex_attention, dynamic=False)


def contestants(T, E, decayed):
    """At one shape, name: (make, inputs). make() brings what is made once, such as a mask, and returns the attention to
    be timed, a function without arguments, whose result (B, T, H, D) or (B, H, T, D) has gradients for the inputs."""
    B = TOKENS // T
    q, v, other = (random(B, T, H, D).requires_grad_() for _ in range(3))
    ctx, w_k = (
        (random(B, T, E).requires_grad_(), (random(H, E + D, D) / 8).requires_grad_())
        if E
        else (None, None)
    )
    decay = torch.logspace(-2, 2, H, base=2, device=DEVICE) if decayed else None

    def key():
        if not E:
            return v
        return torch.einsum("bse,hed->bshd", ctx, w_k[:, :E]) + torch.einsum(
            "bshc,hcd->bshd", v, w_k[:, E:]
        )

    def fused():
        q_ctx, q_v = (
            torch.einsum("bthd,hcd->bthc", q, w_k).split([E, D], dim=-1) if E else (None, q)
        )
        return qv_attention(q_v, v, q_ctx, ctx, decay)

    def make_sdpa():
        mask = None
        if decayed:
            i = torch.arange(T, device=DEVICE, dtype=torch.float32)
            distance = i[:, None] - i
            mask = q.new_empty(1, H, T, T)  # head by head, to spare memory
            for h in range(H):
                mask[0, h] = (-decay[h] * torch.log1p(distance.abs())).masked_fill_(
                    distance < 0, -math.inf
                )
        return lambda: F.scaled_dot_product_attention(
            *heads_first(q, key(), v), attn_mask=mask, is_causal=mask is None
        )

    def make_flex():
        from torch.nn.attention.flex_attention import create_block_mask

        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=DEVICE)
        bias = lambda score, b, h, i, j: score - decay[h] * torch.log1p((i - j).abs().float())
        return lambda: flex_attention()(
            *heads_first(q, key(), v), score_mod=bias if decayed else None, block_mask=mask
        )

    qkv = lambda: F.scaled_dot_product_attention(*heads_first(q, other, v), is_causal=True)
    inputs = [q, v, ctx, w_k] if E else [q, v]
    found = {
        "fused": (lambda: fused, inputs),
        "sdpa": (make_sdpa, inputs),
        "flex": (make_flex, inputs),
    }
    return found if E or decayed else found | {"qkv": (lambda: qkv, [q, other, v])}


def measure_training(make, inputs):
    """Milliseconds forward, and forward + backward, and bytes at the peak of the latter beyond the inputs."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    run = make()
    d_out = torch.randn_like(run())
    both = lambda: torch.autograd.grad(run(), inputs, d_out)
    return timed(run), timed(both), peak_memory(both) - before - d_out.nbytes


def flop(T):
    """Of a forward pass by the usual convention: 4 B H T T D, halved as it is causal. Backward: 2.5 times as many."""
    return 4 * H * TOKENS * T * D / 2


def bench_training(measuring, E):
    """A line per shape and contestant."""
    for T, decayed in product(LENGTHS, (False, True)):
        found = measuring("their inputs", lambda: contestants(T, E, decayed)) or {}
        for name, (make, inputs) in found.items():
            result = measuring(name, lambda: measure_training(make, inputs))
            cells = (
                ["-"] * 3
                if result is None
                else [
                    f"{result[0]:8.3f} ms {flop(T) / result[0] / 1e9:4.0f}",
                    f"{result[1]:8.3f} ms {3.5 * flop(T) / result[1] / 1e9:4.0f}",
                    f"{result[2] / 2**20:7.0f} MiB",
                ]
            )
            print(
                f"T {T:5}  d_ctx {E:3}  decay {'yes' if decayed else 'no ':3}  {name:5} "
                + "  ".join(f"{cell:>16}" for cell in cells),
                flush=True,
            )


# ---------------------------------------------------------------------------------------------------------------------
# Decoding: one token for each of a batch of sequences, all equally long.


def attentions_to_decode(B, S):
    """name: a function without arguments. QV and QV-Ka by the kernel; and QKV by all that PyTorch has for it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, q_ctx, ctx = (
        random(B, 1, DECODE_H, D),
        random(B, 1, DECODE_H, DECODE_E),
        random(B, S, DECODE_E),
    )
    k, v, shared = random(B, S, DECODE_H, D), random(B, S, DECODE_H, D), random(B, S, DECODE_G, D)
    lengths = torch.full((B,), S, device=DEVICE, dtype=torch.int32)
    qkv = heads_first(q, k, v)

    def sdpa(backend):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*qkv)

    backends = (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
    )
    return {
        "QV": lambda: qv_decode(q, v, lengths=lengths),
        "QV-Ka": lambda: qv_decode(q, v, q_ctx, ctx, lengths=lengths),
        "QV, shared": lambda: qv_decode(q, shared, lengths=lengths),
        **{backend.name.lower(): functools.partial(sdpa, backend) for backend in backends},
    }


def bench_decoding(measuring):
    """A line per batch and context."""

    def copying():
        source = torch.empty(2**31 if DEVICE == "cuda" else 2**20, dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        return (
            2 * source.nbytes / timed(lambda: target.copy_(source)) / 1e6
        )  # GB/s, read and written

    bandwidth = measuring("copying", copying)
    if bandwidth is None:
        return
    print(
        f"\ncopy bandwidth {bandwidth:.0f} GB/s; shared: {DECODE_G} values for {DECODE_H} heads\n"
        " batch context          QV us  share       QV-Ka us  share  QV, shared us  share   QKV us (fastest)"
    )
    for B, S in product(BATCHES, CONTEXTS):
        runs = (
            measuring("their inputs", lambda: attentions_to_decode(B, S)) or {}
        )  # 34 GB at the end
        ms = {name: measuring(name, lambda: timed(run)) for name, run in runs.items()}
        row = DECODE_H * D, DECODE_H * D + DECODE_E, DECODE_G * D  # numbers of 16 bits per token
        share = {
            name: ms.get(name) and 2 * B * S * n / ms[name] / 1e6 / bandwidth
            for name, n in zip(("QV", "QV-Ka", "QV, shared"), row)
        }
        qkv = min(((x, name) for name, x in ms.items() if x and name not in share), default=None)
        cells = [
            f"{1000 * ms[name]:8.1f}  {share[name]:5.0%}" if share[name] else "-" for name in share
        ]
        cells += [f"{1000 * qkv[0]:8.1f} ({qkv[1]})" if qkv else "-"]
        print(f"{B:6} {S:7} {cells[0]:>20} {cells[1]:>20} {cells[2]:>20} {cells[3]}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Whole models, as users run them: seconds by the clock, in which the host's time counts.


def measure_model(name, batch, config):
    """By one kernel: seconds of the first compiled training step, milliseconds of the others, MiB at their peak, and
    tokens/s of generation: of one sequence, not compiled."""
    model, idx = (
        GPT(config).to(DEVICE),
        torch.randint(config.vocab_size, (batch, config.block_size), device=DEVICE),
    )
    for block in model.blocks:
        block.attention.kernel = kernel if name == "triton" else None
    optimizer, compiled, n = (
        torch.optim.AdamW(model.parameters()),
        torch.compile(model),
        config.block_size - 1,
    )

    def step():
        optimizer.zero_grad()
        with torch.autocast(DEVICE, DTYPE):
            loss = compiled(idx, idx)[1]
        loss.backward()
        optimizer.step()

    def generate():
        with torch.autocast(DEVICE, DTYPE):
            return sum(1 for _ in model.eval().generate(idx[:1, :1], n))

    first, milliseconds = clock(step), 1000 * min(clock(step) for _ in range(STEPS))
    return (
        first,
        milliseconds,
        peak_memory(step) / 2**20,
        n / min(clock(generate) for _ in range(2)),
    )


def clock(run):
    """Seconds of run(), the host's time included."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def bench_models(seconds):
    """A line per shape, attention, positions and kernel."""
    cases = [*product(SHAPES, ("qv", "qv_ka"), ("rope", "agf"), ("torch", "triton"))]
    measuring = Measuring(len(cases), seconds)
    print("shape attention pos   kernel   first s   step ms  peak MiB  tokens/s")
    for shape, attention, pos, name in cases:
        batch, sizes = SHAPES[shape]
        config = GPTConfig(attention=attention, pos=pos, **sizes)
        result = measuring(name, lambda: measure_model(name, batch, config))
        torch.compiler.reset()
        cells = "".join(f"{x:10.1f}" for x in result) if result else "         -"
        print(f"{shape:5} {attention:9} {pos:5} {name:6}{cells}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------


def benchmark(seconds):
    torch.manual_seed(0)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE
    print(
        f"{device}, torch {torch.__version__}, triton {triton.__version__}; {H} heads of {D}, {TOKENS} tokens\n"
        "forward: ms and TFLOP/s, forward + backward: ms and TFLOP/s, peak memory beyond inputs (and SDPA's mask)"
    )
    warm = random(64, 64).requires_grad_()
    (warm @ warm).sum().backward()  # cuBLAS takes its memory, once
    measuring = Measuring(
        len(LENGTHS) * (9 + 8 * (len(WIDTHS) - 1)) + 1 + 8 * len(BATCHES) * len(CONTEXTS), seconds
    )
    bench_training(measuring, 0)
    bench_decoding(measuring)
    for E in WIDTHS[1:]:
        bench_training(measuring, E)


def main(flags=None):
    parser = new_parser(__doc__, prog="kernel.py")
    parser.add_argument(
        "--compile_report", action="store_true", help="what the compiler makes of the kernels"
    )
    parser.add_argument(
        "--models", action="store_true", help="whole models instead of attention alone"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=480,
        help="after these nothing new is measured (default: 480)",
    )
    args = parser.parse_args(flags)
    if triton is None:
        raise UserError(
            "the kernels need the package triton, which is not installed; model.py does without them"
        )
    if kernel.INTERPRETED:
        raise UserError("TRITON_INTERPRET=1 leaves nothing to compile, or to measure; unset it")
    if torch.cuda.is_available() and not args.compile_report:
        return bench_models(args.seconds) if args.models else benchmark(args.seconds)
    print_compile_report()
    if not torch.cuda.is_available():
        print("the benchmark needs a CUDA GPU, and there is none here")


if __name__ == "__main__":
    run_program(main)

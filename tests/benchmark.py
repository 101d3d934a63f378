"""What kernel.py costs; `python kernel.py` runs this file.

On a GPU: milliseconds, TFLOP/s and peak memory of training shapes, beside what else PyTorch offers for the same attention;
microseconds and share of the copy bandwidth of decoding shapes; the goals that were set, met or missed; assets/kernel.png.
Without one: registers, spills, shared memory and tensor-core instructions in what the compiler makes of each kernel."""

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
from prepare import Parser, Progress, reason  # noqa: E402

DEVICE, DTYPE = "cuda", torch.bfloat16
H, D, TOKENS = 12, 64, 16384                                 # training: heads, their width, tokens in each batch
LENGTHS, WIDTHS = (256, 1024, 4096, 16384), (0, 64, 128)     # ... T and d_ctx
DECODE_H, DECODE_E = 32, 128                                 # decoding: heads, d_ctx of QV-Ka
BATCHES, CONTEXTS = (1, 8, 64), (1024, 4096, 16384, 65536)

# ---------------------------------------------------------------------------------------------------------------------
# What the compiler makes of the kernels, for a GPU that need not be there.


class Absent:
    """Stands in for the driver of a GPU of compute capability arch / 10, as far as compiling needs one."""

    def __init__(self, arch):
        from triton.backends.compiler import GPUTarget
        self.get_current_target = lambda: GPUTarget("cuda", arch, 32)
        self.get_current_device = lambda: arch                                       # one cache of kernels for each
        self.get_current_stream = lambda device: None


def compiled(arch, function, *args, **constants):
    """Compiles a kernel as for a launch with these arguments. A row for the report: registers and spilled bytes of a
    thread, bytes of shared memory, the number of wgmma instructions (Hopper's tensor cores) in the PTX, and of waits for
    them in the machine code, as many as there are instructions where the assembler did not dare to let them overlap."""
    options = kernel.options(function.__name__, args[0][0].dtype, arch // 10, constants)
    binary = function.warmup(*args, **options, grid=(1,))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, spilled = (int(re.search(rf"{name}:(\d+)", dump)[1]) for name in ("REG", "STACK"))
    return dict(kernel=function.__name__, tile=" x ".join(str(options[name]) for name in "MN" if name in options),
                warps=binary.metadata.num_warps, stages=binary.metadata.num_stages, registers=registers, spilled=spilled,
                shared=binary.metadata.shared, wgmma=binary.asm["ptx"].count("wgmma.mma_async"), waits=dump.count("WARPGROUP.DEPBAR"))


def compile_report(arch, D, E, decay, dtype=DTYPE, B=2, T=1024, H=H, G=None, only=""):
    """A row for each kernel of a training step and of a decoding step; arch is 80 (A100) or 90 (H100, H200)."""
    triton.runtime.driver.set_active(Absent(arch))
    rows, empty = [], lambda *shape, dtype=dtype: torch.empty(*shape, dtype=dtype, device="meta")

    def launch(function, grid, *args, **constants):
        if only in function.__name__:
            rows.append(compiled(arch, function, *args, **constants))

    q, v, d_out, lengths = empty(B, T, H, D), empty(B, T, G or H, D), empty(B, T, H, D), empty(B, dtype=torch.int32)
    q_ctx, ctx = (empty(B, T, H, E), empty(B, T, E)) if E else (None, None)
    a = empty(H, dtype=torch.float32) if decay else None
    out, lse = kernel.forward(q, v, q_ctx, ctx, a, launch=launch)
    kernel.backward(d_out, q, v, q_ctx, ctx, a, out, lse, launch=launch)
    kernel.decode(q[:, :1], v, q_ctx[:, :1] if E else None, ctx, a, lengths, launch=launch)
    return [dict(arch=arch, D=D, d_ctx=E, decay="yes" if decay else "no") | row for row in rows]


def print_compile_report():
    form = "{:>4} {:>4} {:>5} {:>5}  {:21} {:>8} {:>5} {:>6} {:>9} {:>7} {:>6} {:>5} {:>5}"
    cases = list(product((80, 90), (64, 128), ((0, False), (0, True), (64, True), (128, True))))
    print(f"""{str(DTYPE).removeprefix('torch.')}; arch 80: A100, 90: H100 and H200; D: head width; d_ctx: 0 is QV, else QV-Ka; tile: queries x tokens;
registers and spilled bytes of a thread; bytes of shared memory; wgmma: instructions for Hopper's tensor cores (decoding
takes mma, and so few heads at once that a row of their values is 256 wide, whatever D); waits: for them, the fewer the better
""")
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
    events, cold, cycles = [], torch.zeros(2**26, device=DEVICE), 2**22              # cycles: about two milliseconds
    run()                                                                            # compiles
    while len(events) < repeat + 3:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cold.sum()
        torch.cuda._sleep(cycles)
        start.record()
        run()
        end.record()
        if start.query() and cycles < 2**28:                                         # it woke too early: longer, and again
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
        except Exception as error:                                                   # whatever a rival can think of
            print(f"    {name}: {type(error).__name__}: {reason(error)[:90]}", flush=True)
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
    return [x.transpose(1, 2) for x in tensors]                                      # (B, T, H, D) -> (B, H, T, D), views


@functools.cache
def flex_attention():
    from torch.nn.attention.flex_attention import flex_attention                     # slow to import

    for limit in "recompile_limit", "cache_size_limit":                              # it is compiled anew for each shape
        if hasattr(torch._dynamo.config, limit):
            setattr(torch._dynamo.config, limit, 64)
    return torch.compile(flex_attention, dynamic=False)


def contestants(T, E, decayed):
    """At one shape, name: (make, inputs). make() brings what is made once, such as a mask, and returns the attention to
    be timed, a function without arguments, whose result (B, T, H, D) or (B, H, T, D) has gradients for the inputs."""
    B = TOKENS // T
    q, v, other = (random(B, T, H, D).requires_grad_() for _ in range(3))
    ctx, w_k = (random(B, T, E).requires_grad_(), (random(H, E + D, D) / 8).requires_grad_()) if E else (None, None)
    decay = torch.logspace(-2, 2, H, base=2, device=DEVICE) if decayed else None

    def key():
        if not E:
            return v
        return torch.einsum("bse,hed->bshd", ctx, w_k[:, :E]) + torch.einsum("bshc,hcd->bshd", v, w_k[:, E:])

    def fused():
        q_ctx, q_v = torch.einsum("bthd,hcd->bthc", q, w_k).split([E, D], dim=-1) if E else (None, q)
        return qv_attention(q_v, v, q_ctx, ctx, decay)

    def make_sdpa():
        mask = None
        if decayed:
            i = torch.arange(T, device=DEVICE, dtype=torch.float32)
            distance = i[:, None] - i
            mask = q.new_empty(1, H, T, T)                                           # head by head, to spare memory
            for h in range(H):
                mask[0, h] = (-decay[h] * torch.log1p(distance.abs())).masked_fill_(distance < 0, -math.inf)
        return lambda: F.scaled_dot_product_attention(*heads_first(q, key(), v), attn_mask=mask, is_causal=mask is None)

    def make_flex():
        from torch.nn.attention.flex_attention import create_block_mask
        block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=DEVICE)
        bias = lambda score, b, h, i, j: score - decay[h] * torch.log1p((i - j).abs().float())
        return lambda: flex_attention()(*heads_first(q, key(), v), score_mod=bias if decayed else None, block_mask=block_mask)

    qkv = lambda: F.scaled_dot_product_attention(*heads_first(q, other, v), is_causal=True)
    inputs = [q, v, ctx, w_k] if E else [q, v]
    found = {"fused": (lambda: fused, inputs), "sdpa": (make_sdpa, inputs), "flex": (make_flex, inputs)}
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
    """Of a forward pass by the usual convention: 4 B H T T D, halved because it is causal. Backward: 2.5 times as many."""
    return 4 * H * TOKENS * T * D / 2


def bench_training(measuring, E):
    """A line per shape and contestant. Returns {(T, d_ctx, decayed, name): (forward ms, both ms, bytes), or None}."""
    results = {}
    for T, decayed in product(LENGTHS, (False, True)):
        found = measuring("their inputs", lambda: contestants(T, E, decayed)) or {}
        for name, (make, inputs) in found.items():
            result = results[T, E, decayed, name] = measuring(name, lambda: measure_training(make, inputs))
            cells = ["-"] * 3 if result is None else [
                f"{result[0]:8.3f} ms {flop(T) / result[0] / 1e9:4.0f}",
                f"{result[1]:8.3f} ms {3.5 * flop(T) / result[1] / 1e9:4.0f}", f"{result[2] / 2**20:7.0f} MiB"]
            print(f"T {T:5}  d_ctx {E:3}  decay {'yes' if decayed else 'no ':3}  {name:5} "
                  + "  ".join(f"{cell:>16}" for cell in cells), flush=True)
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Decoding: one token for each of a batch of sequences, all equally long.


def attentions_to_decode(B, S):
    """name: a function without arguments. QV and QV-Ka by the kernel; and QKV by all that PyTorch has for it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, q_ctx, ctx = random(B, 1, DECODE_H, D), random(B, 1, DECODE_H, DECODE_E), random(B, S, DECODE_E)
    k, v = random(B, S, DECODE_H, D), random(B, S, DECODE_H, D)
    lengths = torch.full((B,), S, device=DEVICE, dtype=torch.int32)
    qkv = heads_first(q, k, v)

    def sdpa(backend):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*qkv)

    backends = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION
    return {"QV": lambda: qv_decode(q, v, lengths=lengths), "QV-Ka": lambda: qv_decode(q, v, q_ctx, ctx, lengths=lengths),
            **{backend.name.lower(): functools.partial(sdpa, backend) for backend in backends},
            "flex_attention": lambda: flex_attention()(*qkv)}


def bench_decoding(measuring):
    """A line per batch and context. Returns {(B, S): (share of the copy bandwidth that QV has, times as fast as QKV)}."""
    def copying():
        source = torch.empty(2**31 if DEVICE == "cuda" else 2**20, dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        return 2 * source.nbytes / timed(lambda: target.copy_(source)) / 1e6         # GB/s, read and written

    bandwidth = measuring("copying", copying)
    if bandwidth is None:
        return {}
    print(f"\ncopy bandwidth {bandwidth:.0f} GB/s\n batch context          QV us  share       QV-Ka us  share   QKV us (fastest)")
    results = {}
    for B, S in product(BATCHES, CONTEXTS):
        runs = measuring("their inputs", lambda: attentions_to_decode(B, S)) or {}   # 34 GB at the end
        ms = {name: measuring(name, lambda: timed(run)) for name, run in runs.items()}
        remembered = 2 * B * S * DECODE_H * D                                        # bytes of V in 16 bits
        share = {name: ms.get(name) and nbytes / ms[name] / 1e6 / bandwidth
                 for name, nbytes in (("QV", remembered), ("QV-Ka", remembered + 2 * B * S * DECODE_E))}
        qkv = min(((x, name) for name, x in ms.items() if x and name not in share), default=None)
        results[B, S] = share["QV"], ms.get("QV") and qkv and qkv[0] / ms["QV"]
        cells = [f"{1000 * ms[name]:8.1f}  {share[name]:5.0%}" if share[name] else "-" for name in share]
        cells += [f"{1000 * qkv[0]:8.1f} ({qkv[1]})" if qkv else "-"]
        print(f"{B:6} {S:7} {cells[0]:>20} {cells[1]:>20} {cells[2]}", flush=True)
    return results


# ---------------------------------------------------------------------------------------------------------------------
# The verdict.


def print_goals(training, decoding):
    """What was hoped for on an H200, what was measured, and whether that is enough; a missing figure misses."""
    def goal(text, figures, least, form="{:.2f}"):
        figures = list(figures)
        met = bool(figures) and all(x is not None and x >= least for x in figures)
        print(f"{'met' if met else 'missed':6}  {text} >= {form.format(least)}: "
              + (", ".join("-" if x is None else form.format(x) for x in figures) or "-"))

    def ratios(E, decayed, rival, i):
        for T in LENGTHS:
            ours, theirs = training.get((T, E, decayed, "fused")), training.get((T, E, decayed, rival))
            yield theirs[i] / ours[i] if ours and theirs else None

    print()
    goal("QV, forward + backward, times as fast as flex_attention, by T", ratios(0, False, "flex", 1), 1)
    ours = training.get((4096, 0, False, "fused"))
    goal("QV, forward TFLOP/s at T = 4096", [ours and flop(4096) / ours[0] / 1e9], 300, "{:.0f}")
    goal("QV with decay, forward + backward, times as fast as SDPA with a mask, by T", ratios(0, True, "sdpa", 1), 3)
    for E in WIDTHS:
        measured = all(training.get((T, E, decayed, "fused")) for T in LENGTHS for decayed in (False, True))
        least = [x for decayed in (False, True) for rival in ("sdpa", "flex") for x in ratios(E, decayed, rival, 2) if x]
        goal(f"rivals' peak memory / ours, the least of all at d_ctx = {E}", [min(least, default=None) if measured else None], 1)
    large = [x for (B, S), x in decoding.items() if B * S >= 2**18]
    goal("QV decoding, share of copy bandwidth from 256k tokens on", (x[0] for x in large), 0.85, "{:.0%}")
    goal("QV decoding, times as fast as the fastest QKV there", (x[1] for x in large), 1.7)


def draw(training, decoding, path):
    """Two panels of training speed over T, without and with decay, and one of decoding speed over context."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    labels = dict(fused="fused (kernel.py)", sdpa="SDPA", flex="flex_attention", qkv="QKV by SDPA")
    for axis, decayed in zip(axes, (False, True)):
        for name, label in labels.items():
            points = {T: 3.5 * flop(T) / x[1] / 1e9 for (T, E, d, n), x in training.items() if (E, d, n) == (0, decayed, name) and x}
            if points:
                axis.plot([*points], [*points.values()], "o-", label=label)
        axis.set(title=f"QV {'with' if decayed else 'without'} decay, forward + backward", xlabel="T", ylabel="TFLOP/s")
    for B in BATCHES:
        points = {S: x[1] for (b, S), x in decoding.items() if b == B and x[1]}
        axes[2].plot([*points], [*points.values()], "o-", label=f"batch {B}")
    axes[2].axhline(2, color="gray", linewidth=0.8, label="half the bytes")
    axes[2].set(title="Decoding: QV against the fastest QKV", xlabel="context", ylabel="times as fast")
    for axis, sizes in zip(axes, (LENGTHS, LENGTHS, CONTEXTS)):
        axis.set(xlim=(sizes[0] / 1.3, sizes[-1] * 1.3), ylim=0)
        axis.set_xscale("log", base=2)
        axis.legend()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"drew {path}")


def benchmark(seconds, path):
    torch.manual_seed(0)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}; {str(DTYPE).removeprefix('torch.')}, {H} heads of {D}, "
          f"{TOKENS} tokens\nforward: ms and TFLOP/s, forward + backward: ms and TFLOP/s, peak memory beyond inputs (of SDPA with decay, its mask, too)")
    warm = random(64, 64).requires_grad_()
    (warm @ warm).sum().backward()                                                   # cuBLAS takes its memory, once
    measuring = Measuring(len(LENGTHS) * (9 + 8 * (len(WIDTHS) - 1)) + 1 + 7 * len(BATCHES) * len(CONTEXTS), seconds)
    training = bench_training(measuring, 0)
    decoding = bench_decoding(measuring)
    for E in WIDTHS[1:]:
        training |= bench_training(measuring, E)
    print_goals(training, decoding)
    if any(training.values()):                                                       # else an older picture stays
        draw(training, decoding, path)


def main(flags=None):
    parser = Parser(__doc__, prog="kernel.py")
    parser.add_argument("--compile_report", action="store_true", help="what the compiler makes of the kernels, also where there is a GPU")
    parser.add_argument("--seconds", type=float, default=480, help="after so long nothing new is measured (default: 480)")
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "kernel.png", help="the picture (default: assets/kernel.png)")
    args = parser.parse_args(flags)
    if triton is None:
        sys.exit("The kernels need the package triton, which is not installed; model.py does without them.")
    if kernel.INTERPRETED:
        sys.exit("TRITON_INTERPRET=1 leaves nothing to compile, or to measure; unset it.")
    if torch.cuda.is_available() and not args.compile_report:
        return benchmark(args.seconds, args.out)
    print_compile_report()
    if not torch.cuda.is_available():
        print("The benchmark needs a CUDA GPU, and there is none here.")


if __name__ == "__main__":
    main()

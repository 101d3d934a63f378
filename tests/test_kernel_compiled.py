"""kernel.py compiled ahead of time for GPUs that need not be there, and where it cannot run: in
processes of their own beside the other tests, in which nothing is interpreted."""

import json

import pytest
from conftest import BESIDE
from kernel_helpers import CUDA, runs

import kernel

pytestmark = runs

REFUSED = """
import runpy, sys, torch

def refused():
    x = torch.zeros(1, 1, 1, 16)
    try:
        runpy.run_path("kernel.py")["attention"](x, x)
    except ValueError as error:
        print(error)

import triton
refused()
triton.__version__ = "3.2.0"
refused()
sys.modules["triton"] = None
refused()
"""
# A row for every kernel in bf16, for A100 and H100: plain, and with extras at two widths; with few
# and with many heads to a value; for one token and one head, and for lengths without a factor of
# 16. And how many variants were compiled.
REPORT = """
import json, sys
import benchmark, kernel

FORMS = (64, False, 0, False), (64, True, 32, True), (64, False, 128, True), (128, True, 0, True)
rows, variants = [], []
for arch in 80, 90:
    for form in FORMS:
        rows += benchmark.compile_report(arch, *form)
    for sizes in dict(T=1, H=1), dict(T=1000, H=12), dict(T=1, H=12):
        rows += benchmark.compile_report(arch, 64, False, 128, True, **sizes)
    for G in 4, 1:
        sizes = dict(T=1000, H=32, G=G)
        rows += benchmark.compile_report(arch, 128, False, 128, True, **sizes, only="decode_kernel")
    for compiled in kernel.forward_kernel, kernel.token_backward_kernel:
        variants.append(len(compiled.device_caches[arch][0]))
print(json.dumps([rows, variants]))
"""
USAGE = """
import runpy, sys
sys.argv = ["kernel.py", "--help"]
runpy.run_path("kernel.py", run_name="__main__")
"""
if kernel.triton:
    BESIDE.update(report=REPORT, refused=REFUSED, help=USAGE)


def test_what_cannot_run_is_said(answer):
    """Importing works, calling does not, and nothing else steps in."""
    here, old, without = answer("refused").splitlines()
    assert CUDA or "q.device=cpu: it should be a CUDA device" in here
    assert old == (
        "the fused kernel needs the package triton, 3.4 or newer, and 3.2.0 is installed; "
        "model.py does without"
    )
    assert "and none is installed" in without


def test_the_kernels_own_program_is_the_benchmark(answer):
    assert "usage: kernel.py" in answer("help")


@pytest.fixture(scope="module")
def report(answer):
    rows, variants = json.loads(answer("report"))
    return dict(rows=rows, variants=variants)


@pytest.mark.parametrize("arch", [80, 90])
def test_every_kernel_compiles_and_fits(arch, report):
    rows = [row for row in report["rows"] if row["arch"] == arch]
    assert {row["kernel"] for row in rows} == set(kernel.KERNELS)
    for row in rows:
        # What a program may have of the shared memory of an sm_86 and of an sm_90.
        assert row["shared"] <= (99 if arch == 80 else 227) * 1024
        assert row["registers"] > 0 and row["spilled"] == 0, row


def test_no_length_is_reason_to_compile_anew(report):
    """Four forms were compiled for each GPU, for 1, 1000 and 1024 tokens, and 1 and 12 heads."""
    assert report["variants"] == 4 * [4]


def test_hopper_multiplies_by_wgmma(report):
    """At least one instruction for each product of tiles, in both loops of a kernel; and several
    go on at once."""
    products = dict(forward=(2, 3), query_backward=(3, 5), token_backward=(4, 6))
    for row in report["rows"]:
        if row["arch"] == 90 and row["kernel"] in products:
            assert row["wgmma"] >= 2 * products[row["kernel"]][row["E"] > 0], row
            assert row["waits"] < row["wgmma"] / 2, row

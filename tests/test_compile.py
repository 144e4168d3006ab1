"""Every kernel compiles for GPUs that need not be there, in every configuration it may be tuned to.

What a compiler knows and an interpreter does not: registers that spill to memory, shared memory
beyond the chip's, and whether Hopper's own matrix instruction (wgmma) is used.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SHARED = {90: 232_448, 80: 166_912}  # bytes a program may have


def modules(table):
    """The test modules that have such a table of calls."""
    paths = sorted(Path(__file__).parent.glob("test_kernel_*.py"))
    return [path.stem for path in paths if f"\n{table} = " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize("module", modules("COMPILE"))
def test_compiles_without_spills(module, capability):
    compiles(module, capability, "COMPILE")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize("module", modules("COMPILE_MORE"))
def test_every_kind_compiles_without_spills(module, capability):
    compiles(module, capability, "COMPILE_MORE")


def compiles(module, capability, table):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "compile_kernels.py", str(capability), table, module],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert kernels
    with_wgmma = getattr(importlib.import_module(module), "WGMMA", set())
    for k in kernels:
        assert k["compiles"], k
        assert k["spilled"] == 0, k
        assert k["shared"] <= SHARED[capability], k
        if capability == 90 and k["kernel"] in with_wgmma and "fp32" not in k["label"]:
            assert k["wgmma"], k

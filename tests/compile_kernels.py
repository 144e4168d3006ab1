"""Compile every launch of every kernel for a GPU that is not there, and print what came out.

Usage: python tests/compile_kernels.py 90 COMPILE test_kernel_norm [test_kernel_... ...]

Each named test module has COMPILE (and perhaps COMPILE_MORE, which takes minutes), a table label →
function that calls the public Triton functions on tensors of a realistic size. Here a launch is
compiled instead of run, once for every autotune configuration, for the compute capability given
(90: Hopper, 80: Ampere). One JSON line for each: label, kernel, configuration, registers, spilled
bytes, shared bytes, whether wgmma is used.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.autotuner import Autotuner  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from kernels import launch  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class AbsentGPU:
    """Just enough of a driver for the compiler."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def main(capability: int, table: str, modules: list[str]) -> None:
    triton.runtime.driver.set_active(AbsentGPU(capability))
    launch.DEVICES = {"cpu", "cuda"}
    launch.has_tma = lambda device: capability >= 90
    run = JITFunction.run
    label, seen = "", set()

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        options = {k: v for k, v in kwargs.items() if isinstance(v, int | str | bool)}
        key = (kernel.hash, label)
        if key not in seen:
            seen.add(key)
            print(json.dumps({"label": label, "kernel": self.__name__, "options": options,
                              "compiles": True, **facts(kernel)}), flush=True)  # fmt: skip

    def every_configuration(self, *args, **kwargs):
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(kwargs):
            settings = {**kwargs, **config.all_kwargs()}
            if config.pre_hook is not None:
                config.pre_hook({**self.nargs, **settings})
            try:
                self.fn.run(*args, **settings)
            except Exception as error:
                failed = {"label": label, "kernel": self.base_fn.__name__, "compiles": False}
                options = config.all_kwargs()
                print(json.dumps({**failed, "options": options, "error": str(error)[-400:]}))

    JITFunction.run, Autotuner.run = compile_only, every_configuration
    for module in modules:
        for label, call in getattr(importlib.import_module(module), table).items():  # noqa: B007
            call()


def facts(kernel) -> dict:
    """What the compiler says of a kernel: registers, stack and local bytes, shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True)
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr))
    return {
        "registers": int(usage["REG"]),
        "spilled": int(usage["STACK"]) + int(usage["LOCAL"]),
        "shared": kernel.metadata.shared,
        "wgmma": "wgmma.mma_async" in kernel.asm["ptx"],
    }


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])

"""What all Triton kernels here share: where they may run, how they are tuned, what they refuse.

Each file of kernels/ holds an operation as `f_obvious` (torch, the oracle), `f_triton` (the same
signature, value and gradients, by hand) and `f`, which looks at the tensor's device only: Triton on
CUDA, torch elsewhere. On a machine without a GPU, `f_triton` runs in Triton's interpreter if
TRITON_INTERPRET=1 was set before Python started (the tests do); otherwise it refuses.

Papers: Tillet et al. 2019, Triton (https://doi.org/10.1145/3315508.3329973).
"""

import os

import torch
from torch import Tensor


class Missing:
    """Stands in for Triton where it does not exist, so that the files can be read by Python.

    Every attribute, call and index gives the stand-in again; `check` refuses before a launch.
    """

    def __getattr__(self, name):
        return self

    __call__ = __getitem__ = __or__ = __ror__ = lambda self, *args, **kwargs: self


try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton is for Linux
    triton = tl = TensorDescriptor = Missing()

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
LOG2E = tl.constexpr(1.4426950408889634)
DEVICES = {"cuda", "cpu"} if INTERPRETED else {"cuda"}  # where a kernel may be launched


def autotune(configs: list, key: list[str], interpreted: dict, **how):
    """triton.autotune, but the interpreter, which has no time to measure, takes `interpreted`.

    Its blocks are small, so that few numbers already make ragged, masked and several blocks.
    An argument that no line of a kernel reads is there for `key`, or to prune configurations.
    """
    if INTERPRETED:
        configs, how = [triton.Config(interpreted, pre_hook=configs[0].pre_hook)], {}
    return triton.autotune(configs, key, **how)


def check(function: str, dtypes: tuple[torch.dtype, ...] = FLOATS, **tensors: Tensor) -> None:
    """ValueError, one sentence, unless Triton can take these tensors: their device and dtype."""
    if isinstance(triton, Missing):
        raise ValueError(
            f"{function}: Triton is not installed (it exists for Linux); use the version without "
            "_triton"
        )
    first, device = next((name, x.device) for name, x in tensors.items())
    for name, x in tensors.items():
        if x.device != device:
            raise ValueError(f"{function}: {name} is on {x.device}, but {first} on {device}")
        if x.device.type not in DEVICES:
            raise ValueError(
                f"{function}: {name} is on {x.device}; Triton needs CUDA, "
                "or TRITON_INTERPRET=1 set before Python starts"
            )
        if x.dtype not in dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise ValueError(f"{function}: {name} is {x.dtype}; supported are {names}")
        if INTERPRETED and x.dtype == torch.bfloat16:
            raise ValueError(
                f"{function}: {name} is bfloat16, whose arithmetic Triton's interpreter gets "
                "wrong; use float32 or float16 there"
            )


def processors(device: torch.device) -> int:
    """How many programs run side by side: the GPU's multiprocessors; 3 in the interpreter."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def has_tma(device: torch.device) -> bool:
    """Whether the hardware copies tiles by itself: Hopper and newer (the interpreter plays one)."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n."""
    return 1 << max(0, n - 1).bit_length()

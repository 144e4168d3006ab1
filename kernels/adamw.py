"""AdamW for all tensors of a model in one launch.

An update reads p, g, m, v and writes p, m, v: 28 bytes per weight in fp32, and time is these bytes.
A model has hundreds of tensors, most of them small, so a launch for each would cost more than its
bytes. Here a table tells each program its tensor and its chunk of it, and a second table where that
tensor's four arrays lie.

Papers: Loshchilov and Hutter 2019, decoupled decay (arXiv 1711.05101, algorithm 2).
"""

import math

import torch
from torch import Tensor

from kernels import launch
from kernels.launch import tl, triton

BLOCK = 1024  # weights at a time: 4 warps, each thread 2 loads of 16 bytes from each of four arrays
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
CHUNK = 8 * BLOCK  # weights of a program, whose start costs two dependent reads of tables


@torch.no_grad()
def adamw_obvious(
    params: list[Tensor], grads: list[Tensor], ms: list[Tensor], vs: list[Tensor],
    t: int, lr: float, decays: list[float], beta1: float, beta2: float, eps: float,
    scale: float | Tensor = 1.0,
) -> None:  # fmt: skip
    """Update t = 1, 2, … of every tensor in place, with g ← scale · gradient:

    m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)g²,  p ← p − lr·(m̂ / (√v̂ + ε) + decay·p),
    with m̂ = m/(1−β₁ᵗ) and v̂ = v/(1−β₂ᵗ). A scale in a tensor clips without waiting for the GPU.
    """
    for p, g, m, v, decay in zip(params, grads, ms, vs, decays, strict=True):
        g = g.to(p.dtype) * scale
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = v.sqrt().div_(math.sqrt(1 - beta2**t)).add_(eps)
        p.mul_(1 - lr * decay).addcdiv_(m, root, value=-lr / (1 - beta1**t))


@triton.jit
def array(Pointers, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The array whose address stands in a table; with ALIGNED it starts at a multiple of 16."""
    address = tl.load(Pointers).to(tl.pointer_type(dtype))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def move(
    P, G, M, V, start, size, decay, step, lr, root, beta1, rest1, beta2, rest2, eps, scale,
    BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The update of BLOCK weights; unmasked where it can be, since a mask splits the loads."""
    i = start + tl.arange(0, BLOCK)
    there = i < size if MASKED else tl.full([BLOCK], True, tl.int1)
    g = tl.load(G + i, there, other=0.0).to(tl.float32) * scale
    m = beta1 * tl.load(M + i, there, other=0.0) + rest1 * g
    v = beta2 * tl.load(V + i, there, other=0.0) + rest2 * g * g
    p = tl.load(P + i, there, other=0.0) * (1 - lr * decay)
    tl.store(M + i, m, there)
    tl.store(V + i, v, there)
    tl.store(P + i, p - step * m / (tl.sqrt(v) * root + eps), there)


@triton.jit
def adamw_kernel(
    Pointers, Sizes, Decays, Chunks, Scale, tensors,
    step, lr, root, beta1, rest1, beta2, rest2, eps, scale,
    GRADIENT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One chunk of one tensor. step = lr/(1−β₁ᵗ), root = 1/√(1−β₂ᵗ), restᵢ = 1−βᵢ."""
    chunk = Chunks + 2 * tl.program_id(0)
    which = tl.load(chunk)
    first = tl.multiple_of(tl.load(chunk + 1), 16)
    size = tl.load(Sizes + which)
    decay = tl.load(Decays + which)
    P = array(Pointers + which, tl.float32, ALIGNED)
    G = array(Pointers + which + tensors, GRADIENT, ALIGNED)
    M = array(Pointers + which + 2 * tensors, tl.float32, ALIGNED)
    V = array(Pointers + which + 3 * tensors, tl.float32, ALIGNED)
    if Scale is not None:
        scale *= tl.load(Scale).to(tl.float32)
    last = tl.minimum(first + CHUNK, size)
    full = first + (last - first) // BLOCK * BLOCK
    for start in range(first, full, BLOCK):
        move(P, G, M, V, start, size, decay, step, lr, root, beta1, rest1, beta2, rest2, eps,
             scale, BLOCK, False)  # fmt: skip
    if full < last:
        move(P, G, M, V, full, size, decay, step, lr, root, beta1, rest1, beta2, rest2, eps,
             scale, BLOCK, True)  # fmt: skip


class Table:
    """Where a set of tensors lies, on their device. An optimizer keeps one from step to step.

    The chunks are cut once; addresses are sent again when a tensor has moved, as gradients do.
    """

    def __init__(self):
        self.cut = self.placed = None  # what the tables on the device were made from

    def refresh(self, params, grads, ms, vs, decays) -> None:
        arrays = [*params, *grads, *ms, *vs]
        device = params[0].device
        cut = device, list(decays), [x.shape for x in arrays]
        placed = [x.data_ptr() for x in arrays], [g.dtype for g in grads]
        if (cut, placed) == (self.cut, self.placed):
            return
        verify(params, grads, ms, vs, decays)
        if cut != self.cut:
            sizes = [p.numel() for p in params]
            chunks = [(i, s) for i, size in enumerate(sizes) for s in range(0, size, CHUNK)]
            self.chunks = torch.tensor(chunks, dtype=torch.int64).to(device)
            self.sizes = torch.tensor(sizes, dtype=torch.int64).to(device)
            self.decays = torch.tensor(decays, dtype=torch.float32).to(device)
        self.pointers = torch.tensor(placed[0], dtype=torch.int64).to(device, non_blocking=True)
        self.aligned = all(pointer % 16 == 0 for pointer in placed[0])
        self.cut, self.placed = cut, placed


def verify(params, grads, ms, vs, decays) -> None:
    """ValueError, one sentence, unless the kernel can take these lists."""
    lists = {"params": params, "grads": grads, "ms": ms, "vs": vs}
    if {len(x) for x in (*lists.values(), decays)} != {len(params)}:
        raise ValueError("adamw_triton: params, grads, ms, vs and decays must be equally long")
    named = {f"{name}[{i}]": x for name in lists for i, x in enumerate(lists[name])}
    gradients = {name: x for name, x in named.items() if name.startswith("grads")}
    others = {name: x for name, x in named.items() if name not in gradients}
    launch.check("adamw_triton", (torch.float32,), **others)
    for name, g in gradients.items():
        if g.dtype != grads[0].dtype or g.dtype not in launch.FLOATS:
            raise ValueError(
                f"adamw_triton: {name} is {g.dtype}, but grads[0] {grads[0].dtype}; supported are "
                "gradients that are all float32, float16 or bfloat16"
            )
        if g.device != params[0].device:
            raise ValueError(f"adamw_triton: {name} is on {g.device}, not where params are")
    for (name, x), p in zip(named.items(), 4 * list(params), strict=True):
        if x.shape != p.shape or not x.is_contiguous():
            raise ValueError(
                f"adamw_triton: {name} is {tuple(x.shape)} with strides {x.stride()}; it must be "
                f"contiguous and have its parameter's shape {tuple(p.shape)}"
            )


def adamw_triton(
    params: list[Tensor], grads: list[Tensor], ms: list[Tensor], vs: list[Tensor],
    t: int, lr: float, decays: list[float], beta1: float, beta2: float, eps: float,
    scale: float | Tensor = 1.0, table: Table | None = None,
) -> None:  # fmt: skip
    """`adamw_obvious` in one launch; `table` saves building the tables in every step."""
    if not params:
        return
    grads = [g.contiguous() for g in grads]
    table = table or Table()
    table.refresh(params, grads, ms, vs, decays)
    factor, scale = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
    if len(table.chunks):
        adamw_kernel[(len(table.chunks),)](
            table.pointers, table.sizes, table.decays, table.chunks, factor, len(params),
            lr / (1 - beta1**t), float(lr), 1 / math.sqrt(1 - beta2**t),
            float(beta1), 1.0 - beta1, float(beta2), 1.0 - beta2, float(eps), scale,
            GRADIENT=TYPES[grads[0].dtype], ALIGNED=table.aligned, BLOCK=BLOCK, CHUNK=CHUNK,
        )  # fmt: skip

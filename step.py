"""One update: from micro-batches to gradients to new weights, and what the machine makes of it.

Idea: the loss of a step is the sum over all its tokens divided by their number, however they are
cut into micro-batches; then one clip of the whole gradient, then one move of the optimizer.

Run: python -m pytest tests/test_step.py

Papers: Pascanu et al. 2013, clipping (arXiv 1211.5063); Micikevicius et al. 2018, mixed precision
(arXiv 1710.03740); Kalamkar et al. 2019, bfloat16 (arXiv 1905.12322).
"""

import os
import platform
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from kernels.cross_entropy import cross_entropy
from kernels.mask import Mask
from model import Transformer
from objectives import IGNORE, Batch
from run import UserError

# --- the update -----------------------------------------------------------------------------------


def loss_sum(model: Transformer, batch: Batch, dtype: torch.dtype | None = None) -> Tensor:
    """Σ −log p(target) over the batch, in nats."""
    memory = crossed = None
    if batch.source is not None:
        seen = Mask(batch.source_lo, batch.source_hi)
        memory = model.encode(batch.source, seen, dtype=dtype)
        crossed = Mask(batch.cross_lo, batch.cross_hi)
    mask = Mask(batch.lo, batch.hi)
    hidden = model(batch.inputs, mask=mask, dtype=dtype, memory=memory, cross_mask=crossed)
    return cross_entropy(hidden.flatten(0, 1), model.head_weight, batch.targets.flatten())


def accumulate(
    model: Transformer, batches: list[Batch], dtype: torch.dtype | None = None
) -> tuple[float, int]:
    """Add the gradient of the mean loss over all tokens of all batches; (that loss, their number).

    The mean is over tokens, not over batches: one with few targets weighs little.
    """
    tokens = sum(int((batch.targets != IGNORE).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = loss_sum(model, batch, dtype) / max(1, tokens)
        loss.backward()
        total += loss.item()
    return total, tokens


def clip_by_norm(parameters: Iterable[Tensor], largest: float) -> float:
    """g ← g · min(1, largest/‖g‖), all gradients as one; returns ‖g‖ (Pascanu et al., alg. 1).

    largest = 0 clips nothing.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(g) for g in grads])
    ).item()
    if 0 < largest < norm:
        for g in grads:
            g.mul_(largest / norm)
    return norm


def update(
    model: Transformer, batches: list[Batch], optimizer, lr: float, clip: float,
    dtype: torch.dtype | None = None,
) -> tuple[float, int, float]:  # fmt: skip
    """One step: (mean loss in nats per token, tokens, gradient norm before clipping)."""
    for p in model.parameters():
        p.grad = None
    loss, tokens = accumulate(model, batches, dtype)
    norm = clip_by_norm(model.parameters(), clip)
    optimizer.step(lr)
    return loss, tokens, norm


@torch.no_grad()
def evaluate(
    model: Transformer, batches: Iterable[Batch], dtype: torch.dtype | None = None
) -> tuple[float, int]:
    """(Σ −log p(target) in nats, number of targets) over all batches."""
    nats, tokens = 0.0, 0
    for batch in batches:
        nats += loss_sum(model, batch, dtype).item()
        tokens += int((batch.targets != IGNORE).sum())
    return nats, tokens


def to(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(field.to(device, non_blocking=True) for field in batch))


# --- the machine ----------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA if there is one, else Apple's MPS, else the CPU."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, found in there.items() if found)
    if not there.get(name):
        found = " or ".join(kind for kind in there if there[kind])
        raise UserError(f"--device {name}: this machine has no such device, only {found}")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the processor multiplies it natively, else float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        pays = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        pays = device.type == "cpu" and bool({"avx512_bf16", "amx_bf16"} & cpu_flags())
    return torch.bfloat16 if pays else torch.float32


def check_memory(needed: int, device: torch.device) -> None:
    """UserError if a device has not so many bytes; on a CPU the system would kill the process."""
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if needed > there:
        raise UserError(
            f"this takes at least {needed / 1e9:,.1f} GB of memory, and {device.type} has "
            f"{there / 1e9:,.1f} GB: choose smaller sizes"
        )


def cpu_flags() -> set[str]:
    """The processor's capability flags, as Linux names them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), []))


def machine(device: torch.device) -> str:
    """The machine in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """How fast a large product of matrices runs here and now, in FLOP/s: the best of several."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def commit() -> str:
    """The commit that this code is, or an empty string."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
            cwd=Path(__file__).parent, timeout=5,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()

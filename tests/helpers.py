"""What several test files draw from and compare with."""

import mmap
import random
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st

seeds = st.integers(0, 2**31 - 1)
NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python names from 3.13 on


def normals(
    seed: int, *shapes: tuple[int, ...], dtype=torch.float64, device="cpu"
) -> list[torch.Tensor]:
    """Normal tensors of the given shapes, each with a gradient; the same on every device."""
    rng = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=rng, dtype=torch.float64).to(device, dtype).requires_grad_()
        for shape in shapes
    ]


def array(x: torch.Tensor) -> np.ndarray:
    x = x.detach().cpu()
    return x.double().numpy() if x.is_floating_point() else x.numpy()


def assert_close(got, want, bound: float = 1e-12) -> None:
    """|got − want| ≤ bound · max(1, |want|) everywhere, and no NaN."""
    got, want = (array(x) if isinstance(x, torch.Tensor) else np.asarray(x) for x in (got, want))
    assert got.shape == want.shape
    error = np.abs(got - want) / np.maximum(1, np.abs(want))
    assert not error.size or error.max() <= bound, f"off by {error.max():.2e}, allowed {bound:.0e}"


# --- laws of kernels ------------------------------------------------------------------------------

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def on_device(x):
    """A tensor of the CPU on DEVICE, where kernels run; anything else as it is."""
    return x.to(DEVICE) if isinstance(x, torch.Tensor) and x.device.type == "cpu" else x


LOW = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]  # see kernels/launch.py


def results(function, inputs, *rest, **options) -> list[torch.Tensor]:
    """What a function gives, then the gradient of each input that asks for one.

    The gradient is that of Σ out · w for each output, with the same random w in every dtype, in a
    layout that depends on its shape.
    """
    outs = function(*inputs, *rest, **options)
    outs = [outs] if isinstance(outs, torch.Tensor) else list(outs)
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    kept = [out for out in outs if out.requires_grad]
    if not wanted:
        return [out.detach() for out in outs]
    drawn = normals(7, *(out.shape for out in kept))
    pairs = zip(drawn, kept, strict=True)
    weights = [strided(w.detach().to(out), sum(w.shape) % LAYOUTS) for w, out in pairs]
    grads = torch.autograd.grad(kept, wanted, weights)
    return [out.detach() for out in outs] + list(grads)


def assert_as_good_as_torch(fast, obvious, inputs, *rest, **options) -> None:
    """`fast` is within twice the error that `obvious` itself makes in the inputs' precision.

    The truth is `obvious` in float64 on the same rounded inputs. Added are one rounding of the
    largest element, and 1e-6 for fp32 sums in another order, because in a few numbers torch may be
    right by luck. Memory that `fast` gets for its results holds NaN before it writes: what it
    forgets to write is found.
    """
    precise = [widened(x) for x in inputs]
    true = results(obvious, precise, *(widened(x) for x in rest), **options)
    low = results(obvious, inputs, *rest, **options)
    with poisoned():
        got = results(fast, inputs, *rest, **options)
    assert len(got) == len(low) == len(true)
    for number, (g, lo, t) in enumerate(zip(got, low, true, strict=True)):
        assert g.shape == t.shape, (number, g.shape, t.shape)
        assert g.dtype == lo.dtype, (number, g.dtype, lo.dtype)
        if not t.numel():
            continue
        g, lo, t = g.double(), lo.double(), t.double()
        assert torch.equal(g.isfinite(), t.isfinite()), f"result {number}: not finite"
        assert torch.equal(g[~g.isfinite()], t[~t.isfinite()]), f"result {number}: NaN or wrong ∞"
        g, lo, t = (x[t.isfinite()] for x in (g, lo, t))
        if not t.numel():
            continue
        ours, theirs = (g - t).abs().max().item(), (lo - t).abs().max().item()
        kind = inputs[0].dtype if inputs[0].is_floating_point() else torch.float32
        largest = t.abs().max().item()
        bound = 2 * theirs + torch.finfo(kind).eps * largest + 1e-6 * max(1, largest)
        assert ours <= bound, f"result {number}: off by {ours:.2e}, allowed {bound:.2e}"


def widened(x):
    """The same number in float64, asking for a gradient if x does."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return x
    return x.detach().double().requires_grad_(x.requires_grad)


@contextmanager
def poisoned():
    """Inside, torch.empty and its kin give memory full of NaN (or the largest integer)."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def far(dtype: torch.dtype, rows: int, width: int, apart: int = 2**30):
    """A view of `rows` rows of `width` numbers, `apart` numbers apart, and its first row.

    Should an offset wrap, it still falls inside. Only the pages under the rows come to exist.
    """
    size = (rows + 4) * apart * torch.empty(0, dtype=dtype).element_size()
    promised = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    memory = torch.frombuffer(promised, dtype=dtype)[4 * apart :]
    first = torch.from_numpy(memory.numpy()[:width])
    return memory.as_strided((rows, width), (apart, 1)), first


LAYOUTS = 4
layouts = st.integers(0, LAYOUTS - 1)


def strided(x: torch.Tensor, how: int) -> torch.Tensor:
    """The same numbers in another layout.

    0 as they come, 1 the last axes swapped, 2 every other number, 3 half of each row in memory.
    """
    if how == 1 and x.dim() > 1:
        y = x.detach().transpose(-2, -1).contiguous().transpose(-2, -1)
    elif how == 2:
        y = x.detach().repeat_interleave(2, -1)[..., ::2]
    elif how == 3:
        y = x.detach().repeat(*[1] * (x.dim() - 1), 2)[..., : x.shape[-1]]
    else:
        y = x.detach().clone()
    return y.requires_grad_(x.requires_grad)


@contextmanager
def limited(memory: int, seconds: int):
    """No more memory than these bytes beside what is held already, no more time than this."""

    def late(*_):
        raise TimeoutError

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + memory, most))
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def assert_one_sentence(error: Exception, path: Path, end: str) -> None:
    """What a file that cannot be loaded is answered with."""
    sentence = str(error)
    assert sentence.startswith(str(path)) and "\n" not in sentence and len(sentence) < 500
    assert sentence.endswith(end)


def mutated_text(content: bytes, draw: random.Random) -> bytes:
    """Cut off, and with a few bytes changed, mostly at the beginning, where the structure is."""
    content = bytearray(content)
    if draw.random() < 0.3:
        del content[draw.randrange(len(content)) :]
    for _ in range(draw.randrange(1, 4)):
        place = draw.choice((400, 900, len(content))) - 1
        if place > 0:
            content[draw.randrange(min(place, len(content)))] = draw.choice(
                b'"[]{},:0129aeln\\ =#\n\r\xff'
            )
    return bytes(content)

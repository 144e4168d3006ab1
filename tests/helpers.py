"""What several test files draw from and compare with."""

import numpy as np
import torch
from hypothesis import strategies as st

seeds = st.integers(0, 2**31 - 1)


def normals(seed: int, *shapes: tuple[int, ...], dtype=torch.float64) -> list[torch.Tensor]:
    """Normal tensors of the given shapes, each with a gradient."""
    rng = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


def array(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().numpy() if x.is_floating_point() else x.detach().numpy()


def assert_close(got, want, bound: float = 1e-12) -> None:
    """|got − want| ≤ bound · max(1, |want|) everywhere, and no NaN."""
    got, want = (array(x) if isinstance(x, torch.Tensor) else np.asarray(x) for x in (got, want))
    assert got.shape == want.shape
    error = np.abs(got - want) / np.maximum(1, np.abs(want))
    assert not error.size or error.max() <= bound, f"off by {error.max():.2e}, allowed {bound:.0e}"

"""Profiles of Hypothesis, and what all tests share.

The default draws the same few examples each time; `HYPOTHESIS_PROFILE=thorough pytest` draws many
new ones.
"""

import os
import sys
from pathlib import Path

# Processes of `pytest -n` share the cores, of which torch would take all in each. They have this
# process's environment, so it must be set here; tensors as small as these gain nothing by threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():  # before triton is imported, here or in a subprocess
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # tests ask for the same bits on CUDA

import pytest
from hypothesis import HealthCheck, settings

from ranks import PRELOADED, Ranks

# Also for the programs that tests begin: imports take longer than most of what these then do.
PRELOADED += ["matplotlib.pyplot", "matplotlib.backends.backend_agg", "align", "bench", "emergence",
              "evaluate", "optim", "plan", "quant", "sparse", "tour", "tuning"]  # fmt: skip

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile(
    "default", max_examples=12, derandomize=True, deadline=None, suppress_health_check=slow
)
settings.register_profile("thorough", max_examples=300, deadline=None, suppress_health_check=slow)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def float64_is_asked_for():
    """Tests say which dtype they mean; none may leave another default behind."""
    yield
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture(scope="session")
def ranks():
    """Eight processes, which start when a test first asks for them."""
    ranks = Ranks(8)
    yield ranks
    ranks.close()

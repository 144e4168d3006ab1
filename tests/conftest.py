"""Profiles of Hypothesis, and what all tests share.

The default draws the same few examples each time; `HYPOTHESIS_PROFILE=thorough pytest` draws many
new ones. What takes minutes is `long`: of some tests' cases the short run takes a part.
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


# Which cases of the tests that take longest the short run takes; `pytest -m long` takes the others.
SHORT = {
    "test_repo.py::test_commands_run": slice(0),  # they need each other
    "test_tour.py::test_the_tour_goes_on_where_it_was_stopped_and_ends_with_its_page": slice(0),
    "test_compile.py::test_compiles_without_spills": slice(0, 7, 6),
    "test_train.py::test_ctrl_c_saves_and_says_how_to_go_on": slice(1),
    "test_train.py::test_every_objective_is_learnt_and_its_run_writes": slice(0, None, 4),
    "test_parallel_training.py::test_a_run_under_a_plan_is_the_plain_run": slice(0, None, 4),
    "test_parallel_training.py::test_saved_under_one_plan_resumed_under_another": slice(1),
    "test_parallel.py::test_exact_plans_end_in_the_same_bits": slice(1, 2),
    "test_parallel.py::test_every_architecture": slice(0, None, 4),
    "test_zero.py::test_exact_plans_end_in_the_same_bits": slice(0),
    "test_zero.py::test_several_micro_batches_that_do_not_share_out_evenly": slice(0, None, 4),
    "test_zero.py::test_optimizers_that_look_at_whole_matrices": slice(0, None, 4),
    "test_zero.py::test_zero_computes_what_one_process_computes": slice(0, None, 3),
    "test_zero.py::test_every_architecture": slice(0, None, 3),
    "test_traffic.py::test_bytes_are_the_formula_s": slice(0, None, 4),
    "test_kernel_flash.py::test_every_extra_for_each_head_or_for_all": slice(0, None, 5),
    "test_kernel_flash.py::test_every_kind_of_interval_at_full_length": slice(0, None, 3),
    "test_kernel_norm.py::test_triton_is_as_good_as_torch": slice(0, None, 3),
    "test_quant.py::test_every_linear_of_every_architecture_is_quantized": slice(0, None, 5),
    "test_quant.py::test_a_quantized_run_is_a_run": slice(0, None, 5),
    "test_frontier.py::test_with_the_kl_in_the_reward_they_end_at_the_optimum": slice(0, None, 4),
    "test_lora_runs.py::test_so_does_one_with_a_prefix_or_a_prompt": slice(1),
    "test_lora_runs.py::test_every_stage_improves_an_adapter": slice(0, None, 3),
    "test_lora.py::test_any_plan_computes_what_one_process_computes": slice(0, None, 4),
    "test_prefix.py::test_any_plan_computes_what_one_process_computes": slice(0, None, 4),
    "test_judge.py::test_the_chain_at_a_tiny_size": slice(0),
    "test_judge.py::test_a_reward_model_is_fitted_kept_and_read_again": slice(0, None, 4),
    "test_improve.py::test_processes_change_nothing": slice(0, None, 4),
    "test_improve.py::test_the_reward_rises": slice(0, None, 2),
    "test_dry_run.py::test_the_peak_is_that_of_a_run": slice(0, None, 3),
}


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items):
    cases = {}
    for item in (one for one in items if not one.get_closest_marker("slow")):
        cases.setdefault(item.nodeid.split("[")[0].removeprefix("tests/"), []).append(item)
    for name, short in SHORT.items():
        some = cases.get(name, [])
        for item in set(some) - set(some[short]):
            item.add_marker(pytest.mark.long)


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

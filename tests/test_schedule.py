"""Laws of pipeline schedules: whole, never standing still, as long and as large as the formulas."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from run import UserError
from schedule import SCHEDULES, Step, gpipe, one_f_one_b, simulate

sizes = st.tuples(st.integers(1, 9), st.integers(1, 12))


@given(sizes, st.sampled_from(sorted(SCHEDULES)), st.floats(0.1, 3), st.floats(0.1, 3))
def test_both_take_m_plus_p_minus_1_passes_each_way(size, name, forward, backward):
    stages, micros = size
    played = simulate(SCHEDULES[name](*size), [forward] * stages, [backward] * stages)
    assert played.makespan == pytest.approx((micros + stages - 1) * (forward + backward))


@given(sizes)
def test_micro_batches_that_a_stage_keeps(size):
    stages, micros = size
    one = [1.0] * stages
    assert simulate(gpipe(*size), one, one).kept == [micros] * stages
    kept = simulate(one_f_one_b(*size), one, one).kept
    assert kept == [min(micros, stages - stage) for stage in range(stages)]


@given(sizes, st.sampled_from(sorted(SCHEDULES)), st.data())
def test_no_step_begins_before_what_it_needs(size, name, data):
    stages, _ = size
    times = [data.draw(st.lists(st.floats(0, 3), min_size=stages, max_size=stages)) for _ in "fb"]
    plan = SCHEDULES[name](*size)
    played = simulate(plan, *times)
    ends = {}
    for stage, (steps, starts) in enumerate(zip(plan, played.starts, strict=True)):
        free = 0.0
        for step, start in zip(steps, starts, strict=True):
            assert start >= free
            free = ends[stage, step] = start + times[step.back][stage]
    for (stage, step), end in ends.items():
        start = end - times[step.back][stage]
        before = (stage + 1 if step.back else stage - 1, step)
        assert start >= ends.get(before, 0) - 1e-9
        if step.back:
            assert start >= ends[stage, Step(False, step.micro)] - 1e-9
    assert played.makespan == max(ends.values())


def test_a_schedule_that_stands_still_or_lacks_a_step_is_refused():
    late = [[Step(False, 0), Step(True, 0), Step(False, 1), Step(True, 1)],
            [Step(False, 1), Step(False, 0), Step(True, 0), Step(True, 1)]]  # fmt: skip
    with pytest.raises(UserError, match="stands still: stage 0"):
        simulate(late, [1, 1], [1, 1])
    short = one_f_one_b(2, 3)
    short[1].pop()
    with pytest.raises(UserError, match="stage 1"):
        simulate(short, [1, 1], [1, 1])
    twice = gpipe(2, 2)
    twice[0].append(Step(True, 0))
    with pytest.raises(UserError, match="stage 0"):
        simulate(twice, [1, 1], [1, 1])
    assert math.isfinite(simulate(gpipe(1, 1), [0], [0]).makespan)

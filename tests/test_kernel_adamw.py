"""Laws of kernels/adamw.py: one launch moves every tensor as AdamW's equations say."""

import mmap

import numpy as np
import pytest
import torch
from helpers import CUDA, DEVICE, assert_as_good_as_torch, normals, seeds
from hypothesis import given
from hypothesis import strategies as st

import kernels.adamw as ours
from kernels.adamw import Table, adamw_obvious, adamw_triton
from optim import OptimConfig, build

NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python names from 3.13 on
SIZES = (0, 1, 3, 1000, 65537)  # empty, masked, several blocks, several programs


def state_for(seed, shapes, dtype=torch.float32):
    """Lists of p, g, m, v on the test's device, v as no gradient could make it negative."""
    p, g, m, v = ([x.detach().to(DEVICE) for x in normals(seed + i, *shapes, dtype=torch.float32)]
                  for i in range(4))  # fmt: skip
    return p, [x.to(dtype) for x in g], m, [x.abs() for x in v]


def after(update, *options):
    """The update as a function of all tensors that gives new ones, for helpers.results.

    All of a kind as one: an error is measured by the largest weight, not by one that comes to lie
    near 0.
    """

    def function(*tensors):
        n = len(tensors) // 4
        lists = [[x.clone() for x in tensors[i * n : (i + 1) * n]] for i in range(4)]
        update(*lists, *options)
        return [torch.cat([x.flatten() for x in lists[i]]) for i in (0, 2, 3)]

    return function


class Recorder:
    """A kernel that notes how often it is launched."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


def check_against_obvious(seed, shapes, dtype, *options):
    p, g, m, v = state_for(seed, shapes, dtype)
    assert_as_good_as_torch(
        after(adamw_triton, *options), after(adamw_obvious, *options), [*p, *g, *m, *v]
    )


@given(seeds, st.integers(0, 3), st.integers(0, 40))
def test_what_lies_around_a_tensor_stays(seed, odd, n):
    """Tensors cut out of one buffer, not at multiples of 16 bytes, with numbers between them."""
    memory = torch.full((4 * 3 * 64 + 2 * ours.CHUNK,), 7.0, device=DEVICE)
    buffer = memory[: 4 * 3 * 64].view(4, 3, 64)
    tensors = [[buffer[kind, i, odd : odd + n] for i in range(3)] for kind in range(4)]
    for kind, xs in zip(tensors, state_for(seed, [(n,)] * 3), strict=True):
        for tensor, x in zip(kind, xs, strict=True):
            tensor.copy_(x)
    want = buffer.clone()
    same = [[want[kind, i, odd : odd + n] for i in range(3)] for kind in range(4)]
    options = 2, 0.1, [0.1, 0.0], 0.9, 0.95, 1e-8
    adamw_triton(*(x[:2] for x in tensors), *options)  # the third is not listed
    adamw_obvious(*(x[:2] for x in same), *options)
    torch.testing.assert_close(buffer, want, rtol=1e-5, atol=1e-6)
    inside = torch.zeros(64, dtype=torch.bool)
    inside[odd : odd + n] = True
    assert (buffer[:, :, ~inside] == 7).all() and (memory[buffer.numel() :] == 7).all()
    assert torch.equal(buffer[:, 2], want[:, 2]) and torch.equal(buffer[1], want[1])


@given(
    seeds,
    st.lists(st.sampled_from([(0,), (1,), (3, 5), (1024,), (7, 150)]), min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.integers(1, 1000), st.floats(1e-4, 0.5), st.floats(0, 0.99), st.floats(0, 0.9999),
    st.sampled_from([1e-10, 1e-3]), st.floats(0.01, 1), st.data(),
)  # fmt: skip
def test_equals_the_equations(seed, shapes, dtype, t, lr, beta1, beta2, eps, scale, data):
    shapes = [*shapes, (300,)]
    decays = [data.draw(st.sampled_from([0.0, 0.1, 0.7])) for _ in shapes]
    if data.draw(st.booleans()):
        scale = torch.tensor(scale, device=DEVICE)
    check_against_obvious(seed, shapes, dtype, t, lr, decays, beta1, beta2, eps, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_any_size_at_once(dtype):
    check_against_obvious(
        0, [(n,) for n in SIZES], dtype, 3, 0.1, [0.1, 0.0, 0.2, 0.3, 0.4], 0.9, 0.95, 1e-10, 0.5
    )


def test_equals_torch_over_several_steps_in_one_launch_each(monkeypatch):
    monkeypatch.setattr(ours, "adamw_kernel", Recorder(ours.adamw_kernel))
    p, g, m, v = state_for(1, [(3, 4), (1030,), (0,)])
    m, v = ([torch.zeros_like(x) for x in p] for _ in range(2))
    twins = [x.clone().requires_grad_() for x in p]
    other = torch.optim.AdamW(twins, lr=0.03, betas=(0.8, 0.99), eps=1e-8, weight_decay=0.2)
    table = Table()
    for t in range(1, 6):
        g = [torch.sin(x + t) for x in g]
        adamw_triton(p, g, m, v, t, 0.03, [0.2] * 3, 0.8, 0.99, 1e-8, 1.0, table)
        for twin, gradient in zip(twins, g, strict=True):
            twin.grad = gradient
        other.step()
    assert ours.adamw_kernel.launches == 5
    for x, twin in zip(p, twins, strict=True):
        torch.testing.assert_close(x, twin.detach(), rtol=1e-5, atol=1e-6)


def test_addresses_are_sent_again_only_when_a_tensor_has_moved():
    p, g, m, v = state_for(2, [(5,), (40,)])
    q, _, n, w = ([x.clone() for x in tensors] for tensors in (p, g, m, v))
    table, options = Table(), (0.1, [0.0, 0.1], 0.9, 0.95, 1e-8, 1.0)
    pointers = []
    for t in range(1, 5):
        if t == 3:
            g = [x.clone() for x in g]  # while the old ones live, so that addresses differ
        if t == 4:
            g = [x.half().float() for x in g[:1]] + g[1:]
        adamw_triton(p, g, m, v, t, *options, table)
        adamw_obvious(q, g, n, w, t, *options)
        pointers.append((table.pointers, table.chunks))
        for x, y in zip([*p, *m, *v], [*q, *n, *w], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    assert pointers[0][0] is pointers[1][0] and pointers[1][0] is not pointers[2][0]
    assert all(chunks is pointers[0][1] for _, chunks in pointers)


def test_a_decay_that_is_changed_in_the_list_is_seen():
    lists = state_for(6, [(5,), (40,)])
    same = [[x.clone() for x in tensors] for tensors in lists]
    table, decays = Table(), [0.1, 0.2]
    for t in (1, 2):
        adamw_triton(*lists, t, 0.1, decays, 0.9, 0.95, 1e-8, 1.0, table)
        adamw_obvious(*same, t, 0.1, decays, 0.9, 0.95, 1e-8)
        decays[1] = 0.9
    torch.testing.assert_close(lists, same, rtol=1e-5, atol=1e-6)


def test_a_gradient_in_another_layout_is_copied():
    p, g, m, v = state_for(3, [(6, 10)])
    turned = [g[0].T.contiguous().T]
    assert not turned[0].is_contiguous()
    results = []
    for gradient in (g, turned):
        lists = [[x.clone() for x in tensors] for tensors in (p, m, v)]
        adamw_triton(lists[0], gradient, *lists[1:], 1, 0.1, [0.1], 0.9, 0.95, 1e-8)
        results.append(lists[0][0])
    assert torch.equal(*results)


@pytest.mark.parametrize("odd", [0, 4, 1])
def test_wide_loads_are_promised_only_where_every_tensor_starts_at_16_bytes(odd):
    p, g, m, v = state_for(0, [(8,), (8,)])
    g[1] = g[1].repeat(2)[odd : odd + 8]
    table = Table()
    adamw_triton(p, g, m, v, 1, 0.1, [0.0, 0.0], 0.9, 0.95, 1e-8, 1.0, table)
    assert table.aligned == (odd % 4 == 0)


def test_no_tensor_or_only_empty_ones_is_fine():
    adamw_triton([], [], [], [], 1, 0.1, [], 0.9, 0.95, 1e-8)
    empty = [torch.zeros(0, device=DEVICE)]
    adamw_triton(empty, empty, empty, empty, 1, 0.1, [0.0], 0.9, 0.95, 1e-8)


def test_bad_input_is_refused():
    def refused(message, change):
        lists = dict(
            zip(("params", "grads", "ms", "vs"), state_for(0, [(4, 6), (5,)]), strict=True)
        )
        lists["decays"] = [0.1, 0.0]
        change(lists)
        p, g, m, v, decays = lists.values()
        with pytest.raises(ValueError, match=message):
            ours.verify(p, g, m, v, decays)
        with pytest.raises(ValueError, match=message):
            adamw_triton(p, g, m, v, 1, 0.1, decays, 0.9, 0.95, 1e-8)

    def put(name, x):
        return lambda lists: lists[name].__setitem__(1, x.to(DEVICE) if DEVICE == "cuda" else x)

    refused("equally long", lambda lists: lists["decays"].pop())
    refused(r"params\[1\] is torch.float64", put("params", torch.zeros(5, dtype=torch.float64)))
    refused(r"vs\[1\] is torch.float16", put("vs", torch.zeros(5, dtype=torch.float16)))
    refused(r"grads\[1\] is torch.float16", put("grads", torch.zeros(5, dtype=torch.float16)))
    refused(r"grads\[1\] is \(4,\)", put("grads", torch.zeros(4)))
    refused(r"ms\[1\] is \(5,\) with strides", put("ms", torch.zeros(10, device=DEVICE)[::2]))
    refused(r"grads\[1\] is on meta", lambda l: l["grads"].__setitem__(1, l["grads"][1].to("meta")))
    refused(r"grads\[0\] is on meta", lambda l: l.update(grads=[g.to("meta") for g in l["grads"]]))
    refused("supported are", lambda l: l.update(grads=[g.double() for g in l["grads"]]))
    refused("on meta", lambda l: l["params"].__setitem__(1, l["params"][1].to("meta")))


class Elsewhere(torch.Tensor):
    """A tensor that says it is on CUDA, as the interpreter can take it."""

    is_cuda = True


def test_the_optimizer_moves_all_its_tensors_in_one_launch(monkeypatch):
    monkeypatch.setattr(ours, "adamw_kernel", Recorder(ours.adamw_kernel))
    names = ["layers.0.up.weight", "embedding", "layers.0.norm.weight"]
    p, g, _, _ = state_for(4, [(5, 3), (7, 3), (3,)])
    config = OptimConfig("adamw", lr=0.1, weight_decay=0.3)
    twins = {n: x.cpu().clone().requires_grad_() for n, x in zip(names, p, strict=True)}
    moved = {n: x.as_subclass(Elsewhere).requires_grad_() for n, x in zip(names, p, strict=True)}
    optimizers = build(moved.items(), config), build(twins.items(), config)
    for step in range(3):
        for params, optimizer in zip((moved, twins), optimizers, strict=True):
            for (_, x), gradient in zip(params.items(), g, strict=True):
                x.grad = (gradient * (step + 1)).to(x.device)
            optimizer.step()
    assert ours.adamw_kernel.launches == 3
    states = [{**o.tensors(), **some} for o, some in zip(optimizers, (moved, twins), strict=True)]
    assert len(states[0]) == len(states[1]) == 2 + 3 * len(names)
    for name, want in states[1].items():
        got = states[0][name].as_subclass(torch.Tensor).cpu()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(CUDA, reason="addresses of this machine's memory")
def test_chunks_beyond_two_to_the_31():
    """Memory that is promised and not used: only the pages around the last chunk come to exist.

    Should an offset wrap around, it still falls inside.
    """
    far = 2**31  # weights; a chunk that starts there
    promised = mmap.mmap(-1, 20 * 2**30, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    memory = np.frombuffer(promised, dtype=np.float32)
    base = memory.ctypes.data + 4 * far
    lists = state_for(5, [(10,)])
    for i, (x,) in enumerate(lists):
        memory[2 * far + 100 * i :][:10] = x
    pointers = torch.tensor([base + 400 * i for i in range(4)])
    table = torch.tensor([far + 10]), torch.zeros(1), torch.tensor([[0, far]])
    ours.adamw_kernel[(1,)](
        pointers, *table, None, 1, 0.5, 0.1, 2.0, 0.9, 0.1, 0.95, 0.05, 1e-8, 1.0,
        GRADIENT=ours.TYPES[torch.float32], ALIGNED=False, BLOCK=ours.BLOCK, CHUNK=ours.CHUNK,
    )  # fmt: skip
    (_, (g,), (m,), _) = lists
    got = torch.from_numpy(memory[2 * far + 200 :][:10].copy())
    torch.testing.assert_close(got, 0.9 * m + 0.1 * g)


def launched(dtype, odd=0):
    """One tensor of a few blocks, on the machine that only compiles."""
    p, g, m, v = (torch.zeros(3001)[odd:] for _ in range(4))
    adamw_triton([p], [g.to(dtype)], [m], [v], 3, 1e-3, [0.1], 0.9, 0.95, 1e-10)


COMPILE = {
    "fp32 gradients": lambda: launched(torch.float32),
    "bf16 gradients": lambda: launched(torch.bfloat16),
    "unaligned": lambda: launched(torch.float32, 1),
}

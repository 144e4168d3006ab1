"""Causal linear attention of the Performer: its cost grows with T, not with T².

Idea: if the weight of key s for query t is a product of features, φ(q_t)·φ(k_s), the sum over keys
can be taken before the query is known: Σ_s (φ(q_t)·φ(k_s)) v_s = φ(q_t)·(Σ_s φ(k_s) v_sᵀ). For a
causal model that sum, the state, grows from token to token. A GPU is bad at one token after the
other, so the text is cut into chunks: inside a chunk the quadratic form, for all that lies before
it the state where the chunk begins. The states of all chunks are made side by side, then added up
by a scan. The gradients are the same kind of sum, three times, with other roles; those of keys and
values come from later tokens, so there the scan runs backwards.

The feature map is not here: q and k are features already, and not negative.

Papers: Choromanski et al. 2021, Performer (arXiv 2009.14794); Katharopoulos et al. 2020, causal
linear attention (arXiv 2006.16236); Hua et al. 2022, chunks (arXiv 2202.10447).

Letters: B batch · T tokens · H heads · K key-value heads · M features · D head width · N tokens of
a chunk · G chunks.
"""

import torch
from torch import Tensor

from kernels import launch
from kernels.flash import own_stride
from kernels.launch import tl, triton

WIDEST = 256  # features, and numbers of a head
CHUNK = 128  # tokens; in fp32, whose products need more registers, 32


def linear_attention_obvious(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None = None, past: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out_t = Σ_{s ≤ t} (q_t·k_s) v_s / Σ_{s ≤ t} (q_t·k_s), and the state Σ_s k_s [v_s 1]ᵀ.

    q (B H T M) and k (B K T M) are features, v (B K T D); out (B H T D), the state (B K M D+1) in
    fp32 or wider, without a gradient. A past is the state of earlier tokens. starts (B T) holds
    where t's document begins; a token sees only its own (and then there is no past). A token whose
    weights are all 0 gives 0, and no gradient.
    """
    check_shapes("linear_attention", q, k, v, starts, past)
    T, group = q.shape[2], q.shape[1] // k.shape[1]
    wide = torch.promote_types(v.dtype, torch.float32)
    ones = torch.cat((v, torch.ones_like(v[..., :1])), -1)
    state = k.detach().to(wide).mT @ ones.detach().to(wide)
    t = torch.arange(T, device=q.device)
    seen = t[:, None] >= t
    if starts is not None and T:
        seen = seen & (t >= starts[:, None, :, None])
        last = t[:, None] >= starts[:, -1:, None, None]
        state = (k * last).detach().to(wide).mT @ ones.detach().to(wide)
    weights = (q @ k.repeat_interleave(group, 1).mT) * seen
    both = weights @ ones.repeat_interleave(group, 1)
    if past is not None:
        state = state + past
        both = both + (q.to(wide) @ past.repeat_interleave(group, 1).to(wide)).to(q.dtype)
    return divided(both), state


def divided(both: Tensor) -> Tensor:
    """The first numbers of each row by the last; 0 where that is 0."""
    total = both[..., -1:]
    return (both[..., :-1] / total.masked_fill(total == 0, 1)).masked_fill(total == 0, 0)


def linear_attention_chunked(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None = None, past: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same function, a chunk after the other: memory and time grow with T."""
    check_shapes("linear_attention", q, k, v, starts, past)
    (B, H, T, M), (K, D) = q.shape, (k.shape[1], v.shape[3])
    if not T:
        return linear_attention_obvious(q, k, v, starts, past)
    wide = torch.promote_types(v.dtype, torch.float32)
    q, ones = q.unflatten(1, (K, H // K)), torch.cat((v, torch.ones_like(v[..., :1])), -1)
    state = q.new_zeros(B, K, M, D + 1, dtype=wide) if past is None else past.to(wide)
    starts = q.new_full((B, T), -1, dtype=torch.long) if starts is None else starts.expand(B, T)
    outs = []
    for first in range(0, T, CHUNK):
        part = slice(first, first + CHUNK)
        q_c, k_c, ones_c = q[:, :, :, part], k[:, :, part], ones[:, :, part]
        start = starts[:, None, part, None]  # B 1 N 1
        t = torch.arange(first, min(first + CHUNK, T), device=q.device)
        seen = (t[:, None] >= t) & (t >= start)
        both = (q_c @ k_c.mT[:, :, None] * seen[:, :, None]) @ ones_c[:, :, None]
        carried = (q_c * (start < first)[:, :, None]).to(wide) @ state[:, :, None]
        outs.append(divided(both + carried.to(q.dtype)).flatten(1, 2))
        kept = k_c * (t[:, None] >= start[:, :, -1:])
        state = state * (start[:, :, -1:] < first) + kept.to(wide).mT @ ones_c.to(wide)
    return torch.cat(outs, 2), state.detach()


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None = None, past: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same function and gradients as `linear_attention_obvious`; in Triton on CUDA."""
    function = linear_attention_triton if q.is_cuda else linear_attention_chunked
    return function(q, k, v, starts, past)


def check_shapes(
    function: str, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, past: Tensor | None
) -> None:
    """ValueError, one sentence, unless the shapes fit together."""
    shapes = ", ".join(f"{n} {tuple(x.shape)}" for n, x in (("q", q), ("k", k), ("v", v)))
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"{function}: {shapes} must be (B H T M), (B K T M) and (B K T D)")
    (B, H, T, M), K, D = q.shape, k.shape[1], v.shape[3]
    if k.shape != (B, K, T, M) or v.shape[:3] != (B, K, T):
        raise ValueError(f"{function}: {shapes} must be (B H T M), (B K T M) and (B K T D)")
    if not K or H % K:
        raise ValueError(f"{function}: the {H} heads of q are no multiple of the {K} of k")
    if starts is not None and (starts.dim() != 2 or starts.shape not in ((B, T), (1, T))):
        raise ValueError(f"{function}: starts is {tuple(starts.shape)}, not (B T) = {(B, T)}")
    if starts is not None and past is not None:
        raise ValueError(f"{function}: past cannot be given with starts, which know no past")
    if past is not None and past.shape != (B, K, M, D + 1):
        want = (B, K, M, D + 1)
        raise ValueError(f"{function}: past is {tuple(past.shape)}, not (B K M D+1) = {want}")
    if past is not None and past.requires_grad:
        raise ValueError(f"{function}: past wants a gradient, and there is none: detach it")


# --- Triton ---------------------------------------------------------------------------------------

OUT, DQ, DV, DK = (tl.constexpr(kind) for kind in range(4))  # what `chunk_kernel` computes


@triton.jit
def tile(X, n, end, d, WIDTH, stride):
    """Rows n of X, columns d; 0 where n ≥ end or d ≥ WIDTH."""
    there = (n < end)[:, None] & (d < WIDTH)[None, :]
    return tl.load(X + n.to(tl.int64)[:, None] * stride + d[None, :], there, other=0.0)


@triton.jit
def inverse(x):
    """1/x; 0 for 0."""
    return tl.where(x == 0, 0.0, 1 / tl.where(x == 0, 1.0, x))


def tiles(*table: tuple[int, int, int]) -> list:
    """Configurations: columns that a product sums over, columns of its result, warps."""
    return [triton.Config({"BI": i, "BO": o}, num_warps=w, num_stages=2) for i, o, w in table]


def fitting(configs: list, args: dict, **options) -> list:
    """fp32, whose products are made without the matrix unit, takes the last one."""
    return configs[-1:] if {**args, **options}["N"] < CHUNK else configs[:-1]


def tuned(*table: tuple[int, int, int]):
    """`launch.autotune` for both kernels with such tiles."""
    return launch.autotune(
        tiles(*table), key=["INNER", "OUTER", "KIND"],
        interpreted={"BI": 16, "BO": 16}, prune_configs_by={"early_config_prune": fitting},
    )  # fmt: skip


@tuned((64, 64, 8), (32, 32, 4))
@triton.jit
def state_kernel(
    X, Y, States, Den, Delta, Starts,
    x_b, x_h, x_t, y_b, y_h, y_t, starts_b, T, heads, group, W,
    INNER: tl.constexpr, OUTER: tl.constexpr, KIND: tl.constexpr, N: tl.constexpr,
    BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Σ_t x_t [y_t 1]ᵀ over one chunk: of k and v, those that are still seen at its end (OUT).

    Or of q and the output's gradient, Σ_t q_t [dout_t  −δ_t]ᵀ / total_t, of all heads that share
    these keys and all tokens that see what lies before the chunk (DK).
    """
    b, h = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    first = tl.program_id(1) * N
    wide = tl.cdiv(OUTER, BO)
    i = tl.program_id(2) // wide * BI + tl.arange(0, BI)
    o = tl.program_id(2) % wide * BO + tl.arange(0, BO)
    t = first + tl.arange(0, N)
    seen = t < T
    if Starts is not None:
        Starts += b * starts_b
        if KIND == OUT:
            seen &= t >= tl.load(Starts + tl.minimum(first + N, T) - 1)
        else:
            seen &= tl.load(Starts + t, t < T, other=0) < first
    acc = tl.zeros([BI, BO], tl.float32)
    extra = tl.zeros([BI], tl.float32)
    for g in range(group):
        head = h * group + g
        x = tile(X + b * x_b + head * x_h, t, T, i, INNER, x_t)
        x = tl.where(seen[:, None], x, 0.0)
        y = tile(Y + b * y_b + head * y_h, t, T, o, OUTER, y_t)
        if KIND == OUT:
            acc = tl.dot(x.T, y, acc, input_precision="ieee")
            extra += tl.sum(x.to(tl.float32), 0)
        else:
            at = (b * heads * group + head) * T + t
            scale = inverse(tl.load(Den + at, t < T, other=0.0))
            delta = tl.load(Delta + at, t < T, other=0.0)
            most = tl.max(tl.abs(scale))  # in 16 bits only ratios are small enough
            y = (y.to(tl.float32) * (scale * inverse(most))[:, None]).to(y.dtype)
            acc += tl.dot(x.T, y, input_precision="ieee") * most
            extra -= tl.sum(x.to(tl.float32) * (delta * scale)[:, None], 0)
    States += (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * INNER * W
    there = (i < INNER)[:, None] & (o < OUTER)[None, :]
    tl.store(States + i[:, None] * W + o[None, :], acc, there)
    tl.store(States + i * W + OUTER, extra, (i < INNER) & (tl.program_id(2) % wide == 0))


@triton.jit
def scan_kernel(
    States, Past, Final, Starts, starts_b, T, heads, G, size,
    N: tl.constexpr, BACKWARDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """In place: what all chunks before this one (or after it) leave to it."""
    head = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    if Past is not None:
        acc += tl.load(Past + head * size + at, at < size, other=0.0)
    States += head * G * size + at
    for step in range(G):
        chunk = G - 1 - step if BACKWARDS else step
        x = tl.load(States + chunk.to(tl.int64) * size, at < size, other=0.0)
        tl.store(States + chunk.to(tl.int64) * size, acc, at < size)
        if Starts is not None:
            last = tl.minimum(chunk * N + N, T) - 1
            if tl.load(Starts + head // heads * starts_b + last) >= chunk * N:
                acc = tl.zeros([BLOCK], tl.float32)  # that document ends where the last one begins
        acc += x
    if Final is not None:
        tl.store(Final + head * size + at, acc, at < size)


@tuned((32, 64, 8), (32, 32, 4))
@triton.jit
def chunk_kernel(
    A, B, C, States, Den, Delta, Out, Starts, Y,
    a_b, a_h, a_t, b_b, b_h, b_t, c_b, c_h, c_t, y_b, y_h, y_t, starts_b,
    s_i, s_o, s_z, D, size, T, heads, share, group,
    INNER: tl.constexpr, OUTER: tl.constexpr, KIND: tl.constexpr, N: tl.constexpr,
    BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """One chunk of y_i = Σ_j (a_i·b_j) c_j, in one of four roles:

    out_t = Σ_{s ≤ t} (q_t·k_s) v_s / total_t      dq_t = Σ_{s ≤ t} (dout_t·v_s − δ_t) k_s / total_t
    dv_s = Σ_{t ≥ s} (k_s·q_t) dout_t / total_t    dk_s = Σ_{t ≥ s} (v_s·dout_t − δ_t) q_t / total_t

    with total_t = Σ_{s ≤ t} q_t·k_s and δ_t = dout_t·out_t. What lies in other chunks is in States.
    """
    LATER: tl.constexpr = KIND >= DV  # the sum runs over this token and later ones
    b, h = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    chunk = tl.program_id(1)
    first = chunk * N
    t = first + tl.arange(0, N)
    o = tl.program_id(2) * BO + tl.arange(0, BO)
    A += b * a_b + h * a_h
    seen = t[:, None] <= t[None, :] if LATER else t[:, None] >= t[None, :]
    carried = t < T
    if Starts is not None:
        Starts += b * starts_b
        start = tl.load(Starts + t, t < T, other=0)
        if LATER:
            seen &= t[:, None] >= start[None, :]
            carried &= t >= tl.load(Starts + tl.minimum(first + N, T) - 1)
        else:
            seen &= t[None, :] >= start[:, None]
            carried &= start < first
    row = (b * heads + h) * T + t
    total = tl.zeros([N], tl.float32)
    delta = tl.zeros([N], tl.float32)

    States += ((b * heads + h) // share * tl.num_programs(1) + chunk) * size
    acc = tl.zeros([N, BO], tl.float32)
    for inner in range(0, INNER, BI):  # what the state says
        i = inner + tl.arange(0, BI)
        a = tile(A, t, T, i, INNER, a_t)
        if KIND == DQ:
            out = tile(Out + (b * heads + h) * T * INNER, t, T, i, INNER, INNER)
            delta += tl.sum(a.to(tl.float32) * out.to(tl.float32), 1)
        a = tl.where(carried[:, None], a, 0.0)
        there = (i < INNER)[:, None] & (o < OUTER)[None, :]
        s = tl.load(States + i[:, None] * s_i + o[None, :] * s_o, there, other=0.0)
        if KIND == OUT:
            z = tl.load(States + i * s_z + D, i < INNER, other=0.0)
            total += tl.sum(a.to(tl.float32) * z[None, :], 1)
        if A.dtype.element_ty == tl.float16:  # its largest number is 65504
            most = tl.max(tl.abs(s))
            acc += tl.dot(a, (s * inverse(most)).to(a.dtype), input_precision="ieee") * most
        else:
            acc = tl.dot(a, s.to(a.dtype), acc, input_precision="ieee")
    if KIND == DQ or KIND == DK:  # noqa: SIM109
        z = tl.load(States + o * s_z + D, o < OUTER, other=0.0)[None, :]
        acc += tl.where(carried, 1.0 if KIND == DK else -delta, 0.0)[:, None] * z

    for g in range(group):  # what the chunk itself says
        head = h * group + g if LATER else h // share
        B_h, C_h = B + b * b_b + head * b_h, C + b * c_b + head * c_h
        w = tl.zeros([N, N], tl.float32)
        for inner in range(0, INNER, BI):
            i = inner + tl.arange(0, BI)
            a, b_tile = tile(A, t, T, i, INNER, a_t), tile(B_h, t, T, i, INNER, b_t)
            w = tl.dot(a, b_tile.T, w, input_precision="ieee")
        c = tile(C_h, t, T, o, OUTER, c_t)
        if LATER:
            at = (b * heads * group + head) * T + t
            scale = inverse(tl.load(Den + at, t < T, other=0.0))
            most = tl.max(tl.abs(scale))
            if KIND == DK:
                w -= tl.load(Delta + at, t < T, other=0.0)[None, :]
            w = tl.where(seen, w * (scale * inverse(most))[None, :], 0.0)
            acc += tl.dot(w.to(c.dtype), c, input_precision="ieee") * most
        else:
            w = tl.where(seen, w - delta[:, None], 0.0)
            if KIND == OUT:
                total += tl.sum(w, 1)
            acc = tl.dot(w.to(c.dtype), c, acc, input_precision="ieee")

    alone = (t < T) & (tl.program_id(2) == 0)
    if KIND == OUT:
        tl.store(Den + row, total, alone)
        acc *= inverse(total)[:, None]
    if KIND == DQ:
        tl.store(Delta + row, delta, alone)
        acc *= inverse(tl.load(Den + row, t < T, other=0.0))[:, None]
    Y += b * y_b + h * y_h + t.to(tl.int64)[:, None] * y_t + o[None, :]
    tl.store(Y, acc.to(Y.dtype.element_ty), (t < T)[:, None] & (o < OUTER)[None, :])


def chunk_of(x: Tensor) -> int:
    if launch.INTERPRETED:
        return 16
    return CHUNK if x.dtype != torch.float32 else 32


def strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def states_of(
    kind: int, x: Tensor, y: Tensor, heads: int, den: Tensor | None, delta: Tensor | None,
    starts: Tensor | None, past: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What other chunks leave to each, (B K G M W) with W ≥ D + 1, and the sum over all chunks."""
    (B, H, T, M), D, N = x.shape, y.shape[3], chunk_of(x)
    G, W = launch.ceil_div(T, N), launch.ceil_div(D + 1, 4) * 4
    states = torch.empty(B, heads, G, M, W, dtype=torch.float32, device=x.device)
    common = starts, *strides(x, y), own_stride(starts, 0), T, heads, H // heads, W
    state_kernel[
        lambda meta: (
            B * heads, G, launch.ceil_div(M, meta["BI"]) * launch.ceil_div(D, meta["BO"])
        )
    ](x, y, states, den, delta, *common, INNER=M, OUTER=D, KIND=kind, N=N)  # fmt: skip
    final = None
    if kind == OUT.value:
        final = torch.empty(B, heads, M, W, dtype=torch.float32, device=x.device)
        if past is not None:
            past = torch.nn.functional.pad(past.float(), (0, W - D - 1)).contiguous()
    block = 1024 if not launch.INTERPRETED else 256
    scan_kernel[(B * heads, launch.ceil_div(M * W, block))](
        states, past, final, starts, own_stride(starts, 0), T, heads, G, M * W,
        N=N, BACKWARDS=kind != OUT.value, BLOCK=block,
    )  # fmt: skip
    return states, final


def chunks(
    kind: int, a: Tensor, b: Tensor, c: Tensor, states: Tensor, den: Tensor,
    delta: Tensor | None, out: Tensor | None, starts: Tensor | None,
) -> Tensor:  # fmt: skip
    """One of the four sums for all chunks; see `chunk_kernel`."""
    (B, heads, T, inner), outer = a.shape, c.shape[3]
    _, K, G, M, W = states.shape
    along = (W, 1) if inner == M and kind in (OUT.value, DV.value) else (1, W)
    D = outer if kind in (OUT.value, DV.value) else inner
    later = kind in (DV.value, DK.value)
    y = torch.empty(B, heads, T, outer, dtype=a.dtype, device=a.device)
    chunk_kernel[lambda meta: (B * heads, G, launch.ceil_div(outer, meta["BO"]))](
        a, b, c, states, den, delta, out, starts, y,
        *strides(a, b, c, y), own_stride(starts, 0), *along, W, D, M * W, T, heads,
        heads // K, b.shape[1] // K if later else 1,
        INNER=inner, OUTER=outer, KIND=kind, N=chunk_of(a),
    )  # fmt: skip
    return y


class LinearAttention(torch.autograd.Function):
    """With total and δ as in `chunk_kernel`; the states of the forward pass are kept for dq."""

    @staticmethod
    def forward(ctx, q, k, v, starts, past):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        states, final = states_of(OUT.value, k, v, k.shape[1], None, None, starts, past)
        den = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        out = chunks(OUT.value, q, k, v, states, den, None, None, starts)
        ctx.save_for_backward(q, k, v, out, states, den, starts)
        final = final[..., : v.shape[3] + 1]
        ctx.mark_non_differentiable(final)
        return out, final

    @staticmethod
    def backward(ctx, dout, _):
        q, k, v, out, states, den, starts = ctx.saved_tensors
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        delta = torch.empty_like(den)
        dq = chunks(DQ.value, dout, v, k, states, den, delta, out, starts)
        states, _ = states_of(DK.value, q, dout, k.shape[1], den, delta, starts)
        dk = chunks(DK.value, v, dout, q, states, den, delta, None, starts)
        dv = chunks(DV.value, k, q, dout, states, den, delta, None, starts)
        return dq, dk, dv, None, None


def linear_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None = None, past: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same function and gradients as `linear_attention_obvious`, in kernels written by hand."""
    name = "linear_attention_triton"
    launch.check(name, q=q, k=k, v=v)
    check_shapes(name, q, k, v, starts, past)
    if not q.dtype == k.dtype == v.dtype:
        kinds = ", ".join(str(x.dtype) for x in (q, k, v))
        raise ValueError(f"{name}: q, k and v must have one dtype, not {kinds}")
    for what, x in (("starts", starts), ("past", past)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name}: {what} is on {x.device}, but q on {q.device}")
    for what, x in (("M, the width of q and k,", q), ("D, the width of v,", v)):
        if not 1 <= x.shape[3] <= WIDEST:
            raise ValueError(f"{name}: {what} is {x.shape[3]}; supported is 1 to {WIDEST}")
    if not q.numel():
        return linear_attention_chunked(q, k, v, starts, past)
    starts = None if starts is None else starts.contiguous()
    return LinearAttention.apply(q, k, v, starts, past)

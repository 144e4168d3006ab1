"""The mathematics, slow and obvious, in NumPy float64: one loop for each index that a paper writes.

Nothing here imports from the project: a mistake would have to be made twice to go unseen.
"""

import math

import numpy as np

# --- attention ------------------------------------------------------------------------------------


def attend(q, k, v, lo, hi, scale):
    """One query at a time (Vaswani et al. 2017, eq. 1); query head h uses key-value head h·K//H."""
    (B, H, T, _), K = q.shape, k.shape[1]
    out = np.zeros(q.shape)
    for b, h, t in np.ndindex(B, H, T):
        first, last = max(lo[b, t], 0), min(hi[b, t], k.shape[2] - 1)
        if first > last:
            continue
        keys, values = k[b, h * K // H, first : last + 1], v[b, h * K // H, first : last + 1]
        scores = scale * keys @ q[b, h, t]
        weights = np.exp(scores - scores.max())
        out[b, h, t] = weights / weights.sum() @ values
    return out


def rope(x, position, base, scale=lambda theta: theta):
    """One vector x (D) at one position: the pair (i, i + D/2) turned by position·θ_i.

    θ_i = base^(−2i/D), which `scale` may change.
    """
    D = len(x)
    out = np.zeros(D)
    for i in range(D // 2):
        angle = position * scale(base ** (-2 * i / D))
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        out[[i, i + D // 2]] = turn @ x[[i, i + D // 2]]
    return out


def llama3(theta, factor, context, low, high):
    """One frequency of Llama 3.1, by the three cases of Meta's `apply_scaling`."""
    wavelength = 2 * math.pi / theta
    if wavelength < context / high:
        return theta
    if wavelength > context / low:
        return theta / factor
    smooth = (context / wavelength - low) / (high - low)
    return (1 - smooth) * theta / factor + smooth * theta


# --- parts of the model ---------------------------------------------------------------------------


def rmsnorm(x, w, eps):
    return np.stack([row / math.sqrt((row**2).mean() + eps) * w for row in x])


def layernorm(x, w, b, eps):
    return np.stack([(row - row.mean()) / math.sqrt(row.var() + eps) * w + b for row in x])


def gelu(x):
    """x · Φ(x), Φ the normal distribution function (Hendrycks and Gimpel 2016)."""
    return np.array(
        [value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x.ravel()]
    ).reshape(x.shape)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


def cross_entropy(hidden, weight, targets, ignore):
    """Σ −log softmax(W h)[target], one token at a time."""
    total = 0.0
    for h, target in zip(hidden, targets, strict=True):
        if target != ignore:
            logits = weight @ h
            total += math.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target]
    return total


# --- optimizers -----------------------------------------------------------------------------------


def adamw(p, grads, lr, beta1, beta2, eps, decay):
    """All updates of one array by Algorithm 2 of Loshchilov and Hutter 2019, with η = lr."""
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        p = p - lr * (m_hat / (np.sqrt(v_hat) + eps) + decay * p)
    return p


def sgd(p, grads, lr, momentum, decay):
    """All updates of an array, one number at a time: m ← μm + g + decay·p, p ← p − lr·m."""
    p = p.copy()
    for i in np.ndindex(p.shape):
        m = 0.0
        for g in grads:
            m = momentum * m + g[i] + decay * p[i]
            p[i] -= lr * m
    return p


def adafactor(p, grads, lr, decay):
    """All updates of an array by algorithms 4 and 5 of Shazeer and Stern 2018, number by number."""
    p, sums = p.copy(), np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        kept = 1 - t**-0.8
        sums = kept * sums + (1 - kept) * (g**2 + 1e-30)
        U, alpha = np.zeros_like(p), lr * max(1e-3, math.sqrt(np.mean(p**2)))
        for i in np.ndindex(p.shape):
            V = sums[i]
            if p.ndim == 2:  # R Cᵀ/(1ᵀR) of sums over columns and rows
                V = sums[i[0]].sum() * sums[:, i[1]].sum() / sums.sum()
            U[i] = g[i] / math.sqrt(V)
        U /= max(1.0, math.sqrt(np.mean(U**2)))
        p = p - alpha * (U + decay * p)
    return p


def orthogonal_factor(G):
    """U Vᵀ of the singular value decomposition G = U S Vᵀ."""
    U, _, V = np.linalg.svd(G, full_matrices=False)
    return U @ V


# --- sampling -------------------------------------------------------------------------------------


def nucleus(probabilities, p):
    """The ids of the smallest set of likeliest tokens whose probabilities sum to at least p."""
    chosen, total = set(), 0.0
    for i in sorted(range(len(probabilities)), key=lambda i: -probabilities[i]):
        if total >= p:
            break
        chosen.add(i)
        total += probabilities[i]
    return chosen


# --- attention that sees less, or by features -----------------------------------------------------


def performer(q, k, v, lo, hi, w, scale):
    """One query at a time: the weight of a key is Σ_m φ_m(q) φ_m(k) (Choromanski et al., eq. 5).

    φ_m(x) = exp(w_m·x − |x|²/2) of x = √scale · q or k (lemma 1), all divided by the largest
    there is, so that they do not vanish.
    """
    (B, H, T, _), K = q.shape, k.shape[1]
    out = np.zeros(q.shape)
    for b, h, t in np.ndindex(B, H, T):
        x = math.sqrt(scale) * q[b, h, t]
        logs = {}
        for s in range(max(lo[b, t], 0), min(hi[b, t], k.shape[2] - 1) + 1):
            y = math.sqrt(scale) * k[b, h * K // H, s]
            logs[s] = [direction @ (x + y) - (x @ x + y @ y) / 2 for direction in w]
        top = max(map(max, logs.values()), default=0)
        weights = {s: sum(math.exp(one - top) for one in row) for s, row in logs.items()}
        for s, weight in weights.items():
            out[b, h, t] += weight / sum(weights.values()) * v[b, h * K // H, s]
    return out


def blocks_seen(pattern, i, n, near, special):
    """The blocks among n that block i looks at, as the papers write the sets, both ways in time.

    near: the Sparse Transformer's l, or a window of so many blocks on each side; special: its c, or
    the number of global blocks.
    """
    every = set(range(n))
    if pattern == "strided":  # Child et al. 2019, section 4.2: A(1) and A(2)
        return every & set(range(i - near, i + near + 1)) | set(range(i % near, n, near))
    if pattern == "fixed":
        span = set(range(i // near * near, i // near * near + near))
        ends = [range(e - special, e) for e in range(near, n + near, near)]
        return every & span.union(*ends) if special <= near else every
    if i < special:
        return every
    return every & (set(range(i - near, i + near + 1)) | set(range(special)))

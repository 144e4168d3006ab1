"""Bugs to plant: a law that never failed on one is not yet a test.

Each file of kernels/ has the test files that must catch its bugs, and the bugs: a text that occurs
once in the file, and what a tired author might have written there. All change a result, a memory
access or a refusal; what costs only time is not here. `tests/test_bugs.py` plants them one by one.

A bug that is in the table was caught. Most were at once; for others a test had to draw more. Two
kinds are left out, because no test here can report them: a write beyond the end that kills the
interpreter, and a write into a neighbour's place that its own program, run later, mends.
"""

FLASH = ("test_kernel_flash.py",)
ATTENTION = ("test_attention.py", "test_kernel_flash.py")

BUGS = {
    "flash": (
        FLASH,
        [
            # who sees whom
            ("(lo <= col) & (col <= hi)", "(lo < col) & (col <= hi)"),
            ("tl.maximum(tl.load(Lo + row), 0)", "tl.load(Lo + row)"),
            ("tl.minimum(tl.load(Hi + row), S - 1)", "tl.minimum(tl.load(Hi + row), S)"),
            ("full = tl.cdiv(tl.max(lo), N) * N", "full = tl.max(lo) // N * N"),
            ("full_end = (tl.min(hi) + 1) // N * N", "full_end = tl.cdiv(tl.min(hi) + 1, N) * N"),
            (
                "full_end, left, masked = reach(first, full, full_end, tl.max(hi) + 1, N)",
                "full_end, left, masked = reach(first, full, full_end, tl.max(hi), N)",
            ),
            ("(lo_max <= n) & (hi_min >= n + N - 1)", "(lo_max <= n) & (hi_min >= n)"),
            ("(lowest < n + N) & (highest >= n)", "(lowest < n + N) & (highest > n)"),
            (
                "full_end = tl.min(tl.where(~whole & (index > full), index, queries))",
                "full_end = tl.max(tl.where(whole, index + 1, 0))",
            ),
            ("(tl.min(lo) < n + N) & (tl.max(hi) >= n)", "(tl.min(lo) < n + N) & (tl.max(hi) > n)"),
            ("tl.store(bounds, tl.min(lo))", "tl.store(bounds, tl.max(lo))"),
            ("blocks += h * blocks_h + n // TILE * blocks_t", "blocks += n // TILE * blocks_t"),
            ("tl.load(Layout + h * layout_h + m //", "tl.load(Layout + m //"),
            ("else mask.layout.mT", "else mask.layout"),
            ("p = tl.where(open, p, 0.0)", "p = tl.where(open, p, p)"),
            ("return rest // size, first + rest % size", "return rest // size, rest % size"),
            ("whole = max(whole, mask.block)", "pass"),
            # the scores and the online softmax
            ('safe = tl.where(new == -float("inf"), 0.0, new)', "safe = new"),
            # gradients
            ('lse = tl.where(lse == -float("inf"), float("inf"), lse)', "lse = lse + 0.0"),
            ("delta -= tl.load(GradLse", "delta += tl.load(GradLse"),
            ("ds = p * (dp - delta[None, :])", "ds = p * dp"),
            ("h = kh * group + g", "h = g * heads + kh"),
            ("for g in range(group):", "for g in range(1):"),
            ("k = tile(K, b, h // group, n,", "k = tile(K, b, h % (H // group), n,"),
            # where the numbers lie
            ("tl.cast(h, tl.int64) * X[2]", "h * X[2]"),
            ('"lo_b": own_stride(lo, 0)', '"lo_b": 0'),
            ('"at_b": own_stride(at, 0)', '"at_b": 0'),
            ('"bias_h": own_stride(bias, 1)', '"bias_h": 0 if bias is None else bias.stride(1)'),
            ("0 if bias is None else bias.stride(3)", "1"),
            ("else mask.slopes.contiguous()", "else mask.slopes"),
            ("lo, hi = mask.lo.contiguous(), mask.hi.contiguous()", "lo, hi = mask.lo, mask.hi"),
            ("layout.to(torch.int8)\n        .contiguous()", "layout.to(torch.int8)"),
            ("else mask.layout.contiguous()", "else mask.layout"),
            ("else grad_lse.contiguous()", "else grad_lse"),
            ("x if addressable(x) else room_like(x).copy_(x)", "x"),
            ("out.zero_(), lse.fill_(-torch.inf)", "lse.fill_(-torch.inf)"),
        ],
    ),
    "attention": (
        (*ATTENTION, "test_sparse.py"),
        [
            ("k, v = k.repeat_interleave(groups, 1), v", "k, v = k.repeat(1, groups, 1, 1), v"),
            ("(scores.softmax(-1) @ v).masked_fill(blind, 0)", "scores.softmax(-1) @ v"),
            ("masked_fill(blind[..., 0], -torch.inf)", "masked_fill(blind[..., 0], 0)"),
            ("blind = hidden.all(-1, keepdim=True)", "blind = hidden.any(-1, keepdim=True)"),
            ("each += added", "each -= added"),
            ("added = -slopes if added is None else added - slopes", "added = -slopes"),
            ("dv[:, :, keys] += (p", "dv[:, :, keys] = (p"),
            ("ds -= (do * group(out", "ds += (do * group(out"),
            ("ds *= ctx.scale", "ds *= 1"),
            ("min(S, int(hi.max()) + 1)", "min(S, int(hi.max()))"),
            ("open_rows.flatten(0, 1).any(0)", "open_rows.flatten(0, 1).all(0)"),
            ("group(q * scale, K)", "group(q, K)"),
            ('("lo", "hi", "slopes", "at", "bias", "layout")', '("lo", "hi")'),
            ("if not q.dtype == k.dtype == v.dtype:", "if q.dtype != k.dtype:"),
            ("if not 16 <= q.shape[3] <= 256:", "if not 16 <= q.shape[3] < 256:"),
            ("if not scale > 0:", "if scale < 0:"),
            ("mask.bias.dtype not in launch.FLOATS", "mask.bias.dtype == torch.int64"),
            ("mask.block < 16 or mask.block & (mask.block - 1)", "mask.block & (mask.block - 1)"),
        ],
    ),
    "mask": (
        ATTENTION,
        [
            ("mask.lo[..., None] <= s", "mask.lo[..., None] < s"),
            ("self.bias is None and self.layout is None", "self.bias is None"),
            ("return self.slopes is None and self.bias", "return self.bias"),
            ("seen & per_query", "seen | per_query"),
            (
                "torch.arange(keys, device=seen.device)).abs()",
                "torch.arange(keys, device=seen.device))",
            ),
            ("added = added + mask.bias", "added = mask.bias"),
            ("if k.shape != v.shape or", "if"),
            ("!= (B, D):", "!= (B, k.shape[3]):"),
            ("if H % K:", "if H < K:"),
            ('"hi": (tuple(mask.lo.shape),)', '"hi": ((B, T), (1, T))'),
            ('"slopes": ((H,),)', '"slopes": ((H,), (1,))'),
            ('"at": ((B, T), (1, T))', '"at": ((B, T), (1, T), (1, 1))'),
            ("(-(-T // mask.block), -(-S // mask.block))", "(T // mask.block, S // mask.block)"),
            (
                "if mask.slopes is not None and mask.at is None:",
                "if mask.slopes is None and mask.at is None:",
            ),
        ],
    ),
    "decode": (
        ("test_kernel_decode.py",),
        [
            ("if q.shape[2] != 1:", "if q.shape[2] < 1:"),
            ("in (q, k, v, mask.bias, mask.slopes)", "in (q, k, v, mask.slopes)"),
            ("lo = tl.maximum(tl.load(Lo + b * lo_b), 0)", "lo = tl.load(Lo + b * lo_b)"),
            ("tl.load(Hi + b * hi_b), S - 1)", "tl.load(Hi + b * hi_b), S)"),
            ("(share + (split < rest)) * N, hi + 1)", "(share + (split < rest)) * N, hi)"),
            ("(split * share + tl.minimum(split, rest)) * N", "(split * share + rest) * N"),
            ("pid % tiles * M + tl.arange", "tl.arange"),
            ("there = (col < end)[:, None]", "there = (col < S)[:, None]"),
            ("s = tl.where(col < end, s", "s = tl.where(col <= end, s"),
            ('safe = tl.where(new == -float("inf"), 0.0, new)', "safe = new"),
            ("far = col.to(tl.int64)", "far = col"),
            ('other=-float("inf")) - top)', "other=0.0) - top)"),
            ('top = tl.where(top == -float("inf"), 0.0, top)', "top = top + 0.0"),
            ("for first in range(0, splits, N):", "for first in range(0, 1, N):"),
            ("splits = max(1, min(enough, S // LEAST))", "splits = min(enough, S // LEAST)"),
            ("x if x.stride(-1) == 1 else x.contiguous()", "x"),
            ("else mask.slopes.contiguous()", "else mask.slopes"),
            ("else mask.bias.stride(3)", "else 1"),
            ("own_stride(mask.bias, 1), bias_s", "0, bias_s"),
        ],
    ),
    "norm": (
        ("test_kernel_norm.py",),
        [
            # torch
            ("norm.square() / x.shape[-1] + eps", "norm.square() / x.shape[-1]"),
            ("mean = (both @ w / x.shape[-1])", "mean = (both.sum(-1) / x.shape[-1])"),
            ("addcmul_(x_hat, mean, value=-1).mul_(r)", "addcmul_(x_hat, mean, value=-1)"),
            ("torch.rsqrt(centred.square()", "torch.rsqrt(wide.square()"),
            # forward
            ("row * branch_row", "row * x_row"),
            ("tl.where(there, x - mean, 0.0)", "x - mean"),
            (
                "tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / C",
                "tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / BLOCK",
            ),
            ("keep_dims=True) / C + eps)", "keep_dims=True) / C) + eps"),
            ("row = first.to(tl.int64) * R", "row = first * R"),
            ("x = x.to(tl.float32)\n", "x = x\n"),
            # backward
            ("db += dy\n", "db += dy * r\n"),
            ("x_hat = x * r\n        dw += dy * x_hat", "x_hat = x * r\n        dw += dy * x"),
            ("tl.sum(g * x_hat, 1", "tl.sum(dy * x_hat, 1"),
            ("dx -= tl.sum(g, 1", "dx -= tl.sum(dy, 1"),
            ("tl.cdiv(N, ROWS), tl.num_programs(0)", "N // ROWS, tl.num_programs(0)"),
            ("at = tl.program_id(0) * C + columns", "at = tl.program_id(0) * BLOCK + columns"),
            # launches and refusals
            ("parts.zero_()", "pass"),
            ("(w if w is None else w.contiguous() for w in (weight, bias))", "weight, bias"),
            ("x.stride(0), dy.stride(0)", "x.stride(0), x.stride(0)"),
            ("x = x if x.stride(-1) == 1 else x.contiguous()", "x = x"),
            ("return dtotal, dtotal, None", "return dtotal, None, None"),
            ("if not 1 <= C <= WIDEST:", "if C > WIDEST:"),
            ("if not 1 <= C <= WIDEST:", "if not 1 <= C < WIDEST:"),
            ("branch.shape != x.shape or branch.dtype != x.dtype", "branch.shape != x.shape"),
            ('for name in ("weight", "bias"):', 'for name in ("weight",):'),
        ],
    ),
    "cross_entropy": (
        ("test_kernel_cross_entropy.py",),
        [
            # torch
            ("loss += (total * asked).sum()", "loss += total.sum()"),
            ("total = (1 - smoothing) * nll", "total = nll"),
            ("z_loss * lse.square()", "z_loss * lse"),
            ("torch.full_like(p[:, :1], smoothing - 1)", "torch.full_like(p[:, :1], -1)"),
            # the kernel
            ('tl.where(col < V, x, -float("inf"))', 'tl.where(col < width, x, -float("inf"))'),
            ("tl.where(col < V, x, 0.0) if MASKED else x", "x"),
            ("[BLOCK // 8], -3e38, tl.float32)", "[BLOCK // 8], 0.0, tl.float32)"),
            ("full = V // BLOCK * BLOCK", "full = V // 8 * 8"),
            ("2 * z_loss * lse, smoothing / V", "2 * z_loss * lse, smoothing"),
            ("(x_target - tl.sum(sum_x, 0) / V)", "(x_target - tl.sum(sum_x, 0) / width)"),
            ("p - 1 + smoothing, p)", "p - 1, p)"),
            ("known = (target >= 0) & (target < V)", "known = (target >= 0) & (target <= V)"),
            ("for start in range(0, width, BLOCK):", "for start in range(0, full, BLOCK):"),
            ("tl.store(Row + col, d, col < width)", "tl.store(Row + col, d)"),
            ("tl.store(Row + col, zero, col < width)", "tl.store(Row + col, zero)"),
            ("row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)"),
            # launches and refusals
            (
                "rows = slice(start, start + size)\n            h = hidden[rows]\n",
                "rows = slice(start, start + size)\n            h = hidden[:size]\n",
            ),
            ("torch.zeros(V, C, dtype=torch.float32", "torch.empty(V, C, dtype=torch.float32"),
            ("total += a @ b", "total.copy_(a @ b)"),
            (
                "W, targets = weight.to(hidden.dtype), targets.contiguous()",
                "W = weight.to(hidden.dtype)",
            ),
            ("GRADIENT=need_h or need_W", "GRADIENT=need_h"),
            ("(dh, dW), ctx.grads = ctx.grads, None", "dh, dW = ctx.grads"),
            ("if not 0 <= smoothing <= 1:", "if smoothing < 0:"),
            ("(targets >= len(weight))", "(targets > len(weight))"),
            (
                "tensors if torch.is_grad_enabled() else tuple(x.detach() for x in tensors)",
                "tensors",
            ),
        ],
    ),
    "elementwise": (
        ("test_kernel_elementwise.py",),
        [
            ("dgate = x * s * (1 + gate * (1 - s))", "dgate = x * s * (1 + gate * s)"),
            ("tl.exp(-0.5 * x * x)", "tl.exp(-x * x)"),
            ("half = tl.sigmoid(2 * u)", "half = tl.sigmoid(u)"),
            ("0.134145 * x * x", "0.044715 * x * x"),
            ("(x, gate, dy.contiguous(), dx", "(x, gate, dy, dx"),
            ("None if gate is None else gate.contiguous()", "gate"),
            ("x = x.contiguous()\n", "x = x\n"),
            # RoPE
            ("addcmul_(x2, sin, value=-1)", "addcmul_(x2, sin)"),
            ("turn(grad, cos, -sin)", "turn(grad, cos, sin)"),
            ("near = X + (t // T) * x_b + (t % T) * x_t", "near = X + t * x_t"),
            ("tl.load(near + HALF, mine", "tl.load(near + 1, mine"),
            ("angle = (t // T) * angle_b + (t % T) * HALF", "angle = t * HALF"),
            ("row = tl.program_id(0).to(tl.int64) * ROWS", "row = tl.program_id(0) * ROWS"),
            ("there = (t < B * T) & (column < HALF)", "there = t < B * T"),
            ("*ctx.saved_tensors, -1.0)", "*ctx.saved_tensors, 1.0)"),
            ("x if x.stride(3) == 1 else x.contiguous()", "x"),
            ("cos.contiguous(), sin.contiguous())", "cos, sin)"),
            ("0 if len(cos) == 1 else cos.stride(0)", "cos.stride(0)"),
            ("launch.ceil_div(B * T * (H + K), meta", "launch.ceil_div(B * T * H, meta"),
            # refusals
            ("up.shape != gate.shape or up.dtype != gate.dtype", "up.shape != gate.shape"),
            ("if D % 2 or k.shape[:2]", "if k.shape[:2]"),
            ("k.shape[:2] != (B, T) or", ""),
            ("(tuple(cos.shape),)", "((B, T, D // 2), (1, T, D // 2))"),
            ("k.shape[3] != D or k.dtype != dtype", "k.shape[3] != D"),
        ],
    ),
    "adamw": (
        ("test_kernel_adamw.py",),
        [
            ("div_(math.sqrt(1 - beta2**t)).add_(eps)", "add_(eps).div_(math.sqrt(1 - beta2**t))"),
            # the kernel
            ("other=0.0).to(tl.float32) * scale", "other=0.0).to(tl.float32)"),
            ("* (1 - lr * decay)\n    tl.store", "\n    tl.store"),
            ("tl.sqrt(v) * root + eps)", "(tl.sqrt(v) + eps) * root)"),
            ("there = i < size if", "there = i <= size if"),
            ("last = tl.minimum(first + CHUNK, size)", "last = size"),
            ("last = tl.minimum(first + CHUNK, size)", "last = first + CHUNK"),
            ("if full < last:", "if full + 1 < last:"),
            ("tl.load(Decays + which)", "tl.load(Decays)"),
            (
                "first = tl.multiple_of(tl.load(chunk + 1), 16)",
                "first = tl.load(chunk + 1).to(tl.int32)",
            ),
            ("scale *= tl.load(Scale).to(tl.float32)", "scale *= tl.load(Scale) * tl.load(Scale)"),
            # launches and refusals
            ("lr / (1 - beta1**t), float(lr)", "lr / (1 - beta1 ** (t + 1)), float(lr)"),
            ("1 / math.sqrt(1 - beta2**t),", "1 / (1 - beta2**t),"),
            ("cut = device, list(decays),", "cut = device, decays,"),
            ("if (cut, placed) == (self.cut, self.placed):", "if cut == self.cut:"),
            (
                "pointer % 16 == 0 for pointer in placed[0]",
                "pointer % 4 == 0 for pointer in placed[0]",
            ),
            ("for s in range(0, size, CHUNK)", "for s in range(0, size - 1, CHUNK)"),
            ("grads = [g.contiguous() for g in grads]", "grads = list(grads)"),
            ("for x in (*lists.values(), decays)} !=", "for x in lists.values()} !="),
            (
                "g.dtype != grads[0].dtype or g.dtype not in launch.FLOATS",
                "g.dtype not in launch.FLOATS",
            ),
            (
                "g.dtype != grads[0].dtype or g.dtype not in launch.FLOATS",
                "g.dtype != grads[0].dtype",
            ),
            ("x.shape != p.shape or not x.is_contiguous()", "x.shape != p.shape"),
            ("if g.device != params[0].device:", "if g.device != grads[0].device:"),
        ],
    ),
    "int8": (
        ("test_kernel_int8.py",),
        [
            # torch
            ("(largest >= threshold)", "(largest > threshold)"),
            ("x = x.index_fill(1, columns, 0)", "pass"),
            (".where(~(largest < TINY), 0)", ".where(largest >= TINY, 0)"),
            (".nan_to_num(0).round().to(", ".nan_to_num(0).to("),
            ("(weight_q[:, columns] * weight_scale[:, None])", "weight_q[:, columns]"),
            # quantization
            ("x.to(tl.int32, bitcast=True) & 0x7FFFFFFF", "x.to(tl.int32, bitcast=True)"),
            ("tl.where(largest < TINY, 0.0, largest)", "tl.where(largest <= TINY, 0.0, largest)"),
            ("v = (v + 12582912.0) - 12582912.0", "v = tl.floor(v + 0.5)"),
            (
                "tl.load(Keep + col, there, other=0) != 0, x, 0.0)",
                "tl.load(Keep + col, there, other=0) != 0, x, x)",
            ),
            ("column = tl.where(column < 0, column + K, column)", "column = column + 0"),
            ("outliers = tl.load(X + column * x_column, o", "outliers = tl.load(X + column, o"),
            (
                "tl.store(Outliers + row * padded + o, outliers, o < padded)",
                "tl.store(Outliers + row * padded + o, outliers, o < k)",
            ),
            ("bits = tl.maximum(bits, magnitude_bits(x))", "bits = magnitude_bits(x)"),
            ("X += row * x_row", "X += row.to(tl.int32) * x_row"),
            # the product
            ("(row < X[2]) & (col < X[3])", "row < X[2]"),
            ("row.to(tl.int64) * X[1] + col", "row * X[1] + col"),
            ("height = tl.minimum(down - first, 8)", "height = 8"),
            ("first = pid // (8 * across) * 8", "first = 0"),
            ("for at in range(0, K, BK):", "for at in range(0, K // BK * BK, BK):"),
            ("for first in range(0, padded, 16):", "for first in range(0, 16, 16):"),
            ("(col[:, None] < N) & (o < k), other", "col[:, None] < N, other"),
            ("Y += row[:, None].to(tl.int64) * N", "Y += row[:, None] * N"),
            # launches and refusals
            ("Wo.stride()), size", "(Wo.stride(0), 1)), size"),
            ("*x.stride(), q.stride(0)", "*x.stride(), K"),
            ("x, q, scale, M, K, *x.stride(), TINY", "x, q, scale, M, K, K, 1, TINY"),
            ("columns, outliers = columns.contiguous(),", "outliers ="),
            ("weight_scale.contiguous(),", "weight_scale,"),
            ("weight_q if weight_q.stride(1) == 1 else weight_q.contiguous()", "weight_q"),
            ("x.shape[-1] != K or not 1 <= K <= MOST", "x.shape[-1] != K"),
            ("tensor.shape != shape or tensor.device != x.device", "tensor.shape != shape"),
            ("columns.dtype != torch.int64:", "columns.dtype == torch.float32:"),
            ("x.requires_grad and torch.is_grad_enabled()", "x.requires_grad"),
        ],
    ),
    "int4": (
        ("test_kernel_int4.py",),
        [
            # torch
            ("w.amin(2).clamp(max=0)", "w.amin(2)"),
            ("(high - low) / 15 *", "(high - low) / 16 *"),
            (" * (1 + limits.eps)", ""),
            (".clamp(min=limits.tiny)", ""),
            ("return (codes - zeros) * scales", "return codes * scales - zeros"),
            # one row
            ("upper = words >> 12", "upper = words >> 16"),
            ("(b * 128 + 32 * j) // GROUP, G - 1)", "b * 128 // GROUP, G - 1)"),
            ("tl.minimum((b * 128 + 32 * j) // GROUP, G - 1)", "(b * 128 + 32 * j) // GROUP"),
            ("(k < K) & (b < last)[:, None]", "k < K"),
            ("(k < K) & (b < last)[:, None]", "(b < last)[:, None]"),
            ("if j == 3 or 32 * (j + 1) % GROUP == 0:", "if 32 * (j + 1) % GROUP == 0:"),
            ("last = tl.minimum(first + span, blocks)", "last = blocks"),
            ("n[:, None, None].to(tl.int64) * (blocks", "n[:, None, None] * (blocks"),
            ("group = n[:, None].to(tl.int64) * G", "group = n[:, None] * G"),
            # several rows
            ("(codes - (zero + shift).to(DTYPE)) * scale", "(codes - shift) * scale"),
            ("beside(w[0], w[1]), beside(w[2], w[3])", "beside(w[0], w[2]), beside(w[1], w[3])"),
            ("* M + col) * N + row", "* M + row) * N + col"),
            ("N - 1).to(tl.int64)  # rows", "N - 1)  # rows"),
            # parts
            ("Bias + at % N", "Bias + at"),
            ("Parts += total", "Parts += N"),
            (
                "(y.new_empty(parts, M, N, dtype=torch.float32), None)",
                "(y.new_empty(parts, M, N, dtype=torch.float32), bias)",
            ),
            ("return launch.ceil_div(blocks, span), span", "return parts, blocks // parts"),
            # launches and refusals
            (
                "packed.contiguous(), scales.contiguous(), zeros.contiguous()",
                "packed, scales.contiguous(), zeros.contiguous()",
            ),
            (
                "packed.contiguous(), scales.contiguous(), zeros.contiguous()",
                "packed.contiguous(), scales, zeros.contiguous()",
            ),
            (
                "packed.contiguous(), scales.contiguous(), zeros.contiguous()",
                "packed.contiguous(), scales.contiguous(), zeros",
            ),
            ("bias = None if bias is None else bias.contiguous()", "pass"),
            ("rows = aligned(rows)", "rows = rows.contiguous()"),
            ("group < 1 or group % BLOCK", "group % BLOCK"),
            ("if group not in (32, 64) and", "if group not in (32, 64, 96) and"),
            (
                '"zeros": (zeros, groups, (torch.uint8,))',
                '"zeros": (zeros, groups, (torch.uint8, torch.int32))',
            ),
            ('"scales": (scales, groups, (x.dtype,))', '"scales": (scales, groups, launch.FLOATS)'),
            ("if K < 1 or tensor.shape", "if tensor.shape"),
        ],
    ),
    "linear_attention": (
        ("test_kernel_linear_attention.py",),
        [
            # torch
            ("(q_c * (start < first)[:, :, None])", "(q_c * (start <= first)[:, :, None])"),
            # states and scan
            (
                "seen &= tl.load(Starts + t, t < T, other=0) < first",
                "seen &= tl.load(Starts + t, t < T, other=0) <= first",
            ),
            ("head = h * group + g\n", "head = h\n"),
            (
                'acc += tl.dot(x.T, y, input_precision="ieee") * most',
                'acc += tl.dot(x.T, y, input_precision="ieee")',
            ),
            (">= chunk * N:", "> chunk * N:"),
            ("acc += tl.load(Past + head * size + at", "acc += tl.load(Past + at"),
            (
                "tl.store(States + i * W + OUTER, extra,",
                "tl.store(States + i * W + OUTER - 1, extra,",
            ),
            # chunks
            (
                "t[:, None] <= t[None, :] if LATER else t[:, None] >= t[None, :]",
                "t[:, None] <= t[None, :] if LATER else t[:, None] > t[None, :]",
            ),
            ("t[:, None] <= t[None, :] if LATER", "t[:, None] < t[None, :] if LATER"),
            ("carried &= start < first", "carried &= start <= first"),
            ("seen &= t[:, None] >= start[None, :]", "seen &= t[:, None] > start[None, :]"),
            ("a = tl.where(carried[:, None], a, 0.0)", "a = a"),
            (
                "head = h * group + g if LATER else h // share",
                "head = h * group + g if LATER else h % share",
            ),
            (
                "(b * heads + h) // share * tl.num_programs(1)",
                "(b * heads + h) * tl.num_programs(1)",
            ),
            (
                '(s * inverse(most)).to(a.dtype), input_precision="ieee") * most',
                's.to(a.dtype), input_precision="ieee")',
            ),
            ("tl.load(X + n.to(tl.int64)[:, None] * stride", "tl.load(X + n[:, None] * stride"),
            # launches and refusals
            ("b.shape[1] // K if later else 1", "1"),
            ("x if x.stride(-1) == 1 else x.contiguous()", "x"),
            ("dout if dout.stride(-1) == 1 else dout.contiguous()", "dout"),
            ("else starts.contiguous()", "else starts"),
            ("if not K or H % K:", "if not K or H < K:"),
            ("if starts is not None and past is not None:", "if False:"),
            ("if not 1 <= x.shape[3] <= WIDEST:", "if not 1 <= x.shape[3] <= 2 * WIDEST:"),
            ("k.shape != (B, K, T, M) or v.shape[:3] != (B, K, T)", "k.shape != (B, K, T, M)"),
        ],
    ),
}

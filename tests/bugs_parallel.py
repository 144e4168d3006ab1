"""Bugs to plant in parallelism; `tests/bugs.py` says what they are for."""

PARALLEL = ("test_parallel.py", "test_traffic.py")
ZERO = ("test_zero.py", "test_traffic.py")

BUGS = {
    "data_parallel": (
        PARALLEL,
        [
            # only full buckets are sent; others wait for ever
            ("bucket.ready = len(bucket.params)\n        self.send()", "pass"),
            ("g.copy_(some.view_as(g))", "g.copy_(some.view_as(g))\n                break"),
            # the first bucket to be filled is the last to leave
            ("for p in reversed(params):", "for p in params:"),
        ],
    ),
    "mesh": (
        PARALLEL,
        [
            (
                "grid.movedim(0, 2).flatten(0, 1)",
                "grid.movedim(0, 1 if data == pipeline else 2).flatten(0, 1)",
            ),
            ("half = 1 << (len(parts) - 1).bit_length() - 1", "half = len(parts) // 2"),
            # traffic that is not counted, or wrongly
            (
                "size - 1) / self.size)\n            dist.all_reduce(x, group",
                "size))\n            dist.all_reduce(x, group",
            ),
            ('self.count("send", x.nbytes)', "pass"),
            ('self.count("gather", x.nbytes * (self.size - 1))', 'self.count("gather", x.nbytes)'),
        ],
    ),
    "schedule": (
        ("test_schedule.py", *PARALLEL),
        [
            ("warm = min(stages - 1 - stage, micros)", "warm = min(stages - stage, micros)"),
            ("steps += [Step(False, warm + i), Step(True, i)]", "steps += [Step(False, warm + i)]"),
            (
                "[Step(True, i) for i in range(micros - warm, micros)]",
                "[Step(True, i) for i in reversed(range(micros - warm, micros))]",
            ),
            ("start = max([free[s], *", "start = max([0, *"),
            ("now += -1 if step.back else 1", "now += 0 if step.back else 1"),
        ],
    ),
    "split": (
        PARALLEL,
        [
            # a bias behind a sum, added by every rank
            (
                "y = Collect.apply(self.cut, *parts)\n        return y if self.bias is None else"
                " y + self.bias.to(y.dtype)\n\n    def forward(self, x: Tensor, mask",
                "b = 0 if self.bias is None else self.bias\n        return Collect.apply("
                "self.cut, *(part + b for part in parts))\n\n    def forward(self, x: Tensor, mask",
            ),
            # heads of one part with keys of the next
            (
                "setattr(part, name, linear.split(0, own))",
                "setattr(part, name, linear.split(0, partial(share, cut=cut, "
                "part=(i + (name == 'key')) % cut.parts)))",
            ),
            # f without its sum, g with one too many
            ("return ctx.cut.group.sum_(total.clone()), None", "return total.clone(), None"),
            (
                "return None, *(dy for _ in ctx.cut.own)",
                "return None, *(ctx.cut.group.sum_(dy.clone()) for _ in ctx.cut.own)",
            ),
            (
                "most = cut.group.max_(torch.stack([s.detach().amax(-1) for s in scores]).amax(0))",
                "most = torch.stack([s.detach().amax(-1) for s in scores]).amax(0)",
            ),
            (
                "inside = (ids >= p.place.lo) & (ids < p.place.hi)",
                "inside = (ids >= p.place.lo) & (ids <= p.place.hi)",
            ),
            (
                "inside = asked & (targets >= p.place.lo) & (targets < p.place.hi)",
                "inside = asked & (targets > p.place.lo) & (targets < p.place.hi)",
            ),
            (
                "own = partial(share, cut=cut, part=i)",
                "own = partial(share, cut=cut, part=0)",
            ),
            ("return torch.where(asked, loss, 0.0).sum()", "return loss.sum()"),
        ],
    ),
    "parallel": (
        PARALLEL,
        [
            # by what is divided
            ("dtype, factor / max(1, tokens))", "dtype, factor / max(1, tokens // plan.data))"),
            ("(y * scale).backward()", "(y * scale / len(batches)).backward()"),
            # clipping: on one rank only, and numbers that count twice
            (
                "norm, config.clip, config.clip_by",
                "norm, 0.0 if part.mesh.tensor.index else config.clip, config.clip_by",
            ),
            ("tuple(p.shape), here=mesh.tensor.index == 0)", "tuple(p.shape))"),
            (
                "            for p in self.heads:\n"
                "                p.place = p.place._replace(here=False)",
                "            pass",
            ),
            # tied weights
            (
                "    if not part.config.tied or part.heads is part.words:\n        return",
                "    return",
            ),
            # a bucket that leaves before its gradients are whole
            (
                "if step == steps[-1] and not plan.exact and plan.zero < 2:",
                "if step.micro == 0 and not plan.exact and plan.zero < 2:",
            ),
            # shares of the batch
            ("count * (index + 1) // plan.data)", "count // plan.data * (index + 1))"),
            ("x, y = kept.pop(step.micro)", "x, y = kept[step.micro]"),
            (
                "    if mesh.last and mesh.tensor.index == 0:\n        each",
                "    if mesh.last:\n        each",
            ),
            # tokens that are divided
            (
                "return super().drop(draws, self.own_tokens(at, 0))",
                "return super().drop(draws, at[: len(self.own_tokens(at, 0))])",
            ),
            (
                "return super().enter(x, self.own_tokens(positions, 1))",
                "return super().enter(x, positions[:, : x.shape[1]])",
            ),
            (
                "        if self.cut.sequence:\n            yield",
                "        if False:\n            yield",
            ),
            ("torch.empty_like(y, memory_format=torch.contiguous_format)", "torch.empty_like(y)"),
            ("yield [self.position.table], self.mesh.pipeline", "pass"),
            ("buckets = Buckets(part.in_order(),", "buckets = Buckets(params[: len(params) // 2],"),
        ],
    ),
    "zero": (
        ZERO,
        [
            ("return size * rank // ranks", "return size // ranks * rank"),
            ("for unit in self.units if self.stage < 3 else ():", "for unit in ():"),
            # weights and gradients that stay
            ("            p.untyped_storage().resize_(0)", "            pass"),
            ("        unit.free()\n\n    block.register", "        pass\n\n    block.register"),
            ("            p.grad = None\n            s.grad", "            s.grad"),
            # a backward pass without its weights, and micro-batches that forget those before
            ("            last.free()\n        unit.gather()", "            last.free()"),
            ("s.grad = g.clone() if s.grad is None else s.grad + g", "s.grad = g.clone()"),
            # an end that never comes, or does not count anew
            ("while self.stage >= 2 and self.sent < len(self.moving):", "while False:"),
            ("            unit.ready = 0", "            pass"),
            # gradients that are nowhere, and in another place
            (
                "s.grad = p.grad.view(-1)[s.place.first : s.place.last]",
                "s.grad = p.grad.view(-1)[: s.place.last - s.place.first]",
            ),
            (
                "torch.zeros(p.numel(), dtype=p.dtype, device=p.device) if p.grad is None",
                "torch.ones(p.numel(), dtype=p.dtype, device=p.device) if p.grad is None",
            ),
            # matrices put together
            (
                "    if place.last >= 0:\n        part.mesh.data.sum_(bits)",
                "    part.mesh.data.sum_(bits)",
            ),
            ('if not adafactor and not group["inside"]:', "if not adafactor:"),
            (
                "    for p in params:\n        p.copy_(p.place.read(W))",
                "    for p in params[:1]:\n        p.copy_(p.place.read(W))",
            ),
            ('if not name.startswith("cross.")', ""),
        ],
    ),
    "parallel_training": (
        ("test_parallel_training.py",),
        [
            # who saves and who takes up
            ("if place.here:\n                own", "if True:\n                own"),
            (
                "x.copy_(place.read(file.get_tensor(name)))",
                "x.copy_(place.read(file.get_tensor(name))) if kind == 'weight' else None",
            ),
            ('group["t"] = int(b.get_tensor("t/0"))', "pass"),
            # guards
            ("kinds.append((mesh.ends,", "list((mesh.ends,"),
            (
                "unlike = (group.gather(own[None]) != own).any(0).tolist()",
                "unlike = (own != own).tolist()",
            ),
            ("failed = world.sum_(failed.to(world.device))", "pass"),
            ("    if first != own:", "    if False:"),
            ("if least_bytes(config) <= there:", "if True:"),
            ("if again and (RUNS", "if (RUNS"),
            ("there /= int(os.environ.get", "there /= 1 or int(os.environ.get"),
        ],
    ),
}

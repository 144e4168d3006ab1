"""Linears whose weights are a few bits each, in the place of those that hold fp32.

Idea: a matrix becomes small integers and the steps that turn them back. Two kinds stand for W:

    Int8Linear     the product itself is one of integers: x is rounded, too, a scale for each token;
                   LLM.int8() leaves the few features with outliers out, and takes them in 16 bits
    PackedLinear   x stays as it is, and the codes of W (2 to 8 bits, or NF4) become numbers again
                   as they are needed: a quarter of the bytes, or less, to hold and to read

Both hold no fp32 weight, and answer what every linear answers (attention.py): shape, dense, like,
split. So adapters stand on them (QLoRA): the gradient goes through as if y were x Wᵀ.

    packed(model)                   the tensors of its file, and what each quantized linear is
    assembled(config, file, kinds)  the model again, to the bit

LLM.int8's outlier features are those of a calibration, with the original weights in fp16; if they
are chosen anew for each batch (`dynamic`), any feature may be one and their weights are what the
integers stand for, as in bitsandbytes. A part of the columns (tensor parallelism) gives each token
a scale for these columns alone: its error is bounded as before, but its bits are others. Parts of
rows, and all of PackedLinear, stay as they were.

On a GPU the products are those of kernels/int8.py and int4.py; on a CPU integers are summed by
torch._int_mm, exactly, and codes become a matrix for as long as the product takes.

Run: python -m pytest tests/test_quantized.py

Papers: Dettmers et al. 2022, LLM.int8() (arXiv 2208.07339); Dettmers et al. 2023, QLoRA (arXiv
2305.14314); Frantar et al. 2022, GPTQ (arXiv 2210.17323).

Letters: N output features · K input features · k outlier features · G groups of input features.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from grids import Grid, NormalFloat, absmax, nf4, pack, unpack, zero_point
from kernels.int4 import BLOCK, int4_linear, pack_int4, unpack_int4
from kernels.int8 import MOST, THRESHOLD, int8_linear, outlier_columns, quantize_rows
from lora import exchange, linears
from model import ModelConfig, Transformer
from run import Tensors, UserError, load_tensors, plain, settings
from split import Place

Share = Callable[[Parameter, int], Parameter]
STEP = torch.float16  # of what stands beside the codes, and of outlier features' weights


class Through(torch.autograd.Function):
    """The product of a quantized linear; backward as if it were x Wᵀ, with W made once more."""

    @staticmethod
    def forward(ctx, x: Tensor, linear: "Quantized") -> Tensor:
        ctx.linear = linear
        return linear.product(x)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return dy @ ctx.linear.dense().to(dy.dtype), None


class Quantized(nn.Module):
    """What both kinds have in common. Steps are buffers, which `writer.cast` does not round."""

    shape: tuple[int, int]

    def __init__(self, bias: Tensor | None):
        super().__init__()
        own = None if bias is None else Parameter(bias.detach(), bias.requires_grad)
        self.register_parameter("bias", own)

    def forward(self, x: Tensor) -> Tensor:
        y = Through.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def like(self, matrix: Tensor) -> "Quantized":
        """This matrix quantized in the same way, to the nearest codes; with the same bias."""
        return self.of(matrix, self.bias, self.how)

    def split(self, dim: int, share: Share) -> "Quantized":
        """The part of the rows (dim 0) or columns (1) that `share` takes of a weight."""
        numbers = Parameter(torch.arange(self.shape[dim]), requires_grad=False)
        numbers.place = Place("", tuple(numbers.shape))
        part = self.cut(dim, share(numbers, 0).data)
        part._parameters["bias"] = None if self.bias is None or dim else share(self.bias, 0)
        return part


# --- eight bits, of x too -------------------------------------------------------------------------


@dataclass(frozen=True)
class Int8:
    """How Int8Linear rounds."""

    threshold: float = THRESHOLD  # a feature that reaches it is an outlier; 0: there are none
    dynamic: bool = False  # outliers are chosen for each batch, not once from a calibration
    zero_point: bool = False  # x from its smallest to its largest value, not ± the largest

    def __post_init__(self):
        if not self.threshold >= 0 or (self.zero_point and self.threshold):
            raise UserError("int8 has a threshold of 0 or more, and 0 with a zero point")
        if self.dynamic and not self.threshold:
            raise UserError("outliers that each batch has need a threshold above 0")


class Int8Linear(Quantized):
    """s_x s_w (x_q w_qᵀ) + x[:, outliers] Wᵀ[outliers] + b  (Dettmers et al. 2022, eq. 8)."""

    kind, settings = "int8", Int8

    def __init__(self, shape: tuple[int, int], bias: Tensor | None, how: Int8, tensors: Tensors):
        """tensors: codes int8 (N K), scale fp32 (N), columns int64 (k), outliers fp16 (N k)."""
        super().__init__(bias)
        (N, K), k = shape, tensors["columns"].numel()
        self.shape, self.how = shape, how
        wanted = {"codes": (torch.int8, (N, K)), "scale": (torch.float32, (N,)),
                  "columns": (torch.int64, (k,)), "outliers": (STEP, (N, k))}  # fmt: skip
        for name, x in checked(tensors, wanted).items():
            self.register_buffer(name, x)
        if k and not 0 <= self.columns.min() <= self.columns.max() < K:
            raise UserError(f"of {K} input features numbers {self.columns.tolist()} are outliers")

    @classmethod
    def of(
        cls,
        W: Tensor,
        bias: Tensor | None = None,
        how: Int8 = Int8(),
        columns: Tensor | None = None,
    ) -> "Int8Linear":
        """W (N K), of which the columns (k) of outliers keep their weights, if `how` has such."""
        if W.shape[1] > MOST:
            raise UserError(f"the sum of {W.shape[1]:,} products of bytes may not fit into 32 bits")
        if columns is None or how.dynamic or not how.threshold:
            columns = torch.empty(0, dtype=torch.int64)
        columns = columns.to(W.device)
        codes, scale = quantize_rows(W.detach(), columns)
        outliers = W.detach()[:, columns].to(STEP)
        if not (scale.isfinite().all() and outliers.isfinite().all()):
            raise UserError("weights that are infinite, NaN or too large cannot be quantized")
        found = {"codes": codes, "scale": scale.float(), "columns": columns, "outliers": outliers}
        return cls(tuple(W.shape), bias, how, found)

    def like(self, matrix: Tensor) -> "Int8Linear":
        return self.of(matrix, self.bias, self.how, self.columns)

    def tensors(self) -> Tensors:
        return dict(self._buffers)

    def dense(self) -> Tensor:
        W = self.codes * self.scale[:, None]
        return W.index_copy(1, self.columns, self.outliers.to(W.dtype))

    def product(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self.how.zero_point:
            y = self.shifted(rows)
        else:
            columns, outliers = self.columns, self.outliers.to(x.dtype)
            if self.how.dynamic:
                columns, outliers = outlier_columns(rows, self.how.threshold), None
            function = int8_linear if x.is_cuda else int8_linear_on_cpu
            y = function(rows, self.codes, self.scale, None, columns, outliers)
        return y.to(x.dtype).unflatten(0, x.shape[:-1])

    def shifted(self, rows: Tensor) -> Tensor:
        """s_x s_w Σ (x_q − z) w_q, where x_q fits a byte less 128; sums are exact in float64."""
        grid = zero_point(rows, 8)
        q = (grid.codes(rows).int() - 128).to(torch.int8)
        total = int_sums(q, self.codes) + (128 - grid.zero.double()) * self.codes.sum(1).double()
        return total * grid.scale.double() * self.scale.double()

    def cut(self, dim: int, own: Tensor) -> "Int8Linear":
        own = own.to(self.codes.device)
        found = {"codes": self.codes.index_select(dim, own), "columns": self.columns}
        found["scale"], found["outliers"] = self.scale, self.outliers
        if dim:  # columns have other numbers in the part
            inside = torch.isin(self.columns, own)
            found["columns"] = torch.searchsorted(own, self.columns[inside])
            found["outliers"] = self.outliers[:, inside]
        else:
            found["scale"], found["outliers"] = self.scale[own], self.outliers[own]
        return type(self)(tuple(found["codes"].shape), None, self.how, found)


def int_sums(q: Tensor, codes: Tensor) -> Tensor:
    """q (M K) · codes (N K), both int8 → (M N) in float64, exact: integers below 2³¹."""
    if q.is_cuda:
        return q.double() @ codes.double().T
    return torch._int_mm(q, codes.T).double()


def int8_linear_on_cpu(
    x: Tensor, codes: Tensor, scale: Tensor, bias: None, columns: Tensor, outliers: Tensor | None
) -> Tensor:
    """`kernels.int8.int8_linear_obvious` with sums of integers that are as exact, but fast."""
    q, s = quantize_rows(x, columns)
    y = torch._int_mm(q, codes.T).to(s.dtype) * s[:, None] * scale
    if len(columns):
        if outliers is None:
            outliers = (codes[:, columns] * scale[:, None]).to(x.dtype)
        y = y + (x[:, columns] @ outliers.T).to(y.dtype)
    return y.to(x.dtype)


# --- codes of a few bits --------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """What the codes of PackedLinear stand for."""

    bits: int = 4  # of a code, 2 to 8
    group: int = 0  # neighbouring input features that share a step; 0: a whole row
    symmetric: bool = False  # as many steps below 0 as above, and no zero point
    levels: Literal["uniform", "normal"] = "uniform"  # normal: NF4

    def __post_init__(self):
        if not 2 <= self.bits <= 8 or self.group < 0:
            raise UserError("a code has 2 to 8 bits, and a group of weights a step: 0 is a row")
        if self.levels == "normal" and (self.bits, self.symmetric) != (4, False):
            raise UserError("NF4 has 4 bits, and levels that are as they are")

    def grid(self, W: Tensor) -> Grid | NormalFloat:
        """The grid that fits W (N K) best, with steps in 16 bits."""
        per = self.group or W.shape[1]
        if self.levels == "normal":
            return nf4(W, per, STEP)
        return (absmax if self.symmetric else zero_point)(W, self.bits, per, STEP)

    @property
    def low(self) -> int:
        """What is packed as 0."""
        return -(2 ** (self.bits - 1)) if self.symmetric else 0


class PackedLinear(Quantized):
    """x Wᵀ + b with W = s (code − z), or s · level[code]."""

    kind, settings = "packed", Packed

    def __init__(self, shape: tuple[int, int], bias: Tensor | None, how: Packed, tensors: Tensors):
        """tensors: codes uint8 (N ⌈b K / 8⌉), step fp16 (N G), and zero, packed as codes are."""
        super().__init__(bias)
        (N, K), self.how, self.shape = shape, how, shape
        self.group = how.group or K
        if K % self.group:
            raise UserError(f"groups of {self.group} do not divide the {K} input features")
        G, bits = K // self.group, how.bits
        wanted = {"codes": (torch.uint8, (N, -(-K * bits // 8))), "step": (STEP, (N, G))}
        if how.levels == "uniform" and not how.symmetric:
            wanted["zero"] = (torch.uint8, (N, -(-G * bits // 8)))
        for name, x in checked(tensors, wanted).items():
            self.register_buffer(name, x)
        if how.levels == "uniform" and bits == 4:  # lies as the kernel reads it
            self.codes = pack_int4(unpack(self.codes, 4, K))

    @classmethod
    def of(cls, W: Tensor, bias: Tensor | None = None, how: Packed = Packed()) -> "PackedLinear":
        """W (N K) rounded to the nearest codes."""
        grid = how.grid(W := W.detach())
        return cls.holding(grid.codes(W), grid, bias, how)

    @classmethod
    def holding(
        cls, codes: Tensor, grid: Grid | NormalFloat, bias: Tensor | None, how: Packed
    ) -> "PackedLinear":
        """Codes (N K) of a grid that `how` made, whoever chose them."""
        tensors = {"codes": pack(codes, how.bits, how.low), "step": grid.scale.to(STEP)}
        if how.levels == "uniform" and not how.symmetric:
            tensors["zero"] = pack(grid.zero, how.bits)
        return cls(tuple(codes.shape), bias, how, tensors)

    def tensors(self) -> Tensors:
        """As in a file: 4 bits without the gaps of the kernel's layout."""
        found = dict(self._buffers)
        if found["codes"].dtype == torch.int32:
            found["codes"] = pack(unpack_int4(self.codes, self.shape[1]), 4)
        return found

    def numbers(self) -> Tensor:
        """The codes (N K), counted from `low` on."""
        K, how = self.shape[1], self.how
        if self.codes.dtype == torch.int32:
            codes = unpack_int4(self.codes, K)
            return codes.to(torch.int8) + how.low if how.symmetric else codes
        return unpack(self.codes, how.bits, K, how.low)

    def grid(self) -> Grid | NormalFloat:
        how = self.how
        if how.levels == "normal":
            return NormalFloat(self.step, self.group)
        if how.symmetric:
            zero = torch.zeros_like(self.step, dtype=torch.int8)
        else:
            zero = unpack(self.zero, how.bits, self.step.shape[1])
        return Grid(self.step, zero, how.low, how.low + 2**how.bits - 1, self.group)

    def dense(self) -> Tensor:
        return self.grid().values(self.numbers())

    def product(self, x: Tensor) -> Tensor:
        if x.is_cuda and self.codes.dtype == torch.int32 and self.kernel_group():
            return int4_linear(x, *self.for_kernel(x.dtype))
        return F.linear(x, self.dense().to(x.dtype))

    def for_kernel(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, None, int]:
        """What kernels/int4.py takes behind x: codes from 0 on, with a zero point in each group."""
        zero = self.grid().zero
        zero = torch.full_like(zero, -self.how.low, dtype=torch.uint8) if self.how.low else zero
        return self.codes, self.step.to(dtype), zero, None, self.kernel_group()

    def kernel_group(self) -> int:
        """The group as kernels/int4.py has it, where a row's may reach beyond its end; 0: none."""
        if self.group == self.shape[1]:
            return -(-self.group // BLOCK) * BLOCK
        return self.group if self.group in (32, 64) or self.group % BLOCK == 0 else 0

    def cut(self, dim: int, own: Tensor) -> "PackedLinear":
        own, how, grid = own.to(self.codes.device), self.how, self.grid()
        codes, G = self.numbers().index_select(dim, own), grid.scale.shape[1]
        if dim == 0:
            grid = grid._replace(scale=grid.scale[own])
            grid = grid if how.levels == "normal" else grid._replace(zero=grid.zero[own])
        elif G > 1:
            if len(own) % self.group or own[0] % self.group:
                raise UserError(
                    f"groups of {self.group} cannot be cut: {len(own)} input features from number "
                    f"{int(own[0])} on; choose a group that divides both"
                )
            groups = own[:: self.group] // self.group
            grid = grid._replace(scale=grid.scale[:, groups])
            if how.levels == "uniform":
                grid = grid._replace(zero=grid.zero[:, groups])
        return self.holding(codes, grid, None, how)


def checked(tensors: Tensors, wanted: dict[str, tuple[torch.dtype, tuple]]) -> Tensors:
    """The tensors, if they are those that are wanted; or a UserError."""
    for name in sorted(tensors.keys() | wanted.keys()):
        have = (tensors[name].dtype, tuple(tensors[name].shape)) if name in tensors else None
        if have != wanted.get(name):
            raise UserError(f"{name} is {have}, not {wanted.get(name)}")
        x = tensors[name]
        if x.is_floating_point() and not x.isfinite().all():
            raise UserError(f"{name} holds a number that is not finite")
    return tensors


# --- whole models ---------------------------------------------------------------------------------

KINDS = {kind.kind: kind for kind in (Int8Linear, PackedLinear)}


def quantized(model: nn.Module) -> dict[str, Quantized]:
    """The quantized linears of a model, by name; under an adapter, too."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Quantized)}


def packed(model: nn.Module) -> tuple[Tensors, dict[str, dict]]:
    """What a file of the model holds, and the kind and the settings of each quantized linear."""
    found = quantized(model)
    inside = tuple(f"{name}.{b}" for name, m in found.items() for b in m._buffers)
    tensors = {name: x for name, x in model.state_dict().items() if name not in inside}
    for name, linear in found.items():
        tensors |= {f"{name}.{t}": x for t, x in linear.tensors().items()}
    return plain(tensors), {n: {"kind": m.kind} | asdict(m.how) for n, m in found.items()}


def assembled(config: ModelConfig, path: Path, kinds: dict[str, dict]) -> Transformer:
    """The model of a file and of what `packed` said of it; UserError where they do not fit."""
    with torch.device("meta"):
        model = Transformer(config, seed=None)
    tensors, known = load_tensors(path), linears(model)
    for name, about in kinds.items():
        kind = KINDS.get(about.get("kind")) if isinstance(about, dict) else None
        if kind is None or name not in known:
            raise UserError(f"{path}: this program knows no linear {name} that is {about}")
        how = {key: value for key, value in about.items() if key != "kind"}
        own = {n: x for n, x in tensors.items() if n.startswith(f"{name}.") and n != f"{name}.bias"}
        tensors = {n: x for n, x in tensors.items() if n not in own}
        own = {n.removeprefix(f"{name}."): x for n, x in own.items()}
        try:
            how = settings(kind.settings, how, name)
            new = kind(known[name].shape, known[name].bias, how, own)
        except (UserError, KeyError) as error:
            raise UserError(f"{path}: {name} is damaged: {error}") from None
        exchange(model, name, new)
    want = dict(model.named_parameters())
    for name in sorted(want.keys() | tensors.keys()):
        have, need = (tuple(d[name].shape) if name in d else None for d in (tensors, want))
        if have != need:
            raise UserError(f"{path} does not fit its config.json: {name} is {have}, not {need}")
    model.load_state_dict(tensors, strict=False, assign=True)
    return model

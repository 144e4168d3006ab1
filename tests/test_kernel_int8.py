"""Laws of kernels/int8.py."""

import torch
from helpers import DEVICE

from kernels.int8 import int8_linear_triton, quantize_columns_triton, quantize_rows_triton


def launched(dtype, M=4096, N=4096, K=4096, k=0, given=False, bias=False):
    x = torch.zeros(M, K, dtype=dtype)
    weight, scale = torch.zeros(N, K, dtype=torch.int8), torch.zeros(N)
    columns = torch.arange(k) if k else None
    kept = torch.zeros(N, k, dtype=dtype) if given else None
    b = torch.zeros(N, dtype=dtype) if bias else None
    with torch.no_grad():
        int8_linear_triton(x, weight, scale, b, columns, kept)


COMPILE = {
    "bf16": lambda: launched(torch.bfloat16),
    "bf16, 40 outliers, bias": lambda: launched(torch.bfloat16, k=40, given=True, bias=True),
    "fp16, 7 rows": lambda: launched(torch.float16, M=7, k=8),
    "bf16, 60 rows, bias": lambda: launched(torch.bfloat16, M=60, bias=True),
    "bf16, K not a multiple of 16": lambda: launched(torch.bfloat16, K=1000, k=8),
    "fp32": lambda: launched(torch.float32, k=8),
    "bf16, columns": lambda: quantize_columns_triton(torch.zeros(4096, 4096, dtype=torch.bfloat16)),
    "bf16, longest row": lambda: quantize_rows_triton(torch.zeros(2, 65536, dtype=torch.bfloat16)),
    "fp32, long row": lambda: quantize_rows_triton(torch.zeros(2, 32768)),
}
WGMMA = {"product_kernel"}

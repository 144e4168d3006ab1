"""Laws of kernels/int4.py."""

import torch

from kernels.int4 import int4_linear_triton


def launched(dtype, M=4096, N=8192, K=8192, group=128, bias=False):
    x = torch.zeros(M, K, dtype=dtype)
    packed = torch.zeros(N, (K + 127) // 128 * 16, dtype=torch.int32)
    G = (K + group - 1) // group
    b = torch.zeros(N, dtype=dtype) if bias else None
    with torch.no_grad():
        int4_linear_triton(
            x,
            packed,
            torch.zeros(N, G, dtype=dtype),
            torch.zeros(N, G, dtype=torch.uint8),
            b,
            group,
        )


COMPILE = {
    "bf16": lambda: launched(torch.bfloat16),
    "bf16, 1 row": lambda: launched(torch.bfloat16, M=1, bias=True),
    "bf16, 16 rows": lambda: launched(torch.bfloat16, M=16),
    "bf16, 1 row, groups of 32": lambda: launched(torch.bfloat16, M=1, group=32, K=1000),
    "fp16, 60 rows, groups of 64": lambda: launched(torch.float16, M=60, group=64),
    "fp16, 1 row": lambda: launched(torch.float16, M=1),
    "bf16, K not a multiple of 8": lambda: launched(torch.bfloat16, K=1003),
    "fp32": lambda: launched(torch.float32),
    "fp32, 1 row": lambda: launched(torch.float32, M=1, bias=True),
}
WGMMA = {"product_kernel"}

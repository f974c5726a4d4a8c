"""Every kernel of the CUDA backend on small problems, for compute-sanitizer to watch.

Usage: PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck|racecheck python cuda_sanitizer_worker.py
"""

import torch

from bitinfer import ops
from bitinfer.testing.problems import LAYOUTS, GemmProblem

# one token to more than a tile of them; sizes that fill the kernels' tiles and sizes that do not
SIZES = [(1, 48, 1024), (3, 40, 512), (5, 33, 300), (16, 144, 256), (20, 200, 1152), (70, 72, 640), (150, 264, 320)]


def main() -> None:
    calls = 0
    for layout in LAYOUTS.values():
        for m, n, k in SIZES:
            for dtype in (torch.float16, torch.float32):
                x, weight = GemmProblem("", m, n, k, layout, bias=True).make(dtype, device="cuda")
                for bits in (None, 8, 1):
                    for _ in range(2):  # the second time the weights are known to be settled: another launch
                        ops.binary_linear(x, weight, bits)
                        calls += 1
                    if bits:
                        ops.rms_norm_pack_activations(x, x[0], 1e-5, bits, residual=x, in_scale=weight.in_scale)
                        ops.silu_mul_pack_activations(x, x, bits, in_scale=weight.in_scale)
    torch.cuda.synchronize()
    print(f"{calls} calls")


if __name__ == "__main__":
    main()

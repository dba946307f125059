"""Operators of the ``svdq`` namespace; importing this package registers them with torch.

Every operator has a reference in plain torch that runs on any device and defines what is correct,
and a fake kernel, so ``torch.compile`` and CUDA graphs see through it. Device kernels register
themselves on top (``svdq_core.ops.cuda``).
"""

from . import awq, block, cuda, fused, int4, int8, nf4, nvfp4

cuda.register()

__all__ = ["awq", "block", "cuda", "fused", "int4", "int8", "nf4", "nvfp4"]

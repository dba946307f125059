"""SVDQuant runtime: 4-bit weights and activations with a 16-bit low-rank branch.

Imports torch, never ComfyUI; everything that touches the host lives in ``svdq_core.host``.
Method: SVDQuant (arXiv 2411.05007).
"""

__version__ = "0.1.0"

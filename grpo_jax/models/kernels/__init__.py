"""Attention and matrix products, with one seam that chooses them by platform.

Callers use `attention.attend`, `products` and `decode.decode_kernels`. These choose
between the TPU kernel (`tpu.py`), the GPU kernel (`gpu.py`), the C++ kernels (`cpu/`)
and XLA (`xla.py`), which works everywhere. `mask.py` defines the attention mask for all
of them, and `tuning.py` holds sizes that depend on the platform.
"""

"""Models: the decoder, token log-probabilities, the score head and LoRA adapters.

`kernels/` holds their attention and matrix products for each platform.
"""

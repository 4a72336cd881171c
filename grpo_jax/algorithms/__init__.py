"""Algorithms: losses, advantages and gradient coefficients as pure functions on arrays.

`methods.py` is the table of training methods. These modules need only jax.
"""

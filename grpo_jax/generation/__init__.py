"""Sampling of completions: prefill, a KV cache, the decode loop and token sampling.

`sampler.generate` is the entry point; `continuation` resumes its rollouts.
"""

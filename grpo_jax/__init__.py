"""grpo_jax: a temporary opening line, replaced when the public names exist."""

"""Rewards: the reward functions and the safe way to call them.
`grading` extracts final answers and compares them with the reference answers."""

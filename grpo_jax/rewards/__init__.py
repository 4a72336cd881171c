"""Rewards: the reward functions, and the safe way to call them.

reward_functions  the built-in functions; `compute_rewards` calls all, with a time-out
reward_calls      one call in its thread, and the record of calls that fail
answers           extracts and compares final answers; the API of `grading`
"""

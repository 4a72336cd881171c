"""The reward model r_φ: its labels, its training and its scores.

labels           sequences with a label for each step, kept as JSON lines
solution_steps   where the steps of an output end
math_shepherd    step labels from sampled completions (Math-Shepherd)
scoring          scores of packed sequences, and the training objective
training         the stage that trains it
iterations       trains it for each iteration of an RL run, and scores the run's outputs
"""

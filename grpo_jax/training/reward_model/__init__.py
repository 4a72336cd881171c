"""The reward model r_φ: its labels, its training and its scores.

labelled   sequences with a label for each step, kept as JSON lines
steps      where the steps of an output end
shepherd   step labels from sampled completions (Math-Shepherd)
scoring    scores of packed sequences, and the training objective
training   the stage that trains it
judge      its use in an RL run
"""

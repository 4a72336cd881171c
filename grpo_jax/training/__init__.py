"""The training of a run: its SFT, reward-model and RL stages, from the rollouts and
their rewards to the packed batch, the compiled step and the files that a run writes."""

"""Evaluation: models answer sets of questions, and their scores are compared.

generate_answers   completions of a set, which an evaluation can resume
completion_files   the files of completions
metrics            grades completions: accuracy, pass@k, maj@k, tests of two models
statistics         the formulas of these: intervals, estimators, paired tests
comparison         measures one model on one set
published_figures  figures of others, marked as such
census             which questions can teach a model
flags              the flags of `python -m grpo_jax.evaluate`
"""

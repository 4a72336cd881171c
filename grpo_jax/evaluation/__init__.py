"""Evaluation: models answer sets of questions, completions are kept and graded, and
scores are compared, with intervals and paired tests."""

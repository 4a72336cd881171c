"""Extraction and comparison of mathematical answers; `rewards.answers` is the API.

extraction   finds the final answer in a completion
wording      turns English and Chinese words into signs and operators
notation     brings LaTeX into one spelling
units        splits a quantity into its expression and its unit
structure    parses lists, tuples, intervals, equations and matrices
regions      normalises unions of intervals
expressions  evaluates numbers and formulas
equality     compares two answers with exact arithmetic
algebra      compares answers that need algebra
worker_pool  runs that in `worker` processes, which may be killed
kinds        grades options, several blanks and rounded numbers
paper        the lenient rule for comparison with published figures
"""

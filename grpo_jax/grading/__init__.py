"""Whether two mathematical answers are the same: the parts behind `answers`.

notation    LaTeX and wording → one spelling
structure   lists, tuples, intervals, equations, matrices
expressions exact numbers and formulas
algebra     what only a computer algebra system can decide
workers     processes that do that, and may be killed
"""

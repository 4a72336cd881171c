"""Whether two mathematical answers are the same: the parts behind `answers`.

brackets    where a text splits, what is boxed
extraction  a completion → what it states as its answer
wording     words, English and Chinese → signs and operators
notation    LaTeX → one spelling
units       a quantity → its expression and its unit
structure   lists, tuples, intervals, equations, matrices
regions     unions of intervals → their spans in order
expressions exact numbers and formulas
algebra     what only a computer algebra system can decide
workers     processes that do that, and may be killed
"""

"""The reward model r_φ: what it is, what it learns from, and what it says.

scoring    a decoder's trunk with one number at every token
losses     cross-entropy with the labels
labelled   sequences with a label a step, kept as JSON lines
steps      where the steps of an output end
shepherd   labels without human hands (Math-Shepherd)
training   the stage that trains it
judge      its use in a run, also as PPO's critic
"""

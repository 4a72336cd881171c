"""Environments that a model acts in while it answers.

The only one is a Python interpreter, for tool-integrated reasoning.
"""

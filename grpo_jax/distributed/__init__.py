"""Runs on many devices: the mesh and its sharding rules, and the processes of a run.

`sharding` lays out arrays, `processes` starts, coordinates and ends the processes.
"""

"""Plans what a config needs of a pod, before anyone rents one.

Every program of a step is compiled with libtpu, on any machine, for a topology such as
v5p:4x4x4. The plan states the memory of a chip, the operations, the bytes between
chips, and the least time and cost by the chip's published peaks.
"""

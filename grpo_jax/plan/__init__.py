"""What a config needs of a pod, before anyone rents one.

In: a config and a topology such as v5p:4x4x4. Out: every program of a step compiled for
it with libtpu on any machine: memory a chip, operations, bytes between chips, and the
least time and cost by the chip's published peaks. The command is in `__main__`.

`chips` knows the devices, `compiled` makes the programs, `flops` and `hlo` read them,
`trips` says how often loops of unknown length run, `table` shows the result.
"""

"""XLA's options in tests: programs that run once are ready in a fifth of the time."""

import jaxlib.version

# Unoptimised programs, the same arithmetic.
OPTIONS: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
# From 0.11.1 on there is no such flag, and an unknown one ends the process.
if jaxlib.version.__version_info__ < (0, 11, 1):
    OPTIONS["xla_cpu_use_fusion_emitters"] = False
FLAGS = [f"--{name}={str(value).lower()}" for name, value in OPTIONS.items()]


def xla_flags(devices: int = 1) -> str:
    """$XLA_FLAGS of a process with so many CPU devices."""
    return " ".join([f"--xla_force_host_platform_device_count={devices}", *FLAGS])

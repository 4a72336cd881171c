"""Loading and writing weights: what a host holds meanwhile, beside its own share.

    python benchmarks/weights.py [--gigabytes 4] [--processes 2] [--folder DIR]

In: nothing; a Hugging Face folder of that size with random float32 weights is made in
DIR (a temporary folder), and removed. Out: a JSON line for each process and direction:
  share_gb   what the process holds of the model when it is loaded;
  peak_gb    the most that it held beyond what it had before, resident memory;
  ratio      (peak_gb - tensor_gb) / share_gb, with the largest tensor of the folder;
  seconds.
and one that says whether the written folder holds the same bits.

The processes are this machine's, over loopback, so that each holds its share of the
model in the memory of CPU devices. Linux alone tells a process its own peak.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from lines import show

GB = 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--gigabytes", type=float, default=4.0, help="of the folder")
    add("--processes", type=int, default=2)
    add("--devices", type=int, default=2, help="of each process")
    add("--folder", help="where the folders are made, on a disk with twice the room")
    add("--number", type=int, help=argparse.SUPPRESS)
    add("--coordinator", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    root = str(Path(__file__).resolve().parents[1])
    sys.path.insert(0, root)
    if flags.number is not None:
        return measure(flags)
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        make_folder(Path(folder) / "in", flags.gigabytes)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        count = f"--xla_force_host_platform_device_count={flags.devices}"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": count}
        command = [sys.executable, __file__, "--folder", folder]
        command += ["--processes", str(flags.processes)]
        command += ["--coordinator", f"127.0.0.1:{port}"]
        running = [
            subprocess.Popen(
                [*command, "--number", str(i)],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            for i in range(flags.processes)
        ]
        told = [process.communicate()[0] for process in running]
        if any(process.returncode for process in running):
            sys.exit("a process failed")
        for line in "".join(told).splitlines():
            if line.startswith("{"):  # Gloo says something there too
                print(line)
        same = digests(Path(folder) / "in") == digests(Path(folder) / "out")
        show(case="bits", same=same)


def make_folder(folder: Path, gigabytes: float) -> None:
    """Random weights, written tensor by tensor; layers until it is large enough."""
    from grpo_jax.checkpoints.huggingface import config as hf_config
    from grpo_jax.checkpoints.huggingface.safetensors_files import (
        StoredTensor,
        write_folder,
    )
    from grpo_jax.checkpoints.huggingface.weights import tensor_shapes
    from grpo_jax.files import write_json
    from grpo_jax.models.config import ModelConfig

    width = 2048 if gigabytes >= 1 else 256
    config = ModelConfig(
        vocab_size=32000 * width // 2048,
        width=width,
        layers=1,
        heads=width // 64,
        kv_heads=width // 64,
        head_dim=64,
        ffn=width * 11 // 4,
    )
    shapes = tensor_shapes(config)
    while 4 * sum(map(math.prod, shapes.values())) < gigabytes * GB:
        config = dataclasses.replace(config, layers=config.layers + 1)
        shapes = tensor_shapes(config)
    noise = np.random.default_rng(0).standard_normal(1 << 22, np.float32)

    def read(number: int, shape: tuple[int, ...], index: Any) -> np.ndarray:
        return np.resize(np.roll(noise, number), shape)[index]

    tensors = {
        name: StoredTensor(
            Path(), noise.dtype, shape, functools.partial(read, i, shape)
        )
        for i, (name, shape) in enumerate(shapes.items())
    }
    folder.mkdir()
    write_json(folder / "config.json", hf_config.config_to_hf(config))
    write_folder(folder, tensors, 1_000_000_000)


def digests(folder: Path) -> dict[str, str]:
    """A hash of each tensor."""
    from grpo_jax.checkpoints.huggingface.safetensors_files import (
        read_safetensors_folder,
    )

    stored = read_safetensors_folder(folder)
    return {n: hashlib.sha256(t[...].tobytes()).hexdigest() for n, t in stored.items()}


def measure(flags: argparse.Namespace) -> None:
    """One process: loads its share, and takes part in writing the whole."""
    from grpo_jax.distributed import processes

    with processes.connect_processes(flags.coordinator, flags.processes, flags.number):
        import jax

        from grpo_jax.checkpoints.huggingface.safetensors_files import (
            read_safetensors_folder,
        )
        from grpo_jax.checkpoints.huggingface.weights import (
            load_pretrained,
            save_pretrained,
        )
        from grpo_jax.distributed import sharding

        folder = Path(flags.folder)
        tensor = max(
            4 * math.prod(t.shape)
            for t in read_safetensors_folder(folder / "in").values()
        )
        mesh = sharding.make_mesh(fsdp=-1)
        jax.block_until_ready(jax.jit(jax.numpy.zeros, static_argnums=0)(()))

        before, begin = start()
        model, params = jax.block_until_ready(load_pretrained(folder / "in", mesh=mesh))
        shards = [s for x in jax.tree.leaves(params) for s in x.addressable_shards]
        share = sum(s.data.nbytes for s in shards)

        def tell(case: str) -> None:
            peak = resident("VmHWM") - before
            show(
                case=case,
                process=flags.number,
                share_gb=share / GB,
                tensor_gb=tensor / GB,
                peak_gb=peak / GB,
                ratio=(peak - tensor) / share,
                seconds=time.perf_counter() - begin,
            )

        tell("load")
        _, begin = start()  # the share is there: it counts
        save_pretrained(model, params, folder / "out")
        tell("write")


def start() -> tuple[int, float]:
    """(Resident bytes, time); the peak is counted from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS"), time.perf_counter()


def resident(name: str) -> int:
    """Bytes, from /proc/self/status: VmRSS now, VmHWM the most since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(name)).split()[1]) * 1024


if __name__ == "__main__":
    main()

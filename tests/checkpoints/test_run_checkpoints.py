"""Checkpoints under real faults: kill -9, SIGTERM, full disks, flipped bits, meshes."""

import functools
import hashlib
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from xla_flags import xla_flags

from grpo_jax.checkpoints import run_checkpoints
from grpo_jax.checkpoints.checksums import checksum_leaves
from grpo_jax.checkpoints.run_checkpoints import CheckpointDirectory
from grpo_jax.distributed import processes
from grpo_jax.distributed.folder_lock import lock_folder
from grpo_jax.errors import GrpoError

ROOT = Path(__file__).resolve().parents[2]


def make_state(seed=0):
    """A training state with every kind of leaf that a run carries."""
    normal = np.random.default_rng(seed).standard_normal
    params = {
        "layers": [{"kernel": jnp.asarray(normal((33, 65), np.float32))}] * 2,
        "embed": jnp.asarray(normal((50, 8)), jnp.bfloat16),
        "a.b": jnp.float32(-0.0),
        "a": {"b": jnp.array([3.4e38, -3.4e38, 1e-42])},
    }
    optimiser = optax.adamw(optax.constant_schedule(1e-3))
    return {
        "params": params,
        "opt": optimiser.init(params),
        "step": jnp.int32(seed),
        "key": jax.random.key(seed),
        "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 3),
        "flags": jnp.array([True, False, True]),
        "bytes": jnp.arange(5, dtype=jnp.uint8),
        "none": None,
    }


def bits(tree):
    """Every leaf's dtype, shape and bytes: equal only if the states are identical."""
    leaves = []
    for path, x in jax.tree.leaves_with_path(tree):
        kind = str(x.dtype)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        name = jax.tree_util.keystr(path)
        leaves.append((name, kind, x.shape, np.asarray(x).tobytes()))
    return leaves


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def written(folder, steps=(1,), keep=9):
    """A directory with one checkpoint for each of `steps`; the state is the step's."""
    with CheckpointDirectory(folder, every=1, keep=keep) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, make_state(step), {"step": step})
    return folder


def restored(folder, step=None):
    with CheckpointDirectory(folder, every=1) as checkpoints:
        return checkpoints.restore(abstract(make_state()), step)


# --- what is saved is what comes back ------------------------------------------------


def test_a_state_comes_back_bit_for_bit(tmp_path):
    metadata = {"config": {"lr": 1e-6, "sets": ["gsm8k"]}, "2": 3, "text": "数学 ε"}
    state = make_state(5)
    with CheckpointDirectory(tmp_path, every=1) as checkpoints:
        checkpoints.save(5, state, metadata)
        for like in (state, abstract(state)):
            step, again, notes = checkpoints.restore(like)
            assert (step, notes) == (5, metadata)
            assert jax.tree.structure(again) == jax.tree.structure(state)
            assert bits(again) == bits(state)
            # free of its device, as it was: it may join arrays of any mesh
            assert not any(x.committed for x in jax.tree.leaves(again))


def test_metadata_is_normalised_to_json_once(tmp_path):
    metadata: dict = {10: (1, 2), 9: float("inf")}
    with CheckpointDirectory(tmp_path, every=1) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(2)}, metadata)
        metadata = checkpoints.restore({"w": jnp.ones(2)})[2]
    assert metadata == {"10": [1, 2], "9": float("inf")}


def test_saves_at_every_nth_step_and_keeps_the_newest(tmp_path):
    with CheckpointDirectory(tmp_path, every=3, keep=2) as checkpoints:
        did = [checkpoints.save(s, {"w": jnp.float32(s)}, {}) for s in range(1, 11)]
        assert did == [s % 3 == 0 for s in range(1, 11)]
        assert checkpoints.steps() == [6, 9]
        assert checkpoints.save(10, {"w": jnp.float32(10)}, {}, force=True)
        assert not checkpoints.save(10, {"w": jnp.float32(10)}, {}, force=True)
        assert checkpoints.steps() == [9, 10]
        with pytest.raises(GrpoError, match="step 9 comes after 10"):
            checkpoints.save(9, {"w": jnp.float32(9)}, {})
        assert checkpoints.restore({"w": jnp.float32(0)}, 9)[1]["w"] == 9


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    advance = jax.jit(
        lambda tree: jax.tree.map(lambda x: x * 1.0001 + 1, tree), donate_argnums=0
    )
    state = {str(i): jnp.full((500, 500), i, jnp.float32) for i in range(6)}
    with CheckpointDirectory(tmp_path, every=1) as checkpoints:
        for step in range(1, 5):
            want = bits(state)
            checkpoints.save(step, state, {})
            state = jax.block_until_ready(advance(advance(state)))
            assert bits(checkpoints.restore(abstract(state))[1]) == want


def test_leaves_that_cannot_be_kept_are_refused_by_name(tmp_path):
    with CheckpointDirectory(tmp_path, every=1) as checkpoints:
        for bad, why in [
            ({"a": {"n": 3}}, "a/n is int"),
            ({"a": {"n": np.ones(2)}}, "a/n is ndarray"),
            ({"a": {"n": jnp.ones((0, 2))}}, r"a/n is .*\(0, 2\)"),
            ({"a": {"n": jnp.ones(1)}, "a/n": jnp.ones(1)}, "two leaves are named a/n"),
        ]:
            with pytest.raises(GrpoError, match=why):
                checkpoints.save(1, bad, {})
        assert checkpoints.steps() == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_numbers_that_are_not_finite_are_not_saved(dtype, bad, tmp_path):
    state = {"a": jnp.ones((3, 5), dtype), "n": jnp.arange(3), "key": jax.random.key(0)}
    broken = state | {"a": state["a"].at[2, 1].set(bad)}
    with CheckpointDirectory(tmp_path, every=1) as checkpoints:
        assert checkpoints.save(1, state, {})
        with pytest.raises(GrpoError) as error:
            checkpoints.save(2, broken, {})
        told = "step 2 is not saved: a is not finite; finished steps: [1]. Lower the le"
        assert told in str(error.value) and "\n" not in str(error.value)
        assert checkpoints.steps() == [1]
        assert bits(checkpoints.restore(state)[1]) == bits(state)


def test_a_checkpoint_that_is_not_finite_is_not_restored(tmp_path, monkeypatch):
    """As an earlier version may have written it; its checksum is right."""
    state = {"a": jnp.ones(4), "b": jnp.ones(4)}
    broken = state | {"b": jnp.array([1.0, jnp.nan, 1.0, 1.0])}
    with CheckpointDirectory(tmp_path, every=1) as checkpoints:
        checkpoints.save(1, state, {})
        with monkeypatch.context() as patch:
            patch.setattr(
                run_checkpoints,
                "checksum_leaves",
                lambda x: (checksum_leaves(x)[0], []),
            )
            checkpoints.save(2, broken, {})
        with pytest.raises(GrpoError, match=r"step 2 .*b is not finite\).*: \[1\]"):
            checkpoints.restore(state)
        assert checkpoints.restore(state, 1)[0] == 1


# --- the checksum --------------------------------------------------------------------


def checksum(x):
    return checksum_leaves({"x": x})[0]["x"][1]


def reference_checksum(x):
    """The same sum in Python integers, over the bytes of a contiguous array."""
    width = min(x.dtype.itemsize, 4)
    words = np.frombuffer(x.tobytes(), f"<u{width}")
    total = 0
    for i, word in enumerate(int(w) for w in words):
        h = word ^ (i * 0x9E3779B9 & 0xFFFFFFFF)
        h = (h ^ h >> 16) * 0x7FEB352D & 0xFFFFFFFF
        h = (h ^ h >> 15) * 0x846CA68B & 0xFFFFFFFF
        total += h ^ h >> 16
    return total & 0xFFFFFFFF


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_checksum_is_its_formula_and_sees_every_bit(dtype):
    x = jax.random.normal(jax.random.key(1), (3, 5)).astype(dtype)
    host = np.asarray(x)
    total = checksum(x)
    assert total == reference_checksum(host)
    raw = bytearray(host.tobytes())
    for i in range(len(raw)):
        for bit in range(8 if dtype != "bool" else 1):
            raw[i] ^= 1 << bit
            flipped = np.frombuffer(bytes(raw), host.dtype).reshape(host.shape)
            assert checksum(jnp.asarray(flipped)) != total
            raw[i] ^= 1 << bit


def test_checksum_sees_order_sign_of_zero_and_nan_payload():
    def same(a, b):
        return checksum(a) == checksum(b)

    x = jnp.arange(12.0)
    assert not same(x, x[::-1])
    assert not same(x.reshape(3, 4), x.reshape(3, 4).at[:2].set(x.reshape(3, 4)[1::-1]))
    assert same(x, x.reshape(3, 4))  # the shape is kept beside it
    assert not same(jnp.float32(0.0), jnp.float32(-0.0))
    nans = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    assert not same(jnp.asarray(nans[:1]), jnp.asarray(nans[1:]))


# --- damaged, missing and foreign checkpoints ----------------------------------------


def files_of(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def small_state(step=0):
    return {
        "w": jnp.asarray(np.random.default_rng(step).standard_normal((64, 48), "f4")),
        "opt": {"mu": jnp.full((64, 48), step, jnp.bfloat16), "count": jnp.int32(step)},
        "key": jax.random.key(step),
    }


def two_steps(folder):
    with CheckpointDirectory(folder, every=1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, small_state(step), {"lr": 0.1, "step": step})
    return folder


def test_a_flipped_bit_in_any_file_is_refused_or_harmless(tmp_path):
    """Fault 31. What is not refused is bit for bit what was saved."""
    two_steps(tmp_path)
    want = bits(small_state(2))
    rng = random.Random(0)
    refused, harmless, by_leaf, by_metadata = [], [], 0, 0
    with CheckpointDirectory(tmp_path, every=1) as checkpoints:
        for path in files_of(tmp_path / "2"):
            data = path.read_bytes()
            arrays = "ocdbt.process_0/d/" in str(path)
            places = [rng.randrange(len(data)) for _ in range(24 if arrays else 3)]
            if path.name == "_CHECKPOINT_METADATA":
                places += [data.index(b'"lr"') + 1, data.index(b"0.1") + 2]
            for place in places:
                broken = bytearray(data)
                broken[place] ^= 1 << rng.randrange(8 if arrays else 3)
                path.write_bytes(broken)
                try:
                    step, state, metadata = checkpoints.restore(small_state())
                except GrpoError as error:
                    message = str(error)
                    assert "step 2 is damaged" in message and "\n" not in message
                    assert message.endswith("restore another step explicitly: [1]")
                    by_leaf += "the checksum of " in message
                    by_metadata += "its metadata does not match" in message
                    refused.append(path.name)
                else:
                    assert metadata == {"lr": 0.1, "step": 2}
                    assert step == 2 and bits(state) == want, (path, place)
                    harmless.append(path.name)
            path.write_bytes(data)
        assert bits(checkpoints.restore(small_state())[1]) == want
    # Orbax alone loads nearly all of these flips without a word
    assert by_leaf >= 15 and by_metadata >= 2 and len(refused) > len(harmless)


def test_a_truncated_or_missing_file_is_refused(tmp_path):
    """Faults 30 and 34: one line, the older steps in it, nothing chosen silently."""
    two_steps(tmp_path)
    good = tmp_path / "copy"
    shutil.copytree(tmp_path / "2", good)
    for path in files_of(tmp_path / "2"):
        for cut in (lambda p: os.truncate(p, p.stat().st_size // 2), os.unlink):
            cut(path)
            try:
                with CheckpointDirectory(tmp_path, every=1) as checkpoints:
                    step, state, _ = checkpoints.restore(small_state())
            except GrpoError as error:
                assert "[1]" in str(error) and "\n" not in str(error)
            else:
                # a marker or a cache that Orbax does without; or, with the marker of
                # completeness gone, a folder that is no checkpoint any more
                assert bits(state) == bits(small_state(step))
                assert path.parent.name != "d", path
            shutil.rmtree(tmp_path / "2")
            shutil.copytree(good, tmp_path / "2")


def test_going_back_to_an_older_step_sets_the_newer_ones_aside(tmp_path):
    """Fault 34: the damaged newest is never overwritten, and never resumed from."""
    two_steps(tmp_path)
    data = next(p for p in files_of(tmp_path / "2") if "ocdbt.process_0/d/" in str(p))
    data.write_bytes(b"")
    with CheckpointDirectory(tmp_path, every=1, keep=2) as checkpoints:
        with pytest.raises(GrpoError, match=r"step 2 is damaged.*explicitly: \[1\]"):
            checkpoints.restore(small_state())
        with pytest.raises(GrpoError, match=r"\[1, 2\] are another run's"):
            checkpoints.save(3, small_state(3), {})
        assert checkpoints.restore(small_state(), 1)[0] == 1
        assert checkpoints.steps() == [1, 2]  # only looking changes nothing
        assert checkpoints.save(2, small_state(20), {})
        assert checkpoints.steps() == [1, 2]
    assert (tmp_path / "2.abandoned" / "state").is_dir()
    with CheckpointDirectory(tmp_path, every=1) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        assert bits(checkpoints.restore(small_state())[1]) == bits(small_state(20))


def test_another_structure_is_refused_with_a_short_difference(tmp_path):
    """Fault 32."""
    two_steps(tmp_path)
    wanted = small_state()
    wanted["w"] = jnp.ones((64, 32))
    wanted["opt"]["mu"] = wanted["opt"]["mu"].astype(jnp.float32)
    wanted["bias"] = jnp.ones(3)
    del wanted["opt"]["count"]
    many = {f"layer{i}": jnp.ones(1) for i in range(50)}
    with CheckpointDirectory(tmp_path, every=1) as checkpoints:
        with pytest.raises(GrpoError) as error:
            checkpoints.restore(wanted)
        assert str(error.value) == (
            f"checkpoints {tmp_path}: step 2: 4 leaves differ: "
            "opt/count: only in the checkpoint; "
            "bias: not in the checkpoint; "
            "opt/mu: bfloat16[64, 48] in the checkpoint, float32[64, 48] in this run; "
            "w: float32[64, 48] in the checkpoint, float32[64, 32] in this run"
        )
        with pytest.raises(GrpoError, match="54 leaves differ") as error:
            checkpoints.restore(many)
        assert len(str(error.value)) < 400
        with pytest.raises(GrpoError, match=r"no step 7; there are \[1, 2\]"):
            checkpoints.restore(wanted, 7)


# --- the run that ends early ---------------------------------------------------------


def test_an_exception_finishes_the_pending_save_and_goes_on(tmp_path):
    """Fault 28."""
    with pytest.raises(ZeroDivisionError):
        with CheckpointDirectory(tmp_path, every=1) as checkpoints:
            checkpoints.save(4, make_state(4), {})
            1 / 0  # noqa: B018
    assert bits(restored(tmp_path)[1]) == bits(make_state(4))


def test_a_full_disk_is_loud_and_loses_nothing(tmp_path):
    """Fault 29, with a limit on the size of a file in the place of the disk's end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {"w": jax.random.normal(jax.random.key(2), (256, 256))}

    def idle(checkpoints):
        return not checkpoints._orbax.is_saving_in_progress()

    def fill_disk_during(leave):
        with CheckpointDirectory(tmp_path, every=2) as checkpoints:
            checkpoints.restore(big)
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
            try:
                assert checkpoints.save(2, big, {})
                leave(checkpoints)
            finally:
                wait_until(lambda: idle(checkpoints))
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with CheckpointDirectory(tmp_path, every=1) as checkpoints:
        checkpoints.save(1, big, {})

    def next_step(checkpoints):  # not one to save at: the failure is raised anyway
        wait_until(lambda: idle(checkpoints))
        checkpoints.save(3, big, {})
        raise AssertionError("the failed save went unnoticed")

    def leave_quietly(checkpoints):
        raise SystemExit(0)

    def raise_another(checkpoints):
        raise KeyError("first")

    loud = r"step 2 could not be written \(.*\); finished steps: \[1\]"
    for leave in (CheckpointDirectory.steps, next_step, leave_quietly):
        with pytest.raises(GrpoError, match=loud):
            fill_disk_during(leave)
    with pytest.raises(KeyError, match="first") as error:
        fill_disk_during(raise_another)
    assert "step 2 could not be written" in error.value.__notes__[0]

    with CheckpointDirectory(tmp_path, every=1) as checkpoints:
        assert bits(checkpoints.restore(big)[1]) == bits(big)
        assert checkpoints.save(4, big, {}) and checkpoints.steps() == [1, 4]
    assert sorted(os.listdir(tmp_path)) == ["1", "4"]  # and no half-written folders


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.001)


def test_sigterm_is_noticed_and_the_old_handler_comes_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with CheckpointDirectory(tmp_path, every=100) as checkpoints:
        assert not checkpoints.is_preempted()
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: checkpoints.is_preempted())
        assert checkpoints.is_preempted()  # it stays so
        assert signal.getsignal(signal.SIGTERM) == before  # a second one ends it
        assert checkpoints.save(3, small_state(3), {}, force=True)
    assert signal.getsignal(signal.SIGTERM) == before
    with CheckpointDirectory(tmp_path, every=100) as checkpoints:
        assert signal.getsignal(signal.SIGTERM) != before
        assert checkpoints.steps() == [3]
    assert signal.getsignal(signal.SIGTERM) == before


STEPS, EVERY = 12, 2


def train(workdir, out=print):
    """A training loop in small: noise from (seed, step), AdamW, donated state."""
    optimiser = optax.adamw(1e-2)

    def init():
        params = {"w": jax.random.normal(jax.random.key(0), (400, 500))}
        return {"params": params, "opt": optimiser.init(params), "step": jnp.int32(0)}

    def advance(state):
        key = jax.random.fold_in(jax.random.key(1), state["step"])
        x = jax.random.normal(key, (8, 400))
        loss = lambda p: jnp.mean(jnp.tanh(x @ p["w"]) ** 2)  # noqa: E731
        updates, opt = optimiser.update(
            jax.grad(loss)(state["params"]), state["opt"], state["params"]
        )
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt": opt, "step": state["step"] + 1}

    advance = jax.jit(advance, donate_argnums=0)
    with (
        lock_folder(workdir),
        CheckpointDirectory(Path(workdir, "ck"), every=EVERY) as checkpoints,
    ):
        state, start = jax.jit(init)(), 0
        if checkpoints.steps():
            start, state, metadata = checkpoints.restore(state)
            assert metadata == {"step": start} and int(state["step"]) == start
        out(f"start {start}", flush=True)
        for step in range(start + 1, STEPS + 1):
            state = advance(state)
            checkpoints.save(step, state, {"step": step})
            out(f"step {step}", flush=True)
        sys.exit(0)  # with a save pending


def launch(code, devices=1):
    """Starts Python beside this file; its standard output is a pipe of lines."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(devices),  # as in conftest: to the same bits
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(ROOT / "tests/helpers"), str(Path(__file__).parent)]
        ),
    }
    return subprocess.Popen(
        [sys.executable, "-c", f"from test_run_checkpoints import *\n{code}"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def next_line(process):
    assert process.stdout is not None
    return process.stdout.readline()


def finish(process, seconds=120):
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, err[-3000:]
    return out


def kill_during_a_save(process, checkpoints):
    """Stops the process while a half-written folder is there, then kills it."""
    while True:
        wait_until(lambda: list(checkpoints.glob("*.orbax-checkpoint-tmp")))
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.01)  # what was under way has ended
        if list(checkpoints.glob("*.orbax-checkpoint-tmp")):
            process.kill()
            process.communicate()
            return
        process.send_signal(signal.SIGCONT)


def test_a_run_killed_at_random_ends_with_the_same_bits(tmp_path):
    """Fault 27, and 35: every step again or not at all, whatever moment it died at."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    lines = []
    with pytest.raises(SystemExit):
        train(straight, lambda line, flush: lines.append(line))
    assert lines[0] == "start 0" and lines[-1] == f"step {STEPS}"
    rng = random.Random()
    starts = []
    for run in range(3):
        process = launch(f"train({str(broken)!r})")
        starts.append(int(next_line(process).split()[1]))
        if run == 0:
            with pytest.raises(GrpoError, match=f"in use by process {process.pid} "):
                with lock_folder(broken):
                    pass
        if run == 0:
            kill_during_a_save(process, broken / "ck")
        elif run == 1:
            next_line(process)
            time.sleep(rng.random() / 20)
            process.kill()
            process.communicate()
        else:
            finish(process)
    assert starts == sorted(starts) and starts[0] == 0, starts
    assert sorted(os.listdir(broken / "ck")) == [str(STEPS - EVERY), str(STEPS)]
    like = {"w": jax.ShapeDtypeStruct((400, 500), jnp.float32)}
    like = {
        "params": like,
        "opt": jax.eval_shape(optax.adamw(1e-2).init, like),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    digests = []
    for workdir in (straight, broken):
        with CheckpointDirectory(workdir / "ck", every=EVERY) as checkpoints:
            step, state, _ = checkpoints.restore(like)
            assert step == STEPS == int(state["step"])
        digests.append(hashlib.sha256(repr(bits(state)).encode()).hexdigest())
    assert digests[0] == digests[1]


def test_one_run_at_a_time_and_only_where_it_can_write(tmp_path):
    """Faults 35 and 36."""
    with lock_folder(tmp_path / "a" / "b") as workdir:
        assert workdir == tmp_path / "a" / "b"
        with pytest.raises(GrpoError, match=f"in use by process {os.getpid()} "):
            with lock_folder(workdir):
                pass
        with lock_folder(tmp_path / "c"):
            pass
    with lock_folder(tmp_path / "a" / "b"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(GrpoError, match=r"cannot be written \(Not a directory\)"):
        with lock_folder(tmp_path / "file" / "run"):
            pass
    with pytest.raises(GrpoError, match="file"):
        with CheckpointDirectory(tmp_path / "file" / "ck", every=1):
            pass


@pytest.mark.parametrize("locked_before", [False, True])
def test_a_folder_that_takes_no_file_is_refused(locked_before):
    """Fault 36, as a user who is not root, and not only for a folder on the way."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        closed = Path(folder, "closed")
        closed.mkdir()
        if locked_before:
            (closed / ".lock").touch()
            (closed / ".lock").chmod(0o666)
        closed.chmod(0o555)
        user = os.geteuid()
        os.seteuid(user or 65534)  # root may write everywhere
        try:
            with pytest.raises(GrpoError, match=r"cannot be written \(Permission den"):
                with lock_folder(closed):
                    pass
        finally:
            os.seteuid(user)
        closed.chmod(0o755)


# --- meshes and processes ------------------------------------------------------------


def mesh_state(mesh):
    """The state with its matrices sharded over the mesh and the rest free."""
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    w = jnp.asarray(np.random.default_rng(0).standard_normal((32, 64), "f4"))
    return {
        "w": jax.device_put(w, sharding),
        "mu": jax.device_put(w.astype(jnp.bfloat16), sharding),
        "key": jax.random.key(9),
        "step": jnp.int32(3),
    }


def on_other_meshes(folder):
    """Runs on 8 devices: saves on a 4 × 2 mesh, restores on 2, 1 and 4 devices."""
    from jax.sharding import AxisType

    def mesh_of(shape, kind=AxisType.Auto):
        n = shape[0] * shape[1]
        return jax.make_mesh(
            shape, ("a", "b"), devices=jax.devices()[:n], axis_types=(kind,) * 2
        )

    state = mesh_state(mesh_of((4, 2)))
    with CheckpointDirectory(folder, every=1) as checkpoints:
        checkpoints.save(1, state, {})
        for mesh in (
            mesh_of((1, 2)),
            mesh_of((1, 1)),
            mesh_of((2, 2), AxisType.Explicit),
        ):
            like = mesh_state(mesh)
            again = checkpoints.restore(like)[1]
            assert bits(again) == bits(state)
            assert again["w"].sharding == like["w"].sharding
            # a free leaf still joins those of the mesh in one program
            jax.jit(lambda s: s["w"] * s["step"])(again).block_until_ready()
    print("ok")


def test_another_mesh_restores_the_same_bits(tmp_path):
    """Fault 33: 8 devices → 2, 1 and 4; and from there to this process."""
    assert "ok" in finish(launch(f"on_other_meshes({str(tmp_path)!r})", devices=8))
    mesh = jax.make_mesh((1, 1), ("a", "b"), devices=jax.devices()[:1])
    state = mesh_state(mesh)
    with CheckpointDirectory(tmp_path, every=1) as checkpoints:
        assert bits(checkpoints.restore(abstract(state))[1]) == bits(state)
        data = next(p for p in files_of(tmp_path / "1") if p.stat().st_size > 4000)
        raw = bytearray(data.read_bytes())
        raw[2000] ^= 4
        data.write_bytes(raw)
        with pytest.raises(GrpoError, match="step 1 is damaged.*no other"):
            checkpoints.restore(state)


def as_one_of_two(folder, rank, port):
    """One process of two with two devices each: trains until SIGTERM, then leaves.

    It asks whether to stop more often than there are steps, as with evaluations, and
    Orbax writes every second step: its numbers run behind.
    """
    os.environ["JAX_COORDINATOR_BIND_ADDRESS"] = f"127.0.0.1:{port}"
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=auto)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    init = jax.jit(
        lambda: {"w": jnp.arange(64.0).reshape(8, 8), "step": jnp.int32(0)},
        out_shardings={"w": sharding, "step": replicated},
    )
    advance = jax.jit(lambda s: {"w": s["w"] * 1.5, "step": s["step"] + 1})
    state = init()
    with (
        lock_folder(folder),
        CheckpointDirectory(Path(folder, "ck"), every=2) as checkpoints,
    ):
        for step in range(1, 100):
            state = advance(state)
            processes.is_preempted(), processes.is_preempted()
            checkpoints.save(step, state, {"step": step})
            time.sleep(0.3 * (step % 2 == 0))  # signals come after what Orbax asked
            if step == 5:
                print("\nstep 5", flush=True)
            if checkpoints.is_preempted():
                checkpoints.save(step, state, {"step": step}, force=True)
                assert checkpoints.steps()[-1] == step
                break
        again = checkpoints.restore(state)[1]
        a, b = ([x.data for x in s["w"].addressable_shards] for s in (again, state))
        assert np.array_equal(a, b)
    print("\nsaved", step, flush=True)
    jax.distributed.shutdown()


@pytest.mark.parametrize("signalled", [0, 1])
def test_two_processes_save_the_same_step_on_sigterm(signalled, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        launch(f"as_one_of_two({str(tmp_path)!r}, {rank}, {port})", devices=2)
        for rank in range(2)
    ]
    for process in ranks:
        lines = iter(functools.partial(next_line, process), "")
        assert "step 5\n" in lines  # after what Gloo says on this pipe
    ranks[signalled].send_signal(signal.SIGTERM)
    steps = {int(finish(process).split()[-1]) for process in ranks}
    assert len(steps) == 1 and steps < set(range(5, 99)), steps
    like = {"w": jnp.ones((8, 8)), "step": jnp.int32(0)}
    with CheckpointDirectory(tmp_path / "ck", every=1) as checkpoints:
        step, state, metadata = checkpoints.restore(like)
    assert metadata == {"step": step} and {step} == steps and state["step"] == step
    # the same recurrence in this process, on one device
    want = jnp.arange(64.0).reshape(8, 8)
    for _ in range(step):
        want = want * 1.5
    assert np.array_equal(state["w"], want)

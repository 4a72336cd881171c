"""Damage to files for the tests: edits of bytes, and what must be said of them."""

from hypothesis import strategies as st

NAMES = st.sampled_from(["", "x", "4", "silu", "linear", "llama3", "full_attention"])
LEAVES = st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | NAMES
LEAVES |= st.sampled_from([2**31, 2**63, -(10**30), "a\nb", "\x1b[2J", "x" * 300])
DEEP = b"[" * 985 + b"]" * 985


def mutations(length: int):
    """Edits of bytes before `length`: another byte, a bit, eight of them, a cut, …"""
    kinds = st.sampled_from(["set", "bit", "eight", "delete", "insert", "cut"])
    edit = st.tuples(kinds, st.integers(0, length - 1), st.integers(0, 255))
    return st.lists(edit, min_size=1, max_size=3)


def mutate(raw: bytes, edits) -> bytes:
    for kind, at, value in edits:
        before, byte, after = raw[:at], raw[at : at + 1], raw[at + 1 :]
        if kind == "set":
            byte = bytes([value])
        elif kind == "bit":
            byte = bytes(b ^ 1 << value % 8 for b in byte)
        elif kind == "eight":
            byte, after = (b"\xff" * 7 + b"\x7f", b"\0" * 8)[value % 2], after[7:]
        elif kind == "delete":
            byte = b""
        elif kind == "insert":
            byte = bytes([value]) + byte
        else:
            byte, after = b"", b""
        raw = before + byte + after
    return raw


def one_clear_line(error, where) -> bool:
    text = str(error.value if hasattr(error, "value") else error)
    return str(where) in text and "\n" not in text and len(text) < 600

"""Safetensors headers are distrusted: whatever a file says, one clear error comes out, and little is allocated."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlxq.errors import BadInputError
from mlxq.headers import parse_header, read_file_header, read_json
from mlxq.sources.safetensors import open_folder
from mlxq.tensors import DTYPE_BITS
from tests.checkpoints import llama


def file_of(header: Any, data: int = 0) -> bytes:
    """A file with ``header`` as text or JSON, and ``data`` bytes after it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def entry(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_good_header_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    mx.save_safetensors(str(file), {"a": mx.zeros((2, 3)), "b": mx.zeros((4,), dtype=mx.bfloat16)}, {"format": "mlx"})
    found = {tensor.spec.name: tensor for tensor in read_file_header(file)}
    assert found["a"].spec.shape == (2, 3)
    assert found["b"].spec.dtype == "BF16"


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "shorter than its own header length"),
        (b"\x01\x02\x03", "shorter than its own header length"),
        (struct.pack("<Q", 1 << 63) + b"{}", "9,223,372,036,854,775,808 bytes"),
        (struct.pack("<Q", 99_000_000) + b"{}", "99,000,000 bytes"),
        (file_of(b"\xff\xfe{}"), "not JSON"),
        (file_of(b"{"), "not JSON"),
        (file_of(b"[" * 200_000), "not JSON"),
        (file_of(b'{"a":' * 100_000), "not JSON"),
        (file_of(b'{"a": ' + b"9" * 5000 + b"}"), "not JSON"),
        (file_of([]), "not a JSON object"),
        (file_of({"a": 1}), "'a' is malformed"),
        (file_of({"a": {"dtype": "F32"}}), "'a' is malformed"),
        (file_of({"a": entry(shape=3)}), "'a' is malformed"),
        (file_of({"a": entry(shape=[2, "3"])}, 24), "'a' is malformed"),
        (file_of({"a": entry(shape=[2, 3.0])}, 24), "'a' is malformed"),
        (file_of({"a": entry(shape=[True, 6])}, 24), "'a' is malformed"),
        (file_of({"a": entry(shape=[-2, -3])}, 24), "'a' is malformed"),
        (file_of({"a": entry(shape=[1] * 65 + [6])}, 24), "'a' is malformed"),
        (file_of({"a": entry(shape=[10**4000] * 60)}, 24), "'a' is malformed"),
        (file_of({"a": entry(offsets=[0, 24, 48])}, 24), "'a' is malformed"),
        (file_of({"a": entry(offsets=[-24, 0])}, 24), "'a' is malformed"),
        (file_of({"\ud800": entry()}, 24), "is malformed"),
        (file_of({"a": entry(dtype=["F32"])}, 24), "unknown dtype"),
        (file_of({"a": entry(dtype="Q4")}, 24), "unknown dtype 'Q4'"),
        (file_of({"a": entry(offsets=[0, 20])}, 24), "20 bytes where its shape needs 24"),
        (file_of({"a": entry(offsets=[24, 0])}, 24), "-24 bytes where"),
        (file_of({"a": entry(shape=[1 << 40, 1 << 40])}, 24), "where its shape needs"),
        (file_of({"a": entry(), "b": entry()}, 24), "'a' and 'b' overlap"),
        (file_of({"a": entry(), "b": entry(offsets=[12, 36])}, 36), "'a' and 'b' overlap"),
        (file_of({"a": entry(), "b": entry(offsets=[32, 56])}, 56), "8 bytes before 'b'"),
        (file_of({"a": entry(offsets=[8, 32])}, 32), "8 bytes before 'a'"),
        (file_of({"a": entry()}, 20), "cut short by 4 bytes"),
        (file_of({"a": entry()}, 30), "its last 6 bytes"),
        (file_of(b'{"a": 1, "a": 2}'), "'a' twice"),
        (file_of(b'{"a": {"dtype": "F32", "shape": [], "shape": [], "data_offsets": [0, 4]}}', 4), "'shape' twice"),
    ],
)
def test_what_is_wrong_is_said_and_little_is_allocated(raw: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.safetensors"
    file.write_bytes(raw)
    tracemalloc.start()
    try:
        with pytest.raises(BadInputError, match=said) as caught:
            list(read_file_header(file))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert str(file) in caught.value.message
    assert len(caught.value.message.splitlines()) == 1
    assert peak < 20_000_000


NUMBERS = st.one_of(
    st.integers(-2, 64), st.integers(), st.integers(1 << 60, 1 << 70), st.floats(), st.booleans(), st.none(), st.text()
)
ENTRIES = st.one_of(
    st.none(),
    NUMBERS,
    st.fixed_dictionaries(
        {
            "dtype": st.one_of(st.sampled_from(sorted(DTYPE_BITS)), st.text(), NUMBERS),
            "shape": st.one_of(NUMBERS, st.lists(NUMBERS, max_size=5)),
            "data_offsets": st.one_of(NUMBERS, st.lists(NUMBERS, max_size=3)),
        }
    ),
)


def read_or_refuse(raw: bytes) -> None:
    """Parse ``raw``; where it is accepted, its tensors must tile the data."""
    try:
        found = parse_header(raw, len(raw), "a file")
    except BadInputError:
        return
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    for spec, offset in sorted(found.values(), key=lambda item: (item[1], item[0].nbytes)):
        assert offset == start
        start += spec.nbytes
    assert start == len(raw)


@settings(max_examples=300, deadline=None)
@given(
    header=st.dictionaries(st.text(max_size=3), ENTRIES, max_size=4),
    data=st.integers(0, 64),
    cut=st.integers(0, 8),
)
@example(header={"a": entry(), "__metadata__": {}}, data=24, cut=0)
def test_any_header_is_read_or_refused(header: dict[str, Any], data: int, cut: int) -> None:
    raw = file_of(header, data)
    read_or_refuse(raw[: len(raw) - cut])


@settings(max_examples=300, deadline=None)
@given(raw=st.binary(max_size=200), length=st.one_of(st.none(), st.integers(0, (1 << 64) - 1)))
def test_any_bytes_are_read_or_refused(raw: bytes, length: int | None) -> None:
    read_or_refuse(raw if length is None else struct.pack("<Q", length) + raw)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(data: st.DataObject) -> None:
    raw = bytearray(file_of({"a": entry(), "b": entry(shape=[3], offsets=[24, 36])}, 36))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    read_or_refuse(bytes(raw))


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{", b"[" * 200_000, b'{"a": ' + b"9" * 5000 + b"}", b"[]"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_broken_json_beside_the_weights_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    (model / name).write_bytes(content)
    with pytest.raises(BadInputError, match=name):
        open_folder(model, "model")
    with pytest.raises(BadInputError, match=name):
        read_json(model / name)

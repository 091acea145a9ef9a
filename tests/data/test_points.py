"""Point clouds in every form that is read: exact values, and a reason for whatever is none."""

import contextlib
import io
import math
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.data import points as module
from sfumato.data.points import (
    MAX_DIMENSIONS,
    MAX_POINTS,
    MAX_POINTS_READ,
    RejectedPoints,
    read_points,
)

CLOUD = np.array([[0.5, -1, 2.25], [3, 0, -0.125], [-7, 1e-3, 1e6]], np.float32)
STRUCT = {
    "char": "b",
    "uchar": "B",
    "short": "h",
    "ushort": "H",
    "int": "i",
    "uint": "I",
    "float": "f",
    "double": "d",
}
ORDERS = {"binary_little_endian": "<", "binary_big_endian": ">"}


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def npy_header(description: str, body: bytes = b"") -> bytes:
    """An array of version 1.0 whose header says what it likes."""
    text = description.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


def ply(
    rows: list[tuple[float, ...]],
    *properties: str,
    order: str = "ascii",
    after: bytes = b"",
    line: str = "\n",
    said: str = "",
) -> bytes:
    """A .ply of vertices with properties such as "float x"; `said` are further lines of the
    header.
    """
    lines = ["ply", f"format {order} 1.0", *said.splitlines(), f"element vertex {len(rows)}"]
    lines += [f"property {what}" for what in properties]
    header = "".join(text + line for text in [*lines, "end_header"]).encode()
    if order == "ascii":
        return header + "".join(" ".join(map(str, row)) + line for row in rows).encode() + after
    code = ORDERS[order] + "".join(STRUCT[what.split()[0]] for what in properties)
    return header + b"".join(struct.pack(code, *row) for row in rows) + after


XYZ = ("float x", "float y", "float z")
ROWS = [tuple(map(float, row)) for row in CLOUD]


def reason(data: bytes) -> str:
    with pytest.raises(RejectedPoints) as caught:
        read_points(data)
    return str(caught.value)


# --- exact values ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        npy(CLOUD),
        npy(CLOUD.astype(">f8")),
        npy(CLOUD.astype("<f8")),
        npy(np.asfortranarray(CLOUD)),
        npy(CLOUD[::-1])[:-36] + CLOUD.tobytes(),
        ply(ROWS, *XYZ),
        ply(ROWS, *XYZ, line="\r\n"),
        ply(ROWS, *XYZ, order="binary_little_endian"),
        ply(ROWS, *XYZ, order="binary_big_endian"),
        ply(ROWS, "double x", "double y", "double z", order="binary_big_endian"),
        "\n".join(" ".join(map(str, row)) for row in ROWS).encode(),
        "\n".join(",".join(map(str, row)) for row in ROWS).encode() + b"\n",
        b"x,y,z\r\n" + "\r\n".join("; ".join(map(str, row)) for row in ROWS).encode(),
    ],
)
def test_every_form_gives_the_numbers_that_are_in_it(data: bytes) -> None:
    cloud = read_points(data)
    assert cloud.dtype == np.float32
    assert (cloud == CLOUD).all()


@pytest.mark.parametrize("kind", ["uint8", "int16", "int64", "float16", "longdouble"])
def test_plain_numbers_of_any_type_are_points(kind: str) -> None:
    values = np.arange(8).reshape(4, 2).astype(kind)
    assert read_points(npy(values)).tolist() == values.tolist()


@pytest.mark.parametrize("order", ["ascii", *ORDERS])
def test_coordinates_come_first_and_the_rest_keeps_its_order(order: str) -> None:
    properties = ("uchar red", "double z", "short tag", "float y", "float x", "uint id")
    cloud = read_points(
        ply(
            [(255, 3.0, -9, 2.0, 1.0, 70_000), (0, 6.0, 300, 5.0, 4.0, 7)], *properties, order=order
        )
    )
    assert cloud.tolist() == [[1, 2, 3, 255, -9, 70_000], [4, 5, 6, 0, 300, 7]]


def test_two_properties_of_one_name_are_two_features() -> None:
    cloud = read_points(
        ply(
            [(1.0, 2.0, 3.0, 4.0)],
            "float x",
            "float y",
            "float q",
            "float q",
            order="binary_little_endian",
        )
    )
    assert cloud.tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("line", ["\n", "\r\n"])
@pytest.mark.parametrize("order", ["ascii", *ORDERS])
def test_comments_and_what_follows_the_vertices_do_not_matter(order: str, line: str) -> None:
    said = "comment made by hand, not by\nobj_info end_header\ncomment property float w"
    faces = b"3 0 1 2\n" if order == "ascii" else b"\x03\0\0\0\0\x01\0\0\0\x02\0\0\0"
    data = ply(ROWS, *XYZ, order=order, said=said, line=line, after=faces)
    lists = f"element face 1{line}property list uchar int vertex_indices{line}end_header".encode()
    parts = data.rpartition(b"end_header" + line.encode())
    assert (read_points(parts[0] + lists + line.encode() + parts[2]) == CLOUD).all()


def test_text_may_have_words_above_comments_blank_lines_and_a_byte_order_mark() -> None:
    text = "# a cloud\r\nlongitude latitude\r\n\r\n1 2 # the first\r\n  3,\t4\r\n\r\n5;6"
    assert read_points(text.encode()).tolist() == [[1, 2], [3, 4], [5, 6]]
    assert read_points(b"\xef\xbb\xbf1,2\n3,4").tolist() == [[1, 2], [3, 4]]
    assert read_points(b"1,2\r3,4\r").tolist() == [[1, 2], [3, 4]]


def test_more_points_than_are_kept_are_thinned_evenly_ends_included() -> None:
    count = 3 * MAX_POINTS_READ + 5
    cloud = read_points(npy(np.stack([np.arange(count), np.zeros(count)], 1)))
    assert len(cloud) == MAX_POINTS_READ
    assert (cloud[0, 0], cloud[-1, 0]) == (0, count - 1)
    assert set(np.diff(cloud[:, 0])) <= {3, 4}
    assert len(read_points(npy(np.zeros((MAX_POINTS_READ, 2))))) == MAX_POINTS_READ


# --- reasons --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e39])
def test_a_point_that_is_not_finite_is_named(bad: float) -> None:
    values = CLOUD.astype(np.float64)
    values[1, 2] = bad
    text = "\n".join(" ".join(map(str, row)) for row in values.tolist()).encode()
    rows = [tuple(row) for row in values.tolist()]
    for data in (
        npy(values),
        text,
        ply(rows, "double x", "double y", "double z", order="binary_little_endian"),
    ):
        assert reason(data) == "1 of 3 points are not finite, first number 1"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no points"),
        (b"\n\n# nothing\n", "no points"),
        (b"hello\nworld", "no points"),
        (npy(np.zeros((0, 3))), "no points"),
        (ply([], *XYZ), "no points"),
        (npy(np.zeros(5)), "a cloud is N x 2 or N x 3"),
        (npy(np.zeros((2, 3, 4))), "a cloud is N x 2 or N x 3"),
        (npy(np.zeros((5, 1))), "a cloud is N x 2 or N x 3"),
        (npy(np.zeros((5, MAX_DIMENSIONS + 1))), "a cloud is N x 2 or N x 3"),
        (npy(np.zeros((5, 0))), "a cloud is N x 2 or N x 3"),
        (npy(np.zeros((5, 2), complex)), "of plain numbers"),
        (npy(np.zeros((5, 2), bool)), "of plain numbers"),
        (npy(np.zeros((5, 2), "U3")), "of plain numbers"),
        (npy(np.zeros(5, [("x", "f4"), ("y", "f4")])), "of plain numbers"),
        (npy(CLOUD)[:-1], "damaged"),
        (npy(CLOUD)[:-12], "cut short"),
        (npy(CLOUD) + b"\0" * 4, "cut short"),
        (npy(CLOUD)[:9], "damaged"),
        (b"\x93NUMPY\x02\x00" + npy(CLOUD)[8:], "unknown format"),
        (b"1 2\n3 4 5", "lines of different lengths"),
        (b"1 2\nthree four\n", "line 2 is not numbers: 'three four"),
        (b"1\n2\n3", "a cloud is N x 2"),
        (b" ".join([b"1"] * 17), "line 1 has more than 16 numbers"),
        (b"1 2\n\xff\xfe", "damaged"),
        ("1 2\n".encode("utf-16"), "damaged"),
        (ply(ROWS, *XYZ)[:-12], "cut short"),
        (ply(ROWS, *XYZ, order="binary_little_endian")[:-1], "cut short"),
        (ply([(1.0, "one", 2.0)], *XYZ), "damaged"),
        (ply(ROWS, *XYZ).replace(b"end_header", b"end"), "the header has no end"),
        (b"ply\n" + b"comment x\n" * 10_000 + ply(ROWS, *XYZ)[4:], "the header has no end"),
        (ply(ROWS, *XYZ).replace(b"ascii", b"binary"), "in a known format"),
        (ply([(1.0, 2.0)], "float x", "float z"), "no vertices with x and y"),
        (
            ply(ROWS, *XYZ).replace(b"float y", b"half y"),
            "a property of no known type: 'property half y'",
        ),
        (ply(ROWS, *XYZ).replace(b"float y", b"list uchar int y"), "vertices with lists"),
        (ply(ROWS, *XYZ).replace(b"float y", b"float"), "a property of no known type"),
        (ply(ROWS, *XYZ).replace(b"vertex 3", b"vertex three"), "damaged"),
        (ply(ROWS, *XYZ).replace(b"vertex 3", b"vertex -3"), "-3 points"),
        (ply(ROWS, *XYZ, said="element face 1"), "elements before the vertices"),
        (
            ply([(0.0,) * 18], *XYZ, *(f"float q{i}" for i in range(15))),
            "18 properties, more than 16",
        ),
    ],
)
def test_what_is_no_cloud_has_a_reason(data: bytes, said: str) -> None:
    assert said in reason(data)


def test_objects_are_refused_and_never_unpickled(tmp_path) -> None:
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    values = np.empty((2, 2), object)
    values[:] = Payload()
    assert "of plain numbers" in reason(npy(values))
    assert reason(pickle.dumps(Payload()))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999, 3)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (10000001, 2)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (9999999, 16)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 10**30)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 99999999999999999999)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 2)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1, -2)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (2, 2)}",
        "{'descr': ('<f4', (9999, 9999)), 'fortran_order': False, 'shape': (2, 2)}",
        "{'descr': '<f4', 'fortran_order': False}",
        "__import__('os')",
        "[" * 100,
        "{" * 100,
        "",
    ],
)
def test_a_header_that_lies_costs_nothing(header: str) -> None:
    tracemalloc.start()
    assert reason(npy_header(header, bytes(24)))
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()


@pytest.mark.parametrize("order", ["ascii", *ORDERS])
@pytest.mark.parametrize(
    "count", [str(MAX_POINTS), str(MAX_POINTS + 1), "1" + "0" * 18, "9" * 5000], ids=len
)
def test_a_count_that_lies_costs_nothing(order: str, count: str) -> None:
    tracemalloc.start()
    assert reason(ply(ROWS, *XYZ, order=order).replace(b"vertex 3", f"vertex {count}".encode()))
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()


def test_too_many_points_are_refused_however_they_are_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_POINTS", 10)
    rows = [(float(i), 0.0) for i in range(11)]
    text = "\n".join(f"{x} {y}" for x, y in rows).encode()
    for data in (npy(np.array(rows)), text, ply(rows, "float x", "float y")):
        assert reason(data) == "11 points, more than 10"
    assert len(read_points(npy(np.array(rows[:10])))) == 10


def test_a_file_that_is_too_large_is_refused_before_it_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 2 << 20)
    assert reason(bytes(3 << 20)) == "more than 2 MiB"


@pytest.mark.parametrize(
    "data",
    [
        b"1 2\n" * 100_000,
        b"\n" * 500_000,
        b"1 " * 1_000_000,
        b"word " * 400_000,
        b"#" * 2_000_000,
        ply([], *XYZ).replace(b"vertex 0", b"vertex 9999999") + b"1 2 3\n" * 80_000,
        ply([], *XYZ).replace(b"vertex 0", b"vertex 2") + b"1 " * 1_000_000,
        b"ply\n" + b"a" * 2_000_000,
    ],
    ids=lambda data: data[:12].decode().replace("\n", "|") + str(len(data)),
)
def test_memory_is_a_few_times_the_file(data: bytes) -> None:
    tracemalloc.start()
    with contextlib.suppress(RejectedPoints):
        read_points(data)
    assert tracemalloc.get_traced_memory()[1] < 15 * len(data)
    tracemalloc.stop()


# --- fuzz -----------------------------------------------------------------------------------------

GOOD = [
    npy(CLOUD),
    npy(np.asfortranarray(CLOUD)),
    ply(ROWS, *XYZ),
    ply(ROWS, *XYZ, line="\r\n", said="comment hello"),
    ply(ROWS, *XYZ, order="binary_little_endian"),
    ply([(1, 2.0, 3.0, 4.0)], "uchar red", *XYZ, order="binary_big_endian"),
    b"x,y,z\n1,2,3\n4,5,6\n",
    b"1 2\n3 4\n",
]


def assert_points_or_a_reason(data: bytes) -> None:
    try:
        cloud = read_points(data)
    except RejectedPoints:
        return
    assert cloud.dtype == np.float32
    assert cloud.ndim == 2
    assert 1 <= len(cloud) <= MAX_POINTS_READ
    assert 2 <= cloud.shape[1] <= MAX_DIMENSIONS
    assert np.isfinite(cloud).all()


@settings(max_examples=300, deadline=2000)
@given(
    start=st.sampled_from(
        [b"", b"ply", b"ply\nformat ascii 1.0\n", b"\x93NUMPY\x01\x00", b"1 2\n"]
    ),
    data=st.binary(max_size=300),
)
def test_any_bytes_are_points_or_have_a_reason(start: bytes, data: bytes) -> None:
    assert_points_or_a_reason(start + data)


@settings(max_examples=200, deadline=2000)
@given(text=st.text(max_size=200))
def test_any_text_is_points_or_has_a_reason(text: str) -> None:
    assert_points_or_a_reason(text.encode(errors="surrogatepass"))


@settings(max_examples=600, deadline=2000)
@given(data=st.data())
def test_a_damaged_file_is_points_or_has_a_reason(data: st.DataObject) -> None:
    good = data.draw(st.sampled_from(GOOD))
    places = st.integers(0, len(good) - 1)
    begin, end = sorted((data.draw(places), data.draw(places)))
    how = data.draw(st.sampled_from(["cut", "remove", "repeat", "replace"]))
    middle = {
        "cut": b"",
        "remove": good[end:],
        "repeat": good[begin:end] * data.draw(st.integers(2, 40)) + good[end:],
        "replace": data.draw(st.binary(min_size=1, max_size=8)) + good[min(end, begin + 8) :],
    }[how]
    assert_points_or_a_reason(good[:begin] + middle)


def test_what_is_damaged_was_good() -> None:
    """The negative control: what is mutated is good."""
    assert all(len(read_points(data)) in (1, 2, 3) for data in GOOD)

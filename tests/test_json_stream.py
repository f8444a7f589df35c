"""Reading JSON: every part of any file is returned once, and only the broken values are lost."""

import gzip
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.core.jsonl import dump_line, parse_line
from stages.ingest import byte_chunks
from stages.ingest.json_stream import MAX_BROKEN_CHARS, Broken, read_values

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)
GZIP_ERROR = "Error -3 while decompressing data: incorrect header check"
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(tmp_path: Path, data: bytes, name: str = "x.json") -> list[tuple[int, Any]]:
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return list(read_values(path))


@QUICK
@given(
    values=st.lists(JSON, max_size=6),
    indent=st.sampled_from([None, 1]),
    chunk=st.integers(1, 40),
    name=st.sampled_from(["x.json", "x.json.gz"]),
)
def test_an_array_is_read_back_whatever_the_chunk_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[Any], indent: int | None, chunk: int, name: str
) -> None:
    monkeypatch.setattr(byte_chunks, "CHUNK_BYTES", chunk)
    data = json.dumps(values, ensure_ascii=False, indent=indent).encode("utf-8", "surrogatepass")
    assert read(tmp_path, data, name) == list(enumerate(json.loads(data.decode("utf-8", "surrogateescape")), 1))


@QUICK
@given(values=st.lists(JSON.filter(lambda value: not isinstance(value, list)), min_size=2, max_size=6), bom=st.booleans())
def test_json_lines_are_read_back(tmp_path: Path, values: list[Any], bom: bool) -> None:
    lines = "\n".join(json.dumps(value) for value in values).encode()
    assert read(tmp_path, (b"\xef\xbb\xbf" if bom else b"") + lines) == list(enumerate(values, 1))


@QUICK
@given(
    data=st.binary(max_size=200), head=st.sampled_from([b"", b"[", b'[{"a": 1}, ', b'{"a": 1}\n']), chunk=st.integers(1, 50)
)
def test_any_bytes_are_read_without_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, head: bytes, chunk: int
) -> None:
    monkeypatch.setattr(byte_chunks, "CHUNK_BYTES", chunk)
    found = read(tmp_path, head + data)
    numbers = [number for number, _ in found]
    assert numbers == sorted(set(numbers))
    if head.startswith(b'[{"a": 1}'):
        assert found[0] == (1, {"a": 1})


@QUICK
@given(values=st.lists(st.fixed_dictionaries({"a": JSON}), min_size=1, max_size=5), data=st.data())
def test_a_truncated_array_keeps_its_complete_elements(tmp_path: Path, values: list[Any], data: st.DataObject) -> None:
    text = json.dumps(values)
    cut = data.draw(st.integers(1, len(text) - 1))
    found = read(tmp_path, text[:cut].encode())
    ends = [len(json.dumps(values[: count + 1])) - 1 for count in range(len(values))]
    whole = sum(end <= cut for end in ends)
    assert found[:whole] == list(enumerate(values[:whole], 1))
    assert len(found) == whole + 1
    assert isinstance(found[-1][1], Broken)


def test_a_number_across_two_chunks_is_read_completely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for chunk in range(1, 12):
        monkeypatch.setattr(byte_chunks, "CHUNK_BYTES", chunk)
        assert read(tmp_path, b"[12.5, 1e3, -7, true]") == [(1, 12.5), (2, 1e3), (3, -7), (4, True)]


def test_a_truncated_gzip_file_keeps_the_rows_before_its_end(tmp_path: Path) -> None:
    rows = [{"n": number, "text": str(number) * 50} for number in range(5000)]
    for data in (json.dumps(rows), "\n".join(map(json.dumps, rows))):
        path = tmp_path / "x.json.gz"
        packed = gzip.compress(data.encode())
        path.write_bytes(packed[: len(packed) // 2])
        found = list(read_values(path))
        assert [value for _, value in found[:-1]] == rows[: len(found) - 1]
        assert len(found) > 100
        assert "truncated" in found[-1][1].detail


@pytest.mark.parametrize("text", ["[" * 100_000, "[" + '{"a":' * 100_000, '["' + "x" * 300_000, "[1, " + "2 " * 50_000])
def test_a_long_broken_part_is_cut_and_its_length_reported(tmp_path: Path, text: str) -> None:
    broken = read(tmp_path, text.encode())[-1][1]
    assert isinstance(broken, Broken)
    assert len(broken.text) == MAX_BROKEN_CHARS
    assert f"the first {MAX_BROKEN_CHARS:,} kept" in broken.detail


def test_huge_numbers_and_long_lines(tmp_path: Path) -> None:
    line = json.dumps({"a": "x" * 50_000_000})
    found = read(tmp_path, f'{line}\n{"9" * 5000}\n1e999\n{{"b": 1}}'.encode())
    assert len(found[0][1]["a"]) == 50_000_000
    assert isinstance(found[1][1], Broken)
    assert found[3] == (4, {"b": 1})


@pytest.mark.parametrize("word", ["NaN", "-Infinity", "9" * 5000])
def test_only_the_row_with_python_constants_or_huge_integers_is_broken(tmp_path: Path, word: str) -> None:
    good = '{"a": 1}'
    for data in (f'[{good}, {{"b": [{word}]}}, {good}]', f'{good}\n{{"b": [{word}]}}\n{good}\n'):
        found = read(tmp_path, data.encode())
        assert [value for _, value in found[::2]] == [{"a": 1}, {"a": 1}]
        assert found[1][0] == 2
        assert "is not JSON" in found[1][1].detail


def test_a_nan_in_a_broken_line_does_not_affect_the_next_line(tmp_path: Path) -> None:
    found = read(tmp_path, b'{"a": NaN, "b": \n{"a": 1}\n')
    assert isinstance(found[0][1], Broken)
    assert found[1] == (2, {"a": 1})


def test_a_list_on_the_first_line_of_json_lines_is_a_row(tmp_path: Path) -> None:
    assert read(tmp_path, b'[]\n{"a": 1}\n', "x.jsonl") == [(1, []), (2, {"a": 1})]
    assert read(tmp_path, b'[{"a": 1},\n{"a": 2}]\n', "x.jsonl") == [(1, {"a": 1}), (2, {"a": 2})]


@QUICK
@given(
    values=st.lists(
        st.fixed_dictionaries({"a": JSON, "b": st.lists(st.fixed_dictionaries({"c": JSON}))}), min_size=2, max_size=6
    ),
    indent=st.sampled_from([None, 0, 2, "\t"]),
    chunk=st.sampled_from([1, 7, 1 << 20]),
    data=st.data(),
)
def test_a_broken_element_is_the_only_loss_if_elements_begin_lines(
    tmp_path: Path, values: list[Any], indent: Any, chunk: int, data: st.DataObject
) -> None:
    line_start = "\n" + (" " * indent if isinstance(indent, int) else indent or "")
    texts = [json.dumps(value, indent=indent).replace("\n", line_start if indent != 0 else "\n ") for value in values]
    broken = data.draw(st.integers(0, len(values) - 1))
    at = data.draw(st.integers(1, len(texts[broken]) - 1))
    damaged = texts[broken][:at]  # the rest of the element is missing
    text = "[" + line_start + f",{line_start}".join([*texts[:broken], damaged, *texts[broken + 1 :]]) + "\n]"
    with mock.patch.object(byte_chunks, "CHUNK_BYTES", chunk):
        found = [value for _, value in read(tmp_path, text.encode())]
    assert found[:broken] == values[:broken]
    lost = found[broken : len(found) - (len(values) - broken - 1)]
    assert all(isinstance(value, Broken) for value in lost)
    assert lost
    assert found[broken + len(lost) :] == values[broken + 1 :]


def test_a_missing_comma_between_lines_loses_nothing_and_stray_text_only_itself(tmp_path: Path) -> None:
    assert read(tmp_path, b'[\n {"a": 1}\n {"a": 2}\n]') == [(1, {"a": 1}), (2, {"a": 2})]
    found = read(tmp_path, b'[\n {"a": 1} oops\n {"a": 2},\n {"a": 3}\n]')
    assert [value for _, value in found if not isinstance(value, Broken)] == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert found[1][1].text == "oops"


def test_a_broken_element_takes_the_rest_of_a_single_line_array(tmp_path: Path) -> None:
    found = read(tmp_path, b'[{"a": 1}, {"b": }, {"c": 3}]')
    assert found[0] == (1, {"a": 1})
    assert found[1][1].text == '{"b": }, {"c": 3}]'
    assert len(found) == 2


@pytest.mark.parametrize("chunk", [1, 64, 256, 1000, 1 << 20])
def test_recovery_loses_no_element_at_the_end_of_a_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(byte_chunks, "CHUNK_BYTES", chunk)
    rows = [{"n": n, "text": "x" * (n % 50)} for n in range(300)]
    texts = ['{"n": , "text": "broken"}' if row["n"] % 7 == 3 else json.dumps(row) for row in rows]
    found = [value for _, value in read(tmp_path, ("[\n  " + ",\n  ".join(texts) + "\n]").encode())]
    assert [value for value in found if not isinstance(value, Broken)] == [row for row in rows if row["n"] % 7 != 3]
    assert len(found) == len(rows)


def test_the_recovery_example_of_the_docstring(tmp_path: Path) -> None:
    found = read(tmp_path, b'[\n  {"a": 1},\n  {"a": 2, "b": {\n    "c": 3,\n  {"a": 4}\n]')
    assert [found[0], found[2]] == [(1, {"a": 1}), (3, {"a": 4})]
    assert found[1][1].text == '{"a": 2, "b": {\n    "c": 3,'


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
def test_an_error_is_named_by_its_line_and_column_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(byte_chunks, "CHUNK_BYTES", chunk)
    found = read(tmp_path, b'[{"a": 1}, {"b": }]')
    assert found[1][1] == Broken('{"b": }]', "Expecting value: line 1 column 18")
    found = read(tmp_path, b'[\n  {"a": 1},\n  {"a": 2,\n   "b": }\n]')
    assert found[1][1] == Broken('{"a": 2,\n   "b": }\n]', "Expecting value: line 4 column 9")
    found = read(tmp_path, b'{"a": 1}\n\n{"b": }\n')
    assert found[1] == (3, Broken('{"b": }', "Expecting value: line 3 column 7"))


def test_concatenated_gzip_files_are_one_file_and_a_damaged_one_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n') + gzip.compress(b'{"a": 2}\n'))
    assert list(read_values(path)) == [(1, {"a": 1}), (2, {"a": 2})]
    path.write_bytes(gzip.compress(b'{"a": 1}\n') + b"not gzip")
    assert list(read_values(path)) == [(1, {"a": 1}), (2, Broken("", "the gzip file is damaged: " + GZIP_ERROR))]


@QUICK
@given(value=JSON)
def test_a_written_line_is_read_back(value: Any) -> None:
    line = dump_line(value)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert parse_line(line) == value


def test_long_integers_keep_all_digits() -> None:
    for number in (2**63, 2**64, -(10**30), 123456789012345678901234567890):
        assert parse_line(dump_line({"n": number})) == {"n": number}


# Shapes

ROWS = [{"q": f"问 {n}", "a": f"answer {n}"} for n in range(3)]
COLUMNS = {name: {str(n): row[name] for n, row in enumerate(ROWS)} for name in ("q", "a")}
TABLE = {"columns": ["q", "a"], "index": [0, 1, 2], "data": [[row["q"], row["a"]] for row in ROWS]}
NUMBERED = {str(n): row for n, row in enumerate(ROWS)}
SHAPES: dict[str, tuple[Any, list[tuple[Any, Any]]]] = {
    "data": ({"data": ROWS}, list(enumerate(ROWS, 1))),
    "data between other members": (
        {"version": "1.1", "n": -1.5e3, "data": ROWS, "license": {"a": [1]}, "tags": ["x"]},
        list(enumerate(ROWS, 1)),
    ),
    "any key": ({"about": {"x": 1}, "dialogs": ROWS}, list(enumerate(ROWS, 1))),
    "splits": (
        {"train": ROWS[:2], "dev": ROWS[2:], "test": []},
        [("train:1", ROWS[0]), ("train:2", ROWS[1]), ("dev:1", ROWS[2])],
    ),
    "a second list": ({"data": ROWS[:1], "authors": [{"x": 1}]}, [(1, ROWS[0]), ("authors:1", {"x": 1})]),
    "columns": (COLUMNS, list(enumerate(ROWS, 1))),
    "split": (TABLE, list(enumerate(ROWS, 1))),
    "numbered": (NUMBERED, list(enumerate(ROWS, 1))),
    "lists": (
        {"question": ["x", "y"], "answer": ["1", "2"], "n": [1, 2]},
        [(1, {"question": "x", "answer": "1", "n": 1}), (2, {"question": "y", "answer": "2", "n": 2})],
    ),
    "named": (
        {f"row {n}": {"question": "x", "n": n} for n in (3, 8)},
        [(1, {"question": "x", "n": 3}), (2, {"question": "x", "n": 8})],
    ),
    "no rows": ({"version": 1, "data": []}, []),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_rows_in_one_object_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str, indent: int | None, encoding: str, chunk: int
) -> None:
    monkeypatch.setattr(byte_chunks, "CHUNK_BYTES", chunk)
    value, rows = SHAPES[shape]
    data = json.dumps(value, ensure_ascii=False, indent=indent).encode(encoding)
    assert read(tmp_path, data) == rows
    assert read(tmp_path, data, "x.json.gz") == rows


@pytest.mark.parametrize("shape", SHAPES)
def test_a_large_object_is_read_as_a_small_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str) -> None:
    """Its first line does not end within what is looked at."""
    monkeypatch.setattr(byte_chunks, "CHUNK_BYTES", 32)
    monkeypatch.setattr(byte_chunks, "HEAD_BYTES", 32)
    value, rows = SHAPES[shape]
    if shape != "data between other members":  # the list does not begin within what is looked at
        assert read(tmp_path, json.dumps(value, ensure_ascii=False).encode()) == rows


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "q"}]},
        {"turns": [{"from": "human", "value": "q"}]},
        {"data": [{"role": "user", "content": "q"}]},
        {"id": "1", "data": ["question", "answer"]},
        {"instruction": "q", "output": "a", "images": [{"path": "x"}]},
        {"question": "q", "answers": [{"text": "a"}]},
        {"q": "x", "a": {"0": "y"}},
        {"a": {}},
        {"a": [{"x": 1}], "b": [{"y": 1}]},
        {"conversations": ["q", "a"], "tags": ["x", "y"]},
        {"dialog": ["q", "a"], "act": [1, 2]},
        {"frage": {"text": "q", "n": 1}, "antwort": {"text": "a"}},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_single_row_with_lists_stays_a_row(tmp_path: Path, row: dict[str, Any], indent: int | None) -> None:
    assert read(tmp_path, json.dumps(row, indent=indent).encode()) == [(1, row)]


@pytest.mark.parametrize("between", ["\n", "\n\n", ",\n"])
def test_pretty_printed_objects_are_rows_and_a_broken_one_costs_itself(tmp_path: Path, between: str) -> None:
    rows = [{"data": [{"x": n}], "b": {"c": [n]}} for n in range(4)]
    texts = [json.dumps(row, indent=2) for row in rows]
    assert read(tmp_path, between.join(texts).encode()) == list(enumerate(rows, 1))
    if between != ",\n":
        texts[1] = texts[1][:-3]
        found = [value for _, value in read(tmp_path, between.join(texts).encode())]
        assert [found[0], *found[2:]] == [rows[0], *rows[2:]]
        assert isinstance(found[1], Broken)


def test_one_broken_pretty_printed_object_is_one_broken_row(tmp_path: Path) -> None:
    text = json.dumps({"messages": [{"role": "user", "content": str(n)} for n in range(2000)]}, indent=2)
    ((number, broken),) = read(tmp_path, text[:-2].encode())
    assert number == 1
    assert f"line {len(text.splitlines()) - 1} column" in broken.detail


def test_a_broken_first_line_makes_json_lines_no_other_shape(tmp_path: Path) -> None:
    for first in ('{"q": "cut', '{"data": [{"a": 1}', '{"q":', '{"0": {"a": 1}'):
        found = read(tmp_path, f'{first}\n{{"q": "b"}}\n{{"q": "c"}}\n'.encode())
        assert isinstance(found[0][1], Broken)
        assert found[1:] == [(2, {"q": "b"}), (3, {"q": "c"})]


@pytest.mark.parametrize("value", [{"data": ROWS}, NUMBERED, {"train": ROWS, "test": ROWS}])
def test_a_truncated_object_keeps_its_complete_rows(tmp_path: Path, value: Any) -> None:
    text = json.dumps(value)
    whole = read(tmp_path, text.encode())
    for cut in range(20, len(text)):
        found = read(tmp_path, text[:cut].encode())
        assert found[:-1] == whole[: len(found) - 1]
        assert isinstance(found[-1][1], Broken)


def test_what_utf16_cannot_mean_costs_only_its_line(tmp_path: Path) -> None:
    lines = '{"a": "一"}\n'.encode("utf-16-le")
    found = read(tmp_path, b"\xff\xfe" + lines + b'{\0"\0a\0"\0:\0"\0\x00\xd8"\0}\0\n\0' + lines + b"x")
    assert [found[0], found[2]] == [(1, {"a": "一"}), (3, {"a": "一"})]
    assert found[1] == (2, {"a": "\udcff"})
    assert isinstance(found[3][1], Broken)


def test_gb18030_with_a_mark_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, '\ufeff{"a": "一"}\n{"a": "二"}\n'.encode("gb18030")) == [(1, {"a": "一"}), (2, {"a": "二"})]


def test_a_byte_order_mark_at_the_beginning_of_a_line_is_dropped(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbf{"a": 1}\n\xef\xbb\xbf{"a": "\xef\xbb\xbf"}\n'
    assert read(tmp_path, data) == [(1, {"a": 1}), (2, {"a": "\ufeff"})]


@pytest.mark.parametrize("between", ["\n", ",\n"])
def test_a_key_that_is_there_twice_is_no_loss_in_silence(tmp_path: Path, between: str) -> None:
    texts = ['{"a": 1, "b": {"c": 1, "c": 2}}', '{"a": 1, "a": 1}']
    data = between.join(texts)
    found = read(tmp_path, (f"[{data}]" if "," in between else data).encode())
    assert found == [(1, Broken(texts[0], "an object has the key 'c' twice")), (2, {"a": 1})]

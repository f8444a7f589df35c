"""Reading JSON: whatever stands in a file, every piece of it is handed on once, and a break costs what is broken."""

import gzip
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.core.jsonl import dump_line, parse_line
from stages.ingest import json_stream
from stages.ingest.json_stream import KEPT_TEXT, Broken, read_values

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)
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
def test_an_array_comes_out_as_it_went_in_however_it_is_cut_into_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[Any], indent: int | None, chunk: int, name: str
) -> None:
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", chunk)
    data = json.dumps(values, ensure_ascii=False, indent=indent).encode("utf-8", "surrogatepass")
    assert read(tmp_path, data, name) == list(enumerate(json.loads(data.decode("utf-8", "surrogateescape")), 1))


@QUICK
@given(values=st.lists(JSON.filter(lambda value: not isinstance(value, list)), min_size=1, max_size=6), bom=st.booleans())
def test_lines_come_out_as_they_went_in(tmp_path: Path, values: list[Any], bom: bool) -> None:
    lines = "\n".join(json.dumps(value) for value in values).encode()
    assert read(tmp_path, (b"\xef\xbb\xbf" if bom else b"") + lines) == list(enumerate(values, 1))


@QUICK
@given(
    data=st.binary(max_size=200), head=st.sampled_from([b"", b"[", b'[{"a": 1}, ', b'{"a": 1}\n']), chunk=st.integers(1, 50)
)
def test_any_bytes_are_read_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, head: bytes, chunk: int
) -> None:
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", chunk)
    found = read(tmp_path, head + data)
    numbers = [number for number, _ in found]
    assert numbers == sorted(set(numbers))
    if head.startswith(b'[{"a": 1}'):
        assert found[0] == (1, {"a": 1})


@QUICK
@given(values=st.lists(st.fixed_dictionaries({"a": JSON}), min_size=1, max_size=5), data=st.data())
def test_an_array_that_is_cut_off_keeps_what_was_whole(tmp_path: Path, values: list[Any], data: st.DataObject) -> None:
    text = json.dumps(values)
    cut = data.draw(st.integers(1, len(text) - 1))
    found = read(tmp_path, text[:cut].encode())
    ends = [len(json.dumps(values[: count + 1])) - 1 for count in range(len(values))]
    whole = sum(end <= cut for end in ends)
    assert found[:whole] == list(enumerate(values[:whole], 1))
    assert len(found) == whole + 1
    assert isinstance(found[-1][1], Broken)


def test_a_number_at_the_border_of_a_chunk_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for chunk in range(1, 12):
        monkeypatch.setattr(json_stream, "CHUNK_BYTES", chunk)
        assert read(tmp_path, b"[12.5, 1e3, -7, true]") == [(1, 12.5), (2, 1e3), (3, -7), (4, True)]


def test_a_torn_archive_keeps_the_rows_before_the_tear(tmp_path: Path) -> None:
    rows = [{"n": number, "text": str(number) * 50} for number in range(5000)]
    for data in (json.dumps(rows), "\n".join(map(json.dumps, rows))):
        path = tmp_path / "x.json.gz"
        packed = gzip.compress(data.encode())
        path.write_bytes(packed[: len(packed) // 2])
        found = list(read_values(path))
        assert [value for _, value in found[:-1]] == rows[: len(found) - 1]
        assert len(found) > 100
        assert "breaks off" in found[-1][1].detail


@pytest.mark.parametrize("text", ["[" * 100_000, "[" + '{"a":' * 100_000, '["' + "x" * 300_000, "[1, " + "2 " * 50_000])
def test_a_long_broken_piece_is_handed_on_in_part_and_its_length_told(tmp_path: Path, text: str) -> None:
    broken = read(tmp_path, text.encode())[-1][1]
    assert isinstance(broken, Broken)
    assert len(broken.text) == KEPT_TEXT
    assert f"the first {KEPT_TEXT:,} kept" in broken.detail


def test_huge_numbers_and_long_lines(tmp_path: Path) -> None:
    line = json.dumps({"a": "x" * 50_000_000})
    found = read(tmp_path, f'{line}\n{"9" * 5000}\n1e999\n{{"b": 1}}'.encode())
    assert len(found[0][1]["a"]) == 50_000_000
    assert isinstance(found[1][1], Broken)
    assert found[3] == (4, {"b": 1})


@pytest.mark.parametrize("word", ["NaN", "-Infinity", "9" * 5000])
def test_what_python_alone_reads_costs_its_own_row(tmp_path: Path, word: str) -> None:
    good = '{"a": 1}'
    for data in (f'[{good}, {{"b": [{word}]}}, {good}]', f'{good}\n{{"b": [{word}]}}\n{good}\n'):
        found = read(tmp_path, data.encode())
        assert [value for _, value in found[::2]] == [{"a": 1}, {"a": 1}]
        assert found[1][0] == 2
        assert "is not JSON" in found[1][1].detail


def test_a_line_that_breaks_behind_a_nan_costs_no_other(tmp_path: Path) -> None:
    found = read(tmp_path, b'{"a": NaN, "b": \n{"a": 1}\n')
    assert isinstance(found[0][1], Broken)
    assert found[1] == (2, {"a": 1})


def test_a_list_as_the_first_row_of_json_lines_is_a_row(tmp_path: Path) -> None:
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
def test_a_broken_element_costs_itself_where_the_elements_begin_lines(
    tmp_path: Path, values: list[Any], indent: Any, chunk: int, data: st.DataObject
) -> None:
    border = "\n" + (" " * indent if isinstance(indent, int) else indent or "")
    texts = [json.dumps(value, indent=indent).replace("\n", border if indent != 0 else "\n ") for value in values]
    broken = data.draw(st.integers(0, len(values) - 1))
    at = data.draw(st.integers(1, len(texts[broken]) - 1))
    damaged = texts[broken][:at]  # as if the rest of it were lost
    text = "[" + border + f",{border}".join([*texts[:broken], damaged, *texts[broken + 1 :]]) + "\n]"
    with mock.patch.object(json_stream, "CHUNK_BYTES", chunk):
        found = [value for _, value in read(tmp_path, text.encode())]
    assert found[:broken] == values[:broken]
    lost = found[broken : len(found) - (len(values) - broken - 1)]
    assert all(isinstance(value, Broken) for value in lost)
    assert lost
    assert found[broken + len(lost) :] == values[broken + 1 :]


def test_a_missing_comma_between_lines_costs_nothing_and_rubbish_itself(tmp_path: Path) -> None:
    assert read(tmp_path, b'[\n {"a": 1}\n {"a": 2}\n]') == [(1, {"a": 1}), (2, {"a": 2})]
    found = read(tmp_path, b'[\n {"a": 1} oops\n {"a": 2},\n {"a": 3}\n]')
    assert [value for _, value in found if not isinstance(value, Broken)] == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert found[1][1].text == "oops"


def test_a_broken_element_costs_the_rest_of_an_array_in_one_line(tmp_path: Path) -> None:
    found = read(tmp_path, b'[{"a": 1}, {"b": }, {"c": 3}]')
    assert found[0] == (1, {"a": 1})
    assert found[1][1].text == '{"b": }, {"c": 3}]'
    assert len(found) == 2


@QUICK
@given(value=JSON)
def test_a_line_that_is_written_is_read_as_it_was(value: Any) -> None:
    line = dump_line(value)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert parse_line(line) == value


def test_no_digit_of_a_long_integer_is_lost() -> None:
    for number in (2**63, 2**64, -(10**30), 123456789012345678901234567890):
        assert parse_line(dump_line({"n": number})) == {"n": number}

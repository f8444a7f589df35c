"""Parquet and CSV: every cell is exactly what the file holds, every row is read or named, nothing is kept or asked for."""

import csv
import datetime
import decimal
import gzip
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.ingest.json_stream import Broken
from stages.ingest.tables import BATCH_ROWS, describe_header, find_table_problem, read_table
from tests.tiny import PROJECT

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(tmp_path: Path, data: bytes | str, name: str = "x.csv") -> list[tuple[int, Any]]:
    path = tmp_path / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    assert find_table_problem(path) == ""
    return list(read_table(path))


def problem(tmp_path: Path, data: bytes, name: str = "x.csv") -> str:
    path = tmp_path / name
    path.write_bytes(data)
    return find_table_problem(path)


def parquet(tmp_path: Path, table: pa.Table, **options: Any) -> Path:
    path = tmp_path / "x.parquet"
    pq.write_table(table, path, **options)
    return path


# CSV

# Python's writer leaves a carriage return without quotation marks, so that it would end the line.
CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=8)


@QUICK
@given(
    rows=st.lists(st.tuples(CELLS, CELLS, CELLS).filter(any), max_size=8),
    end=st.sampled_from(["\n", "\r\n"]),
    delimiter=st.sampled_from([",", "\t", ";"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_what_python_writes_is_read_back(
    tmp_path: Path, rows: list[tuple[str, ...]], end: str, delimiter: str, encoding: str, quoting: Any
) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerows([("一", "b", "c"), *rows])
    wanted = [
        (number, {name: cell for name, cell in zip(("一", "b", "c"), row, strict=True) if cell})
        for number, row in enumerate(rows, 1)
    ]
    assert read(tmp_path, file.getvalue().encode(encoding)) == wanted


@QUICK
@given(
    data=st.lists(st.sampled_from([*b'a,;"\n\r\t\0 ', *"é一".encode(), 0xFF]), max_size=60).map(bytes),
    head=st.sampled_from([b"", b"a,b\n", b"a,b\n1,2\n", b"\xff\xfe", b'"a\n",b\n']),
)
def test_any_bytes_are_a_problem_or_rows_in_order(tmp_path: Path, data: bytes, head: bytes) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(head + data)
    if not find_table_problem(path):
        numbers = [number for number, _ in read_table(path)]
        assert numbers == sorted(set(numbers))


def test_cells_stay_the_text_that_they_are_and_an_empty_one_is_missing(tmp_path: Path) -> None:
    cells = ["007", "1e5", "NA", "null", "true", "2020-01-01", " x ", "1,5", "nan", "-", "a\r\nb\rc\nd"]
    rows = "".join(f'"{cell}",\n' for cell in cells)
    assert read(tmp_path, f"a,b\n{rows}") == [(number, {"a": cell}) for number, cell in enumerate(cells, 1)]


def test_a_ragged_row_is_named_and_costs_only_itself(tmp_path: Path) -> None:
    rows = [f"{n},x" for n in range(2 * BATCH_ROWS + 10)]
    rows[3], rows[BATCH_ROWS + 5] = "alone", "a,b,c,d"
    found = read(tmp_path, "a,b\n" + "\n".join(rows) + "\n")
    assert [number for number, _ in found] == list(range(1, len(rows) + 1))
    assert found[3][1] == Broken("alone", "the header has 2 cells, this row only 1", "not_csv")
    assert found[BATCH_ROWS + 5][1] == Broken("a,b", "the header has 2 cells, this row more", "not_csv")
    assert sum(isinstance(row, Broken) for _, row in found) == 2


def test_a_quotation_mark_out_of_place_costs_only_its_line(tmp_path: Path) -> None:
    good = [f"q{n},a{n}" for n in range(BATCH_ROWS + 20)]
    lines = [*good, 'x,"open', *good, '5,"a"b', 'last,"two\nlines, ""quoted"""', 'end,"open again', "z,z"]
    found = read(tmp_path, "q,a\n" + "\n".join(lines) + "\n")
    broken = [(number, row) for number, row in found if isinstance(row, Broken)]
    assert [row.text for _, row in broken] == ['x,"open\n', '5,"a"b\n', 'end,"open again\n']
    assert [number for number, _ in found] == list(range(1, 2 * len(good) + 6))
    assert found[-3][1] == {"q": "last", "a": 'two\nlines, "quoted"'}
    assert found[-1][1] == {"q": "z", "a": "z"}
    assert "quotation mark" in broken[0][1].detail


def test_bytes_that_are_not_utf8_become_surrogates_in_their_row_alone(tmp_path: Path) -> None:
    found = read(tmp_path, "a,b\n1,你\n".encode() + b"2,\xff\n" + "3,é\n".encode())
    assert found == [(1, {"a": "1", "b": "你"}), (2, {"a": "2", "b": "\udcff"}), (3, {"a": "3", "b": "é"})]


def test_a_truncated_gzip_file_keeps_the_rows_before_its_end(tmp_path: Path) -> None:
    rows = "".join(f"{n},{n * 7919}\n" for n in range(5000))
    packed = gzip.compress(f"a,b\n{rows}".encode())
    whole = read(tmp_path, packed, "x.csv.gz")
    assert len(whole) == 5000
    cut = read(tmp_path, packed[: len(packed) // 2], "x.csv.gz")
    assert cut[:-1] == whole[: len(cut) - 1]
    assert cut[-1] == (len(cut), Broken("", "the gzip file is truncated", "not_csv"))
    assert len(cut) > 1000


def test_the_delimiter_is_that_of_the_name_or_the_one_that_the_header_has(tmp_path: Path) -> None:
    for name, data, note in (
        ("x.tsv", "a\tb\n1\t2,3\n", ""),
        ("y.csv", "a;b\n1;2,3\n", "its cells are separated by a semicolon"),
        ("z.csv", "a\tb\n1\t2,3\n", "its cells are separated by a tab"),
        ("v.csv", "a|b\n1|2,3\n", "its cells are separated by a vertical bar"),
        ("text.csv", 'b\n"2,3"\n', ""),
    ):
        assert read(tmp_path, data, name)[0][1]["b"] == "2,3"
        assert describe_header(tmp_path / name) == note


def test_a_header_that_names_nothing_or_a_column_twice_is_a_problem(tmp_path: Path) -> None:
    assert problem(tmp_path, b"").startswith("empty; a CSV file begins with a line that names its columns")
    assert problem(tmp_path, b"\n \n").startswith("empty")
    assert problem(tmp_path, b"a,b,a\n1,2,3\n") == "two columns have the name 'a'; rename one in its first line"
    assert read(tmp_path, "a,b\n") == []
    for first in ("What is tin?,A metal", "x," + "a long text " * 9):
        assert problem(tmp_path, f"{first}\nq,a\n".encode()).startswith("its first line has no names of columns, but ")


def test_the_row_numbers_of_pandas_and_empty_lines_are_no_content(tmp_path: Path) -> None:
    assert read(tmp_path, ",q\n0,x\n") == [(1, {"Unnamed: 0": "0", "q": "x"})]
    assert read(tmp_path, "\n\na,b\n1,2\n\n,\n3,4\n\n") == [(1, {"a": "1", "b": "2"}), (3, {"a": "3", "b": "4"})]


def test_a_long_cell_and_a_name_with_a_pattern(tmp_path: Path) -> None:
    text = "x" * 1_000_000
    assert read(tmp_path, f"a,b\n1,{text}\n", "a [b]*? {c}.csv") == [(1, {"a": "1", "b": text})]


# Parquet


def test_values_of_parquet_become_json(tmp_path: Path) -> None:
    day = datetime.datetime(2024, 2, 29, 12, 30)
    columns: dict[str, tuple[Any, Any]] = {
        "text": ("一", "一"),
        "number": (7, 7),
        "large": (2**60, 2**60),
        "share": (0.1, 0.1),
        "yes": (True, True),
        "time": (day, "2024-02-29T12:30:00"),
        "day": (day.date(), "2024-02-29"),
        "hour": (day.time(), "12:30:00"),
        "long": (datetime.timedelta(hours=30), "1 day, 6:00:00"),
        "price": (decimal.Decimal("1.50"), "1.50"),
        "bytes": ("一".encode(), "一"),
        "turns": ([{"role": "user", "content": "q"}], [{"role": "user", "content": "q"}]),
        "list": (["a", None], ["a", None]),
        "struct": ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 2]}}),
    }
    table = pa.table({name: [value] for name, (value, _) in columns.items()})
    assert list(read_table(parquet(tmp_path, table))) == [(1, {name: json for name, (_, json) in columns.items()})]


def test_null_and_nan_are_missing(tmp_path: Path) -> None:
    table = pa.table(
        {
            "a": ["x", None],
            "n": [float("nan"), 1.0],
            "turns": [[{"role": "user", "weight": None}], [{"role": None, "weight": 1}]],
        }
    )
    assert list(read_table(parquet(tmp_path, table))) == [
        (1, {"a": "x", "turns": [{"role": "user"}]}),
        (2, {"n": 1.0, "turns": [{"weight": 1}]}),
    ]


def test_what_json_cannot_hold_rejects_its_row_alone(tmp_path: Path) -> None:
    table = pa.table({"q": ["a", "b", "c"], "image": [b"\x89PNG\xff", b"text", None], "n": [1.0, float("inf"), 2.0]})
    found = list(read_table(parquet(tmp_path, table)))
    assert found[0][1][1:] == ("column 'image': 5 bytes that are not UTF-8 text", "not_parquet")
    assert found[1][1].detail == "column 'n': an infinite number"
    assert found[2] == (3, {"q": "c", "n": 2.0})


def test_pictures_of_the_hub_are_not_decoded(tmp_path: Path) -> None:
    metadata = {"huggingface": '{"info": {"features": {"image": {"_type": "Image"}}}}'}
    table = pa.table({"image": [{"bytes": None, "path": "a.png"}]}).replace_schema_metadata(metadata)
    assert list(read_table(parquet(tmp_path, table))) == [(1, {"image": {"path": "a.png"}})]


def test_an_incomplete_parquet_file_or_a_type_that_is_not_read_is_a_problem(tmp_path: Path) -> None:
    path = parquet(tmp_path, pa.table({"a": ["x"]}))
    data = path.read_bytes()
    for damaged in (b"", b"PAR1", data[:-9], b"a,b\n1,2\n"):
        assert problem(tmp_path, damaged, "y.parquet").startswith("not a complete Parquet file: ")
    table = pa.table({"m": pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string())), "a": ["x"]})
    message = find_table_problem(parquet(tmp_path, table))
    assert message.startswith("column 'm' has the type map<string, string")
    assert "leave it out or write it as text" in message


def test_the_rows_behind_a_damage_are_counted_one_by_one(tmp_path: Path) -> None:
    texts = [str(n) * 20 for n in range(5 * BATCH_ROWS)]
    path = parquet(tmp_path, pa.table({"a": texts}), row_group_size=BATCH_ROWS, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = b"\xff" * 3000
    path.write_bytes(data)
    assert find_table_problem(path) == ""
    found = list(read_table(path))
    sound = [row for _, row in found if not isinstance(row, Broken)]
    assert [number for number, _ in found] == list(range(1, len(texts) + 1))
    assert sound == [{"a": text} for text in texts[: len(sound)]]
    assert len(sound) >= BATCH_ROWS
    assert found[-1][1].detail.startswith("damaged: ")


@QUICK
@given(data=st.data())
def test_any_damage_of_a_parquet_file_is_a_problem_or_broken_rows(tmp_path: Path, data: st.DataObject) -> None:
    path = parquet(tmp_path, pa.table({"a": [f"text {n}" for n in range(50)], "b": [[n] for n in range(50)]}))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    new = data.draw(st.binary(min_size=1, max_size=30))
    content[at : at + len(new)] = new
    path.write_bytes(content)
    if not find_table_problem(path):
        numbers = [number for number, _ in read_table(path)]
        assert numbers == list(range(1, len(numbers) + 1))


# datasets

SCRIPT = """
import socket, sys
from pathlib import Path
def refuse(*_, **__):
    raise SystemExit("network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from stages.ingest.raw_files import RawFile, read_rows
def rows(*names):
    return sum(1 for _ in read_rows([RawFile(Path(name), name, None) for name in names], formats={}))
assert rows("x.jsonl") == 1
assert not {"datasets", "pandas", "pyarrow"} & set(sys.modules), "JSON needs none of them"
assert rows("x.csv", "x.parquet") == 2
assert "datasets" in sys.modules
"""


def test_nothing_is_imported_for_json_and_tables_need_no_network_no_home_and_no_cache(tmp_path: Path) -> None:
    for name in ("work", "home", "temporary"):
        (tmp_path / name).mkdir()
    (tmp_path / "work" / "x.jsonl").write_text("{}\n")
    (tmp_path / "work" / "x.csv").write_text("a\n1\n")
    parquet(tmp_path / "work", pa.table({"a": [1]}))
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    env |= {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temporary"), "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path / "work", env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"work/x.jsonl", "work/x.csv", "work/x.parquet"}

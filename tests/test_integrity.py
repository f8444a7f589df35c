"""A damaged input stops the stage that reads it, by name, also where DVC does not look; an intact one never does."""

import hashlib
import json
import pickle
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

import stages.__main__ as launcher
from stages.core import integrity
from stages.core.integrity import check_inputs, folder_md5, md5_of, read_lock, read_records, scan
from stages.core.jsonl import DamagedFile, parse_line, read_json, read_jsonl
from stages.core.problem import Problem
from stages.core.provenance import verify
from stages.core.tokens import PROMPTS, TRAINING, open_tokens, read_tokens
from stages.encode import encode
from tests.tiny import Workspace

INPUTS = {  # of each stage what another stage has made
    "ingest": ["data/hub"],
    "encode": ["data/examples", "models/tokenizer"],
    "train": ["data/tokens/train.arrow", "data/tokens/validation.arrow", "models/base"],
    "merge": ["models/base", "models/adapter", "data/tokens/validation.arrow", "data/tokens/chat_template.jinja"],
    "generate": ["models/merged", "data/tokens/test.arrow", "data/tokens/prompts.arrow", "data/tokens/text.arrow"],
    "score": ["data/examples", "reports/loss", "reports/train.json", "reports/lengths.csv", "data/predictions/base.jsonl"],
}


@pytest.fixture
def root(workspace: Workspace, tmp_path: Path) -> Path:
    """What the stages have made, with dvc.lock and DVC's lists of files."""
    for name in ("data", "models", "reports", ".dvc"):
        shutil.copytree(workspace.root / name, tmp_path / name)
    for name in ("dvc.lock", "dvc.yaml", "params.yaml"):
        shutil.copy(workspace.root / name, tmp_path / name)
    return tmp_path


def files_of(root: Path, path: str) -> list[Path]:
    return [file for file in sorted((root / path).rglob("*")) if file.is_file()] if (root / path).is_dir() else [root / path]


ALL_PATHS = sorted({path for paths in INPUTS.values() for path in paths})


def test_what_dvc_computes_of_a_folder_is_computed(root: Path) -> None:
    outputs = {output.path: output.md5 for output in integrity.outputs_in(read_lock(root))}
    for path in ("data/examples", "data/hub", "models/base", "models/merged", "models/adapter", "reports/loss"):
        assert folder_md5({name: file.md5 for name, file in scan(root / path).items()}) == outputs[path]
    assert md5_of(root / "reports/train.json") == outputs["reports/train.json"]
    # As dvc 3.x computed it of d/a/x, d/a-b/x and d/a.txt, with "1", "2" and "3" and a newline in them.
    md5s = {name: hashlib.md5(text).hexdigest() for name, text in (("a/x", b"1\n"), ("a-b/x", b"2\n"), ("a.txt", b"3\n"))}
    assert folder_md5(md5s) == "998987800a59ba7a0792c11495a3e9ee.dir"


@pytest.mark.parametrize("without", ["nothing", "dvc's cache", "dvc.lock", "records"])
def test_intact_inputs_pass_and_every_flip_and_cut_is_named(root: Path, without: str) -> None:
    """A flip in each file of each input, and a cut, a missing and an additional file."""
    match without:
        case "dvc's cache":
            shutil.rmtree(root / ".dvc" / "cache")
        case "dvc.lock":
            (root / "dvc.lock").unlink()
        case "records":
            shutil.rmtree(root / "reports" / "machine")
    assert check_inputs(ALL_PATHS, root).keys() == set(ALL_PATHS)
    rng = random.Random(without)
    for path in ALL_PATHS:
        for file in files_of(root, path):
            data = file.read_bytes()
            at = rng.randrange(len(data))
            flipped = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
            for damaged in (flipped, data[:at], b""):
                file.write_bytes(damaged)
                with pytest.raises(Problem, match=path) as caught:
                    check_inputs([path], root)
                assert len(caught.value.messages) == 1
            file.unlink()
            if (root / path).is_dir():
                with pytest.raises(Problem, match=path):
                    check_inputs([path], root)
            file.write_bytes(data)
        if (root / path).is_dir():
            (root / path / "more.txt").write_text("x")
            with pytest.raises(Problem, match=path):
                check_inputs([path], root)
            (root / path / "more.txt").unlink()
    check_inputs(ALL_PATHS, root)


def test_the_message_names_the_file_the_stage_and_what_to_do(root: Path) -> None:
    path = root / "data/examples/test.jsonl"
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(Problem) as caught:
        check_inputs(["data/examples"], root)
    assert caught.value.messages == (
        "data/examples: is not what dvc.lock records of ingest: test.jsonl differs. It is damaged, or was edited or "
        "made without DVC. rm -r data/examples && dvc checkout data/examples puts back what dvc.lock records; dvc repro "
        "-f -s ingest makes it again; dvc commit ingest keeps it as it is",
    )


def test_what_a_stage_wrote_without_dvc_is_taken(root: Path) -> None:
    """Stages that are run by hand, one after another: dvc.lock knows nothing of it, and the record of the stage does."""
    path = root / "data/examples/test.jsonl"
    path.write_bytes(path.read_bytes() + b"\n")
    record = next(record for record in read_records(root) if record.stage == "ingest")
    integrity.write_record(record._replace(wrote={"data/examples": scan(root / "data/examples")}), root)
    check_inputs(["data/examples"], root)


def test_what_nobody_made_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.json").write_text("[]")
    assert set(check_inputs(["raw", "missing"], tmp_path)) == {"raw"}


def test_large_weights_are_compared_by_size_and_hashed_after_an_error(root: Path) -> None:
    weights = root / "models/base/model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    check_inputs(["models/base"], root, large=1)
    with pytest.raises(Problem, match=r"models/base: .*model\.safetensors differs"):
        check_inputs(["models/base"], root, large=10**12)
    weights.write_bytes(data[:-1])
    for cache in (True, False):
        if not cache:
            shutil.rmtree(root / ".dvc" / "cache")
        with pytest.raises(Problem, match=r"models/base: is not what"):
            check_inputs(["models/base"], root, large=1)
    weights.write_bytes(data)
    (root / "models/base/config.json").write_text("{}")
    with pytest.raises(Problem, match=r"models/base: is not what"):
        check_inputs(["models/base"], root, large=1)


@pytest.mark.parametrize("content", [b"", b"stages:\n", b"stages:\n  a:\n    outs:\n    - path: x\n", b"\xff", b"[" * 3000])
def test_a_damaged_lock_is_one_message(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "dvc.lock").write_bytes(content)
    with pytest.raises(Problem, match=r"dvc\.lock: .*; it is cut off or damaged; get it back with: git checkout dvc\.lock"):
        read_lock(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"stage": 1, "read": [], "wrote": {}}', b"\xff", b"[" * 99999])
def test_a_damaged_record_says_nothing(root: Path, content: bytes) -> None:
    (root / integrity.RECORDS / "ingest.json").write_bytes(content)
    assert "ingest" not in {record.stage for record in read_records(root)}
    check_inputs(ALL_PATHS, root)


# In the launcher


@pytest.fixture
def here(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    monkeypatch.chdir(workspace.root)
    return workspace


ENCODE = ["encode", "--examples", "data/examples", "--prompts", "data/prompts.json", "--tokenizer", "models/tokenizer"]
ENCODE += ["--tokens", "{}/tokens", "--report", "{}/report.json", "--masks", "{}/masks.html", "--lengths", "{}/lengths.csv"]


def test_a_stage_refuses_a_damaged_input_before_it_begins(
    here: Workspace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = [word.format(tmp_path) for word in ENCODE]
    with here.edited("data/examples/train.jsonl"):
        path = here.root / "data/examples/train.jsonl"
        path.write_bytes(path.read_bytes().replace(b"a", b"b", 1))
        assert launcher.main(words) == 1
    assert capsys.readouterr().err.startswith(
        "encode: data/examples: is not what dvc.lock records of ingest: train.jsonl differs"
    )
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_a_stage_is_explained_by_a_damage_that_only_hashing_shows(
    here: Workspace, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("x")

    before = (here.root / integrity.RECORDS / "encode.json").read_bytes()
    monkeypatch.setattr(encode, "encode", encode.encode)
    monkeypatch.setattr(encode, "read_prompts", fail)
    with pytest.raises(KeyError):
        launcher.main([word.format(tmp_path) for word in ENCODE])
    calls = []
    check = launcher.check_inputs

    def note(*given: object, **settings: object) -> object:
        calls.append(settings)
        if settings:
            raise Problem("models/base: is damaged")
        return check(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(launcher, "check_inputs", note)
    assert launcher.main([word.format(tmp_path) for word in ENCODE]) == 1
    assert "encode: models/base: is damaged\n" in capsys.readouterr().err
    assert (here.root / integrity.RECORDS / "encode.json").read_bytes() == before


def test_records_have_what_each_stage_read_and_wrote(workspace: Workspace) -> None:
    records = {record.stage: record for record in read_records(workspace.root)}
    lock = read_lock(workspace.root)
    assert set(records) == set(lock)
    for stage, record in records.items():
        assert set(record.read) == {dep["path"] for dep in lock[stage].get("deps", [])}, stage
        assert set(record.wrote) == {out["path"] for out in lock[stage]["outs"]}, stage


# What can be seen without a record


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 99999])
def test_json_that_is_none_is_one_message_with_its_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=r"\S") as caught:
        read_json(path)
    assert isinstance(caught.value, ValueError)
    assert caught.value.messages[0].startswith(f"{path}: not JSON: ")
    if content.strip():
        with pytest.raises(Problem):
            read_jsonl(path)
    with pytest.raises(DamagedFile, match=r"\S") as of_line:
        parse_line(content)
    assert of_line.value.messages[0].startswith("a line that is not JSON: ")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.messages, str(copy)) == (caught.value.messages, str(caught.value))


def row(**given: object) -> dict[str, object]:
    return {"id": "a", "input_ids": [1, 2], "labels": [-100, 2]} | given


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row(labels=[2])], "a row has other numbers of tokens and of labels"),
        ([row(labels=None)], "it has rows without a value"),
        ([row(input_ids=[1, None])], "it has tokens without a value"),
        ([row(input_ids=[1, -7])], "it has token ids below 0"),
    ],
)
def test_a_table_that_encode_did_not_write_is_refused(tmp_path: Path, rows: list[dict[str, object]], words: str) -> None:
    path = tmp_path / "x.arrow"
    with open_tokens(path, TRAINING, [2]) as stream:
        stream.write_batch(pa.RecordBatch.from_pylist(rows, schema=TRAINING))
    with pytest.raises(Problem, match=f"x.arrow: not a complete Arrow file: {words}; run dvc repro encode"):
        read_tokens(path)


def test_a_table_of_other_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    with open_tokens(path, pa.schema([("a", pa.int32())]), [2]):
        pass
    with pytest.raises(Problem, match="its columns are a, not those of data/tokens"):
        read_tokens(path)


def test_flips_in_an_arrow_file_end_in_a_table_or_in_one_message(tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    rows = [{"id": str(n), "prompt": "q" * n, "prompt_ids": [n] * n, "reference": "答"} for n in range(9)]
    with open_tokens(path, PROMPTS, [2]) as stream:
        stream.write_batch(pa.RecordBatch.from_pylist(rows, schema=PROMPTS))
    data, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        at = rng.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        try:
            read_tokens(path).to_pylist()
        except Problem:
            refused += 1
    assert refused > 30


def test_verify_finds_a_flip_in_every_file_that_it_speaks_of(root: Path, workspace: Workspace) -> None:
    shutil.copytree(workspace.root / "stages", root / "stages")
    for name in ("train", "merge"):
        path = root / "reports" / "provenance" / f"{name}.json"
        assert verify(path, root) == []
        recorded = json.loads(path.read_text())
        for each in [*recorded["inputs"], *recorded["outputs"], *sorted(recorded["code"])[:2]]:
            for file in files_of(root, each):
                data = file.read_bytes()
                if data:
                    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
                    assert verify(path, root), file
                    file.write_bytes(data)
        assert verify(path, root) == []

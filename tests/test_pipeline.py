"""dvc.yaml tells the truth: what a stage declares is what it reads, and an edit reruns exactly what it must."""

import ast
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.tiny import PROJECT, Workspace, make_custom_model

SPEC = YAML(typ="safe").load(PROJECT / "dvc.yaml")["stages"]
PARAMS = YAML(typ="safe").load(PROJECT / "params.yaml")

GENERATE = {"generate@base", "generate@merged"}
ALL = {"fetch", "ingest", "encode", "train", "merge", "score"} | GENERATE

# The contract with the user, written by hand: what runs again by itself, if the named thing changes ...
READ_BY = {
    "fetch": {"fetch"},
    "ingest": {"ingest"},
    "encode": {"encode"},
    "train": {"train"},
    "merge": {"merge"},
    "generate": GENERATE,
    "score": {"score"},
    "data/raw/zh.json": {"ingest"},
    "data/raw/en.json": {"ingest"},
    "data/prompts.json": {"encode"},
    "stages/__main__.py": ALL,
    "stages/fetch.py": {"fetch"},
    "stages/ingest.py": {"ingest"},
    "stages/encode.py": {"encode"},
    "stages/train.py": {"train"},
    "stages/merge.py": {"merge"},
    "stages/generate.py": GENERATE,
    "stages/score.py": {"score"},
    "stages/lib/adapter.py": {"train", "merge"},
    "stages/lib/answers.py": {"score"},
    "stages/lib/arguments.py": {"train"},
    "stages/lib/batch.py": {"train", "merge"} | GENERATE,
    "stages/lib/blocks.py": {"train"},
    "stages/lib/decode.py": GENERATE,
    "stages/lib/flat_attention.py": {"train", "merge"} | GENERATE,
    "stages/lib/four_bit.py": {"train"},
    "stages/lib/fused.py": {"train", "merge"} | GENERATE,
    "stages/lib/low_rank.py": {"train"},
    "stages/lib/fp8.py": {"train"},
    "stages/lib/memory.py": {"train"},
    "stages/lib/slot_attention.py": GENERATE,
    "stages/lib/checkpoints.py": {"train"},
    "stages/lib/distributed.py": {"train"} | GENERATE,
    "stages/lib/answering.py": GENERATE,
    "stages/lib/head.py": {"train", "merge"} | GENERATE,
    "stages/lib/sharding.py": {"train"},
    "stages/lib/siblings.py": {"train"} | GENERATE,
    "stages/lib/transformers_answers.py": GENERATE,
    "stages/lib/vllm_answers.py": GENERATE,
    "stages/lib/encoder.py": {"encode"},
    "stages/lib/formats.py": {"ingest"},
    "stages/lib/json_stream.py": {"ingest"},
    "stages/lib/labels.py": {"encode", "train", "merge"} | GENERATE,
    "stages/lib/model.py": {"merge"} | GENERATE,
    "stages/lib/progress.py": {"ingest", "encode"},
    "stages/lib/template.py": {"encode"},
    "stages/templates/masks.html.jinja": {"encode"},
    "stages/lib/device.py": {"train", "merge"} | GENERATE,
    "stages/lib/intervals.py": {"score"},
    "stages/lib/jsonl.py": ALL,
    "stages/lib/judge.py": {"score"},
    "stages/lib/loss.py": {"train", "merge"},
    "stages/lib/mask.py": {"encode"},
    "stages/lib/neighbours.py": {"score"},
    "stages/lib/output.py": ALL,
    "stages/lib/params.py": ALL,
    "stages/lib/parity.py": {"merge"},
    "stages/lib/provenance.py": {"train", "merge"} | GENERATE,
    "stages/lib/sampling.py": GENERATE,
    "stages/lib/problem.py": ALL,
    "stages/lib/quantized.py": {"train", "merge"},
    "stages/lib/rejection.py": {"ingest", "encode"},
    "stages/lib/rows.py": {"encode"},
    "stages/lib/tally.py": {"encode"},
    "stages/lib/snapshot.py": ALL,
    "stages/lib/trainer.py": {"train"},
    "stages/losses/cross_entropy.py": {"train"},
    "stages/lib/tokens.py": {"encode", "train", "merge"} | GENERATE,
    "stages/templates/alpaca.jinja": set(),
    "stages/templates/chatglm.jinja": set(),
    "stages/templates/chatml.jinja": {"encode"},  # the one that encode.template names
    "stages/templates/human_assistant.jinja": set(),
    "stages/templates/join.jinja": set(),
    "stages/templates/join_eos.jinja": set(),
    "stages/templates/report.html.jinja": {"score"},
    "README.md": set(),
}
# ... and what comes after each stage, where its result is another.
AFTER = {
    "fetch": ALL - {"ingest"},
    "ingest": ALL - {"fetch"},
    "encode": {"train", "merge", "score"} | GENERATE,
    "train": {"merge", "generate@merged", "score"},
    "merge": {"generate@merged", "score"},
    "generate@base": {"score"},
    "generate@merged": {"score"},
    "score": set(),
}


def leaves(section: dict[str, Any], at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in section.items():
        found += leaves(value, (*at, key)) if isinstance(value, dict) and value else [(*at, key)]
    return found


def changed(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int() | float():
            return value * 2 + 1
        case str():
            return value + "x"
        case dict():
            return {"*.json": "alpaca"}
        case list():
            return [*value, "x"]
        case _:
            raise TypeError(value)


@pytest.mark.parametrize("path", leaves(PARAMS), ids=".".join)
def test_a_parameter_reruns_its_stage_and_what_follows(workspace: Workspace, path: tuple[str, ...]) -> None:
    section, *way, key = path
    with workspace.edited("params.yaml"):
        params = workspace.params()
        place = params[section]
        for step in way:
            place = place[step]
        place[key] = changed(place[key])
        workspace.write(params)
        direct, closed = workspace.stale()
    assert direct == READ_BY[section]
    assert closed == direct.union(*(AFTER[stage] for stage in direct))


@pytest.mark.parametrize("file", [name for name in READ_BY if "/" in name or name.endswith(".md")])
def test_a_file_reruns_its_stages_and_what_follows(workspace: Workspace, file: str) -> None:
    with workspace.edited(file):
        with (workspace.root / file).open("a") as opened:
            opened.write("\n")
        direct, closed = workspace.stale()
    assert direct == READ_BY[file]
    assert closed == direct.union(*(AFTER[stage] for stage in direct))


def test_the_table_above_names_every_file_of_the_project_that_a_stage_can_read(workspace: Workspace) -> None:
    code = {str(path.relative_to(PROJECT)) for path in (PROJECT / "stages").rglob("*") if path.suffix in (".py", ".jinja")}
    empty = {"stages/__init__.py", "stages/lib/__init__.py"}
    data = {"data/prompts.json"} | {
        str(path.relative_to(workspace.root)) for path in (workspace.root / "data" / "raw").iterdir()
    }
    assert {name for name in READ_BY if "/" in name} == code - empty | data
    assert set(PARAMS) == set(SPEC)


def test_nothing_changed_reruns_nothing(workspace: Workspace) -> None:
    assert workspace.stale() == (set(), set())
    assert workspace.repro() == []


def test_every_output_exists_and_has_a_hash(workspace: Workspace) -> None:
    lock = YAML(typ="safe").load(workspace.root / "dvc.lock")["stages"]
    assert set(lock) == ALL
    for stage in lock.values():
        for out in stage["outs"]:
            assert (workspace.root / out["path"]).exists()
            assert out["md5"]


@pytest.mark.usefixtures("second_python")
def test_a_forced_second_run_gives_the_same_bytes(workspace: Workspace) -> None:
    before = (workspace.root / "dvc.lock").read_bytes()
    assert set(workspace.repro(force=True)) == ALL
    assert (workspace.root / "dvc.lock").read_bytes() == before


@pytest.mark.usefixtures("second_python")
def test_a_raw_row_that_falls_into_test_trains_nothing(workspace: Workspace) -> None:
    raw = workspace.root / "data" / "raw" / "test" / "new.jsonl"
    raw.parent.mkdir()
    before = read_examples(workspace.root)
    try:
        raw.write_text(json.dumps({"instruction": "New?", "output": "Yes."}) + "\n")
        assert set(workspace.repro()) == {"ingest", "encode", "score"} | GENERATE
        after = read_examples(workspace.root)
        assert {split: len(after[split]) - len(before[split]) for split in before} == {
            "train": 0,
            "validation": 0,
            "test": 1,
        }
    finally:
        raw.unlink()
        raw.parent.rmdir()
        workspace.repro()  # from the run cache


def read_examples(root: Path) -> dict[str, list[str]]:
    splits = ("train", "validation", "test")
    return {split: (root / f"data/examples/{split}.jsonl").read_text(encoding="utf-8").splitlines() for split in splits}


# Code


def project_imports(path: Path) -> set[Path]:
    """The project's own files that a file imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    files = {PROJECT / f"{name.replace('.', '/')}.py" for name in names}
    return {file for file in files if file.exists()}


def closure(*paths: Path) -> set[str]:
    seen: set[Path] = set()
    todo = set(paths)
    while todo:
        seen |= todo
        todo = {found for file in todo for found in project_imports(file)} - seen
    return {str(file.relative_to(PROJECT)) for file in seen}


@pytest.mark.parametrize("stage", SPEC)
def test_a_stage_declares_exactly_the_code_that_it_runs(stage: str) -> None:
    declared = [dep for dep in SPEC[stage]["deps"] if dep.endswith(".py")]
    assert len(declared) == len(set(declared))
    assert set(declared) == closure(PROJECT / "stages" / "__main__.py", PROJECT / "stages" / f"{stage}.py")


@pytest.mark.parametrize("stage", SPEC)
def test_no_stage_imports_another(stage: str) -> None:
    stages = {f"stages/{other}.py" for other in SPEC}
    assert closure(PROJECT / "stages" / f"{stage}.py") & stages == {f"stages/{stage}.py"}


@pytest.mark.parametrize("stage", SPEC)
def test_a_stage_declares_its_own_section_and_opens_no_params(stage: str) -> None:
    assert SPEC[stage]["params"] == [stage]
    source = (PROJECT / "stages" / f"{stage}.py").read_text(encoding="utf-8")
    assert "params.yaml" not in ast.unparse(strip_text(ast.parse(source)))
    assert "load_section" not in source


def strip_text(tree: ast.Module) -> ast.Module:
    """The code without docstrings and messages, which may name the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            node.value = ""
        if isinstance(node, ast.JoinedStr):
            node.values = []
    return tree


def test_the_folder_of_stages_holds_the_stages_and_the_launcher() -> None:
    assert {file.stem for file in (PROJECT / "stages").glob("*.py")} == set(SPEC) | {"__init__", "__main__"}


@pytest.mark.parametrize("init", ["stages/__init__.py", "stages/lib/__init__.py"])
def test_package_inits_are_empty(init: str) -> None:
    assert (PROJECT / init).read_bytes() == b""  # they run before every stage, and no stage declares them


@pytest.mark.parametrize("stage", SPEC)
def test_every_path_on_the_command_line_is_declared(stage: str) -> None:
    spec = SPEC[stage]
    outs = [
        next(iter(out)) if isinstance(out, dict) else out
        for key in ("outs", "metrics", "plots")
        for out in spec.get(key, [])
    ]
    read = {dep for dep in spec["deps"] if not dep.startswith("stages/") or not dep.endswith(".py")}
    for path in spec["cmd"].split()[4:]:
        # What differs between equal runs (time, memory, date) is no output, or no two runs would be equal.
        machine = path == f"reports/machine/{stage}.json"
        assert machine or path in outs or any(dep == path or dep.startswith(f"{path}/") for dep in read), path
    for path in outs:
        assert path in spec["cmd"].split(), path


# The committed lock


def test_the_committed_lock_belongs_to_the_committed_code() -> None:
    lock = YAML(typ="safe").load(PROJECT / "dvc.lock")["stages"]
    made = {out["path"] for entry in lock.values() for out in entry["outs"]}  # a clone has none of it; the chain tells
    done = subprocess.run(["dvc", "status", "--json"], cwd=PROJECT, capture_output=True, text=True, check=True)
    stale: dict[str, list[Any]] = {}
    for stage, entries in json.loads(done.stdout).items():
        for entry in entries:  # "changed command", or {"changed deps": {path: state, or params.yaml: {section: state}}}
            changed = {"cmd": entry} if isinstance(entry, str) else next(iter(entry.values()))
            stale.setdefault(stage, []).extend(path for path in changed if not {path, *map(str, Path(path).parents)} & made)
    assert {stage: paths for stage, paths in stale.items() if paths} == {}, "run dvc repro and commit dvc.lock"


def test_the_hashes_in_the_committed_lock_form_a_chain() -> None:
    lock = YAML(typ="safe").load(PROJECT / "dvc.lock")["stages"]
    made = {out["path"]: out["md5"] for entry in lock.values() for out in entry["outs"]}
    links = [(dep["path"], dep["md5"]) for entry in lock.values() for dep in entry["deps"] if dep["path"] in made]
    assert len(links) >= 12
    for path, md5 in links:
        assert md5 == made[path], f"{path}: one stage made other bytes than another read; run dvc repro"


def test_a_model_with_code_of_its_own_and_a_slow_tokenizer_goes_through_all_stages(
    tmp_path: Path, second_python: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    make_custom_model(tmp_path / "custom")
    workspace = Workspace(tmp_path / "workspace", tmp_path / "custom")
    given = workspace.params()
    given["fetch"]["trust_remote_code"] = True
    given["train"]["target_modules"] = ["W_pack"]
    given["encode"]["template"] = "stages/templates/human_assistant.jinja"
    workspace.write(given)
    assert len(workspace.repro()) == 8
    adapter = json.loads((workspace.root / "models" / "adapter" / "adapter_config.json").read_text())
    assert adapter["target_modules"] == ["layers.0.W_pack", "layers.1.W_pack"]
    training = json.loads((workspace.root / "models" / "adapter" / "training.json").read_text())
    assert len(training["quantized_layers"]) == 10
    merged = json.loads((workspace.root / "reports" / "merge.json").read_text())
    assert merged["merged_layers"] == 2
    assert merged["mean_kl"] < 1e-2
    trained = json.loads((workspace.root / "reports" / "train.json").read_text())
    assert trained["validation_loss"] < trained["validation_loss_before"]
    rows = [json.loads(line) for line in (workspace.root / "data" / "predictions" / "merged.jsonl").read_text().splitlines()]
    assert all("Human: " in row["prompt"] and row["answer_tokens"] for row in rows)
    assert (workspace.root / "models" / "merged" / "modeling_tiny_pack.py").exists()

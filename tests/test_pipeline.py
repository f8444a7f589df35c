"""dvc.yaml tells the truth: what a stage declares is what it reads, and an edit reruns exactly what it must."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages.core.snapshot import hash_code
from stages.ingest.splits import Splits
from tests.tiny import PROJECT, Workspace, folder_hash, make_custom_model, make_model

SPEC = YAML(typ="safe").load(PROJECT / "dvc.yaml")["stages"]
PARAMS = YAML(typ="safe").load(PROJECT / "params.yaml")

GENERATE = {"generate@base", "generate@merged"}
ALL = {"fetch", "fetch_data", "ingest", "encode", "train", "merge", "score"} | GENERATE

# The contract with the user, written by hand: what runs again by itself, if the named thing changes ...
ENCODED = {"encode", "train", "merge"} | GENERATE
MODELS = {"train", "merge"} | GENERATE
READ_BY = {
    "fetch": {"fetch"},
    "fetch_data": {"fetch_data"},
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
    # A folder of a stage reruns that stage, core reruns all ...
    "stages/fetch/": {"fetch"},
    "stages/fetch_data/": {"fetch_data"},
    "stages/ingest/": {"ingest"},
    "stages/encode/": {"encode"},
    "stages/train/": {"train"},
    "stages/merge/": {"merge"},
    "stages/generate/": GENERATE,
    "stages/score/": {"score"},
    "stages/core/": ALL,
    # ... and model what loads a model, except for these.
    "stages/model/": MODELS,
    "stages/core/disk.py": {"fetch", "fetch_data", "train", "merge"},
    "stages/core/tokens.py": ENCODED,
    "stages/model/adapter.py": {"train", "merge"},
    "stages/model/base_weights.py": {"train", "merge"},
    "stages/model/checkpoints.py": {"train"} | GENERATE,
    "stages/model/compile.py": {"train"} | GENERATE,
    "stages/model/distributed.py": {"train"} | GENERATE,
    "stages/model/launch.py": {"train"} | GENERATE,
    "stages/model/limits.py": {"train"} | GENERATE,
    "stages/model/load.py": {"merge"} | GENERATE,
    "stages/model/expert_quantizer.py": {"train", "merge"},
    "stages/model/experts.py": {"train", "merge"},
    "stages/model/four_bit.py": {"train", "merge"},
    "stages/model/lora.py": {"train", "merge"},
    "stages/model/peft_targets.py": {"train", "merge"},
    "stages/model/quantize.py": {"train", "merge"},
    "stages/model/routers.py": {"train", "merge"},
    "stages/model/shared_inputs.py": {"train"} | GENERATE,
    "stages/losses/cross_entropy.py": {"train"},
    "stages/templates/alpaca.jinja": set(),
    "stages/templates/chatglm.jinja": set(),
    "stages/templates/chatml.jinja": {"encode"},  # the one that encode.template names
    "stages/templates/human_assistant.jinja": set(),
    "stages/templates/join.jinja": set(),
    "stages/templates/join_eos.jinja": set(),
    "stages/commands/": set(),
    "README.md": set(),
}


def read_by(file: str) -> set[str]:
    """The stages that read a file, by its own line in the table or its folder's."""
    return READ_BY[file] if file in READ_BY else READ_BY[f"{Path(file).parent.as_posix()}/"]


CODE = sorted(
    path.relative_to(PROJECT).as_posix()
    for path in (PROJECT / "stages").rglob("*")
    if path.suffix in (".py", ".jinja") and path.name != "__init__.py"
)
# ... and what comes after each stage, where its result is another.
AFTER = {
    "fetch": ALL - {"fetch_data", "ingest"},
    "fetch_data": ALL - {"fetch", "fetch_data"},
    "ingest": ALL - {"fetch", "fetch_data"},
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


@pytest.mark.parametrize("file", [*CODE, "data/raw/zh.json", "data/raw/en.json", "data/prompts.json", "README.md"])
def test_a_file_reruns_its_stages_and_what_follows(workspace: Workspace, file: str) -> None:
    with workspace.edited(file):
        with (workspace.root / file).open("a") as opened:
            opened.write("\n")
        direct, closed = workspace.stale()
    assert direct == read_by(file)
    assert closed == direct.union(*(AFTER[stage] for stage in direct))


def test_the_table_above_names_nothing_that_is_not_there(workspace: Workspace) -> None:
    for name in READ_BY:
        if "/" in name:
            assert (workspace.root / name).exists(), name
    assert set(PARAMS) == set(SPEC)


@pytest.mark.parametrize(
    "file", ["stages/train/__pycache__/x.pyc", "stages/train/notes.txt", "stages/core/.x.swp", "stages/train/.#train.py"]
)
def test_what_is_no_code_reruns_nothing(workspace: Workspace, file: str) -> None:
    path = workspace.root / file
    path.parent.mkdir(exist_ok=True)
    before = hash_code("train", ["stages/train", "stages/core"], workspace.root)
    path.write_text("x")
    try:
        assert workspace.stale() == (set(), set())
        assert hash_code("train", ["stages/train", "stages/core"], workspace.root) == before
    finally:
        path.unlink()


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


# What really runs, where an output keeps its bytes and what comes after it need not run: edit, as the README's table calls
# it, to the stages that run.
EARLY_CUT_OFF = {
    "a comment in `stages/train/`": {"train"},
    "a comment in `stages/encode/`": {"encode"},
    "a comment in `stages/merge/`": {"merge"},
    "a raw row that falls into test": {"ingest", "encode", "score"} | GENERATE,
    "other base weights with the same tokenizer": {"fetch", "train", "merge", "score"} | GENERATE,
}


@pytest.mark.usefixtures("second_python")
@pytest.mark.parametrize("stage", ["train", "encode", "merge"])
def test_a_comment_in_the_code_of_a_stage_reruns_that_stage_alone(workspace: Workspace, stage: str) -> None:
    files = [name for name in CODE if name.startswith(f"stages/{stage}/") and name.endswith(".py")]
    with workspace.edited(*files):
        for name in files:
            with (workspace.root / name).open("a") as opened:
                opened.write("# a comment\n")
        assert set(workspace.repro()) == EARLY_CUT_OFF[f"a comment in `stages/{stage}/`"]
    workspace.repro()  # from the run cache


@pytest.mark.usefixtures("second_python")
def test_other_base_weights_with_the_same_tokenizer_tokenize_nothing(workspace: Workspace, tmp_path: Path) -> None:
    make_model(tmp_path / "other", seed=1)
    tiny = workspace.root / "tiny" / "model.safetensors"
    with workspace.edited("params.yaml", "tiny/model.safetensors"):
        tiny.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
        params = workspace.params()
        params["fetch"]["revision"] = folder_hash(workspace.root / "tiny")
        workspace.write(params)
        assert set(workspace.repro()) == EARLY_CUT_OFF["other base weights with the same tokenizer"]
    workspace.repro()


@pytest.mark.usefixtures("second_python")
def test_a_raw_row_that_falls_into_test_trains_nothing(workspace: Workspace) -> None:
    raw = workspace.root / "data" / "raw" / "new.jsonl"
    given = workspace.params()["ingest"]
    splits = Splits(
        seed=given["split_seed"],
        validation_percent=given["validation_percent"],
        test_percent=given["test_percent"],
        grouped=False,
    )
    question = next(text for text in (f"new {n}?" for n in range(100)) if splits._hashed_split(text) == "test")
    before = read_examples(workspace.root)
    try:
        raw.write_text(json.dumps({"instruction": question, "output": "Yes."}) + "\n")
        assert set(workspace.repro()) == EARLY_CUT_OFF["a raw row that falls into test"]
        after = read_examples(workspace.root)
        assert {split: len(after[split]) - len(before[split]) for split in before} == {
            "train": 0,
            "validation": 0,
            "test": 1,
        }
    finally:
        raw.unlink()
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


def declared_code(stage: str) -> set[str]:
    """The Python files that dvc.yaml declares for a stage, folders expanded."""
    found: set[str] = set()
    for dep in SPEC[stage]["deps"]:
        path = PROJECT / dep
        if dep.startswith("stages/"):
            files = path.glob("*.py") if path.is_dir() else [path]
            found |= {file.relative_to(PROJECT).as_posix() for file in files if file.name != "__init__.py"}
    return found


@pytest.mark.parametrize("stage", SPEC)
def test_a_stage_declares_exactly_the_code_that_it_runs(stage: str) -> None:
    roots = [PROJECT / "stages" / "__main__.py", PROJECT / "stages" / stage / f"{stage}.py"]
    if stage == "train":
        roots.append(PROJECT / PARAMS["train"]["loss"])  # its own dependency, imported by path
    imported = closure(*roots) - {PARAMS["train"]["loss"]}
    assert declared_code(stage) == imported
    assert len(SPEC[stage]["deps"]) == len(set(SPEC[stage]["deps"]))


@pytest.mark.parametrize("stage", SPEC)
def test_a_folder_stands_as_one_line_where_all_of_it_is_imported(stage: str) -> None:
    deps = SPEC[stage]["deps"]
    assert f"stages/{stage}" in deps
    for room in ("core", "model"):
        files = {file.relative_to(PROJECT).as_posix() for file in (PROJECT / "stages" / room).glob("*.py")}
        assert not files - {f"stages/{room}/__init__.py"} <= set(deps), f"write stages/{room} in place of its files"


@pytest.mark.parametrize("file", [name for name in CODE if name.endswith(".py")])
def test_only_its_own_stage_imports_the_folder_of_a_stage(file: str) -> None:
    """And core imports core alone; a loss may import from train, which is the stage that loads it."""
    room = file.split("/")[1]
    allowed = {"core": {"core"}, "model": {"core", "model"}, "losses": {"core", "model", "train"}, "__main__.py": {"core"}}
    imported = {path.relative_to(PROJECT).parts[1] for path in project_imports(PROJECT / file)}
    assert imported <= allowed.get(room, {"core", "model", room}), file


def test_core_imports_no_torch() -> None:
    for file in [*(PROJECT / "stages" / "core").glob("*.py"), PROJECT / "stages" / "__main__.py"]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = {
            name.partition(".")[0]
            for node in ast.walk(tree)
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [str(node.module)]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert not names & {"torch", "transformers", "peft", "bitsandbytes", "accelerate"}, file


@pytest.mark.parametrize("stage", SPEC)
def test_a_stage_declares_its_own_section_and_opens_no_params(stage: str) -> None:
    assert SPEC[stage]["params"] == [stage]
    source = (PROJECT / "stages" / stage / f"{stage}.py").read_text(encoding="utf-8")
    assert "params.yaml" not in ast.unparse(strip_text(ast.parse(source)))
    assert "read_section" not in source


def strip_text(tree: ast.Module) -> ast.Module:
    """The code without docstrings and messages, which may name the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            node.value = ""
        if isinstance(node, ast.JoinedStr):
            node.values = []
    return tree


def test_the_folder_of_stages_holds_the_stages_what_they_share_and_what_users_change() -> None:
    rooms = {path.name for path in (PROJECT / "stages").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == {*SPEC, "core", "model", "losses", "templates", "commands"}
    assert {file.name for file in (PROJECT / "stages").glob("*.py")} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("init", sorted((PROJECT / "stages").rglob("__init__.py")), ids=lambda path: path.parent.name)
def test_package_files_are_empty(init: Path) -> None:
    assert init.read_bytes() == b""


def outs_of(stage: str) -> list[str]:
    entries = [out for key in ("outs", "metrics") for out in SPEC[stage].get(key, [])]
    return [next(iter(out)) if isinstance(out, dict) else out for out in entries]


@pytest.mark.parametrize("stage", SPEC)
def test_every_path_on_the_command_line_is_declared_and_named_in_the_signature(stage: str) -> None:
    words = SPEC[stage]["cmd"].split()
    assert words[:4] == ["python", "-m", "stages", stage]
    options, paths = words[4::2], words[5::2]
    deps = [dep for dep in SPEC[stage]["deps"] if not dep.startswith(("stages/", "${"))]
    for path in paths:
        # What differs between equal runs (time, memory, date) is no output, or no two runs would be equal.
        machine = path == f"reports/machine/{stage}.json"
        read = any(dep == path or dep.startswith(f"{path}/") for dep in deps)
        assert machine or read or path in outs_of(stage), path
    assert set(outs_of(stage)) <= set(paths)
    module = ast.parse((PROJECT / "stages" / stage / f"{stage}.py").read_text(encoding="utf-8"))
    function = next(node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == stage)
    assert [argument.arg for argument in function.args.args] == ["params"]
    named = [f"--{argument.arg.replace('_', '-')}" for argument in function.args.kwonlyargs]
    assert sorted({*options} - {"--provenance"}) == sorted(named)


def test_nothing_that_a_user_writes_reaches_a_shell() -> None:
    for stage, spec in SPEC.items():
        found = re.findall(r"\$\{(.*?)\}", spec["cmd"])
        assert set(found) <= ({"item.model"} if "matrix" in spec else set()), stage  # of dvc.yaml itself, not of a user
        assert "${" not in str(spec.get("outs")).replace("${item.model}", "")


OPTIONAL = {"triton", "vllm"}  # come with PyTorch for GPUs, or are asked for by name
DISTRIBUTIONS = {"ruamel": "ruamel.yaml"}


def test_what_is_imported_directly_is_pinned_in_requirements() -> None:
    pinned = {line.partition("==")[0] for line in (PROJECT / "requirements.txt").read_text().splitlines() if "==" in line}
    imported = set()
    for file in [*(PROJECT / "stages").rglob("*.py"), *(PROJECT / "tools").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
    imported -= sys.stdlib_module_names | {"stages", "tests"} | OPTIONAL
    third_party = {DISTRIBUTIONS.get(name, name) for name in imported}
    assert third_party <= pinned
    assert len(third_party) > 20


def test_the_front_page_is_one_page() -> None:
    assert len((PROJECT / "dvc.yaml").read_text(encoding="utf-8").splitlines()) <= 140


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


@pytest.mark.usefixtures("second_python")
def test_folders_templates_losses_and_raw_files_may_have_any_name(tmp_path: Path, tiny_model: Path) -> None:
    workspace = Workspace(tmp_path / 'it\'s a (test) "项目"', tiny_model)
    odd = 'my files\' (新) "x"'
    (workspace.root / odd).mkdir()
    given = workspace.params()
    for section, key in (("encode", "template"), ("train", "loss")):
        source = workspace.root / given[section][key]
        target = f"{odd}/a {key}; touch hacked; $(touch hacked) 新{source.suffix}"
        (workspace.root / target).write_bytes(source.read_bytes())
        given[section][key] = target
    workspace.write(given)
    raw = workspace.root / "data" / "raw"
    (raw / odd).mkdir()
    (raw / "zh.json").rename(raw / odd / "数据 (1) 'x'.json")
    assert len(workspace.repro()) == 9
    assert not list(workspace.root.rglob("hacked"))
    assert workspace.stale() == (set(), set())


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
    assert len(workspace.repro()) == 9
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

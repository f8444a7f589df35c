"""fetch: a model's own Python code is taken only where Transformers has no class; what is no text generator is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.fetch import model_types
from tests.fetching import OWN_CODE, edit_config, refused, run
from tests.tiny import folder_hash, make_other_model, make_sentencepiece_tokenizer, make_tokenizer

AUTO_MAP = {"AutoConfig": "old.Config", "AutoModelForCausalLM": "old.Model", "AutoTokenizer": ["old.Tokenizer", None]}
OWN_TOKENIZER = {"tokenizer_class": "OldTokenizer", "auto_map": {"AutoTokenizer": ["old.Tokenizer", None]}}


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def add_code(folder: Path, **config: Any) -> None:
    edit_config(folder, auto_map=AUTO_MAP, **config)
    (folder / "old.py").write_text("raise RuntimeError('old code was run')\n")


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))


def taken(folder: Path) -> str:
    """What fetch.revision must be for a folder without its Python files."""
    bare = Path(shutil.copytree(folder, folder.with_name("bare"), ignore=shutil.ignore_patterns("*.py"), dirs_exist_ok=True))
    return folder_hash(bare)


def test_the_tables_are_those_that_transformers_uses() -> None:
    from transformers.models.auto import configuration_auto, modeling_auto

    for table in (*model_types.GENERATORS, model_types.ENCODERS, model_types.ENCODER_DECODERS):
        assert model_types._keys("modeling_auto.py", table) == set(getattr(modeling_auto, table))
    assert model_types._known_types() == set(configuration_auto.CONFIG_MAPPING_NAMES)


def test_fetch_imports_no_torch_to_know_a_model_type() -> None:
    script = (
        "import sys; from stages.fetch.model_types import type_problem; type_problem({'model_type': 'phi3'});"
        "sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


KNOWN = ["phi3", "deepseek_v2", "deepseek_v3", "minicpm3", "internlm3", "ernie4_5", "falcon", "mpt", "nemotron_h", "glm4"]


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("kind", KNOWN)
def test_a_type_that_transformers_knows_needs_no_consent(tmp_path: Path, model: Path, kind: str, trust: bool) -> None:
    add_code(model, model_type=kind)
    edit(model / "tokenizer_config.json", **OWN_TOKENIZER)
    base = run(tmp_path, model_name_or_path=str(model), revision=taken(model), trust_remote_code=trust)
    assert not list(base.glob("*.py"))
    for folder in (base, tmp_path / "tokenizer"):
        for file in folder.glob("*config.json"):
            assert "auto_map" not in json.loads(file.read_text())
    assert json.loads((base / "manifest.json").read_text())["trust_remote_code"] is False


LOAD = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
base, tokenizer, *trusts = sys.argv[1:]
for trust in trusts:
    given = {"trust_remote_code": trust == "True"} if trust != "None" else {}
    print(type(AutoModelForCausalLM.from_pretrained(base, **given)).__module__)
    print(type(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, **given), **given)).__module__)
    for folder in (base, tokenizer):
        print(type(AutoTokenizer.from_pretrained(folder, **given)).__module__.split(".")[0])
"""


def load(tmp_path: Path, *trusts: str) -> tuple[list[str], str]:
    """The modules of the classes that Transformers takes for model and tokenizer, and what it says. Nobody can answer."""
    command = [sys.executable, "-c", LOAD, str(tmp_path / "base"), str(tmp_path / "tokenizer"), *trusts]
    env = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return done.stdout.split(), done.stderr


PHI3 = "transformers.models.phi3.modeling_phi3"


@pytest.mark.parametrize("trust", [False, True])
def test_transformers_own_class_is_loaded_without_a_question(
    tmp_path: Path, trust: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also by a user who loads models/merged, which has the same config files, with or without consent."""
    folder = tmp_path / "model"
    make_tokenizer(folder)
    make_other_model(folder, "phi3")
    add_code(folder)
    edit(folder / "tokenizer_config.json", auto_map=OWN_TOKENIZER["auto_map"])
    run(tmp_path, model_name_or_path=str(folder), revision=taken(folder), trust_remote_code=trust)
    line = "has its own class for model type phi3; the model's own Python code is not used"
    assert (line in capsys.readouterr().out) is trust
    modules, said = load(tmp_path, "None", "False", "True")
    assert modules == [PHI3, PHI3, "transformers", "transformers"] * 3, said
    assert "custom code" not in said
    assert not (tmp_path / "hf" / "modules").exists()


def test_transformers_class_and_the_tokenizers_own_code_go_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    make_sentencepiece_tokenizer(folder, fast=False)
    make_other_model(folder, "phi3")
    add_code(folder)
    run(tmp_path, model_name_or_path=str(folder), revision=folder_hash(folder), trust_remote_code=True)
    assert "the model's own Python code is not used, except for the tokenizer's" in capsys.readouterr().out
    modules, said = load(tmp_path, "True")
    assert modules == [PHI3, PHI3, "transformers_modules", "transformers_modules"], said


def test_an_unknown_type_keeps_all_its_code(tmp_path: Path, model: Path) -> None:
    """As baichuan and ChatGLM do: the tokenizer's class too."""
    edit_config(model, **OWN_CODE)
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Tokenizer", None]})
    (model / "own.py").write_text("class Config: ...\n")
    (model / "tokenization_own.py").write_text("")
    base = run(tmp_path, model_name_or_path=str(model), revision=folder_hash(model), trust_remote_code=True)
    for name in ("config.json", "tokenizer_config.json", "own.py", "tokenization_own.py"):
        assert (base / name).read_bytes() == (model / name).read_bytes()
    assert (tmp_path / "tokenizer" / "own.py").exists()
    assert json.loads((tmp_path / "tokenizer" / "config.json").read_text()) == OWN_CODE
    assert json.loads((base / "manifest.json").read_text())["trust_remote_code"] is True


REFUSED_TYPES = {
    "bert": ({}, "its model type bert is an encoder, which generates no text"),
    "t5": ({}, "its model type t5 is an encoder-decoder"),
    "bart": ({}, "its model type bart is an encoder-decoder"),
    "whisper": ({"is_encoder_decoder": True}, "its model type whisper is an encoder-decoder"),
    "clip": ({}, " has no causal language model of its model type clip; only causal language models are"),
    "zephyrus": ({}, "knows no model type 'zephyrus', and the model comes without Python code of its own"),
}


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("kind", REFUSED_TYPES)
def test_what_is_no_causal_language_model_is_refused(tmp_path: Path, model: Path, kind: str, trust: bool) -> None:
    values, words = REFUSED_TYPES[kind]
    edit_config(model, model_type=kind, **values)
    message = refused(tmp_path, model_name_or_path=str(model), revision=folder_hash(model), trust_remote_code=trust)
    assert words in message
    assert len(message.splitlines()) == 1


def test_an_encoder_that_is_configured_as_a_decoder_is_accepted(tmp_path: Path, model: Path) -> None:
    edit_config(model, model_type="bert", is_decoder=True)
    assert run(tmp_path, model_name_or_path=str(model), revision=folder_hash(model)).exists()


def test_code_without_a_class_that_generates_does_not_help(tmp_path: Path, model: Path) -> None:
    edit_config(model, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModel": "own.Model"})
    (model / "own.py").write_text("")
    message = refused(tmp_path, model_name_or_path=str(model), revision="", trust_remote_code=True)
    assert "knows no model type 'own'" in message
    assert "names no class for causal language models" in message


def test_a_config_without_a_type_is_refused(tmp_path: Path, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    del config["model_type"]
    (model / "config.json").write_text(json.dumps(config))
    message = refused(tmp_path, model_name_or_path=str(model), revision=folder_hash(model))
    assert "config.json has no model_type" in message


def test_a_tokenizer_that_only_the_models_code_has(tmp_path: Path, model: Path) -> None:
    """As Moonlight: Transformers has the class of the model, deepseek_v3, and not that of the tokenizer."""
    add_code(model, model_type="deepseek_v3")
    (model / "tokenizer.json").rename(model / "tiktoken.model")
    edit(model / "tokenizer_config.json", **OWN_TOKENIZER)
    message = refused(tmp_path, model_name_or_path=str(model), revision=taken(model))
    assert message.startswith("params.yaml: fetch.trust_remote_code: is false, but ")
    assert "its own Python code (auto_map in tokenizer_config.json)" in message
    assert "has no class for its tokenizer OldTokenizer. Read that code" in message
    assert len(message.splitlines()) == 1
    base = run(tmp_path, model_name_or_path=str(model), revision=folder_hash(model), trust_remote_code=True)
    tokenizer = {"AutoTokenizer": ["old.Tokenizer", None]}
    assert json.loads((base / "config.json").read_text())["auto_map"] == tokenizer  # not the model's class
    assert json.loads((base / "tokenizer_config.json").read_text())["auto_map"] == tokenizer
    assert json.loads((tmp_path / "tokenizer" / "config.json").read_text())["auto_map"] == tokenizer
    assert (tmp_path / "tokenizer" / "old.py").exists()
    assert json.loads((base / "manifest.json").read_text())["trust_remote_code"] is True


def test_a_map_in_tokenizer_config_alone_is_asked_about_in_one_sentence(tmp_path: Path, model: Path) -> None:
    (model / "tokenizer.json").rename(model / "vocab.txt")
    edit(model / "tokenizer_config.json", tokenizer_class="OldTokenizer", auto_map=["old.Tokenizer", None])  # oldest form
    edit_config(model, model_type="deepseek_v3")
    message = refused(tmp_path, model_name_or_path=str(model), revision=folder_hash(model))
    assert "its own Python code (auto_map in tokenizer_config.json)" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "name", "known"),
    [
        ("deepseek_v3", "LlamaTokenizer", True),
        ("deepseek_v3", "LlamaTokenizerFast", True),
        ("qwen2", None, True),  # the type's own
        ("deepseek_v3", "PreTrainedTokenizerFast", False),  # reads tokenizer.json
        ("internlm3", "InternLM3Tokenizer", False),  # replaced by a generic one, which tokenizes otherwise
        ("internlm3", None, False),
    ],
)
def test_a_tokenizer_without_tokenizer_json_needs_its_class(
    tmp_path: Path, model: Path, kind: str, name: str | None, known: bool
) -> None:
    (model / "tokenizer.json").rename(model / "tokenizer.model")
    edit_config(model, model_type=kind)
    edit(model / "tokenizer_config.json", **OWN_TOKENIZER | {"tokenizer_class": name})
    given = {"model_name_or_path": str(model), "revision": folder_hash(model)}
    if known:
        assert "auto_map" not in json.loads((run(tmp_path, **given) / "tokenizer_config.json").read_text())
    else:
        assert "(auto_map in tokenizer_config.json)" in refused(tmp_path, **given)


def test_code_that_is_elsewhere_or_missing_is_refused(tmp_path: Path, model: Path) -> None:
    edit_config(model, model_type="own", auto_map={"AutoModelForCausalLM": "owner/code--modeling_own.Model"})
    message = refused(tmp_path, model_name_or_path=str(model), revision="", trust_remote_code=True)
    assert "config.json takes code from another repository, owner/code, at no fixed version" in message
    edit_config(model, **OWN_CODE)
    message = refused(tmp_path, model_name_or_path=str(model), revision="", trust_remote_code=True)
    assert message == f"{model}: config.json names code in own.py, which is missing"


# Files that belong to it, and files that do not


PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def test_processor_files_come_along_but_not_into_the_tokenizer_folder(tmp_path: Path, model: Path) -> None:
    edit_config(model, model_type="qwen2_vl")
    for name in PROCESSOR:
        edit(model / name, processor_class="Qwen2VLProcessor", auto_map={"AutoProcessor": "old.Processor"})
    base = run(tmp_path, model_name_or_path=str(model), revision=folder_hash(model))
    for name in PROCESSOR:
        assert json.loads((base / name).read_text()) == {"processor_class": "Qwen2VLProcessor"}
        assert not (tmp_path / "tokenizer" / name).exists()


def test_the_template_of_an_older_processor_becomes_a_file(tmp_path: Path, model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    edit(model / "chat_template.json", chat_template="{{ messages }}")
    base = run(tmp_path, model_name_or_path=str(model), revision=folder_hash(model))
    assert (base / "chat_template.json").read_bytes() == (model / "chat_template.json").read_bytes()
    assert not (base / "chat_template.jinja").exists()
    assert (tmp_path / "tokenizer" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not (tmp_path / "tokenizer" / "chat_template.json").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_git_lfs_pointer_is_called_one(tmp_path: Path, model: Path, name: str) -> None:
    (model / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 42\n")
    message = refused(tmp_path, model_name_or_path=str(model), revision=folder_hash(model))
    assert f"{name}: a git-lfs pointer, not the file itself" in message
    assert len(message.splitlines()) == 1


def test_a_symlink_out_of_the_folder_is_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "secret").write_text("of mine")
    (model / "merges.txt").symlink_to("../secret")
    (model / "vocab.json").symlink_to("gone")
    (model / "notes.md").symlink_to("../secret")  # is not taken
    lines = refused(tmp_path, model_name_or_path=str(model), revision=folder_hash(model)).splitlines()
    assert lines[0] == f"{model}: vocab.json: is a symlink to gone, which does not exist"
    assert f"{model}: merges.txt: is a symlink to {tmp_path / 'secret'}, outside the folder" in lines[1]
    assert len(lines) == 2


def link_all(model: Path, files: dict[str, Path]) -> None:
    for name, target in files.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        (model / name).rename(target)
        (model / name).symlink_to(os.path.relpath(target, model))


def test_the_layout_of_the_hubs_cache_is_accepted(tmp_path: Path, model: Path) -> None:
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / "0123456789abcdef"
    snapshot.parent.mkdir(parents=True)
    model.rename(snapshot)
    pin = folder_hash(snapshot)
    link_all(snapshot, {file.name: repository / "blobs" / file.name.encode().hex() for file in list(snapshot.iterdir())})
    base = run(tmp_path, model_name_or_path=str(snapshot), revision=pin)
    assert not any(file.is_symlink() for file in base.iterdir())


def test_symlinks_within_the_folder_and_into_a_dvc_cache_are_accepted(tmp_path: Path, model: Path) -> None:
    pin = folder_hash(model)
    link_all(model, {"config.json": tmp_path / ".dvc" / "cache" / "files" / "md5" / "0a" / ("1b" * 15)})
    link_all(model, {"tokenizer.json": model / "more" / "tokens"})
    linked = tmp_path / "linked"
    linked.symlink_to(model)
    assert run(tmp_path, model_name_or_path=str(linked), revision=pin).exists()

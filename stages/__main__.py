"""Runs one stage: python -m stages <stage> --name path ..., as dvc.yaml does.

python -m stages check     reads all parameters, and finds what a killed dvc has left and edits that no stage has read
python -m stages verify    compares the outputs with reports/provenance
python -m stages disk      lists what takes space, and what killed runs have left; with --remove, deletes what they left
"""

import atexit
import errno
import importlib
import logging
import os
import re
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from inspect import signature
from pathlib import Path

from stages.core import results
from stages.core.integrity import File, Record, check_inputs, md5_of, scan, write_record
from stages.core.jsonl import as_json
from stages.core.output import Done, only_writer
from stages.core.params import FILE as PARAMS_FILE
from stages.core.params import parse_section, read_section, read_stage, read_stages, read_yaml
from stages.core.problem import Problem
from stages.core.provenance import FOLDER as PROVENANCE_FOLDER
from stages.core.provenance import inputs_of, verify, write_provenance
from stages.core.snapshot import Snapshot

ROOT = Path()
USAGE = "usage: python -m stages <stage> --name path ... | check | verify | disk [--remove]"

FULL_DISK = ("No space left on device", "StorageFull", "PytorchStreamWriter failed writing", "unexpected pos")
"""How safetensors and torch report a full disk: in their own words, and not as an OSError."""

PROCESS_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""Variables that say which of several processes this is. A stage that believes a stray one writes nothing, or waits for
processes that do not exist."""
SET_BY_TORCHRUN = (*PROCESS_NUMBERS, "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
FOR_TORCHRUN = ("train",)
"""Stages that torchrun may start; the others would do the same work several times."""


def main(arguments: list[str], *, shut_down: Callable[[], None] = lambda: None) -> int:
    """Runs the stage or command that the first argument names, and returns the exit status.

    `shut_down` is called before the last comparison of a stage's inputs: nothing that takes time may follow it.
    """
    if not arguments:
        print(USAGE, file=sys.stderr)
        return 2
    name, *rest = arguments
    if name in ("check", "verify") and rest:
        return fail(name, (f"takes no options, found {' '.join(rest)!r}",), status=2)
    if name == "disk" and rest not in ([], ["--remove"]):
        return fail(name, (f"takes --remove or no option, found {' '.join(rest)!r}",), status=2)
    quiet_libraries()
    try:
        match name:
            case "check":
                check()
            case "verify":
                verify_all()
            case "disk":  # imported by its name: no stage depends on it
                importlib.import_module("stages.commands.disk").disk(remove=bool(rest))
            case _:
                run(name, parse_paths(rest), shut_down=shut_down)
    except Problem as problem:
        return fail(name, problem.messages)
    except KeyboardInterrupt as interrupt:
        # Python gives no number for Ctrl-C; a stage that handles other signals does.
        number = int(interrupt.args[0] if interrupt.args else signal.SIGINT)
        said_here = os.environ.get("RANK", "0") == "0"  # by one of several processes
        messages = ("interrupted; nothing was recorded, dvc repro runs this stage again",) if said_here else ()
        return fail(name, messages, status=128 + number)
    except Exception as error:
        remedy = find_remedy(error, rest)
        if remedy is None:
            raise
        return fail(name, (f"{_path_of(error) or 'writing'}: {remedy}",))
    return 0


def parse_paths(words: list[str]) -> dict[str, str]:
    """`--train-tokens data/x --base models/base` as {"train_tokens": "data/x", "base": "models/base"}. Raises Problem."""
    options, values = words[::2], words[1::2]
    wrong = [option for option in options if not option.startswith("--")]
    if wrong or not all(values) or len(options) != len(values) or len(set(options)) != len(options):
        raise Problem(f"wanted --name path for each path, once, found {' '.join(words)!r}; see its cmd in dvc.yaml")
    return {option.removeprefix("--").replace("-", "_"): value for option, value in zip(options, values, strict=True)}


def run(name: str, paths: dict[str, str], *, shut_down: Callable[[], None] = lambda: None) -> None:
    """Calls the public function of stages/<name>/<name>.py with its typed parameters and paths.

    Checkpoints and downloads are removed last: after the outputs and their provenance are written and the snapshot has been
    checked. Then it is checked once more, as the last act: DVC hashes the inputs a few milliseconds later.

    If DVC has started the stage, its result is kept until DVC has recorded it (`stages.core.results`), and a run that reads
    the same takes it up.
    """
    check_process_numbers(name)
    started, dvc = time.monotonic(), started_by()
    snapshot = Snapshot.take(name, paths.values(), ROOT)  # before the stage's imports, which take seconds
    main = os.environ.get("RANK", "0") == "0"  # torchrun starts several processes, of which one looks and writes
    read = check_inputs(snapshot.inputs, ROOT) if main else {}
    provenance = paths.pop("provenance", None)
    outputs = declared_outputs(name, paths.values())
    under_dvc = main and "DVC_ROOT" in os.environ
    keeping = under_dvc and bool(outputs)
    with only_writer(name, outputs if main else [], kept=keeping):
        done: Done | None = None
        if keeping:
            results.remove_recorded(ROOT)
            done = take_up(snapshot, read, paths)
        taken = done is not None
        done = done or call(name, paths, snapshot)
        if done is None:  # one of several processes, which writes nothing
            return
        safe = taken or not keeping or results.keep(snapshot, read, outputs, done, dvc_lives=started_by() == dvc)
        if provenance:
            inputs = [Path(path) for path in paths.values() if path in snapshot.data]
            write_provenance(Path(provenance), inputs_of(name, snapshot.params, inputs, ROOT), map(Path, outputs))
        keep_record(snapshot, read, [*paths.values(), *([provenance] if provenance else [])])
        snapshot.check()
        if safe:
            done.clean_up()
        if under_dvc and started_by() != dvc:  # dvc was killed: it will not record this result
            raise Problem(
                "dvc ended before this stage; run dvc repro again: "
                + ("it takes up this result in seconds" if safe else "what was computed is kept, and is not repeated")
            )
    print(f"{name}: {done.summary} ({duration(time.monotonic() - started)})", flush=True)
    shut_down()
    snapshot.check()


def keep_record(snapshot: Snapshot, read: Mapping[str, Mapping[str, File]], paths: Iterable[str]) -> None:
    """Writes down what was read and written: a later stage and `check` compare with it.

    Args:
        snapshot: Of the stage.
        read: The inputs as they were at its start.
        paths: All paths of its command line.
    """
    folders = {str(parent) for dep in snapshot.data for parent in Path(dep).parents}
    machine = Path("reports/machine")  # what differs between equal runs is no output
    outputs = [path for path in paths if path not in snapshot.data and path not in folders]
    outputs = [path for path in outputs if Path(path).exists() and machine not in Path(path).parents]
    code = {
        dep: {
            str(file.relative_to(dep)) if file != Path(dep) else "": File(file.stat().st_size, md5_of(file))
            for file in files
        }
        for dep, files in snapshot.code_files.items()
    }
    record = Record(
        stage=snapshot.name_in_lock,
        read={dep: dict(files) for dep, files in read.items()} | code,
        params=as_json(snapshot.params),
        wrote={path: scan(Path(path)) for path in outputs},
        entry=as_json(results.read_lock(ROOT).get(snapshot.name_in_lock)),
    )
    write_record(record, ROOT)


def call(name: str, paths: dict[str, str], snapshot: Snapshot) -> Done | None:
    """Imports the stage and runs it. Raises Problem if the paths or the parameters are not what it wants."""
    module = importlib.import_module(f"stages.{name}.{name}")
    stage = getattr(module, name)
    wanted = [parameter for parameter in signature(stage).parameters if parameter != "params"]
    if sorted(paths) != sorted(wanted):
        named = ", ".join(f"--{each.replace('_', '-')}" for each in wanted)
        found = ", ".join(f"--{each.replace('_', '-')}" for each in paths) or "none"
        raise Problem(f"wanted the paths {named}; found {found}; see its cmd in dvc.yaml")
    params = parse_section(name, module.Params, snapshot.params)
    missing = missing_inputs(paths, snapshot)
    if missing:
        raise Problem(*(f"{path}: not found; dvc repro makes it, if it is not a file of yours" for path in missing))
    try:
        done: Done | None = stage(params, **{key: Path(path) for key, path in paths.items()})
    except Problem:
        raise
    except Exception as error:
        if os.environ.get("RANK", "0") == "0" and find_remedy(error, ()) is None:  # once; and a full disk is no damage
            check_inputs(snapshot.inputs, ROOT, large=sys.maxsize)  # a damage that only hashing all the weights shows
        raise
    return done


def take_up(snapshot: Snapshot, read: Mapping[str, Mapping[str, File]], paths: Mapping[str, str]) -> Done | None:
    """The result of a run that has ended and that DVC has not recorded, if that run has read the same; None otherwise."""
    summary = None if missing_inputs(paths, snapshot) else results.take_up(snapshot, read)
    return None if summary is None else Done(summary)


def missing_inputs(paths: Mapping[str, str], snapshot: Snapshot) -> list[str]:
    """The inputs on the command line that do not exist."""
    return [path for path in paths.values() if path in snapshot.data and not Path(path).exists()]


def check_process_numbers(name: str) -> None:
    """Raises Problem if variables say that this is one of several processes, but torchrun has not started it for `name`."""
    found = [f"{variable}={os.environ[variable]}" for variable in PROCESS_NUMBERS if variable in os.environ]
    if not found:
        return
    if any(variable not in os.environ for variable in SET_BY_TORCHRUN):
        raise Problem(
            f"the environment has {', '.join(found)}, as for one of several processes, but torchrun did not start this one; "
            f"run `unset {' '.join(PROCESS_NUMBERS)}` and start again"
        )
    if name not in FOR_TORCHRUN:
        raise Problem(f"torchrun can start {' and '.join(FOR_TORCHRUN)} only; run {name} without it")


def started_by() -> tuple[int, ...]:
    """The process that started this one and, if that is the shell in which DVC runs a command, the one that started it.

    They change when dvc is killed: the orphan gets another parent. Without /proc the shell is not looked into.
    """
    parent = os.getppid()
    try:
        words = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
        if not any(b"-m stages" in word for word in words):
            return (parent,)
        return parent, int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return (parent,)


def declared_outputs(name: str, paths: Iterable[str]) -> list[str]:
    """Those of the paths that are outputs of a stage in dvc.yaml, metrics included."""
    entry = read_stage(name, ROOT)
    outs = [*(entry.get("outs") or []), *(entry.get("metrics") or [])]
    names = [next(iter(out)) if isinstance(out, dict) else out for out in outs]
    patterns = [".+".join(map(re.escape, re.split(r"\$\{[^}]*\}", each))) for each in names]
    return [path for path in paths if any(re.fullmatch(pattern, path) for pattern in patterns)]


def quiet_libraries() -> None:
    """Silences the libraries' advice and progress bars, and warnings that a user cannot act on."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # also where make or a log reads it
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises installing a package that is not needed
    # Libraries warn each other of names that the next version drops; the versions are pinned.
    warnings.filterwarnings("ignore", category=FutureWarning)


def check() -> None:
    """Reads every section of params.yaml as its stage would, and looks at what DVC has recorded.

    Raises one Problem with everything that is wrong.
    """
    # Imported by its name: no stage depends on it.
    project = importlib.import_module("stages.commands.check")
    messages: list[str] = project.find_problems(ROOT)
    stages = read_stages(ROOT)
    sections = read_yaml(ROOT / PARAMS_FILE)
    if not isinstance(sections, Mapping):
        raise Problem(f"{PARAMS_FILE}: wanted a section for each stage, found {sections!r}")
    messages += [f"{PARAMS_FILE}: {extra}: no stage has this name" for extra in sections if extra not in stages]
    for name in stages:
        if project.is_recorded(name, ROOT):  # it has run with these parameters and this code
            continue
        try:
            parse_section(name, importlib.import_module(f"stages.{name}.{name}").Params, read_section(name, ROOT))
        except Problem as problem:
            messages += problem.messages
    if messages:
        raise Problem(*messages)


def verify_all() -> None:
    """Compares every output that has provenance with what was recorded. Raises Problem with every difference."""
    files = sorted((ROOT / PROVENANCE_FOLDER).glob("*.json"))
    if not files:
        raise Problem(f"{PROVENANCE_FOLDER}: holds no provenance; run dvc repro first")
    found: list[str] = []
    for file in files:
        try:
            found += verify(file, ROOT)
        except Problem as problem:
            found += problem.messages
        except OSError as error:  # a name in it is too long, or a file may not be read
            found.append(f"{file}: cannot be compared: {error}")
    if found:
        raise Problem(*found)
    names = ", ".join(file.stem for file in files)
    print(f"verify: {names}: outputs, inputs, code, parameters and packages are unchanged")


def duration(seconds: float) -> str:
    """Seconds in readable form: "8 s", "4 min 10 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def find_remedy(error: Exception, arguments: Iterable[str]) -> str | None:
    """What to do about an error of the operating system, such as a full disk; None for all other errors: Loratory's bugs.

    A missing file is not a bug if one of `arguments`, the command line, names it.
    """
    number = error.errno if isinstance(error, OSError) else None
    if any(words in str(error) for words in FULL_DISK):
        limited = resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY  # torch does not say which it was
        number = errno.EFBIG if limited and "No space left" not in str(error) else errno.ENOSPC
    if "File too large (os error" in str(error):  # safetensors
        number = errno.EFBIG
    if number == errno.ENOENT and not any(argument in str(error) for argument in arguments):
        return None
    return {
        errno.ENOSPC: "the disk is full; free some space (python -m stages disk lists what can go) and run dvc repro again",
        errno.EDQUOT: "the disk quota is used up; free some space (python -m stages disk lists what can go)",
        errno.EFBIG: "the file would be larger than this process may write; raise the limit (ulimit -f unlimited)",
        errno.EACCES: "no permission; check the owner and mode of this path and of the folder that holds it",
        errno.EROFS: "the file system is read-only",
        errno.ENAMETOOLONG: "the name is too long for the file system; shorten it",
        errno.ENOENT: "not found; check the path",
        errno.EEXIST: "a folder is needed here, but a file is in its place; move it away",
        errno.ENOTDIR: "a part of this path is a file, but must be a folder; move the file away",
        errno.EISDIR: "a file is needed here, but a folder is in its place; move it away",
    }.get(number or 0)


def _path_of(error: Exception) -> str | None:
    """The path that the system refused: of two, as in a rename, the second one has the name of the output."""
    found: str | None = getattr(error, "filename2", None) or getattr(error, "filename", None)
    return found or (str(error) if isinstance(error, FileNotFoundError) else None)  # pyarrow gives the message alone


def fail(name: str, messages: tuple[str, ...], status: int = 1) -> int:
    """Prints what is wrong, one line each, and returns the exit status. The terminal may be closed."""
    with suppress(OSError):
        for message in messages:
            print(f"{name}: {message}", file=sys.stderr)
    return status


def shut_down_python() -> None:
    """Does what Python does at its end, so that the process can end at once after the last comparison of its inputs."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()


if __name__ == "__main__":
    status = main(sys.argv[1:], shut_down=shut_down_python)
    if status:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

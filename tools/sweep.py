"""Runs the pipeline on a tiny checkpoint of every architecture that Transformers has a causal model for.

    python tools/sweep.py                           all families of tests/families.py and all other model types
    python tools/sweep.py qwen3_moe gemma4          some
    python tools/sweep.py --only popular            those of tests/families.py; --only others: the rest
    python tools/sweep.py --quantization int8 ...

Each runs on the CPU, in a process of its own. A family passes if all checks of tests/chain.py hold, or if the pipeline ends
with a sentence before the first training step. Anything else is a failure: a traceback, a refusal after the training, a
wrong result. The table is printed, and written to a folder together with each family's log. Exit status 1 if any fails.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

LIMIT = 240
"""Seconds for a family, after which it has failed."""
FAILED, ENDED, PASSED, NOT_BUILT = "FAILED", "refused", "ok", "not built"


def run_family(name: str, out: Path, options: dict[str, Any]) -> None:
    """Writes what became of a family to `out`, as JSON. Runs in a process of its own."""
    import torch

    from tests import chain
    from tests.families import family, write_release

    log = out.with_suffix(".log").open("w", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    started = time.monotonic()
    facts: dict[str, Any] = {"name": name, "hub": family(name).hub, "type": family(name).model_type, "stage": "build"}
    work = Path(tempfile.mkdtemp(prefix=f"sweep-{name}-"))
    os.environ["DVC_ROOT"] = str(work)
    try:
        write_release(family(name), work / "release")
        facts |= chain.look_at(work / "release")
        facts["stage"] = "fetch"
        (work / "run").mkdir()
        chain.run_chain(work / "release", work / "run", facts, **options)
        facts |= {"result": PASSED, "text": ""}
    except chain.Refused as error:
        facts |= {"result": ENDED, "text": " | ".join(error.messages)}
    except chain.Failed as error:
        facts |= {"result": FAILED, "text": str(error)}
    except BaseException as error:
        traceback.print_exc()
        kind = NOT_BUILT if facts["stage"] == "build" else FAILED
        facts |= {"result": kind, "text": f"{facts['stage']}: {_last_line(error)}"}
    finally:
        facts["seconds"] = round(time.monotonic() - started, 1)
        facts["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        out.write_text(json.dumps(facts, indent=1, default=str))
        shutil.rmtree(work, ignore_errors=True)


def _last_line(error: BaseException) -> str:
    """An exception, with the line of the project that led to it and the one that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [frame for frame in frames if frame.filename.startswith(str(ROOT))][-1:] + frames[-1:]
    where = ", ".join(f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno}" for frame in places)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]} ({where})"


def sweep(names: list[str], folder: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """What became of each family, in order; a line is printed for each."""
    context = multiprocessing.get_context("fork")  # the imports of this process are there already
    found = []
    for name in names:
        out = folder / f"{name}.json"
        out.unlink(missing_ok=True)
        process = context.Process(target=run_family, args=(name, out, options))
        process.start()
        process.join(LIMIT)
        if process.is_alive():
            process.kill()
            process.join()
        if out.exists():
            facts = json.loads(out.read_text())
        else:
            reason = "killed after the time limit" if process.exitcode == -9 else f"exit status {process.exitcode}"
            facts = {"name": name, "hub": "", "result": FAILED, "text": reason, "seconds": LIMIT}
            out.write_text(json.dumps(facts))
        facts = judge(facts)
        found.append(facts)
        print(f"{name:28} {facts['result']:9} {facts['seconds']:6.1f} s  {describe(facts)}", flush=True)
    return found


def judge(facts: dict[str, Any]) -> dict[str, Any]:
    """Families that people fine-tune must pass, with experts quantized or adapted; others may end with a sentence."""
    from tests.families import FAMILIES, REFUSED

    name, result = facts["name"], facts["result"]
    if name not in FAMILIES:
        return facts
    if (result == ENDED) != (name in REFUSED) and result != FAILED:
        return facts | {"result": FAILED, "text": f"should {'be refused' if name in REFUSED else 'pass'}: {facts['text']}"}
    if result == PASSED and facts["experts"] not in (None, 1):
        return facts | {"result": FAILED, "text": f"only {facts['experts']:.0%} of the experts are quantized or adapted"}
    return facts


def describe(facts: dict[str, Any]) -> str:
    """What holds for a family that passed; otherwise what was said."""
    if facts["result"] != PASSED:
        return str(facts["text"])
    parts = [f"{facts['adapted']} adapted", f"{facts['changed']:.0%} of the weights"]
    if facts["experts"] is not None:
        parts.append(f"{facts['experts']:.0%} of the experts")
    parts.append(f"padded: {facts['padded']}" if facts["padded"] else "padding-free")
    parts.append(f"no decoder: {facts['decoder']}" if facts["decoder"] else "decoder")
    if facts["peft"]:
        parts.append(f"PEFT's layers: {facts['peft']}")
    return ", ".join(parts)


def as_markdown(found: list[dict[str, Any]]) -> str:
    """A table with a row for each family."""
    lines = ["| family | released as | result | what holds |", "|---|---|---|---|"]
    for facts in found:
        text = describe(facts).replace("|", "/").replace("\n", " ")
        lines.append(f"| {facts['name']} | {facts['hub']} | {facts['result']} | {text} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Parses the command line, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="families of tests/families.py, or model types of Transformers")
    parser.add_argument("--only", choices=["popular", "others"])
    parser.add_argument("--quantization", choices=["nf4", "fp4", "int8", "none"], default="nf4")
    parser.add_argument("--no-experts", action="store_true", help="experts get no adapter, as in params.yaml")
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "sweep", help="a folder for results and logs")
    arguments = parser.parse_args()
    os.chdir(ROOT)

    from stages.__main__ import quiet_libraries

    quiet_libraries()
    for module in ("stages.train.train", "stages.merge.merge", "stages.generate.generate", "tests.chain"):
        importlib.import_module(module)  # once, for all processes
    from tests.families import FAMILIES, other_types

    names = arguments.names or [
        *(FAMILIES if arguments.only != "others" else []),
        *(other_types() if arguments.only != "popular" else []),
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    options = {"quantization": arguments.quantization, "experts": not arguments.no_experts}
    found = sweep(names, arguments.out, options)
    (arguments.out / "table.md").write_text(as_markdown(found), encoding="utf-8")
    counts = Counter(facts["result"] for facts in found)
    print(", ".join(f"{count} {result}" for result, count in counts.items()), f"({arguments.out / 'table.md'})")
    return int(counts[FAILED] > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Runs one stage and writes down what it opens, changes, imports and asks for.

    python tests/audited.py <notes> <stage> --name path ...

`sys.addaudithook` sees what Python does; what compiled code opens, as pyarrow or safetensors, it does not see.
"""

import atexit
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.utime")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    notes, root = Path(sys.argv[1]), str(Path.cwd()) + os.sep
    found: dict[str, set[str]] = {"read": set(), "written": set(), "environment": set(), "params": set()}

    def place(path: Any) -> str | None:
        """The path from the project's root, if it is in it; with ".." or absolute, where it is outside."""
        if not isinstance(path, str | bytes | os.PathLike):
            return None
        full = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - links are not followed
        return full.removeprefix(root) if full.startswith(root) else full

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event != "open" and event not in CHANGES:
            return
        if sys._getframe(1).f_code.co_name.startswith("_rmtree"):
            return  # with names in a folder that the event does not name; what is removed is seen in the end
        if event == "open":
            path, mode, flags = given
            name = place(path)
            writes = bool((flags or 0) & WRITING) or (isinstance(mode, str) and any(letter in mode for letter in "wax+"))
            if name is not None and "__pycache__" not in name:
                found["written" if writes else "read"].add(name)
        elif event in CHANGES:
            names = given[:2] if event in ("os.rename", "os.link", "os.symlink") else given[:1]
            found["written"].update(filter(None, map(place, names)))

    def asker() -> str:
        """The file of the project that asks; "" if a library does."""
        frame = sys._getframe(2)
        while Path(frame.f_code.co_filename).name in (
            "os.py",
            "_collections_abc.py",
            "<frozen os>",
            "<frozen _collections_abc>",
        ):
            assert frame.f_back
            frame = frame.f_back
        name = str(Path(frame.f_code.co_filename).absolute())
        return name if name.startswith(f"{root}stages{os.sep}") else ""

    def write() -> None:
        notes.write_text(json.dumps({key: sorted(values) for key, values in found.items()}))

    get = type(os.environ).__getitem__

    def getitem(self: Any, name: Any) -> Any:
        if asker():
            found["environment"].add(str(name))
        return get(self, name)

    type(os.environ).__getitem__ = getitem  # type: ignore[method-assign]
    sys.dont_write_bytecode = True
    sys.addaudithook(hook)
    from stages.core.params import Section

    plain = Section.__getattribute__

    def getattribute(self: Any, name: str) -> Any:
        if not name.startswith("_") and asker():
            found["params"].add(name)
        return plain(self, name)

    class Noted(dict[str, Any]):
        """The values of a section, which notes those that are asked for by name."""

        def __getitem__(self, name: str) -> Any:
            found["params"].add(name)
            return super().__getitem__(name)

        def get(self, name: str, *default: Any) -> Any:
            found["params"].add(name)
            return super().get(name, *default)

    dump = Section.model_dump

    def model_dump(self: Any, **settings: Any) -> Any:
        found["params"].update(map(str, settings.get("include") or ()))
        return Noted(dump(self, **settings))

    Section.__getattribute__ = getattribute  # type: ignore[method-assign]
    Section.model_dump = model_dump  # type: ignore[method-assign]
    atexit.register(write)
    sys.argv = sys.argv[1:]
    try:
        runpy.run_module("stages", run_name="__main__", alter_sys=True)
    finally:
        write()


main()

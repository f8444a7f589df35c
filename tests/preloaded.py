"""A `python` for the tests that has torch and its friends loaded already.

Each stage imports for seconds what it then uses for a fraction of one. A server imports it once and forks for every call;
the forked process runs `python -m stages ...` as a fresh one would: same code read from disk, own folder, own environment.
tests/test_main.py starts real ones.
"""

import contextlib
import os
import pickle
import runpy
import shlex
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HEAVY = ("bitsandbytes", "peft", "sacrebleu", "torch", "transformers.trainer", "transformers.models.llama.modeling_llama")

CLIENT = """import os, pickle, socket, struct, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
data = pickle.dumps((sys.argv[1:], os.getcwd(), dict(os.environ)))
socket.send_fds(server, [struct.pack("<Q", len(data))], [0, 1, 2])
server.sendall(data)
sys.exit(struct.unpack("<q", server.recv(8))[0])
"""


@contextlib.contextmanager
def python(folder: Path, hash_seed: int) -> Iterator[None]:
    """While it holds, `python` on the PATH is one that has everything loaded, with this PYTHONHASHSEED."""
    address = str(folder / "socket")
    client, script = folder / "python", folder / "client.py"
    script.write_text(CLIENT.format(address=address))
    # Not the first line of the script: there, the path of Python could not have a space.
    client.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -IS {shlex.quote(str(script))} "$@"\n')
    client.chmod(client.stat().st_mode | stat.S_IXUSR)
    server = subprocess.Popen([sys.executable, __file__, address], env=os.environ | {"PYTHONHASHSEED": str(hash_seed)})
    path = os.environ["PATH"]
    try:
        while not Path(address).exists():
            assert server.poll() is None
            time.sleep(0.05)
        os.environ["PATH"] = f"{folder}{os.pathsep}{path}"
        yield
    finally:
        os.environ["PATH"] = path
        server.kill()
        server.wait()


def serve(address: str) -> None:
    """Backend calls one at a time, as DVC makes them."""
    for name in HEAVY:
        __import__(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    while True:
        call, _ = listener.accept()
        header, files, _, _ = socket.recv_fds(call, 8, 3)
        data = b""
        while len(data) < struct.unpack("<Q", header)[0]:
            data += call.recv(1 << 20)
        child = os.fork()
        if child == 0:
            run(pickle.loads(data), files)
        for file in files:
            os.close(file)
        _, status = os.waitpid(child, 0)
        call.sendall(struct.pack("<q", os.waitstatus_to_exitcode(status)))
        call.close()


def run(call: tuple[list[str], str, dict[str, str]], files: list[int]) -> None:
    """Becomes the process that was asked for. Never returns."""
    arguments, folder, environment = call
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0] = folder
    status = 0
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1])

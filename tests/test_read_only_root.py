"""Server and client run where everything but their state folder and /tmp is read-only, as in their images.

Each process makes a mount namespace of its own, turns the whole tree of mounts read-only but for two folders, gives up
all capabilities, and has the environment that deploy/Dockerfile sets, with those folders in place of /var/lib and /tmp.
"""

import ctypes
import errno
import os
import re
import sys
from pathlib import Path

import pytest

from tests.processes import FORKS, PATIENCE, _run, free_port, write_rows
from tests.test_deploy import environment

CLONE_NEWNS, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 4096, 16384, 1 << 18
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, READ_ONLY = 442, -100, 0x8000, 1
NOT_ALLOWED = 77
"""Exit code of a process that may not make a mount namespace."""

LIBC = ctypes.CDLL(None, use_errno=True)


class MountAttributes(ctypes.Structure):
    """The kernel's struct mount_attr, see mount_setattr(2)."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user_namespace")]


def done(result):
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def all_read_only_but(*folders):
    """Turn all mounts that this process sees read-only, but for the folders, and give up every capability.

    Raises:
        OSError: this process may not.
    """
    done(LIBC.unshare(CLONE_NEWNS))
    done(LIBC.mount(None, b"/", None, MS_REC | MS_PRIVATE, None))
    for folder in folders:
        done(LIBC.mount(bytes(folder), bytes(folder), None, MS_BIND, None))
    for path, flags, attributes in (
            (b"/", AT_RECURSIVE, MountAttributes(set=READ_ONLY)),
            *((bytes(folder), 0, MountAttributes(clear=READ_ONLY)) for folder in (*folders, Path("/dev/shm")))):
        done(LIBC.syscall(MOUNT_SETATTR, AT_FDCWD, path, flags, ctypes.byref(attributes),
                          ctypes.sizeof(attributes)))
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    done(LIBC.capset(header, none))


def measured_into():
    """Return the folder that this process writes to when it ends if coverage measures it."""
    coverage = sys.modules.get("coverage")
    if (measuring := coverage and coverage.Coverage.current()) is None:
        return []
    folder = Path(measuring.get_option("run:data_file")).absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    return [folder]


def confined(command, arguments, folder, elsewhere, variables):
    """Run a command in a process of its own: state in folder/lib/fedlora, caches in folder/tmp."""
    try:
        all_read_only_but(folder / "lib", folder / "tmp", *measured_into())
    except OSError as error:
        print(f"{command}: {error}", file=sys.stderr)
        os._exit(NOT_ALLOWED)
    try:
        (elsewhere / command).touch()
    except OSError as error:
        assert error.errno == errno.EROFS
    else:
        raise AssertionError("the root can be written to")
    os.chdir(folder / "lib" / "fedlora")
    _run(command, arguments, folder / "tmp" / "log", variables)


def moved(path, folder):
    """Return a path of an image below a folder of the test; other values are kept."""
    return re.sub("^(/var/lib|/tmp)", lambda at: str(folder / Path(at[0]).name), path)


def test_server_and_client_write_only_to_their_state_folder_and_tmp(tmp_path, checkpoint):
    address = f"127.0.0.1:{free_port()}"
    records = write_rows(tmp_path / "records" / "rows.jsonl", 0)
    witness = tmp_path / "client" / "lib" / "fedlora-witness"
    options = {
        "server": ["--address", address, "--model", str(checkpoint("bert")), "--out", "run", "--labels",
                   "routine,urgent", "--min-clients", "1", "--rounds", "1", "--local-steps", "1", "--batch-size", "8",
                   "--max-length", "16", "--eval-data", str(records)],
        "client": ["--server", address, "--model", str(checkpoint("bert")), "--data", str(records.parent), "--name",
                   "north", "--yes", "--threads", "1", "--device", "cpu", "--precision", "fp32", "--epsilon", "8"]}
    processes = {}
    for command, arguments in options.items():
        folder = tmp_path / command
        for name in ("lib/fedlora", "lib/fedlora-witness", "tmp"):
            (folder / name).mkdir(parents=True)
        variables = {name: moved(value, folder) for name, value in environment(command).items() if name != "PATH"}
        variables["TMPDIR"] = str(folder / "tmp")
        processes[command] = FORKS.Process(target=confined, daemon=True,
                                           args=(command, arguments, folder, records.parent, variables))
    (tmp_path / "client" / "lib" / "fedlora" / "policy.toml").write_text(
        f'[dataset.records]\ndata = "{records.parent}"\nepsilon = 8.0\ndelta = 1e-5\ndeclared-size = 120\n'
        f'labels = ["routine", "urgent"]\nwitness = "{witness}"\n')
    try:
        for process in processes.values():
            process.start()
        for command, process in reversed(processes.items()):
            process.join(60 * PATIENCE)
            if process.exitcode == NOT_ALLOWED:
                pytest.skip("this process may not make mount namespaces")
            log = tmp_path / command / "tmp" / "log"
            assert process.exitcode == 0, log.read_text() if log.exists() else process.exitcode
    finally:
        for process in processes.values():
            process.kill()
    state = tmp_path / "client" / "lib" / "fedlora"
    assert (state / "ledger.sqlite").exists() and list(witness.iterdir()) and list(state.glob("north/*/privacy.json"))
    assert (tmp_path / "server" / "lib" / "fedlora" / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert [file.name for file in records.parent.iterdir()] == ["rows.jsonl"]

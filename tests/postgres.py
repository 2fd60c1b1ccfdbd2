"""A PostgreSQL server of its own for a test, on a socket, thrown away afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def _program(name: str) -> str | None:
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))  # Debian keeps them out of the way
    return shutil.which(name) or (str(versions[-1]) if versions else None)


@contextmanager
def server() -> Iterator[str]:
    """Starts a server and gives the URL of its database; skips the test where there is no PostgreSQL."""
    initdb, control = _program("initdb"), _program("pg_ctl")
    if initdb is None or control is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="flowkit-postgres-", dir="/tmp"))  # a socket's path must be short
    become: list[str] = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        shutil.chown(folder, "postgres", "postgres")
        become = ["runuser", "-u", "postgres", "--"]

    def call(*arguments: str) -> None:
        subprocess.run([*become, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=folder)

    data = str(folder / "data")
    try:
        call(initdb, "-D", data, "-A", "trust", "-U", "postgres", "--no-sync")
        options = f"-k {folder} -c listen_addresses='' -c fsync=off"
        call(control, "-D", data, "-w", "-l", str(folder / "log"), "-o", options, "start")
        try:
            yield f"postgresql://postgres@/postgres?host={folder}"
        finally:
            call(control, "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)

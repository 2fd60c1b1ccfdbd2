"""The database of a study: SQLite in the sweep's folder, or a server that many machines reach; and who its workers are."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
import psutil  # type: ignore[import-untyped]
import sqlalchemy
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url

_SILENT = 4  # heartbeats missed before a worker is taken to be dead
_PATIENCE = 60  # seconds to wait for another's write to SQLite


def storage_url(storage: str | None, output: Path) -> str:
    """Returns the URL of a sweep's database as SQLAlchemy takes it.

    Args:
        storage: the URL given, such as "postgresql://user@host/database"; None means SQLite in the output folder.
        output: the folder.

    Raises:
        ValueError: for what is no URL.
    """
    if storage is None:
        return f"sqlite:///{(output / 'study.db').absolute()}"
    url = parsed(storage)
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")  # the driver that the extra "postgres" installs
    return url.render_as_string(hide_password=False)


def parsed(storage: str) -> sqlalchemy.URL:
    """Returns the parts of a URL.

    Raises:
        ValueError: for what is none.
    """
    try:
        return make_url(storage)
    except (sqlalchemy.exc.ArgumentError, ValueError) as error:  # it may hold a password, and is not repeated
        raise ValueError("storage is no URL; write postgresql://user@host/database, or leave it out") from error


def open_storage(url: str, heartbeat: int) -> RDBStorage:
    """Opens a database, its tables made where they are missing.

    Args:
        url: from `storage_url`.
        heartbeat: seconds between signs of life of a worker; one that is silent four times as long is taken to be dead.

    Raises:
        OSError: for one that cannot be reached or written.
    """
    sqlite = url.startswith("sqlite")
    options: dict[str, Any] = {"connect_args": {"timeout": _PATIENCE}} if sqlite else {"pool_pre_ping": True}
    for attempt in range(5):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                storage = RDBStorage(url, options, heartbeat_interval=heartbeat, grace_period=_SILENT * heartbeat)
            break
        except (
            sqlalchemy.exc.IntegrityError,
            sqlalchemy.exc.ProgrammingError,
            sqlalchemy.exc.OperationalError,
        ) as error:
            # Another worker makes the tables at this moment.
            if attempt == 4 or not re.search(r"already exists|duplicate|UNIQUE", str(error)):
                raise
            time.sleep(1)
    if sqlite:
        # SQLite has no row locks: without these, two workers could both read that a trial waits, and both take it.
        sqlalchemy.event.listen(
            storage.engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None)
        )
        sqlalchemy.event.listen(
            storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE")
        )
        storage.engine.dispose()  # connections made before
    return storage


@contextmanager
def reachable(url: str) -> Iterator[None]:
    """Says which database failed, without its password.

    Raises:
        OSError: for any error of the database.
        ImportError: for a driver that is not installed.
    """
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise OSError(f"the study's database {make_url(url)!r} cannot be used ({reason(error)}); check that it runs, that it can "
                      "be reached from here, and that it may be written") from error  # fmt: skip
    except ImportError as error:
        raise ImportError(f'{error}; a PostgreSQL study needs pip install "flowkit-diffusion[postgres]"') from error


def reason(error: BaseException) -> str:
    """Returns what the database itself said, in one line; Optuna and SQLAlchemy wrap it in words of their own."""
    error = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) and error.__cause__ else error
    return " ".join(str(getattr(error, "orig", None) or error).split())[:300]


def identity() -> dict[str, Any]:
    """Returns what tells this process from all others, and its name for people."""
    try:
        space = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        space = socket.gethostname()
    process = psutil.Process()
    name = f"{socket.gethostname()}, process {process.pid}"
    return {"name": name, "space": space, "pid": process.pid, "started": process.create_time()}


def died_here(worker: Mapping[str, Any] | None) -> bool:
    """Tells whether a worker was a process of this machine and is none any more."""
    if worker is None or worker["space"] != identity()["space"]:
        return False
    try:
        return bool(abs(psutil.Process(worker["pid"]).create_time() - worker["started"]) > 1)
    except psutil.NoSuchProcess:
        return True


def take(storage: BaseStorage, trial_id: int) -> bool:
    """Takes a waiting trial; tells whether it is this worker's now."""
    if isinstance(storage, RDBStorage):
        # First the heartbeat: a trial that never had one would not be missed.
        storage.record_heartbeat(trial_id)
    try:
        return bool(storage.set_trial_state_values(trial_id, TrialState.RUNNING))
    except optuna.exceptions.UpdateFinishedTrialError:
        return False


@contextmanager
def alive(storage: BaseStorage, trial_id: int) -> Iterator[None]:
    """Shows the others that this worker lives while it has a trial."""
    if not isinstance(storage, RDBStorage) or storage.heartbeat_interval is None:
        yield
        return
    done, interval = threading.Event(), storage.heartbeat_interval

    def beat() -> None:
        while not done.wait(interval):
            # A database that is away for a moment costs nothing but this beat.
            try:
                storage.record_heartbeat(trial_id)
            except Exception as error:
                logging.getLogger(__name__).warning("no heartbeat: %s", reason(error))

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def bury_the_dead(study: optuna.Study, storage: BaseStorage, running: Iterable[FrozenTrial]) -> int:
    """Closes trials whose workers died: those of this machine at once, others when their heartbeat is missing.

    Args:
        study: the study.
        storage: its database.
        running: its running trials.

    Returns:
        How many of the running ones were closed at once.
    """
    buried = 0
    for trial in running:
        if died_here(trial.user_attrs.get("worker")):
            with suppress(optuna.exceptions.UpdateFinishedTrialError):
                buried += storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)
    return buried

"""A pgbouncer in front of a Postgres, in the pool mode a test wants."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from pgqrs_celery import embedded
from pgqrs_celery.embedded.redis import free_port
from tests.support.waiting import wait_for

__all__ = ["find_pgbouncer", "pgbouncer_for"]


def find_pgbouncer() -> str | None:
    """Return the program, where it is installed."""
    return shutil.which("pgbouncer") or shutil.which("/usr/sbin/pgbouncer")


@contextmanager
def pgbouncer_for(server: embedded.PostgresServer, mode: str) -> Iterator[str]:
    """Run a pgbouncer in a pool mode; yields its DSN."""
    program, port = find_pgbouncer(), free_port()
    assert program is not None
    directory = embedded.new_directory("pgqrs-pgbouncer-")
    directory.chmod(0o755)
    users, config = directory / "users.txt", directory / "pgbouncer.ini"
    users.write_text('"postgres" ""\n')
    config.write_text(
        f"[databases]\npostgres = host={server.socket_directory} user=postgres\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nauth_type = any\nunix_socket_dir =\n"
        f"auth_file = {users}\npool_mode = {mode}\nmax_client_conn = 100\ndefault_pool_size = 20\n"
    )
    owner = pwd.getpwuid(server.socket_directory.stat().st_uid).pw_name  # it refuses to run as root
    process = subprocess.Popen([program, *(["-u", owner] if os.geteuid() == 0 else []), str(config)])
    dsn = f"postgresql://postgres@127.0.0.1:{port}/postgres"

    def answers() -> bool:
        try:
            with psycopg.connect(dsn, connect_timeout=1):
                return True
        except psycopg.OperationalError:
            return False

    try:
        wait_for(answers, 10, "pgbouncer to answer")
        yield dsn
    finally:
        process.terminate()
        process.wait(10)
        shutil.rmtree(directory)

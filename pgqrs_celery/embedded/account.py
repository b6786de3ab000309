"""The user a server runs as. Postgres refuses to run as root, so as root it gets another account."""

from __future__ import annotations

import os
import pwd
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pgqrs_celery.exceptions import EmbeddedUnavailable

__all__ = ["Account", "make_directory", "new_directory", "server_account", "unreachable"]


@dataclass(frozen=True, slots=True)
class Account:
    """A user other than the current one; only root can use it."""

    name: str
    uid: int
    gid: int


def server_account(data: Path | None) -> Account | None:
    """Whom to run the server over ``data`` as (None: data yet to be made); None for the current user.

    As root it is the owner of the data if there is one, else ``postgres``, else ``nobody``: accounts that
    exist. None is created, and no mode of a directory that we did not make is changed.
    """
    owner = data.stat().st_uid if data is not None and data.exists() else None
    if os.geteuid() != 0:
        if owner not in (None, os.geteuid()):
            raise EmbeddedUnavailable(f"{data} belongs to user {owner}, not to you; choose another directory")
        return None
    for key in (owner, "postgres", "nobody"):
        if key in (None, 0):
            continue
        try:
            entry = pwd.getpwuid(key) if isinstance(key, int) else pwd.getpwnam(str(key))
        except KeyError:
            continue
        return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)
    raise EmbeddedUnavailable(
        "Postgres does not run as root, and there is neither a user 'postgres' nor 'nobody' to run it as; "
        "start this program as another user, or set PGQRS_CELERY_DSN"
    )


def unreachable(path: Path, account: Account) -> Path | None:
    """The first existing directory on the way to ``path``, itself included, that ``account`` may not enter."""
    resolved = path.resolve()
    for place in (*reversed(resolved.parents), resolved):
        if not place.exists():
            return None
        info = place.stat()
        if info.st_uid == account.uid:
            bit = 0o100
        elif info.st_gid == account.gid:
            bit = 0o010
        else:
            bit = 0o001
        if not info.st_mode & bit:
            return place
    return None


def make_directory(path: Path, *, passable: bool) -> None:
    """Create ``path`` and its missing parents; everybody can enter (not list) ``passable`` ones."""
    if path.is_dir():
        return
    make_directory(path.parent, passable=passable)
    try:
        path.mkdir()
    except FileExistsError:
        return
    except OSError as error:
        raise EmbeddedUnavailable(f"{path} cannot be created: {error.strerror}") from error
    path.chmod(0o711 if passable else 0o700)


def new_directory(prefix: str = "pgqrs-", *, parent: Path | None = None) -> Path:
    """A new, empty directory that a server can live in: for demos and tests, who also remove it.

    It is made in ``parent``, else where temporary files go. A plain ``tempfile.mkdtemp()`` is closed to the account
    that Postgres runs as when the caller is root.
    """
    account = server_account(None)
    if account is None:
        return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    for candidate in dict.fromkeys((parent, Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp"))):
        if candidate is not None and candidate.is_dir() and unreachable(candidate, account) is None:
            path = Path(tempfile.mkdtemp(prefix=prefix, dir=candidate))
            path.chmod(0o711)
            return path
    raise EmbeddedUnavailable(f"no temporary directory can be entered by user {account.name!r}; set TMPDIR")

"""Files and folders of this machine that one process holds at a time, and that the next one finds as they were left.

What holds them is flock: the kernel lets go when the holder ends, however it ends. Knows nothing of what is in them.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path

_OWNER = "owner"
"""In a deployment's folder: held by the deployment as long as it lives."""
_DEPLOYMENT = "rekindle-"


class Claim:
    """A path that is ours until `release`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor

    def touch(self) -> None:
        """Say that it is in use: what nobody has touched for long is deleted once nobody holds it."""
        os.utime(self.descriptor)

    def release(self) -> None:
        """Let the next one have it. Said to the lock itself: a mapping of the file would keep it held."""
        self.touch()
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        os.close(self.descriptor)


def claim_file(folder: Path, stem: str) -> Claim:
    """The first of the files `stem`-0, `stem`-1, ... that nobody holds; a new one where all are held. Raises OSError.

    The folder is made if need be, for us alone. Raises PermissionError where what is there is not.
    """
    return _first_free(folder, stem, _open_file)


def claim_folder(folder: Path, stem: str) -> Claim:
    """As `claim_file`, for a folder in `folder`."""
    return _first_free(folder, stem, _open_folder)


def forget_abandoned(folder: Path, names: str, *, older_than_s: float) -> None:
    """Delete what is called so (a glob) in `folder`, is held by nobody and was not touched for so long. Never raises:
    what can't be deleted stays."""
    for path in folder.glob(names):
        with suppress(OSError):
            if not _is_older(path.stat(follow_symlinks=False), older_than_s):
                continue  # not even held for a moment: whoever starts beside us may want it
            claim = _held(path, _open_as_it_is)
            if claim is None:
                continue
            try:
                if _is_older(os.fstat(claim.descriptor), older_than_s):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(claim.descriptor)


@contextmanager
def deployment_folder(under: Path = Path("/dev/shm")) -> Iterator[Path | None]:
    """A folder in shared memory that goes with whoever made it; None where there is no shared memory.

    One whose maker was killed is deleted by the next one made here.
    """
    _sweep(under)
    try:
        folder = Path(tempfile.mkdtemp(prefix=_DEPLOYMENT, dir=under))
    except OSError:
        yield None
        return
    new = folder / f"{_OWNER}.new"
    owner = _held(new, _open_file)
    assert owner is not None, "nobody else looks at this name"
    new.rename(folder / _OWNER)  # held before anybody who sweeps can find it
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        owner.release()


def _is_older(about: os.stat_result, than_s: float) -> bool:
    return time.time() - about.st_mtime > than_s


def _sweep(under: Path) -> None:
    for folder in under.glob(f"{_DEPLOYMENT}*"):
        with suppress(OSError):  # somebody else's
            owner = _held(folder / _OWNER, _open_as_it_is)
            if owner is not None:
                shutil.rmtree(folder)
                os.close(owner.descriptor)


def _first_free(folder: Path, stem: str, open_path: Callable[[Path], int]) -> Claim:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    there = sorted(folder.glob(f"{stem}-*"))
    for path in chain(there, (folder / f"{stem}-{number}" for number in count())):
        claim = _held(path, open_path)
        if claim is not None:
            return claim
    raise AssertionError("there is always another number")


def _held(path: Path, open_path: Callable[[Path], int]) -> Claim | None:
    """The path, ours from now on; None where somebody holds it. Raises OSError."""
    while True:
        descriptor = open_path(path)
        try:
            _insist_on_ours(path, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                return Claim(path, descriptor)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # deleted between the two: once more


def _insist_on_ours(path: Path, descriptor: int) -> None:
    """Raise PermissionError for what somebody else has put there: to read along, or for us to believe it."""
    about = os.fstat(descriptor)
    if about.st_uid != os.geteuid() or about.st_mode & 0o077:
        raise PermissionError(f"{path} belongs to another user, or is open to others")


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the path still leads to what was opened."""
    try:
        return os.path.samestat(path.stat(follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _open_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _open_folder(path: Path) -> int:
    path.mkdir(mode=0o700, exist_ok=True)
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _open_as_it_is(path: Path) -> int:
    no_waiting = os.O_NONBLOCK  # for whoever opens the other end of a pipe, if it is one
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | no_waiting)

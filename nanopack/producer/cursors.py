"""Give a forked process its own positions in the files that it inherits.

    cursors()   ->   fork   ->   own_cursors()   ->   the data set seeks and reads, and moves nobody else's position

A forked process shares the position of every open file with its parent: two that seek and read at the same time get
each other's bytes. With positions of their own, several processes may read a data set that opened its files once, in
`__init__`. What has no position, such as a socket or a pipe, stays shared: `pipes_of` finds it.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterable, Mapping
from typing import Any

if sys.platform != "win32":
    import fcntl


def cursors() -> dict[int, int]:
    """Return the position of each regular file that is open for reading, by descriptor.

    Files that are only written or appended to and the standard streams are left out: a log is shared on purpose.
    """
    found: dict[int, int] = {}
    # only Linux opens a descriptor once more, whatever became of the file's name
    for name in os.listdir("/proc/self/fd") if sys.platform == "linux" and os.path.isdir("/proc/self/fd") else ():
        # the listing's own descriptor is closed by now
        with contextlib.suppress(OSError):
            if _is_read(int(name)):
                found[int(name)] = os.lseek(int(name), 0, os.SEEK_CUR)
    return found


def _is_read(fd: int) -> bool:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    written = flags & os.O_ACCMODE == os.O_WRONLY or flags & (os.O_APPEND | os.O_PATH)
    return fd > 2 and not written and stat.S_ISREG(os.fstat(fd).st_mode)


def own_cursors(positions: Mapping[int, int]) -> None:
    """Reopen in a forked process the files that were open in its parent, at their positions before the fork.

    Where a file may not be opened any more, its position stays shared.
    """
    for fd, position in positions.items():
        with contextlib.suppress(OSError):
            own = os.open(f"/proc/self/fd/{fd}", fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE | os.O_CLOEXEC)
            try:
                os.lseek(own, position, os.SEEK_SET)
                os.dup2(own, fd, inheritable=os.get_inheritable(fd))
            finally:
                os.close(own)


def pipes_of(objects: Iterable[object]) -> list[str]:
    """Return the names of attributes of objects that are open sockets or pipes, or programs that have some."""
    attributes = [pair for one in objects for pair in getattr(one, "__dict__", {}).items()]
    # a program that was started for its answers: subprocess.Popen
    return [name for name, value in attributes if any(map(_is_pipe, (value, getattr(value, "stdout", None))))]


def _is_pipe(value: Any) -> bool:
    """Return whether it is an open socket, the reading end of a pipe, or a file made of one."""
    with contextlib.suppress(Exception):
        mode = os.fstat(fd := value.fileno()).st_mode
        if stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode):
            # a standard stream may be a pipe
            return fd > 2 and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_WRONLY
    return False

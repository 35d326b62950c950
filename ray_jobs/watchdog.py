"""Work that hangs or eats the machine's memory ends its own process, and nobody else's.

The process is then gone, which every caller can handle: the try counts, the task is tried again elsewhere, and is given
up at its cap. A thread could not stop a native call; `faulthandler` watches from C, without the interpreter's lock, and
leaves a traceback of all threads in the worker's log.
"""

from __future__ import annotations

import faulthandler
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

GIB = 2**30


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End this process when the block takes longer; 0 is no limit. Blocks cannot be nested."""
    start_time_limit(seconds)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def start_time_limit(seconds: float) -> None:
    """End this process in so many seconds, unless this is called again before (0: never)."""
    faulthandler.cancel_dump_traceback_later()
    if seconds:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)


def limit_memory(gib: float) -> None:
    """Let this process allocate at most so many GiB of its own beyond what it has; 0 is no limit.

    Beyond it an allocation fails: a MemoryError in Python, which is the task's reason. Only private memory counts
    (RLIMIT_DATA), so that shared memory of Ray's object store and reserved addresses of CUDA do not.
    """
    if gib:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (_private_bytes() + int(gib * GIB), hard))


def _private_bytes() -> int:
    with open("/proc/self/status") as status:
        return next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:")), 0)

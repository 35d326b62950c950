"""Hanging and greedy work, in processes of its own."""

from __future__ import annotations

import subprocess
import sys


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_a_native_call_that_keeps_the_interpreter_is_ended_with_a_traceback() -> None:
    done = run(
        "import ctypes, magicid\n"
        "from ray_jobs.watchdog import time_limit\n"
        "with time_limit(0.5):\n"
        "    ctypes.PyDLL(None).sleep(60)  # PyDLL: the interpreter's lock is held, no thread could do anything\n"
        "print('came back')\n"
    )
    assert done.returncode == 1
    assert "came back" not in done.stdout
    assert "Timeout (0:00:00.5" in done.stderr
    assert 'File "<string>", line 4' in done.stderr


def test_what_ends_in_time_is_left_alone() -> None:
    done = run(
        "import time\n"
        "from ray_jobs.watchdog import time_limit\n"
        "with time_limit(0.3):\n"
        "    pass\n"
        "with time_limit(0):\n"
        "    time.sleep(0.6)\n"
        "print('came back')\n"
    )
    assert (done.returncode, done.stdout) == (0, "came back\n")


def test_memory_beyond_the_limit_is_an_error_and_the_process_goes_on() -> None:
    done = run(
        "import numpy as np\n"
        "from ray_jobs.watchdog import limit_memory\n"
        "limit_memory(0.5)\n"
        "fits = np.ones(2**25)  # 256 MiB\n"
        "try:\n"
        "    rows = [np.ones(2**24) for _ in range(100)]\n"
        "except MemoryError as error:\n"
        "    print(type(error).__name__, int(fits.sum()) == 2**25)\n"
    )
    assert "True" in done.stdout, done.stderr

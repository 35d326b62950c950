"""Runs that lose a part of what they stand on at a random moment, and must end as one that nothing happened to.

    python -m tests.ray_jobs.chaos docs/chaos.md     # each trial of TRIALS that the table does not have yet

A trial: a Ray cluster of a head and two workers (`nodes.py`), the smallest face-world run of two people, and a harm
when a seeded share of its files is there. Where the driver ends before the work is done, the same command is given
again. The end is compared with a run that was left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from magicid import adapters, clips, status, storage
from magicid.run import Run
from tests.fault_proxy import RESET, FaultProxy, fault_proxy
from tests.object_store import BUCKET, forgotten, s3_server
from tests.ray_jobs import job, nodes

PEOPLE = job.ROOT / "examples/demo.jsonl"
SMALLEST: dict[str, object] = {
    "repository.trained_clips": 4, "repository.base_clips": 4, "sampling.steps": 2, "sft.steps": 4, "hpo.steps": 8,
    "hpo.batch_size": 2, "hpo.noise_draws": 2, "hpo.validate_every": 0, "trainer.checkpoint_every": 2,
    "sft.moving": 0, "trainer.log_every": 1, "evaluation.clips": 0, "resources.slots": 1,
    "resources.generator.max_size": 1, "resources.generator.min_size": 1, "fleet.manifest_s": 2,
}  # fmt: skip
SUBMISSIONS = 5  # a run that needs more is lost
ONE_START_S = 1800  # nor may one start of the job take longer
# What a run makes and never changes again; the others are the driver's own notes.
_MADE = re.compile(r"(identities|clips|text|scored|pairs|adapters)/|training/[^/]+/[^/]+/(lora|pytorch_lora_weights)\.")
_NO_WORKER = re.compile("IDLE|DashboardAgent|RuntimeEnvAgent")  # a raylet goes with its agents: that is its own kind
_UNCHANGED = re.compile(r"\.mp4$|^(pairs|adapters)/|training/.*/pytorch_lora_weights\.")


@dataclass
class Place:
    """Where a run lies, and how it is seen and harmed."""

    out: str
    environment: dict[str, str] = field(default_factory=dict)
    proxy: FaultProxy | None = None  # before the object store
    mount: Path | None = None  # a file system of its own

    def files(self) -> dict[str, str]:
        """The run's files, and when each was written."""
        fs, path = storage.open_fs(self.out)
        if not fs.exists(path):
            return {}
        found = fs.find(path, detail=True)
        return {
            name[len(path.rstrip("/")) + 1 :]: str(info.get("mtime") or info.get("LastModified"))
            for name, info in found.items()
            if not name.endswith(".partial")
        }

    def made(self) -> int:
        """How many files of the run are made."""
        with contextlib.suppress(OSError):
            return sum(bool(_MADE.match(name)) for name in self.files())
        return 0


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run made."""

    adapters: dict[str, str]  # id -> hash of the one version's weights
    clips: frozenset[str]
    files: int
    seconds: float


@dataclass
class Outcome:
    """One trial. `problems` is empty where it held."""

    kind: str
    seed: int
    share: float
    what: str = ""
    submissions: int = 1
    in_flight: int = 0
    again: int = 0
    adapters: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


class Trial:
    """One run on a cluster of its own, and the hand that harms it."""

    def __init__(self, kind: str, seed: int, folder: Path, place: Place) -> None:
        self.folder, self.place = folder, place
        self.cluster = nodes.Cluster(folder, place.environment)
        self.random = random.Random(f"{kind}-{seed}")
        self.outcome = Outcome(kind, seed, round(self.random.uniform(0.1, 0.9), 2))
        self.driver: subprocess.Popen[bytes] | None = None
        self.log = folder / "driver.log"

    def submit(self) -> None:
        """Start the driver, with the cluster there."""
        self.cluster.start()
        arguments = job.command(Path("OUT"), PEOPLE, **{k.replace(".", "__"): v for k, v in SMALLEST.items()})
        arguments[arguments.index("OUT")] = self.place.out
        environment = {**self.cluster.environment, "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
        with self.log.open("ab") as output:
            output.write(b"---- submitted\n")
            self.driver = subprocess.Popen(
                arguments, cwd=job.ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    @property
    def running(self) -> bool:
        """Whether the driver's process is there."""
        return self.driver is not None and self.driver.poll() is None

    def wait_for(self, files: int) -> None:
        """Return when so many files are made."""
        end = time.monotonic() + ONE_START_S
        while self.place.made() < files:
            assert self.running, f"the job ended early:\n{self.log.read_text()[-3000:]}"
            assert time.monotonic() < end, f"timed out:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.5 if self.place.proxy else 0.1)

    def to_the_end(self) -> None:
        """Wait for the driver, and submit again until everybody is done."""
        while True:
            assert self.driver is not None
            try:
                self.driver.wait(ONE_START_S)
            except subprocess.TimeoutExpired:
                self.outcome.problems.append(f"the driver did not end in {ONE_START_S} s")
                self.kill_driver()
            found = status.read(Run(self.place.out))
            if self.driver.returncode == 0 and set(found.states) == {"done"}:
                return
            if self.outcome.submissions == SUBMISSIONS:
                states = dict(found.states)
                self.outcome.problems.append(f"not done after {SUBMISSIONS} submissions: {states}, {found.driver}")
                return
            self.outcome.submissions += 1
            self.submit()

    def kill_driver(self) -> None:
        """kill -9 of the driver alone."""
        assert self.driver is not None
        self.driver.kill()
        self.driver.wait()

    def workers(self) -> list[int]:
        """Processes of actors and tasks on all nodes, oldest first."""
        found = [item for node in self.cluster.nodes() for item in node.processes().items()]
        return sorted(pid for pid, line in found if line.startswith("ray::") and not _NO_WORKER.search(line))


# ---- harms: each does one thing and says what ---------------------------------------------------------------------


def kill_worker(trial: Trial) -> str:
    """A pool's actor, a slot's worker, Ray Train's controller, or the actor with the queues."""
    pids = trial.workers()
    pid = trial.random.choice(pids)
    line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
    os.kill(pid, signal.SIGKILL)
    return line.removeprefix("ray::").split("(MapBatches")[-1].strip("() ").split(")")[0]


def kill_raylet(trial: Trial) -> str:
    """A worker node's raylet; its workers go with it."""
    number = trial.random.randrange(len(trial.cluster.workers))
    for pid, line in trial.cluster.workers[number].processes().items():
        if "/raylet/raylet" in line.split(" ")[0]:
            os.kill(pid, signal.SIGKILL)
    return f"worker {number + 1} of {len(trial.cluster.workers)}"


def kill_driver(trial: Trial) -> str:
    trial.kill_driver()
    return "the job's own process"


def kill_head(trial: Trial) -> str:
    """The head's machine, with the GCS. The driver is a process of its own: it must notice."""
    assert trial.cluster.head is not None
    trial.cluster.head.kill()
    return "GCS and all of the head"


def kill_cluster(trial: Trial) -> str:
    """Every machine at once, the driver's too."""
    assert trial.driver is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(trial.driver.pid, signal.SIGKILL)
    trial.driver.wait()
    trial.cluster.stop()
    return "all nodes and the driver"


def cut_off(trial: Trial) -> str:
    """A worker node that nobody hears for longer than the cluster waits, and that then goes on as if nothing was."""
    number = trial.random.randrange(len(trial.cluster.workers))
    node, seconds = trial.cluster.workers[number], nodes.HEALTH_CHECK_S + trial.random.randrange(20)
    stopped = list(node.processes())
    for pid in stopped:
        nodes.send(pid, signal.SIGSTOP)
    time.sleep(seconds)
    for pid in stopped:
        nodes.send(pid, signal.SIGCONT)
    return f"worker {number + 1} for {seconds} s"


def fill_disk(trial: Trial) -> str:
    """Not a byte is left on the run's disk, for a while."""
    assert trial.place.mount is not None
    seconds = 5 + trial.random.randrange(25)
    filler = trial.place.mount / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    time.sleep(seconds)
    filler.unlink()
    return f"for {seconds} s"


def store_errors(trial: Trial) -> str:
    """Some or all requests get an error, or no answer, for a while."""
    assert trial.place.proxy is not None
    seconds, share = 10 + trial.random.randrange(40), trial.random.choice([0.2, 0.5, 1.0])
    dice = random.Random(trial.outcome.seed)
    faults: list[Any] = [
        (503, "<Error><Code>SlowDown</Code></Error>"),
        (500, "<Error><Code>InternalError</Code></Error>"),
    ]
    faults.append(RESET)
    trial.place.proxy.decide = lambda method, path: dice.choice(faults) if dice.random() < share else None
    time.sleep(seconds)
    trial.place.proxy.decide = lambda method, path: None
    return f"{share:.0%} of the requests for {seconds} s"


HARMS: dict[str, Callable[[Trial], str]] = {
    "worker": kill_worker, "raylet": kill_raylet, "driver": kill_driver, "head": kill_head, "cluster": kill_cluster,
    "cut off": cut_off, "disk full": fill_disk, "store": store_errors,
}  # fmt: skip
TRIALS = [
    *(("worker", seed) for seed in range(1, 6)), *((kind, seed) for seed in range(1, 4) for kind in HARMS
    if kind != "worker"), *(("store", seed) for seed in range(4, 5)),
]  # fmt: skip


# ---- a trial --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def place_for(kind: str, folder: Path) -> Iterator[Place]:
    """A run's location: a disk, a small disk of its own, or a bucket behind a proxy that can make faults."""
    if kind == "disk full":
        mount = folder / "disk"
        mount.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(mount)], check=True)
        try:
            yield Place(str(mount / "run"), mount=mount)
        finally:
            subprocess.run(["umount", "-l", str(mount)], check=True)
    elif kind == "store":
        with s3_server(folder / "s3.log") as environment, fault_proxy(environment["AWS_ENDPOINT_URL"]) as proxy:
            whole, before = {**environment, "AWS_ENDPOINT_URL": proxy.url}, dict(os.environ)
            os.environ.update(environment)  # this process looks past the proxy
            try:
                with forgotten("s3"):
                    yield Place(f"s3://{BUCKET}/run", whole, proxy)
            finally:
                for name in environment:
                    os.environ.pop(name)
                os.environ.update(before)
    else:
        yield Place(str(folder / "run"))


def can_mount() -> bool:
    """Whether this process may mount a small disk."""
    with tempfile.TemporaryDirectory() as folder:
        tried = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
        if tried.returncode == 0:
            subprocess.run(["umount", folder], check=True)
        return tried.returncode == 0


def undisturbed(folder: Path) -> Reference:
    """The run that nothing happens to."""
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    trial = Trial("none", 0, folder, Place(str(folder / "run")))
    try:
        trial.submit()
        trial.to_the_end()
    finally:
        trial.cluster.stop()
    assert not trial.outcome.problems, trial.outcome.problems
    assert trial.outcome.submissions == 1, trial.log.read_text()[-3000:]
    found = published(trial.place)
    assert all(len(hashes) == 1 for hashes in found.values())
    return Reference(
        {name: hashes[0] for name, hashes in found.items()}, clip_names(trial.place), trial.place.made(),
        time.monotonic() - began,
    )  # fmt: skip


def run_trial(kind: str, seed: int, reference: Reference, folder: Path) -> Outcome:
    """One trial from an empty folder to its verdict."""
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with place_for(kind, folder) as place:
        trial = Trial(kind, seed, folder, place)
        try:
            trial.submit()
            trial.wait_for(round(trial.outcome.share * reference.files))
            trial.outcome.what = HARMS[kind](trial)
            before = place.files()
            trial.outcome.in_flight = in_flight(before)
            trial.to_the_end()
            judge(trial, reference, before)
        finally:
            if trial.driver is not None and trial.running:
                trial.kill_driver()
            trial.cluster.stop()
    trial.outcome.seconds = time.monotonic() - began
    return trial.outcome


def judge(trial: Trial, reference: Reference, before: dict[str, str]) -> None:
    """Write down what is not as in the undisturbed run."""
    place, outcome = trial.place, trial.outcome
    found = published(place)
    outcome.adapters = sum(len(hashes) for hashes in found.values())
    if found != {name: [sha] for name, sha in reference.adapters.items()}:
        outcome.problems.append(f"adapters {found}, undisturbed {reference.adapters}")
    if (names := clip_names(place)) != reference.clips:
        outcome.problems.append(f"{len(names - reference.clips)} other clips, {len(reference.clips - names)} missing")
    after = place.files()
    changed = sorted(n for n, at in before.items() if _UNCHANGED.search(n) and whole(n, before) and after.get(n) != at)
    outcome.again = sum(name.endswith(".mp4") for name in changed)
    if changed:
        outcome.problems.append(f"made again: {', '.join(changed[:5])}")
    outcome.problems += unreadable(place, after)


def whole(name: str, files: dict[str, str]) -> bool:
    """Whether a file was finished: an adapter's are when its manifest is there, which comes last."""
    folder = name.rsplit("/", 1)[0]
    return not name.startswith("adapters/") or f"{folder}/manifest.json" in files


def published(place: Place) -> dict[str, list[str]]:
    """Every version of everybody: hashes of weights that were looked at."""
    people = sorted({name.split("/")[1] for name in place.files() if name.startswith("adapters/")})
    found: dict[str, list[str]] = {}
    for person in people:
        versions = adapters.list_versions(place.out, person)
        found[person] = [storage.sha256_bytes(storage.read_bytes(version.weights)) for version in versions]
    return found


def clip_names(place: Place) -> frozenset[str]:
    """The finished clips."""
    return frozenset(name.rsplit("/", 1)[1] for name in place.files() if name.endswith(".mp4"))


def in_flight(files: dict[str, str]) -> int:
    """Clips that were begun and not finished: a try is noted before it begins."""
    begun = {m.group(1) for name in files if (m := re.match(r"attempts/[^/]+/([0-9a-f]{20,})\.json$", name))}
    return len(begun - {name.rsplit("/", 1)[1].removesuffix(".mp4") for name in files if name.endswith(".mp4")})


def unreadable(place: Place, files: dict[str, str]) -> list[str]:
    """Files that are not whole, by reading each as what it is."""
    readers: dict[str, Callable[[str], Any]] = {
        ".parquet": storage.read_table, ".json": storage.read_json, ".safetensors": storage.read_arrays,
        ".mp4": lambda location: clips.decode_mp4(storage.read_bytes(location)),
    }  # fmt: skip
    broken = []
    for name in files:
        try:
            readers.get(Path(name).suffix, storage.read_bytes)(storage.join(place.out, name))
        except Exception as error:
            broken.append(f"{name} cannot be read: {error}")
    return broken


# ---- the table ----------------------------------------------------------------------------------------------------

HEAD = """\
| kind | seed | files made | what | submissions | adapters | clips in flight | finished clips made again | s | held |
|---|---|---|---|---|---|---|---|---|---|
"""


def as_row(outcome: Outcome) -> str:
    """A line of the table."""
    held = "yes" if not outcome.problems else "**no**: " + "; ".join(outcome.problems).replace("|", "/")[:300]
    cells = [
        outcome.kind, outcome.seed, f"{outcome.share:.0%}", outcome.what, outcome.submissions, outcome.adapters,
        outcome.in_flight, outcome.again, f"{outcome.seconds:.0f}", held,
    ]  # fmt: skip
    return "| " + " | ".join(str(cell) for cell in cells) + " |\n"


def known(text: str) -> set[tuple[str, int]]:
    """The trials that a table has."""
    return {(kind, int(seed)) for kind, seed in re.findall(r"^\| ([a-z ]+?) \| (\d+) \|", text, re.M)}


def main(table: Path, kinds: list[str]) -> None:
    """Run what the table lacks, of the given kinds or of all, and append a line for each."""
    if not table.exists():
        table.write_text(f"# Chaos\n\n{HEAD}")
    todo = [trial for trial in TRIALS if trial not in known(table.read_text()) and trial[0] in (kinds or HARMS)]
    with tempfile.TemporaryDirectory(prefix="magicid-chaos-") as folder:
        reference = undisturbed(Path(folder, "undisturbed"))
        print(f"undisturbed: {reference.files} files, {reference.seconds:.0f} s", flush=True)
        for kind, seed in todo:
            try:
                outcome = run_trial(kind, seed, reference, Path(folder, f"{kind}-{seed}".replace(" ", "-")))
            except Exception as error:  # the trial itself could not be made: it is no row, and comes again
                print(f"{kind} {seed}: no trial: {type(error).__name__}: {error}", flush=True)
                continue
            print(as_row(outcome), end="", flush=True)
            with table.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(as_row(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

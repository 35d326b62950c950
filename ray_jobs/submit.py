"""Submit the main job so that a double submission is one run.

    python -m ray_jobs.submit --recipe face-world --identities people.jsonl --out s3://bucket/run-1 --working-dir .

The submission's id is made from the run's location. A job of that id that waits or runs is followed instead of a second
one being started; one that has ended is replaced, and goes on where the run directory stands. Should two clusters be
given the same run, the lease in the run directory lets one of them drive.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import sys
from collections.abc import Callable
from typing import Any

import tenacity
import typer
from ray.job_submission import JobStatus, JobSubmissionClient
from rich.console import Console
from rich.text import Text

from magicid import recipe, storage
from magicid.errors import MagicIDError, StorageError

NOT_DONE, ERROR, LEFT = 1, 2, 3  # exit codes: the job failed; it could not be submitted; it goes on unwatched
_PATIENCE_S = 300  # a head's parts start one after the other: until its agent is there, it takes no job
_RACES = 5

Say = Callable[[str], None]


def submission_id(out: str) -> str:
    """The id of a run's job: the end of its location, readable, and a hash of all of it.

    Letters, digits, `-` and `_`: Ray makes file names and URLs of it.
    """
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", out.rstrip("/").rsplit("/", 1)[-1]).strip("-")[:40]
    return f"{name or 'run'}-{storage.sha256_bytes(out.rstrip('/').encode())[:8]}"


def entrypoint(recipe_name: str, identities: str, out: str, overrides: list[str]) -> str:
    """The job's command line, as a shell reads it."""
    words = ["python", "-m", "ray_jobs.customize", "--recipe", recipe_name, "--identities", identities, "--out", out]
    return shlex.join([*words, *overrides])


def submit(client: JobSubmissionClient, name: str, command: str, working_dir: str | None, say: Say) -> bool:
    """Let the job `name` be there and on its way; False when it was already.

    Raises:
        MagicIDError: the cluster does not take it.
    """
    for _ in range(_RACES):
        info = _info(client, name)
        if info is not None and not info.status.is_terminal():
            say(f"{name} is {info.status.value.lower()} already: this is the same run, and it is followed")
            if info.entrypoint != command:
                say(f"it was submitted as another command, which holds: {info.entrypoint}")
            return False
        if info is not None:
            say(f"{name} was submitted before and has ended ({info.status.value.lower()}); it goes on where it stood")
            client.delete_job(name)
        try:
            _submit(client, name, command, working_dir)
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise MagicIDError(
                    f"the cluster did not take the job: {_reason(error)}", "see its dashboard"
                ) from error
            continue  # somebody else submitted it meanwhile
        say(f"submitted {name}")
        return True
    raise MagicIDError(f"others submit and end {name} all the time", "see who does, with `ray job list`")


@tenacity.retry(
    retry=tenacity.retry_if_exception(lambda error: "No available agent" in str(error)),
    wait=tenacity.wait_fixed(2),
    stop=tenacity.stop_after_delay(_PATIENCE_S),
    reraise=True,
)
def _submit(client: JobSubmissionClient, name: str, command: str, working_dir: str | None) -> None:
    environment: dict[str, Any] = {"working_dir": working_dir} if working_dir else {}
    client.submit_job(entrypoint=command, submission_id=name, runtime_env=environment)


def _info(client: JobSubmissionClient, name: str) -> Any:
    """What the cluster knows of a job; None where it knows none of that id."""
    try:
        return client.get_job_info(name)
    except RuntimeError as error:
        if "404" in str(error):
            return None
        raise MagicIDError(f"the cluster does not answer: {_reason(error)}", "see its dashboard") from error


def _reason(error: BaseException) -> str:
    """The last line of what the cluster said, which may hold a whole traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


async def follow(client: JobSubmissionClient, name: str, write: Say) -> JobStatus:
    """Write the job's own words until it ends; how it ended."""
    async for lines in client.tail_job_logs(name):
        write(lines)
    while not (status := client.get_job_status(name)).is_terminal():  # the log closes a moment before
        await asyncio.sleep(0.5)
    return status


def connect(address: str | None) -> JobSubmissionClient:
    """The cluster's job server.

    Raises:
        MagicIDError: nobody answers there, or the token is wrong.
    """
    shown = storage.public_name(address or os.environ.get("RAY_ADDRESS", "http://127.0.0.1:8265"))
    if address:
        os.environ["RAY_ADDRESS"] = address  # which Ray would prefer to the argument
    try:
        return JobSubmissionClient(address)
    except Exception as error:
        action = "start one with `ray start --head`, or give --address and RAY_AUTH_TOKEN of the cluster"
        raise MagicIDError(f"no Ray cluster takes jobs at {shown}: {_reason(error)}", action) from error


def location(out: str) -> str:
    """The run's location as the job sees it. Raises StorageError for a relative path with a remote cluster in mind."""
    if "://" not in out and not os.path.isabs(out):
        raise StorageError(
            f"--out {out} is relative, and a job does not run in this folder",
            f"give {os.path.abspath(out)} if all nodes share it, or a URL such as s3://bucket/run",
        )
    return out.rstrip("/")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def main(
    context: typer.Context,
    identities: str = typer.Option(..., help="manifest or folder, on a URL or path that the cluster reaches"),
    out: str = typer.Option(..., help="run directory, on a URL or an absolute path that all nodes share"),
    recipe_name: str = typer.Option("face-world", "--recipe", help="a shipped recipe or a .toml file of the cluster"),
    address: str | None = typer.Option(None, help="the cluster's dashboard; without it RAY_ADDRESS"),
    working_dir: str | None = typer.Option(None, help="code to send along, such as `.` from a checkout"),
    wait: bool = typer.Option(True, help="follow the job to its end; its exit code tells"),
) -> None:
    """Submit a run, or follow the one that is under way. Any recipe key can follow as --section.key=value."""
    console = Console(highlight=False)

    def say(text: str) -> None:
        console.print(Text(text), soft_wrap=True)

    try:
        if recipe_name in recipe.shipped():
            recipe.load(recipe_name, recipe.parse_overrides(context.args))  # a wrong key is told here, not by a job
        place = location(out)
        name = submission_id(place)
        client = connect(address)
        submit(client, name, entrypoint(recipe_name, identities, place, context.args), working_dir, say)
    except MagicIDError as error:
        console.print(Text(f"error {error}", style="red"), soft_wrap=True)
        sys.exit(ERROR)
    if not wait:
        say(f"follow it with `ray job logs {name} --follow`, or `magicid status {storage.public_name(place)} --watch`")
        return
    try:
        status = asyncio.run(follow(client, name, lambda text: print(text, end="", flush=True)))
    except KeyboardInterrupt:
        say(f"{name} goes on; the same command follows it again, `ray job stop {name}` ends it")
        sys.exit(LEFT)
    say(f"{name} {status.value.lower()}")
    sys.exit(0 if status == JobStatus.SUCCEEDED else NOT_DONE)


if __name__ == "__main__":
    app()

"""`magicid status`, `retry` and `cancel`: an operator's view of a run, and what may be asked of it, through storage."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

from magicid.cli_errors import told_plainly

if TYPE_CHECKING:
    from magicid.run import Run
    from magicid.status import Status

RUN = typer.Argument(..., help="run directory, on any fsspec URL")
SOME = typer.Argument(None, metavar="[ID]...")
THESE = typer.Argument(..., metavar="ID...")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (status, retry, cancel):
        app.command()(command)


@told_plainly
def status(
    run: str = RUN,
    watch: bool = typer.Option(False, "--watch", help="draw again every two seconds, until the run ends"),
    as_json: bool = typer.Option(False, "--json", help="for scripts; the keys are in magicid.status.to_json"),
    failed: bool = typer.Option(False, "--failed", help="only what failed, all of it"),
) -> None:
    """Say how a run stands: who drives it, tenants, stages, time left, cost, what failed and why.

    Works with or without a cluster. A dash stands where there is nothing to estimate from.
    """
    from functools import partial

    from rich.console import Console

    from magicid import status as numbers
    from magicid import status_view
    from magicid.run import Run

    read = partial(numbers.read, Run(run))
    if as_json:
        typer.echo(json.dumps(numbers.to_json(read()), indent=2))
        return
    console = Console(highlight=False)
    draw = status_view.render_failed if failed else status_view.render
    if watch:
        status_view.watch(read, draw, console)
        return
    found = read()
    if failed and not found.failed:
        typer.echo("nothing failed")
        return
    console.print(draw(found))


@told_plainly
def retry(
    run: str = RUN,
    identities: list[str] = SOME,
    failed: bool = typer.Option(False, "--failed", help="all that failed"),
    everything: bool = typer.Option(False, "--all", help="all that failed or were cancelled"),
) -> None:
    """Try identities again that failed or were cancelled; what they have finished is kept."""
    from magicid import commands, ledger
    from magicid.errors import IdentityError
    from magicid.run import Run

    place = Run(run)
    now = _read(place)
    names = list(identities or [])
    if bool(names) + failed + everything != 1:
        raise IdentityError("it is not clear whom to try again", "give ids, or --failed, or --all")
    if not names:
        states = (ledger.FAILED,) if failed else (ledger.FAILED, ledger.CANCELLED)
        names = [record.identity_id for record in now.records if record.state in states]
        if not names:
            typer.echo("there is nothing to retry")
            return
    commands.send(place, commands.RETRY, names)
    _tell("retried", names, now)


@told_plainly
def cancel(run: str = RUN, identities: list[str] = THESE) -> None:
    """Take identities out of a run; what they have finished is kept, and `retry` takes them up again."""
    from magicid import commands
    from magicid.run import Run

    place = Run(run)
    now = _read(place)
    commands.send(place, commands.CANCEL, identities)
    _tell("cancelled", identities, now)


def _read(run: Run) -> Status:
    from magicid import status as numbers

    return numbers.read(run)


def _tell(done: str, names: list[str], now: Status) -> None:
    from magicid.status import DRIVING

    listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    if now.driver.state == DRIVING:
        typer.echo(
            f"{listed}: will be {done} within half a minute (fleet.manifest_s) by the driver on {now.driver.host}"
        )
    else:
        typer.echo(f"{listed}: will be {done} when the job is submitted again; no driver is at work ({now.driver})")

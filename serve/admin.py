"""The operator's commands, on the endpoint's database: tenants and the audit log.

python -m serve.admin add team-a --max-open 50 database=postgresql+psycopg://... (prints the key, once)
python -m serve.admin tenants | remove team-a | grant team-b ada | revoke team-b ada | audit --subject ada

Settings follow as key=value (`serve.settings.ServeSettings`); without any, those of `make serve`.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated

import typer

from magicid.cli import show, told_plainly
from serve.parts import open_audit, open_tenants
from serve.settings import ServeSettings, load
from serve.tenants import TenantStore

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
Settings = Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="settings of the endpoint")]


def _settings(values: list[str] | None) -> ServeSettings:
    return load(dict(value.partition("=")[::2] for value in values or []))


def _tenants(values: list[str] | None) -> TenantStore:
    return open_tenants(_settings(values))


@app.command()
@told_plainly
def tenants(settings: Settings = None) -> None:
    """List the tenants; keys cannot be shown, only their hashes are kept."""
    found = _tenants(settings).list()
    rows = [
        [
            each.name,
            "yes" if each.admin else "",
            f"{each.weight:g}",
            str(each.max_open),
            str(each.requests_per_minute),
            " ".join(sorted(each.grants)),
        ]
        for each in found
    ]
    show(["tenant", "admin", "weight", "open at most", "requests a minute", "may also use"], rows)


@app.command()
@told_plainly
def add(
    name: str,
    settings: Settings = None,
    admin: bool = typer.Option(False, help="may see, use and delete everything"),
    weight: float = typer.Option(1.0, help="share of the work while others wait too"),
    max_open: int = typer.Option(100, help="videos that may wait or run at once"),
    requests_per_minute: int = typer.Option(600),
) -> None:
    """Add a tenant and print its key. Identities whose manifest names it as `owner` are its own."""
    store = _tenants(settings)
    key = store.add(name, admin=admin, weight=weight, max_open=max_open, requests_per_minute=requests_per_minute)
    open_audit(_settings(settings)).write("tenant.add", tenant=None, request_id=None, subject=name, detail={})
    typer.echo(key)


@app.command()
@told_plainly
def remove(name: str, settings: Settings = None) -> None:
    """Remove a tenant: its key stops working within a second, its videos stay until they expire."""
    _tenants(settings).remove(name)
    open_audit(_settings(settings)).write("tenant.remove", tenant=None, request_id=None, subject=name, detail={})


@app.command()
@told_plainly
def grant(name: str, identity_id: str, settings: Settings = None) -> None:
    """Let a tenant use another tenant's identity."""
    _tenants(settings).grant(name, identity_id)
    detail = {"identity": identity_id}
    open_audit(_settings(settings)).write("tenant.grant", tenant=None, request_id=None, subject=name, detail=detail)


@app.command()
@told_plainly
def revoke(name: str, identity_id: str, settings: Settings = None) -> None:
    """Take a grant back."""
    _tenants(settings).revoke(name, identity_id)
    detail = {"identity": identity_id}
    open_audit(_settings(settings)).write("tenant.revoke", tenant=None, request_id=None, subject=name, detail=detail)


@app.command()
@told_plainly
def audit(
    settings: Settings = None,
    tenant: str | None = typer.Option(None, help="only what this tenant did"),
    subject: str | None = typer.Option(None, help="only what was done to this video, identity or tenant"),
) -> None:
    """Print the audit log, oldest first."""
    log, last = open_audit(_settings(settings)), 0
    while lines := log.read(tenant=tenant, subject=subject, after=last):
        for line in lines:
            at = datetime.fromtimestamp(line.at, UTC).isoformat(timespec="seconds")
            detail = json.dumps(line.detail, sort_keys=True)
            typer.echo(f"{at} {line.action} {line.subject} by {line.tenant or 'the operator'} {detail}")
        last = lines[-1].id


if __name__ == "__main__":
    app()

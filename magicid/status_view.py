"""A run's status for a terminal: tables that fit a screen, and a live view that ends with the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from magicid import ledger
from magicid.ledger import Record
from magicid.status import DRIVING, ENDED, INTERRUPTED, STATES, STOPPED, Status, duration

EVERY_S = 2.0
SHOWN_UNDER_WAY, SHOWN_FAILED, SHOWN_TENANTS = 16, 8, 20
DASH = "-"
_COLOURS = {ledger.DONE: "green", ledger.FAILED: "red", INTERRUPTED: "yellow", ledger.RUNNING: "cyan"}


def render(status: Status) -> RenderableType:
    """The whole view. Names and reasons may come from anybody: no markup is read in them."""
    parts: list[RenderableType] = [_head(status), _tenants(status)]
    if status.under_way:
        parts += [Text(), _under_way(status)]
    if status.seconds:
        parts += [Text(), _cost(status)]
    if status.failed:
        parts += [Text(), render_failed(status, SHOWN_FAILED)]
    return Group(*parts)


def _head(status: Status) -> Text:
    ended = sum(status.states[state] for state in (ledger.DONE, ledger.FAILED, ledger.CANCELLED))
    left = DASH if status.left_s is None else f"about {duration(status.left_s)}"
    colour = {DRIVING: "cyan", ENDED: "green"}.get(status.driver.state, "yellow")
    return Text.assemble(
        ("driver  ", "bold"), (str(status.driver), colour),
        ("\nended   ", "bold"), f"{ended} of {len(status.records)} identities", ("   left ", "bold"), left, "\n",
    )  # fmt: skip


def _table(heads: Sequence[str], rows: Sequence[Sequence[str | Text]], numbers: Sequence[str] = ()) -> Table:
    drawn = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for head in heads:
        if head in numbers:
            drawn.add_column(head, no_wrap=True, justify="right")
        else:
            drawn.add_column(head, overflow="fold")
    for row in rows:
        drawn.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    return drawn


def _tenants(status: Status) -> Table:
    states = [state for state in STATES if state != INTERRUPTED or status.states[INTERRUPTED]]
    shown = sorted(status.tenants, key=lambda tenant: -sum(tenant.states.values()))[:SHOWN_TENANTS]
    rows: list[list[str | Text]] = [
        [
            tenant.owner,
            *(_count(tenant.states[state], state) for state in states),
            DASH if tenant.oldest_wait_s is None else duration(tenant.oldest_wait_s),
            f"{sum(tenant.seconds.values()):.0f}",
        ]
        for tenant in sorted(shown, key=lambda tenant: tenant.owner)
    ]
    if len(status.tenants) > 1:
        waits = [tenant.oldest_wait_s for tenant in status.tenants if tenant.oldest_wait_s is not None]
        more = f" ({len(status.tenants)} tenants)" if len(status.tenants) > len(shown) else ""
        rows.append(
            [
                f"all{more}",
                *(_count(status.states[state], state) for state in states),
                duration(max(waits)) if waits else DASH,
                f"{sum(status.seconds.values()):.0f}",
            ]
        )
    heads = ["tenant", *states, "wait", "device-s"]
    return _table(heads, rows, heads[1:])


def _count(number: int, state: str) -> Text:
    return Text(str(number), style=_COLOURS.get(state, "") if number else "dim")


def _under_way(status: Status) -> RenderableType:
    by_stage = ", ".join(f"{status.stages[stage]} in {stage}" for stage in ledger.STAGES if status.stages[stage])
    title = "running" if status.driver.state == DRIVING else "interrupted"
    if len(status.under_way) > SHOWN_UNDER_WAY:
        return Text(f"{title}  {by_stage}")
    rows = [
        [r.identity_id, r.owner, r.stage or DASH, _progress(r), duration(status.at - r.began) if r.began else DASH]
        for r in status.under_way
    ]
    return _table([title, "tenant", "stage", "progress", "for"], rows, ["progress", "for"])


def _progress(record: Record) -> str:
    return f"{record.done:.0f} of {record.total:.0f}" if record.total > 1 else DASH


def _cost(status: Status) -> Table:
    """Device-seconds by stage, the dearest first."""
    whole = sum(status.seconds.values()) or 1.0
    rows = [[name, f"{seconds:.0f}", f"{seconds / whole:.0%}"] for name, seconds in status.seconds.most_common()]
    return _table(["busy with", "device-seconds", "share"], rows, ["device-seconds", "share"])


def render_failed(status: Status, most: int | None = None) -> RenderableType:
    """What failed, where, after how many tries, why, and what to do."""
    shown = status.failed[:most]
    rows: list[list[str | Text]] = [
        [
            Text(r.identity_id, style="red"),
            r.owner,
            r.stage or DASH,
            f"{r.attempts.get(r.stage, 0):.0f}" if r.attempts.get(r.stage) else DASH,
            r.problem or DASH,
            r.action or DASH,
        ]
        for r in shown
    ]
    table = _table(["failed", "tenant", "stage", "tries", "why", "what to do"], rows, ["tries"])
    if len(shown) == len(status.failed):
        return table
    return Group(table, Text(f"and {len(status.failed) - len(shown)} more: magicid status --failed", style="dim"))


def watch(read: Callable[[], Status], draw: Callable[[Status], RenderableType], console: Console) -> Status:
    """Draw again and again until the driver has said goodbye; a run that waits for a driver is watched on."""
    status = read()
    with Live(draw(status), console=console, auto_refresh=False) as live:
        while status.driver.state not in (ENDED, STOPPED):
            time.sleep(EVERY_S)
            status = read()
            live.update(draw(status), refresh=True)
    return status

"""The end of a job: the report, and what it prints."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from magicid import ledger, storage
from magicid.errors import MagicIDError
from magicid.evaluation import table
from magicid.run import Run
from magicid.schema import MetricRow, Rejected
from ray_jobs.job import cause

if TYPE_CHECKING:
    from ray_jobs.fleet import Fleet


def published(run: Run, identity_id: str, version: str | None) -> bool:
    """Whether an adapter that the ledger names is still there."""
    return version is not None and run.has(f"adapters/{identity_id}/{version}/manifest.json")


def write_report(fleet: Fleet) -> str:
    """One self-contained HTML file; where it cannot be made, the reason, since what was trained is not lost."""
    from magicid.report import build_report

    try:
        fleet.run.write("rejected.parquet", _rejected(fleet), Rejected)
        location = fleet.run.path("report.html")
        storage.write_bytes(location, build_report(fleet.run, fleet.recipe.fleet.report_identities).encode())
    except Exception as error:
        problem = error if isinstance(error, MagicIDError) else MagicIDError(cause(error), "run again to try it again")
        fleet.set_aside("stage", "report", problem)
        return "none; see above"
    return location


def _rejected(fleet: Fleet) -> list[Rejected]:
    """What was set aside at this start and before, without what has gone well since."""
    earlier = fleet.run.read("rejected.parquet", Rejected) if fleet.run.has("rejected.parquet") else []
    done = {name for name, record in fleet.ledger.records.items() if record.state == ledger.DONE}
    kept = [row for row in earlier if row.kind == "photo" or (row.kind == "identity" and row.name not in done)]
    return list(dict.fromkeys([*kept, *fleet.rejected]))


def summarise(fleet: Fleet, manifest: str, report: str) -> int:
    """The end of the job: the table, the adapters, the report. Returns how many adapters there are.

    Raises:
        MagicIDError: no identity of the manifest could be used.
    """
    console, records = fleet.display.console, sorted(fleet.ledger.records.values(), key=lambda r: r.identity_id)
    done = [record for record in records if record.state == ledger.DONE]
    if not done and all(record.stage in ("", "check") for record in records):
        raise MagicIDError(f"no identity of {manifest} can be used", "correct what was set aside above")
    shown = done[: fleet.recipe.fleet.report_identities]
    measured = [row for r in shown for row in fleet.run.read_parts(f"evaluation/{r.identity_id}", MetricRow)]
    measured = [row for row in measured if row.method != "validation"]
    if measured:
        console.print(table.render(table.table(measured)))
    for record in shown:
        if not record.adapter:  # extended tokens: measured, not published
            continue
        location = fleet.run.path("adapters", record.identity_id, str(record.adapter))
        console.print(f"adapter  {_short(location)}", soft_wrap=True, highlight=False)
    if len(done) > len(shown):
        console.print(f"         and {len(done) - len(shown)} more; see `magicid adapters list`", highlight=False)
    console.print(f"report   {_short(report)}", soft_wrap=True, highlight=False)
    return len(done)


def _short(location: str) -> str:
    """A local path below the working directory without it."""
    return location.removeprefix(os.getcwd() + os.sep)

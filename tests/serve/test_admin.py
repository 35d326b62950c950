"""The operator's commands act on the records that the endpoint uses."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from typer.testing import CliRunner

from serve.admin import app
from serve.database import audit
from serve.parts import open_database, open_tenants
from serve.settings import ServeSettings
from serve.tenants import Tenant


def test_a_tenant_is_added_used_granted_and_removed(tmp_path: Path) -> None:
    setting, run = f"data={tmp_path}", CliRunner().invoke
    added = run(app, ["add", "team-a", setting, "--weight", "2", "--max-open", "7"])
    assert added.exit_code == 0, added.output
    key = added.output.strip()

    def seen() -> Tenant | None:  # by a process that has believed nothing yet
        return open_tenants(ServeSettings(data=str(tmp_path))).authenticate(key)

    tenant = seen()
    assert tenant is not None
    assert (tenant.name, tenant.weight, tenant.max_open, tenant.admin) == ("team-a", 2.0, 7, False)

    assert run(app, ["grant", "team-a", "bruno", setting]).exit_code == 0
    granted = seen()
    assert granted is not None
    assert granted.grants == {"bruno"}
    listed = run(app, ["tenants", setting]).output
    assert "team-a" in listed
    assert "bruno" in listed
    assert key not in listed

    assert run(app, ["revoke", "team-a", "bruno", setting]).exit_code == 0
    assert run(app, ["remove", "team-a", setting]).exit_code == 0
    assert seen() is None
    told = run(app, ["audit", setting, "--subject", "team-a"]).output.splitlines()
    assert [line.split()[1] for line in told] == ["tenant.add", "tenant.grant", "tenant.revoke", "tenant.remove"]
    assert key not in "".join(told)


def test_a_long_audit_log_is_printed_to_its_end(tmp_path: Path) -> None:
    database = open_database(ServeSettings(data=str(tmp_path)).database_url)
    line = {"at": 1.0, "action": "video.create", "subject": "v", "detail": {}}
    with database.session() as connection:
        connection.execute(sa.insert(audit), [{**line, "tenant": f"t{number}"} for number in range(2001)])
    told = CliRunner().invoke(app, ["audit", f"data={tmp_path}"]).output.splitlines()
    assert [text.split()[4] for text in told] == [f"t{number}" for number in range(2001)]


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    unknown = CliRunner().invoke(app, ["remove", "nobody", f"data={tmp_path}"])
    assert unknown.exit_code == 2
    assert "no tenant 'nobody'" in unknown.output
    wrong = CliRunner().invoke(app, ["tenants", "dta=x"])
    assert wrong.exit_code == 2
    assert "endpoint setting dta" in wrong.output

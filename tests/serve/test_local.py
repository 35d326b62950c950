"""`make serve`: whose the key is, from the first start to those after the demo."""

from __future__ import annotations

from pathlib import Path

import pytest

from magicid import adapters
from serve.local import open_door
from serve.parts import open_tenants
from serve.settings import ServeSettings
from tests.serve.endpoint import publish


def test_a_key_that_was_there_before_the_demo_opens_its_identities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "a key that somebody has kept for long"
    monkeypatch.setenv("MAGICID_API_KEY", key)
    settings = ServeSettings(adapters=str(tmp_path / "run"), data=str(tmp_path / "data"))
    for people in ([], ["ada"], ["ada", "bruno"]):
        for person in people:
            publish(settings.adapters, person, "face-world")
        assert open_door(settings, adapters.list_identities(settings.adapters)) == key
        (tenant,) = open_tenants(settings).list()
        assert tenant == open_tenants(settings).authenticate(key)
        assert (tenant.name, tenant.grants) == ("face-world" if people else "local", frozenset(people))

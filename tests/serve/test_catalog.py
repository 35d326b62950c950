"""The catalog: what names mean, who may use them, and that what changes on storage is seen soon and cheaply."""

from __future__ import annotations

import json
import logging
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from magicid import adapters, storage
from magicid.adapters import AdapterManifest, Alias
from magicid.errors import StorageError
from serve.catalog import Catalog, Model, UnknownModel
from serve.schema import Target
from serve.tenants import Tenant

BASE, OTHER = "b" * 64, "c" * 64


def tenant(name: str = "studio", admin: bool = False, grants: tuple[str, ...] = ()) -> Tenant:
    return Tenant(name, admin, weight=1, max_open=9, requests_per_minute=9, grants=frozenset(grants))


STUDIO, RIVAL, ADMIN = tenant(), tenant("rival"), tenant("root", admin=True)


def publish(run: str, identity_id: str, seed: int, *, owner: str = "studio", base: str = BASE, day: int = 0) -> str:
    """One more version, published `day` days after the first of the month; returns its name."""
    tensor = torch.full((1, 2), float(seed))
    weights = adapters.to_bytes({"transformer.block.to_q.lora_A.weight": tensor}, 1, 1.0)
    manifest = AdapterManifest(base, "r" * 64, rank=1, alpha=1, owner=owner, consent="form-17")
    ref = adapters.publish(run, identity_id, weights, manifest)
    file = storage.join(ref.location, adapters.MANIFEST_NAME)
    created = f"2026-11-{day or seed:02d}T00:00:00+00:00"
    storage.write_json(file, storage.read_json(file) | {"created": created})
    return ref.version


@dataclass
class Clock:
    """Seconds that pass when a test says so."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["folder", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "folder" else f"memory://catalog-{uuid.uuid4().hex}/run"


def means(catalog: Catalog, name: str, who: Tenant = STUDIO, draw: float = 0.5) -> str | None:
    return catalog.resolve(name, who, draw=draw).version


def test_what_names_mean(run: str) -> None:
    one, two = publish(run, "ada", 2, day=1), publish(run, "ada", 1, day=2)
    clock = Clock()
    catalog = Catalog(run, "face-world", BASE, clock=clock)
    assert catalog.resolve("face-world", STUDIO, draw=0) == Target("face-world")
    assert catalog.resolve(f"face-world:ada@{one}", STUDIO, draw=0) == Target(
        model=f"face-world:ada@{one}",
        identity_id="ada",
        version=one,
        location=f"{run}/adapters/ada/{one}",
        owner="studio",
        consent="form-17",
    )
    assert means(catalog, "face-world:ada") == two  # the newest while prod is not set
    adapters.set_alias(run, "ada", "prod", one)
    adapters.set_alias(run, "ada", "beta", two)
    clock.now += 2
    assert means(catalog, "face-world:ada") == one
    assert means(catalog, "face-world:ada@prod") == one
    assert means(catalog, "face-world:ada@beta") == two
    assert means(catalog, "face-world:ada@latest") == two
    storage.read_bytes(catalog.resolve("face-world:ada", STUDIO, draw=0).location + "/manifest.json")


@pytest.mark.parametrize(
    "name",
    [
        "", "face", "face-world2", "face-world:", "face-world:@", "face-world:eve", "face-world:ada@",
        "face-world:ada@no", "face-world:ada@latest@latest", "other:ada", ":ada", "ada", "face-world:../ada",
        "face-world:ada/", "face-world:ADA", "face-world:ada@..", "face-world:ada@../ada", "face-world:.",
        "face-world:ada\n", "face-world:" + "a" * 5000,
    ],
)  # fmt: skip
def test_names_that_mean_nothing(tmp_path: Path, name: str) -> None:
    publish(str(tmp_path), "ada", 1)
    (tmp_path / "adapters" / "notes.txt").write_text("")
    catalog = Catalog(str(tmp_path), "face-world", BASE)
    with pytest.raises(UnknownModel) as caught:
        catalog.resolve(name, ADMIN, draw=0)
    assert len(str(caught.value)) < 400


def test_a_canary_gets_its_share(run: str) -> None:
    one, two = publish(run, "ada", 1), publish(run, "ada", 2)
    adapters.set_alias(run, "ada", "prod", one, canary_version=two, canary_share=0.1)
    catalog = Catalog(run, "face-world", BASE)
    draws = [step / 100 for step in range(100)]
    for name in ("face-world:ada", "face-world:ada@prod"):
        assert [means(catalog, name, draw=draw) for draw in draws] == [two] * 10 + [one] * 90


def test_only_the_owner_an_admin_and_who_was_granted_it_may_use_one(run: str) -> None:
    version = publish(run, "ada", 1)
    publish(run, "zoe", 1, owner="rival")
    catalog = Catalog(run, "face-world", BASE)
    for who in (STUDIO, ADMIN, tenant("rival", grants=("ada",))):
        assert means(catalog, "face-world:ada", who) == version
    texts = set()
    for name in ("ada", "eve"):  # there, and not
        for reference in ("", "@latest", f"@{version}", "@prod"):
            with pytest.raises(UnknownModel) as caught:
                catalog.resolve(f"face-world:{name}{reference}", RIVAL, draw=0)
            texts.add(str(caught.value).replace(f"face-world:{name}{reference}", "NAME"))
    assert len(texts) == 1
    assert [model.id for model in catalog.models(RIVAL)] == ["face-world", "face-world:zoe"]
    assert [model.id for model in catalog.models(tenant("guest"))] == ["face-world"]
    assert [model.id for model in catalog.models(ADMIN)] == ["face-world", "face-world:ada", "face-world:zoe"]


def test_a_version_of_another_owner_is_not_shown_with_the_own_ones(run: str) -> None:
    one, two = publish(run, "ada", 1), publish(run, "ada", 2, owner="rival")
    adapters.set_alias(run, "ada", "prod", one, canary_version=two, canary_share=1)
    adapters.set_alias(run, "ada", "beta", two)
    catalog = Catalog(run, "face-world", BASE)
    assert means(catalog, "face-world:ada") == one
    assert means(catalog, "face-world:ada@latest") == one
    (_, model) = catalog.models(STUDIO)
    assert (model.versions, model.aliases) == ((one,), {"prod": Alias(one)})


def test_models_have_versions_and_aliases_without_their_past(run: str) -> None:
    one, two = publish(run, "ada", 2, day=1), publish(run, "ada", 1, day=2)
    adapters.set_alias(run, "ada", "prod", two)
    adapters.set_alias(run, "ada", "prod", one, canary_version=two, canary_share=0.1)
    assert Catalog(run, "face-world", BASE).models(STUDIO) == [
        Model("face-world", 0, "magicid"),
        Model(
            id="face-world:ada",
            created=1793577600,  # 2026-11-02T00:00:00Z
            owned_by="studio",
            identity="ada",
            versions=(one, two),
            aliases={"prod": Alias(one, two, 0.1)},
        ),
    ]


def test_adapters_of_another_base_are_not_offered(run: str) -> None:
    one, foreign = publish(run, "ada", 1), publish(run, "ada", 2, base=OTHER)
    publish(run, "zoe", 1, base=OTHER)
    adapters.set_alias(run, "ada", "beta", foreign)
    catalog = Catalog(run, "face-world", BASE)
    assert means(catalog, "face-world:ada@latest") == one
    assert [model.id for model in catalog.models(ADMIN)] == ["face-world", "face-world:ada"]
    for name in (f"ada@{foreign}", "ada@beta", "zoe"):
        with pytest.raises(UnknownModel):
            catalog.resolve(f"face-world:{name}", ADMIN, draw=0)
    adapters.set_alias(run, "ada", "prod", foreign)  # what was chosen is not replaced by something else
    with pytest.raises(UnknownModel):
        Catalog(run, "face-world", BASE).resolve("face-world:ada", ADMIN, draw=0)


def test_changes_are_seen_after_the_refresh_time_and_not_before(run: str) -> None:
    one, clock = publish(run, "ada", 1), Clock()
    catalog = Catalog(run, "face-world", BASE, refresh_s=2, clock=clock)
    assert [model.identity for model in catalog.models(STUDIO)] == [None, "ada"]
    assert means(catalog, "face-world:ada") == one
    two = publish(run, "ada", 2)
    publish(run, "zoe", 1)
    clock.now += 1.9
    assert means(catalog, "face-world:ada") == one
    assert [model.identity for model in catalog.models(STUDIO)] == [None, "ada"]
    with pytest.raises(UnknownModel):
        catalog.resolve("face-world:zoe", STUDIO, draw=0)
    clock.now += 0.1
    assert means(catalog, "face-world:ada") == two
    assert means(catalog, "face-world:zoe") is not None
    adapters.set_alias(run, "ada", "prod", one)
    clock.now += 2
    assert means(catalog, "face-world:ada") == one
    adapters.set_alias(run, "ada", "prod", two)
    clock.now += 2
    assert means(catalog, "face-world:ada") == two
    adapters.rollback(run, "ada", "prod")
    clock.now += 2
    assert means(catalog, "face-world:ada") == one
    adapters.delete(run, "ada")
    clock.now += 2
    with pytest.raises(UnknownModel):
        catalog.resolve("face-world:ada", STUDIO, draw=0)
    assert [model.identity for model in catalog.models(STUDIO)] == [None, "zoe"]


def test_files_are_read_once(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for person in ("ada", "bea", "zoe"):
        for seed in (1, 2):
            version = publish(run, person, seed)
        adapters.set_alias(run, person, "prod", version)
    read, real = [], storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda location: (read.append(location), real(location))[1])
    clock = Clock()
    catalog = Catalog(run, "face-world", BASE, clock=clock)
    means(catalog, "face-world:ada")
    assert sorted(location.split("/adapters/")[1].split("/")[0] for location in read) == ["ada"] * 3  # not the others'
    catalog.models(STUDIO)
    assert len(read) == len(set(read)) == 9
    clock.now += 10
    catalog.models(STUDIO)
    means(catalog, "face-world:zoe")
    assert len(read) == 9
    adapters.set_alias(run, "zoe", "next", version)
    publish(run, "bea", 3)
    clock.now += 10
    read.clear()
    catalog.models(STUDIO)
    names = sorted(location.split("/adapters/")[1].split("/")[0] for location in read)
    assert names == ["bea", "zoe"]


def test_what_is_damaged_hides_nothing_else_and_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, clock = str(tmp_path), Clock()
    one, two = publish(run, "ada", 1), publish(run, "ada", 2)
    publish(run, "bea", 1), publish(run, "zoe", 1)
    adapters.set_alias(run, "bea", "prod", publish(run, "bea", 2))
    adapters.set_alias(run, "bea", "prod", publish(run, "bea", 3))
    (tmp_path / "adapters" / "ada" / two / "manifest.json").write_text("{")
    (tmp_path / "adapters" / "bea" / "aliases.json").write_text('{"prod": 5}')
    catalog = Catalog(run, "face-world", BASE, clock=clock)
    with caplog.at_level(logging.WARNING, "serve.catalog"):
        for _ in range(3):
            assert [model.identity for model in catalog.models(STUDIO)] == [None, "ada", "bea", "zoe"]
            assert means(catalog, "face-world:ada") == one
            assert means(catalog, "face-world:bea@latest") is not None
            with pytest.raises(UnknownModel):  # which one prod was cannot be known
                catalog.resolve("face-world:bea", STUDIO, draw=0)
            clock.now += 5
    assert len(caplog.messages) == 2
    assert any(two in message for message in caplog.messages)
    assert any("bea/aliases.json" in message for message in caplog.messages)
    publish(run, "ada", 2)  # repairs it
    clock.now += 5
    assert means(catalog, "face-world:ada") == two


def test_a_file_that_cannot_be_read_for_a_moment_is_tried_again(
    run: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one, clock, real = publish(run, "ada", 1), Clock(), storage.read_bytes

    def broken(location: str) -> bytes:
        raise StorageError("slow down", "wait")

    catalog = Catalog(run, "face-world", BASE, clock=clock)
    monkeypatch.setattr(storage, "read_bytes", broken)
    with pytest.raises(UnknownModel):
        catalog.resolve("face-world:ada", STUDIO, draw=0)
    monkeypatch.setattr(storage, "read_bytes", real)
    assert means(catalog, "face-world:ada") == one
    assert len(caplog.messages) == 1


def test_a_half_published_adapter_is_not_offered(tmp_path: Path) -> None:
    run = str(tmp_path)
    one, two = publish(run, "ada", 1), publish(run, "ada", 2)
    (tmp_path / "adapters" / "ada" / two / "manifest.json").unlink()
    assert means(Catalog(run, "face-world", BASE), "face-world:ada") == one


def test_locations_do_not_depend_on_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    publish("runs/demo", "ada", 1)
    location = Catalog("runs/demo", "face-world", BASE).resolve("face-world:ada", STUDIO, draw=0).location
    assert location is not None
    assert location.startswith(f"{tmp_path}/runs/demo/adapters/ada/")
    assert json.loads(Path(location, "manifest.json").read_text())["identity_id"] == "ada"


def test_a_run_without_adapters_serves_its_base(tmp_path: Path) -> None:
    catalog = Catalog(str(tmp_path / "nothing"), "face-world", BASE)
    assert catalog.models(STUDIO) == [Model("face-world", 0, "magicid")]
    assert catalog.resolve("face-world", STUDIO, draw=0) == Target("face-world")

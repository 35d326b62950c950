"""Model names -> adapters: `<base>`, `<base>:<identity>`, `<base>:<identity>@<version or alias>`.

Adapters and aliases are published and changed while the endpoint runs, perhaps on an object store: a look at it is one
listing of one identity (of all, for `models`; of names alone, for one not seen before), at most once in `refresh_s`. A
file is opened only when it is asked for and the listing says that it is new or changed. Names out of a request are
looked up in listings and never become part of a path.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from magicid import adapters, storage
from magicid.adapters import ALIASES_NAME, LATEST, MANIFEST_NAME, Alias
from magicid.errors import AdapterError, MagicIDError, StorageError
from serve.schema import Target
from serve.tenants import Tenant, may_use

DEFAULT_ALIAS = "prod"  # what a name without @ means, where it is set
_BASE_OWNER = "magicid"
_READERS = 16  # small files read at once: an object store answers each after tens of milliseconds

_log = logging.getLogger(__name__)


class UnknownModel(MagicIDError):
    """A name that stands for nothing this tenant may use; whether it stands for another's is not said."""


@dataclass(frozen=True)
class Model:
    """What a tenant may use: the base model, or one identity on it.

    Attributes:
        id: the name that resolves to it.
        created: when its newest version was published, Unix seconds; 0 for the base model.
        versions: oldest first.
        aliases: by name; those whose version is not offered are left out, and so are pasts.
    """

    id: str
    created: int
    owned_by: str
    identity: str | None = None
    versions: tuple[str, ...] = ()
    aliases: dict[str, Alias] = field(default_factory=dict)


@dataclass(frozen=True)
class _Version:
    """A published adapter of this base model."""

    version: str
    location: str
    owner: str
    consent: str | None
    created: str  # ISO 8601


@dataclass(frozen=True)
class _Person:
    """What was last seen of an identity: versions oldest first; aliases None where their file cannot be read."""

    versions: tuple[_Version, ...] = ()
    aliases: dict[str, Alias] | None = field(default_factory=dict)


class Catalog:
    """The models of one base and one run directory. Safe for several threads; its calls read storage.

    Args:
        run: run directory, a path or URL.
        base: the base model's name.
        base_sha256: its hash; adapters of another base are not offered.
        refresh_s: for how long a listing is believed.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        run: str,
        base: str,
        base_sha256: str,
        *,
        refresh_s: float = 2,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        fs, path = storage.open_fs(run)
        # Locations travel to processes with other working directories.
        self._run = path if isinstance(fs, LocalFileSystem) else run
        self._top = storage.join(self._run, "adapters")
        self._base, self._base_sha256 = base, base_sha256
        self.refresh_s, self._clock = refresh_s, clock
        self._lock = threading.Lock()
        self._listed: dict[str, dict[str, str]] = {}  # identity -> file below its folder -> fingerprint
        self._listed_at: dict[str | None, float] = {}  # by identity; None: all of them
        self._names_at = float("-inf")
        self._files: dict[str, tuple[str, Any]] = {}  # location -> fingerprint in the listing, content
        self._warned: set[str] = set()

    def models(self, tenant: Tenant) -> list[Model]:
        """The base model and the identities this tenant may use, by id. Raises StorageError."""
        with self._lock:
            self._list(None)
            people = self._read_people(sorted(self._listed))
        found = [Model(self._base, 0, _BASE_OWNER)]
        for identity_id, person in people.items():
            versions = _usable(person, identity_id, tenant)
            if not versions:
                continue
            names = {version.version for version in versions}
            offered = {
                name: _public(alias, names)
                for name, alias in sorted((person.aliases or {}).items())
                if alias.version in names
            }
            newest = versions[-1]
            found.append(
                Model(
                    id=f"{self._base}:{identity_id}",
                    created=_unix_seconds(newest.created),
                    owned_by=newest.owner,
                    identity=identity_id,
                    versions=tuple(version.version for version in versions),
                    aliases=offered,
                )
            )
        return found

    def resolve(self, name: str, tenant: Tenant, *, draw: float) -> Target:
        """What a model name means now.

        Without `@` an identity means its alias `prod` where that is set, else its newest version, as `@latest` does.

        Args:
            draw: uniform in [0, 1); below an alias's canary share it means the canary.

        Raises:
            UnknownModel: there is no such model, or not for this tenant: the text is the same.
            StorageError: the run directory cannot be listed.
        """
        if name == self._base:
            return Target(self._base)
        unknown = UnknownModel(
            f"the model {name[:200]!r} does not exist or this key may not use it",
            "GET /v1/models lists what it may use",
        )
        prefix = f"{self._base}:"
        if not name.startswith(prefix):
            raise unknown
        identity_id, at, reference = name.removeprefix(prefix).partition("@")
        with self._lock:
            if identity_id not in self._listed:
                self._list_names()
            if identity_id not in self._listed:
                raise unknown
            self._list(identity_id)
            person = self._read_people([identity_id])[identity_id]
        versions = _usable(person, identity_id, tenant)
        found = _choose(person, versions, reference if at else None, draw)
        if found is None:
            raise unknown
        return Target(
            model=f"{self._base}:{identity_id}@{found.version}",
            identity_id=identity_id,
            version=found.version,
            location=found.location,
            owner=found.owner,
            consent=found.consent,
        )

    def _list_names(self) -> None:
        """Note identities that are new, unless that was done less than `refresh_s` ago."""
        now = self._clock()
        if now - max(self._names_at, self._listed_at.get(None, float("-inf"))) >= self.refresh_s:
            found: dict[str, dict[str, str]] = {name: {} for name in adapters.list_folders(self._run)}
            self._listed = found | self._listed
            self._names_at = now

    def _list(self, identity_id: str | None) -> None:
        """List one identity or all, unless that was done less than `refresh_s` ago."""
        now = self._clock()
        seen = [self._listed_at[key] for key in (identity_id, None) if key in self._listed_at]
        if seen and now - max(seen) < self.refresh_s:
            return
        found = adapters.listing(self._run, identity_id)
        if identity_id is None:
            self._listed, self._listed_at = found, {None: now}
            wanted = {self._location(person, name) for person, files in found.items() for name in files}
            self._files = {location: file for location, file in self._files.items() if location in wanted}
        else:
            self._listed.pop(identity_id, None)
            self._listed |= found
            self._listed_at[identity_id] = now

    def _location(self, identity_id: str, *parts: str) -> str:
        return "/".join((self._top, identity_id, *parts))

    def _read_people(self, identity_ids: list[str]) -> dict[str, _Person]:
        """The listed state of these identities; files that are new or changed are read."""
        jobs: list[tuple[str, str, Callable[[bytes, str], Any]]] = []
        for person in identity_ids:
            files = self._listed.get(person, {})
            manifests = [f"{version}/{MANIFEST_NAME}" for version in adapters.whole_versions(files)]
            for name in [*manifests, *([ALIASES_NAME] if ALIASES_NAME in files else [])]:
                location = self._location(person, name)
                if self._files.get(location, ("",))[0] != files[name]:
                    parse = adapters.parse_aliases if name == ALIASES_NAME else adapters.parse_manifest
                    jobs.append((location, files[name], parse))
        if jobs:
            with ThreadPoolExecutor(min(_READERS, len(jobs))) as pool:
                list(pool.map(lambda job: self._read(*job), jobs))
        return {person: self._person(person, self._listed.get(person, {})) for person in identity_ids}

    def _read(self, location: str, fingerprint: str, parse: Callable[[bytes, str], Any]) -> None:
        """Content None where a file is damaged; one that cannot be read now keeps what it held and is tried again."""
        try:
            self._files[location] = (fingerprint, parse(storage.read_bytes(location), location))
            self._warned.discard(location)
        except (AdapterError, StorageError) as error:
            if isinstance(error, AdapterError):
                self._files[location] = (fingerprint, None)
            self._warn(location, str(error))

    def _person(self, identity_id: str, files: dict[str, str]) -> _Person:
        def content(name: str) -> Any:
            return self._files.get(self._location(identity_id, name), ("", None))[1]

        versions = []
        for version in adapters.whole_versions(files):
            manifest = content(f"{version}/{MANIFEST_NAME}")
            if manifest is not None and manifest["base_sha256"] == self._base_sha256:
                versions.append(
                    _Version(
                        version=version,
                        location=self._location(identity_id, version),
                        owner=str(manifest.get("owner") or ""),
                        consent=str(manifest.get("consent") or "") or None,
                        created=str(manifest.get("created") or ""),
                    )
                )
        versions.sort(key=lambda version: (version.created, version.version))
        return _Person(tuple(versions), content(ALIASES_NAME) if ALIASES_NAME in files else {})

    def _warn(self, location: str, problem: str) -> None:
        """Once for each file until it is whole again."""
        if location not in self._warned:
            self._warned.add(location)
            _log.warning("not offered: %s", problem)


def _usable(person: _Person, identity_id: str, tenant: Tenant) -> list[_Version]:
    """The versions this tenant may use, oldest first."""
    return [version for version in person.versions if may_use(tenant, identity_id, version.owner)]


def _choose(person: _Person, versions: Iterable[_Version], reference: str | None, draw: float) -> _Version | None:
    """The version that a version, an alias, `latest` or (None) no reference means."""
    known = {version.version: version for version in versions}
    if not known:
        return None
    newest = next(reversed(known.values()))
    if reference == LATEST:
        return newest
    if reference in known:
        return known[reference]
    if person.aliases is None:  # which version its owner chose cannot be known: none is better than the wrong one
        return None
    alias = person.aliases.get(DEFAULT_ALIAS if reference is None else reference)
    if alias is None:
        return newest if reference is None else None
    if alias.canary_version in known and draw < alias.canary_share:
        return known[alias.canary_version]
    return known.get(alias.version)


def _public(alias: Alias, offered: set[str]) -> Alias:
    """An alias without its past, and without a canary that is not offered."""
    if alias.canary_version not in offered:
        return Alias(alias.version)
    return replace(alias, previous=())


def _unix_seconds(created: str) -> int:
    try:
        return int(datetime.fromisoformat(created).timestamp())
    except ValueError:
        return 0

"""Published adapters: `adapters/<identity>/<version>/`, a LoRA file for the pipeline's own loader, and a manifest.

The version is the start of the file's SHA-256, so publishing the same adapter twice changes nothing. Names that stand
for versions are kept beside them in `adapters/<identity>/aliases.json`: one small file, replaced as a whole, so that a
reader sees the old names or the new ones and of two writers the last one wins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import fsspec
from pydantic import Field, TypeAdapter, ValidationError

import magicid
from magicid import storage
from magicid.errors import AdapterError, StorageError
from magicid.storage import join, public_name, read_bytes, sha256_bytes, write_bytes, write_json

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # what `load_lora_weights` looks for in a folder
MANIFEST_NAME = "manifest.json"
ALIASES_NAME = "aliases.json"
LATEST = "latest"  # always the newest version; no alias of its own
_PREFIX = "transformer"
_VERSION_LENGTH = 12
_VERSION = re.compile(rf"[0-9a-f]{{{_VERSION_LENGTH}}}")
_ALIAS = re.compile(r"[A-Za-z0-9_-]{1,63}")
_IDENTITY = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class AdapterManifest:
    """What an adapter was made of. Hashes are hex SHA-256; empty where there is none (an SFT adapter has no pairs)."""

    base_sha256: str
    recipe_sha256: str
    rank: int
    alpha: float
    owner: str = ""
    consent: str = ""
    pairs_sha256: str = ""
    reference_sha256: str = ""
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterRef:
    """A published adapter; `location` is its folder, `sha256` that of the weights file."""

    identity_id: str
    version: str
    location: str
    sha256: str

    @property
    def weights(self) -> str:
        """Location of the weights file."""
        return join(self.location, WEIGHTS_NAME)


@dataclass(frozen=True)
class Alias:
    """A name that stands for a version of an identity's adapter.

    Attributes:
        canary_version: the version that `canary_share` (0..1) of the requests get instead; None: no canary runs.
        previous: the versions it stood for before, the last one last.
    """

    version: str
    canary_version: str | None = None
    canary_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    previous: tuple[str, ...] = ()


_ALIASES = TypeAdapter(dict[str, Alias])


def publish(
    run: str,
    identity_id: str,
    weights: bytes,
    manifest: AdapterManifest,
) -> AdapterRef:
    """Write an adapter and its manifest under `run`; the manifest comes last and marks it whole.

    Args:
        weights: a file made by `to_bytes`.

    Raises:
        StorageError: the location cannot be written.
    """
    digest = sha256_bytes(weights)
    version = digest[:_VERSION_LENGTH]
    ref = AdapterRef(identity_id, version, join(run, "adapters", identity_id, version), digest)
    try:
        verify(ref.location, manifest.base_sha256)
    except AdapterError:  # not there yet, or damaged
        write_bytes(ref.weights, weights)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        content = asdict(manifest) | {
            "identity_id": identity_id,
            "version": version,
            "sha256": digest,
            "created": created,
            "magicid_version": magicid.__version__,
        }
        write_json(join(ref.location, MANIFEST_NAME), content)
    return ref


def to_bytes(published: dict[str, Tensor], rank: int, alpha: float) -> bytes:
    """LoRA tensors under published names as a safetensors file, with the metadata from which diffusers takes rank and
    alpha. The same tensors always give the same bytes (one metadata key: several are written in random order)."""
    import safetensors.torch  # where adapters are listed and published, nobody needs torch

    modules = sorted(
        {name.removeprefix(f"{_PREFIX}.").rsplit(".lora_", 1)[0] for name in published if ".lora_A." in name}
    )
    config = {"r": rank, "lora_alpha": alpha, "target_modules": modules}
    metadata = {"lora_adapter_metadata": json.dumps({f"{_PREFIX}.{k}": v for k, v in config.items()}, sort_keys=True)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(published.items())}
    return safetensors.torch.save(tensors, metadata=metadata)


def verify(location: str, base_sha256: str | None = None) -> dict[str, Any]:
    """Check an adapter folder; returns its manifest.

    Args:
        base_sha256: the base it shall be used with; None: not compared.

    Raises:
        AdapterError: a file is missing, truncated, corrupt or not safetensors, or it was made for another base.
    """
    weights = join(location, WEIGHTS_NAME)
    manifest = read_manifest(location)
    try:
        data = read_bytes(weights)
    except StorageError as error:
        raise AdapterError(f"adapter {location} is not whole: {error.problem}", "publish it again") from error
    if sha256_bytes(data) != manifest["sha256"]:
        raise AdapterError(
            f"{weights} is truncated or corrupt: its SHA-256 differs from the manifest's", "publish it again"
        )
    load(weights)
    if base_sha256 is not None and manifest["base_sha256"] != base_sha256:
        raise AdapterError(
            f"adapter {location} was made for base model {manifest['base_sha256'][:12]}, not {base_sha256[:12]}",
            "use it with its own base model, or train it again on this one",
        )
    return manifest


def load(weights: str) -> dict[str, Tensor]:
    """The tensors of a weights file, by published name. Raises AdapterError (missing, not safetensors, no LoRA)."""
    import safetensors.torch

    try:
        tensors = safetensors.torch.load(read_bytes(weights))
    except (StorageError, safetensors.SafetensorError) as error:
        raise AdapterError(f"{weights} is not a safetensors file: {error}", "publish the adapter again") from error
    if not tensors or not all(".lora_" in name for name in tensors):
        raise AdapterError(f"{weights} holds no LoRA tensors", "publish the adapter again")
    return dict(tensors)


def read_manifest(location: str) -> dict[str, Any]:
    """The manifest in an adapter's folder. Raises AdapterError: missing, not JSON, or without its keys."""
    try:
        data = read_bytes(join(location, MANIFEST_NAME))
    except StorageError as error:
        raise AdapterError(f"adapter {location} is not whole: {error.problem}", "publish it again") from error
    return parse_manifest(data, location)


def parse_manifest(data: bytes, location: str) -> dict[str, Any]:
    """A manifest from its bytes; `location` is for messages. Raises AdapterError: not JSON, or without its keys."""
    try:
        manifest = json.loads(data)
    except ValueError as error:
        problem = f"adapter {public_name(location)} is not whole: {MANIFEST_NAME} is not valid JSON: {error}"
        raise AdapterError(problem, "publish it again") from error
    if not isinstance(manifest, dict) or not {"sha256", "base_sha256", "rank", "alpha"} <= manifest.keys():
        raise AdapterError(f"adapter {public_name(location)}: {MANIFEST_NAME} lacks its keys", "publish it again")
    return manifest


def listing(run: str, identity_id: str | None = None) -> dict[str, dict[str, str]]:
    """What lies under `adapters/`, of all identities or one, by a single listing; no file is opened.

    Returns:
        identity -> `<version>/manifest.json`, `aliases.json`, ... -> a text that changes when the file does.

    Raises:
        StorageError: the storage cannot be listed.
    """
    folder = join(run, "adapters") if identity_id is None else _folder(run, identity_id)
    with _listed(folder) as (fs, path):
        try:
            found = fs.find(path, detail=True)
        except FileNotFoundError:
            found = {}
    people: dict[str, dict[str, str]] = {}
    for file, properties in found.items():
        below = file[len(path.rstrip("/")) + 1 :]
        person, _, name = below.partition("/") if identity_id is None else (identity_id, "", below)
        if name and not name.endswith(".partial"):
            people.setdefault(person, {})[name] = str(properties)
    return people


def list_folders(run: str) -> list[str]:
    """The names under `adapters/`, by a listing of one level: what may be an identity. Raises StorageError."""
    with _listed(join(run, "adapters")) as (fs, path):
        try:
            found = fs.ls(path, detail=False)
        except FileNotFoundError:
            found = []
    return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in found)


def whole_versions(files: dict[str, str]) -> list[str]:
    """The versions in one identity's part of a `listing` that have both files, sorted by name."""
    folders = {name.split("/")[0] for name in files if name.count("/") == 1}
    return sorted(v for v in folders if f"{v}/{MANIFEST_NAME}" in files and f"{v}/{WEIGHTS_NAME}" in files)


def list_identities(run: str) -> list[str]:
    """The identities with a published adapter, sorted."""
    return sorted(identity_id for identity_id, files in listing(run).items() if whole_versions(files))


def list_versions(run: str, identity_id: str) -> list[AdapterRef]:
    """The published adapters of an identity, oldest first; those with a damaged manifest are left out."""
    found = []
    for version in whole_versions(listing(run, identity_id).get(identity_id, {})):
        location = join(_folder(run, identity_id), version)
        try:
            manifest = read_manifest(location)
        except AdapterError:  # `verify` says why
            continue
        created = str(manifest.get("created", ""))
        found.append((created, AdapterRef(identity_id, version, location, manifest["sha256"])))
    return [ref for _, ref in sorted(found, key=lambda item: (item[0], item[1].version))]


def aliases(run: str, identity_id: str) -> dict[str, Alias]:
    """The aliases of an identity by name; {} where none was set. Raises AdapterError when the file is damaged."""
    file = join(_folder(run, identity_id), ALIASES_NAME)
    return parse_aliases(read_bytes(file), file) if storage.exists(file) else {}


def parse_aliases(data: bytes, location: str) -> dict[str, Alias]:
    """Aliases from a file's bytes; `location` is for messages. Raises AdapterError: not JSON, or not of this form."""
    try:
        return _ALIASES.validate_json(data)
    except ValidationError as error:
        problem = f"{public_name(location)} is damaged: {error.errors()[0]['msg']}"
        raise AdapterError(problem, "remove it and set the aliases again") from error


def set_alias(
    run: str,
    identity_id: str,
    alias: str,
    version: str,
    *,
    canary_version: str | None = None,
    canary_share: float = 0.0,
) -> Alias:
    """Make a name stand for a version; what it stood for before is kept for `rollback`. Ends a canary that runs.

    Args:
        alias: letters, digits, `-` and `_`; neither `latest` nor of the form of a version.
        canary_version: a second version for `canary_share` (above 0, at most 1) of the requests; both or neither.

    Raises:
        AdapterError: a name that cannot be an alias, a version that is not published or damaged, or a canary without
            share or share without canary.
        StorageError: the location cannot be written.
    """
    if not _ALIAS.fullmatch(alias) or alias == LATEST or _VERSION.fullmatch(alias):
        raise AdapterError(
            f"{alias!r} cannot be an alias",
            f"use up to 63 letters, digits, - and _; neither {LATEST!r} nor {_VERSION_LENGTH} hex digits as a version",
        )
    if not (0 < canary_share <= 1 if canary_version else canary_share == 0):
        raise AdapterError(
            f"alias {alias}: a canary share of {canary_share:g} with canary {canary_version or 'none'}",
            "give a canary version together with a share above 0 and at most 1",
        )
    there = whole_versions(listing(run, identity_id).get(identity_id, {}))
    for wanted in (version, canary_version) if canary_version else (version,):
        if wanted not in there:
            raise AdapterError(f"{identity_id} has no adapter {wanted!r}", f"it has: {', '.join(there) or 'none'}")
        verify(join(_folder(run, identity_id), wanted))
    table = aliases(run, identity_id)
    old = table.get(alias)
    previous = () if old is None else old.previous if old.version == version else (*old.previous, old.version)
    return _write_alias(run, identity_id, table, alias, Alias(version, canary_version, canary_share, previous))


def rollback(run: str, identity_id: str, alias: str) -> Alias:
    """Undo the last change of an alias: end the canary if one runs, else go back to the version before.

    Raises:
        AdapterError: no such alias, or nothing to go back to.
    """
    table = aliases(run, identity_id)
    if alias not in table:
        known = ", ".join(sorted(table)) or "none"
        raise AdapterError(f"identity {identity_id} has no alias {alias!r}", f"its aliases: {known}")
    now = table[alias]
    if now.canary_version is not None:
        return _write_alias(run, identity_id, table, alias, Alias(now.version, previous=now.previous))
    if not now.previous:
        raise AdapterError(
            f"alias {alias} of {identity_id} has only ever been {now.version}", "set it to another version instead"
        )
    return _write_alias(run, identity_id, table, alias, Alias(now.previous[-1], previous=now.previous[:-1]))


def delete(run: str, identity_id: str, version: str | None = None) -> list[str]:
    """Remove one version, whole or damaged, or everything of an identity; returns the versions removed.

    Raises:
        AdapterError: no such adapter, or a single version that an alias names.
        StorageError: a file cannot be removed.
    """
    folder = _folder(run, identity_id)
    files = listing(run, identity_id).get(identity_id)
    if not files:
        raise AdapterError(f"run {run} has no adapter of {identity_id}", "`magicid adapters list` shows those it has")
    there = sorted({name.split("/")[0] for name in files if "/" in name})
    removed = there if version is None else [version]
    if version is not None:
        if version not in there:
            raise AdapterError(f"{identity_id} has no adapter {version!r}", f"it has: {', '.join(there)}")
        _forget(run, identity_id, version)
    for each in removed:  # first what marks it whole, so that no reader meets half of it
        storage.remove(join(folder, each, MANIFEST_NAME))
    for place in [folder] if removed == there else [join(folder, each) for each in removed]:
        storage.remove(place)
    return removed


def _forget(run: str, identity_id: str, version: str) -> None:
    """Take a version out of the aliases' pasts. Raises AdapterError when one of them names it."""
    table = aliases(run, identity_id)
    named = sorted(name for name, alias in table.items() if version in (alias.version, alias.canary_version))
    if named:
        raise AdapterError(
            f"{identity_id}@{version} is in use as {', '.join(named)}",
            "let the alias stand for another version first, or delete all versions",
        )
    kept = {name: replace(a, previous=tuple(v for v in a.previous if v != version)) for name, a in table.items()}
    if kept != table:
        _write_aliases(run, identity_id, kept)


def _write_alias(run: str, identity_id: str, table: dict[str, Alias], name: str, alias: Alias) -> Alias:
    _write_aliases(run, identity_id, table | {name: alias})
    return alias


def _write_aliases(run: str, identity_id: str, table: dict[str, Alias]) -> None:
    content = _ALIASES.dump_python(table, mode="json")
    write_json(join(_folder(run, identity_id), ALIASES_NAME), content)


def _folder(run: str, identity_id: str) -> str:
    """An identity's folder; names may come from a command line or a request."""
    if not _IDENTITY.fullmatch(identity_id):
        raise AdapterError(f"{identity_id!r} is not an identity's id", "use letters, digits, - and _")
    return join(run, "adapters", identity_id)


@contextmanager
def _listed(folder: str) -> Iterator[tuple[fsspec.AbstractFileSystem, str]]:
    """The file system of a folder and the path in it; whatever goes wrong in listing it becomes a StorageError."""
    fs, path = storage.open_fs(folder)
    try:
        yield fs, path
    except Exception as error:  # each object store raises types of its own
        problem = f"cannot list {public_name(folder)}: {storage.public_text(str(error))}"
        raise StorageError(problem, "check that the folder is readable") from error

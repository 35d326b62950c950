"""Published adapters: `adapters/<identity>/<version>/`, a LoRA file for the pipeline's own loader, and a manifest.

The version is the start of the file's SHA-256, so publishing the same adapter twice changes nothing.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import safetensors.torch
from torch import Tensor

import magicid
from magicid.errors import AdapterError, StorageError
from magicid.storage import exists, join, list_files, read_bytes, read_json, sha256_bytes, write_bytes, write_json

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # what `load_lora_weights` looks for in a folder
MANIFEST_NAME = "manifest.json"
_PREFIX = "transformer"
_VERSION_LENGTH = 12


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
    try:
        manifest = read_json(join(location, MANIFEST_NAME))
        data = read_bytes(weights)
    except StorageError as error:
        raise AdapterError(f"adapter {location} is not whole: {error.problem}", "publish it again") from error
    if not isinstance(manifest, dict) or not {"sha256", "base_sha256", "rank", "alpha"} <= manifest.keys():
        raise AdapterError(f"adapter {location}: {MANIFEST_NAME} lacks its keys", "publish it again")
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
    try:
        tensors = safetensors.torch.load(read_bytes(weights))
    except (StorageError, safetensors.SafetensorError) as error:
        raise AdapterError(f"{weights} is not a safetensors file: {error}", "publish the adapter again") from error
    if not tensors or not all(".lora_" in name for name in tensors):
        raise AdapterError(f"{weights} holds no LoRA tensors", "publish the adapter again")
    return dict(tensors)


def list_versions(run: str, identity_id: str) -> list[AdapterRef]:
    """The published adapters of an identity, oldest first."""
    folder = join(run, "adapters", identity_id)
    found = []
    for file in list_files(folder, MANIFEST_NAME):
        manifest = read_json(file)
        location = file.removesuffix(f"/{MANIFEST_NAME}")
        if exists(join(location, WEIGHTS_NAME)):
            found.append(
                (manifest["created"], AdapterRef(identity_id, manifest["version"], location, manifest["sha256"]))
            )
    return [ref for _, ref in sorted(found, key=lambda item: (item[0], item[1].version))]

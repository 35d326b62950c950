"""The routes of models and identities: what a key may use, and the removal of a person."""

from __future__ import annotations

from time import sleep
from typing import Annotated

from fastapi import APIRouter, Path

from magicid import adapters
from magicid.erasure import erase_person
from magicid.errors import AdapterError
from magicid.run import Run, identity_uri
from serve.api_call import Authorized, Call
from serve.api_errors import ApiError
from serve.api_models import Alias, IdentityDeleted, Model, ModelList
from serve.schema import Job

router = APIRouter(tags=["identities"])


@router.get("/v1/models")
def list_models(call: Authorized) -> ModelList:
    """The base model and the identities that this key may use, with versions and aliases."""
    data = []
    for model in call.context.parts.catalog.models(call.tenant):
        aliases = {
            name: Alias(version=a.version, canary_version=a.canary_version, canary_share=a.canary_share)
            for name, a in model.aliases.items()
        }
        data.append(
            Model(
                id=model.id,
                created=model.created,
                owned_by=model.owned_by,
                identity=model.identity,
                versions=list(model.versions),
                aliases=aliases,
            )
        )
    return ModelList(data=data)


@router.delete("/v1/identities/{identity_id}")
def delete_identity(
    call: Authorized, identity_id: Annotated[str, Path(description="`identity` of a model")]
) -> IdentityDeleted:
    """Remove a person: adapters, photos, embeddings, training files, and every video of them, whoever asked for it.

    For the identity's owner and for admins. What is in progress is stopped.
    """
    run = call.context.settings.adapters
    owners = _owners(call, identity_id)
    # Records first, so that nothing more is made of what is there; adapters last, for without them the identity is no
    # longer found and an interrupted removal could not be asked for again (only by an admin where no manifest is whole:
    # the run's record of the owner is gone by then). Then the records that came meanwhile: each process of the API
    # believes what it last saw of the adapters for a while, and takes in videos of them.
    videos = _purge(call, identity_id, owners)
    files = erase_person(run, identity_id)
    try:
        removed = adapters.delete(run, identity_id)
    except AdapterError:  # the same removal, asked for twice at once
        removed = []
    sleep(call.context.parts.catalog.refresh_s)
    videos += _purge(call, identity_id, owners)
    call.note("identity.delete", identity_id, owners=sorted(owners), adapters=removed, files=len(files), videos=videos)
    return IdentityDeleted(id=identity_id, adapters=removed, files=len(files), videos=videos)


def _owners(call: Call, identity_id: str) -> set[str]:
    """To whom the identity's adapters belong, of this base model and of others.

    Raises:
        ApiError: 404 alike for an unknown identity and one that this key may not use; 403 for a guest.
    """
    run = call.context.settings.adapters
    unknown = ApiError(
        404,
        "identity_not_found",
        "no such identity, or this key may not use it: GET /v1/models lists those it may",
        param="identity_id",
    )
    if identity_id not in adapters.listing(run):  # looked up, never made part of a path before that
        raise unknown
    refs = adapters.list_versions(run, identity_id)
    published = {str(adapters.read_manifest(ref.location).get("owner") or "") for ref in refs}
    owners = published or _trained_for(run, identity_id)
    if call.tenant.admin:
        return owners or call.jobs.owners_of(identity_id)
    if owners == {call.tenant.name}:
        return owners
    if call.tenant.name in published or (published and identity_id in call.tenant.grants):
        raise ApiError(403, "not_the_owner", "only the identity's owner or an admin may delete it", param="identity_id")
    raise unknown


def _trained_for(run: str, identity_id: str) -> set[str]:
    """Whose the identity is by the run's own record of it, where every manifest is damaged; empty: not known."""
    found = Run(run)
    return {found.identity(identity_id).owner} if found.has(identity_uri(identity_id)) else set()


def _purge(call: Call, identity_id: str, owners: set[str]) -> int:
    """Remove the identity's videos and their records; returns how many there were."""
    removed = 0
    for owner in owners:
        before = call.jobs.of_identity(identity_id, owner)
        _remove_files(call, before)  # while the records still say where they are
        purged = call.jobs.purge_identity(identity_id, owner)
        _remove_files(call, purged)  # those finished in between
        removed += len(purged)
    return removed


def _remove_files(call: Call, jobs: list[Job]) -> None:
    for job in jobs:
        call.context.clips.remove_all(job)

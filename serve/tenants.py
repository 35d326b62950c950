"""Who may use the endpoint: tenants, their keys, their share and limits, and the identities granted to them."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import sqlalchemy as sa

from magicid.errors import MagicIDError
from serve.database import Database, grants, tenants

_PREFIX_LENGTH = 12  # of a key: stored in the clear to find its row; too little of it to be of use
_SHORTEST_KEY = 32
_BELIEVED_S = 1.0  # what a process knows of a key; a removed one works this long in others than the remover's
_BY_PREFIX = sa.select(tenants).where(tenants.c.key_prefix == sa.bindparam("prefix"))


class TenantError(MagicIDError):
    """A tenant that cannot be added, changed or found."""


@dataclass(frozen=True)
class Tenant:
    """One user of the endpoint.

    Attributes:
        admin: may see and use everything.
        weight: share of the work while others wait too, relative to theirs.
        max_open: videos that may wait or run at once.
        grants: ids of others' identities that this tenant may use.
    """

    name: str
    admin: bool
    weight: float
    max_open: int
    requests_per_minute: int
    grants: frozenset[str]


def may_use(tenant: Tenant, identity_id: str, owner: str | None) -> bool:
    """Whether a tenant may make videos of an identity."""
    return tenant.admin or owner == tenant.name or identity_id in tenant.grants


class TenantStore:
    """All tenants. Of a key only a salted hash is kept: a key is long and random, so one SHA-256 is enough."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock
        self._lock = threading.Lock()
        self._known: dict[bytes, tuple[float, Tenant]] = {}  # by hash of the key: believed until then (monotonic)
        self._paid: dict[str, int] = {}  # requests that the bucket has been charged for and that have not come

    def add(
        self,
        name: str,
        *,
        key: str | None = None,
        admin: bool = False,
        weight: float = 1.0,
        max_open: int = 100,
        requests_per_minute: int = 600,
        grants: Iterable[str] = (),
    ) -> str:
        """Add a tenant and return its key, which cannot be read again.

        Args:
            key: a random key made elsewhere, of 32 characters or more; None makes one.

        Raises:
            TenantError: the name is taken, or a value cannot be.
        """
        _check(name, key, weight, max_open, requests_per_minute)
        key = key or f"mid_{secrets.token_urlsafe(32)}"
        salt = secrets.token_bytes(16)
        values = {
            "name": name,
            "key_prefix": key[:_PREFIX_LENGTH],
            "key_salt": salt,
            "key_hash": _hash(salt, key),
            "admin": admin,
            "weight": weight,
            "max_open": max_open,
            "requests_per_minute": requests_per_minute,
            "tokens": float(requests_per_minute),
            "tokens_at": self._clock(),
        }
        try:
            with self._database.session() as connection:
                connection.execute(sa.insert(tenants).values(values))
                for identity_id in set(grants):
                    _grant(connection, name, identity_id)
        except sa.exc.IntegrityError as error:
            raise TenantError(f"there is a tenant {name!r} already", "remove it first to give it a new key") from error
        return key

    def authenticate(self, key: str) -> Tenant | None:
        """The tenant whose key this is, as it was at most a second ago; None: nobody's."""
        if not _is_plain(key):
            return None
        name, now = _hash(b"", key), time.monotonic()
        until, known = self._known.get(name, (0.0, None))
        if known is not None and now < until:
            return known
        with self._database.reading() as connection:
            for row in connection.execute(_BY_PREFIX, {"prefix": key[:_PREFIX_LENGTH]}).mappings().all():
                if hmac.compare_digest(_hash(row["key_salt"], key), row["key_hash"]):
                    found = _tenant(row, _granted(connection, row["name"]))
                    with self._lock:
                        self._known = {k: v for k, v in self._known.items() if v[0] > now}
                        self._known[name] = (now + _BELIEVED_S, found)
                    return found
        return None

    def grant(self, name: str, identity_id: str) -> None:
        """Let a tenant use another's identity. Raises TenantError: no such tenant."""
        with self._database.session() as connection:
            _require(connection, name)
            if identity_id not in _granted(connection, name):
                _grant(connection, name, identity_id)
        self._forget()

    def revoke(self, name: str, identity_id: str) -> None:
        """Take a grant back, if there is one. Raises TenantError: no such tenant."""
        with self._database.session() as connection:
            _require(connection, name)
            where = (grants.c.tenant == name, grants.c.identity_id == identity_id)
            connection.execute(sa.delete(grants).where(*where))
        self._forget()

    def remove(self, name: str) -> None:
        """Remove a tenant: its key stops working, its videos stay until they expire. Raises TenantError."""
        with self._database.session() as connection:
            _require(connection, name)
            connection.execute(sa.delete(tenants).where(tenants.c.name == name))
        self._forget()

    def _forget(self) -> None:
        with self._lock:
            self._known = {}

    def list(self) -> list[Tenant]:
        """All tenants, by name."""
        with self._database.reading() as connection:
            rows = connection.execute(sa.select(tenants).order_by(tenants.c.name)).mappings().all()
            return [_tenant(row, _granted(connection, row["name"])) for row in rows]

    def take(self, tenant: Tenant) -> float:
        """Count one request of a tenant against its rate, over all the endpoint's processes.

        The bucket in the database is charged for a second's worth at a time, so that not every poll writes there.

        Returns:
            0.0: go on; else the seconds until there is room for one more. A minute's worth may come at once.
        """
        with self._lock:
            if self._paid.get(tenant.name):
                self._paid[tenant.name] -= 1
                return 0.0
        rate = tenant.requests_per_minute / 60
        with self._database.session() as connection:
            query = sa.select(tenants.c.tokens, tenants.c.tokens_at).where(tenants.c.name == tenant.name)
            row = connection.execute(query.with_for_update()).first()
            if row is None:
                return 0.0  # removed since it was authenticated: its next request is refused
            now = max(self._clock(), row.tokens_at)  # clocks of several machines differ a little
            tokens = min(float(tenant.requests_per_minute), row.tokens + (now - row.tokens_at) * rate)
            if tokens < 1:
                return (1 - tokens) / rate
            charged = min(int(tokens), max(1, int(rate)))
            update = sa.update(tenants).where(tenants.c.name == tenant.name)
            connection.execute(update.values(tokens=tokens - charged, tokens_at=now))
        with self._lock:
            self._paid[tenant.name] = self._paid.get(tenant.name, 0) + charged - 1
        return 0.0


def _check(name: str, key: str | None, weight: float, max_open: int, requests_per_minute: int) -> None:
    if not name or not name.isprintable():
        raise TenantError(f"{name!r} cannot be a tenant's name", "use a few printable characters")
    if key is not None and not (len(key) >= _SHORTEST_KEY and _is_plain(key)):
        raise TenantError(
            f"the key of tenant {name!r} is not {_SHORTEST_KEY} or more printable ASCII characters",
            "leave it out to have one made",
        )
    if not (weight > 0 and max_open > 0 and requests_per_minute > 0):
        raise TenantError(
            f"tenant {name!r}: weight, max_open and requests_per_minute must be above 0", "remove it to shut it out"
        )


def _is_plain(key: str) -> bool:
    return key.isascii() and key.isprintable()


def _hash(salt: bytes, key: str) -> bytes:
    return hashlib.sha256(salt + key.encode()).digest()


def _require(connection: sa.Connection, name: str) -> None:
    # The lock keeps a tenant there until the end of the transaction.
    if connection.execute(sa.select(tenants.c.name).where(tenants.c.name == name).with_for_update()).first() is None:
        raise TenantError(f"no tenant {name!r}", "list the tenants for their names")


def _grant(connection: sa.Connection, name: str, identity_id: str) -> None:
    connection.execute(sa.insert(grants).values(tenant=name, identity_id=identity_id))


def _granted(connection: sa.Connection, name: str) -> frozenset[str]:
    return frozenset(connection.execute(sa.select(grants.c.identity_id).where(grants.c.tenant == name)).scalars())


def _tenant(row: sa.RowMapping, granted: frozenset[str]) -> Tenant:
    return Tenant(row["name"], row["admin"], row["weight"], row["max_open"], row["requests_per_minute"], granted)

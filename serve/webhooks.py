"""Tells a client's server that a video has ended: signed, repeated until heard, and only ever sent to public addresses.

Signatures follow the Standard Webhooks scheme. A message is written to the outbox in the transaction that ends its job
(`serve.job_rows.announce`), and may arrive more than once, always with the same `webhook-id`.

A webhook's URL is a stranger's wish about what this machine connects to. So its name is resolved here, every address it
stands for is checked, and the connection goes to a checked address: a name that changes its meaning in between gains
nothing. Redirects and proxies are not followed.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx
import sqlalchemy as sa
from standardwebhooks.webhooks import Webhook

import magicid
from magicid.errors import MagicIDError, RecipeError
from serve.database import Database, outbox

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
AddressPolicy = Callable[[Address], bool]

# Waiting times between attempts, in seconds; after the last one a message is given up. The first is longer than an
# attempt may take.
BACKOFF_S = (30.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 36000.0)
_ATTEMPT_S = 10.0
_AT_ONCE = 32  # messages in one round
_SHORTEST_SECRET = 24  # bytes, by the scheme
_GONE = 410  # by the scheme: the receiver wants no more
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_log = logging.getLogger("magicid.serve")


class WebhookError(MagicIDError):
    """A URL that webhooks must not be sent to."""


@dataclass(frozen=True)
class _Message:
    id: str
    job_id: str
    url: str
    body: str
    attempts: int


def is_public(address: Address) -> bool:
    """Whether an address is anybody's to call: not this machine's, not a private network's, not a cloud's own."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address.teredo is not None or address not in _GLOBAL_UNICAST:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


def check_url(url: str, *, policy: AddressPolicy = is_public) -> None:
    """See whether webhooks could be sent to a URL, as far as that is known without asking a name server.

    Raises:
        WebhookError: it is not an http(s) URL, holds a password, or names an address that is not public.
    """
    host = _parse(url).host.rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        host = "127.0.0.1"  # by the names' definition
    try:  # all spellings of an address: 127.1, 0x7f000001, ...
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (socket.gaierror, UnicodeError):
        return  # a name; it is looked up when a message is sent
    _check_addresses([str(entry[4][0]) for entry in found], policy)


class WebhookSender:
    """Sends what is in the outbox.

    Args:
        secret: signs the messages; base64 of 24 bytes or more, with or without `whsec_`.
        policy: which addresses may be called.
        backoff_s: waiting times between attempts; each longer than `attempt_s`.
        attempt_s: an attempt may take this long in all.

    Raises:
        RecipeError: the secret cannot be used.
    """

    def __init__(
        self,
        database: Database,
        secret: str,
        *,
        policy: AddressPolicy = is_public,
        backoff_s: Sequence[float] = BACKOFF_S,
        attempt_s: float = _ATTEMPT_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._signer = Webhook(_secret_bytes(secret))
        self._database = database
        self._policy = policy
        self._backoff_s = tuple(backoff_s)
        self._attempt_s = attempt_s
        self._clock = clock

    def deliver(self) -> int:
        """Send the messages that are due, side by side, and return how many were heard.

        Takes about as long as one attempt at most. Several processes may do this at once.
        """
        messages = self._take()
        if not messages:
            return 0
        outcomes = asyncio.run(self._send_all(messages))
        heard = [message for message, outcome in zip(messages, outcomes, strict=True) if outcome is True]
        done = [message.id for message in heard]
        for message, outcome in zip(messages, outcomes, strict=True):
            if outcome is None or (outcome is False and message.attempts > len(self._backoff_s)):
                _log.warning("webhook of job %s given up after %d attempts", message.job_id, message.attempts)
                done.append(message.id)
        with self._database.session() as connection:
            connection.execute(sa.delete(outbox).where(outbox.c.id.in_(done)))
        return len(heard)

    def _take(self) -> list[_Message]:
        """The messages due, their next attempt put down beforehand: should this process die, it will be made."""
        now = self._clock()
        due = sa.select(outbox).where(outbox.c.due_at <= now).order_by(outbox.c.due_at, outbox.c.id)
        taken = []
        with self._database.session() as connection:
            for row in connection.execute(due.limit(_AT_ONCE).with_for_update(skip_locked=True)).all():
                wait = self._backoff_s[min(row.attempts, len(self._backoff_s) - 1)]
                values = {"attempts": row.attempts + 1, "due_at": now + wait}
                connection.execute(sa.update(outbox).where(outbox.c.id == row.id).values(values))
                taken.append(_Message(row.id, row.job_id, row.url, row.body, row.attempts + 1))
        return taken

    async def _send_all(self, messages: Sequence[_Message]) -> list[bool | None]:
        # Neither redirects nor what the environment says about proxies: both would lead past the check.
        async with httpx.AsyncClient(follow_redirects=False, trust_env=False, timeout=self._attempt_s) as client:
            return await asyncio.gather(*(self._send(client, message) for message in messages))

    async def _send(self, client: httpx.AsyncClient, message: _Message) -> bool | None:
        """True: heard; False: to be tried again; None: never."""
        try:
            async with asyncio.timeout(self._attempt_s):
                status = await self._post(client, message)
        except WebhookError:
            return None
        except (httpx.HTTPError, OSError, ValueError) as error:  # TimeoutError is an OSError
            _log.info("webhook of job %s, attempt %d: %s", message.job_id, message.attempts, type(error).__name__)
            return False
        if status == _GONE:
            return None
        return 200 <= status < 300

    async def _post(self, client: httpx.AsyncClient, message: _Message) -> int:
        url = _parse(message.url)
        now = datetime.fromtimestamp(self._clock(), UTC)
        headers = {
            "host": url.netloc.decode("ascii"),
            "content-type": "application/json",
            "user-agent": f"magicid/{magicid.__version__}",
            "webhook-id": message.id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": self._signer.sign(message.id, now, message.body),
        }
        sni = {"sni_hostname": url.raw_host.decode("ascii")}  # the certificate is checked against the name
        addresses = await self._resolve(url)
        for place, address in enumerate(addresses):
            request = client.build_request(
                "POST", url.copy_with(host=address), content=message.body, headers=headers, extensions=sni
            )
            try:
                response = await client.send(request, stream=True)
            except httpx.ConnectError:
                if place == len(addresses) - 1:
                    raise
            else:
                await response.aclose()  # the answer's body is of no interest
                return response.status_code
        raise AssertionError("a name that resolves has an address")

    async def _resolve(self, url: httpx.URL) -> list[str]:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)
        addresses = [str(entry[4][0]) for entry in found]
        _check_addresses(addresses, self._policy)
        return addresses


def _parse(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
        host = parsed.host  # decoded here: a name may claim to be encoded and not be
        parsed.raw_host.decode("ascii").encode("idna")  # refuses parts that no name can have
    except (httpx.InvalidURL, UnicodeError) as error:
        raise WebhookError("the webhook's URL cannot be read", "use http://HOST/PATH or https://HOST/PATH") from error
    if parsed.scheme not in ("http", "https") or not host:
        raise WebhookError("the webhook's URL is not http or https", "use http://HOST/PATH or https://HOST/PATH")
    if parsed.port is not None and not 0 < parsed.port < 1 << 16:
        raise WebhookError(f"the webhook's URL has port {parsed.port}", "use a port from 1 to 65535")
    if parsed.userinfo:
        raise WebhookError("the webhook's URL holds a user or password", "check the message's signature instead")
    return parsed


def _check_addresses(addresses: Sequence[str], policy: AddressPolicy) -> None:
    for address in addresses:
        # An IPv6 scope (%eth0) names an interface of this machine; such addresses are local by their number, too.
        if not policy(ipaddress.ip_address(address.split("%")[0])):
            raise WebhookError("the webhook's URL leads to an address that is not public", "use a public server")


def _secret_bytes(secret: str) -> bytes:
    text = secret.removeprefix("whsec_")
    try:
        key = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        key = b""
    if len(key) < _SHORTEST_SECRET:
        raise RecipeError(
            f"endpoint setting webhook_secret is not base64 of {_SHORTEST_SECRET} bytes or more",
            'make one with: python -c "import base64, secrets; '
            "print('whsec_' + base64.b64encode(secrets.token_bytes(32)).decode())\"",
        )
    return key

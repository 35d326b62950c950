"""What an error of a storage means: whether it passes by itself, and what a person can do about it.

Local disks, S3 and GCS raise dozens of types, of packages that may not be installed: they are told apart by the code
the server gave, by `errno`, and by the names of their classes. Codes: Amazon S3 API reference, "Error responses";
Google Cloud Storage, "HTTP status and error codes for JSON".
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

_PASSING_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_PASSING_CODES = frozenset(
    {
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "RequestLimitExceeded",
        "InternalError",
        "ServiceUnavailable",
        "RequestTimeout",
        "ConditionalRequestConflict",  # another conditional write of the same key was under way
        "OperationAborted",
    }
)
# Of botocore, aiohttp, requests, google-auth and fsspec, where they derive from none of Python's own.
_PASSING_TYPES = frozenset(
    {
        "ConnectionError",
        "HTTPClientError",
        "IncompleteReadError",
        "ResponseStreamingError",
        "ClientConnectionError",
        "ClientPayloadError",
        "ChunkedEncodingError",
        "ProxyError",
        "Timeout",
        "TransportError",
        "ChecksumError",
    }
)
_LASTING_TYPES = frozenset({"SSLError", "ClientSSLError", "InvalidProxyConfigurationError"})

_RENEW = "renew the credentials (for S3 e.g. `aws sso login`, for GCS `gcloud auth application-default login`)"
_LOG_IN = (
    "give credentials: for S3 a profile, a role or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, for GCS a service "
    "account in GOOGLE_APPLICATION_CREDENTIALS; on every node"
)
_ALLOW = "let these credentials list, read, write and delete there, or use others"
_ROOM = "free some space or raise the quota, or choose another location"
_ACTIONS: dict[str, tuple[str, ...]] = {
    f"{_RENEW}, then run the same command again": (
        "ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired", "InvalidToken",
        "RefreshError", "UnauthorizedSSOTokenError", "SSOTokenLoadError", "TokenRetrievalError",
    ),
    _LOG_IN: (
        "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound",
        "DefaultCredentialsError",
    ),
    "correct the access key and its secret": ("InvalidAccessKeyId", "SignatureDoesNotMatch"),
    "set this machine's clock": ("RequestTimeTooSkewed",),
    _ALLOW: ("AccessDenied", "AllAccessDisabled", "AccountProblem", "InvalidObjectState", "InvalidSecurity"),
    "make the bucket, or correct its name": ("NoSuchBucket", "InvalidBucketName"),
    _ROOM: ("QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "ServiceQuotaExceeded"),
}  # fmt: skip
_ACTION_OF = {name: action for action, names in _ACTIONS.items() for name in names}
_ACTION_OF_ERRNO = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EROFS: "it is mounted read-only: choose another location",
    errno.EACCES: "check who owns it and its permissions, or choose another location",
}
_WAIT = "the storage did not answer well, tried several times: see whether it is up, then run the same command again"


class NoSuchBucket(FileNotFoundError):
    """A bucket that is not there, on a store that answers a write with a bare 404."""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was made from."""
    while error is not None:
        yield error
        error = error.__cause__


def _server(error: BaseException) -> tuple[str, int]:
    """The code and HTTP status a server gave: ("", 0) where it gave none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0
        code = str(response.get("Error", {}).get("Code") or "")
        return code, int(status or (code if code.isdigit() else 0))
    status = str(getattr(error, "code", None) or getattr(error, "status", None))  # gcsfs, aiohttp
    return "", int(status) if status.isdigit() else 0


def _types(error: BaseException) -> set[str]:
    return {cls.__name__ for cls in type(error).__mro__}


def code(error: BaseException) -> str:
    """The code an S3 server gave, such as `SlowDown`; "" where it gave none."""
    return next((found for each in _chain(error) if (found := _server(each)[0])), "")


def transient(error: BaseException) -> bool:
    """Whether the same call may well succeed a moment later: throttled, 5xx, a broken connection, a timeout."""
    for each in _chain(error):
        types = _types(each)
        if types & _LASTING_TYPES:
            return False
        if isinstance(each, ConnectionError | TimeoutError) or types & _PASSING_TYPES:
            return True
        name, status = _server(each)
        if name in _PASSING_CODES or status in _PASSING_STATUS:
            return True
    return False


def outage(error: BaseException) -> bool:
    """Whether the storage is to blame and not the file: full, without rights, or away. It says nothing of the file."""
    return next_action(error, "") != ""


def next_action(error: BaseException, otherwise: str) -> str:
    """What to do about an error of a storage; `otherwise` where it says nothing of use."""
    for each in _chain(error):
        name, status = _server(each)
        for key in (name, *(cls.__name__ for cls in type(each).__mro__)):
            if key in _ACTION_OF:
                return _ACTION_OF[key]
        text = str(each)
        if "quota" in text.lower() and status != 429:
            return _ROOM
        if "Anonymous caller" in text:  # GCS, to a request without credentials
            return _LOG_IN
        if text.startswith("Forbidden:"):  # gcsfs keeps nothing else of a 403
            return _ALLOW
        if isinstance(each, OSError) and each.errno in _ACTION_OF_ERRNO:
            return _ACTION_OF_ERRNO[each.errno]
        if status == 401:
            return _ACTION_OF["ExpiredToken"]
        if name in ("400", "403"):  # the answer to a HEAD request has no body that could say why
            return f"see whether the credentials are still valid, and {_ALLOW}"
    return _WAIT if transient(error) else otherwise

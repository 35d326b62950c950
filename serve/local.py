"""`make serve`: the endpoint on this machine, with the adapters of the last demo run and a key to use it.

    python -m serve.local [--port 8000] [key=value ...]

The key is $MAGICID_API_KEY, or a new one that is printed. Its tenant owns the identities served; settings are those of
`serve.settings.ServeSettings`.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable
from typing import Any

from magicid import adapters
from magicid.errors import MagicIDError
from serve import proxy
from serve.parts import open_tenants
from serve.settings import ServeSettings, load

HOST = "127.0.0.1"


def main() -> None:
    """Start, print the address and the key, and serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_args()
    try:
        values = {"min_replicas": "1", **dict(text.split("=", 1) for text in options.settings if "=" in text)}
        settings = load(values)
        people = adapters.list_identities(settings.adapters)
        key = open_door(settings, people)
        serve_until_interrupted(values, options.port, lambda: announce(settings, people, key, options.port))
    except MagicIDError as error:
        print(f"error {error}", file=sys.stderr)
        sys.exit(2)


def open_door(settings: ServeSettings, people: list[str]) -> str:
    """A key whose tenant owns the identities; the tenants of earlier starts are replaced."""
    key = os.environ.get("MAGICID_API_KEY") or f"magicid-{secrets.token_urlsafe(24)}"
    tenants = open_tenants(settings)
    owners = {str(row.get("owner") or "local") for person in people for row in manifests(settings.adapters, person)}
    name = owners.pop() if len(owners) == 1 else "local"
    if any(tenant.name == name for tenant in tenants.list()):
        tenants.remove(name)
    while other := tenants.authenticate(key):  # as which the key was known before the demo, or after another one
        tenants.remove(other.name)
    tenants.add(name, key=key, grants=people)
    return key


def manifests(run: str, identity_id: str) -> list[dict[str, Any]]:
    """The manifests of an identity's whole versions."""
    return [adapters.read_manifest(ref.location) for ref in adapters.list_versions(run, identity_id)]


def announce(settings: ServeSettings, people: list[str], key: str, port: int) -> None:
    """What a user needs to begin."""
    address = f"http://{HOST}:{port}"
    print(f"magicid serves {len(people)} identities of {settings.adapters} at {address}")
    print(f"identities  {', '.join(people) or 'none yet: run `make demo` first; the base model alone is served'}")
    print(f"page        {address}/")
    print(f"key         {'the one in MAGICID_API_KEY' if os.environ.get('MAGICID_API_KEY') else key}")
    print("Ctrl-C ends it; records and clips stay in " + settings.data, flush=True)


def serve_until_interrupted(values: dict[str, str], port: int, ready: Callable[[], None]) -> None:
    """Run the application on a Ray of its own, or on the one that RAY_ADDRESS names."""
    import ray
    from ray import serve

    from serve.app import app

    os.environ[proxy.VARIABLE] = proxy.CALLBACK
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not os.environ.get("RAY_ADDRESS"):
        ray.init(address="local", log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    serve.start(http_options={"host": HOST, "port": port}, logging_config={"log_level": "WARNING"})
    serve.run(app(dict(values)), name="magicid", route_prefix="/")
    ready()
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        serve.shutdown()


if __name__ == "__main__":
    main()

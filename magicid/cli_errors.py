"""How the command line tells what went wrong: one line, exit code 2."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import typer

F = TypeVar("F", bound=Callable[..., Any])


def told_plainly(command: F) -> F:
    """Turns a MagicIDError into one line and exit code 2."""

    @functools.wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        from magicid.errors import MagicIDError

        try:
            return command(*arguments, **options)
        except MagicIDError as error:
            typer.echo(f"error {' '.join(str(error).split())}", err=True)
            sys.exit(2)

    return wrapped  # type: ignore[return-value]

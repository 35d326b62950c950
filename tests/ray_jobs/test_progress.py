"""The display prints what others wrote as it is."""

from __future__ import annotations

import io

from rich.console import Console

from ray_jobs.progress import Display


def test_markup_in_names_and_reasons_is_only_text() -> None:
    output = io.StringIO()
    with Display(Console(file=output, width=100)) as display:
        display.say("set aside identity [/x]: no such file [/tmp/a] [red]", "yellow")
        display.show("sft [/b]", 0, 2)
        display.show("sft [/b]", 2, 2, "loss [1]")
    assert output.getvalue().splitlines() == [
        "set aside identity [/x]: no such file [/tmp/a] [red]",
        "sft [/b]: 0 of 2",
        "sft [/b]: 2 of 2  loss [1]",
    ]


def test_a_terminal_shows_bars() -> None:
    output = io.StringIO()
    with Display(Console(file=output, width=120, force_terminal=True)) as display:
        display.show("hpo [/b]", 1, 2, "[note]")
    assert "hpo [/b]" in output.getvalue()
    assert "1/2" in output.getvalue()

"""What the paper reports, to be set beside what is measured here: 40 people, 40 prompts, 61 frames of HunyuanVideo.

MagicID: Hybrid Preference Optimization for ID-Consistent and Dynamic-Preserved Video Customization (2025), Tables 1-3.
Its dynamic degree cannot be VBench's fraction; it looks like the mean top-5 % flow behind it. None of these numbers was
reproduced here; of the face world's, only the order can be compared with theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from magicid.markdown import table as markdown_table

FVD = "fvd"


@dataclass(frozen=True)
class PaperRow:
    """A method of the paper: its numbers, and what it is called here, the first that is there."""

    name: str
    here: tuple[str, ...]
    values: tuple[float, ...]

    def method(self, methods: Collection[str]) -> str | None:
        """Which of `methods` it is; None where it is none of them."""
        return next((name for name in self.here if name in methods), None)


@dataclass(frozen=True)
class PaperTable:
    """One table of the paper.

    Attributes:
        columns: (its name for a number, our measures of the same, the first that is there).
        steps: whether each row adds something to the one above it.
    """

    title: str
    columns: tuple[tuple[str, tuple[str, ...]], ...]
    rows: tuple[PaperRow, ...]
    steps: bool = False


FACE, MOTION = ("face sim", ("face_sim",)), ("dynamic degree", ("dynamic_magnitude",))
TEXT = ("CLIP-T", ("clip_t", "prompt_score"))  # without CLIP, how surely action and place are recognised
METHODS = PaperTable(
    "Table 1, methods",
    (FACE, MOTION, ("temporal consistency", ("temporal_consistency",)), TEXT, ("CLIP-I", ("clip_i",)), ("FVD", (FVD,))),
    (
        PaperRow("DreamBooth-LoRA", ("dreambooth",), (0.276, 5.690, 0.9922, 25.83, 46.55, 1423.55)),
        PaperRow("MagicMe", ("magicme",), (0.322, 5.332, 0.9924, 25.42, 62.45, 1438.66)),
        PaperRow("ID-Animator", ("ID-Animator",), (0.433, 10.33, 0.9938, 25.21, 49.33, 1558.33)),
        PaperRow("ConsisID", ("ConsisID",), (0.482, 9.26, 0.9811, 26.12, 63.88, 1633.21)),
        PaperRow("MagicID", ("hpo",), (0.600, 14.42, 0.9933, 26.28, 78.83, 1228.33)),
    ),
)
START = ("sft_moving_captions", "sft_captions", "sft_moving", "sft")  # self-reconstruction alone, at its last step
WHOLE = ("no_copies", "hpo")  # both kinds of pair and all rewards; without `selection.still_pairs` that is hpo
PAIRS = PaperTable(
    "Table 2, pairs",
    (FACE, MOTION, TEXT),
    (
        PaperRow("none", START, (0.276, 5.690, 25.83)),
        PaperRow("P_id", ("p_id",), (0.605, 7.382, 25.94)),
        PaperRow("P_id and P_dy", WHOLE, (0.600, 14.42, 26.28)),
    ),
    steps=True,
)
REWARDS = PaperTable(
    "Table 3, rewards",
    (FACE, MOTION, TEXT),
    (
        PaperRow("identity", ("rewards_id",), (0.598, 6.332, 24.92)),
        PaperRow("identity, dynamics", ("rewards_id_dy",), (0.607, 12.33, 25.73)),
        PaperRow("all three", WHOLE, (0.600, 14.42, 26.28)),
    ),
    steps=True,
)
TABLES = (METHODS, PAIRS, REWARDS)


def markdown(
    table: PaperTable, methods: Mapping[str, str], measures: Collection[str], cell: Callable[[str, str], str]
) -> str:
    """The table as Markdown, ending with a new line, what was measured here beside each number of the paper.

    Args:
        methods: that there are here, and what they are called.
        measures: that there are here.
        cell: a measure of a method as text.
    """
    ours = [next((name for name in names if name in measures), None) for _, names in table.columns]
    heads = ["the paper: " + table.title, "here"]
    for (name, _), measure in zip(table.columns, ours):
        heads += [name, *([f"{measure}, here"] if measure else [])]
    lines = []
    for row in table.rows:
        method = row.method(methods)
        cells = [row.name, methods[method] if method else "–"]
        for value, measure in zip(row.values, ours):
            cells += [f"{value:g}", *([cell(method, measure) if method else "–"] if measure else [])]
        lines.append(cells)
    return markdown_table(heads, lines, left=2)

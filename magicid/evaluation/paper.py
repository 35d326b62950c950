"""What the paper reports, to be set beside what is measured here: 40 people, 40 prompts, 61 frames of HunyuanVideo.

MagicID: Hybrid Preference Optimization for ID-Consistent and Dynamic-Preserved Video Customization (2025), Tables 1-3.
Its dynamic degree cannot be VBench's fraction; it looks like the mean top-5 % flow behind it. None of these numbers was
reproduced here; of the face world's, only the order can be compared with theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

from magicid.markdown import table as markdown_table


@dataclass(frozen=True)
class PaperTable:
    """One table of the paper: rows of (method, one value per column)."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float, ...]], ...]


METHODS = PaperTable(
    "Table 1, methods",
    ("face sim", "dynamic degree", "temporal consistency", "CLIP-T", "CLIP-I", "FVD"),
    (
        ("DreamBooth-LoRA", (0.276, 5.690, 0.9922, 25.83, 46.55, 1423.55)),
        ("MagicMe", (0.322, 5.332, 0.9924, 25.42, 62.45, 1438.66)),
        ("ID-Animator", (0.433, 10.33, 0.9938, 25.21, 49.33, 1558.33)),
        ("ConsisID", (0.482, 9.26, 0.9811, 26.12, 63.88, 1633.21)),
        ("MagicID", (0.600, 14.42, 0.9933, 26.28, 78.83, 1228.33)),
    ),
)
PAIRS = PaperTable(
    "Table 2, pairs",
    ("face sim", "dynamic degree", "CLIP-T"),
    (
        ("none", (0.276, 5.690, 25.83)),
        ("P_id", (0.605, 7.382, 25.94)),
        ("P_id and P_dy", (0.600, 14.42, 26.28)),
    ),
)
REWARDS = PaperTable(
    "Table 3, rewards",
    ("face sim", "dynamic degree", "CLIP-T"),
    (
        ("identity", (0.598, 6.332, 24.92)),
        ("identity, dynamics", (0.607, 12.33, 25.73)),
        ("all three", (0.600, 14.42, 26.28)),
    ),
)
TABLES = (METHODS, PAIRS, REWARDS)


def markdown(table: PaperTable) -> str:
    """The table as Markdown, ending with a new line."""
    rows = [[name, *(f"{value:g}" for value in values)] for name, values in table.rows]
    return markdown_table(["the paper: " + table.title, *table.columns], rows)

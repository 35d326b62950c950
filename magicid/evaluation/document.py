"""The results as one document: the table of all methods with intervals, comparisons, figures, the conditions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from magicid import storage
from magicid.evaluation import comparisons, figures, results
from magicid.evaluation.cells import DIGITS, cell, measured, named, number
from magicid.evaluation.intervals import LEVEL, Interval
from magicid.evaluation.metrics.video import LEAST_CLIPS
from magicid.evaluation.names import order
from magicid.markdown import table
from magicid.schema import MetricRow


def write(
    rows: Sequence[MetricRow], folder: str, reference: Sequence[MetricRow] = (), threshold: float | None = None
) -> list[str]:
    """Write results.md, results.json and the figures (SVG and PNG) into a folder on any fsspec URL; returns the names.

    Args:
        rows: of all methods; figures whose rows are not there are left out.
        reference: rows whose features the Fréchet video distance is taken to; empty: the renderer's among `rows`, and
            without these no such column.
        threshold: of face_sim, above which a clip is verified as its person; None: the share is not told.
    """
    if not reference:
        truth = [row for row in results.of_usual_length(rows) if row.method == "renderer"]
        reference = [row for row in truth if row.video_features]
    drawn = figures.draw_all(rows)
    files = {f"{name}.{kind}": data for name, pictures in drawn.items() for kind, data in pictures.items()}
    files["results.json"] = (json.dumps(to_json(rows, reference), indent=1) + "\n").encode()
    files["results.md"] = to_markdown(rows, reference, list(drawn), threshold).encode()
    for name, data in files.items():
        storage.write_bytes(storage.join(folder, name), data)
    return sorted(files)


def to_markdown(
    rows: Sequence[MetricRow],
    reference: Sequence[MetricRow] = (),
    drawn: Sequence[str] = (),
    threshold: float | None = None,
) -> str:
    """The document, its figures named as files beside it."""
    parts = [
        "# Results\n",
        _methods(rows, reference),
        comparisons.against_reconstruction(rows, threshold),
        comparisons.minus_hpo(rows),
    ]
    parts += [f"![{figures.TITLES[name]}]({name}.svg)\n" for name in drawn]
    if len({row.method for row in rows}) > 1:
        parts.append(comparisons.beside_paper(rows, reference))
    return "\n".join(parts)


def to_json(rows: Sequence[MetricRow], reference: Sequence[MetricRow] = ()) -> dict[str, Any]:
    """Every estimate of every (method, setting, step), and the conditions."""
    groups = results.grouped(results.of_usual_length(rows), results.BY)
    return {
        "level": LEVEL,
        "conditions": conditions(rows),
        "methods": [
            {
                **dict(zip(results.BY, group)),
                "clips": len(members),
                "fvd": results.fvd(members, reference),
                "measures": {name: _plain(results.estimate(members, name)) for name in results.MEASURES},
            }
            for group, members in groups.items()
        ],
    }


def conditions(rows: Sequence[MetricRow]) -> dict[str, Any]:
    """What the numbers hold for."""

    def listed(name: str) -> list[Any]:
        return sorted({getattr(row, name) for row in rows if getattr(row, name) != ""})

    return {
        "people": len({row.identity_id for row in rows}),
        "prompts": len({row.prompt for row in rows}),
        "seeds": len({row.seed for row in rows}),
        "training_seeds": len({row.train_seed for row in rows}),
        "clips": len(rows),
        "nulls": sum(row.error is not None for row in rows),
        "sizes": sorted({f"{r.frames} frames of {r.width}x{r.height} at {r.fps} fps" for r in rows}),
        "base_sha256": listed("base_sha256"),
        "adapters": len(listed("adapter_sha256")),
    }


def _methods(rows: Sequence[MetricRow], reference: Sequence[MetricRow]) -> str:
    last = results.last_steps(rows)
    measures = measured(last, results.MEASURES)
    heads = ["method", "steps", "N", *measures, *([f"fvd to {len(reference)} clips"] if reference else [])]
    lines = []
    groups = results.grouped(last, results.BY)
    for group in sorted(groups, key=lambda key: (order(key[0]), key)):
        members = groups[group]
        method, setting, step = group
        name = named(method, setting)
        cells = [cell(results.estimate(members, measure), DIGITS[measure], len(members)) for measure in measures]
        distance = results.fvd(members, reference)
        lines.append([name, str(step or "–"), str(len(members)), *cells, *([number(distance, 1)] if reference else [])])
    found = conditions(last)
    sizes = "; ".join(found["sizes"])
    return (
        f"{table(heads, lines)}\n"
        f"Mean [{LEVEL:.0%} interval, hierarchical bootstrap over people, training seeds and clips] of the last step "
        f"of each method, up to that of HPO; every person counts alike. {found['people']} people, {found['prompts']} "
        f"prompts, {found['training_seeds']} training seeds; {sizes}; {found['nulls']} clips with something that could "
        f"not be measured{', in brackets how many lack it' if found['nulls'] else ''}. "
        f"{_few(list(groups.values()), reference)}Definitions: `magicid.evaluation.metrics`.\n"
    )


def _few(groups: Sequence[Sequence[MetricRow]], reference: Sequence[MetricRow]) -> str:
    """The warning of a Fréchet distance between few clips."""
    counts = [sum(row.video_features is not None for row in rows) for rows in (*groups, reference)]
    if not reference or min(counts) >= LEAST_CLIPS:
        return ""
    return f"Fréchet distances are of {min(counts)} to {max(counts)} clips: below {LEAST_CLIPS} they are too large. "


def _plain(interval: Interval | None) -> dict[str, Any] | None:
    return None if interval is None else dict(vars(interval))

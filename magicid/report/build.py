"""Builds the HTML file of a run: reads it, prepares each section, and fills the template."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2

from magicid.evaluation.table import METHODS, table
from magicid.report import comparison, curves, pareto, plane
from magicid.report.media import Media, Video
from magicid.report.reading import STAGES, Contents, Person, read
from magicid.run import Run
from magicid.schema import MetricRow, Rejected

PROMPTS_SHOWN = 6  # per identity; fewer where there are many identities
ROWS_SHOWN = 96  # rows of clips over all identities
REASONS_SHOWN = 14


@dataclass(frozen=True)
class Shot:
    """One clip of the comparison; `caption` are its own measurements."""

    method: str
    video: Video | str
    caption: str = ""


@dataclass(frozen=True)
class Reason:
    """Why things were set aside, and how many; 0 where the sentence itself counts."""

    count: int
    kind: str
    problem: str
    action: str


@dataclass(frozen=True)
class PersonView:
    """What the template shows of one identity."""

    person: Person
    anchor: str
    photos: list[tuple[str, str | None]]
    troubles: list[Rejected]
    lines: list[comparison.Line]
    methods: list[str]
    takes: list[tuple[str, int, list[Shot]]]  # prompt, seed, one shot per method
    prompts: int  # held-out prompts there are
    hero: Video | None
    validation: list[tuple[int, Video | str]]
    plot: pareto.Plot | None
    charts: list[curves.Chart]
    speeds: dict[str, str]
    steps: dict[str, int]
    manifest: list[tuple[str, str, str]]
    reasons: list[Reason]
    reasons_hidden: int
    pair_counts: dict[str, int] = field(default_factory=dict)


def build_report(run: Run, limit: int = 50) -> str:
    """The report as one HTML file without references to anything outside it.

    Of more identities than `limit` it shows the first. Works on unfinished runs: a part that is missing or unreadable
    is named as such in the page.
    """
    contents = read(run, limit)
    media = Media(run)
    shown = max(1, min(PROMPTS_SHOWN, ROWS_SHOWN // max(1, len(contents.people))))
    estimates = table(contents.evaluation)
    pooled = table(comparison.pooled(contents.evaluation))
    differences = comparison.differences(contents.evaluation)
    lines = comparison.lines(pooled + estimates, differences)
    whom = pooled or estimates  # everybody together, or the one there is
    drawn = plane.planes(whom, whom[0].identity_id) if whom else []
    people = [_view(person, number, contents, lines, media, shown) for number, person in enumerate(contents.people)]
    headline, sentences = comparison.verdict(differences)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("magicid.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        contents=contents,
        people=people,
        lines=lines,
        headline=headline,
        sentences=sentences,
        planes=drawn,
        planes_of=whom[0].identity_id if whom else "",
        metrics=[comparison.METRIC_NAMES[metric] for metric in comparison.shown(pooled + estimates)],
        method_names=comparison.METHOD_NAMES,
        stage_names={"sft": "SFT", "hpo": "HPO"},
        pairs=sum(len(person.pairs or []) for person in contents.people),
        adapters=sum(len(person.manifests) for person in contents.people),
        reasons=_reasons(contents.rejected),
        left_out=media.left_out,
        people_left_out=contents.left_out,
        clips_json=json.dumps(media.clips),
    )


def _view(
    person: Person,
    number: int,
    contents: Contents,
    lines: Sequence[comparison.Line],
    media: Media,
    shown: int,
) -> PersonView:
    identity = person.identity
    methods = _methods(person.evaluation)
    takes = _takes(person.evaluation, methods, media, shown)
    reasons = _reasons(person.dropped)
    pairs = person.pairs or []
    return PersonView(
        person=person,
        anchor=f"person-{number}",
        photos=[(uri.rsplit("/", 1)[-1], media.photo(uri)) for uri in identity.photos],
        troubles=[r for r in contents.rejected if r.kind == "identity" and r.name == identity.identity_id],
        lines=[line for line in lines if line.identity_id == identity.identity_id],
        methods=methods,
        takes=takes,
        prompts=len({(row.prompt, row.seed) for row in person.evaluation}),
        hero=_hero(takes),
        validation=[(step, media.video(uri)) for step, uri in _spread(person.validation, 8)],
        plot=pareto.plot(person.clips, pairs),
        charts=curves.charts(person.logs),
        speeds={stage: curves.speed(rows) for stage, rows in person.logs.items()},
        steps={stage: int(person.logs[stage][-1]["step"]) for stage in STAGES if stage in person.logs},
        manifest=_manifest(person.manifests[-1]) if person.manifests else [],
        reasons=reasons[:REASONS_SHOWN],
        reasons_hidden=sum(max(1, reason.count) for reason in reasons[REASONS_SHOWN:]),
        pair_counts={kind: sum(pair.kind == kind for pair in pairs) for kind in ("P_id", "P_dy", "P_still")},
    )


def _methods(rows: Sequence[MetricRow]) -> list[str]:
    found = {row.method for row in rows}
    return [m for m in METHODS if m in found] + sorted(found - set(METHODS))


def _takes(
    rows: Sequence[MetricRow], methods: Sequence[str], media: Media, shown: int
) -> list[tuple[str, int, list[Shot]]]:
    """The first held-out (prompt, seed) by seed, so that none is picked by its looks; one clip of each method."""
    by_key = {(row.seed, row.prompt, row.method): row for row in rows}
    takes = []
    for seed, prompt in sorted({(row.seed, row.prompt) for row in rows})[:shown]:
        shots = [_shot(method, by_key.get((seed, prompt, method)), media) for method in methods]
        takes.append((prompt, seed, shots))
    return takes


def _shot(method: str, row: MetricRow | None, media: Media) -> Shot:
    if row is None:
        return Shot(method, "no clip")
    if row.video_uri is None:
        return Shot(method, row.error or "no clip")
    values = [
        ("face_sim", row.face_sim, 2), ("flow", row.dynamic_magnitude, 1), ("head", row.head_motion, 1),
        ("prompt", row.prompt_score, 2),
    ]  # fmt: skip
    caption = " · ".join(f"{name} {value:.{digits}f}" for name, value, digits in values if value is not None)
    return Shot(method, media.video(row.video_uri), caption or row.error or "not measured")


def _hero(takes: Sequence[tuple[str, int, list[Shot]]]) -> Video | None:
    """The clip beside the name at the top: the first take of the last method that has one."""
    for _, _, shots in takes:
        for shot in reversed(shots):
            if shot.method != "base" and isinstance(shot.video, Video):
                return shot.video
    return None


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, evenly spaced, with the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(k * (len(items) - 1) / (count - 1))] for k in range(count)]


def _reasons(rows: Sequence[Rejected]) -> list[Reason]:
    """Rows by reason: those that name one thing keep its name, those alike are counted; the largest counts first."""
    counts = Counter((row.kind, row.problem, row.action) for row in rows)
    names = {(row.kind, row.problem, row.action): row.name for row in rows}
    reasons = []
    for key, count in counts.most_common():
        kind, problem, action = key
        if kind == "pair":  # such a row is about many candidates of one identity
            reasons.append(Reason(0, "pairs", problem, action))
        else:
            reasons.append(Reason(count, f"{kind} {_short(names[key])}" if count == 1 else f"{kind}s", problem, action))
    return reasons


def _short(name: str) -> str:
    """Content addresses are cut to their first 12 digits."""
    return f"{name[:12]}…" if len(name) >= 32 and set(name) <= set("0123456789abcdef") else name


def _manifest(manifest: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(key, value, value in full) of the manifest; nested values as `key.inner`."""
    flat: dict[str, Any] = {}
    for key, value in manifest.items():
        flat |= {f"{key}.{inner}": item for inner, item in value.items()} if isinstance(value, dict) else {key: value}
    return [(key, _short(_shown(value)), _shown(value)) for key, value in flat.items()]


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "mean" in value:
        mean, low, high = (value.get(name) for name in ("mean", "low", "high"))
        if mean is None:
            return "not measured"
        interval = "" if low is None or high is None else f" [{low:.4g}, {high:.4g}]"
        return f"{mean:.4g}{interval}, n {value.get('n', '?')}"
    if value is None or value == "":
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)

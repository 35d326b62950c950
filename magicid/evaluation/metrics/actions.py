"""Does it show what was asked for? The face world's classifier, which no reward used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from magicid.evaluation.metrics.sample import Columns, Sample, by_shape

if TYPE_CHECKING:
    from magicid.world.classifier import ActionPlaceClassifier


class ActionMetrics:
    """action and place, 1 when the classifier's first choice is the prompt's, and prompt_score, P(action) P(place)."""

    columns = ("action", "place", "prompt_score")

    def __init__(self, classifier: ActionPlaceClassifier) -> None:
        self.classifier = classifier

    def measure(self, samples: Sequence[Sample]) -> list[Columns]:
        rows: list[Columns] = [{} for _ in samples]
        for positions in by_shape(samples):
            frames = np.stack([samples[position].frames for position in positions])
            for position, actions, places in zip(positions, *self.classifier.predict(frames)):
                rows[position] = action_columns(samples[position].prompt, actions, places)
        return rows


def action_columns(prompt: str, actions: np.ndarray, places: np.ndarray) -> Columns:
    """The three columns from probabilities of the actions (8,) and of the places (8,).

    A prompt that names no single action and place has none, and an `error`; without a prompt nothing was asked.
    """
    from magicid.world.language import parse

    if not prompt:
        return {}
    action, place = parse(prompt)
    if action is None or place is None:
        return {"error": f"prompt_score: the prompt {prompt!r} names no single action and place"}
    return {
        "action": float(int(actions.argmax()) == action),
        "place": float(int(places.argmax()) == place),
        "prompt_score": float(actions[action]) * float(places[place]),
    }

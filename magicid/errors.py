"""Every error magicid raises on purpose. Each one names the thing that is wrong and the next action.

MagicIDError
├── RecipeError          a recipe that cannot be used (unknown key, impossible value)
├── ManifestError        an identities manifest that cannot be read (format, column, duplicate id)
├── IdentityError        one identity that cannot be used
│   └── PhotoError       one photo that cannot be used
├── LeaseError           a run that another driver is at work on
├── StorageError         a location that cannot be read or written
├── BackboneError        a video model folder that cannot be loaded or does not fit the recipe
├── GenerationError      a clip that could not be generated
├── RewardError          a reward model that cannot be loaded, or failed on a clip
├── SelectionError       no pairs can be made
├── TrainingError        training cannot go on
│   ├── NonFiniteLossError    the loss became NaN or infinite
│   └── ReferenceMovedError   a resumed run found another reference than it had pinned
└── AdapterError         an adapter file that is missing, corrupt, or of another base model
"""

from __future__ import annotations


class MagicIDError(Exception):
    """Base of all errors.

    Args:
        problem: what is wrong, naming the file, row or key.
        action: what the reader can do next.
    """

    def __init__(self, problem: str, action: str) -> None:
        super().__init__(problem, action)
        self.problem = problem
        self.action = action

    def __str__(self) -> str:
        return f"{self.problem} — {self.action}"


class RecipeError(MagicIDError):
    """A recipe that cannot be used."""


class ManifestError(MagicIDError):
    """An identities manifest that cannot be read."""


class IdentityError(MagicIDError):
    """One identity that cannot be used; the others go on."""


class PhotoError(IdentityError):
    """One photo that cannot be used."""


class LeaseError(MagicIDError):
    """A run that another driver is at work on, or has taken."""


class StorageError(MagicIDError):
    """A location that cannot be read or written."""


class BackboneError(MagicIDError):
    """A video model folder that cannot be loaded, or does not fit the recipe."""


class GenerationError(MagicIDError):
    """A clip that could not be generated."""


class RewardError(MagicIDError):
    """A reward model that cannot be loaded, or failed on a clip."""


class SelectionError(MagicIDError):
    """No preference pairs can be made from what was generated."""


class TrainingError(MagicIDError):
    """Training cannot go on."""


class NonFiniteLossError(TrainingError):
    """The loss became NaN or infinite; the last good checkpoint is kept."""


class ReferenceMovedError(TrainingError):
    """The frozen reference differs from the one pinned when training began."""


class AdapterError(MagicIDError):
    """An adapter file that is missing, corrupt, or made for another base model."""

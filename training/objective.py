"""A loss as scripts and the training loop see it: a function with hyper-parameters, presets and requirements."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from settings import Command, Settings, setting, settings_of


@dataclass(frozen=True)
class LossChoice(Settings):
    """Which loss. Each script has its table of losses to choose from."""

    losstype: str = setting("infonce", "loss")
    title = "training"


@dataclass(frozen=True)
class Loss:
    """A loss with its hyper-parameters as published, and what it needs: `loss(copy, victim, **arguments)`.

    settings: its hyper-parameters, which become flags; values: their values, set by `bind`. min_views: the fewest rows
    per image. plain_first: the first row of an image is the image itself, the others are augmentations. unit_answers:
    answers are brought to unit length before they are averaged or compared. nonnegative: no row may have a negative
    number. predictor: the loss compares the outputs of SimSiam's heads. augment: the recipe of a victim's random views,
    a name in `VIEW_RECIPES`.

    A function with an argument `views` gets the number of rows per image, a function with an argument `labels` the
    labels of the batch's images.
    """

    function: Callable[..., Tensor]
    batch_size: int
    lr: float
    weight_decay: float = 1e-4
    optimizer: str = "adam"
    momentum: float = 0.9
    settings: Mapping[str, Any] = field(default_factory=dict)
    min_views: int = 1
    plain_first: bool = False
    unit_answers: bool = False
    nonnegative: bool = False
    predictor: bool = False
    augment: str = "simclr"
    values: Mapping[str, Any] = field(default_factory=dict)
    title = "training"

    def __call__(self, *features: Tensor, **arguments: Any) -> Tensor:
        """The loss of features, with the bound hyper-parameters where `arguments` have no others."""
        declared = settings_of(self)
        bound = {declared[name].argument or name: value for name, value in self.values.items()}
        return self.function(*features, **{**bound, **arguments})

    def bind(self, values: Mapping[str, Any]) -> "Loss":
        """The loss with these hyper-parameters. UserError for a value out of range."""
        for name, value in values.items():
            settings_of(self)[name].check(value)
        return replace(self, values=dict(values))

    @property
    def presets(self) -> dict[str, Any]:
        """Values of `training.recipe.Recipe` where neither the command line nor an attack has others."""
        return {name: getattr(self, name) for name in ("batch_size", "lr", "weight_decay", "optimizer", "momentum")}

    @functools.cached_property
    def _arguments(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.function).parameters)

    @property
    def needs_labels(self) -> bool:
        return "labels" in self._arguments

    def of_batch(self, views: int, labels: Tensor | None = None) -> "Callable[..., Tensor]":
        """The loss of a batch's index (B,) and features (views * B, D), for images with these labels (N,)."""

        def value(index: Tensor, *features: Tensor) -> Tensor:
            arguments = {"views": views} if "views" in self._arguments else {}
            if self.needs_labels:
                arguments["labels"] = labels[index]
            return self(*features, **arguments)

        return value

    @staticmethod
    def absent(command: Command) -> str:
        """Why the settings of this loss have no effect where another loss is in force."""
        return f"with the loss {command.losstype}"

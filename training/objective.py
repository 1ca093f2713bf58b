"""A loss as scripts and the training loop see it: a function with hyper-parameters, presets and requirements."""

import functools
import inspect
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from settings import Command, Settings, setting, settings_of


@dataclass(frozen=True)
class LossChoice(Settings):
    """Which loss. Each script has its table of losses to choose from."""

    losstype: str = setting("infonce", "loss")
    title = "training"


def temperature_setting(default: float) -> Any:
    """The temperature of a contrastive loss; all of them share the flag."""
    known = "0.07, of contsteal and contsteal-paper 0.5, of moco 0.1"
    return setting(default, "temperature of contrastive losses", above=0, otherwise=known)


@dataclass(frozen=True)
class Loss:
    """A loss with its hyper-parameters as published, and what it needs: `loss(copy, victim, **arguments)`.

    settings: its hyper-parameters, which become flags; values: their values, set by `bind`. min_views: the fewest rows
    per image. plain_first: the first row of an image is the image itself, the others are augmentations. unit_answers:
    answers are brought to unit length before they are averaged or compared. nonnegative: no row may have a negative
    number. predictor: the loss compares the outputs of SimSiam's heads. augment: the recipe of a victim's random views,
    a name in `VIEW_RECIPES`. companion: makes what is trained beside a victim's encoder (`training/siamese.py`), from
    the settings that it takes. head: the kind of a victim's head, see `models.simclr.projection_head`. more: presets of
    further settings.

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
    companion: Callable[..., nn.Module] | None = None
    head: str = "mlp"
    more: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    title = "training"

    def __call__(self, *features: Tensor, **arguments: Any) -> Tensor:
        """The loss of features, with the bound hyper-parameters where `arguments` have no others."""
        return self.function(*features, **{**self._bound(self._arguments), **arguments})

    def make_companion(self, encoder: nn.Module, images: int, batch_size: int) -> nn.Module | None:
        """The companion of an encoder with a head that is trained on so many images; None where the loss has none.

        Its weights are drawn from the global generator (see `utils.seeded`). UserError for a batch size it cannot use.
        """
        if self.companion is None:
            return None
        return self.companion(encoder, images, batch_size, **self._bound(inspect.signature(self.companion).parameters))

    def _bound(self, taken: Container[str]) -> dict[str, Any]:
        """The bound hyper-parameters among the arguments of these names."""
        declared = settings_of(self)
        bound = {declared[name].argument or name: value for name, value in self.values.items()}
        return {name: value for name, value in bound.items() if name in taken}

    def bind(self, values: Mapping[str, Any]) -> "Loss":
        """The loss with these hyper-parameters. UserError for a value out of range."""
        for name, value in values.items():
            settings_of(self)[name].check(value)
        return replace(self, values=dict(values))

    @property
    def presets(self) -> dict[str, Any]:
        """Values of the recipe, and others, where neither the command line nor an attack has others."""
        names = ("batch_size", "lr", "weight_decay", "optimizer", "momentum")
        return {**{name: getattr(self, name) for name in names}, **self.more}

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

"""How an adapter's models are built and run from the command line: `ModelEntry`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError, InputError, short
from ..scene.prediction import Prediction
from .weights import RANDOM, find_weights, load_weights

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class ModelEntry:
    """A model that the command line can build and run.

    Attributes:
        name: What users type after ``--model``.
        summary: One line about it.
        create: Makes the model with random weights, on the CPU. It may import the model's library.
        preprocess: 8-bit RGB images to pixels ``[S, 3, H, W]``, float32 in [0, 1], all at one size that the model takes.
        predict: Runs the model on its input (see `inputs`), already on the model's device, without gradients.
        default_weights: Hub id or file that is loaded when the user names none; None: the user must name one.
        library: Import name of the library that `create` needs, or None.
        install: How to get that library.
        rename: As in `lite3r_plugin.adapter.weights.load_weights`.
        min_views: Fewest images it takes.
        normalize: Pixels as `preprocess` gives them to the model's input of the same shape; by default they are the input.
        arguments: That input, of B scenes ``[B, S, 3, H, W]``, to what the model's forward is called with: a mapping by keyword, a tuple by
            position, anything else alone; by default as it is.
        mixed_sizes: What `preprocess` does to images of different sizes, as the end of "images of different sizes are ...".

    Raises:
        AdapterError: a field is of the wrong kind.
    """

    name: str
    summary: str
    create: Callable[[], nn.Module]
    preprocess: Callable[[Sequence[Image.Image]], Tensor]
    predict: Callable[[nn.Module, Tensor], Prediction]
    default_weights: str | None = None
    library: str | None = None
    install: str = ""
    rename: Callable[[str], str | None] | None = None
    min_views: int = 1
    normalize: Callable[[Tensor], Tensor] = lambda pixels: pixels
    arguments: Callable[[Tensor], Any] = lambda images: images
    mixed_sizes: str = "resized to the size of the first"

    def __post_init__(self) -> None:
        for names, right, kind in (
            (("name", "summary", "install", "mixed_sizes"), lambda x: isinstance(x, str), "a string"),
            (("default_weights", "library"), lambda x: x is None or isinstance(x, str), "a string or None"),
            (("create", "preprocess", "predict", "normalize", "arguments"), callable, "a function"),
            (("rename",), lambda x: x is None or callable(x), "a function or None"),
            (("min_views",), lambda x: type(x) is int and x > 0, "a positive integer"),
        ):
            for name in names:
                if not right(value := getattr(self, name)):
                    raise AdapterError(f"ModelEntry {self.name!r}: {name} is {kind}, got {value!r}")

    @property
    def available(self) -> bool:
        """Whether the library that it needs can be found."""
        try:
            return self.library is None or importlib.util.find_spec(self.library) is not None
        except (ImportError, ValueError):  # of a package around it that cannot be imported, or has no spec
            return False

    def require_library(self) -> None:
        """Raise `InputError` where the library that it needs cannot be found."""
        if not self.available:
            raise InputError(f"the model {self.name!r} needs the library {self.library!r}, which is not installed{self._how(': ')}")

    @property
    def resolution(self) -> int:
        """The longer side, in pixels, of what `preprocess` makes of a square photograph."""
        from PIL import Image

        return max(self.preprocess([Image.new("RGB", (640, 640))]).shape[-2:])

    def inputs(self, images: Sequence[Image.Image]) -> Tensor:
        """The model's input ``[S, 3, H, W]``, float32, of RGB images. Raises `AdapterError` where the adapter makes something else."""
        pixels = self.normalize(self.preprocess(images))
        if not isinstance(pixels, Tensor) or pixels.dim() != 4 or len(pixels) != len(images) or pixels.dtype != torch.float32:
            what = f"{list(pixels.shape)} {pixels.dtype}" if isinstance(pixels, Tensor) else type(pixels).__name__
            raise AdapterError(f"the model {self.name!r} makes {what} of {len(images)} images, not [{len(images)}, 3, H, W] float32")
        return pixels

    def run(self, model: nn.Module, images: Tensor) -> Any:
        """The outputs of `model` for its input of B scenes ``[B, S, 3, H, W]``."""
        given = self.arguments(images)
        if isinstance(given, Mapping):
            return model(**given)
        return model(*given) if isinstance(given, tuple) else model(given)

    def build(self, weights: str | None = None, device: torch.device | str = "cpu") -> nn.Module:
        """The model in evaluation mode, in FP32, on `device`.

        Args:
            weights: A file, a Hub id, ``"random"`` (the same numbers every time; for timing only), or None for
                `default_weights`.
            device: Where to make it.

        Returns:
            The model. The random state of the process is as before.

        Raises:
            InputError: the library or the weights cannot be had, or the weights belong to another model.
            AdapterError: `create` makes no module.
        """
        self.require_library()
        weights = weights or self.default_weights
        if weights is None:
            raise InputError(f"the model {self.name!r} has no default weights; name a file or a Hub id, or {RANDOM!r} for timing only")
        file, where = None if weights == RANDOM else find_weights(weights), torch.device(device)
        try:
            with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []), where:
                torch.manual_seed(0)
                model = self.create()
        except ImportError as error:
            raise InputError(self._not_imported(error)) from error
        if not isinstance(model, nn.Module):
            raise AdapterError(f"create of the model {self.name!r} made {type(model).__name__}, not a torch.nn.Module")
        if file is not None:
            load_weights(model, file, self.rename)
        return model.eval().to(where)  # of what does not heed where it is made

    def _not_imported(self, error: ImportError) -> str:
        """What to say of an error of `create`, which may be of a package that the library needs."""
        what = f"the model {self.name!r}" if self.library is None else f"the library {self.library!r} of the model {self.name!r}"
        if isinstance(error, ModuleNotFoundError) and error.name and "." not in error.name:  # no part of what is installed
            return f"{what} imports {error.name!r}, which is not installed: install it{self._how(', or all that the model needs: ')}"
        return f"{what} cannot be imported ({short(error)}){self._how(': ')}"

    def _how(self, before: str) -> str:
        return before + self.install if self.install else ""

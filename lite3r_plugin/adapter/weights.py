"""Weights of the models that the command line builds: from a file or from the Hugging Face Hub, loaded strictly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import HubError, InputError
from .downloads import download, is_hub_id

RANDOM = "random"
SAFETENSORS = ".safetensors"
PICKLED = (".pt", ".pth", ".bin")
HUB_FILE = "model.safetensors"

StateDict = dict[str, Tensor]


def find_weights(weights: str) -> Path:
    """The file behind `weights`: a path, a folder that holds ``model.safetensors``, or a Hub id, which is downloaded.

    Raises:
        InputError: there is no such file.
        HubError: the Hub does not give it.
    """
    path = Path(weights).expanduser()
    if path.is_dir():
        path = path / HUB_FILE
    if path.is_file():
        if path.suffix.lower() not in (SAFETENSORS, *PICKLED):
            raise InputError(f"{path}: weights are {SAFETENSORS} files, or {', '.join(PICKLED)} files that hold tensors only")
        return path
    if path.suffix.lower() in (SAFETENSORS, *PICKLED) or not is_hub_id(weights):
        raise InputError(
            f"no weights file {weights}; pass a {SAFETENSORS} file, a Hub id like facebook/VGGT-1B, or {RANDOM!r} for timing only"
        )
    return _download(weights)


def load_weights(model: nn.Module, file: Path, rename: Callable[[str], str | None] | None = None) -> None:
    """Copy the tensors of `file` into `model`: every one must be there, fit, and find its place.

    Args:
        model: The model, changed in place.
        file: A safetensors file, or a pickled one, which is read with ``weights_only=True``.
        rename: Gives the model's name for a name in the file, or None for a tensor that this model leaves out.

    Raises:
        InputError: the file is damaged or belongs to another model.
    """
    state = read_weights(file)
    if rename is not None:
        state = {new: tensor for name, tensor in state.items() if (new := rename(name)) is not None}
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    misfits = [
        f"{k} {list(state[k].shape)} for {list(own[k].shape)}" for k in sorted(own.keys() & state.keys()) if own[k].shape != state[k].shape
    ]
    problems = [_some("missing", missing), _some("unexpected", unexpected), _some("of another shape", misfits)]
    if any(problems):
        raise InputError(f"{file} holds the weights of another model than {type(model).__name__}: {'; '.join(filter(None, problems))}")
    model.load_state_dict(state)


def read_weights(file: Path) -> StateDict:
    """The state dict in a weights file, or in its entry ``state_dict`` or ``model``. Nothing else is unpickled.

    Raises:
        InputError: the file is damaged, or holds something else.
    """
    try:
        if file.suffix.lower() == SAFETENSORS:
            from safetensors.torch import load_file

            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its parser trips over
        raise InputError(
            f"{file} cannot be read as weights ({str(error).splitlines()[0]}); download it again, or save a state dict as safetensors"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    named = isinstance(state, Mapping) and all(isinstance(name, str) for name in state)
    if not named or not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise InputError(f"{file} holds no state dict (names to tensors); save model.state_dict() and nothing else")
    return dict(state)


def _download(repository: str) -> Path:
    instead = f"download the file elsewhere and pass its path, or pass {RANDOM!r} to measure time and memory only"
    file = download(repository, [HUB_FILE], instead=instead) / HUB_FILE
    if not file.is_file():
        raise HubError(f"{repository} on the Hugging Face Hub holds no {HUB_FILE}: {instead}")
    return file


def _some(what: str, names: list[str]) -> str:
    return f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""

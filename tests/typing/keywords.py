"""Keywords as type checkers and editors see them. It is checked and never run: each comment says that its line is an error, and a comment
that is not needed is one, too."""

# pyright: reportUnnecessaryTypeIgnoreComment=error

from torch import nn

from lite3r_plugin import DistillConfig, Lite3RConfig, apply_lite3r, distill, load_lite3r
from lite3r_plugin.hub import convert_official


def right(model: nn.Linear, path: str) -> None:
    same: nn.Linear = apply_lite3r(model, keep_ratio={"*.0.attn": 1.0, "*": 0.1}, pin="special", preset="fast")
    load_lite3r(same, path, preset="fast", cuda_graphs=False)
    distill(model, [], DistillConfig.published(seed=1), trainable="proj", steps=10, blocks=(1.0, 0.1))
    DistillConfig.from_toml(path, minutes=3)
    convert_official(path, "vggt", path, keep_ratio=1)
    Lite3RConfig().replace(dense_below=0)


def wrong(model: nn.Linear, path: str) -> None:
    apply_lite3r(model, keep_ration=0.1)  # pyright: ignore[reportCallIssue]
    apply_lite3r(model, pin="first")  # pyright: ignore[reportArgumentType]
    load_lite3r(model, path, keep_ratio=0.1)  # pyright: ignore[reportCallIssue]
    distill(model, [], step=10)  # pyright: ignore[reportCallIssue]
    distill(model, [], trainable="all")  # pyright: ignore[reportArgumentType]
    DistillConfig.published(lr=1e-3)  # pyright: ignore[reportCallIssue]
    DistillConfig.from_toml(path, minute=3)  # pyright: ignore[reportCallIssue]
    convert_official(path, "vggt", path, ratio=1)  # pyright: ignore[reportCallIssue]
    Lite3RConfig().replace(below=0)  # pyright: ignore[reportCallIssue]

"""How a model adapter describes where attention happens.

An adapter returns one `AttentionSite` per attention module. The site says how the module makes q, k and v
(its *projections*) and how the sequence that it sees is laid out (its *tokens*).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ..config import Scope
from ..errors import AdapterError, shown
from .layouts import LayoutFunction, TokenSource


@dataclass(frozen=True)
class Rope2D:
    """Axial rotary embedding of q and k (RoFormer, arXiv 2104.09864, on two axes, as in CroCo v2, VGGT, DA3 and Pi3).

    The first half of the head dimension is rotated by the token's first coordinate, the second half by the other. In a
    half of size h, element i is paired with element i + h/2, and the pair is rotated by ``position * base ** (-2i / h)``
    radians. D must be a multiple of 4.

    Attributes:
        base: Base of the frequencies.

    Raises:
        AdapterError: it is no positive number.

    Examples:
        >>> projections = FusedQKV(num_heads=16, rope=Rope2D(base=100.0), positions="pos")
    """

    base: float = 100.0

    def __post_init__(self) -> None:
        if type(self.base) not in (int, float) or not 0 < self.base < math.inf:
            raise AdapterError(f"base of a Rope2D is a positive number, got {shown(self.base)}")


@dataclass(frozen=True)
class FusedQKV:
    """One Linear makes q, k and v: ``qkv(x).view(B, N, 3, H, D)``. Names are children of the attention module.

    The host's forward takes x ``[B, N, C]`` and returns ``[B, N, C]``; the site runs all of it itself: qkv, norms, rotary
    embedding, attention with the scale ``D ** -0.5``, output projection, dropout. It is tried before on random weights; a host that
    does something else is taken as `Routed`.

    Attributes:
        num_heads: H.
        qkv, out: The input Linear, C to 3 * H * D, and the output Linear, H * D to C.
        q_norm, k_norm: Norms over the head dimension, before the rotary embedding, or None.
        attn_drop: Dropout of attention weights, which must be inactive; or None.
        out_drop: Dropout after ``out``, or None.
        rope: The rotary embedding, or None.
        positions: Name of the forward argument with the token coordinates ``[B, N, 2]``; None where there are none.

    Examples:
        >>> projections = FusedQKV(num_heads=16, q_norm="q_norm", k_norm="k_norm")
    """

    num_heads: int
    qkv: str = "qkv"
    out: str = "proj"
    q_norm: str | None = None
    k_norm: str | None = None
    attn_drop: str | None = None
    out_drop: str | None = None
    rope: Rope2D | None = None
    positions: str | None = None


@dataclass(frozen=True)
class SeparateQKV:
    """Three Linears make q, k and v. Names are children of the attention module.

    Attributes:
        num_heads: H.
        q, k, v: The input Linears, C to H * D each.
        out: The output Linear, H * D to C.
        q_norm, k_norm, attn_drop, out_drop, rope, positions: As in `FusedQKV`.
        returns_weights: The host returns ``(output, attention weights)``; the site returns ``(output, None)``.

    Examples:
        >>> projections = SeparateQKV(num_heads=12, q="query", k="key", v="value", out="dense")
    """

    num_heads: int
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    out: str = "out_proj"
    q_norm: str | None = None
    k_norm: str | None = None
    attn_drop: str | None = None
    out_drop: str | None = None
    rope: Rope2D | None = None
    positions: str | None = None
    returns_weights: bool = False


@dataclass(frozen=True)
class Routed:
    """Anything else: the host's own forward runs, and its one call of `scaled_dot_product_attention` is redirected.

    The call's q, k and v are ``[B, H, N, D]``. With several calls or none in one forward the host's own code runs, dense; so do calls
    with a mask or in causal order, of other queries than keys, and with dropout.

    Attributes:
        num_heads: H, which may be found out only from a forward: then None.
        same_tokens: The queries are of the same tokens as the keys and values, although they come from different
            arguments of the host's forward. Where that is not said, such a call is taken for cross-attention and runs dense.

    Examples:
        >>> site = AttentionSite("blocks.0.attn", "global", head_dim=64, projections=Routed())
    """

    num_heads: int | None = None
    same_tokens: bool = False


Projections = FusedQKV | SeparateQKV | Routed
"""How an attention module makes q, k and v."""


@dataclass(frozen=True)
class PreNormBlock:
    """The transformer block around a site, whose forward is exactly, with dropouts inactive,

        x = x + gain1 * attention(norm1(x))
        x = x + gain2 * down(activation(up(norm2(x))))

    with x ``[B, N, C]``, and whose further arguments go to the attention under the same names. A converted (FP8) model then
    runs it with each quantisation fused into the operation before it. Names are descendants of the block.
    `lite3r_plugin.testing.block_forward` is this definition as code; `check_adapter` compares the block with it, and so does a conversion,
    which leaves a block that does something else as it is.

    Attributes:
        fqn: Fully qualified name of the block.
        norm1, norm2: LayerNorms over C.
        up, down: The Linears of the MLP, C to its width (twice that for ``"swiglu"``) and back.
        activation: ``"gelu"``, ``"gelu_tanh"``, or ``"swiglu"``: ``silu(first half) * second half`` of what `up` gives.
        gain1, gain2: Parameters ``[C]`` (layer scale), or None.

    Examples:
        >>> block = PreNormBlock("blocks.0", up="mlp.fc1", down="mlp.fc2", gain1="ls1.gamma", gain2="ls2.gamma")
    """

    fqn: str
    up: str
    down: str
    activation: Literal["gelu", "gelu_tanh", "swiglu"] = "gelu"
    norm1: str = "norm1"
    norm2: str = "norm2"
    gain1: str | None = None
    gain2: str | None = None


@dataclass(frozen=True)
class AttentionSite:
    """One attention module of a model.

    Attributes:
        fqn: Fully qualified name of the module, as in `torch.nn.Module.get_submodule`.
        scope: ``"global"``: one sequence holds the tokens of all views; ``"frame"``: of one view; ``"encoder"``: of
            one view, inside the image encoder in front of a multi-view transformer; ``"camera"``: one token of each view, inside a
            head or an encoder of cameras. Those are so few that nothing can be dropped: they stay as they are, in full precision too,
            unless `Lite3RConfig.scopes` names them, for a linear branch that was trained there.
        head_dim: D, the size of a head.
        projections: How q, k and v are made.
        tokens: How the sequence is laid out: `TokenSource` where all views are alike, `LayoutFunction` elsewhere; None where it has no
            image grid (then token order is kept, and no token is exempt from dropping).
        block: The transformer block around the module, where it has the usual structure; None: its Linears are found,
            but it runs as it is.

    Raises:
        AdapterError: a field is of the wrong kind. Whether the description fits the model is found when it is applied.

    Examples:
        >>> tokens = TokenSource("patch_embed", patch_size=(14, 14), special_tokens=1)
        >>> sites = [AttentionSite(f"blocks.{i}.attn", "global", 64, FusedQKV(num_heads=12), tokens) for i in range(12)]
    """

    fqn: str
    scope: Scope
    head_dim: int
    projections: Projections
    tokens: TokenSource | LayoutFunction | None = None
    block: PreNormBlock | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.fqn, str):
            raise AdapterError(f"fqn of a site is the name of a module, got {shown(self.fqn)}")
        if not isinstance(self.scope, str) or self.scope not in get_args(Scope):
            raise AdapterError(f"site {self.fqn!r}: scope is one of {get_args(Scope)}, got {self.scope!r}")
        if type(self.head_dim) is not int or self.head_dim <= 0:
            raise AdapterError(f"site {self.fqn!r}: head_dim is a positive integer, got {self.head_dim!r}")
        for name, kind in (("projections", Projections), ("tokens", TokenSource | LayoutFunction | None), ("block", PreNormBlock | None)):
            if not isinstance(getattr(self, name), kind):
                raise AdapterError(f"site {self.fqn!r}: {name} is an instance of {kind}, got {getattr(self, name)!r}")

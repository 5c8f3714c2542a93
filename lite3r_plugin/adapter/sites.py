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
class KeyValueCache:
    """How the forward of an attention module takes and returns the keys and values of the tokens that came before (streaming).

    Where a cache is wanted, the tokens of the call attend to those of the cache and to each other, and ``(output, (k, v))`` is returned,
    with k and v of all of them: a list in the place of the pair where a list came in. The site keeps what it prepared of them, too, by
    the tensors that it returned: each frame is prepared once. Tensors that it did not return, or that were written to, are prepared anew.

    Attributes:
        past: Name of the argument that holds ``(k, v)``; None, or a pair of None, at the beginning.
        wanted: Name of the argument that says whether a cache is wanted; None: it is where `past` is given, be it a pair of None.
        by_calls: k and v are ``[B, H, T, n, D]``, T calls with n tokens each; else ``[B, H, N, D]``.
        finished: Keys are cached after norm and rotary embedding. Else before, and all calls have the positions of the last one, repeated.

    Examples:
        >>> projections = FusedQKV(num_heads=16, cache=KeyValueCache("past_key_values", wanted="use_cache"))
    """

    past: str
    wanted: str | None = None
    by_calls: bool = False
    finished: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.past, str) or not isinstance(self.wanted, (str, type(None))):
            raise AdapterError(f"past and wanted of a KeyValueCache are names of arguments, got {shown((self.past, self.wanted))}")


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
        mask: Name of the forward argument with a mask ``[N, N]`` as `scaled_dot_product_attention` takes it, or None. A frame-causal one
            has a sparse form, any other is attended to densely.
        cache: How keys and values of tokens that came before are given and returned, or None.

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
    mask: str | None = None
    cache: KeyValueCache | None = None


@dataclass(frozen=True)
class SeparateQKV:
    """Three Linears make q, k and v. Names are children of the attention module.

    In cross-attention keys and values are made of other tokens than queries: `key` and `value` name the arguments of the forward that
    hold them, ``[B, M, C]`` each, and `keys` of the site says how they are laid out.

    Attributes:
        num_heads: H.
        q, k, v: The input Linears, C to H * D each.
        out: The output Linear, H * D to C.
        q_norm, k_norm, attn_drop, out_drop, rope, positions: As in `FusedQKV`.
        returns_weights: The host returns ``(output, attention weights)``; the site returns ``(output, None)``.
        key, value: Names of the arguments that keys and values are made of; None: the first one, of which queries are made.
        key_positions: Name of the argument with the coordinates of keys ``[B, M, 2]``, in cross-attention.

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
    key: str | None = None
    value: str | None = None
    key_positions: str | None = None

    def __post_init__(self) -> None:
        if (self.key is None) != (self.value is None) or (self.key_positions is not None and self.key is None):
            raise AdapterError("SeparateQKV of cross-attention names key and value, and may name key_positions; of self-attention none")


@dataclass(frozen=True)
class Routed:
    """Anything else: the host's own forward runs, and its one call of `scaled_dot_product_attention` is redirected.

    The call's q, k and v are ``[B, H, N, D]``; k and v are of other tokens where the site has `keys`. With several calls or none in one
    forward the host's own code runs, dense; so do calls in causal order, of other queries than keys where the site has none, with dropout,
    and with a mask, unless that is frame-causal in a sequence of views.

    Attributes:
        num_heads: H, which may be found out only from a forward: then None.
        same_tokens: The queries are of the same tokens as the keys and values, although they come from different
            arguments of the host's forward. Where that is not said, such a call is taken for cross-attention and runs dense.
        out: The output Linear, a descendant of the attention module, which FP8 leaves by default; None: it is found by its name.

    Examples:
        >>> site = AttentionSite("blocks.0.attn", "global", head_dim=64, projections=Routed())
    """

    num_heads: int | None = None
    same_tokens: bool = False
    out: str | None = None


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
        keys: The same of keys and values, where they are of other tokens than queries: those of another view, or of a cache that the
            host's own code keeps. None: they are of the same tokens, or nothing is known of them.
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
    keys: TokenSource | LayoutFunction | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.fqn, str):
            raise AdapterError(f"fqn of a site is the name of a module, got {shown(self.fqn)}")
        if not isinstance(self.scope, str) or self.scope not in get_args(Scope):
            raise AdapterError(f"site {self.fqn!r}: scope is one of {get_args(Scope)}, got {self.scope!r}")
        if type(self.head_dim) is not int or self.head_dim <= 0:
            raise AdapterError(f"site {self.fqn!r}: head_dim is a positive integer, got {self.head_dim!r}")
        layouts = TokenSource | LayoutFunction | None
        for name, kind in (("projections", Projections), ("tokens", layouts), ("block", PreNormBlock | None), ("keys", layouts)):
            if not isinstance(getattr(self, name), kind):
                raise AdapterError(f"site {self.fqn!r}: {name} is an instance of {kind}, got {getattr(self, name)!r}")

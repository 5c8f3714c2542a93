"""An off-screen renderer of worlds: OpenGL 3.3 through EGL, colour and exact depth.

All views of a clip are tiles of one picture. Colour is rendered with several samples a pixel into half floats, exposed as a clip,
and developed; depth is rendered separately, one sample at each pixel centre.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from . import shaders
from .files import ALPHA, SKY, Array, World
from .light import Light

NEAR, FAR = 0.04, 3000.0  # metres
SHADOW_SIZE, SHADOW_RADIUS, SHADOW_DEPTH = 2048, 60.0, 200.0  # texels, metres, metres


class Renderer:
    """One for a process and GPU.

    Args:
        samples: Colour samples a pixel in each direction.
        device: Index of the EGL device, by default the driver's first.
    """

    def __init__(self, samples: int = 2, device: int | None = None) -> None:
        import moderngl  # pyright: ignore[reportMissingImports]

        chosen = {} if device is None else {"device_index": device}
        self.gl, self.samples = moderngl, samples
        self.ctx = moderngl.create_context(standalone=True, backend="egl", require=330, **chosen)
        self.colour = self._program(shaders.VERTEX, shaders.COLOUR)
        self.depth = self._program(shaders.VERTEX, shaders.DEPTH)
        self.shadow = self._program(shaders.SHADOW_VERTEX, shaders.SHADOW)
        self.background = self._program(shaders.QUAD_VERTEX, shaders.BACKGROUND)
        self.resolve = self._program(shaders.QUAD_VERTEX, shaders.RESOLVE)
        corners = self.ctx.buffer(np.array([-1, -1, 1, -1, -1, 1, 1, 1], np.float32).tobytes())
        self.sky_quad, self.film_quad = (self.ctx.vertex_array(p, [(corners, "2f", "in_q")]) for p in (self.background, self.resolve))
        self.shadow_map = self.ctx.depth_texture((SHADOW_SIZE, SHADOW_SIZE))
        self.shadow_map.repeat_x = self.shadow_map.repeat_y = False
        self.shadow_target = self.ctx.framebuffer(depth_attachment=self.shadow_map)
        self._targets: tuple[tuple[int, ...], tuple[Any, ...]] | None = None

    def upload(self, world: World) -> LoadedWorld:
        """The world's buffers on the GPU."""
        return LoadedWorld(self, world)

    def render(
        self, loaded: LoadedWorld, w2c: Array, K: Array, height: int, width: int, light: Light, seed: int = 0
    ) -> tuple[Array, Array]:
        """Render a clip of at most `shaders.MAX_VIEWS` views.

        Args:
            loaded: The world.
            w2c, K: ``[V, 3, 4]``, OpenCV, and ``[V, 3, 3]`` in pixels, pixel centres at +0.5.
            height, width: Of a view, in pixels.
            light, seed: Light and film, and what is random in them.

        Returns:
            Colours ``[V, H, W, 3]`` u8, and depth along the optical axis ``[V, H, W]`` f32 in metres, 0 in the sky.
        """
        gl, ctx, samples, count = self.gl, self.ctx, self.samples, len(w2c)
        columns = math.ceil(math.sqrt(count))
        rows = -(-count // columns)
        hdr, hdr_target, depth_target, film_target = self._buffers(columns, rows, height, width)[:4]
        rotation, shift = np.asarray(w2c, np.float64)[:, :, :3], np.asarray(w2c, np.float64)[:, :, 3]
        eye = -np.einsum("vji,vj->vi", rotation, shift)
        projection = np.stack((2 * K[:, 0, 0] / width, 2 * K[:, 1, 1] / height, 2 * K[:, 0, 2] / width - 1, 2 * K[:, 1, 2] / height - 1), 1)
        clip_z = np.array([(FAR + NEAR) / (FAR - NEAR), -2 * FAR * NEAR / (FAR - NEAR)])
        loaded.textures.use(0)
        loaded.pages.use(1)
        self.shadow_map.use(2)
        ctx.disable(gl.CULL_FACE)

        def each_view(program: Any, draw: Callable[[], None], scale: int) -> None:
            for i in range(count):
                tile = (i % columns * width * scale, i // columns * height * scale, width * scale, height * scale)
                ctx.viewport = tile
                _set(program, R=rotation[i].T, eye=eye[i], proj=projection[i], clipz=clip_z)
                draw()

        middle = eye.mean(0)
        to_sun = _sun_matrix(light.sun_dir, middle)
        self.shadow_target.use()
        self.shadow_target.clear(depth=1.0)
        ctx.enable(gl.DEPTH_TEST)
        ctx.viewport = (0, 0, SHADOW_SIZE, SHADOW_SIZE)
        _set(self.shadow, sun_m=to_sun.T, tex=0)
        loaded.shadow.render()

        hdr_target.use()
        hdr_target.clear()
        sky = {name: getattr(light, name) for name in ("sky_up", "sky_low", "sun_dir", "sun_rgb")}
        sky["cloud"] = np.array([light.cloud, (seed % 1000) * 0.37])
        _set(self.background, **sky)
        ctx.disable(gl.DEPTH_TEST)
        each_view(self.background, lambda: self.sky_quad.render(gl.TRIANGLE_STRIP), samples)
        ctx.enable(gl.DEPTH_TEST)
        baked = np.array([light.baked * loaded.has_light, float(loaded.has_light), 1.2 / SHADOW_SIZE])
        lamp = {"lamp_pos": middle + light.lamp_off, "lamp_rgb": light.lamp_rgb, "lamp_k": np.array([light.lamp_range**-2, light.grain])}
        _set(self.colour, tex=0, pages=1, shadow=2, sun_m=to_sun.T, amb_up=light.amb_up, amb_low=light.amb_low, skip_alpha=0)
        _set(self.colour, mixw=baked, **lamp, **sky)
        each_view(self.colour, loaded.colour.render, samples)

        film_target.use()
        ctx.disable(gl.DEPTH_TEST)
        ctx.viewport = (0, 0, columns * width, rows * height)
        gain = np.zeros((shaders.MAX_VIEWS, 4), np.float32)
        jitter = np.exp(np.random.default_rng(seed).normal(size=(count, 1)) * light.view_jitter)
        gain[:count, :3] = _exposure(hdr, light.key) * light.wb * jitter
        hdr.use(3)
        film = np.array([light.blur, light.noise, light.saturation, light.contrast])
        _set(self.resolve, hdr=3, lay=(width, height, samples, columns), gain=gain, seed=float(seed % 4093), film=film)
        self.film_quad.render(gl.TRIANGLE_STRIP)

        depth_target.use()
        depth_target.clear()
        ctx.enable(gl.DEPTH_TEST)
        _set(self.depth, tex=0, skip_alpha=0)
        each_view(self.depth, loaded.depth.render, 1)

        def tiles(data: bytes, dtype: Any) -> Array:
            flat = np.frombuffer(data, dtype).reshape(rows, height, columns, width, -1)
            return np.ascontiguousarray(flat.swapaxes(1, 2).reshape(rows * columns, height, width, -1)[:count])

        rgb = tiles(film_target.read(components=3, alignment=1), np.uint8)
        return rgb, tiles(depth_target.read(components=1, dtype="f4", alignment=1), np.float32)[..., 0]

    def _program(self, vertex: str, fragment: str) -> Any:
        return self.ctx.program(vertex_shader=vertex, fragment_shader=fragment)

    def _buffers(self, columns: int, rows: int, height: int, width: int) -> tuple[Any, ...]:
        shape = (columns, rows, height, width)
        if self._targets is None or self._targets[0] != shape:
            if self._targets is not None:
                for old in self._targets[1]:
                    old.release()
            ctx, small = self.ctx, (columns * width, rows * height)
            large = (small[0] * self.samples, small[1] * self.samples)
            hdr, depth, film = ctx.texture(large, 4, dtype="f2"), ctx.texture(small, 1, dtype="f4"), ctx.renderbuffer(small, 4)
            hdr.filter = (self.gl.LINEAR_MIPMAP_NEAREST, self.gl.NEAREST)
            z_large, z_small = ctx.depth_renderbuffer(large), ctx.depth_renderbuffer(small)
            frames = (ctx.framebuffer([hdr], z_large), ctx.framebuffer([depth], z_small), ctx.framebuffer([film]))
            self._targets = shape, (hdr, *frames, z_large, depth, z_small, film)
        return self._targets[1]


class LoadedWorld:
    """A world's buffers on the GPU."""

    def __init__(self, renderer: Renderer, world: World) -> None:
        self.world, self.gl = world, renderer.gl
        self.has_light = bool(world.meta.get("col_is_light"))
        ctx = renderer.ctx
        per_layer = (world.layer[:, None], world.page[:, None], world.flags[world.layer][:, None])
        columns = (world.pos, _normals(world), world.uv, world.lm, world.col / 255.0, *per_layer)
        vertices = ctx.buffer(np.concatenate(columns, 1).astype(np.float32).tobytes())
        triangles = ctx.buffer(np.ascontiguousarray(world.tri, np.int32).tobytes())
        few = [(vertices, "3f 12x 4f 12x 3f", "in_p", "in_t", "in_k")]
        every = [(vertices, "3f 3f 4f 3f 3f", "in_p", "in_n", "in_t", "in_c", "in_k")]
        self.colour = ctx.vertex_array(renderer.colour, every, triangles)
        self.depth = ctx.vertex_array(renderer.depth, few, triangles)
        self.shadow = ctx.vertex_array(renderer.shadow, few, triangles)
        layers, side = world.textures.shape[:2]
        self.textures = ctx.texture_array((side, side, layers), 4, np.ascontiguousarray(world.textures).tobytes())
        self.textures.repeat_x = self.textures.repeat_y = True
        self._mipmaps()
        pages = world.pages if len(world.pages) else np.full((1, 4, 4, 3), 128, np.uint8)
        count, high, wide = pages.shape[:3]
        self.pages = ctx.texture_array((wide, high, count), 3, np.ascontiguousarray(pages).tobytes(), alignment=1)
        self.pages.repeat_x = self.pages.repeat_y = False
        self.swapped: list[int] = []

    def retexture(self, rng: np.random.Generator, pictures: list[Image.Image], share: float) -> None:
        """Lay pictures over a share of the opaque textures; the last swap is undone."""
        side = self.world.textures.shape[1]
        for layer in self.swapped:
            self._write(layer, self.world.textures[layer])
        solid = np.flatnonzero((self.world.flags & (SKY | ALPHA)) == 0)
        self.swapped = [int(layer) for layer in solid if rng.random() < share]
        for layer in self.swapped:
            picture = pictures[rng.integers(len(pictures))]
            pixels = np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR))
            self._write(layer, np.rot90(pixels, int(rng.integers(4))) if rng.random() < 0.5 else pixels[:, ::-1])
        self._mipmaps()

    def _write(self, layer: int, pixels: Array) -> None:
        side = self.world.textures.shape[1]
        self.textures.write(np.ascontiguousarray(pixels).tobytes(), viewport=(0, 0, layer, side, side, 1))

    def _mipmaps(self) -> None:
        self.textures.build_mipmaps()
        self.textures.filter = (self.gl.LINEAR_MIPMAP_LINEAR, self.gl.LINEAR)
        self.textures.anisotropy = 8.0


def _normals(world: World) -> Array:
    """Normals of the vertices ``[N, 3]``: mean over the triangles at each place, weighted by their areas."""
    corners = world.pos[world.tri]
    face = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    _, place = np.unique(world.pos, axis=0, return_inverse=True)
    place = place.reshape(-1)
    total = np.zeros((place.max() + 1, 3))
    for corner in range(3):
        for axis in range(3):
            total[:, axis] += np.bincount(place[world.tri[:, corner]], face[:, axis], len(total))
    normals = total[place]
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)


def _exposure(hdr: Any, key: float) -> float:
    """Gain that brings a clip to the brightness `key`, from a small copy of it."""
    hdr.build_mipmaps()
    level = max(0, int(math.log2(max(hdr.size) / 96)))
    width, height = (max(1, side >> level) for side in hdr.size)
    pixels = np.frombuffer(hdr.read(level=level, alignment=1), np.float16).reshape(height, width, 4).astype(np.float32)
    luminance = (pixels[..., :3] @ np.array([0.3, 0.59, 0.11], np.float32))[pixels[..., 3] > 0.5]
    if not len(luminance):
        return key
    return key / max(0.5 * float(np.minimum(luminance, 4.0).mean()) + 0.5 * float(np.median(luminance)), 0.004)


def _sun_matrix(direction: Array, middle: Array) -> Array:
    """From the world to the shadow map's clip space, ``[4, 4]``, around `middle`."""
    x = np.cross(direction, [0.0, 0.0, 1.0])
    x = x / np.linalg.norm(x) if np.linalg.norm(x) > 1e-3 else np.array([1.0, 0.0, 0.0])
    matrix = np.eye(4)
    matrix[:3, :3] = np.stack((x / SHADOW_RADIUS, np.cross(direction, x) / SHADOW_RADIUS, -direction / SHADOW_DEPTH))
    matrix[:3, 3] = -matrix[:3, :3] @ middle
    return matrix


def _set(program: Any, **values: Any) -> None:
    """Set those uniforms that the program has."""
    for name, value in values.items():
        if name in program:
            if isinstance(value, np.ndarray):
                program[name].write(np.ascontiguousarray(value, np.float32).tobytes())
            else:
                program[name].value = value

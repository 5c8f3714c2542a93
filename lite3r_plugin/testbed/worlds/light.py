"""The light and the film of a clip."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .files import Array


@dataclass(frozen=True)
class Light:
    """Colours are linear RGB ``[3]``.

    Attributes:
        sun_dir, sun_rgb: Unit vector to the sun, and its light.
        amb_up, amb_low, sky_up, sky_low: Ambient light from above and below; colours of the sky at the zenith and the horizon.
        lamp_rgb, lamp_off, lamp_range: A point light: its colour, its place from the mean camera and its reach, in metres.
        baked: Share of the light that the world brings.
        cloud: Amount of clouds.
        key, wb, view_jitter: Mean brightness aimed at; gains of the channels; relative change of the gain from view to view.
        blur, noise: Standard deviations: of a blur in pixels, and of noise at white.
        saturation, contrast: 1 changes nothing.
        grain: Strength of fine noise on surfaces, in the logarithm of the albedo.
    """

    sun_dir: Array
    sun_rgb: Array
    amb_up: Array
    amb_low: Array
    sky_up: Array
    sky_low: Array
    lamp_rgb: Array
    lamp_off: Array
    lamp_range: float
    baked: float
    cloud: float
    key: float
    wb: Array
    view_jitter: float
    blur: float
    noise: float
    saturation: float
    contrast: float
    grain: float

    @staticmethod
    def random(rng: np.random.Generator, baked_world: bool) -> Light:
        """A random light.

        Args:
            rng: The source of randomness.
            baked_world: The world brings light maps.
        """
        height, azimuth = rng.uniform(0.25, 1.45), rng.uniform(0, 2 * np.pi)
        warm = rng.normal() * 0.12
        baked = 0.0 if not baked_world else 1.0 if rng.random() < 0.4 else float(rng.uniform(0.25, 1))
        rest = 1.15 - baked
        ambient = rng.uniform(0.15, 0.6) * rest + 0.05
        grey = rng.random()
        zenith = np.array([0.12, 0.3, 0.85]) * (1 - grey) + np.array([0.5, 0.55, 0.6]) * grey
        horizon = np.array([0.9, 0.55, 0.35]) if rng.random() < 0.2 else np.array([0.65, 0.75, 0.85])
        return Light(
            sun_dir=np.array([np.cos(height) * np.cos(azimuth), np.cos(height) * np.sin(azimuth), np.sin(height)]),
            sun_rgb=np.array([1 + warm, 1, 1 - warm]).clip(0.6, 1.4) * rng.uniform(0.2, 2.0) * rest,
            amb_up=(0.5 + 0.5 * zenith) * ambient * rng.uniform(0.6, 1.3),
            amb_low=np.ones(3) * ambient * rng.uniform(0.3, 1.0),
            sky_up=zenith * rng.uniform(0.5, 1.4),
            sky_low=horizon * rng.uniform(0.6, 1.3),
            lamp_rgb=np.clip(1 + rng.normal(size=3) * 0.2, 0.3, 1.7) * rng.uniform(0.1, 1.2) * (rng.random() < 0.5),
            lamp_off=rng.normal(size=3) * [1.0, 1.0, 0.4],
            lamp_range=float(rng.uniform(2, 8)),
            baked=baked,
            cloud=float(rng.uniform(0, 1) * (rng.random() < 0.7)),
            key=float(rng.uniform(0.14, 0.32)),
            wb=np.clip(1 + rng.normal(size=3) * 0.06, 0.8, 1.2),
            view_jitter=0.06 * float(rng.random() < 0.5),
            blur=float(rng.uniform(0.2, 0.7) * (rng.random() < 0.25)),
            noise=float(rng.uniform(0.004, 0.03) * (rng.random() < 0.5)),
            saturation=float(rng.uniform(0.6, 1.25)),
            contrast=float(rng.uniform(0.85, 1.12)),
            grain=float(rng.uniform(0.1, 0.9) * (rng.random() < 0.6)),
        )

"""Rotary frequencies stretched for contexts longer than a model was trained on.

`linear`: Chen et al. 2023 (position interpolation); `yarn`: Peng et al. 2023, arXiv:2309.00071; `llama3`: Llama 3.1
(Grattafiori et al. 2024). Frequencies and attention factors are those of transformers' modeling_rope_utils, bit by bit.
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RopeScaling:
    """How the frequencies theta^(-2i/rot_dim) are changed; `kind` none, linear, llama3 or yarn.

    `factor`: how many times longer the context becomes; `original_max_positions`: how long it was. A wave is kept
    where it turns more often than `high_freq_factor` (llama3) or `beta_fast` (yarn) times within the original length,
    slowed down by the whole factor below `low_freq_factor` or `beta_slow` times, and blended between.
    """

    kind: str = "none"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    def frequencies(self, rot_dim: int, theta: float, device: torch.device) -> torch.Tensor:
        """Radians per position of each pair of features, float32 [rot_dim/2]."""
        powers = torch.arange(0, rot_dim, 2, dtype=torch.float32, device=device) / rot_dim
        waves = theta**powers
        if self.kind == "linear":
            return 1.0 / waves / self.factor
        if self.kind == "llama3":
            return self._llama3(1.0 / waves)
        if self.kind == "yarn":
            kept = 1 - self._ramp(rot_dim, theta).to(device)
            return 1.0 / (self.factor * waves) * (1 - kept) + 1.0 / waves * kept
        return 1.0 / waves

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by; the scores see its square (yarn's temperature)."""
        if self.kind != "yarn":
            return 1.0
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    def _mscale(self, weight: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1.0

    def _llama3(self, frequencies: torch.Tensor) -> torch.Tensor:
        length = self.original_max_positions
        wavelength = 2 * math.pi / frequencies
        slow = wavelength > length / self.low_freq_factor
        between = ~slow & ~(wavelength < length / self.high_freq_factor)
        share = (length / wavelength - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blended = (1 - share) * frequencies / self.factor + share * frequencies
        return torch.where(between, blended, torch.where(slow, frequencies / self.factor, frequencies))

    def _ramp(self, rot_dim: int, theta: float) -> torch.Tensor:
        """From 0 (pairs of features to keep) to 1 (those to slow down)."""

        def pair_of(turns: float) -> float:
            return rot_dim * math.log(self.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(pair_of(self.beta_fast)), 0)
        high: float = min(math.ceil(pair_of(self.beta_slow)), rot_dim - 1)
        if low == high:
            high += 0.001  # a ramp of no width would divide by 0
        return ((torch.arange(rot_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)

"""Rotary frequencies stretched for contexts longer than those the model was trained on.

`linear`: Chen et al. 2023 (position interpolation); `yarn`: Peng et al. 2023, arXiv:2309.00071; `llama3`: Llama 3.1
(Grattafiori et al. 2024). Frequencies and attention factors equal those of transformers' modeling_rope_utils bitwise.
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RopeScaling:
    """How the frequencies theta^(-2i/rot_dim) are changed; `kind`: none, linear, llama3 or yarn.

    `factor`: how many times longer the context becomes; `original_max_positions`: its original length. A frequency is
    kept if it makes more than `high_freq_factor` (llama3) or `beta_fast` (yarn) turns within the original length,
    divided by `factor` below `low_freq_factor` or `beta_slow` turns, and interpolated in between.
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
        """The factor on cosines and sines; attention scores are multiplied by its square (yarn's temperature)."""
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
        """A ramp over pairs of features, [rot_dim/2], from 0 (frequency kept) to 1 (divided by `factor`)."""

        def pair_of(turns: float) -> float:
            return rot_dim * math.log(self.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(pair_of(self.beta_fast)), 0)
        high: float = min(math.ceil(pair_of(self.beta_slow)), rot_dim - 1)
        if low == high:
            high += 0.001  # avoids a division by 0
        return ((torch.arange(rot_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)

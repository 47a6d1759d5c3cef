"""The order of samples: a pure function of (seed, i), so that resuming needs only the number i of consumed samples."""

import numpy as np
from numpy.typing import NDArray


class EpochOrder:
    """Visits samples 0 to num_samples - 1 once per epoch, in an order drawn from (seed, epoch)."""

    def __init__(self, num_samples: int, seed: int, shuffle: bool = True) -> None:
        if seed < 0:
            raise ValueError(f"seed={seed} must be 0 or more")
        self.num_samples = num_samples
        self.seed = seed
        self.shuffle = shuffle
        self._permutations: dict[int, NDArray[np.integer]] = {}

    def __getitem__(self, consumed: int) -> tuple[int, int]:
        """Return (epoch, sample) of the global sample number `consumed`, which increases over all epochs."""
        if consumed < 0:
            raise IndexError(f"sample {consumed} is negative")
        epoch, i = divmod(consumed, self.num_samples)
        return epoch, int(self._permutation(epoch)[i]) if self.shuffle else i

    def _permutation(self, epoch: int) -> NDArray[np.integer]:
        if epoch not in self._permutations:
            # Keep two: a global batch can cross the end of an epoch.
            for old in list(self._permutations)[:-1]:
                del self._permutations[old]
            samples = np.arange(self.num_samples, dtype=np.min_scalar_type(self.num_samples))
            np.random.Generator(np.random.Philox(key=[self.seed, epoch])).shuffle(samples)
            self._permutations[epoch] = samples
        return self._permutations[epoch]


class SampleOrder(EpochOrder):
    """The order of windows; window k covers tokens [k * seq_len, (k + 1) * seq_len], both ends included.

    The last label of window k is the first input of window k + 1, so the stream has
    `num_samples = (num_tokens - 1) // seq_len` windows. Raises ValueError if there is none.
    """

    def __init__(self, num_tokens: int, seq_len: int, seed: int, shuffle: bool = True) -> None:
        if seq_len < 1:
            raise ValueError(f"seq_len={seq_len} must be at least 1")
        if num_tokens <= seq_len:
            raise ValueError(
                f"the data has {num_tokens} tokens, but one sample of seq_len={seq_len} needs {seq_len + 1}; "
                f"use more data or a smaller seq_len"
            )
        super().__init__((num_tokens - 1) // seq_len, seed, shuffle)
        self.seq_len = seq_len

"""Seeds of independent random streams, each a pure function of the run's seed and the stream's name."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *stream: str | int) -> int:
    """Return the 63-bit seed of one stream, for example ``derive_seed(seed, "augment", step)``.

    The stream's name determines its state. Checkpoints therefore store no random state, and every number of processes
    draws the same.
    """
    name = "/".join(str(part) for part in (seed, *stream))
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1

"""Seeds for independent random streams, as a pure function of the run's seed and a name."""

import hashlib


def derive_seed(seed: int, *stream: str | int) -> int:
    """A 63-bit seed for one stream, for example ``derive_seed(seed, "augment", step)``.

    Because a stream's state follows from its name, nothing random has to be stored in a checkpoint, and it is the same
    for any number of processes.
    """
    name = "/".join(str(part) for part in (seed, *stream))
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1

"""``python -m largebatch``: the ``largebatch`` command."""

import sys

if not sys.flags.safe_path:
    sys.path.append(sys.path.pop(0))  # the working directory: a random.py there doesn't replace Python's

from largebatch.cli import main

if __name__ == "__main__":
    sys.exit(main())

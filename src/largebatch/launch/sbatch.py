"""``sbatch`` that doesn't wait where the queue is full: ``python -m largebatch.launch.sbatch SCRIPT``.

sbatch itself tries for two minutes, and says so only where nobody reads it: submitit collects what it says.
"""

from __future__ import annotations

import subprocess
import sys

_TRIES_AGAIN = "sleeping and retrying"


def main(arguments: list[str]) -> int:
    with subprocess.Popen(["sbatch", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as sbatch:
        assert sbatch.stdout is not None
        assert sbatch.stderr is not None
        for line in sbatch.stderr:
            print(line.replace(f", {_TRIES_AGAIN}", ""), end="", file=sys.stderr)
            if _TRIES_AGAIN in line:  # it was refused, so nothing is in the queue
                sbatch.kill()
                return 1
        print(sbatch.stdout.read(), end="")
        return sbatch.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

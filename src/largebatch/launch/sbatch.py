"""``sbatch`` that fails at once if the queue is full: ``python -m largebatch.launch.sbatch SCRIPT``.

sbatch itself retries for two minutes; the user doesn't see its message, because submitit captures it.
"""

from __future__ import annotations

import subprocess
import sys

_RETRIES = "sleeping and retrying"


def main(arguments: list[str]) -> int:
    with subprocess.Popen(["sbatch", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as sbatch:
        assert sbatch.stdout is not None
        assert sbatch.stderr is not None
        for line in sbatch.stderr:
            print(line.replace(f", {_RETRIES}", ""), end="", file=sys.stderr)
            if _RETRIES in line:  # SLURM refused the job, so the queue has nothing of it
                sbatch.kill()
                return 1
        print(sbatch.stdout.read(), end="")
        return sbatch.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

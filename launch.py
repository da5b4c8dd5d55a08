"""Entry point in a checkout: ``largebatch run`` with the checkout's code and presets, also without an installation.

python launch.py optimizer=tvlars batch_size=1024
python launch.py -m optimizer=lars,lamb,tvlars seed=0,1,2
"""

import os
import sys

# The working directory and this file's folder come last, so that a random.py there doesn't replace Python's.
ROOT = os.path.dirname(os.path.abspath(__file__))
sys.path.append(os.getcwd())
sys.path.sort(key=("", ROOT, os.getcwd()).__contains__)

# Workers run the same code as this process, also beside an installed package.
SOURCE = os.path.join(ROOT, "src")
sys.path.insert(0, SOURCE)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (SOURCE, os.environ.get("PYTHONPATH"))))

if __name__ == "__main__":
    from largebatch.cli import main

    sys.exit(main(["run", *sys.argv[1:]]))

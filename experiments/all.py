"""Does every claim hold?

Runs all experiments that have stations and writes one page to walk through them, as `xentlab tour` does:
`python experiments/all.py --quick` for a first look.
"""

import sys

from xentlab.cli import main

if __name__ == "__main__":
    main(["tour", *sys.argv[1:]])

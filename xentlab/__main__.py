"""python -m xentlab"""

from xentlab.cli import main

main()

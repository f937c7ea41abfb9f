"""python -m xentlab.cli"""

from xentlab.cli import main

main()

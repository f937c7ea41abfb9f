"""The catalogue's losses, a family a file. `xentlab.catalogue` finds them by scanning this package."""

"""The type checker of the tests: beartype, for which an int is a float too (PEP 484's numeric tower)."""

import beartype

check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))

"""beartype as the tests use it: an int is a float, as PEP 484 says and every type checker agrees."""

from beartype import BeartypeConf
from beartype import beartype as _beartype

check = _beartype(conf=BeartypeConf(is_pep484_tower=True))

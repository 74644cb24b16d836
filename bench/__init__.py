"""Measurements of Sheaf beside its peers, in one run, interleaved; `python -m bench` runs them and writes results."""

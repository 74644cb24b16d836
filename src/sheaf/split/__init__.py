"""Layers split among workers: slices that look whole, rules for torch's functions, and the rehearsal that decides."""

"""The public verbs, one module each: train, fit, plan, verify, measure. ``sheaf.train`` and the others are these.

Nothing is imported here: a verb loads only what it needs, and a name such as ``sheaf.api.train`` is always the module.
"""

"""The waist: what a plan is, what each worker holds under it, and every rule it breaks."""

from sheaf.plans.plan import Plan

__all__ = ["Plan"]

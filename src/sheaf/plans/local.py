"""Steps between meetings: what a plan's ``local`` says."""

import re
from dataclasses import dataclass

from sheaf.errors import PlanError, nearest

KINDS = {"average": (1.0, 0.0), "slowmo": (1.0, 0.7), "diloco": (0.7, 0.9)}  # learning rate and momentum, of the papers
_SETTINGS = ("lr", "momentum", "after", "fragments", "overlap")


@dataclass(frozen=True)
class Local:
    """Each worker steps alone, and every ``every`` steps weights meet; 0: gradients meet in every step.

    ``kind``       ``average``, ``slowmo`` or ``diloco``: what becomes of weights that meet
    ``lr, momentum``  of the outer optimizer
    ``after``      steps at the start in which gradients meet (post-local SGD: Lin et al., "Don't Use Large
                   Mini-Batches, Use Local SGD", 2020)
    ``fragments``  parts of the model that meet at different steps, ``overlap`` the steps that a part may travel while
                   workers go on (Douillard et al., "Streaming DiLoCo", 2025)

    >>> Local.parse("16:diloco:lr=0.5:after=100")
    Local(every=16, kind='diloco', lr=0.5, momentum=0.9, after=100, fragments=1, overlap=0)
    """

    every: int = 0
    kind: str = "average"
    lr: float = 1.0
    momentum: float = 0.0
    after: int = 0
    fragments: int = 1
    overlap: int = 0

    @classmethod
    def parse(cls, text: str) -> "Local":
        """Read what ``local=`` says. Raises PlanError listing everything wrong with it."""
        every, *rest = text.split(":")
        broken: list[str] = []
        if not re.fullmatch(r"\d+", every):
            broken.append(f"local={text}: write the steps between meetings first, such as local=16:diloco")
        kind = rest.pop(0) if rest and "=" not in rest[0] else "average"
        if kind not in KINDS:
            broken.append(f"local={text}: {kind!r} is no way to meet; {nearest(kind, KINDS)}")
        lr, momentum = KINDS.get(kind, (1.0, 0.0))
        values: dict[str, float] = {"lr": lr, "momentum": momentum, "after": 0, "fragments": 1, "overlap": 0}
        for setting in rest:
            key, _, value = setting.partition("=")
            if key not in _SETTINGS:
                broken.append(f"local={text}: {key!r} is no setting; {nearest(key, _SETTINGS)}")
            elif not re.fullmatch(r"\d+(\.\d+)?" if key in ("lr", "momentum") else r"\d+", value):
                broken.append(f"local={text}: {key}={value} is not a number it takes")
            else:
                values[key] = float(value)
        if broken:
            raise PlanError(broken)
        made = cls(
            int(every), kind, values["lr"], values["momentum"],
            int(values["after"]), int(values["fragments"]), int(values["overlap"]),
        )  # fmt: skip
        wrong = made._broken(text)
        if wrong:
            raise PlanError(wrong)
        return made

    def _broken(self, text: str) -> list[str]:
        broken: list[str] = []
        if self.kind == "average" and (self.lr, self.momentum) != KINDS["average"]:
            broken.append(f"local={text}: average has neither lr nor momentum: use slowmo or diloco, or drop them")
        if self.momentum >= 1:
            broken.append(f"local={text}: momentum must be below 1, or it grows without end")
        if self.every and not 1 <= self.fragments <= self.every:
            broken.append(f"local={text}: fragments meet at different steps: use 1 to {self.every}")
        if self.every and self.overlap >= self.every:
            broken.append(f"local={text}: what travels must arrive before the next meeting: overlap below {self.every}")
        if not self.every and self != Local():
            broken.append(f"local={text}: with 0 steps between meetings nothing is to be set: raise it, or drop local")
        return broken

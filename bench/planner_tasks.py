"""The tasks on which the planner is judged, with the plans that suit each.

A step takes about a tenth of a second, and on a link of 100 Mbit/s, where gradients are at most 2 MB, up to a third.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Subset

from sheaf.task import Loss, Task
from sheaf.zoo.models import MoE
from sheaf.zoo.tasks import bert_text, digits_mlp, digits_resnet, text_gpt, translation, vgg_digits, volumes
from sheaf.zoo.tasks.text import VOCABULARY, Windows, reference_text

ALONE = ("serial", "recompute=full")
PAIRS = (
    "dp=2",
    "dp=2,shares=stolen",
    "dp=2,zero=1",
    "dp=2,zero=2",
    "dp=2,zero=3",
    "dp=2,recompute=full",
    "tp=2",
    "pp=2",
    "pp=2:zero-bubble",
    "dp=2,compress=int8",
    "dp=2,local=4",
    "dp=2,server=1",
)
EQUAL = ("pp=2:gpipe", "dp=2,compress=bf16")  # where both have the same speed
UNEQUAL = ("dp=2,shares=2:1", "dp=2,shares=balanced", "dp=2,zero=1,shares=2:1")  # where one has half of it
FOURS = ("dp=4", "dp=2,pp=2", "dp=4,zero=1")  # where there are so many workers


@dataclass(frozen=True)
class Case:
    """A task, and the plans of two workers that are for it alone."""

    make: Callable[[], Task]
    own: tuple[str, ...] = ()


def tokens(batch: Any) -> tuple[Tensor]:
    """What the model sees."""
    return (batch[0],)


def balanced_loss(output: Any, batch: Any) -> Loss:
    """Cross-entropy over bytes, and a hundredth of how unevenly experts were chosen."""
    total = F.cross_entropy(output.logits.flatten(0, 1), batch[1].flatten(), reduction="sum")
    return Loss(total + 0.01 * output.balance * batch[1].numel(), batch[1].numel())


def experts() -> Task:
    """A GPT in which every other layer has eight experts, on bytes of text."""
    sizes = {"vocabulary": VOCABULARY, "context": 48, "width": 64, "layers": 4, "heads": 4, "wide": 128}
    return Task(
        name="moe_text",
        model=partial(MoE, **sizes, experts=8, capacity=1.5, dropout=0.1),
        loss=balanced_loss,
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        data=Windows(reference_text(), 48),
        inputs=tokens,
        batch=16,
        microbatch=4,
    )


CASES = {
    "gpt": Case(partial(text_gpt, width=96, heads=4, layers=4, batch=16, microbatch=4), ("cp=2",)),
    "bert": Case(partial(bert_text, width=96, layers=4, batch=16, microbatch=4), ("cp=2",)),
    "translation": Case(partial(translation, batch=48, microbatch=6)),
    "moe": Case(experts, ("dp=2,*.experts=ep",)),
    "resnet": Case(partial(digits_resnet, widths=(12, 24, 48), batch=96, microbatch=12)),
    "vgg": Case(partial(vgg_digits, width=4, hidden=192, batch=64, microbatch=8), ("dp=2,classifier.*=tp",)),
    "unet3d": Case(partial(volumes, side=16, widths=(6, 12, 24), batch=16, microbatch=4)),
    "mlp": Case(partial(digits_mlp, sizes=(64, 512, 512, 10), batch=1024, microbatch=128)),
}


def made(name: str) -> Task:
    """One of the tasks, with as many samples as make whole steps."""
    task = CASES[name].make()
    return replace(task, name=name, data=Subset(task.data, range(task.num_samples // task.batch * task.batch)))

"""Why a plan leads and what another loses on, in words."""

import math

from sheaf.cost.price import Price
from sheaf.plans import Plan
from sheaf.units import pretty_bytes, pretty_seconds

TIE = 0.01  # plans whose times differ by less are equally fast
TERM_WORDS = {
    "compute": "computing",
    "recompute": "running blocks forward again",
    "dispatch": "what executors add to each microbatch",
    "tensor": "sending between the workers that split a layer",
    "all_to_all": "sending of tokens to experts and back",
    "transfer": "passing microbatches from stage to stage",
    "bubble": "idling in the pipeline",
    "all_reduce": "all-reduce that nothing hides",
    "reduce_scatter": "reduce-scatter that nothing hides",
    "all_gather": "all-gather that nothing hides",
    "server": "pushing gradients to shards and pulling values",
    "rows": "sending of rows of tables",
    "wait": "waiting for the slowest worker",
    "offload": "copying gradients to the host and values back",
    "optimizer": "optimizer",
    "host": "fetching and bookkeeping",
}
MEMORY_WORDS = {"optimizer_state": "optimizer state"}


_CAUTIONS = {
    "bf16": "16-bit gradients with error feedback train as 32-bit ones do in most reports (Agarwal et al., 'On the "
    "Utility of Gradient Compression', 2022)",
    "fp16": "16-bit gradients with error feedback train as 32-bit ones do in most reports (Agarwal et al., 'On the "
    "Utility of Gradient Compression', 2022)",
    "int8": "8-bit gradients with error feedback lose little at the end, more at the start (Karimireddy et al., 2019)",
    "topk": "top-k with error feedback needs more steps, the more so the fewer numbers it sends (Stich et al., "
    "'Sparsified SGD with Memory', 2018)",
    "powersgd": "rank 4 reached the accuracy of full gradients on ResNet-18 and an LSTM (Vogels et al., 2019)",
    "average": "the more steps between meetings, the worse it generalises early in training; begin with `after=N` "
    "(Lin et al., 'Don't Use Large Mini-Batches, Use Local SGD', 2020)",
    "staleness": "stale synchronous training converges where staleness is bounded and the learning rate small enough "
    "(Ho et al., 'More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server', 2013); N workers "
    "take N steps per clock on a share of the batch each",
    "async": "gradients are late by about as many updates as there are other workers, which costs accuracy (Chen et "
    "al., 'Revisiting Distributed Synchronous SGD', 2016); N workers take N steps per clock on a share of the batch "
    "each",
    "ring": "replicas' weights differ until training ends; it converges where the learning rate is small enough for "
    "the graph (Lian et al., 2017)",
    "exponential": "replicas' weights differ until training ends; it converges where the learning rate is small "
    "enough for the graph (Assran et al., 'Stochastic Gradient Push', 2019)",
    "adasum": "meant to go with a learning rate tuned for one worker (Maleki et al., 2020)",
    "backup": "gradients of the slowest are dropped in each step (Chen et al., 'Revisiting Distributed Synchronous "
    "SGD', 2016)",
    "speed": "meant for unequal workers; with asynchronous meetings it matched equal local steps at up to 150 "
    "million parameters (Liu et al., 'Asynchronous Local-SGD Training for Language Modeling', 2024)",
    "quorum": "what late workers were dealt meanwhile is not used, and their own part is merged late or dropped; with "
    "such a quorum models came out alike (Douillard et al., 'Decoupled DiLoCo', 2026)",
    "slowmo": "reaches what all-reduce reaches where plain local SGD does not (Wang et al., 'SlowMo', 2020)",
    "diloco": "8 workers meeting every 500 steps matched fully synchronous training of language models of 60 to 400 "
    "million parameters after a synchronous start (Douillard et al., 'DiLoCo', 2023)",
}


def caution(plan: Plan) -> str:
    """What is known of a relaxed plan's effect on training, with its source; empty for an exact plan."""
    if plan.exact:
        return ""
    kinds = [plan.compression.kind] if plan.compress != "none" else []
    kinds += [plan.meets_locally.kind] if plan.local else []
    kinds += ["speed"] if plan.meets_locally.steps == "speed" else []
    kinds += ["quorum"] if plan.meets_locally.quorum and plan.meets_locally.kind != "backup" else []
    kinds += ["async" if plan.serves.staleness is None else "staleness"] if not plan.serves.exact else []
    return "; ".join(_CAUTIONS[kind] for kind in kinds if kind in _CAUTIONS) or "not the serial answer"


def largest_difference(price: Price, than: Price) -> tuple[str, float]:
    """The term in which ``price`` exceeds ``than`` most, and by how many seconds."""
    return max(((term, price.seconds[term] - than.seconds[term]) for term in price.seconds), key=lambda pair: pair[1])


def loses_on(price: Price, best: Price) -> str:
    """What a plan loses on against the best."""
    if price.step_seconds <= best.step_seconds * (1 + TIE) and (why := _tied(price, best)):
        return f"as fast within 1 %, {why}"
    term, seconds = largest_difference(price, best)
    return f"{pretty_seconds(seconds)} more {TERM_WORDS[term]}"


def reason(best: Price, serial: Price | None, runner_up: Price | None) -> str:
    """Why the best plan leads."""
    parts: list[str] = []
    if best.plan.serial:
        parts.append("fastest: one worker has nothing to send")
    elif serial is None:
        parts.append("fastest of the plans that fit; one worker alone cannot hold it")
    else:
        ratio = serial.step_seconds / best.step_seconds
        parts.append(f"fastest: {ratio:.2f} times serial with {best.plan.workers} workers")
    if runner_up is None:
        parts.append("it is the only plan that fits")
    else:
        why = loses_on(runner_up, best)
        parts.append(f"{runner_up.plan} {'is' if why.startswith('as fast') else 'has'} {why}")
    return "; ".join(parts)


def largest_memory(price: Price) -> str:
    """The term that takes most of a plan's memory, with its size."""
    term = max(price.memory, key=lambda name: price.memory[name])
    return (
        f"{MEMORY_WORDS.get(term, term)} {'take' if term.endswith('s') else 'takes'} {pretty_bytes(price.memory[term])}"
    )


def memory_class(price: Price) -> int:
    """Peak memory in steps of 2 %, so that a few bytes decide nothing."""
    return round(math.log(max(price.peak_bytes, 1)) / math.log(1.02))


def order(price: Price) -> tuple[int, int, int, str]:
    """What decides between plans that are equally fast, the least first."""
    return price.plan.workers, memory_class(price), len(str(price.plan)), str(price.plan)


def _tied(price: Price, best: Price) -> str:
    """Why the best leads a plan that is as fast; empty where it leads by its time all the same."""
    (workers, memory, length, _), (best_workers, best_memory, best_length, _) = order(price), order(best)
    if workers != best_workers:
        return f"but needs {workers} workers instead of {best_workers}" if workers > best_workers else ""
    if memory != best_memory:
        more = pretty_bytes(price.peak_bytes - best.peak_bytes)
        return f"but needs {more} more memory" if memory > best_memory else ""
    if length != best_length:
        return "but longer to write" if length > best_length else ""
    return "with nothing to choose between them" if price.step_seconds <= best.step_seconds else ""

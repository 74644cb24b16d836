"""Rows as they are published, to be changed by tests."""

import copy

ROW = {
    "id": "one",
    "source": "vtrain",
    "task": "pretrain",
    "model": {
        "family": "gpt",
        "layers": 24,
        "hidden": 2048,
        "heads": 16,
        "ffn": 8192,
        "vocab": 50257,
        "seq": 1024,
        "glu": False,
        "attention": "MHA causal",
    },
    "batch": {"global": 64, "micro": 4, "grad_accum": 4},
    "parallel": {"dp": 4, "tp": 1, "pp": 1, "cp": 1, "vpp": 1, "seq_parallel": False, "recompute": "full"},
    "hardware": {"gpu": "A100-SXM4-80GB", "num_gpus": 4, "gpus_per_node": 8},
    "precision": "fp16",
    "software": "Megatron-DeepSpeed",
}


def row(**changes):
    """The row above with changes such as ``parallel__tp=2``; None takes a field out."""
    made = copy.deepcopy(ROW)
    for place, value in changes.items():
        section, _, name = place.partition("__")
        target, key = (made[section], name) if name else (made, section)
        if value is None:
            target.pop(key, None)
        else:
            target[key] = value
    return made

"""Sequences split among workers (cp) compute what plain PyTorch computes, whatever the second dimension means."""

import functools
from dataclasses import replace

import pytest
import small
from plain import assert_same, mlp_float64, plain, planned, ragged_gpt, transformers_gpt2

from sheaf import Task
from sheaf.errors import PlanError
from sheaf.plans import Plan

STEPS = 3
PLAIN = {"mlp": mlp_float64, "ragged_gpt": ragged_gpt, "gpt2": transformers_gpt2}


def task(name: str) -> Task:
    return PLAIN[name]() if name in PLAIN else replace(small.SMALL[name](), precision="fp64")


@functools.cache
def reference(name: str):
    return plain(task(name), STEPS)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("mlp", "cp=2"),  # features are split, as if they were a sequence
        ("vgg16", "cp=3"),  # channels
        ("bert", "cp=3"),
        ("transformer_seq2seq", "cp=2"),
        ("lstm_seq2seq", "cp=2"),
        ("ragged_gpt", "cp=2,dp=2,zero=1"),
        ("ragged_gpt", "cp=2,recompute=full"),
        ("gpt2", "cp=2,zero=3,bucket_bytes=1024"),
    ],
)
def test_a_split_sequence_changes_nothing(ranks, name, plan):
    found = ranks(planned, Plan.parse(plan).workers, task(name), plan, STEPS)[0]
    assert_same(found, reference(name), 2e-4 if name in ("ragged_gpt", "gpt2") else 1e-11)


def test_what_it_does_not_go_with_is_refused():
    with pytest.raises(PlanError, match="use tp=4,sequence=1 in its place"):
        Plan.parse("cp=2,tp=2")
    with pytest.raises(PlanError, match="cp=2 splits sequences"):
        Plan.parse("cp=2,pp=2")

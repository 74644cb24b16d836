"""A plan reads as it prints, in text and in TOML, and names everything that is wrong with it at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheaf.errors import PlanError
from sheaf.plans import Plan


@st.composite
def descriptions(draw) -> dict[str, object]:
    dp = draw(st.integers(1, 9))
    zero = draw(st.integers(0, 3)) if dp > 1 else 0
    shares = ["equal"]
    if dp > 1:
        shares.append(":".join(str(draw(st.integers(1, 9))) for _ in range(dp)))
    if dp > 1 and zero < 2:
        shares.append("stolen")
    return {
        "dp": dp,
        "zero": zero,
        "shares": draw(st.sampled_from(shares)),
        "recompute": draw(st.sampled_from(["none", "full"])),
        "microbatch": draw(st.none() | st.integers(1, 64)),
        "bucket_bytes": draw(st.integers(1024, 2**26)),
    }


@given(descriptions())
def test_text_and_toml_read_back(description):
    plan = Plan(**description)
    assert Plan.parse(str(plan)) == plan
    assert Plan.from_toml(plan.to_toml()) == plan


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("zer=1", ["'zer' is not a key of a plan; did you mean zero?"]),
        ("dp=0", ["dp=0: at least one worker is needed"]),
        ("dp=2,zero=7", ["zero=7: ZeRO has stages 0, 1, 2 and 3"]),
        ("dp=two,recompute=ful", ["dp=two is not a whole number", "recompute=ful: did you mean full?"]),
        ("dp=2,dp=3", ["dp is given twice; keep one"]),
        ("dp=3,shares=1:2", ["shares=1:2 gives 2 weights for dp=3 replicas: write one per replica"]),
        ("dp=2,shares=0:0", ["shares=0:0: at least one weight must be above zero"]),
        ("zero=1", ["zero=1 shards state among dp workers, and dp=1: raise dp or drop zero"]),
        ("shares=stolen", ["shares=stolen needs someone to steal from, and dp=1: raise dp or drop shares"]),
        ("dp=2,microbatch=0,bucket_bytes=1", ["microbatch=0", "bucket_bytes=1: use at least 1024"]),
        ("dp2", ["'dp2' is not key=value; a plan reads like dp=4,zero=3"]),
        (
            "dp=2,zero=3,shares=stolen",
            ["nothing to steal: use zero=1,shares=stolen, or zero=3 with weighted shares"],
        ),
    ],
)
def test_what_is_wrong_is_told_at_once(text, messages):
    with pytest.raises(PlanError) as caught:
        Plan.parse(text)
    for message in messages:
        assert message in str(caught.value)
    assert len(caught.value.broken) == len(messages)


def test_a_file_that_is_no_toml():
    with pytest.raises(PlanError, match="the plan is not TOML"):
        Plan.from_toml("dp: 4")

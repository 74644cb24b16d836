"""A plan reads as it prints, in text and in TOML, and names everything that is wrong with it at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheaf.errors import PlanError
from sheaf.plans import Plan
from sheaf.plans.again import globs, is_again, matches


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
        "offload": draw(st.sampled_from(["none", "optimizer"])),
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
        ("offload=optimiser", ["offload=optimiser: did you mean optimizer?"]),
        ("dp=2,server=2,offload=optimizer", ["the shards of server=2 do that already: drop one of the two"]),
        ("dp=2,local=4,offload=optimizer", ["the meetings of local=4 change weights between steps"]),
        ("dp=2,words=rows,offload=optimizer", ["words=rows keeps the rows that were touched only"]),
        ("dp=2,dp=3", ["dp is given twice; keep one"]),
        ("tp=2,h.*=recompute,h.*=whole,h.*=whole", ["h.* is given twice, as h.*=whole and h.*=whole; keep one"]),
        ("recompute=full,h.*=recompute", ["names blocks that recompute=full runs again anyway: drop one of the two"]),
        ("dp=3,shares=1:2", ["shares=1:2 gives 2 weights for dp=3 replicas: write one per replica"]),
        ("dp=2,shares=0:0", ["shares=0:0: at least one weight must be above zero"]),
        (
            "dp=3,shares=1:2,zero=1,shards=half",
            ["shares=1:2 gives 2 weights", "shards=half: write one whole weight per replica such as 11:5"],
        ),
        ("dp=2,zero=1,shards=2:1:1", ["shards=2:1:1 gives 3 weights for dp=2 replicas: write one per replica"]),
        ("dp=2,zero=1,shards=0:0", ["shards=0:0: at least one weight must be above zero"]),
        ("dp=2,shards=2:1", ["zero=0 has none: raise zero or drop shards"]),
        ("zero=1", ["zero=1 shards state among dp workers, and dp=1: raise dp or drop zero"]),
        ("shares=stolen", ["shares=stolen needs someone to steal from, and dp=1: raise dp or drop shares"]),
        ("dp=2,microbatch=0,bucket_bytes=1", ["microbatch=0", "bucket_bytes=1: use at least 1024"]),
        ("dp=2,server=2:staleness=-1", ["values cannot be newer than the slowest worker's; use 0 for lock-step"]),
        ("words=sparse", ["words=sparse lets rows travel between replicas of whole layers: use it with dp=2 alone"]),
        ("dp=2,tp=2,words=rows", ["words=rows lets rows travel between replicas of whole layers: use it with dp=4"]),
        ("dp=2,zero=1,words=sparse", ["drop zero (words=rows shards the table and its optimizer state)"]),
        ("dp=2,shares=stolen,words=rows", ["use equal or weighted shares, or words=sparse"]),
        ("dp=2,local=4,words=sparse", ["words=sparse says how gradients meet in each step, and local=4 that they"]),
        ("dp=2,words=rows,*.experts=ep", ["words=rows does not go with parts dealt out by expert"]),
        ("pp=2,stages=a:b", ["stages=a:b names where 2 later stages begin, and pp=2 with virtual=1 has 2 in all"]),
        ("pp=3,stages=a:a", ["stages=a:a names a module twice: each stage begins with one of its own"]),
        ("pp=2,stages=0:3", ["stages=0:3: write the number of blocks of each stage, such as 3:4, or the module with"]),
        ("dp=2,server=0", ["server=0: write the number of shards, 1 or more"]),
        ("dp=2,server=2:soon", ["after the colon write staleness=S in clocks, such as staleness=4, or async"]),
        ("dp=2,server=3", ["a worker holds at most one shard, and dp=2: use server=2, raise dp, or give shards"]),
        ("dp=2,server=3", ["workers of their own with server=3:apart"]),
        ("dp=2,server=2:async:apart", ["apart comes right after the number of shards, such as 2:apart:async"]),
        ("server=1:apart", ["server=1:apart lies between several workers, and dp=1: raise dp or drop server"]),
        ("dp=2,tp=2,server=1:apart:async", ["tp=2 makes several of one: use server=1:async, beside the replicas"]),
        ("dp=2,cp=2,server=1", ["would meet before every push: use dp=2,tp=2,sequence=1,server=1"]),
        ("dp=2,server=1,head=tp", ["drop it, or split layers inside replicas, as dp=2,tp=2,server=1 does"]),
        ("dp=2,server=1,words=rows", ["on shards, where embeddings lie by rows: drop words=rows"]),
        ("dp=2,tp=2,server=1,shares=stolen", ["use weighted shares, or drop tp and pp"]),
        ("server=1", ["server=1 lies between several workers, and dp=1"]),
        ("dp=2,late=scaled", ["late=scaled is of a server that may be behind: add server=1:async"]),
        ("dp=2,server=1,late=scaled", ["with staleness=0 no gradient is late: drop it, or write server=1:async"]),
        ("dp=2,server=1:async,late=scald", ["late=scald: did you mean scaled?"]),
        ("dp=2,server=1:async,late=scaled:x", ["how many updates late a gradient may be, such as scaled:20"]),
        ("dp=2,server=1,late=plain:", ["after the colon stands how many updates late"]),
        (
            "dp=2,tp=2,zero=1,server=3",
            ["use server=2", "so zero=1 has nothing left to shard: drop zero, or use dp=2,zero=1 without a server"],
        ),
        ("dp=2,server=1:async,shares=stolen", ["use server=1,shares=stolen (lock-step), or weighted shares"]),
        ("dp=2,server=2,compress=int8", ["server=2 and compress=int8 are two answers to how gradients meet: keep one"]),
        ("dp=2,server=2,local=4:ring", ["ring is between workers themselves: use server=2,local=4:diloco, or drop"]),
        ("dp=2,server=2,local=1:backup:quorum=1", ["backup is between workers", "use server=2:staleness=1,local=1"]),
        ("dp=2,server=2,local=4:diloco:after=9", ["after= wants one over gradients: drop after, or server"]),
        ("dp=2,server=2,local=4:fragments=2:overlap=1", ["all that it holds at once: drop fragments and overlap"]),
        ("dp=2,server=2:async,local=4:quorum=1", ["use server=2:staleness=1,local=4:diloco in place of quorum and"]),
        ("dp=2,tp=2,server=2,local=4", ["of replicas of one worker each, and tp=2 makes several of one: drop it"]),
        ("dp=2,server=2,local=4,shares=stolen", ["shares=stolen lends out one step among all: drop shares"]),
        ("dp=2,server=2:async,late=compensated,local=4", ["departures are none: use late=scaled or late=delayed"]),
        (
            "dp=2,server=2:async,late=delayed,local=4",
            ["which average has not: use server=2:async,local=4:diloco"],
        ),
        ("dp=2,server=2,local=0", ["with 0 steps between meetings there are none: drop local"]),
        ("dp=2,local=soon", ["local=soon: write the steps between meetings first, such as local=16:diloco"]),
        ("dp=2,local=4:dilocoo", ["local=4:dilocoo: 'dilocoo' is no way to meet; did you mean diloco?"]),
        ("dp=2,local=4:diloco:lr=x:afer=3", ["lr=x is not a number it takes", "'afer' is no setting"]),
        ("dp=2,local=4:lr=0.5", ["average has neither lr nor momentum: use slowmo or diloco, or drop them"]),
        ("dp=2,local=4:ring:lr=0.5", ["ring has neither lr nor momentum"]),
        ("dp=2,local=4:slowmo:momentum=1", ["momentum must be below 1, or it grows without end"]),
        ("dp=2,local=4:fragments=5", ["fragments meet at different steps: use 1 to 4"]),
        ("dp=2,local=4:overlap=4", ["what travels must arrive before the next meeting: overlap below 4"]),
        ("dp=2,local=0:diloco", ["with 0 steps between meetings nothing is to be set"]),
        ("dp=2,local=4,zero=1", ["zero=1 gives each a shard of one state: use zero=0, and tp or pp"]),
        ("local=4", ["local=4 lets replicas step alone, and dp=1: use dp=2 or more"]),
        ("dp=2,cp=2,local=4", ["(cp=2) sum gradients together with replicas: use tp=2,sequence=1 in place of cp"]),
        ("dp=2,a=tp,local=4", ["local=4 needs whole replicas, and parts of them are split over dp"]),
        ("dp=2,local=4:quorum=3", ["a quorum of more than there are replicas: use 1 to 2"]),
        ("dp=2,tp=2,local=4:quorum=1", ["lets a replica come late or make more steps, as one worker: drop tp and pp"]),
        ("dp=2,local=4:steps=speed,shares=balanced", ["shares=balanced needs the others in every step"]),
        ("dp=2,local=4:steps=speed,shares=2:1", ["deals steps of equal size by speed: drop shares=2:1"]),
        ("dp=2,local=4:ring,compress=int8", ["otherwise than as a sum over all, which is what compress=int8 codes"]),
        ("dp=2,local=4:backup:quorum=1", ["late ones are dropped: write local=1:backup:quorum=K"]),
        ("dp=2,local=1:backup", ["late ones are dropped: write local=1:backup:quorum=K"]),
        ("dp=2,local=4:adasum:overlap=1", ["adasum needs an answer before it goes on: drop overlap"]),
        ("dp=2,local=4:exponential:quorum=1", ["exponential is between workers that are all there"]),
        ("dp=2,local=4:quorum=1:fragments=2:after=3", ["nobody knows where the others are: drop after, fragments and"]),
        ("dp=2,local=4:grace=3", ["grace and late are of a meeting that some may miss: add quorum=K, or drop them"]),
        ("dp=2,local=4:quorum=1:late=dropp:steps=sped", ["late=dropp: did you mean drop?", "did you mean speed?"]),
        ("dp=2,compress=zip", ["compress=zip: known: bf16, fp16"]),
        ("dp=2,compress=topk:", ["compress=topk:: a setting belongs after the colon, or drop the colon"]),
        ("dp=2,compress=topk:3", ["write the share of numbers to send, such as topk:0.01"]),
        ("dp=2,compress=powersgd:x", ["write the rank of the factors, such as powersgd:4"]),
        ("dp=2,compress=int8:4", ["int8 has no setting: write compress=int8"]),
        ("dp=2,compress=bf16,zero=2", ["compress=bf16 makes smaller what replicas sum in whole"]),
        ("dp=2,tp=2,*.experts=ep", ["use dp=4,*.experts=ep with zero=0, dealt shares and no other split"]),
        ("dp=2,zero=1,a.*=ep", ["a.*=ep deals experts out over dp workers that send each other tokens"]),
        ("dp=2,shares=stolen,a=ep", ["use dp=2,a=ep with zero=0, dealt shares"]),
        ("a=ep", ["use dp=2,a=ep"]),
        ("dp=2,a=ep,b=tp", ["a=ep deals experts out"]),
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


def test_blocks_of_a_split_part_may_run_again():
    plan = Plan.parse("dp=2,head.*=tp,head.*=recompute,h.[0-3]=recompute")
    assert Plan.parse(str(plan)) == Plan.from_toml(plan.to_toml()) == plan
    assert plan.part("head.0") == "tp"
    assert plan.part("h.2") is None
    assert plan.again
    assert [is_again(plan, name) for name in ("h.3", "h.4", "head.1")] == [True, False, True]


def test_ranges_of_numbers_name_blocks_as_lists_of_digits_do():
    plan = Plan.parse("h.{0-3:10-12}=recompute,layer{7}.{0-1}=recompute")
    assert Plan.parse(str(plan)) == Plan.from_toml(plan.to_toml()) == plan
    named = ["h.0", "h.3", "h.10", "h.12", "h.2.mlp", "layer7.0", "layer7.1.x"]
    others = ["h.4", "h.9", "h.13", "h.21", "h.03", "h.100", "layer7.2", "layer17.0", "layer.0", "h.{0-3}"]
    assert [name for name in [*named, *others] if is_again(plan, name)] == named
    for text in ("h.{3-1}", "h.{a}", "h.{01-3}", "h.{1", "h.{}"):
        odd = Plan.parse(f"{text}=recompute")
        assert Plan.parse(str(odd)) == odd
        assert not any(is_again(odd, name) for name in named)


@given(
    numbers=st.sets(st.integers(0, 130)),
    named=st.sets(st.sampled_from(["head", "h2.emb", "h01", "h02", "h010"])),
    around=st.sampled_from([("h.", ""), ("layers.2.h", ".body"), ("", "")]),
)
def test_globs_name_the_blocks_that_they_are_made_for_and_no_others(numbers, named, around):
    before, after = around
    known = [*(f"{before}{number}{after}" for number in range(131)), "head", "h2.emb", "h01", "h02", "h010"]
    wanted = {f"{before}{number}{after}" for number in numbers} | named
    written = globs(wanted, known)
    assert {name for name in known if any(matches(glob, name) for glob in written)} == wanted
    assert len(written) <= 1 + len(named)
    if written:
        text = ",".join(f"{glob}=recompute" for glob in written)
        assert str(Plan.parse(text)) == text


@given(st.text("0123456789", min_size=1, max_size=6), st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_range_holds_the_numbers_from_its_first_to_its_last(name, low, high):
    assert matches(f"h.{{{low}-{high}}}", f"h.{name}") == (name == str(int(name)) and low <= int(name) <= high)


def test_a_file_that_is_no_toml():
    with pytest.raises(PlanError, match="the plan is not TOML"):
        Plan.from_toml("dp: 4")


def test_a_server_reads_as_it_prints_and_says_whether_it_is_exact():
    for text, exact in (
        ("dp=4,server=2:staleness=4", False),
        ("dp=2,server=2:async,late=scaled:20", False),
        ("dp=2,server=1", True),
        ("dp=2,server=2:staleness=0", True),
        ("dp=2,local=16:diloco,server=2:apart:async", False),
        ("dp=2,local=16,server=2", False),
    ):
        plan = Plan.parse(text)
        assert str(plan) == text
        assert Plan.from_toml(plan.to_toml()) == plan
        assert plan.exact is exact

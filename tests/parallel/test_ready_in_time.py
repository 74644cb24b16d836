"""Who sends on a line that is taken cannot say what it is ready for: receives are begun before sends."""

from dataclasses import replace

import small

from sheaf.plans import Plan


def traded():
    import torch
    import torch.distributed as dist

    from sheaf.cluster.primitives import start_reduce_scatter

    begun: list[str] = []
    real = dist.batch_isend_irecv

    def noted(operations):
        begun.extend(one.op.__name__ for one in operations)
        return real(operations)

    dist.batch_isend_irecv = noted
    try:
        part = torch.zeros(4)
        start_reduce_scatter(part, torch.ones(8)).wait()
    finally:
        dist.batch_isend_irecv = real
    return begun, part.tolist()


def test_what_workers_swap_is_received_before_it_is_sent(ranks):
    assert ranks(traded, 2) == [(["irecv", "isend"], [2.0] * 4)] * 2


def messages(text):
    """What the last stage is ready for and sends, in order, in a step whose messages are known."""
    from sheaf.parallel import build
    from sheaf.parallel.post import Post

    seen: list[str] = []
    expect, send = Post.expect, Post.send_gradients

    def expected(self, *given):
        seen.append("ready")
        expect(self, *given)

    def sent(self, *given):
        seen.append("sends")
        send(self, *given)

    step = build(replace(small.SMALL["mlp"](), batch=4, microbatch=1), Plan.parse(text))
    step()
    step()
    Post.expect, Post.send_gradients = expected, sent
    try:
        step()
    finally:
        Post.expect, Post.send_gradients = expect, send
        step.close()
    return seen


def test_a_stage_is_ready_for_the_next_forward_before_it_sends_gradients(ranks):
    for text in ("pp=2", "pp=2:zero-bubble"):
        seen = ranks(messages, 2, text)[1]
        count = seen.count("sends")
        assert count > 1
        for place, what in enumerate(seen):
            if what == "sends":
                number = seen[:place].count("sends") + 1
                assert seen[:place].count("ready") >= min(count, number + 1), f"{text}: {seen}"

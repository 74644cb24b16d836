"""Real plans on real ranks, judged by the serial side; and what is refused before any worker starts."""

import pytest
import small
import torch
from parity_fakes import Attention, Straight, Words, words_task
from torch import nn

from sheaf.api.verify import verify
from sheaf.errors import DataError, PlanError, RunError, SheafError
from sheaf.parity.planned import Planned
from sheaf.plans import Plan
from sheaf.task import Task


@pytest.fixture
def on_ranks(ranks, monkeypatch, shared_trials):
    def run(function, workers, *args, threads):
        return ranks(function, workers, *args)

    monkeypatch.setattr("sheaf.launch.run", run)


def test_serial_plan_is_identical():
    verdict = verify(words_task(clip=None), Plan(), steps=3)
    assert verdict.verdict == "identical", str(verdict)


def test_recomputation_is_no_departure():
    verdict = verify(words_task(), "recompute=full", steps=1)
    assert verdict.exact, str(verdict)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "plan",
    [
        "dp=2",
        "dp=3",
        "dp=2,shares=3:1",
        "dp=2,shares=stolen",
        "dp=2,zero=1",
        "dp=2,zero=2",
        "dp=2,zero=3,bucket_bytes=1024",
    ],
)
def test_plans_are_exact(on_ranks, plan):
    verdict = verify(words_task(), plan, steps=2)
    assert verdict.exact, str(verdict)
    assert verdict.max_loss_error < 1e-4


@pytest.mark.thinned(2)
@pytest.mark.parametrize("plan", ["tp=2", "tp=3,recompute=full", "pp=3:gpipe", "dp=2,tp=2,pp=2,zero=1"])
def test_split_models_are_exact_and_compared_block_by_block(on_ranks, plan, monkeypatch):
    seen = set()
    read = Planned.read

    def noted(self, step):
        observation = read(self, step)
        seen.update(block for _, block, _ in observation.prints)
        assert len(observation.losses) == (4 if step >= 0 else 0)
        return observation

    monkeypatch.setattr(Planned, "read", noted)
    verdict = verify(words_task(model=Straight), plan, steps=1, predict=False)
    assert verdict.exact, str(verdict)
    assert seen == {"embed", "layers.0", "layers.1", "dropout.0", "dropout.1", "norm", "head"}


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("name", "plan"), [("gpt", "tp=2,sequence=1"), ("resnet", "tp=2,pp=2")])
def test_the_zoo_is_exact_when_split(on_ranks, name, plan):
    verdict = verify(small.SMALL[name](), plan, steps=1, predict=False)
    assert verdict.exact, str(verdict)


def test_a_part_that_is_split_is_exact(on_ranks):
    verdict = verify(small.SMALL["mlp"](), "dp=2,layers.1=tp", steps=1)
    assert verdict.exact, str(verdict)


def test_a_fault_in_one_stage_or_slice_is_found(on_ranks):
    def model():
        made = Straight()
        made.layers[1].value.register_forward_hook(scaling)
        return made

    def scaling(module, arguments, output):
        import torch.distributed as dist

        if dist.is_initialized() and dist.get_rank() == 1:  # the second stage, or the second slice
            output.register_hook(lambda gradient: gradient * 1.001) if type(output) is torch.Tensor else None
        return output

    verdict = verify(words_task(model=model), "pp=2,stages=1:6", steps=1)
    assert verdict.verdict == "wrong", str(verdict)
    assert verdict.first_departure["kind"] == "gradient"


def test_a_wrong_output_of_one_stage_is_named_by_block(on_ranks):
    class Wrong(Attention):
        def forward(self, hidden):
            import torch.distributed as dist

            return super().forward(hidden) * (1.001 if dist.is_initialized() and dist.get_rank() == 1 else 1.0)

    def model():
        made = Straight()
        made.layers[1] = Wrong(16)
        return made

    verdict = verify(words_task(model=model), "pp=2,stages=3:4", steps=1)
    assert verdict.verdict == "wrong", str(verdict)
    assert (verdict.first_departure["kind"], verdict.first_departure["module"]) == ("output", "layers.1")


def test_float64_is_exact_to_the_twelfth_place(on_ranks):
    verdict = verify(
        words_task(precision="fp64", optimizer=lambda p: torch.optim.SGD(p, lr=0.1)), "dp=2,zero=2", steps=2
    )
    assert verdict.exact, str(verdict)
    assert max(verdict.max_loss_error, verdict.max_gradient_error, verdict.max_weight_error) < 1e-12


def test_bf16_is_exact(on_ranks):
    verdict = verify(words_task(precision="bf16"), "dp=2,zero=3,recompute=full,bucket_bytes=1024", steps=1)
    assert verdict.exact, str(verdict)


def test_a_fault_on_one_rank_is_found(on_ranks):
    def faulty(output, batch):
        # what only worker 1 does: its losses count a thousandth more
        import torch.distributed as dist

        total = nn.functional.cross_entropy(output.flatten(0, 1), batch[1].flatten(), ignore_index=-1, reduction="sum")
        from sheaf.task import Loss

        mine = dist.is_initialized() and dist.get_rank() == 1
        return Loss(total * (1.001 if mine else 1.0), (batch[1] != -1).sum())

    verdict = verify(words_task(loss=faulty), "dp=2", steps=1)
    assert verdict.verdict == "wrong", str(verdict)
    assert (verdict.first_departure["kind"], verdict.first_departure["microbatch"]) == ("loss", 2)


def test_leaves_random_generators_and_threads_alone():
    torch.manual_seed(1)
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    verify(words_task(), Plan(), steps=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert threads == torch.get_num_threads()


@pytest.fixture
def no_workers(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a worker was started")

    monkeypatch.setattr("sheaf.launch.run", refuse)


class Broken(Words):
    def __getitem__(self, index):
        if index == 7:
            raise OSError("unreadable")
        return super().__getitem__(index)


def test_bad_input_is_refused_before_any_worker_starts(no_workers, tmp_path):
    with pytest.raises(PlanError, match="needs 4 workers, 2 were given"):
        verify(words_task(), "dp=4", workers=2)
    with pytest.raises(SheafError, match="steps=0"):
        verify(words_task(), "dp=2", steps=0)
    with pytest.raises(PlanError, match="microbatch"):
        verify(words_task(), "dp=2,microbatch=4")
    with pytest.raises(DataError, match=r"data\[7\]"):
        verify(words_task(data=Broken()), "dp=2")
    with pytest.raises(PlanError, match="did you mean zero"):
        verify(words_task(), "dp=2,zro=1")
    with pytest.raises(PlanError, match="do not go round 9 workers"):
        verify(words_task(), "dp=9")
    (tmp_path / "something").touch()
    with pytest.raises(RunError, match="holds something"):
        verify(words_task(), "dp=2", keep=tmp_path)


def test_keeps_observations_when_asked(tmp_path):
    verify(words_task(), Plan(), steps=1, keep=tmp_path / "kept")
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"serial", "planned"}


@pytest.mark.whole
def test_through_the_launcher():
    data = [(torch.full((3,), float(index)), torch.tensor([1.0])) for index in range(10)]
    task = Task(
        model=lambda: nn.Linear(3, 1), loss=lambda out, batch: (out - batch[1]).square().mean(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.01), data=data, batch=5,
    )  # fmt: skip
    verdict = verify(task, "dp=2", steps=3, workers=2)
    assert verdict.exact, str(verdict)

"""Where a number comes from that is none."""

import pytest
import torch

from distpro.train.divergence import Diverged
from distpro.train.trainer import Trainer
from tests.train.test_checks import Batches, trainer


class Holed(Batches):
    """The same batches in every epoch, of which sample 9 has an infinite pixel."""

    def epoch(self, epoch, start=0):
        torch.manual_seed(epoch)
        for batch in list(super().epoch(epoch))[start:]:
            if 9 in batch.index.tolist():
                batch.inputs[batch.index.tolist().index(9), 0, 0, 0] = float("inf")
            yield batch


def test_in_a_batch():
    run = trainer(loader=Holed(16))
    with pytest.raises(Diverged, match=r"at step 3: an input of that step's batch is not finite \(sample 9\)"):
        run.fit()


def test_in_the_teacher():
    run = trainer(loss="kd", weight=1.0, loader=Batches(16))
    with torch.no_grad():
        next(run.objective.teacher.model.parameters())[0] = float("nan")
    with pytest.raises(
        Diverged, match=r"the kd loss is nan at step 1: the teacher's 'logits' is not finite, for its weight 0.weight"
    ):
        run.fit()


@pytest.mark.parametrize("step", [1, 3, 4])
def test_in_a_gradient_also_of_the_last_step(step, monkeypatch):
    run, original = trainer(loader=Batches(16), epochs=1), Trainer._update

    def update(self):
        if self.step == step - 1:
            next(self.objective.student.parameters()).grad[0] = float("nan")
        original(self)

    monkeypatch.setattr(Trainer, "_update", update)
    with pytest.raises(Diverged, match="0.weight"):
        run.fit()
    assert run.history == []

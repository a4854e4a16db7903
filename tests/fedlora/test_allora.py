"""ALLoRA: each row of B steps by its own share of the optimizer's step, whatever the optimizer is."""

import dataclasses

import numpy as np
import pytest
import torch

from fedlora.training.adjustments.allora import ETA
from tests.fedlora.private_training import plan
from tests.fedlora.test_scaled_gd import trained


@pytest.mark.parametrize(("optimizer", "private"), [("adamw", True), ("sgd", False)])
def test_a_step_of_a_row_of_B_is_the_optimizers_times_its_factor_whoever_trains(optimizer, private):
    run = plan("lora", private=private, optimizer=optimizer, local_steps=1, lr=0.1)
    trainer, trainings, plain = trained(run, 2)
    _, _, together = trained(dataclasses.replace(run, adjustment="allora"), 2)
    shortened = 0
    for one, before, after in zip(trainings, plain, together, strict=True):
        alone = trainer.train(dataclasses.replace(one, run=dataclasses.replace(run, adjustment="allora")))
        for name, start in one.start.items():
            if name not in before.tensors:
                continue
            step = before.tensors[name] - start
            if name.endswith(".B"):
                factor = 1 / np.sqrt(np.linalg.norm(start, axis=1, keepdims=True) + 1 / ETA**2)
                assert factor.max() <= ETA
                shortened += int((factor < 0.9).sum())
                step = step * factor
            for found in (after.tensors[name], alone.tensors[name]):
                np.testing.assert_allclose(found - start, step, rtol=2e-3, atol=2e-5 * abs(step).max() + 1e-6)
    assert shortened, "no row of B is long enough for this test to see a factor"


def test_every_step_goes_by_the_rows_as_they_are_before_it():
    """Three steps of Adam on one row, written out."""
    from fedlora.training.adjustments import Adjuster
    from fedlora.training.optimizers import make_optimizer
    from tests.federation import layout_of

    layout = layout_of("frozen-a", modules=("q",), head=False)
    generator = torch.Generator().manual_seed(0)
    parameters = {spec.name: torch.nn.Parameter(torch.randn(spec.shape, generator=generator)) for spec in layout.state}
    row = parameters["q.B"].detach().clone()
    plain = torch.nn.Parameter(row.clone())
    adjuster, optimizer = Adjuster("allora", layout, parameters), make_optimizer("adamw", [parameters["q.B"]], 0.1)
    adjuster.follow(optimizer)
    twin = make_optimizer("adamw", [plain], 0.1)
    for seed in range(3):
        gradient = torch.randn(row.shape, generator=torch.Generator().manual_seed(seed))
        parameters["q.B"].grad, plain.grad = gradient.clone(), gradient.clone()
        was = plain.detach().clone()
        adjuster()
        optimizer.step()
        twin.step()  # its moments depend on the gradients alone
        row = row + (plain.detach() - was) / (row.norm(dim=1, keepdim=True) + 1 / ETA**2).sqrt()
    torch.testing.assert_close(parameters["q.B"].detach(), row)

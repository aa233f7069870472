"""training/optimization.py: what it does is what PyTorch does, only faster."""

import torch

from optimization import move_average


def test_the_moving_average_is_that_of_torch():
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    ours = torch.optim.swa_utils.AveragedModel(model)
    theirs = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    for _ in range(4):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        move_average(ours, model, 0.9)
        theirs.update_parameters(model)
        assert all(
            torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
        )

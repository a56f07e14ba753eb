"""The benchmark against hivemind.moe compares like with like."""

import torch
from hivemind.moe.server.layers.common import FeedforwardBlock

from benchmarks.versus.kinds import EXPANSION, HivemindFeedForward


def test_our_kind_of_hiveminds_expert_computes_what_hiveminds_does_there_and_back() -> None:
    torch.manual_seed(0)
    theirs, ours = FeedforwardBlock(16), HivemindFeedForward(16, EXPANSION * 16)
    ours.load_state_dict(theirs.state_dict())
    x_ND = torch.randn(5, 16)
    x_theirs, x_ours = x_ND.clone().requires_grad_(), x_ND.clone().requires_grad_()

    y_theirs, y_ours = theirs(x_theirs), ours(x_ours)
    y_theirs.square().sum().backward()
    y_ours.square().sum().backward()

    torch.testing.assert_close(y_ours, y_theirs)
    torch.testing.assert_close(x_ours.grad, x_theirs.grad)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad)

"""A PyTorch model of yours with one layer whose experts live in a swarm.

    swarmoe coordinator --preset demo      # prints join: HOST:PORT/KEY
    swarmoe peer --join HOST:PORT
    python examples/remote_layer.py HOST:PORT

The swarm's experts learn to undo a random rotation, together with two small layers of this process.
"""

import sys

import torch
from torch import nn

from swarmoe import RemoteMoE, join


def main(address: str, steps: int = 60) -> None:
    with join(address) as swarm:
        swarm.wait_for_experts(timeout_s=30.0)
        dim = swarm.manifest.expert.dim
        torch.manual_seed(0)
        moe = RemoteMoE(swarm, layer=0, router="mixtral")
        model = nn.Sequential(nn.Linear(dim, dim), moe, nn.Linear(dim, dim))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        rotation_DD = torch.linalg.qr(torch.randn(dim, dim)).Q
        for step in range(1, steps + 1):
            x_TD = torch.randn(512, dim)
            loss = (model(x_TD) - x_TD @ rotation_DD).square().mean()
            optimizer.zero_grad()
            (loss + moe.loss).backward()  # the experts step where they are
            optimizer.step()
            if step % 20 == 0:
                print(f"step {step}: error {loss.item():.3f}, {moe.metrics}")


if __name__ == "__main__":
    main(sys.argv[1])

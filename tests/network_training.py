"""What the ranks of tools/test_network.py do: a training whose updates are large enough to feel a slow link.

    mpirun -np 4 python -m tests.network_training BACKUP_WORKERS STEPS

Rank 0 prints one line of JSON: seconds for each step (median) of the ranks besides the last, whether the weights of all
ranks are equal, and how many updates the last rank has contributed to.
"""

import hashlib
import json
import statistics
import sys
import time

import torch

import hvd_backup.torch as hvd

COMPUTE_S = 0.02  # a step without communication, by the clock, so that cores that are busy do not matter
WIDTH = 256  # 2 * 256 * 256 float32: 512 KiB


def main(backup_workers: int, steps: int) -> None:
    hvd.init()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01), model.named_parameters(), backup_workers=backup_workers
    )
    generator = torch.Generator().manual_seed(hvd.rank())
    took = []
    for _ in hvd.follow(range(steps), optimizer):
        began = time.perf_counter()
        time.sleep(COMPUTE_S)
        optimizer.zero_grad()
        model(torch.randn(8, WIDTH, generator=generator)).square().mean().backward()
        optimizer.step()
        took.append(time.perf_counter() - began)
    weights = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
    mine = (statistics.median(took[1:]), hashlib.sha256(weights).hexdigest(), optimizer.counters()["contributed"])
    everybody = hvd.allgather_object(mine)
    if hvd.rank() == 0:
        result = {
            "step_s": statistics.median(median for median, _, _ in everybody[:-1]),
            "equal": len({digest for _, digest, _ in everybody}) == 1,
            "last_contributed": everybody[-1][2],
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

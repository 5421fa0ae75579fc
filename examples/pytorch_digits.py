"""A Horovod script with backup workers: a small CNN learns scikit-learn's handwritten digits on several ranks.

    mpirun -np 4 python examples/pytorch_digits.py --backup-workers 1
    HVD_BACKUP_DELAY="rank=3,ms=200" mpirun -np 4 python examples/pytorch_digits.py --backup-workers 1

Whatever a script for Horovod would not have is marked with `# hvd_backup:`. The second line makes rank 3 slow.
"""

import argparse
import hashlib
import json
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from tqdm import tqdm

import hvd_backup.torch as hvd  # hvd_backup: was `import horovod.torch as hvd`


class Net(torch.nn.Module):
    """Two convolutions and two linear layers, about 150,000 weights. Input [batch, 1, 8, 8], output [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(32, 64, 3, padding=1)
        self.linear1 = torch.nn.Linear(64 * 4 * 4, 128)
        self.linear2 = torch.nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.linear2(F.relu(self.linear1(x.flatten(1))))


def digits(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Images [n, 1, 8, 8] in 0..1 and labels [n]; four fifths to train with, the rest to test."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def test_accuracy(model: torch.nn.Module, loader: DataLoader) -> float:
    """Fraction of the whole test set that is right; each rank tests its part."""
    model.eval()
    right = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for x, y in loader:
            right += torch.tensor([(model(x).argmax(1) == y).sum().item(), len(y)])
    right = hvd.allreduce(right, op=hvd.Sum)
    return (right[0] / right[1]).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16, help="of each rank")
    parser.add_argument(
        "--lr", type=float, default=0.02, help="for one rank; it is scaled by the number of contributors"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--backup-workers", type=int, default=0, help="ranks that no update waits for")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--trace", type=Path, help="file for every decision, as JSON lines")
    args = parser.parse_args()
    if args.trace:
        os.environ["HVD_BACKUP_TRACE"] = str(args.trace)  # hvd_backup: read by init()

    hvd.init()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    train_set, test_set = digits(args.seed)
    train_sampler = DistributedSampler(train_set, num_replicas=hvd.size(), rank=hvd.rank(), seed=args.seed)
    train_loader = DataLoader(train_set, args.batch_size, sampler=train_sampler)
    test_loader = DataLoader(torch.utils.data.Subset(test_set, range(hvd.rank(), len(test_set), hvd.size())), 100)

    model = Net()
    contributors = hvd.size() - args.backup_workers  # hvd_backup: the learning rate follows N, not the number of ranks
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr * contributors, momentum=0.9)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        backup_workers=args.backup_workers,  # hvd_backup: the one option that is needed
    )

    moments: list[float] = []
    update_seconds: list[float] = []

    def note_time(_update: hvd.AppliedUpdate) -> None:
        update_seconds.append(time.perf_counter() - moments[-1])
        moments.append(time.perf_counter())

    optimizer.on_update(note_time)  # hvd_backup: called for every update, also for those that this rank has missed

    is_first = hvd.rank() == 0
    accuracy = 0.0
    began = time.perf_counter()
    with tqdm(total=args.epochs * len(train_loader), unit="update", disable=None if is_first else True) as bar:
        for epoch in range(args.epochs):
            model.train()
            train_sampler.set_epoch(epoch)
            moments.append(time.perf_counter())
            for x, y in hvd.follow(train_loader, optimizer):  # hvd_backup: was `in train_loader`
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.metrics(loss=loss)  # hvd_backup: travels with the gradient, where Horovod needs an allreduce
                optimizer.step()
                bar.update(optimizer.global_step - bar.n)  # hvd_backup: a late rank jumps
            accuracy = test_accuracy(model, test_loader)
            bar.set_postfix(loss=f"{optimizer.last_update.metrics['loss']:.3f}", test=f"{accuracy:.1%}")
    seconds = time.perf_counter() - began

    weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    dropped = hvd.allgather_object(optimizer.counters()["dropped"])
    identical = len(set(hvd.allgather_object(weights))) == 1
    if is_first:
        print(f"test accuracy       {accuracy:.1%}")
        print(f"updates             {optimizer.global_step} in {seconds:.1f} s")
        print(f"gradients dropped   {', '.join(map(str, dropped))} (rank 0, 1, ...)")
        print(f"weights identical   {'yes' if identical else 'NO'}, SHA-256 {weights[:16]}")
        if args.json:
            report = {
                "test_accuracy": accuracy,
                "updates": optimizer.global_step,
                "seconds": seconds,
                "update_seconds": update_seconds,
                "dropped": dropped,
                "weights_identical": identical,
            }
            args.json.write_text(json.dumps(report))


if __name__ == "__main__":
    main()

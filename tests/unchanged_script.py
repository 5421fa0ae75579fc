"""A script as Horovod's users write them; nothing in it knows of hvd_backup. Prints one line of JSON per rank."""

import argparse
import json

import horovod.torch as hvd
import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--new-loaders", action="store_true", help="make the loaders anew for each epoch")
parser.add_argument("--scaler", action="store_true", help="mixed precision, with clipping")
args = parser.parse_args()

hvd.init()
torch.manual_seed(42)
x = torch.randn(384, 6)
y = torch.stack([x.sum(1), x[:, 0] * x[:, 1], x.abs().amax(1)], 1)
train_data, test_data = TensorDataset(x[:320], y[:320]), TensorDataset(x[320:], y[320:])
sampler: DistributedSampler[object] = DistributedSampler(train_data, num_replicas=hvd.size(), rank=hvd.rank())
train_loader = DataLoader(train_data, batch_size=8, sampler=sampler)
test_loader = DataLoader(test_data, batch_size=16)

model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4, enabled=args.scaler)


def metric_average(value: float, name: str) -> float:
    return hvd.allreduce(torch.tensor(value), name=name).item()


batches, tested, losses = [], [], []
for epoch in range(args.epochs):
    model.train()
    sampler.set_epoch(epoch)
    if args.new_loaders:
        train_loader = DataLoader(train_data, batch_size=8, sampler=sampler)
        test_loader = DataLoader(test_data, batch_size=16)
    batches.append(0)
    for data, target in train_loader:
        optimizer.zero_grad()
        scaler.scale(F.mse_loss(model(data), target)).backward()
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        batches[-1] += 1
    model.eval()
    total = 0.0
    tested.append(0)
    with torch.no_grad():
        for data, target in test_loader:
            total += F.mse_loss(model(data), target).item()
            tested[-1] += 1
    losses.append(metric_average(total / tested[-1], "loss"))

weights = [value for parameter in model.parameters() for value in parameter.detach().flatten().tolist()]
seen = {"rank": hvd.rank(), "batches": batches, "tested": tested, "losses": losses, "weights": weights}
seen["scale"] = scaler.get_scale()
print(json.dumps(seen), flush=True)

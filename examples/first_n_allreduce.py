"""The bare collective: four ranks average a number each, the last rank is late, and nobody waits for it.

    mpirun -np 4 python examples/first_n_allreduce.py

Each rank times its own calls. The last rank sleeps 300 ms before each of its first three; the others go on without it,
and it gets at once what they have computed, without its own number. Then it is on time again, and contributes.
"""

import time

import numpy as np

import hvd_backup.mpi as hvd

STEPS = 6
LATE_STEPS = 3
SLEEP_S = 0.3


def main() -> None:
    hvd.init()
    rank, size = hvd.rank(), hvd.size()
    wanted = max(1, size - 1)  # N: one backup worker
    mine = np.full(250_000, float(rank))  # 2 MB
    rows = []
    for step in range(STEPS):
        if rank == size - 1 and step < LATE_STEPS:
            time.sleep(SLEEP_S)
        if step == LATE_STEPS:
            hvd.barrier()  # the late rank is back
        start = time.perf_counter()
        mean, contributors = hvd.first_n_allreduce(mine, n=wanted, name="example")
        rows.append((contributors, mean[0].item(), (time.perf_counter() - start) * 1e3))

    everybody = hvd.allgather_object(rows)
    if rank == 0:
        print(
            f"first {wanted} of {size} ranks; rank {size - 1} sleeps {SLEEP_S:g} s before steps 0 to {LATE_STEPS - 1}\n"
        )
        print("step  contributors   mean   milliseconds in the call, by rank")
        for step in range(STEPS):
            contributors, mean, _ = rows[step]
            assert all(theirs[step][:2] == rows[step][:2] for theirs in everybody), "the same result on every rank"
            times = "  ".join(f"{theirs[step][2]:7.2f}" for theirs in everybody)
            print(f"{step:4}  {' '.join(map(str, contributors)):<12} {mean:6.2f}   {times}")


if __name__ == "__main__":
    main()

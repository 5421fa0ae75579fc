"""Training over a network that is bad: `make test-network`, as root, with iproute2, nftables and Open MPI 5.

Makes two hosts on this machine (network namespaces, joined by a veth pair), starts three ranks on the first and one on
the second by mpirun, as over real hosts, and makes the link slow (tc tbf), late (tc netem, where the kernel has it) or
lossy (nft). With one backup worker the ranks on the first host must train as fast as with a good link; without, they
wait for each gradient from the second. Cleans up after itself. Not part of `make test`: most machines do not allow it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HOSTS = {"hvdb0": "10.77.0.1", "hvdb1": "10.77.0.2"}  # namespace, and host name: address
WIRE = "wire"  # the name of its end of the link on each host
STEPS = 40
TIMEOUT_S = 180
FIRST, SECOND = HOSTS
# What is done to what the second host sends: on which host, by which commands, and undone by which. A step sends
# 512 KiB: half a second at 8 Mbit/s.
LINKS = {
    "slow": (
        SECOND,
        [f"tc qdisc add dev {WIRE} root tbf rate 8mbit burst 64kbit latency 2s"],
        f"tc qdisc delete dev {WIRE} root",
    ),
    "late (100 ms)": (
        SECOND,
        [f"tc qdisc add dev {WIRE} root netem delay 100ms"],
        f"tc qdisc delete dev {WIRE} root",
    ),
    "lossy (5 % of its packets)": (
        FIRST,  # what is dropped where it arrives was lost on its way
        [
            "nft add table inet lossy",
            "nft add chain inet lossy arriving { type filter hook prerouting priority 0 ; }",
            f"nft add rule inet lossy arriving iifname {WIRE} numgen random mod 100 < 5 drop",
        ],
        "nft delete table inet lossy",
    ),
}
MOST = 1.3  # times the step of a good link
# mpirun calls this in place of ssh: options, host, command.
AGENT = """#!/bin/sh
while :; do case "$1" in -*) shift ;; *) break ;; esac; done
case "$1" in {cases} *) echo "unknown host $1" >&2; exit 1 ;; esac
shift
exec ip netns exec $host unshare --uts sh -c "hostname $host; $*"
"""


def ip(*arguments: str) -> None:
    """Runs `ip`; its errors end this program."""
    subprocess.run(["ip", *arguments], check=True)


@contextmanager
def two_hosts() -> Iterator[Path]:
    """The hosts; gives the agent by which mpirun reaches them."""
    remove_hosts()
    try:
        for host in HOSTS:
            ip("netns", "add", host)
            ip("-n", host, "link", "set", "lo", "up")
        ip("link", "add", WIRE, "netns", FIRST, "type", "veth", "peer", "name", WIRE, "netns", SECOND)
        for host, address in HOSTS.items():
            ip("-n", host, "address", "add", f"{address}/24", "dev", WIRE)
            ip("-n", host, "link", "set", WIRE, "up")
        with tempfile.TemporaryDirectory() as folder:
            agent = Path(folder) / "agent"
            agent.write_text(AGENT.format(cases=" ".join(f"{a}) host={h} ;;" for h, a in HOSTS.items())))
            agent.chmod(0o755)
            yield agent
    finally:
        remove_hosts()


def remove_hosts() -> None:
    """Those of this run, or of one that was killed."""
    present = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout.split()
    for host in HOSTS:
        if host in present:
            ip("netns", "delete", host)


def done_on(host: str, command: str) -> bool:
    """Whether the command, its words separated by blanks, runs on that host."""
    words = ["ip", "netns", "exec", host, *command.split()]
    return subprocess.run(words, stderr=subprocess.DEVNULL, check=False).returncode == 0


@contextmanager
def link(host: str, commands: list[str], undo: str) -> Iterator[bool]:
    """Makes the link from the second host bad; False: this machine cannot do that."""
    try:
        yield all(done_on(host, command) for command in commands)
    finally:
        done_on(host, undo)


def train(agent: Path, backup_workers: int, steps: int) -> dict[str, Any]:
    """Runs tests/network_training.py over the hosts; returns what it prints."""
    hosts = ",".join(f"{address}:{ranks}" for address, ranks in zip(HOSTS.values(), (3, 1), strict=True))
    mpirun = (
        f"mpirun --prtemca plm_ssh_agent {agent} --host {hosts} -np 4 --map-by :OVERSUBSCRIBE --bind-to none "
        f"--mca pml ob1 --mca btl self,sm,tcp --mca btl_tcp_if_include {WIRE} "
        f"{sys.executable} -m tests.network_training {backup_workers} {steps}"
    )
    done = subprocess.run(
        ["ip", "netns", "exec", FIRST, "unshare", "--uts", "sh", "-c", f"hostname {FIRST}; exec {mpirun}"],
        cwd=ROOT,
        env={**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"mpirun has ended with status {done.returncode}\n{done.stdout}{done.stderr}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def main() -> int:
    """Tries every link; returns the exit status."""
    if os.geteuid() != 0:
        print("network namespaces need root", file=sys.stderr)
        return 1
    wrong = []
    with two_hosts() as agent:
        good = train(agent, 1, STEPS)["step_s"]
        print(f"good link, one backup worker: {1e3 * good:.1f} ms for a step")
        for name, (host, commands, undo) in LINKS.items():
            with link(host, commands, undo) as possible:
                if not possible:
                    print(f"{name} link: not tried, this machine cannot: {commands[-1]}")
                    continue
                waiting = train(agent, 0, 6)["step_s"]
                result = train(agent, 1, STEPS)
                print(
                    f"{name} link: {1e3 * result['step_s']:.1f} ms with one backup worker, "
                    f"{1e3 * waiting:.1f} ms without; the rank behind it contributed {result['last_contributed']} of "
                    f"{STEPS} times; weights are {'equal' if result['equal'] else 'NOT EQUAL'}"
                )
                if not result["equal"] or result["step_s"] > MOST * good:
                    wrong.append(name)
    print(f"not as it should be: {', '.join(wrong)}" if wrong else "as it should be", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

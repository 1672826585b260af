"""A network of test nodes on one machine: Linux network namespaces on a bridge, with a chosen bandwidth.

Everything lives in namespaces of its own, named after this process, without a default route: nothing can leave, and
several labs do not meet. Node i has the address 10.77.0.<i + 1> on `eth0`. Needs root, `ip`, and `tc` for a rate.

    with Lab(nodes=2) as lab:
        lab.limit("200mbit")
        lab.run_all(["python", "-m", "benchmarks.something"], timeout_s=60)
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

ADDRESS = "10.77.0.{}"
PORT = "29577"


@functools.cache
def unavailable() -> str | None:
    """Why there can be no lab here; None when there can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "`ip` (iproute2) is not installed"
    name = f"dsp{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return None


class NetlabError(RuntimeError):
    """A program on a node failed, or did not end in time."""


class Lab:
    """`nodes` machines on one switch; a context manager, which always takes everything down."""

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes
        self._prefix = f"dsl{os.getpid()}x"
        self._switch = f"{self._prefix}sw"

    def __enter__(self) -> Lab:
        try:
            self._up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def _up(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        for node in range(self.nodes):
            name, port = self._name(node), f"p{node}"
            _ip("netns", "add", name)
            _ip(
                "link",
                "add",
                "eth0",
                "netns",
                name,
                "type",
                "veth",
                "peer",
                "name",
                port,
                "netns",
                self._switch,
            )
            _ip("-n", name, "addr", "add", f"{ADDRESS.format(node + 1)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", self._switch, "link", "set", port, "master", "br0", "up")

    def down(self) -> None:
        for name in (*map(self._name, range(self.nodes)), self._switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def _name(self, node: int) -> str:
        return f"{self._prefix}{node}"

    def limit(self, rate: str | None) -> None:
        """Both directions of every link run at `rate` ("1gbit", "200mbit"); None: as fast as they can."""
        for node in range(self.nodes):
            for namespace, device in ((self._name(node), "eth0"), (self._switch, f"p{node}")):
                inside = ["ip", "netns", "exec", namespace, "tc", "qdisc"]
                subprocess.run([*inside, "del", "dev", device, "root"], capture_output=True)
                if rate is not None:
                    settings = ["tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
                    _run([*inside, "add", "dev", device, "root", *settings])

    def start(
        self, node: int, command: Sequence[str], environment: Mapping[str, str] | None = None, **settings: Any
    ) -> subprocess.Popen[str]:
        """A program on a node; gloo there finds the lab's network."""
        inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK")}
        return subprocess.Popen(
            ["ip", "netns", "exec", self._name(node), *command],
            env={**inherited, "GLOO_SOCKET_IFNAME": "eth0", **(environment or {})},
            text=True,
            **settings,
        )

    def launch(
        self, command: Sequence[str], timeout_s: float, environment: Mapping[str, str] | None = None
    ) -> str:
        """The same through the `deepspeed` launcher, one per node: `command` is what follows its own options."""
        with tempfile.NamedTemporaryFile("w", suffix=".hosts") as hostfile:
            hostfile.writelines(f"{ADDRESS.format(node + 1)} slots=1\n" for node in range(self.nodes))
            hostfile.flush()
            options = ["--no_ssh", "--node_rank", "{node}", "--master_addr", ADDRESS.format(1)]
            options += ["--master_port", PORT, "--hostfile", hostfile.name]
            return self.run_all(["deepspeed", *options, *command], timeout_s, environment)

    def run_all(
        self, command: Sequence[str], timeout_s: float, environment: Mapping[str, str] | None = None
    ) -> str:
        """One process of a job per node; the output of the first. "{node}" in `command` is the number of the node.

        Raises:
            NetlabError: with the output of a process that failed, or of the first when they did not end in time.
        """
        processes = []
        for node in range(self.nodes):
            ranks = {
                "RANK": str(node),
                "LOCAL_RANK": "0",
                "WORLD_SIZE": str(self.nodes),
                "MASTER_ADDR": ADDRESS.format(1),
                "MASTER_PORT": PORT,
                "DS_COMPRESS_HOST": self._name(node),
                **(environment or {}),
            }
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            named = [word.replace("{node}", str(node)) for word in command]
            processes.append(self.start(node, named, ranks, **pipes))
        return _outputs(processes, timeout_s)[0]


def _outputs(processes: Sequence[subprocess.Popen[str]], timeout_s: float) -> list[str]:
    deadline = time.monotonic() + timeout_s
    outputs = []
    try:
        for process in processes:
            output, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            if process.returncode:
                raise NetlabError(f"a process ended with {process.returncode}:\n{output[-5000:]}")
            outputs.append(output)
    except subprocess.TimeoutExpired as error:
        raise NetlabError(f"not done after {timeout_s:.0f} s") from error
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
    return outputs


def _ip(*arguments: str) -> None:
    _run(["ip", *arguments])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NetlabError(f"{' '.join(command)}: {done.stderr.strip()}")


def bytes_sent() -> int:
    """What has left the node that this process runs on, in bytes of Ethernet frames."""
    with open("/sys/class/net/eth0/statistics/tx_bytes") as file:
        return int(file.read())

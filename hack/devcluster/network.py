"""The network of a native cluster: a namespace, joined to the machine by one veth pair and one route.

Cluster number i owns 10.(200+i).0.0/16. The machine's own interfaces, forwarding and firewall stay as they are.
"""

import ipaddress
import json
import os
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from devcluster.commands import StepError, capture, run

_MOST_CLUSTERS = 32


@dataclass(frozen=True)
class Network:
    """Addresses of the cluster with this name and number."""

    name: str
    index: int

    @property
    def namespace(self) -> str:
        return f"perch-{self.name}"

    @property
    def namespace_path(self) -> Path:
        return Path("/run/netns") / self.namespace

    @property
    def interface(self) -> str:
        """The machine's end of the veth pair; an interface name has at most 15 characters."""
        return f"perch{self.index}"

    @property
    def whole(self) -> str:
        return f"10.{200 + self.index}.0.0/16"

    @property
    def host_address(self) -> str:
        return f"10.{200 + self.index}.0.1"

    @property
    def node_address(self) -> str:
        return f"10.{200 + self.index}.0.2"

    @property
    def services(self) -> str:
        return f"10.{200 + self.index}.64.0/18"

    @property
    def api_service_address(self) -> str:
        return f"10.{200 + self.index}.64.1"

    @property
    def dns_address(self) -> str:
        return f"10.{200 + self.index}.64.10"

    @property
    def pods(self) -> str:
        return f"10.{200 + self.index}.128.0/17"

    @property
    def inside(self) -> list[str]:
        """Prefix of a command that shall run inside. `ip netns exec` would hide the cgroups from the kubelet."""
        return ["nsenter", f"--net={self.namespace_path}"]

    def exists(self) -> bool:
        """Whether the namespace stands; the bare file alone may be left behind when a machine goes down."""
        return os.path.ismount(self.namespace_path)

    def create(self, log: Path) -> None:
        """Brings the namespace and its way in and out about; every part only where it is missing."""
        if not self.exists():
            self.namespace_path.unlink(missing_ok=True)
            run(["ip", "netns", "add", self.namespace], log=log)
        if not (Path("/sys/class/net") / self.interface).exists():
            peer = ["peer", "name", "eth0", "netns", self.namespace]
            run(["ip", "link", "add", self.interface, "type", "veth", *peer], log=log)
        run(["ip", "address", "replace", f"{self.host_address}/24", "dev", self.interface], log=log)
        run(["ip", "link", "set", self.interface, "up"], log=log)
        within = ["ip", "-n", self.namespace]
        run([*within, "link", "set", "lo", "up"], log=log)
        run([*within, "address", "replace", f"{self.node_address}/24", "dev", "eth0"], log=log)
        run([*within, "link", "set", "eth0", "up"], log=log)
        run([*self.inside, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"], log=log)
        run(["ip", "route", "replace", self.whole, "via", self.node_address, "dev", self.interface], log=log)

    def remove(self, log: Path) -> None:
        """Removes both; the route goes with its interface."""
        if (Path("/sys/class/net") / self.interface).exists():
            run(["ip", "link", "delete", self.interface], log=log)
        if self.exists():
            run(["ip", "netns", "delete", self.namespace], log=log)
        self.namespace_path.unlink(missing_ok=True)


def claim(clusters: Path, name: str) -> Network:
    """The network of this cluster: by the number it has, or else the lowest that is free and that no route overlaps."""
    clusters.mkdir(parents=True, exist_ok=True)
    with FileLock(clusters / ".networks.lock"):
        taken = _read(clusters)
        if name not in taken:
            routed = _routed_networks()
            for index in range(_MOST_CLUSTERS):
                whole = ipaddress.ip_network(Network(name, index).whole)
                if index not in taken.values() and not any(whole.overlaps(other) for other in routed):
                    taken[name] = index
                    break
            else:
                raise StepError(f"no address range is free for another cluster; those there are: {', '.join(sorted(taken))}")
            _write(clusters, taken)
        return Network(name, taken[name])


def release(clusters: Path, name: str) -> None:
    """Gives the cluster's number back; the last thing that `down` does."""
    with FileLock(clusters / ".networks.lock"):
        taken = _read(clusters)
        taken.pop(name, None)
        _write(clusters, taken)


def claimed(clusters: Path, name: str) -> Network | None:
    index = _read(clusters).get(name)
    return None if index is None else Network(name, index)


def _read(clusters: Path) -> dict[str, int]:
    try:
        return dict(json.loads((clusters / ".networks.json").read_text()))
    except FileNotFoundError:
        return {}


def _write(clusters: Path, taken: dict[str, int]) -> None:
    draft = clusters / ".networks.json.new"
    draft.write_text(json.dumps(taken))
    draft.replace(clusters / ".networks.json")


def _routed_networks() -> list[ipaddress.IPv4Network]:
    """What the machine's routing tables know already, other clusters' networks included."""
    routes = json.loads(capture(["ip", "-json", "-4", "route", "show", "table", "all"]) or "[]")
    found = []
    for route in routes:
        if route["dst"] != "default":
            found.append(ipaddress.IPv4Network(route["dst"].removeprefix("broadcast "), strict=False))
    return found

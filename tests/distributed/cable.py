"""Two hosts on this machine: two network namespaces with a cable between them."""

import os
import shutil
import subprocess
from pathlib import Path

ADDRESSES = ("10.213.77.1", "10.213.77.2")
ETC = Path("/etc/netns")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)


class Cable:
    """The namespaces, and the link between them."""

    def __init__(self) -> None:
        self.hosts = [f"atomas{os.getpid()}n{rank}" for rank in range(2)]

    def build(self) -> None:
        names = "".join(f"{address} n{rank}\n" for rank, address in enumerate(ADDRESSES))
        for host in self.hosts:
            ip("netns", "add", host)
            # `ip netns exec` shows what is here in /etc: both hosts know one another by name
            (ETC / host).mkdir(parents=True, exist_ok=True)
            (ETC / host / "hosts").write_text(f"127.0.0.1 localhost\n{names}", encoding="utf-8")
        one, other = self.hosts
        ip("link", "add", "cable0", "netns", one, "type", "veth", "peer", "name", "cable1", "netns", other)
        for rank, host in enumerate(self.hosts):
            ip("-n", host, "address", "add", f"{ADDRESSES[rank]}/24", "dev", f"cable{rank}")
            ip("-n", host, "link", "set", "lo", "up")
            ip("-n", host, "link", "set", f"cable{rank}", "up")

    def cut(self) -> None:
        ip("-n", self.hosts[0], "link", "set", "cable0", "down")

    def mend(self) -> None:
        ip("-n", self.hosts[0], "link", "set", "cable0", "up")

    def remove(self) -> None:
        for host in self.hosts:
            subprocess.run(["ip", "netns", "delete", host], check=False, capture_output=True, timeout=30)
            shutil.rmtree(ETC / host, ignore_errors=True)

    def prefixes(self) -> list[list[str]]:
        """Before a rank's command: its network, and a host name of its own."""
        return [
            [
                "ip",
                "netns",
                "exec",
                host,
                "unshare",
                "--uts",
                "sh",
                "-c",
                f'hostname n{rank}; exec "$@"',
                "sh",
            ]
            for rank, host in enumerate(self.hosts)
        ]

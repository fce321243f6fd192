"""What each process does first on its node: choose interfaces, prepare scratch, become the command.

`python -m atomas_launcher.worker [--interfaces ib0,eth0] [--scratch PATH] -- COMMAND...`; the process is replaced by
the command, so that signals reach it directly. Interfaces are looked up here and not where the job is submitted,
because only the node knows which of its own are up and have an address.
"""

import argparse
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from atomas_launcher.errors import LaunchError
from atomas_launcher.placement import PlacementError, find_placement

_SIOCGIFADDR = 0x8915  # <linux/sockios.h>
_ARPHRD_INFINIBAND = "32"  # <linux/if_arp.h>
_DOCUMENTATION_ADDRESS = "198.51.100.1"  # RFC 5737: nobody's, so the way there is the default route


@dataclass(frozen=True, kw_only=True)
class Interface:
    """A network interface that is up and has an IPv4 address."""

    name: str
    address: str
    is_fast: bool
    """IP over InfiniBand, or a high-speed network's own name."""


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare the environment and replace this process by the command."""
    parser = argparse.ArgumentParser(prog="python -m atomas_launcher.worker", description=__doc__)
    parser.add_argument("--interfaces", default="", help="candidates, separated by commas; empty: find one")
    parser.add_argument("--scratch", default="", help="folder for temporary files; $NAME is expanded here")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args(argv)
    try:
        placement = find_placement()
        wanted, address = args.interfaces.split(","), placement.address
        is_one_host = placement.local_world_size == placement.world_size
        os.environ.update(network_environment(os.environ, wanted, address, is_one_host=is_one_host))
        os.environ.update(scratch_environment(os.environ, args.scratch))
        os.execvp(args.command[0], args.command)
    except (LaunchError, PlacementError, OSError) as error:
        print(f"atomas: error: {socket.gethostname()}: {error}", file=sys.stderr)
        sys.exit(2)


def network_environment(
    environ: Mapping[str, str], wanted: Sequence[str], address: str, *, is_one_host: bool
) -> dict[str, str]:
    """NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME, where they are not given.

    Args:
        environ: of this process.
        wanted: names of interfaces, best first; empty finds one.
        address: host of rank 0.
        is_one_host: all processes of the job are here.

    Raises:
        LaunchError: none of the wanted ones is up with an address.
    """
    names = [name for name in wanted if name]
    chosen = choose_interface(interfaces(), names, address, is_one_host=is_one_host)
    if chosen is None:
        return {}
    # NCCL reads a name as the beginning of names, and eth1 as eth10 too, unless it follows "="; gloo reads it as it is
    found = {"NCCL_SOCKET_IFNAME": f"={chosen}", "GLOO_SOCKET_IFNAME": chosen}
    return {name: value for name, value in found.items() if name not in environ}


def choose_interface(
    found: Sequence[Interface], wanted: Sequence[str], address: str, *, is_one_host: bool
) -> str | None:
    """The first wanted one; on one host loopback; else a fast one; else the one that leads to rank 0's host.

    None where nothing leads anywhere.
    """
    up = {interface.name: interface for interface in found}
    if wanted:
        name = next((name for name in wanted if name in up), None)
        if name is None:
            raise LaunchError(
                f"no interface of {', '.join(wanted)} is up with an address here; these are: {', '.join(up)}"
            )
        return name
    if is_one_host:
        return next((name for name in up if up[name].address.startswith("127.")), None)
    fast = sorted(interface.name for interface in found if interface.is_fast)
    if fast:
        return fast[0]
    # A host often knows its own name as 127.0.1.1, which leads the others nowhere: then the default route's.
    for target in (address, _DOCUMENTATION_ADDRESS):
        source = _address_towards(target)
        name = next((interface.name for interface in found if interface.address == source), None)
        if name is not None and not up[name].address.startswith("127."):
            return name
    return None


def interfaces() -> list[Interface]:
    """Interfaces of this host that are up and have an IPv4 address, in the kernel's order."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            folder = Path("/sys/class/net") / name
            if _read(folder / "operstate") not in ("up", "unknown"):  # loopback and tunnels say unknown
                continue
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # no IPv4 address
            is_fast = _read(folder / "type") == _ARPHRD_INFINIBAND or name.startswith("hsn")
            found.append(Interface(name=name, address=socket.inet_ntoa(answer[20:24]), is_fast=is_fast))
    return found


def scratch_environment(environ: Mapping[str, str], scratch: str) -> dict[str, str]:
    """Folders for temporary files and compiled kernels inside `scratch`, where they are not given.

    Raises:
        LaunchError: a variable in the path is not set here, or the folder cannot be made.
    """
    if not scratch:
        return {}
    path = os.path.expandvars(scratch)
    if "$" in path:
        raise LaunchError(f"scratch {scratch}: a variable in it is not set here (it came out as {path})")
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(f"scratch {path} cannot be made: {error}") from None
    folders = {
        "TMPDIR": path,
        "TRITON_CACHE_DIR": f"{path}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{path}/inductor",
        "TORCH_EXTENSIONS_DIR": f"{path}/extensions",
    }
    return {name: folder for name, folder in folders.items() if name not in environ}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _address_towards(host: str) -> str | None:
    """This host's address on the way to another; no packet is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None


if __name__ == "__main__":
    main()

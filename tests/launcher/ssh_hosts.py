"""An sshd of this host for a while, with keys of its own."""

import contextlib
import getpass
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

PROGRAMS = ("sshd", "ssh-keygen", "ssh")


@contextlib.contextmanager
def ssh_servers(
    folder: Path, addresses: Sequence[Sequence[str]], prefixes: Sequence[Sequence[str]] = ((),)
) -> Iterator[list[str]]:
    """One sshd per prefix, which listens on its addresses; yields the options that lead ssh to any of them.

    Args:
        folder: for the keys; new.
        addresses: of each server.
        prefixes: what stands before each server's command, such as `ip netns exec HOST`; ssh is tried from the first.
    """
    folder.mkdir()
    for name in ("host", "user"):
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(keygen, check=True)
    if getpass.getuser() == "root":
        Path("/run/sshd").mkdir(exist_ok=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    client = [
        "-F", "/dev/null", "-p", str(port), "-i", str(folder / "user"), "-o", "StrictHostKeyChecking=no", "-o",
        "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR",
    ]  # fmt: skip
    servers = []
    try:
        for number, (prefix, listened) in enumerate(zip(prefixes, addresses, strict=True)):
            settings = (
                f"Port={port}", *(f"ListenAddress={address}" for address in listened), f"HostKey={folder / 'host'}",
                f"AuthorizedKeysFile={folder / 'user.pub'}", "StrictModes=no", "UsePAM=no", "PermitRootLogin=yes",
                f"PidFile={folder / f'sshd-{number}.pid'}",
            )  # fmt: skip
            words = [word for each in settings for word in ("-o", each)]
            program = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin") or "sshd"
            servers.append(
                subprocess.Popen(
                    [*prefix, program, "-D", "-e", "-f", "/dev/null", *words],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
        for listened in addresses:
            _wait_for([*prefixes[0], "ssh", *client, "-o", "BatchMode=yes", listened[-1], "true"])
        yield client
    finally:
        for server in servers:
            server.terminate()
            server.wait()


def _wait_for(command: Sequence[str]) -> None:
    end = time.monotonic() + 30
    while True:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not done.returncode:
            return
        if time.monotonic() > end:
            raise TimeoutError(f"no answer from sshd: {done.stderr}")
        time.sleep(0.1)

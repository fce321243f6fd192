"""What a node offers beside its devices: disk, shared memory, limits, network, clock, versions. No torch here."""

import ctypes
import importlib.metadata
import os
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from packaging.requirements import Requirement

from atomas.diagnosis.result import CheckResult
from atomas_launcher.job import port_of
from atomas_launcher.worker import interfaces

SPEED_TEST_BYTES = 32 * 2**20
SLOW_BYTES_PER_SECOND = 50e6
"""Below it a checkpoint of a gigabyte holds the run for 20 s."""
FREE_BYTES_WARNING, FREE_BYTES_ERROR = 20e9, 1e9
FREE_INODES_WARNING = 10_000
SHARED_MEMORY_WARNING = 1e9
OPEN_FILES_WARNING = 4096
KNOWN_BAD = (
    ("torch>=2.12", "deepspeed<0.19.6", "DeepSpeed's operators do not build (deepspeedai/DeepSpeed#8238)"),
)
"""Two requirements, and what goes wrong where both are met."""
FOR_DEBUGGING = {
    "TRITON_INTERPRET": "Triton kernels are interpreted: slowly, and bf16 wrongly",
    "CUDA_LAUNCH_BLOCKING": "every kernel is waited for",
    "NCCL_IB_DISABLE": "NCCL leaves InfiniBand alone",
    "NCCL_P2P_DISABLE": "NCCL leaves NVLink and PCIe peer access alone",
    "NCCL_SHM_DISABLE": "NCCL leaves shared memory alone",
}
"""Variables that are wrong in a job where they are 1."""
_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised


def check_python() -> CheckResult:
    """The interpreter."""
    version = ".".join(map(str, sys.version_info[:3]))
    is_known = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return CheckResult(
        name="python",
        status="ok" if is_known else "warning",
        message=f"{version} at {sys.executable}",
        remedy="" if is_known else "Atomas is tested with Python 3.11 to 3.13",
    )


def check_versions() -> CheckResult:
    """What Atomas and the packages that it stands on declare, beside what is installed; and pairs known to be bad."""
    name = "versions"
    installed = {package: _version(package) for package in ("torch", "triton", "deepspeed", "transformers")}
    if _version("atomas") is None:
        return CheckResult(name=name, status="skipped", message="atomas is not installed as a package here")
    wrong = [problem for package in ("atomas", *installed) for problem in unmet(package)]
    wrong += known_bad({package: version for package, version in installed.items() if version})
    if wrong:
        return CheckResult(
            name=name,
            status="error",
            message="; ".join(wrong),
            remedy="install into a fresh environment with constraints.txt",
        )
    told = (f"{package} {version}" for package, version in installed.items() if version)
    return CheckResult(name=name, status="ok", message=", ".join(told))


def unmet(package: str) -> list[str]:
    """What an installed package asks for and does not find. A CUDA build of torch asks for one triton, for example."""
    try:
        declared = [Requirement(text) for text in importlib.metadata.requires(package) or []]
    except importlib.metadata.PackageNotFoundError:
        return []  # whoever needs it has said so
    wrong = []
    for requirement in declared:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None:
            wrong.append(f"{requirement.name} is missing, which {package} needs")
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}, as {package} needs")
    return wrong


def known_bad(installed: Mapping[str, str]) -> list[str]:
    """Pairs that no package declares, and that do not work together all the same."""
    found = []
    for *pair, why in KNOWN_BAD:
        requirements = [Requirement(text) for text in pair]
        if all(
            requirement.name in installed
            and requirement.specifier.contains(installed[requirement.name], prereleases=True)
            for requirement in requirements
        ):
            each = " with ".join(
                f"{requirement.name} {installed[requirement.name]}" for requirement in requirements
            )
            found.append(f"{each}: {why}")
    return found


def check_environment(environ: Mapping[str, str]) -> CheckResult:
    """Variables for debugging that were left set."""
    left = [f"{name}=1 ({what})" for name, what in FOR_DEBUGGING.items() if environ.get(name) == "1"]
    if left:
        remedy = "unset them in the shell that launches, and in the profile's environment"
        return CheckResult(name="environment", status="warning", message="; ".join(left), remedy=remedy)
    return CheckResult(name="environment", status="ok", message="no variable for debugging is left set")


def check_compiler() -> CheckResult:
    """Triton and DeepSpeed compile C when they are first used."""
    name = "compiler"
    found = next((p for p in (os.environ.get("CC"), "cc", "gcc", "clang") if p and shutil.which(p)), None)
    if found is None:
        return CheckResult(
            name=name, status="warning", message="no C compiler", remedy="install gcc: Triton needs it"
        )
    return CheckResult(name=name, status="ok", message=shutil.which(found) or found)


def check_folder(folder: Path) -> CheckResult:
    """Whether files can be written, made durable and read back, and how fast."""
    name = "run folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".atomas-doctor-") as place:
            written, opened = _write_speed(Path(place)), _small_files_per_second(Path(place))
    except OSError as error:
        return CheckResult(
            name=name,
            status="error",
            message=f"{folder} cannot be written: {error.strerror or error}",
            remedy="choose another with --folder, and run.output_dir in the configuration",
        )
    is_slow = written < SLOW_BYTES_PER_SECOND
    return CheckResult(
        name=name,
        status="warning" if is_slow else "ok",
        message=f"{folder}: {written / 1e6:.0f} MB/s written to disk, {opened:.0f} small files/s",
        remedy="checkpoints will hold the run for long: choose a faster filesystem" if is_slow else "",
    )


def check_space(folder: Path) -> CheckResult:
    """Free bytes and inodes for checkpoints."""
    name = "free space"
    present = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("/"))
    try:
        facts = os.statvfs(present)
    except OSError as error:
        return CheckResult(name=name, status="skipped", message=f"{present}: {error.strerror or error}")
    free, inodes = facts.f_bavail * facts.f_frsize, facts.f_favail
    counts_inodes = facts.f_files > 0  # several network filesystems say 0
    told = f"{free / 1e9:.0f} GB, {inodes if counts_inodes else 'uncounted'} inodes free at {present}"
    if free < FREE_BYTES_ERROR:
        status, remedy = "error", "free some: not even one checkpoint may fit"
    elif free < FREE_BYTES_WARNING or (counts_inodes and inodes < FREE_INODES_WARNING):
        status, remedy = "warning", "free some, or keep fewer checkpoints (checkpoint.keep_last)"
    else:
        status, remedy = "ok", ""
    return CheckResult(name=name, status=status, message=told, remedy=remedy)  # type: ignore[arg-type]


def check_shared_memory() -> CheckResult:
    """/dev/shm, through which loader processes and NCCL hand over data."""
    name = "shared memory"
    try:
        facts = os.statvfs("/dev/shm")
    except OSError:
        return CheckResult(name=name, status="skipped", message="there is no /dev/shm here")
    free = facts.f_bavail * facts.f_frsize
    is_small = free < SHARED_MEMORY_WARNING
    return CheckResult(
        name=name,
        status="warning" if is_small else "ok",
        message=f"{free / 1e9:.1f} GB free in /dev/shm",
        remedy="in a container: --ipc=host or --shm-size=16g" if is_small else "",
    )


def check_limits() -> CheckResult:
    """Open files, and memory that may be locked for RDMA."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    wrong = []
    if 0 <= files < OPEN_FILES_WARNING:
        wrong.append(f"ulimit -n {OPEN_FILES_WARNING} or more")
    has_rdma = Path("/sys/class/infiniband").is_dir()
    if has_rdma and locked != resource.RLIM_INFINITY:
        wrong.append("ulimit -l unlimited, which RDMA needs")
    locked_text = "unlimited" if locked == resource.RLIM_INFINITY else f"{locked / 1024:.0f} KiB"
    return CheckResult(
        name="limits",
        status="warning" if wrong else "ok",
        message=f"{files} open files, {locked_text} locked memory",
        remedy="; ".join(wrong),
    )


def check_network() -> CheckResult:
    """Interfaces that are up, and what this host's own name leads to."""
    name, host = "network", socket.gethostname()
    found = [f"{each.name} {each.address}" for each in interfaces() if not each.address.startswith("127.")]
    try:
        address = socket.gethostbyname(host)
    except OSError:
        return CheckResult(
            name=name,
            status="error",
            message=f"this host's name {host} has no address",
            remedy="enter it in DNS or /etc/hosts: torch and Slurm look it up",
        )
    if not found:
        told = f"no interface but loopback is up with an address; {host} is {address}"
        return CheckResult(
            name=name, status="warning", message=told, remedy="jobs on several nodes cannot run"
        )
    return CheckResult(name=name, status="ok", message=f"{', '.join(found)}; {host} is {address}")


def check_port() -> CheckResult:
    """Whether rank 0 could listen, and whether its ports are out of the way of outgoing connections."""
    name, port = "port", port_of(socket.gethostname())
    try:
        with (
            socket.create_server(("", port)) as server,
            socket.create_connection(("127.0.0.1", port), timeout=5),
        ):
            server.accept()[0].close()
    except OSError as error:
        return CheckResult(
            name=name,
            status="warning",
            message=f"{port} cannot be listened on and reached: {error.strerror or error}",
            remedy="set MASTER_PORT, or ask for ports 20000 to 31999",
        )
    lowest = _lowest_outgoing_port()
    if lowest is not None and lowest < 32000:
        return CheckResult(
            name=name,
            status="warning",
            message=f"outgoing connections take ports from {lowest} on, among them those of rank 0",
            remedy="sysctl net.ipv4.ip_local_port_range='32768 60999', or set MASTER_PORT",
        )
    return CheckResult(name=name, status="ok", message=f"{port} can be listened on and reached")


def check_clock() -> CheckResult:
    """Whether the kernel knows its clock to be synchronised."""
    name = "clock"
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(256))
    except (AttributeError, OSError):
        state = -1
    if state < 0:
        return CheckResult(
            name=name, status="skipped", message="the kernel does not say whether it is synchronised"
        )
    if state == _TIME_ERROR:
        return CheckResult(
            name=name,
            status="warning",
            message="not synchronised, says the kernel",
            remedy="start chronyd or ntpd; --distributed compares the nodes' clocks",
        )
    return CheckResult(name=name, status="ok", message="synchronised, says the kernel")


def check_corpus(corpus: Path | str | None) -> CheckResult:
    """Whether the data index can be read and its shards are there in full size."""
    name = "corpus"
    if corpus is None:
        return CheckResult(name=name, status="skipped", message="no --corpus was given")
    from atomas.data.shards import Corpus
    from atomas.errors import AtomasError

    try:
        opened = Corpus.open(corpus)
        splits = ", ".join(f"{split} {opened.split(split).num_records}" for split in opened.splits)
    except AtomasError as error:
        return CheckResult(
            name=name, status="error", message=str(error), remedy="`atomas data verify` tells more"
        )
    return CheckResult(name=name, status="ok", message=f"{corpus}: {splits}; index {opened.fingerprint[:12]}")


def _write_speed(folder: Path) -> float:
    """Bytes per second, durable; the best of two."""
    data = os.urandom(2**20)
    seconds = []
    for number in range(2):
        started = time.perf_counter()
        with (folder / f"{number}").open("wb") as file:
            for _ in range(SPEED_TEST_BYTES // len(data)):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        seconds.append(time.perf_counter() - started)
        if (folder / f"{number}").stat().st_size != SPEED_TEST_BYTES:
            raise OSError("a file came back with another size")
    return SPEED_TEST_BYTES / min(seconds)


def _small_files_per_second(folder: Path, count: int = 50) -> float:
    started = time.perf_counter()
    for number in range(count):
        path = folder / f"small-{number}"
        path.write_bytes(b"x")
        path.read_bytes()
    return count / (time.perf_counter() - started)


def _lowest_outgoing_port() -> int | None:
    try:
        text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8")
    except OSError:
        return None
    return int(text.split()[0])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

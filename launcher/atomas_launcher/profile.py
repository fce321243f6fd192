"""The facts of a site, from strict YAML: nothing about a particular cluster stands in code.

Every mistake names file and line, the key and the nearest known one.
"""

import dataclasses
import difflib
import os
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from atomas_launcher.errors import LaunchError
from atomas_launcher.job import check_no_control_characters, check_variable_names

BACKENDS = ("local", "torchrun", "deepspeed", "slurm", "srun", "mpi", "pbs", "kubernetes")

# NCCL_NET names the one network that NCCL may use, so that a job that cannot use it fails at once instead of running
# slowly over TCP. IB and Socket are NCCL's own names (docs.nvidia.com/deeplearning/nccl: Environment Variables);
# "AWS Libfabric" is that of the plugin for libfabric on Slingshot as well (docs.cscs.ch: NCCL).
FABRICS: dict[str, dict[str, str]] = {
    "none": {},
    "ethernet": {"NCCL_NET": "Socket"},
    "infiniband": {"NCCL_NET": "IB"},
    # NCCL_CROSS_NIC and FI_* without the provider are among what docs.isambard.ac.uk (NCCL guide, env_vars.sh) sets for
    # Slingshot 11. Sizes of queues and thresholds, which sites set differently, belong into a profile's `environment`.
    "slingshot": {
        "NCCL_NET": "AWS Libfabric",
        "NCCL_CROSS_NIC": "1",
        "FI_PROVIDER": "cxi",
        "FI_CXI_DISABLE_HOST_REGISTER": "1",
        "FI_MR_CACHE_MONITOR": "userfaultfd",
    },
    # FI_PROVIDER chooses among the providers of a node (github.com/aws/aws-ofi-nccl, wiki: Environment Variables)
    "efa": {"NCCL_NET": "AWS Libfabric", "FI_PROVIDER": "efa"},
}
"""What NCCL is told of the network. A profile's `environment` wins over it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Container:
    """An image that every process runs in."""

    runtime: Literal["none", "apptainer", "docker"] = "none"
    """What starts it. Kubernetes takes only the image."""
    image: str = ""
    """A .sif file for Apptainer, else a name with a tag."""
    binds: tuple[str, ...] = ()
    """Folders of the host that the container sees: PATH or OUTSIDE:INSIDE. The working folder always is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kubernetes:
    """What only Kubernetes asks."""

    kind: Literal["TrainJob", "PyTorchJob"] = "TrainJob"
    """TrainJob: Kubeflow Trainer 2.2 or later. PyTorchJob: Training Operator 1, on old clusters."""
    namespace: str = "default"
    """Namespace of the job."""
    runtime: str = "torch-distributed"
    """The ClusterTrainingRuntime that a TrainJob starts from."""
    claims: dict[str, str] = dataclasses.field(default_factory=dict)
    """PersistentVolumeClaim -> path in the container. The working folder must lie in one."""
    gpu_resource: str = "nvidia.com/gpu"
    """Name of the resource of which each process takes one."""
    cpu: str = ""
    """CPUs of a node's pod, such as 64; empty leaves it to the runtime."""
    memory: str = ""
    """Memory of a node's pod, such as 512Gi; empty leaves it to the runtime."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterProfile:
    """What a job needs to know of the place where it runs."""

    backend: Literal["local", "torchrun", "deepspeed", "slurm", "srun", "mpi", "pbs", "kubernetes"] = "local"
    """How jobs are started here."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: no GPU is asked for, and `--gpus-per-node` counts processes."""
    gpus_per_node: int = 1
    """Processes of a node where the command line does not say."""
    python: str = ""
    """Interpreter on the nodes; empty takes the submitting one, in a container python3."""
    modules: tuple[str, ...] = ()
    """Environment modules that a job script loads."""
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    """Variables for every process, literally: no $NAME is expanded."""
    fabric: Literal["none", "ethernet", "infiniband", "slingshot", "efa"] = "none"
    """Preset of NCCL's variables for the network."""
    interfaces: tuple[str, ...] = ()
    """Interfaces for NCCL and gloo, the first that is up with an address on a node; empty finds one on each node."""
    scratch: str = ""
    """A node's own fast folder, for temporary files and compiled kernels; $NAME is expanded on the node."""
    hosts: tuple[str, ...] = ()
    """Hosts for torchrun, deepspeed and mpi without a scheduler, rank 0's first."""
    ssh_options: tuple[str, ...] = ()
    """Options of ssh to these hosts, such as [-p, "2222"]."""
    rendezvous: Literal["c10d", "static"] = "c10d"
    """How torchrun's agents on several hosts meet."""
    mpi: Literal["openmpi", "intelmpi", "mpich"] = "openmpi"
    """Whose mpirun it is."""
    partition: str = ""
    """Slurm's partition or the queue of PBS."""
    account: str = ""
    """What the job is billed to."""
    time_limit: str = ""
    """HH:MM:SS, D-HH:MM:SS or minutes, where the command line does not say."""
    warning_seconds: int = 300
    """Time before the limit at which the job is told to save: twice a step and a save, and more."""
    cpus_per_process: int = 0
    """CPU cores of each process; 0 leaves it to the site."""
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """Which of Slurm's options asks for GPUs."""
    scheduler_options: tuple[str, ...] = ()
    """Further options, each a line of the job script, such as --exclusive or -l place=scatter:excl."""
    container: Container = dataclasses.field(default_factory=Container)
    """The image, if any."""
    kubernetes: Kubernetes = dataclasses.field(default_factory=Kubernetes)
    """What only Kubernetes asks."""

    def __post_init__(self) -> None:
        """Check what spans keys."""
        check_variable_names(*self.environment)
        for value in dataclasses.asdict(self).values():
            check_no_control_characters(*_texts(value))
        if self.container.runtime != "none" and not self.container.image:
            raise LaunchError(f"container.runtime = {self.container.runtime} needs container.image")
        if self.backend == "kubernetes" and not self.container.image:
            raise LaunchError("backend kubernetes needs container.image")


def find_profile(name: str) -> ClusterProfile:
    """Read a profile: a YAML file, or NAME for configs/clusters/NAME.yaml or the user's own folder."""
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        return read_profile(Path(name))
    folders = (_user_folder(), Path("configs/clusters"))
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return read_profile(folder / f"{name}.yaml")
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known) or 'none'}"
    raise LaunchError(f"no cluster {name!r} in {' or '.join(map(str, folders))}; {hint}")


def read_profile(path: Path) -> ClusterProfile:
    """Read a profile from strict YAML.

    Raises:
        LaunchError: the file cannot be read, a key is unknown, or a value is not of its type.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"cluster profile {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise LaunchError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if root is None:
        return ClusterProfile()
    try:
        return typing.cast(ClusterProfile, _build(ClusterProfile, root, path, ""))
    except LaunchError as error:
        message = str(error)
        raise LaunchError(message if message.startswith(str(path)) else f"{path}: {message}") from None


def seconds(text: str) -> int:
    """A time limit as Slurm writes it -> seconds: `90` minutes, `1:30:00`, `2-12`, `1-12:00:00`.

    Raises:
        LaunchError: it is none of these.
    """
    days, dash, clock = text.rpartition("-")
    parts = clock.split(":")
    numbers = [*([days] if dash else []), *parts]
    if not all(number.isdecimal() for number in numbers) or len(parts) > 3:
        raise LaunchError(f"time limit {text!r} is not of the form HH:MM:SS, D-HH:MM:SS or MINUTES")
    values = [int(part) for part in parts]
    if dash:
        units = [3600, 60, 1]
    else:
        units = {1: [60], 2: [60, 1], 3: [3600, 60, 1]}[len(parts)]
    total = int(days or 0) * 86400 + sum(value * unit for value, unit in zip(values, units, strict=False))
    if not total:
        raise LaunchError(f"time limit {text!r}: no time at all")
    return total


def _user_folder() -> Path:
    configured = os.environ.get("XDG_CONFIG_HOME")
    return (Path(configured) if configured else Path.home() / ".config") / "atomas" / "clusters"


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (str(key), *_texts(item))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _texts(item)


def _build(kind: type, node: yaml.Node, path: Path, prefix: str) -> Any:
    place = f"{path}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
        raise LaunchError(f"{place}: {prefix.rstrip('.') or 'a profile'} must be a mapping of keys to values")
    fields = typing.get_type_hints(kind)
    given: dict[str, Any] = {}
    for key, value in node.value:
        place, dotted = f"{path}:{key.start_mark.line + 1}", f"{prefix}{key.value}"
        if key.value not in fields:
            near = difflib.get_close_matches(str(key.value), list(fields), n=1, cutoff=0.5)
            hint = f"did you mean {prefix + near[0]!r}?" if near else f"known: {', '.join(fields)}"
            raise LaunchError(f"{place}: unknown key {dotted!r}; {hint}")
        if key.value in given:
            raise LaunchError(f"{place}: {dotted!r} is given twice")
        annotation = fields[key.value]
        if dataclasses.is_dataclass(annotation):
            given[key.value] = _build(typing.cast(type, annotation), value, path, f"{dotted}.")
        else:
            given[key.value] = _convert(value, annotation, place, dotted)
    return kind(**given)


def _convert(node: yaml.Node, annotation: Any, place: str, key: str) -> Any:
    value = yaml.SafeLoader("").construct_object(node, deep=True)
    origin = typing.get_origin(annotation)
    if origin is Literal:
        choices = typing.get_args(annotation)
        if value in choices:
            return value
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise LaunchError(f"{place}: {key} = {value!r} must be one of {', '.join(choices)}{hint}")
    if origin is tuple:
        if isinstance(node, yaml.SequenceNode) and all(isinstance(n, yaml.ScalarNode) for n in node.value):
            return tuple(item.value for item in node.value)
        raise LaunchError(f"{place}: {key} must be a list such as [a, b]")
    if origin is dict:
        if isinstance(node, yaml.MappingNode) and all(isinstance(n, yaml.ScalarNode) for _, n in node.value):
            # as written: YAML 1.1 reads 1e5, 0o17, 12:30 and yes as something else
            return {name.value: item.value for name, item in node.value}
        raise LaunchError(f"{place}: {key} must be a mapping of names to values")
    if annotation is int:
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        raise LaunchError(f"{place}: {key} = {value!r} must be a whole number")
    if isinstance(node, yaml.ScalarNode):
        return "" if value is None else node.value
    raise LaunchError(f"{place}: {key} must be text")

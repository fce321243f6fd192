"""What every back end writes and runs, beside files that were read line by line; and that no shell acts on a name.

After a change that is meant: ATOMAS_UPDATE_GOLDEN=1 pytest tests/launcher/test_backends.py, and read the difference.
"""

import dataclasses
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from atomas_launcher.backends import RENDERERS, render
from atomas_launcher.errors import LaunchError
from atomas_launcher.job import JobSpec, Rendered
from atomas_launcher.profile import BACKENDS, ClusterProfile, Container, Kubernetes
from atomas_launcher.runner import write_files
from tests.launcher.conftest import HOSTILE

GOLDEN = Path(__file__).with_name("golden")
SITE = ClusterProfile(partition="gpu", account="project", time_limit="1:00:00", cpus_per_process=8)
IMAGE = Container(runtime="apptainer", image="/images/atomas.sif", binds=("/shared", "/data:/corpora"))
PODS = dataclasses.replace(
    SITE,
    backend="kubernetes",
    container=Container(image="registry.example.org/atomas:1"),
    kubernetes=Kubernetes(namespace="training", claims={"data": "/data"}, cpu="64", memory="512Gi"),
)
HOSTS = ("n1", "n2", "user@n3")


def job(**changes: Any) -> JobSpec:
    """Two nodes with four GPUs each."""
    fields = {
        "arguments": ("train", "--config", "configs/train/demo.yaml"),
        "name": "mine",
        "identifier": "mine-0a1b2c3d",
        "nodes": 2,
        "gpus_per_node": 4,
        "folder": Path("/shared/runs/mine/launch/1"),
        "working_directory": Path("/shared/work"),
        "run_directory": Path("/shared/runs/mine"),
        "python": "/shared/venv/bin/python",
        "inherited": {"NCCL_DEBUG": "INFO", "PATH": "/usr/bin:/bin"},
        "environment": {"HF_HOME": "/shared/hugging face"},
    }
    return JobSpec(**(fields | changes))  # type: ignore[arg-type]


def profile(backend: str, **changes: Any) -> ClusterProfile:
    return dataclasses.replace(SITE, backend=backend, **changes)


CASES = {
    "local": (job(nodes=1, gpus_per_node=2), profile("local")),
    "local_docker": (
        job(nodes=1, gpus_per_node=1, user="1000:1000"),
        profile("local", container=Container(runtime="docker", image="atomas:1", binds=("/data",))),
    ),
    "torchrun_one_host": (job(nodes=1), profile("torchrun")),
    "torchrun_c10d": (job(), profile("torchrun", hosts=HOSTS, ssh_options=("-p", "2222"))),
    "torchrun_static": (job(), profile("torchrun", hosts=HOSTS, rendezvous="static", container=IMAGE)),
    "deepspeed_one_host": (job(nodes=1), profile("deepspeed")),
    "deepspeed_hosts": (job(), profile("deepspeed", hosts=HOSTS, device="cpu")),
    "slurm": (job(), profile("slurm")),
    "slurm_everything": (
        job(array="1-10%1", exclude=("n7", "n9"), time_limit=7200, preflight=True, restarts=3),
        profile(
            "slurm", modules=("cuda/13.0", "python"), fabric="slingshot", interfaces=("hsn0", "ib0"),
            scratch="/local/$SLURM_JOB_ID", gpu_request="gres", container=IMAGE, warning_seconds=600,
            environment={"NCCL_DEBUG": "WARN"}, scheduler_options=("--exclusive", "--mem=0", "--comment=a b"),
        ),
    ),
    "srun": (job(), profile("srun")),
    "mpi_openmpi": (job(), profile("mpi", hosts=HOSTS)),
    "mpi_intelmpi": (job(), profile("mpi", hosts=HOSTS, mpi="intelmpi", ssh_options=("-p", "2222"))),
    "mpi_mpich": (job(nodes=1), profile("mpi", mpi="mpich")),
    "pbs": (job(), profile("pbs", scheduler_options=("-l place=scatter:excl",))),
    "pbs_intelmpi": (job(), profile("pbs", mpi="intelmpi", modules=("intel-mpi",), time_limit="")),
    "kubernetes_trainjob": (job(), PODS),
    "kubernetes_pytorchjob": (
        job(),
        dataclasses.replace(PODS, kubernetes=dataclasses.replace(PODS.kubernetes, kind="PyTorchJob")),
    ),
}  # fmt: skip


def text(rendered: Rendered) -> str:
    """Files and commands as one readable file."""
    parts = [f"===== {name}\n{content}" for name, content in rendered.files.items()]
    for command in rendered.commands:
        variables = "".join(f"{name}={value}\n" for name, value in command.environment.items())
        parts.append(f"===== run\n{variables}{shlex.join(command.arguments)}\n")
    return "\n".join(parts)


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str) -> None:
    found = text(render(*CASES[case]))
    file = GOLDEN / f"{case}.txt"
    if os.environ.get("ATOMAS_UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(found, encoding="utf-8")
    assert found == file.read_text(encoding="utf-8")


def test_open_mpi_cannot_be_given_a_script_in_a_folder_with_a_space() -> None:
    spaced = job(folder=Path("/shared/my runs/mine/launch/1"))
    with pytest.raises(LaunchError, match=r"/shared/my runs/mine/launch/1 has one: .*~/\.ssh/config"):
        render(spaced, profile("mpi", hosts=HOSTS, ssh_options=("-p", "2222")))
    render(spaced, profile("mpi", hosts=HOSTS))  # without options the script is not needed
    render(spaced, profile("mpi", hosts=HOSTS, mpi="mpich", ssh_options=("-p", "2222")))


def test_every_backend_has_a_case() -> None:
    assert {profile.backend for _, profile in CASES.values()} == set(BACKENDS) == set(RENDERERS)
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_scripts_are_valid_shell(case: str) -> None:
    for name, content in render(*CASES[case]).files.items():
        if content.startswith("#!"):
            done = subprocess.run(["bash", "-n"], input=content, text=True, capture_output=True, check=False)
            assert not done.stderr, f"{name}: {done.stderr}"


STAND_INS = {
    # each runs the words that follow its own options
    "srun": 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"',
    "mpirun": 'while [ "$1" != -hostfile ]; do shift; done; shift 2; exec "$@"',
    "mpiexec": 'while [ "$1" != -f ]; do shift; done; shift 2; exec "$@"',
    "ssh": 'exec bash -c "${!#}"',
    "apptainer": 'printf "%s\\n" "$@" >"$IMAGE_RESULT"; while [ "${1%.sif}" = "$1" ]; do shift; done; shift; exec "$@"',
    "docker": 'printf "%s\\n" "$@" >"$IMAGE_RESULT"; while [ "${1%.sif}" = "$1" ]; do shift; done; shift; exec "$@"',
    "scontrol": "exit 1",
    "qsub": "exit 1",
    "module": 'printf "%s\\n" "$@" >>"$MODULE_RESULT"',
    # writes what reached it
    "py thon": 'printf "%s\\n" "$ODD" "$PWD" "$@" >"$RESULT"',
}
NASTY = "x $(touch pwned) `touch pwned` 'q' \"d\" ; touch pwned #"


@pytest.mark.parametrize("runtime", ["none", "apptainer", "docker"])
@pytest.mark.parametrize(
    "backend", ["local", "torchrun", "torchrun ssh", "slurm", "srun", "pbs", "mpi", "mpi mpich"]
)
def test_no_shell_acts_on_a_name(backend: str, runtime: str, tmp_path: Path) -> None:
    """What a back end writes and runs is run; only schedulers, ssh and images are stood in for.

    Every name that a user can choose holds what a shell would act on: the job's, its run's, its folders', arguments,
    variables, modules, interfaces, scratch, image and binds.
    """
    kind, _, variant = backend.partition(" ")
    work, result = tmp_path / f"work {NASTY}", tmp_path / "it's `a result`"
    work.mkdir()
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    results = {
        "RESULT": str(result),
        "IMAGE_RESULT": str(tmp_path / "i"),
        "MODULE_RESULT": str(tmp_path / "m"),
    }
    image = (
        Container(runtime=runtime, image=f"/images/{NASTY}.sif", binds=(f"/{NASTY}",))
        if runtime != "none"
        else Container()
    )  # type: ignore[arg-type]
    has_script = kind in ("slurm", "pbs")
    hostile = job(
        arguments=("train", *HOSTILE), nodes=1, gpus_per_node=1, python=str(tmp_path / "py thon"), name=f"a'b {NASTY}",
        folder=tmp_path / f"launch {NASTY}", working_directory=work, run_directory=tmp_path / f"run {NASTY}",
        environment={"ODD": NASTY, **results}, inherited={}, restarts=1, preflight=kind == "slurm",
    )  # fmt: skip
    site = ClusterProfile(
        backend=kind, device="cpu", hosts=("n1",) if variant == "ssh" or kind == "mpi" else (),  # type: ignore[arg-type]
        modules=(NASTY,) if has_script else (), interfaces=(NASTY, "lo"), scratch=f"/scratch/{NASTY}", container=image,
        mpi="mpich" if variant == "mpich" else "openmpi", ssh_options=("-o", NASTY) if variant == "ssh" else (),
        scheduler_options=(f"--comment={NASTY}",) if kind == "slurm" else (),
    )  # fmt: skip
    rendered = render(hostile, site)
    write_files(rendered, hostile.folder)
    environ = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PBS_NODEFILE": os.devnull,
        "PBS_JOBID": "7",
        **results,
    }
    environ |= {
        "HOME": str(tmp_path),
        "SLURM_JOB_ID": "7",
    }  # no profile of this host's: a login shell reads it
    for command in rendered.commands:
        words = list(command.arguments)
        if has_script:  # the scheduler would run it
            assert words[-1] == str(hostile.folder / next(iter(rendered.files)))
            words = ["bash", words[-1]]
        done = subprocess.run(
            words, cwd=work, env={**environ, **command.environment, "PATH": environ["PATH"]}, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
    assert result.exists(), done.stderr
    lines = result.read_text(encoding="utf-8").splitlines()
    assert lines[:2] == [NASTY, str(work)]
    if "doctor" not in lines:  # of a restart's decision, the last that is run
        assert lines[-len(HOSTILE) :] == list(HOSTILE)
    if runtime != "none":
        assert f"/images/{NASTY}.sif" in (tmp_path / "i").read_text(encoding="utf-8").splitlines()
    if has_script:
        assert (tmp_path / "m").read_text(encoding="utf-8").splitlines()[:2] == ["load", NASTY]
    assert not list(tmp_path.rglob("pwned"))


def test_deepspeed_is_given_nothing_to_quote() -> None:
    """Its pdsh runner would hand it to a shell as it stands."""
    hostile = job(arguments=("train", *HOSTILE), environment={"ODD": "$(touch pwned)", "PLAIN": "1"})
    rendered = render(hostile, profile("deepspeed", hosts=HOSTS))
    assert shlex.quote("$(touch pwned)") in rendered.files["worker.sh"]
    assert "pwned" not in rendered.files["deepspeed_env"]
    assert "PLAIN=1" in rendered.files["deepspeed_env"]
    assert not set(HOSTILE) & set(rendered.commands[0].arguments)
    with pytest.raises(LaunchError, match="cannot quote the path '/a b'; use the torchrun back end"):
        render(job(working_directory=Path("/a b")), profile("deepspeed"))


def test_kubernetes_expands_nothing() -> None:
    hostile = job(arguments=("train", "$(HOME)", "$$(HOME)", "a: b"), environment={"ODD": "$(HOME) $x"})
    trainer = yaml.safe_load(render(hostile, PODS).files["job.yaml"])["spec"]["trainer"]
    assert trainer["command"][-3:] == ["$$(HOME)", "$$$$(HOME)", "a: b"]
    assert {"name": "ODD", "value": "$$(HOME) $$x"} in trainer["env"]


def test_paths_of_the_submitting_host_stay_there() -> None:
    """In a container, and after `module load`, they would lead astray."""
    for case in ("slurm_everything", "kubernetes_trainjob", "local_docker"):
        assert "/usr/bin:/bin" not in text(render(*CASES[case]))


@pytest.mark.parametrize(
    ("changes", "site", "message"),
    [
        ({"nodes": 2}, {"backend": "local"}, "backend local is one host, and 2 nodes"),
        ({}, {"backend": "torchrun", "hosts": ("n1",)}, "2 nodes are asked for and 1 hosts are known"),
        (
            {"exclude": ("n1",)},
            {"backend": "mpi", "hosts": ("n1", "n2")},
            "2 nodes are asked for and 1 hosts",
        ),
        (
            {},
            {"backend": "mpi", "hosts": ("-oProxyCommand=x", "n2")},
            "'-oProxyCommand=x' is not the name of a host",
        ),
        ({}, {"backend": "deepspeed", "hosts": ("n1;x", "n2")}, "'n1;x' is not the name of a host"),
        ({"time_limit": 60}, {"backend": "slurm"}, "a time limit of 60 s leaves nothing before the warning"),
        ({"time_limit": 60}, {"backend": "pbs"}, "a time limit of 60 s leaves nothing before the warning"),
        ({"folder": Path("/a%j")}, {"backend": "slurm"}, "Slurm replaces % and backslashes"),
        ({"preflight": True}, {"backend": "mpi"}, "backend mpi cannot leave out nodes by itself"),
        ({"array": "1-2%1"}, {"backend": "pbs"}, "no chain by job array"),
        ({"exclude": ("n1",)}, {"backend": "pbs"}, "PBS cannot exclude nodes by name"),
        ({}, {"backend": "pbs", "account": "a b"}, "account 'a b' cannot be written in a #PBS line"),
    ],
)
def test_what_a_backend_refuses(changes: dict[str, Any], site: dict[str, Any], message: str) -> None:
    with pytest.raises(LaunchError, match=message.replace("(", r"\(")):
        render(job(**changes), ClusterProfile(**site))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arguments": ()}, "no command"),
        ({"nodes": 0}, "nodes: 0, and at least 1 is needed"),
        ({"name": "a\nb"}, "has a control character"),
        ({"environment": {"A": "x\n#SBATCH --uid=0"}}, "has a control character"),
        ({"environment": {"A;B": "x"}}, "'A;B' is not the name of an environment variable"),
        ({"array": "1; x"}, "array '1; x' is not of the form"),
    ],
)
def test_what_a_job_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        job(**changes)

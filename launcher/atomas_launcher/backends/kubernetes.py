"""Kubernetes: a Kubeflow TrainJob, or a PyTorchJob for clusters that still run the Training Operator.

In both, the operator tells torchrun by PET_* variables how many nodes there are, which one this is and where rank 0
listens; torchrun starts the processes of the pod.
"""

import re
from typing import Any

import yaml

from atomas_launcher.errors import LaunchError
from atomas_launcher.job import Command, JobSpec, Rendered
from atomas_launcher.process import (
    TORCHRUN_ENVIRONMENT,
    environment,
    time_limit,
    torchrun_command,
    worker_command,
)
from atomas_launcher.profile import ClusterProfile

MANIFEST = "job.yaml"
_MANAGER = "atomas-launcher"


class _PlainDumper(yaml.SafeDumper):
    """YAML in which what stands twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def render(job: JobSpec, profile: ClusterProfile) -> Rendered:
    """A manifest and the kubectl that creates it."""
    if job.array or job.exclude:
        what = "a job array" if job.array else "an exclusion of nodes"
        raise LaunchError(f"backend kubernetes knows no {what}")
    build = _train_job if profile.kubernetes.kind == "TrainJob" else _pytorch_job
    manifest = {**build(job, profile), "metadata": _metadata(job, profile)}
    text = yaml.dump(manifest, Dumper=_PlainDumper, sort_keys=False, width=1000)
    command = ("kubectl", "create", "--output=name", "--filename", str(job.folder / MANIFEST))
    return Rendered(files={MANIFEST: text}, commands=(Command(arguments=command),))


def _metadata(job: JobSpec, profile: ClusterProfile) -> dict[str, Any]:
    return {
        "name": object_name(job),
        "namespace": profile.kubernetes.namespace,
        "labels": {"app.kubernetes.io/name": "atomas"},
    }


def object_name(job: JobSpec) -> str:
    """A name as Kubernetes takes it, other than that of any other job: a-z, 0-9 and -, at most 40 characters."""
    plain = re.sub(
        r"[^a-z0-9]+", "-", f"{job.name[:24]}-{job.identifier.rpartition('-')[2][:12]}".lower()
    ).strip("-")
    return plain if plain[:1].isalpha() else f"a-{plain}"


def _train_job(job: JobSpec, profile: ClusterProfile) -> dict[str, Any]:
    pod = {
        "volumes": _volumes(profile),
        "terminationGracePeriodSeconds": profile.warning_seconds,
        # the image, command and variables of this container may only be given by `trainer`
        "containers": [{"name": "node", "volumeMounts": _mounts(profile)}],
    }
    replicated = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    patch = {
        "manager": _MANAGER,
        "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [replicated]}}},
    }
    trainer: dict[str, Any] = {
        "image": profile.container.image,
        "command": _command(job, profile),
        "env": _variables(job, profile),
        "numNodes": job.nodes,
        "numProcPerNode": job.gpus_per_node,
    }
    resources = _resources(job, profile)
    if resources:
        trainer["resourcesPerNode"] = resources
    spec: dict[str, Any] = {"runtimeRef": {"name": profile.kubernetes.runtime}}
    limit = time_limit(job, profile)
    if limit:
        spec["activeDeadlineSeconds"] = limit
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": None,
        "spec": {**spec, "trainer": trainer, "runtimePatches": [patch]},
    }


def _pytorch_job(job: JobSpec, profile: ClusterProfile) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": "pytorch",  # the operator looks for this name
        "image": profile.container.image,
        "command": _command(job, profile),
        "env": _variables(job, profile),
        "volumeMounts": _mounts(profile),
    }
    resources = _resources(job, profile)
    if resources:
        container["resources"] = resources
    pod = {
        "containers": [container],
        "volumes": _volumes(profile),
        "terminationGracePeriodSeconds": profile.warning_seconds,
    }
    replica = {"restartPolicy": "OnFailure", "template": {"spec": pod}}
    replicas: dict[str, Any] = {"Master": {"replicas": 1, **replica}}
    if job.nodes > 1:
        replicas["Worker"] = {"replicas": job.nodes - 1, **replica}
    policy: dict[str, Any] = {"cleanPodPolicy": "None"}
    limit = time_limit(job, profile)
    if limit:
        policy["activeDeadlineSeconds"] = limit
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": None,
        "spec": {
            "nprocPerNode": str(job.gpus_per_node),
            "runPolicy": policy,
            "pytorchReplicaSpecs": replicas,
        },
    }


def _command(job: JobSpec, profile: ClusterProfile) -> list[str]:
    words = [*torchrun_command(job), *worker_command(job, profile)]
    # also as the working folder: neither API lets a job set one everywhere
    return [_literal(word) for word in ["env", f"--chdir={job.working_directory}", *words]]


def _literal(text: str) -> str:
    """Text that Kubernetes does not expand: it reads $(NAME) in commands and values."""
    return text.replace("$", "$$")


def _variables(job: JobSpec, profile: ClusterProfile) -> list[dict[str, str]]:
    variables = {**environment(job, profile), **TORCHRUN_ENVIRONMENT}
    return [{"name": name, "value": _literal(value)} for name, value in variables.items()]


def _resources(job: JobSpec, profile: ClusterProfile) -> dict[str, Any]:
    known, wanted = profile.kubernetes, {}
    if profile.device == "cuda":
        wanted[known.gpu_resource] = str(job.gpus_per_node)
    wanted |= {name: value for name, value in (("cpu", known.cpu), ("memory", known.memory)) if value}
    return {"requests": wanted, "limits": dict(wanted)} if wanted else {}


def _volumes(profile: ClusterProfile) -> list[dict[str, Any]]:
    shared = {"name": "shared-memory", "emptyDir": {"medium": "Memory"}}
    claims = [
        {"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": claim}}
        for number, claim in enumerate(profile.kubernetes.claims)
    ]
    return [shared, *claims]


def _mounts(profile: ClusterProfile) -> list[dict[str, Any]]:
    # NCCL and the loader's processes want more than a container's 64 MiB
    shared = {"name": "shared-memory", "mountPath": "/dev/shm"}
    paths = profile.kubernetes.claims.values()
    return [
        shared,
        *({"name": f"claim-{number}", "mountPath": path} for number, path in enumerate(paths)),
    ]

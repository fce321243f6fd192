"""Manifests beside the schemas of the custom resources: Kubeflow's own models, and the facts of the older ones."""

from typing import Any

import yaml
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob

from atomas_launcher.backends import render
from tests.launcher.test_backends import CASES, job

# kubeflow.org/v1 PyTorchJob, its run policy and replicas; the parts of a pod that a manifest of ours has
POD_SCHEMA: dict[str, Any] = {
    "containers": [
        {
            "name": str,
            "image": str,
            "command": [str],
            "env": [{"name": str, "value": str}],
            "volumeMounts": [{"name": str, "mountPath": str}],
            "resources": {"requests": {"*": str}, "limits": {"*": str}},
        }
    ],
    "volumes": [
        {"name": str, "emptyDir": {"medium": str}, "persistentVolumeClaim": {"claimName": str}},
    ],
    "terminationGracePeriodSeconds": int,
}
PYTORCH_JOB_SCHEMA: dict[str, Any] = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "namespace": str, "labels": {"*": str}},
    "spec": {
        "nprocPerNode": str,
        "runPolicy": {"cleanPodPolicy": str, "activeDeadlineSeconds": int, "backoffLimit": int},
        "pytorchReplicaSpecs": {
            "*": {"replicas": int, "restartPolicy": str, "template": {"spec": POD_SCHEMA}},
        },
    },
}


def problems(value: Any, schema: Any, path: str = "") -> list[str]:
    """Where a value is not of a schema: a type, a list of one schema, or a mapping of known keys (* for any)."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{path} is no mapping"]
        found = []
        for key, item in value.items():
            inner = schema.get(key, schema.get("*"))
            found += [f"{path}.{key} is unknown"] if inner is None else problems(item, inner, f"{path}.{key}")
        return found
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{path} is no list"]
        return [
            p for number, item in enumerate(value) for p in problems(item, schema[0], f"{path}[{number}]")
        ]
    return [] if type(value) is schema else [f"{path} is {type(value).__name__}, not {schema.__name__}"]


def manifest(case: str, **changes: Any) -> dict[str, Any]:
    _, profile = CASES[case]
    text = render(job(**changes), profile).files["job.yaml"]
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def test_a_train_job_is_one_for_kubeflow() -> None:
    """Types are checked by reading it; a key that the schema does not have would not come back."""
    found = manifest("kubernetes_trainjob")
    assert TrainerV1alpha1TrainJob.from_dict(found).to_dict() == found
    found["spec"]["trainer"]["numNode"] = 2
    assert TrainerV1alpha1TrainJob.from_dict(found).to_dict() != found


def test_a_pytorch_job_has_the_shape_of_its_schema() -> None:
    found = manifest("kubernetes_pytorchjob")
    assert problems(found, PYTORCH_JOB_SCHEMA) == []
    assert found["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 1
    assert "Worker" not in manifest("kubernetes_pytorchjob", nodes=1)["spec"]["pytorchReplicaSpecs"]
    found["spec"]["nprocPerNode"] = 4
    found["spec"]["runPolicy"]["backofLimit"] = 1
    assert problems(found, PYTORCH_JOB_SCHEMA) == [
        ".spec.nprocPerNode is int, not str",
        ".spec.runPolicy.backofLimit is unknown",
    ]


def test_names_are_names_of_objects() -> None:
    name = manifest("kubernetes_trainjob", name="My Run: (7) " * 9, identifier="x-0A1B")["metadata"]["name"]
    assert name == "my-run-7-my-run-7-0a1b"
    assert manifest("kubernetes_trainjob", name="7", identifier="x-0a1b")["metadata"]["name"] == "a-7-0a1b"

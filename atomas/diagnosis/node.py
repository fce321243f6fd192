"""All checks of one node, in the order in which they are read."""

import os
from pathlib import Path

from atomas.diagnosis import host
from atomas.diagnosis.result import CheckResult, attempt


def node_checks(folder: Path, corpus: Path | str | None) -> list[CheckResult]:
    """Check this node for a job.

    Args:
        folder: where runs will be written; it is made if it is not there.
        corpus: what will be trained on, if that is to be checked.
    """
    return [
        attempt("python", host.check_python),
        attempt("versions", host.check_versions),
        attempt("environment", lambda: host.check_environment(os.environ)),
        attempt("compiler", host.check_compiler),
        *_device_checks(),
        attempt("run folder", lambda: host.check_folder(folder)),
        attempt("free space", lambda: host.check_space(folder)),
        attempt("shared memory", host.check_shared_memory),
        attempt("limits", host.check_limits),
        attempt("network", host.check_network),
        attempt("port", host.check_port),
        attempt("clock", host.check_clock),
        attempt("corpus", lambda: host.check_corpus(corpus)),
    ]


def _device_checks() -> list[CheckResult]:
    try:  # the other checks are told even where torch cannot be imported
        from atomas.diagnosis import devices
    except ImportError as error:
        remedy = "install torch: see `make setup`"
        return [
            CheckResult(
                name="devices", status="error", message=f"torch cannot be imported: {error}", remedy=remedy
            )
        ]
    return [
        attempt("devices", devices.check_devices),
        attempt("GPU health", devices.check_gpu_health),
        attempt("peer access", devices.check_peer_access),
        *devices.check_kernels(),
        attempt("NVMe offload", devices.check_nvme_offload),
    ]

"""The two executors of datatrove that a build uses."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datatrove.executor import SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.utils.logging import logger

logger.disable("datatrove")  # a build reports its own progress and errors


class Ranks(PipelineExecutor):
    """Runs single tasks in the process that asks for it."""

    def __init__(self, pipeline: list[Callable[..., Any]], folder: Path, tasks: int) -> None:
        super().__init__(pipeline, str(folder))
        self._tasks = tasks

    def run_rank(self, rank: int) -> None:
        """Run one task and mark it as done."""
        self._run_for_rank(rank, local_rank=1)

    def run(self) -> None:
        """Run all tasks that are not done."""
        for rank in self.get_incomplete_ranks():
            self.run_rank(rank)

    @property
    def world_size(self) -> int:
        """Number of tasks."""
        return self._tasks

    def get_distributed_env(self, node_rank: int = -1) -> dict[str, str]:
        """What datatrove puts into the environment of a task."""
        return {
            "datatrove_node_ips": "localhost",
            "datatrove_cpus_per_task": "1",
            "datatrove_mem_per_cpu": "-1",
            "datatrove_gpus_on_node": "0",
            "datatrove_executor": "LOCAL",
        }


class Arrays(SlurmPipelineExecutor):
    """Slurm arrays, without the job that would sum up statistics."""

    def run(self) -> None:
        """Submit, or in a task of the array run it."""
        logger.enable("datatrove")
        super().run()

    def launch_job(self) -> None:
        """Submit in silence."""
        logger.disable("datatrove")
        super().launch_job()

    def get_launch_file_contents(self, sbatch_args: dict[str, Any], run_script: str) -> str:
        """The batch script, with this interpreter whatever the PATH of the jobs is."""
        command = f"{shlex.quote(sys.executable)} -m datatrove.tools.launch_pickled_pipeline"
        script: str = super().get_launch_file_contents(
            sbatch_args, run_script.replace("launch_pickled_pipeline", command, 1)
        )
        return script

    def launch_merge_stats(self) -> None:
        """Nothing."""

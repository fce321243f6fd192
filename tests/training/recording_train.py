"""`atomas train` that notes the samples of every step: python recording_train.py FOLDER KILL_AT train ...

FOLDER gets a file of JSON lines per attempt and rank. Rank 0 kills itself when step KILL_AT is done (0: never).
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from atomas.cli import main
from atomas.training import loop

if __name__ == "__main__":
    folder, kill_at = Path(sys.argv[1]), int(sys.argv[2])
    take_step = loop._train_step

    def recorded(session: Any, batches: Any, meter: Any) -> Any:
        step = take_step(session, batches, meter)
        rank, number = session.placement.rank, session.step + 1
        line = {
            "step": number,
            "ids": [sample for batch in step.batches for sample in batch.sample_id.tolist()],
            "skipped": [[one.sample, one.stand_in] for batch in step.batches for one in batch.skipped],
        }
        with (folder / f"{session.run.attempt:04d}-{rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if rank == 0 and number == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step

    loop._train_step = recorded
    sys.exit(main(sys.argv[3:]))

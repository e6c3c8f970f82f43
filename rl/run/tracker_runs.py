"""Let a resumed run continue its tracker's run, whose id is kept in the run folder.

Of Weights & Biases the id is kept, of Trackio the name. TensorBoard reads a folder, which stays the
same; other trackers start a run of their own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

from rl.run import checkpoint

logger = logging.get_logger(__name__)

FILE = "trackers.json"


class TrackerRuns(TrainerCallback):
    """Remembers the runs of trackers, once they have begun."""

    def __init__(self, folder: str) -> None:
        self._path = Path(folder) / FILE

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = {}
        if not state.is_world_process_zero:
            return
        if "wandb" in args.report_to:
            import wandb

            found["wandb"] = None if wandb.run is None else wandb.run.id
        if "trackio" in args.report_to:
            import trackio

            run = trackio.context_vars.current_run.get()
            found["trackio"] = None if run is None else run.name
        if any(found.values()):
            self._path.write_text(json.dumps(found))

    @contextmanager
    def continued(self, args: Any, *, from_step: int) -> Iterator[None]:
        """In this block trackers go on with the runs they had; a run from step 0 gets new ones.

        What the environment (`WANDB_RUN_ID`) or `run_name` says of them comes first.
        """
        known = self._known() if from_step else {}
        name, environment = args.run_name, {}
        if (run := known.get("wandb")) and "WANDB_RUN_ID" not in os.environ:
            environment = {"WANDB_RUN_ID": run, "WANDB_RESUME": "allow"}
        if (run := known.get("trackio")) and name is None:
            args.run_name = run
        before = {key: os.environ.get(key) for key in environment}
        os.environ.update(environment)
        try:
            yield
        finally:
            args.run_name = name
            for key, value in before.items():
                if value is None:
                    os.environ.pop(key, None)
                else:
                    os.environ[key] = value

    def _known(self) -> dict[str, str]:
        try:
            known = checkpoint.read_object(self._path)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            logger.warning(f"{self._path} is damaged, trackers start new runs: {error}")
            return {}
        return {name: run for name, run in known.items() if run and isinstance(run, str)}

"""Experiment trackers, through accelerate: TensorBoard, Weights & Biases, MLflow, ..."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, filter_trackers

from ..errors import QakdError


class Tracking:
    """Writes rows of the history to trackers: a callback of the loop, and a context manager that closes them.

    Args:
        trackers: names or trackers that accelerate knows. None: TensorBoard, where it is installed and ``folder`` is given.
        folder: where trackers that write files write them.
        configuration: of the run: plain numbers and text.

    Raises:
        QakdError: accelerate does not know a tracker, or it is not installed.
    """

    def __init__(
        self, trackers: Sequence[str | GeneralTracker] | None, folder: Path | None, configuration: Mapping[str, Any]
    ) -> None:
        if trackers is None:
            trackers = ["tensorboard"] if folder is not None and find_spec("tensorboard") else []
        for tracker in trackers:
            if isinstance(tracker, str) and not _is_known(tracker, folder):
                raise QakdError(
                    f"trackers: {tracker!r} is not a tracker that accelerate knows and finds installed"
                    f"{'' if folder else ', or it writes files and needs checkpoint_dir'}. Install it, or pass trackers=()."
                )
        self._wanted, self._folder, self._configuration = list(trackers), folder, dict(configuration)
        self._trackers: list[Any] = []

    def on_epoch_end(self, row: Mapping[str, Any]) -> None:
        """Numbers of one epoch, over epochs."""
        if self._wanted and not self._trackers:  # not before: a run that is refused leaves nothing behind
            accelerator = Accelerator(log_with=self._wanted, project_dir=None if self._folder is None else str(self._folder))
            accelerator.init_trackers("tracking", self._configuration)
            self._trackers = accelerator.trackers
        numbers = {
            name: value
            for name, value in row.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "epoch"
        }
        for tracker in self._trackers:
            tracker.log(numbers, step=row["epoch"])

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, *_: object) -> None:
        """Flush and close, also after an error."""
        for tracker in self._trackers:
            tracker.finish()


def _is_known(name: str, folder: Path | None) -> bool:
    try:
        return bool(filter_trackers([name], None if folder is None else str(folder)))
    except ValueError:
        return False

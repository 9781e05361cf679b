"""Checks of a configuration against the disk: the inputs it names exist."""

from collections.abc import Iterator
from pathlib import Path

from frankenstein.params import Fault, Params, ParamsError
from frankenstein.tasks.registry import TASKS
from frankenstein.text.options import SAMPLE_TASKS_PATH


def check_inputs(params: Params) -> None:
    """Raise ParamsError when a file or folder that the configuration names is not there."""
    faults = [Fault(key, text) for key, text in _missing(params)]
    if faults:
        raise ParamsError(faults)


def _missing(params: Params) -> Iterator[tuple[str, str]]:
    data = params.data
    if data.source not in ("sample", "hub") and not Path(data.path).exists():
        yield (
            "data.path",
            f"{data.path!r} does not exist; expected a {data.source} file or folder for data.source {data.source}",
        )
    if data.tasks_path == SAMPLE_TASKS_PATH:
        return
    folder = Path(data.tasks_path)
    if not folder.is_dir():
        yield (
            "data.tasks_path",
            f"{data.tasks_path!r} is not a folder; expected one with <task> or <task>_<language> folders",
        )
        return
    names = sorted(p.name for p in folder.iterdir() if p.is_dir())
    wanted = {("evaluate.tasks", t) for t in params.evaluate.tasks} | {("sbert.tasks", t) for t in params.sbert.tasks}
    for key, task in sorted(wanted):
        if task in TASKS and not any(n == task or n.startswith(f"{task}_") for n in names):
            yield (
                key,
                f"{task!r} has no folder in data.tasks_path {data.tasks_path!r}; there: {', '.join(names) or 'none'}",
            )

"""A sweep's part of the report."""

from __future__ import annotations

from mnist_ray import drawing
from mnist_ray.display.report import Sections, unless_failing
from mnist_ray.storage import TRIALS_FILE, DamagedFileError, RunFolder, read_config
from mnist_ray.sweeps.job import SWEEP_FILE
from mnist_ray.sweeps.picture import draw
from mnist_ray.sweeps.space import space_of
from mnist_ray.sweeps.trials import STOPPED, TrialTable
from mnist_ray.workload.interface import Workload


def sections(run: RunFolder, workload: type[Workload]) -> Sections:
    """Return a sweep's part of the report that lies in its folder; nothing where the run is no sweep.

    Where its files are damaged, only a note that says so. Raises UsageError where they hold settings that cannot be.
    """
    if not run.exists(TRIALS_FILE):
        return Sections()
    try:
        num_epochs = (read_config(run) or {}).get("num_epochs", 0)
        table = TrialTable(workload, space_of(workload, read_config(run, SWEEP_FILE) or {})).read(run)
    except DamagedFileError as error:
        return Sections(notes=[str(error)])
    criterion = table.workload.criterion.name
    alt = f"Validation {criterion} of {len(table.by_point)} trials; the table has all figures"
    caption = ("Hollow: stopped early. " if table.count(STOPPED) else "") + "Ringed: the best configuration."
    rows = [table.shown_row(record, num_epochs) for record in table.ranked]
    notes: list[str] = []

    def pictures() -> list[drawing.Picture]:
        return [drawing.Picture("sweep", "Trials", alt, draw(table, num_epochs), caption)]

    return Sections(
        unless_failing("picture of the trials", pictures, table.workload, notes),
        [drawing.Table("Trials, best first", table.shown_columns, rows)],
        notes,
    )

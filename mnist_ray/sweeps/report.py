"""A sweep's part of the report."""

from __future__ import annotations

from mnist_ray import drawing
from mnist_ray.display.report import Sections
from mnist_ray.settings import parse_config
from mnist_ray.storage import CONFIG_FILE, TRIALS_FILE, RunFolder
from mnist_ray.sweeps.job import SWEEP_FILE
from mnist_ray.sweeps.picture import draw
from mnist_ray.sweeps.space import space_of
from mnist_ray.sweeps.trials import TrialTable
from mnist_ray.workload.interface import Workload


def sections(run: RunFolder, workload: type[Workload]) -> Sections:
    """Return a sweep's part of the report that lies in its folder; nothing where the run is no sweep.

    Raises UsageError where its files are damaged.
    """
    trials, settings = run.read_text(TRIALS_FILE), run.read_text(SWEEP_FILE)
    if trials is None:
        return Sections()
    values = {} if settings is None else parse_config(settings, run.inside(SWEEP_FILE).uri)
    num_epochs = parse_config(run.read_text(CONFIG_FILE) or "{}", run.inside(CONFIG_FILE).uri)["num_epochs"]
    table = TrialTable(workload, space_of(workload, values)).read(trials)
    criterion = table.workload.criterion.name
    alt = f"Validation {criterion} of {len(table.by_point)} trials; the table has all figures"
    caption = "Hollow: stopped early. Ringed: the best configuration."
    rows = [table.shown_row(record, num_epochs) for record in table.ranked]
    return Sections(
        [drawing.Picture("sweep", "Trials", alt, draw(table, num_epochs), caption)],
        [drawing.Table("Trials, best first", table.shown_columns, rows)],
    )

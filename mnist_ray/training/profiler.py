"""Profiles 20 training steps of the first worker, after ten warm-up steps: ``--callback profiler``.

The table of operators is printed; without Ray (``--num-workers 0``), on the console. The trace is for
https://ui.perfetto.dev.
"""

from __future__ import annotations

from pathlib import Path

from torch.profiler import profile, schedule

from mnist_ray.output import say
from mnist_ray.parallel.group import Group
from mnist_ray.training.callback import Callback
from mnist_ray.training.state import TrainingState


class Profiler(Callback):
    """Runs PyTorch's profiler on rank 0; prints the ten most expensive operators, and writes a trace."""

    def __init__(self, trace: str = "~/trace.json.gz") -> None:
        self.trace = Path(trace).expanduser()

    def on_start(self, state: TrainingState, group: Group) -> None:
        """Start the profiler, which waits for its steps."""
        self.is_first = group.rank == 0
        if self.is_first:
            steps = schedule(wait=0, warmup=10, active=20, repeat=1)
            self.profile = profile(schedule=steps, on_trace_ready=self.write)
            self.profile.start()

    def on_step(self, state: TrainingState) -> None:
        """Let the profiler count the step."""
        if self.is_first:
            self.profile.step()

    def write(self, profiled: profile) -> None:
        """Print the table, and write the trace."""
        profiled.export_chrome_trace(str(self.trace))
        for line in profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=10).splitlines():
            say(line)
        say(f"trace: {self.trace}")

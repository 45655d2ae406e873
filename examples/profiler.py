"""Profile 20 training steps of the first worker, after ten warm-up steps; write a trace for https://ui.perfetto.dev.

python jobs/train.py --callback examples/profiler.py --num-workers 0    # without Ray, the table is on the console
"""

from pathlib import Path

from torch.profiler import profile, schedule

from mnist_ray.parallel.group import Group
from mnist_ray.training.callback import Callback
from mnist_ray.training.state import TrainingState

TRACE = Path.home() / "trace.json.gz"


class Profiler(Callback):
    """Runs PyTorch's profiler on rank 0; prints the ten most expensive operators."""

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
        profiled.export_chrome_trace(str(TRACE))
        print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=10), f"trace: {TRACE}", sep="\n")

"""``--strategy fsdp``: each worker holds some rows of each tensor of the model (PyTorch's FSDP2, ``fully_shard``).

The model is sharded in *units*, such as the blocks of a transformer. Before a unit computes, the workers gather its
weights; afterwards, they free them. Everything outside the units, such as an embedding, is gathered for the whole step.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mnist_ray.config import TrainConfig
from mnist_ray.data.tensors import is_sharded
from mnist_ray.errors import UsageError, first_line
from mnist_ray.parallel.group import Group
from mnist_ray.workload.base import Workload
from mnist_ray.workload.calls import seeded_model


def create_models(
    workload: Workload, config: TrainConfig, group: Group, load_initial: Callable[[nn.Module], object]
) -> tuple[nn.Module, nn.Module | None]:
    """Return the sharded model, and with ``--ema-decay`` another one for the EMA; all ranks must call this.

    Only rank 0 creates the whole model, into which ``load_initial`` may load weights; the others get their rows from
    it. If the model cannot be created without memory, all ranks create it.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    is_whole = on_meta(workload)[0] is None
    model = _created(workload, config, with_memory=is_whole or group.rank == 0)
    if is_whole or group.rank == 0:
        load_initial(model)
    weights = model.state_dict() if group.rank == 0 else {}
    _shard(model, units_of(workload, model), group)
    if not is_whole:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, weights, options=options)
    if config.ema_decay is None:
        return model, None
    average = _created(workload, config, with_memory=is_whole)
    _shard(average, units_of(workload, average), group)
    average.load_state_dict(model.state_dict())
    return model, average


def _created(workload: Workload, config: TrainConfig, *, with_memory: bool) -> nn.Module:
    with contextlib.nullcontext() if with_memory else torch.device("meta"):
        return seeded_model(workload, config.seed)


def _shard(model: nn.Module, units: Iterable[nn.Module], group: Group) -> None:
    """Shard a model over all ranks; its gradients will be sums over the ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(group.device.type, (group.world_size,))
    for module in (*units, model):
        fully_shard(module, mesh=mesh)
        assert isinstance(module, FSDPModule)
        # Sums by this pair of settings do not depend on the backend: see https://github.com/pytorch/pytorch/issues/162338.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(enable=True)
    if any(tensor.is_meta for tensor in model.parameters()):
        model.to_empty(device=group.device)


@contextlib.contextmanager
def resharded(model: nn.Module) -> Iterator[bool]:
    """At the end, free the weights gathered by forward passes without backward; yield whether the model has units."""
    has_units = any(is_sharded(parameter) for parameter in model.parameters())
    try:
        yield has_units
    finally:
        if has_units:
            model.reshard()  # type: ignore[operator]


def on_meta(workload: Workload) -> tuple[nn.Module | None, str]:
    """Return the model without memory for its tensors; or None, and why that is impossible."""
    try:
        with torch.device("meta"):
            model = workload.create_model()
    except Exception as error:
        return None, first_line(error)
    if lost := {name for name, _ in model.named_buffers()} - set(model.state_dict()):
        return None, f"buffer {min(lost)} is not persistent"
    for module in model.modules():
        others = {key: value for key, value in vars(module).items() if key not in ("_parameters", "_buffers")}
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(others)):
            return None, f"{type(module).__name__} has a tensor that is neither a parameter nor a buffer"
    return model, ""


def units_of(workload: Workload, model: nn.Module) -> list[nn.Module]:
    """Return the units of a model. Raises UsageError if it has none, or two that share a module."""
    name, names = type(workload).__name__, {module: path for path, module in model.named_modules()}
    units = list(workload.shard_units(model))
    if not units:
        remedy = "put its blocks into an nn.ModuleList, or override shard_units()"
        raise UsageError(f"{name}: the model has no units for --strategy fsdp; {remedy}")
    for module, number in Counter(module for unit in units for module in unit.modules()).items():
        if number > 1:
            raise UsageError(f"{name}: {names[module]} is in two units; override shard_units() so that it is in one")
    return units


def is_wanted(config: TrainConfig, num_workers: int) -> bool:
    """Return whether this many workers shard the model; a single one holds all of it."""
    return config.strategy == "fsdp" and num_workers > 1

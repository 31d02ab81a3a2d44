"""How a trainer's model is spread over processes, and its whole weights, whatever the backend."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


def zero_stage(trainer: Any) -> int:
    plugin = trainer.accelerator.state.deepspeed_plugin
    return 0 if plugin is None else plugin.zero_stage


@contextlib.contextmanager
def gathered(trainer: Any, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    if zero_stage(trainer) < 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield


def full_weights(trainer: Any) -> dict[str, torch.Tensor]:
    """Copies of all trainable weights, float32, on the CPU; all processes must call it."""
    trainable = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    with gathered(trainer, list(trainable.values())):
        whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in trainable.items()}
        return {name: p.detach().float().cpu().clone() for name, p in whole.items()}


def assert_spread(trainer: Any, backend: str) -> dict[str, Any]:
    """
    Refuses a set-up that does not do what its name says; call it between two steps.

    Returns:
        `dict[str, Any]`: what was found, for the test to read.
    """
    accelerator = trainer.accelerator
    found: dict[str, Any] = {
        "world_size": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
        "distributed_type": accelerator.distributed_type.value,
        "zero_stage": zero_stage(trainer),
    }
    if backend == "one":
        assert found == {"world_size": 1, "distributed_type": "NO", "zero_stage": 0}, found
        return found
    assert found["world_size"] == accelerator.num_processes == 2, found
    wrapped = trainer.model_wrapped
    if backend == "ddp":
        assert isinstance(wrapped, DistributedDataParallel), type(wrapped)
    elif backend == "fsdp2":
        found |= _fsdp_shares(trainer)
    else:
        assert found["distributed_type"] == "DEEPSPEED" and found["zero_stage"] == int(backend[-1]), found
        found |= _zero3_shares(trainer) if backend == "zero3" else _optimizer_share(wrapped)
        assert backend != "zero2" or found["gradients_are_sharded"], found
    return found


def _optimizer_share(engine: Any) -> dict[str, Any]:
    optimizer = engine.optimizer
    mine = sum(p.numel() for p in optimizer.single_partition_of_fp32_groups)
    total = sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
    assert abs(mine / total - 0.5) < 0.01, (mine, total)
    return {"optimizer_share": mine / total, "gradients_are_sharded": optimizer.partition_gradients}


def _zero3_shares(trainer: Any) -> dict[str, Any]:
    """DeepSpeed keeps small parameters whole unless told otherwise: then nothing would be tested."""
    models = {"policy": trainer.model, "prior": trainer.ref_model}
    shares: dict[str, Any] = {}
    for role, model in models.items():
        if model is None:
            continue  # with an adapter the prior is the policy without it
        for name, p in model.named_parameters():
            assert not p.ds_persist, f"{role} {name} is kept whole"
            assert p.numel() == 0, f"{role} {name} is whole between two steps"
            assert p.ds_tensor.numel() == -(-p.ds_numel // 2), f"{role} {name} is not halved"
        parameters = list(model.parameters())
        shares[f"{role}_share"] = sum(p.ds_tensor.numel() for p in parameters) / sum(p.ds_numel for p in parameters)
    return shares


def _fsdp_shares(trainer: Any) -> dict[str, Any]:
    models = {"policy": trainer.model, "prior": trainer.ref_model}
    shares: dict[str, Any] = {}
    for role, model in models.items():
        if model is None:
            continue
        parameters = dict(model.named_parameters())
        for name, p in parameters.items():
            assert isinstance(p, DTensor), f"{role} {name} is not sharded"
        local = sum(p.to_local().numel() for p in parameters.values())
        shares[f"{role}_share"] = local / sum(p.numel() for p in parameters.values())
        assert abs(shares[f"{role}_share"] - 0.5) < 0.02, shares
    return shares

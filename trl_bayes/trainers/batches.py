"""How a batch of TRL's is read: what the model is given, which tokens are the policy's own, and who is who."""

from typing import Any

import torch
from accelerate import Accelerator
from datasets.fingerprint import Hasher

from ..groups import Group
from ..prior import Context
from ..rewards.calling import without_infinite
from ..targets import Target


_MODEL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
"""Inputs of TRL's scorer besides token ids: they come and go with the model's modality."""


def own_tokens(inputs: dict[str, Any]) -> torch.Tensor:
    """Mask `(B, T)` of the tokens that the policy itself produced: completions without padding and tool results."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def scorer_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of TRL's scorer from the tensors of a batch."""
    return {
        "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        "logits_to_keep": inputs["completion_ids"].size(1),
        **{name: inputs[name] for name in _MODEL_INPUTS if name in inputs},
    }


def sequence_log_probs(output: dict[str, Any], policy: torch.Tensor) -> torch.Tensor:
    """
    `log pi`, `log q` and `log pi_0` of completions, summed over their own tokens: `(B, 3)`, in nats.

    Args:
        output (`dict`): a generated batch; its `from_prior` says which of its rows the prior has sampled, a share of
            each group and as many in each process.
        policy (`torch.Tensor`): the policy's per-token log-probabilities `(B, T)`.
    """
    proposal = output.get("sampling_per_token_logps")
    # The sampler cannot score a token now and then (NaN): it is taken to agree with the policy there
    proposal = policy if proposal is None else torch.where(proposal.isnan(), policy, proposal)
    prior = output.get("ref_per_token_logps")
    # Pure RL has no prior: log P is the log-potential alone
    prior = torch.zeros_like(policy) if prior is None else prior
    mask = own_tokens(output).unsqueeze(2)
    sums = (torch.stack([policy, proposal, prior], dim=2).float() * mask).sum(dim=1)
    if "from_prior" in output:  # the density of the mixture, for all: who drew a completion does not matter
        share = output["from_prior"].float().mean()
        sums[:, 1] = torch.logaddexp(torch.log1p(-share) + sums[:, 1], share.log() + sums[:, 2])
    return sums


def gather_group(
    local: torch.Tensor,
    output: dict[str, Any],
    generated: torch.Tensor,
    group_size: int,
    target: Target,
    accelerator: Accelerator,
) -> Group:
    """
    The completions of all processes, each with its log-potential, in the order of their generation.

    Args:
        local (`torch.Tensor`): from [`sequence_log_probs`], `(B, 3)`.
        output (`dict`): a generated batch, with `rewards` `(B, K)` and, if anyone has to know them, `prompt_key`.
        generated (`torch.Tensor`): which of its rows was generated first, second, ..., `(B,)`.
        group_size (`int`): completions of each prompt.
        target ([`~trl_bayes.targets.Target`]): bound, and fitted if it learns.
        accelerator ([`~accelerate.Accelerator`]): of the trainer.
    """
    log_policy, log_proposal, log_prior = accelerator.gather(local[generated]).unbind(dim=1)  # (B_global,)
    rewards, _ = without_infinite(accelerator.gather(output["rewards"][generated]))  # (B_global, K)
    keys, from_prior = (
        accelerator.gather(output[name][generated]) if name in output else None
        for name in ("prompt_key", "from_prior")
    )
    phi = target(rewards, None if keys is None else Context(log_prior, keys))
    shape = (-1, group_size)
    return Group(
        log_policy.view(shape),
        log_proposal.view(shape),
        log_prior.view(shape),
        phi.view(shape),
        None if keys is None else keys.view(shape)[:, 0],
        None if from_prior is None else from_prior.view(shape),
    )


def row_hash(row: dict[str, Any]) -> int:
    """Identity of a row of the data, all its columns included: the reward may depend on any of them."""
    return int(Hasher.hash(row)[:15], 16)


def row_hashes(rows: list[dict[str, Any]], start: int, group_size: int) -> list[int]:
    """
    Identities of a process's rows; a group repeats one row, which is hashed once.

    Args:
        rows (`list[dict]`): of the data.
        start (`int`): the place of the first among the rows of all processes.
        group_size (`int`): completions of each prompt.
    """
    hashes: list[int] = []
    for i, row in enumerate(rows):
        same_group = i > 0 and (start + i) % group_size != 0
        hashes.append(hashes[-1] if same_group else row_hash(row))
    return hashes


def prompt_keys(hashes: list[int], output: dict[str, Any], writes_prompts: bool) -> torch.Tensor:
    """Identity of each prompt, int64 `(B,)`: its row of the data, and its tokens where an environment wrote it."""
    ids, mask = output["prompt_ids"], output["prompt_mask"].bool()
    if writes_prompts:
        hashes = [hash((row, *own[kept].tolist())) for row, own, kept in zip(hashes, ids, mask, strict=True)]
    return torch.tensor(hashes, dtype=torch.int64, device=ids.device)

"""The exact posterior on a space of completions small enough to enumerate.

With a handful of tokens and a short maximum length, every completion can be listed and scored, so the posterior
`p(y|x) = pi_0(y|x) exp(phi(x, y)) / Z(x)` is a vector and every divergence from it is a sum: the ground truth by which
trainers and estimators are judged. This module knows no trainer and no target; everything is in nats and float64.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..language_models.generation import evaluating


# How far the sum of a distribution over all completions may be from one: float32 logits give about 1e-7; a completion
# that is missing, or a vocabulary larger than the enumerated letters, gives far more.
SUM_TOLERANCE = 1e-4


class Completions(NamedTuple):
    """All completions as they can be sampled.

    `ids` (N, T) holds token ids, padded with EOS; `mask` (N, T) is True on the completion's own tokens, the terminal
    EOS included, so that it is the same mask as TRL's `completion_mask`.
    """

    ids: Tensor
    mask: Tensor


class ExactPosterior(NamedTuple):
    """The posterior of one prompt, over all N completions: `log p = log pi_0 + phi - log Z`.

    `log_prior` (N,), `log_potential` (N,) phi, -inf where the target forbids the completion, `log_posterior` (N,), all
    float64 and in nats, and `log_z`, log Z.
    """

    log_prior: Tensor
    log_potential: Tensor
    log_posterior: Tensor
    log_z: float


class PolicyFit(NamedTuple):
    """How far a policy pi is from the posterior p, exactly.

    In nats: `forward_kl` KL(p||pi), `reverse_kl` KL(pi||p) (inf as soon as pi has mass outside p's support),
    `kl_prior` KL(pi||pi_0), `entropy` of pi. Between 0 and 1: `total_variation`, half the L1 distance of pi and p, and
    `mass_outside`, the probability that pi gives to completions without evidence (phi = -inf).
    """

    forward_kl: float
    reverse_kl: float
    total_variation: float
    kl_prior: float
    entropy: float
    mass_outside: float


def enumerate_completions(token_ids: Sequence[int], eos_token_id: int, max_length: int) -> Completions:
    """Every completion over an alphabet: ended by EOS within `max_length` tokens, or cut there without EOS.

    A cut completion is an outcome of its own (the event that a longer text starts so), hence the probabilities of the
    N outcomes sum to one. With V tokens and T = max_length, N = 1 + V + ... + V^T: V=6, T=4 gives 1,555.

    Args:
        token_ids: the tokens that a completion may contain, EOS not among them.
        eos_token_id: the token that ends a completion, also used for padding.
        max_length: T, the most tokens in a completion, EOS included.

    Returns:
        `Completions` with ids (N, T) int64 and mask (N, T) bool, shortest first.

    Raises:
        ValueError: a token twice, EOS among the tokens, no tokens, or max_length below 1.
    """
    if not token_ids or len(set(token_ids)) != len(token_ids) or eos_token_id in token_ids:
        raise ValueError(f"token_ids must be distinct, not empty and without EOS ({eos_token_id}), got {token_ids}")
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    alphabet = torch.tensor(list(token_ids), dtype=torch.int64)
    blocks = []
    for length in range(max_length + 1):  # completions with `length` letters, before the EOS if there is room for it
        places = len(alphabet) ** torch.arange(length - 1, -1, -1)  # (length,) the number's digits are the letters
        numbers = torch.arange(len(alphabet) ** length)  # (V^length,)
        letters = alphabet[numbers[:, None] // places % len(alphabet)]  # (V^length, length)
        blocks.append(nn.functional.pad(letters, (0, max_length - length), value=eos_token_id))
    ids = torch.cat(blocks)  # (N, T)
    num_letters = (ids != eos_token_id).sum(dim=1, keepdim=True)  # (N, 1)
    return Completions(ids=ids, mask=torch.arange(max_length) <= num_letters)


@torch.no_grad()
def completion_log_probs(
    model: nn.Module,
    prompt_ids: Sequence[int] | Tensor,
    completions: Completions,
    temperature: float = 1.0,
    batch_size: int = 1024,
) -> Tensor:
    """Log-probability of each completion after one prompt: `sum_t mask_t log softmax(logits_t / temperature)[y_t]`.

    The last token of a completion is never an input, so completions that differ only there share a forward pass.

    Args:
        model: a causal language model called as `model(input_ids=...)` and returning `.logits` (B, L, V).
        prompt_ids: the prompt's tokens (P,), not padded.
        completions: what to score, ids and mask (N, T).
        temperature: the sampling temperature.
        batch_size: number of sequences in a forward pass.

    Returns:
        (N,) float64 on CPU, in nats.

    Raises:
        ValueError: an empty prompt, or a temperature that is not positive.
    """
    if len(prompt_ids) == 0:
        raise ValueError("the prompt has no tokens: the first token of a completion would have no distribution")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    device = next(model.parameters()).device
    prompt = torch.as_tensor(prompt_ids, dtype=torch.int64, device=device)  # (P,)
    ids, mask = completions.ids.to(device), completions.mask.to(device)  # (N, T)
    num_completions, length = ids.shape
    inputs = torch.cat([prompt.expand(num_completions, -1), ids[:, :-1]], dim=1)  # (N, P+T-1)
    inputs, input_of = torch.unique(inputs, dim=0, return_inverse=True)  # (U, P+T-1), (N,)
    positions = torch.arange(length, device=device)  # (T,)
    log_probs = torch.zeros(num_completions, dtype=torch.float64, device=device)
    with evaluating(model):
        for start in range(0, len(inputs), batch_size):
            chunk = inputs[start : start + batch_size]  # (B, P+T-1)
            logits = model(input_ids=chunk).logits[:, len(prompt) - 1 :]  # (B, T, V)
            next_log_probs = torch.log_softmax(logits.double() / temperature, dim=-1)
            rows = torch.nonzero((input_of >= start) & (input_of < start + len(chunk))).squeeze(1)  # (R,)
            per_token = next_log_probs[input_of[rows, None] - start, positions, ids[rows]]  # (R, T)
            # where and not a product: after its EOS a completion's tokens may have log-probability -inf
            log_probs[rows] = torch.where(mask[rows], per_token, 0.0).sum(dim=1)
    return log_probs.cpu()


def _check_distribution(name: str, log_probs: Tensor) -> None:
    total = log_probs.exp().sum().item()
    if not abs(total - 1) <= SUM_TOLERANCE:  # so written, NaN is refused too
        raise ValueError(
            f"the {name}'s probabilities over all completions sum to {total:.6g}, not to 1: are all completions "
            "there, and is the model's vocabulary no more than the enumerated tokens and EOS?"
        )


def exact_posterior(log_prior: Tensor, log_potential: Tensor) -> ExactPosterior:
    """Bayes' rule over all completions of one prompt: `log p = log pi_0 + phi - log sum exp(log pi_0 + phi)`.

    Args:
        log_prior: log pi_0 (N,) in nats; its exponentials sum to one.
        log_potential: phi (N,) in nats, -inf for a completion that the target forbids.

    Raises:
        ValueError: shapes that differ or are not (N,), phi with NaN or +inf, a prior that does not sum to one (to
            1e-4), or no completion with evidence under the prior.
    """
    if log_prior.ndim != 1 or log_prior.shape != log_potential.shape:
        raise ValueError(
            "log_prior and log_potential must have one and the same shape (N,), got "
            f"{tuple(log_prior.shape)} and {tuple(log_potential.shape)}"
        )
    log_prior, log_potential = log_prior.double(), log_potential.double()
    if log_potential.isnan().any() or log_potential.isposinf().any():
        raise ValueError("log_potential must be below +inf and not NaN: -inf is how a completion is forbidden")
    _check_distribution("prior", log_prior)
    log_joint = log_prior + log_potential
    if log_joint.isneginf().all():
        raise ValueError("no completion with evidence: the posterior does not exist")
    log_z = torch.logsumexp(log_joint, dim=0)
    return ExactPosterior(log_prior, log_potential, log_joint - log_z, log_z.item())


def _kl(log_a: Tensor, log_b: Tensor) -> float:
    """KL(a||b) in nats, with 0 log 0 = 0, and inf where a has mass and b has none."""
    support = ~log_a.isneginf()
    log_a, log_b = log_a[support], log_b[support]
    if log_b.isneginf().any():
        return float("inf")
    return (log_a.exp() * (log_a - log_b)).sum().item()


def compare(posterior: ExactPosterior, log_policy: Tensor) -> PolicyFit:
    """The exact distances between a policy and the posterior of one prompt; see `PolicyFit`.

    Args:
        posterior: from `exact_posterior`.
        log_policy: log pi (N,) in nats, the completions in the posterior's order.

    Raises:
        ValueError: a shape other than the posterior's, or a policy that does not sum to one (to 1e-4).
    """
    if log_policy.shape != posterior.log_posterior.shape:
        raise ValueError(
            f"log_policy has shape {tuple(log_policy.shape)}, the posterior {tuple(posterior.log_posterior.shape)}"
        )
    log_policy = log_policy.double()
    _check_distribution("policy", log_policy)
    policy = log_policy.exp()
    return PolicyFit(
        forward_kl=_kl(posterior.log_posterior, log_policy),
        reverse_kl=_kl(log_policy, posterior.log_posterior),
        total_variation=(policy - posterior.log_posterior.exp()).abs().sum().item() / 2,
        kl_prior=_kl(log_policy, posterior.log_prior),
        entropy=-torch.xlogy(policy, policy).sum().item(),
        mass_outside=policy[posterior.log_potential.isneginf()].sum().item(),
    )


def mean_fit(fits: Sequence[PolicyFit]) -> PolicyFit:
    """Each field's average over prompts; inf for one prompt is inf for the average.

    Raises:
        ValueError: no fits.
    """
    if not fits:
        raise ValueError("no fits to average")
    return PolicyFit(*(sum(values) / len(fits) for values in zip(*fits, strict=True)))

"""What a model card says of the posterior that a model was trained towards."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, TrainerState
from trl.trainer.utils import get_config_model_id

from ..estimators import Estimator
from ..targets import Target
from .posterior_config import PosteriorConfig


_BEFORE = "### Framework versions"  # a heading of TRL's template
_OF_NO_HUB = "[None](https://huggingface.co/None)"  # TRL's link to a model that is a folder

_SHOWN = {
    "posterior/log_z": "log Z, the log marginal likelihood",
    "posterior/kl_prior": "KL(π‖π₀) to the prior",
    "posterior/reverse_kl": "KL(π‖p) to the posterior",
    "posterior/forward_kl": "KL(p‖π) to the posterior",
    "posterior/ess": "effective sample size, as a fraction of the group",
    "reward": "reward",
}


def posterior_section(
    target: str, objective: str, partition: str, log_history: Sequence[Mapping[str, Any]], inexact: Sequence[str] = ()
) -> str:
    """
    The section in Markdown: target, objective, how log Z is estimated, and the last logged estimates.

    Args:
        target, partition (`str`): as the trainer names them.
        objective (`str`): what is minimized.
        log_history (`Sequence[Mapping]`): the trainer's log, the latest entry last.
        inexact (`Sequence[str]`): sentences on settings under which the fixed point is another.
    """
    lines = [
        "### Posterior",
        "",
        f"The target is `{target}`: the posterior p ∝ π₀ exp(φ), where π₀ is the prior and φ the log-potential that "
        f"the target reads from the rewards. What is minimized is {objective}; log Z is estimated by `{partition}`.",
    ]
    if inexact:
        lines += ["", f"**Not exact.** {' '.join(inexact)}"]
    latest: Mapping[str, Any] = next((log for log in reversed(log_history) if "reward" in log), {})
    shown = {label: latest[name] for name, label in _SHOWN.items() if latest.get(name) is not None}
    if shown:
        lines += ["", f"At step {latest['step']}, estimated from the completions of training, in nats:", ""]
        lines += [
            "| quantity | estimate |",
            "|---|---|",
            *(f"| {label} | {value:.4g} |" for label, value in shown.items()),
        ]
    return "\n".join(lines)


def add_section(
    file: Path,
    estimator: Estimator,
    target: Target,
    args: PosteriorConfig,
    state: TrainerState,
    model: PretrainedConfig,
) -> None:
    """Adds the section on the posterior to a model card that TRL has written, and names the model it started from."""
    section = posterior_section(
        repr(target) if estimator.has_posterior else "the largest reward (pure RL, no prior)",
        estimator.objective,
        args.partition,
        state.log_history,
        [inexact.fixed_point for inexact in args.inexact],
    )
    card = with_section(file.read_text(encoding="utf-8"), section)
    file.write_text(card.replace(_OF_NO_HUB, _named(get_config_model_id(model))), encoding="utf-8")


def _named(path: str) -> str:
    """A folder by its own name: where it was is nobody's business on a hub."""
    return f"`{Path(path).name}`" if path else "a model without a name"


def with_section(card: str, section: str) -> str:
    """TRL's model card with the section before the versions, or at the end of a card from another template."""
    head, found, tail = card.partition(_BEFORE)
    return f"{head}{section}\n\n{found}{tail}" if found else f"{card.rstrip()}\n\n{section}\n"

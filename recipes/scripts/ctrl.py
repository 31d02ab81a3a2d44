# /// script
# requires-python = ">=3.11"
# dependencies = ["trl_bayes"]
# ///
"""
InfAlign-CTRL: a policy whose best of four completions wins most often, at half a nat from the prior.

The reward is a function of your own, here how few words a summary needs. Only its ranks among the prior's completions
count, so its scale does not matter, and `kl_budget` takes the place of `beta`.

    python recipes/scripts/ctrl.py --output_dir runs/ctrl --max_completion_length 64 --kl_budget 0.5 --inference_n 4

Every field of `CTRLConfig` is a flag; `--help` lists them.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import HfArgumentParser

from trl_bayes import CTRLConfig, CTRLTrainer


@dataclass
class ScriptArguments:
    """The model and the data: ids on the Hub, or folders."""

    model: str = field(
        default="EleutherAI/pythia-1b", metadata={"help": "Model that is trained; its start is the prior."}
    )
    dataset: str = field(default="trl-lib/tldr", metadata={"help": "Data set with a column `prompt`."})


def brevity(completions: list[str], **kwargs) -> list[float]:
    return [-float(len(completion.split())) for completion in completions]


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, CTRLConfig))
    parser.set_defaults(partition="prior_samples")  # numbers of words tie, so that Z has no closed form
    script, args = parser.parse_args_into_dataclasses()
    trainer = CTRLTrainer(
        model=script.model,
        reward_funcs=brevity,
        args=args,
        train_dataset=load_dataset(script.dataset, split="train").select_columns(["prompt"]),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()

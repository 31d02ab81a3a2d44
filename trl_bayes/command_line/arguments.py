"""What a command is told: dataclasses of the fields that neither TRL nor a trainer's configuration has."""

import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from ..language_models.settings import at_least
from ..trainers.posterior_config import PosteriorConfig


@dataclass
class TrainingScriptArguments(ScriptArguments):
    r"""
    Arguments of a training command that concern neither the trainer nor the model.

    This class includes only the parameters that are not in [`~trl.ScriptArguments`].

    Parameters:
        trainer (`str`, *optional*):
            The trainer that a recipe is for, such as `CTRLTrainer`, for `evaluate` and `sample` where nothing else in
            the recipe says so; training with another is refused.
        reward_model_name_or_path (`str`, *optional*):
            Id or folder of a reward model, used besides `reward_funcs`.
        reward_funcs (`list[str]`, *optional*):
            Reward functions, as [`~trl_bayes.rewards.build_reward`] reads them.
        prompt_template (`str`, *optional*):
            The prompt as a text with columns of the data in braces, for data without a column `prompt`:
            `"{question}"`, `"{prompt[text]}"`. Doubled braces are literal.
        prompt_words (`int`, *optional*):
            Number of words to keep of each prompt, from its beginning.
        prompt_as_message (`bool`, *optional*, defaults to `False`):
            Whether the prompt becomes a user's message, for chat models.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to train into an `output_dir` that is not empty. Checkpoints in it are removed; other files stay
            until they are written anew.
    """

    trainer: str | None = field(
        default=None,
        metadata={
            "help": "The trainer that a recipe is for, such as CTRLTrainer, for `evaluate` and `sample` where nothing "
            "else in it says so."
        },
    )
    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Id or folder of a reward model, used besides `reward_funcs`."}
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions: names (parses, accuracy_reward, ...), dotted paths, or ids and folders of "
            "reward models. With arguments, in YAML: `{name: max_length, characters: 40}`, as JSON as a flag."
        },
    )
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "The prompt as a text with columns of the data in braces, for data without a column `prompt`: "
            "'{question}', '{prompt[text]}'. Doubled braces are literal."
        },
    )
    prompt_words: int | None = field(
        default=None, metadata={"help": "Number of words to keep of each prompt, from its beginning."}
    )
    prompt_as_message: bool = field(
        default=False, metadata={"help": "Whether the prompt becomes a user's message, for chat models."}
    )
    overwrite: bool = field(
        default=False,
        metadata={
            "help": "Train into an `output_dir` that is not empty: its checkpoints are removed, other files stay "
            "until they are written anew."
        },
    )

    def __post_init__(self) -> None:
        specs = cast("list[Any]", self.reward_funcs or [])
        self.reward_funcs = [from_json(spec) if isinstance(spec, str) else spec for spec in specs]


@dataclass
class StudyArguments(TrainingScriptArguments):
    r"""
    Arguments of a command that studies a posterior without training.

    This class includes only the parameters that are not in [`TrainingScriptArguments`]. What defines the posterior
    (`beta`, `target`, `max_completion_length`, `temperature`, ...) are fields of a trainer's configuration, with its
    defaults: see [`~trl_bayes.command_line.recipe.read_study`].

    Parameters:
        max_prompts (`int`, *optional*):
            Takes only so many prompts, from the beginning.
        batch_size (`int`, *optional*, defaults to `256`):
            Completions generated at once.
        seed (`int`, *optional*, defaults to `0`):
            The same seed and batch size give the same samples.
        device (`str`, *optional*):
            Such as `cuda:0` or `cpu`. Defaults to a GPU if there is one.
        output_dir (`str`, *optional*):
            Where the results are written.
    """

    max_prompts: int | None = field(
        default=None, metadata={"help": "Take only so many prompts, from the beginning of the data."}
    )
    batch_size: int = field(default=256, metadata={"help": "Completions generated at once."})
    seed: int = field(default=0, metadata={"help": "The same seed and batch size give the same samples."})
    device: str | None = field(
        default=None, metadata={"help": "Such as cuda:0 or cpu. Defaults to a GPU if there is one."}
    )
    output_dir: str = field(default="runs/posterior", metadata={"help": "Where the results are written."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the results in an output_dir that has some."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_prompts is not None:
            at_least("max_prompts", self.max_prompts)
        at_least("batch_size", self.batch_size)
        at_least("seed", self.seed, 0)


class Arguments(NamedTuple):
    """All that a recipe and flags say of a run: its data and rewards, its training, its model, a mixture of data."""

    script: TrainingScriptArguments
    training: PosteriorConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig


def from_json(text: str) -> Any:
    """A mapping that stands on the command line as JSON; any other text as it is."""
    return json.loads(text) if text.startswith("{") else text

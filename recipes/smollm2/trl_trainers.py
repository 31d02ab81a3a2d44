"""TRL's own trainers on the recipes' data, rewards, model and budget: what ours are compared with.

    python recipes/smollm2/trl_trainers.py grpo --config recipes/smollm2/json/kl_rl.yaml --output_dir runs/grpo

`grpo` is GRPOTrainer with its defaults, `grpo_kl` the same with the recipe's KL penalty, `rloo` RLOOTrainer with it.
Of the recipe they take the model, LoRA, the data, the rewards, the optimizer and the number of completions; any field
is a flag too.
"""

import sys

from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, get_peft_config

from trl_bayes import KLRLTrainer
from trl_bayes.command_line.data import load_data, select_split
from trl_bayes.command_line.models import model_path
from trl_bayes.command_line.recipe import make_arguments, read_command_line, training_parser
from trl_bayes.command_line.rewards import find_rewards


TRAINERS = {"grpo": (GRPOTrainer, GRPOConfig), "grpo_kl": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}
SHARED = (
    "output_dir per_device_train_batch_size gradient_accumulation_steps num_generations max_completion_length "
    "max_steps learning_rate lr_scheduler_type warmup_steps optim max_grad_norm bf16 gradient_checkpointing "
    "logging_steps save_strategy report_to seed use_cpu reward_weights"
).split()


def main(name: str, argv: list[str]) -> None:
    """Trains one of them and saves its adapter."""
    trainer_class, config_class = TRAINERS[name]
    parser = training_parser("kl-rl", KLRLTrainer, __doc__)
    arguments = make_arguments(parser, read_command_line(parser, argv)[1])
    settings = {field: getattr(arguments.training, field) for field in SHARED}
    if name != "grpo":
        settings["beta"] = arguments.training.beta
    trainer = trainer_class(
        model=model_path(str(arguments.model.model_name_or_path)),
        reward_funcs=find_rewards(arguments.script)[0],
        args=config_class(**settings),
        train_dataset=select_split(
            load_data(arguments.script, arguments.mixture), arguments.script.dataset_train_split, arguments.script
        ),
        peft_config=get_peft_config(arguments.model),
    )
    trainer.train()
    trainer.save_model(settings["output_dir"])
    trainer.save_state()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

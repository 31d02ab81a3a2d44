"""The README's trainers as an installed package runs them: `python -P tests/helpers/readme.py`, in an empty folder.

`make package` does this with the wheel. The hub's model gives way to the one that is shipped, TRL's reward, which
needs another package, to a function, and the training is short. With `-P` the other files here are no modules.
"""

import re
from pathlib import Path

from datasets import Dataset

import trl_bayes
from trl_bayes.assets import embedded_path


README = Path(__file__).parents[2] / "README.md"
SMALL = "per_device_train_batch_size=32, max_completion_length=12, max_steps=2, use_cpu=True, bf16=False"


def scripts(text: str) -> list[str]:
    """The changed script of the README's diff, and its blocks of Python."""
    [diff] = re.findall(r"^```diff\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    changed = "\n".join(line[2:] for line in diff.splitlines() if not line.startswith("-"))
    return [changed, *re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]


def runnable(script: str) -> str:
    """With what is here in the place of what a hub has."""
    script = script.replace('"Qwen/Qwen2.5-0.5B-Instruct"', repr(embedded_path("embedded:python_lines")))
    script = script.replace("from trl.rewards import accuracy_reward\n", "")
    return script.replace('output_dir="out"', f'output_dir="out", {SMALL}, report_to="none"')


def even_length(completions: list[str], **kwargs: object) -> list[float]:
    return [float(len(completion) % 2 == 0) for completion in completions]


def main() -> None:
    print(f"trl_bayes is {trl_bayes.__file__}")
    assert README.parent not in Path(trl_bayes.__file__).parents or "site-packages" in trl_bayes.__file__
    found = scripts(README.read_text(encoding="utf-8"))
    assert len(found) == 2, found
    for script in found:
        rows = Dataset.from_dict({"prompt": ["x = ", "return "] * 4})
        names = {"dataset": rows, "accuracy_reward": even_length, "__name__": "__main__"}
        exec(compile(runnable(script), README.name, "exec"), names)
        trainer = names["trainer"]
        assert trainer.state.global_step == 2, script  # type: ignore[attr-defined]
        print(f"{type(trainer).__name__}: {trainer.state.global_step} updates")  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()

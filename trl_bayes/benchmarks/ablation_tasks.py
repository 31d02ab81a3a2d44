"""Tasks of the ablation: soft and hard, with a rare mode, many prompts and few tokens."""

from .exact_training import ExactProblem, problems
from .tiny import EnumerableTask, hard_constraint_task, letter_count_task


def _begins_rarely(texts: list[str]) -> list[float]:
    return [float(text.startswith("b c a")) for text in texts]


_at_least_two, _count = hard_constraint_task().reward, letter_count_task().reward
_FOUR = ("b", "c d", "d c b", "c b")
_SIXTEEN = tuple(f"{first} {second}" for first in "abcd" for second in "abcd")


def ablation_problems() -> dict[str, ExactProblem]:
    """By name: three of `bench exact`, and others small enough for many trainings."""
    soft = {name: problem for name, problem in problems().items() if name in ("letters", "balance", "bigrams")}
    return {
        **soft,
        **{
            problem.name: problem
            for problem in (
                ExactProblem("hard-2", EnumerableTask("abcdef", 4, _FOUR, _at_least_two, seed=1, logit_std=0.3)),
                # 3e-3 and 7e-4 of the prior, 55 and 20 % of the posterior
                ExactProblem("rare-mode", EnumerableTask("abcd", 5, ("a", "b"), _begins_rarely, seed=7), beta=0.17),
                ExactProblem("16-prompts", EnumerableTask("abcdef", 3, _SIXTEEN, _count, seed=5), beta=0.7),
                ExactProblem(
                    "short", EnumerableTask("abcdef", 2, ("a", "b", "c d", "e f a"), _count, seed=6), beta=0.5
                ),
            )
        },
    }

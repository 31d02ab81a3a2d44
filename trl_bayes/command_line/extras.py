"""Optional packages: what needs one that is not installed says which, and how to install it."""

import importlib.util

from trl import ModelConfig

from ..trainers.posterior_config import PosteriorConfig


def require_extra(package: str, what: str) -> None:
    """
    Refuses what needs an optional package where it is not installed.

    Args:
        package (`str`): `"peft"`, `"deepspeed"` or `"vllm"`, which is the name of the extra too.
        what (`str`): what needs it, as the beginning of a sentence.

    Raises:
        ImportError: one sentence.
    """
    if importlib.util.find_spec(package) is None:
        raise ImportError(
            f"{what} needs the package {package}, which is not installed: "
            f'`pip install "trl_bayes[{package}]"`, or `pip install ".[{package}]"` in a clone.'
        )


def check_extras(model: ModelConfig, training: PosteriorConfig) -> None:
    """
    Refuses fields of a recipe that need an optional package which is not installed.

    Args:
        model ([`~trl.ModelConfig`]): adapters. (transformers itself asks for what quantization needs.)
        training ([`PosteriorConfig`]): vLLM and kernels.

    Raises:
        ImportError: one sentence.
    """
    if model.use_peft:
        require_extra("peft", "`use_peft`")
    if training.use_vllm:
        require_extra("vllm", "`use_vllm`")
    if training.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        raise ImportError(
            "`use_liger_kernel` needs the package liger-kernel, which is not installed: `pip install liger-kernel`."
        )

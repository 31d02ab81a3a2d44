"""Models that each process has for itself, also where the policy's weights are shared by all."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def whole_models() -> Iterator[None]:
    """
    In which models are loaded whole, and run by one process, also under ZeRO-3: there transformers would share their
    weights among all processes, and wait for them at every token.
    """
    from transformers.integrations import deepspeed

    config, deepspeed._hf_deepspeed_config_weak_ref = deepspeed._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config

"""Print versions and devices, to be copied into a bug report."""

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version

from .. import __version__


_PACKAGES = ("trl", "transformers", "torch", "accelerate", "datasets", "peft", "deepspeed", "vllm")


def main(argv: list[str] | None = None) -> None:
    """Prints one line for each package and for the machine."""
    argparse.ArgumentParser(prog="trl-bayes env", description=__doc__).parse_args(argv)
    for name, value in environment().items():
        print(f"{name:<13} {value}")


def environment() -> dict[str, str]:
    """Versions of what results may depend on, and the devices."""
    return {
        "trl_bayes": __version__,
        **{name: installed_version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": devices(),
        "cores": str(os.cpu_count()),
    }


def installed_version(package: str) -> str:
    """The version of a package, or that it is not installed; the package is not imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def devices() -> str:
    """Names of the accelerators that torch can use, or the CPU."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "CPU" if accelerator is None else f"{torch.accelerator.device_count()} x {accelerator.type}"


if __name__ == "__main__":
    main()

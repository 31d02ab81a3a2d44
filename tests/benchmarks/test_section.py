"""What every section has: its fields' words, and whether this machine can run it."""

import os

import pytest
import torch

from trl_bayes.benchmarks.section import DeviceArguments, SectionArguments, check_words


def test_words() -> None:
    check_words("device", ["cpu"], ("cpu", "cuda"))
    with pytest.raises(
        ValueError, match=r"`problems`: 'leters' is not one of letters, all \(did you mean 'letters'\?\)"
    ):
        check_words("problems", ["leters"], ("letters", "all"))
    with pytest.raises(ValueError, match="`device`: 'gpus' is not one of cpu, cuda.$"):
        DeviceArguments(device="gpus")


def test_one_gpu_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    SectionArguments().check()
    DeviceArguments(device="cpu").check()
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    DeviceArguments(device="cuda").check()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="`device=cuda`, but torch finds no CUDA GPU: set `--device cpu`."):
        DeviceArguments(device="cuda").check()

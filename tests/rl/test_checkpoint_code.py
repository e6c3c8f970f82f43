"""DeepSpeed's checkpoint files are unpickled by DeepSpeed; what could run code never gets there."""

import os
import pickle

import pytest
import torch

from rl.run import checkpoint


class Evil:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def folder_with(tmp_path, content):
    """A checkpoint with a file where DeepSpeed keeps its optimizer states."""
    checkpoint.save_state(tmp_path, {"step": 3})
    (tmp_path / "global_step3").mkdir()
    torch.save(content, tmp_path / "global_step3" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return tmp_path


def test_tensors_and_plain_values_pass(tmp_path):
    folder = folder_with(tmp_path, {"exp_avg": torch.ones(3), "step": 2, "names": ["a"]})
    assert checkpoint.load_state(folder) == {"step": 3}


def test_a_call_is_refused_before_it_is_made(tmp_path):
    made = tmp_path / "made"
    folder = folder_with(tmp_path, {"exp_avg": torch.ones(3), "x": Evil(os.mkdir, str(made))})
    with pytest.raises(pickle.UnpicklingError, match=r"optim_states.pt is not loaded.*mkdir"):
        checkpoint.load_state(folder)
    assert not made.exists()


def test_classes_of_deepspeed_pass_and_its_functions_do_not(tmp_path):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.utils import ensure_directory_exists

    states = {"loss_scaler": LossScaler(scale=2.0), "exp_avg": torch.ones(3)}
    (tmp_path / "good").mkdir()
    assert checkpoint.load_state(folder_with(tmp_path / "good", states)) == {"step": 3}
    (tmp_path / "bad").mkdir()
    call = Evil(ensure_directory_exists, str(tmp_path / "made" / "file"))
    folder = folder_with(tmp_path / "bad", states | {"x": call})
    with pytest.raises(pickle.UnpicklingError, match="it would run deepspeed.*ensure_directory"):
        checkpoint.load_state(folder)
    assert not (tmp_path / "made").exists()


def test_members_of_enumerations_pass_however_python_writes_them(tmp_path):
    """Early Pythons 3.11 write `getattr(cls, name)`; of anything else that stays refused."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    cases = {"member": (ZeroStageEnum, "weights"), "method": (LossScaler, "backward")}
    cases |= {"attribute": (ZeroStageEnum, "__init__")}
    for name, arguments in cases.items():
        (tmp_path / name).mkdir()
        folder = folder_with(tmp_path / name, {"stage": Evil(getattr, *arguments)})
        if name == "member":
            assert checkpoint.load_state(folder) == {"step": 3}
            continue
        with pytest.raises(pickle.UnpicklingError, match="it would run builtins.getattr"):
            checkpoint.load_state(folder)

"""The switch: where a setting holds, which of several counts, and what is said where a backend cannot serve."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from savl.network import SAVL, SAVLConfig
from savl.ops import KernelSettings, KernelUnavailable, channel_modulation, scopes, switch, use_fused_kernels
from savl.ops import op as op_registry
from savl.ops.op import OPS
from savl.ops.scopes import current_settings, explicit_settings, fused_by_default
from savl.ops.settings import settings_of_environment

ON, OFF = KernelSettings.of(True), KernelSettings.of(False)


@pytest.fixture(autouse=True)
def _eager_before_and_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(scopes, "process", scopes.ProcessSettings(OFF))
    yield
    scopes.process = scopes.ProcessSettings(None)
    assert explicit_settings() is None, "the test left a block open"


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> str:
    reason = "there is no extension in this test"
    monkeypatch.setattr(op_registry, "UNAVAILABLE", {(op, "cpp"): reason for op in OPS})
    return reason


def in_another_thread(function: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture
def network(small_config: Callable[..., SAVLConfig]) -> SAVL:
    return SAVL(small_config()).eval()


def settings_of(model: nn.Module) -> set[KernelSettings | None]:
    return {module.kernels for module in model.modules() if hasattr(module, "kernels")}  # type: ignore[misc]


# Settings by a call


def test_a_call_holds_from_now_on_in_all_threads() -> None:
    use_fused_kernels()
    assert current_settings() == ON
    assert in_another_thread(current_settings) == ON
    use_fused_kernels(False)
    assert current_settings() == OFF
    assert in_another_thread(current_settings) == OFF


# Settings for a block


def test_a_block_holds_in_the_block_and_its_thread_alone() -> None:
    with use_fused_kernels():
        assert current_settings() == ON
        assert in_another_thread(current_settings) == OFF
    assert current_settings() == OFF
    assert in_another_thread(current_settings) == OFF


def test_blocks_nest() -> None:
    with use_fused_kernels():
        with use_fused_kernels(False):
            assert current_settings() == OFF
            with use_fused_kernels(channel_modulation=False):
                assert current_settings() == KernelSettings.of(True, channel_modulation=False)
            assert current_settings() == OFF
        assert current_settings() == ON
    assert current_settings() == OFF


def test_an_exception_restores_the_previous_settings() -> None:
    with pytest.raises(ZeroDivisionError), use_fused_kernels():
        raise ZeroDivisionError
    assert current_settings() == OFF


def test_one_block_may_be_entered_again_and_within_itself() -> None:
    block = use_fused_kernels(False)
    use_fused_kernels()
    for _ in range(2):
        with block:
            assert current_settings() == OFF
            with block:
                assert current_settings() == OFF
            assert current_settings() == OFF
        assert current_settings() == ON


def test_a_call_in_a_block_is_for_others_and_for_afterwards() -> None:
    with use_fused_kernels(False):
        use_fused_kernels()
        assert current_settings() == OFF
        assert in_another_thread(current_settings) == ON
    assert current_settings() == ON


# Defaults without any setting


@pytest.fixture
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scopes, "process", scopes.ProcessSettings(None))


@pytest.mark.usefixtures("_no_settings")
def test_fused_by_default_holds_in_its_block_and_thread_alone() -> None:
    assert current_settings() == OFF
    with fused_by_default():
        assert current_settings() == ON
        assert explicit_settings() is None
        assert in_another_thread(current_settings) == OFF
        with fused_by_default():
            assert current_settings() == ON
        assert current_settings() == ON
    assert current_settings() == OFF
    with pytest.raises(ZeroDivisionError), fused_by_default():
        raise ZeroDivisionError
    assert current_settings() == OFF


@pytest.mark.usefixtures("_no_settings")
def test_a_block_comes_before_the_default_on_either_side_of_it() -> None:
    with use_fused_kernels(False), fused_by_default():
        assert current_settings() == OFF
        assert explicit_settings() is not None
    with fused_by_default():
        with use_fused_kernels(channel_modulation=False):
            assert current_settings() == KernelSettings.of(True, channel_modulation=False)
        assert current_settings() == ON, "a block that was left is forgotten"


@pytest.mark.usefixtures("_no_settings")
def test_a_call_in_any_thread_comes_before_the_default() -> None:
    with fused_by_default():
        in_another_thread(lambda: use_fused_kernels(False) and None)
        assert current_settings() == OFF
    assert explicit_settings() is not None


@pytest.mark.parametrize(("variable", "expected"), [("eager", OFF), ("0", OFF), ("fused", ON), ("", ON), (" ", ON)])
def test_the_environment_comes_before_the_default_unless_it_is_empty(
    variable: str, expected: KernelSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAVL_KERNELS", variable)
    monkeypatch.setattr(scopes, "process", scopes.ProcessSettings(settings_of_environment()))
    with fused_by_default():
        assert current_settings() == expected


def interleaved(steps: list[str]) -> list[KernelSettings]:
    """Two threads take turns: each makes a block (``make``), enters it (``enter``) and leaves it (``leave``)."""
    blocks: dict[str, Any] = {}
    seen: list[KernelSettings] = []
    wanted = {"a": True, "b": True}
    queues = {name: [step.split()[1] for step in steps if step.startswith(name)] for name in wanted}
    turn = {"at": 0}
    condition = threading.Condition()

    def work(name: str) -> None:
        for action in queues[name]:
            with condition:
                assert condition.wait_for(lambda: steps[turn["at"]].split()[0] == name, timeout=10)
                if action == "make":
                    blocks[name] = use_fused_kernels(wanted[name])
                elif action == "enter":
                    blocks[name].__enter__()
                    seen.append(current_settings())
                else:
                    blocks[name].__exit__(None, None, None)
                turn["at"] += 1
                condition.notify_all()

    steps = [*steps, "end end"]
    workers = [threading.Thread(target=work, args=(name,)) for name in wanted]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    return seen


@pytest.mark.parametrize(
    "steps",
    [
        ["a make", "a enter", "b make", "b enter", "a leave", "b leave"],
        ["a make", "a enter", "b make", "b enter", "b leave", "a leave"],
        ["a make", "b make", "a enter", "b enter", "a leave", "b leave"],
        ["a make", "b make", "b enter", "a enter", "b leave", "a leave"],
    ],
    ids=["one-after-the-other", "one-in-the-other", "both-made-first", "both-made-first-crossed"],
)
def test_blocks_of_two_threads_leave_the_process_as_it_was(steps: list[str]) -> None:
    assert interleaved(steps) == [ON, ON]
    assert current_settings() == OFF, "two blocks that have ended still hold for the whole process"


# Settings of a model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the fused kernel was chosen, call by call of the convolution."""
    chosen: list[bool] = []

    def spy(*args: Any) -> bool:
        chosen.append(switch.serves(*args))
        return chosen[-1]

    # By module: the package has a function of the same name.
    monkeypatch.setattr(import_module("savl.ops.convolution"), "serves", spy)
    return chosen


@pytest.mark.usefixtures("extension")
def test_the_setting_of_a_model_comes_before_block_and_process(network: SAVL, calls: list[bool]) -> None:
    picture = torch.rand(1, 3, 4, 4)

    def fused() -> bool:
        calls.clear()
        with torch.no_grad():
            network(picture)
        assert len(set(calls)) == 1, f"blocks of one network disagree: {calls}"
        return calls[0]

    use_fused_kernels(model=network)
    assert fused()
    with use_fused_kernels(False):
        assert fused(), "a block counts more than the model"
    use_fused_kernels(False, model=network)
    use_fused_kernels()
    assert not fused(), "the process counts more than the model"
    with use_fused_kernels():
        assert not fused(), "a block counts more than the model"
    use_fused_kernels(None, model=network)
    assert fused(), "the model still has its setting"
    with use_fused_kernels(False):
        assert not fused(), "the process counts more than a block"
    with use_fused_kernels(convolution=False):
        assert not fused(), "the setting of the op is not heeded"
    assert settings_of(network) == {None}


def test_a_model_in_a_block_gets_back_what_each_of_its_parts_had(network: SAVL) -> None:
    use_fused_kernels(False, model=network.groups[0])
    before = [module.kernels for module in network.modules() if hasattr(module, "kernels")]
    assert {None, OFF} == set(before)
    with use_fused_kernels(model=network):
        assert settings_of(network) == {ON}
    assert [module.kernels for module in network.modules() if hasattr(module, "kernels")] == before
    with pytest.raises(ZeroDivisionError), use_fused_kernels(model=network):
        raise ZeroDivisionError
    assert [module.kernels for module in network.modules() if hasattr(module, "kernels")] == before


def test_a_model_says_nothing_to_others(network: SAVL) -> None:
    with use_fused_kernels(model=network):
        assert current_settings() == OFF
        assert in_another_thread(lambda: settings_of(network)) == {ON}


def test_a_copy_of_a_model_keeps_its_setting(network: SAVL) -> None:
    use_fused_kernels(model=network, channel_modulation=False)
    assert settings_of(copy.deepcopy(network)) == {KernelSettings.of(True, channel_modulation=False)}
    assert set(network.state_dict()) == set(copy.deepcopy(network).state_dict())


# Choice of the backend


@pytest.mark.usefixtures("extension")
def test_the_automatic_choice_falls_back_silently_where_no_kernel_can_serve() -> None:
    half = torch.ones(1, 2, 2, 3, dtype=torch.float16)
    with use_fused_kernels():
        assert switch.serves(OPS["channel_modulation"], None, half.float(), half.float(), None, half.float())
        assert not switch.serves(OPS["channel_modulation"], None, half, half, None, half)
        assert channel_modulation(half, half, None, half).dtype == torch.float16
        assert not switch.serves(OPS["channel_modulation"], None, half.to("meta"), half, None, half)
        double = half.double()
        assert not switch.serves(OPS["channel_modulation"], None, double, double, None, half.float()), "of a limit"


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize(
    ("tensor", "fragments"),
    [
        (torch.ones(1, 2, 2, 3, dtype=torch.float16), ["float16", "float32, float64, bfloat16"]),
        (torch.ones(1, 2, 2, 3, device="meta"), ["meta", "CPU"]),
    ],
    ids=["float16", "device"],
)
def test_a_backend_asked_for_by_name_says_why_it_cannot_serve(tensor: Tensor, fragments: list[str]) -> None:
    with use_fused_kernels(channel_modulation="cpp"), pytest.raises(KernelUnavailable) as caught:
        channel_modulation(tensor, tensor, None, tensor)
    missing = [part for part in ["channel_modulation", "'cpp'", *fragments] if part not in str(caught.value)]
    assert not missing, f"the message lacks {missing}: {caught.value}"


@pytest.mark.usefixtures("extension")
def test_a_mix_of_dtypes_that_the_kernel_cannot_take_is_reported() -> None:
    wide, narrow = torch.ones(1, 2, 2, 3, dtype=torch.float64), torch.ones(1, 2, 2, 3)
    with use_fused_kernels():
        assert channel_modulation(wide, wide, None, narrow).dtype == torch.float32
    with use_fused_kernels(channel_modulation="cpp"), pytest.raises(KernelUnavailable, match="attended is float64"):
        channel_modulation(wide, wide, None, narrow)


def test_without_the_extension_automatic_is_eager_and_a_name_raises(no_extension: str) -> None:
    ones = torch.ones(1, 2, 2, 3)
    with use_fused_kernels():
        assert torch.equal(channel_modulation(ones, ones, None, ones), 3 * ones)
    with pytest.raises(KernelUnavailable, match=no_extension):
        use_fused_kernels(window_attention="cpp")
    assert current_settings() == OFF, "what raised must not hold"
    with pytest.raises(KernelUnavailable, match=no_extension):
        channel_modulation(ones, ones, None, ones, kernels=KernelSettings.of("cpp"))


# Error messages name the argument, its value, and the accepted values


@pytest.mark.parametrize(
    ("given", "error", "fragments"),
    [
        ({"enabled": "cpp"}, TypeError, ["enabled", "'cpp'", "bool"]),
        ({"enabled": 1}, TypeError, ["enabled", "1", "bool"]),
        ({"enabled": None}, ValueError, ["enabled", "None", "model"]),
        ({"attention": True}, ValueError, ["attention", *OPS]),
        ({"window_attention": "triton9"}, ValueError, ["window_attention", "triton9", "eager", "cpp"]),
        ({"window_attention": 1}, TypeError, ["window_attention", "1", "True, False", "name"]),
        ({"window_attention": None}, TypeError, ["window_attention", "None"]),
        ({"model": 3}, TypeError, ["model", "int", "torch.nn.Module"]),
        ({"model": nn.Linear(1, 1)}, ValueError, ["model", "Linear", "savl blocks"]),
        ({"model": nn.Linear(1, 1), "enabled": None, "window_attention": True}, ValueError, ["enabled=None"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_argument_is_reported_and_nothing_is_switched(
    given: dict[str, Any], error: type[Exception], fragments: list[str]
) -> None:
    with pytest.raises(error) as caught:
        use_fused_kernels(**given)
    missing = [fragment for fragment in fragments if fragment not in str(caught.value)]
    assert not missing, f"the message lacks {missing}: {caught.value}"
    assert current_settings() == OFF


def test_threads_may_share_one_block_object(extension: Any) -> None:
    shared = use_fused_kernels(True)
    inside, leave = threading.Event(), threading.Event()
    seen: list[KernelSettings] = []

    def other() -> None:
        with shared:
            inside.set()
            leave.wait(timeout=10)
        seen.append(current_settings())

    thread = threading.Thread(target=other)
    with use_fused_kernels(False):
        with shared:
            thread.start()
            inside.wait(timeout=10)
        assert current_settings() == KernelSettings.of(False), "this thread took the other's outer setting"
        leave.set()
        thread.join()
    assert seen == [OFF], "the other thread was left with this one's outer setting"


def test_an_attribute_that_only_has_the_name_is_left_alone() -> None:
    foreign = torch.nn.Linear(2, 2)
    foreign.kernels = [3, 5, 7]  # type: ignore[assignment]
    with pytest.raises(ValueError, match="Linear has none"):
        use_fused_kernels(True, model=foreign)
    assert foreign.kernels == [3, 5, 7]


def test_settings_of_a_backend_that_is_not_there_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="no backend 'tritn'"):
        KernelSettings.of("tritn")


def test_an_extension_without_the_kernels_is_told_and_not_used() -> None:
    code = """
import sys, types, importlib.metadata
stub = types.ModuleType("savl._C")
stub.build_facts = lambda: {"version": importlib.metadata.version("savl")}
stub.kernel_instruction_sets = lambda: ["portable"]
sys.modules["savl._C"] = stub
import savl
print(savl.kernel_report())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("it is older than this package") == len(OPS)

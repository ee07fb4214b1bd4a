"""Tests of the prediction for GPUs: what it counts, and that the page shows the committed figures."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from benchmarks.predicted import floors, traffic
from savl.kernels.configs import kernels_hash
from savl.kernels.machine_code import Instruction, count, functions, loops, path

AGAIN = "run `python -m benchmarks.predicted.floors`"
LISTING = """
.text.first:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0020*/                   FFMA R1, R2, R3, R4 ;
        /*0030*/                   MUFU.EX2 R5, R5 ;
{filling}
        /*0040*/               @P1 BRA `(.L_x_0) ;
.L_x_1:
        /*0050*/                   STG.E desc[UR4][R2.64], R5 ;
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   BRA `(.L_x_2);
""".format(filling="\n".join(["        /*0030*/                   FMUL R1, R1, R1 ;"] * 20))


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(floors.COMMITTED.read_text(encoding="utf-8"))
    return content


def test_the_page_shows_the_committed_figures(committed: dict[str, Any]) -> None:
    assert floors.PAGE.read_text(encoding="utf-8") == floors.page(committed), f"{AGAIN} --page"


def test_the_committed_figures_are_of_these_kernels(committed: dict[str, Any]) -> None:
    assert committed["sources"] == kernels_hash(), AGAIN


def test_every_target_that_can_be_predicted_is_in_the_prediction(committed: dict[str, Any]) -> None:
    wanted = {(row["what"], row["against"].partition(",")[0]): row["wanted"] for row in committed["ratios"]}
    assert wanted["window attention, forward", "eager"] == 8
    assert wanted["window attention, forward", "sdpa"] == 2
    assert wanted["window attention, forward and backward", "eager"] == 6
    assert wanted["overlapping attention, forward", "eager"] == 8
    assert wanted["modulation", "memory bandwidth"] == wanted["posterior, no noise", "memory bandwidth"] == 0.9
    assert wanted["savl-base end to end", "eager"] == 6
    assert wanted["savl-base end to end, peak memory", "eager"] == 4
    assert committed["predicted"] == "not measured"


def test_a_prediction_is_the_largest_of_the_floors() -> None:
    work = floors.Work(bytes=3.35e6, flops=2 * 989e6, exponentials=0, instructions=132 * 4 * 1755)
    seconds = floors.H100.floors(work)
    assert seconds == {
        "memory": pytest.approx(1e-6),
        "tensor cores": pytest.approx(2e-6),
        "exponentials": 0,
        "instructions": pytest.approx(1e-6),
    }
    assert floors.H100.seconds(work) == seconds["tensor cores"]


def test_bytes_and_exponentials_match_the_formula(committed: dict[str, Any]) -> None:
    pixels, pairs = 512**2, 512**2 * 6 * 256
    forward = committed["kernels"]["window forward"]
    assert forward["bytes"] == pixels * (4 * 144 * 2 + 6 * 4 + 2)
    assert forward["flops"] == 2 * 2 * 32 * pairs
    assert pairs <= forward["exponentials"] <= 1.1 * pairs, "one a score, and one a row and tile"


def test_instructions_are_counted_along_the_path_through_the_loop() -> None:
    (program,) = functions(LISTING).values()
    assert [each.opcode for each in program[:3]] == ["MOV", "BRA", "FFMA"]
    assert loops(program) == [(2, 24)]
    counted = count(program)
    assert counted.loop == 23
    assert counted.around == 4, "MOV, BRA, STG and EXIT"
    assert counted.exponentials == 1


def test_the_path_with_more_arithmetic_is_counted_even_if_it_is_longer() -> None:
    skip = [
        Instruction("BRA", 3, True),
        Instruction("FFMA", None, False),
        Instruction("MOV", None, False),
        Instruction("EXIT", None, False),
    ]
    way = path(skip, 0, 3)
    assert way is not None
    assert len(way) == 4
    detour = [Instruction("BRA", 3, True), *[Instruction("MOV", None, False)] * 2, Instruction("EXIT", None, False)]
    way = path(detour, 0, 3)
    assert way is not None
    assert len(way) == 2


def test_traffic_counts_each_operation_of_the_modulation_once() -> None:
    tensor = 32 * 32 * 144 * 2
    steps = traffic.modulation(32).steps
    assert [step.name for step in steps] == ["aten.add", "aten.mul", "aten.add"]
    assert [step.bytes for step in steps] == [2 * tensor, 3 * tensor, 3 * tensor]


def test_traffic_does_not_count_views_and_expanded_dimensions() -> None:
    with traffic.RecordedOperations() as recorded:
        ones = torch.empty(1, 8, device="meta").expand(100, 8).transpose(0, 1)
        ones + torch.empty(8, 1, device="meta")
    (step,) = recorded.steps
    assert step.bytes == 4 * (8 + 8 + 800)


def test_traffic_reports_the_peak_memory() -> None:
    with traffic.RecordedOperations() as recorded:
        for _ in range(3):
            big = torch.zeros(1000, device="meta")
            del big
        two = torch.zeros(100, device="meta"), torch.zeros(100, device="meta")
    assert len(two) == 2
    assert recorded.peak == 4000


def test_the_fused_network_needs_far_less_memory_than_the_eager_one() -> None:
    eager, fused = traffic.network(128, fused=False), traffic.network(128, fused=True)
    assert fused.peak < eager.peak
    assert sum(step.name == "savl.window_attention" for step in fused.steps) == 6 * (6 + 7), (
        "six groups: HABs and DSCAs"
    )
    assert sum(step.name == "savl.overlapping_window_attention" for step in fused.steps) == 6


def test_the_fused_network_moves_few_bytes_in_few_launches() -> None:
    eager, fused = traffic.network(512, fused=False), traffic.network(512, fused=True)
    assert fused.bytes <= 81e9
    assert fused.launches <= 450
    assert fused.peak <= eager.peak / 4

"""Work: where output positions start, and what a group's work is for each of its children."""

from dataclasses import replace

from engine.types import SamplingParams
from kv_transfer.reports import Work

WORK = Work(seq_id=1, token_ids=(1, 2, 3), prompt_tokens=2, sampling=SamplingParams(), tenant="blue", identity="int8/0")


def test_output_positions_count_from_the_prompt() -> None:
    assert WORK.position == 1


def test_a_single_choice_has_no_parts() -> None:
    assert replace(WORK, choices=(3,)).parts == ()


def test_a_group_before_it_has_children_has_no_parts() -> None:
    assert replace(WORK, choices=(0, 1)).parts == ()


def test_a_part_is_the_same_work_for_one_choice() -> None:
    group = replace(WORK, choices=(0, 2), children=(7, 8))
    assert group.parts == (replace(WORK, seq_id=7, choices=(0,)), replace(WORK, seq_id=8, choices=(2,)))

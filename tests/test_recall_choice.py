"""What queries ask for of what has left the window: shares of units, and what enters and leaves the slots."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from worker.attention.recall_choice import Known, Look, Represented, represent, shares
from worker.attention.recall_kernel import load_look
from worker.engine.recollection import Recollection


@pytest.fixture(scope="module")
def look() -> Look:
    found = load_look()
    if found is shares:
        pytest.skip("there is no kernel to be had here")
    return found


def keys_of(units: int, unit: int = 4) -> torch.Tensor:
    """[1 layer, 2 kv_heads, tokens, 64]: each unit's keys point a way of their own."""
    generator = torch.Generator().manual_seed(0)
    ways = torch.nn.functional.normalize(torch.randn(1, 2, units, 1, 64, generator=generator), dim=-1)
    return ways.expand(1, 2, units, unit, 64).reshape(1, 2, units * unit, 64)


def known(*parts: Represented) -> Known:
    found = Known()
    for part in parts:
        found.add(part)
    return found


def recollection(units: int = 20, slots: int = 6) -> tuple[Recollection, torch.Tensor]:
    keys = keys_of(units)
    held = Recollection(10, slots, lambda queries, first: queries, shares)
    held.add(represent(keys, 4))
    assert held.next_unit == 10 + units
    return held, keys[:, :, ::4]


def ask(held: Recollection, made: torch.Tensor, *units: int, strength: float = 80.0) -> None:
    """A row of queries for each of these units: one query head for each KV head."""
    rows = torch.stack([made[0, :, unit - 10] * strength for unit in units], 1)
    held.hear(0, 0, rows)


def test_pairs_of_keys_are_represented_by_their_mean() -> None:
    keys = torch.randn(3, 2, 8, 16)
    made = represent(keys, 4)
    assert made.keys.shape == (3, 2, 2, 2, 16)
    mean = (keys[1, 0, 4] + keys[1, 0, 5]) / 2
    torch.testing.assert_close(made.keys[1, 0, 1, 0] * made.scales[1, 0, 1], mean, rtol=0, atol=0.03)


def test_a_unit_is_asked_for_by_the_query_that_is_nearest_to_it_whoever_else_asks() -> None:
    keys = keys_of(20)
    queries = torch.zeros(1, 3, 4, 64)
    queries[0, 1, 3] = 80 * keys[0, 1, 4 * 7]  # the second KV head's second query
    found = shares(queries, known(represent(keys, 4)))
    assert found.shape == (1, 2, 20)
    assert found[0, 1].argmax() == 7
    assert found[0, 1, 7] > 0.9
    np.testing.assert_allclose(found[0, 0], np.full(20, 1 / 20), rtol=1e-6)


@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_the_kernel_finds_what_torch_finds_however_what_is_known_is_cut(head_dim: int, look: Look) -> None:
    keys, queries = torch.randn(3, 2, 90 * 16, head_dim), 3 * torch.randn(3, 21, 6, head_dim)
    whole = represent(keys, 16)
    cut = [represent(keys[:, :, start:end], 16) for start, end in pairwise([0, 16, 80 * 16, 82 * 16, 90 * 16])]
    wanted = shares(queries, known(whole))
    assert wanted.max() > 0.1
    np.testing.assert_array_equal(shares(queries, known(*cut)), wanted)
    np.testing.assert_allclose(look(queries, known(*cut)), wanted, rtol=1e-4, atol=1e-9)
    np.testing.assert_array_equal(look(queries, known(*cut)), look(queries, known(whole)))
    looking = np.array([[True, False], [False, False], [True, True]])
    found = look(queries, known(*cut), looking)
    np.testing.assert_array_equal(found, look(queries, known(whole)) * looking[..., None])
    np.testing.assert_allclose(found, shares(queries, known(whole), looking), rtol=1e-4, atol=1e-9)


def test_what_is_asked_for_does_not_depend_on_the_number_of_threads(look: Look) -> None:
    made = known(*(represent(torch.randn(3, 2, 64, 64), 16) for _ in range(200)))
    queries, num_threads = 3 * torch.randn(3, 5, 4, 64), torch.get_num_threads()
    wanted = look(queries, made)
    try:
        torch.set_num_threads(1)
        np.testing.assert_array_equal(look(queries, made), wanted)
    finally:
        torch.set_num_threads(num_threads)


def test_a_question_chooses_what_it_asks_for_in_order_of_age() -> None:
    held, made = recollection()
    ask(held, made, 25, 13)
    choice = held.choose()
    assert choice.shape == (1, 2, 6)
    assert {13, 25} <= set(choice[0, 0].tolist())
    assert (np.diff(choice) > 0).all()


def test_a_token_that_asks_for_nothing_new_leaves_all_as_it_is() -> None:
    held, made = recollection(units=80)
    ask(held, made, 25, 13)
    choice = held.choose()
    ask(held, made, 13)
    assert held.amend(choice) is None
    held.hear(0, 0, torch.zeros(2, 1, 64))  # asks for everything alike, which is for nothing
    assert held.amend(choice) is None
    assert held.choices == 1


def test_a_head_that_is_as_near_to_all_when_the_turn_asks_does_not_look_in_its_reply() -> None:
    held, made = recollection(units=1200)
    held.latest()
    queries = torch.zeros(2, 1, 64)
    queries[0] = 80 * made[0, 0, 500]
    held.hear(0, 0, queries)
    choice = held.choose()
    ask(held, made, 900)
    amended = held.amend(choice)
    assert amended is not None
    assert 900 in amended[0, 0]
    np.testing.assert_array_equal(amended[0, 1], choice[0, 1])
    ask(held, made, 900)
    again = held.amend(held.latest())
    assert again is not None
    assert 900 in again[0, 1], "a new turn's heads all look until it has asked"


def test_what_was_not_asked_for_longest_gives_way_to_what_is() -> None:
    held, made = recollection(units=80, slots=20)
    ask(held, made, 25, 13)
    choice = held.choose()
    ask(held, made, 13)
    assert held.amend(choice) is None
    new = next(unit for unit in range(30, 90) if unit not in choice)
    ask(held, made, new)
    amended = held.amend(choice)
    assert amended is not None
    assert {13, new} <= set(amended[0, 0].tolist())
    assert set(choice[0, 0].tolist()) - set(amended[0, 0].tolist())
    assert (np.diff(amended) > 0).all()


def test_a_turn_begins_with_the_latest_that_is_gone() -> None:
    held, _ = recollection()
    assert held.latest().tolist() == [[[24, 25, 26, 27, 28, 29]] * 2]
    held.add(represent(keys_of(2), 4))
    assert held.latest()[0, 0].tolist() == [26, 27, 28, 29, 30, 31]

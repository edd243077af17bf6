"""What queries ask for of what has left the window: shares of units, and what enters and leaves the slots."""

import numpy as np
import torch

from worker.attention.recall_choice import representatives, shares, spread
from worker.engine.recollection import Recollection


def keys_of(units: int, unit: int = 4) -> torch.Tensor:
    """[1 layer, 2 kv_heads, tokens, 64]: each unit's keys point a way of their own."""
    generator = torch.Generator().manual_seed(0)
    ways = torch.nn.functional.normalize(torch.randn(1, 2, units, 1, 64, generator=generator), dim=-1)
    return ways.expand(1, 2, units, unit, 64).reshape(1, 2, units * unit, 64)


def recollection(units: int = 20, slots: int = 6) -> tuple[Recollection, torch.Tensor]:
    held = Recollection(10, slots, lambda queries, first: queries)
    made = representatives(keys_of(units), 4)
    held.add(made)
    assert held.next_unit == 10 + units
    return held, made


def ask(held: Recollection, made: torch.Tensor, *units: int, strength: float = 80.0) -> None:
    """A row of queries for each of these units: one query head for each KV head."""
    rows = torch.stack([made[0, :, unit - 10, 0] * strength for unit in units], 1)
    held.hear(0, 0, rows)


def test_pairs_of_keys_are_represented_by_their_mean() -> None:
    keys = torch.randn(3, 2, 8, 16)
    made = representatives(keys, 4)
    assert made.shape == (3, 2, 2, 2, 16)
    torch.testing.assert_close(made[1, 0, 1, 0], (keys[1, 0, 4] + keys[1, 0, 5]) / 2)


def test_a_unit_is_asked_for_by_the_query_that_is_nearest_to_it_whoever_else_asks() -> None:
    made = representatives(keys_of(20), 4)
    queries = torch.zeros(1, 3, 4, 64)
    queries[0, 1, 3] = 80 * made[0, 1, 7, 0]  # the second KV head's second query
    found = shares(queries, made)
    assert found.shape == (1, 2, 20)
    assert found[0, 1].argmax() == 7
    assert found[0, 1, 7] > 0.9
    torch.testing.assert_close(found[0, 0], torch.full((20,), 1 / 20))


def test_a_units_neighbours_have_a_part_of_its_share() -> None:
    found = spread(torch.tensor([[[0.0, 0.0, 1.0, 0.0, 0.0]]]))
    assert found[0, 0].tolist() == [0.0, torch.tensor(0.9).item(), 1.0, torch.tensor(0.9).item(), 0.0]


def test_a_question_chooses_what_it_asks_for_in_order_of_age() -> None:
    held, made = recollection()
    ask(held, made, 25, 13)
    choice = held.choose()
    assert choice.shape == (1, 2, 6)
    assert {12, 13, 14, 24, 25, 26} == set(choice[0, 0].tolist())
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


def test_what_was_not_asked_for_longest_gives_way_to_what_is() -> None:
    held, made = recollection(units=80, slots=20)
    ask(held, made, 25, 13)
    choice = held.choose()
    ask(held, made, 13)
    assert held.amend(choice) is None
    new = next(unit for unit in range(30, 90) if not np.isin([unit - 1, unit, unit + 1], choice).any())
    ask(held, made, new)
    amended = held.amend(choice)
    assert amended is not None
    assert {12, 13, 14, new - 1, new, new + 1} <= set(amended[0, 0].tolist())
    assert set(choice[0, 0].tolist()) - set(amended[0, 0].tolist())
    assert (np.diff(amended) > 0).all()


def test_a_turn_begins_with_the_latest_that_is_gone() -> None:
    held, _ = recollection()
    assert held.latest().tolist() == [[[24, 25, 26, 27, 28, 29]] * 2]
    held.add(representatives(keys_of(2), 4))
    assert held.latest()[0, 0].tolist() == [26, 27, 28, 29, 30, 31]

"""Which worker a turn goes to."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from server.router import STICKINESS, Candidate, choose

candidates = st.lists(
    st.builds(Candidate, worker_id=st.sampled_from("abcdef"), in_flight=st.integers(0, 40), model=st.just("m")),
    min_size=1,
    unique_by=lambda candidate: candidate.worker_id,
)
keys = st.text("ab0-é中🙂")  # any character at all takes hypothesis seconds to prepare


def idle(*worker_ids: str) -> list[Candidate]:
    return [Candidate(worker_id, 0, "m") for worker_id in worker_ids]


def test_without_workers_there_is_no_choice() -> None:
    assert choose([], key="s") is None


@given(candidates, keys)
def test_the_order_in_which_workers_are_named_does_not_matter(workers: list[Candidate], key: str) -> None:
    assert choose(workers, key=key) == choose(workers[::-1], key=key)


@given(candidates, keys, st.sampled_from("abcdef"))
def test_no_choice_is_much_busier_than_the_least_busy(workers: list[Candidate], key: str, last: str) -> None:
    load = {worker.worker_id: worker.in_flight for worker in workers}
    chosen = choose(workers, key=key, last_worker_id=last)
    assert chosen is not None
    assert load[chosen] <= min(load.values()) + (STICKINESS if chosen == last else 0)


def test_the_last_worker_is_kept_until_it_is_much_busier() -> None:
    for in_flight, expected in ((STICKINESS, "a"), (STICKINESS + 1, "b")):
        workers = [Candidate("a", in_flight, "m"), Candidate("b", 0, "m")]
        assert choose(workers, key="s", last_worker_id="a") == expected


def test_a_last_worker_that_is_gone_is_forgotten() -> None:
    assert choose(idle("b", "c"), key="s", last_worker_id="a") in ("b", "c")


def test_workers_of_the_sessions_model_come_first_however_busy() -> None:
    workers = [Candidate("a", 30, "mine"), Candidate("b", 0, "other")]
    assert choose(workers, key="s", last_worker_id="b", model="mine") == "a"


def test_without_a_worker_of_its_model_a_session_is_still_served() -> None:
    assert choose(idle("a"), key="s", model="gone") == "a"


def test_idle_workers_share_sessions_evenly() -> None:
    counts = Counter(choose(idle("a", "b", "c", "d"), key=f"session-{number}") for number in range(4000))
    assert min(counts.values()) > 850


def test_a_worker_that_goes_moves_only_its_own_sessions() -> None:
    for number in range(200):
        key = f"session-{number}"
        before = choose(idle("a", "b", "c"), key=key)
        after = choose(idle("a", "b"), key=key)
        assert after == before or before == "c"

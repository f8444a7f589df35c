"""What a GPU's memory is spent on, worked out on figures alone."""

from stages.lib.memory import Need, Plan, choose, measure

GB = 1e9
# As measured for an 8B model in bfloat16: activations, and the input of each block alone.
KEPT, TWICE = Need(3 * GB, 3.0e6), Need(3 * GB, 0.4e6)


def plan(
    free: float, step: int = 32_768, longest: int = 2048, recomputed: int | None = None, weights: int = int(14 * GB)
) -> Plan:
    found = choose(free, KEPT, TWICE, weights, 32, step, longest, recomputed)
    assert found is not None
    return found


def bytes_of(found: Plan) -> float:
    slope = KEPT.slope + found.recomputed / 32 * (TWICE.slope - KEPT.slope)
    return 3 * GB + found.tokens * slope + 14 * GB * found.keeps_weights


def test_what_is_chosen_fits_and_more_memory_is_never_slower() -> None:
    for free in (4, 6, 12, 18, 30, 50, 70, 130):
        assert bytes_of(plan(free * GB)) <= free * GB


def test_a_large_card_computes_nothing_twice_and_a_small_one_still_trains() -> None:
    assert plan(200 * GB) == Plan(32_768, 0, True)
    small = plan(6 * GB)
    assert small.recomputed == 32
    assert small.tokens >= 2048
    assert choose(3.1 * GB, KEPT, TWICE, int(14 * GB), 32, 32_768, 2048, None) is None


def test_a_micro_batch_holds_the_longest_row_and_no_more_than_a_step() -> None:
    assert plan(200 * GB, step=900, longest=2048).tokens == 2048
    assert plan(200 * GB, step=5000, longest=100).tokens == 5000


def test_what_the_user_has_set_is_not_chosen() -> None:
    assert plan(200 * GB, recomputed=32).recomputed == 32
    assert plan(40 * GB, recomputed=0).recomputed == 0
    assert not plan(200 * GB, weights=0).keeps_weights, "nothing is packed"


def test_the_need_follows_from_two_trials() -> None:
    found = measure(lambda tokens: 1_000_000 + 300 * tokens)
    assert found == Need(1_000_000, 300)

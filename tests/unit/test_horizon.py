"""How far back the relay looks."""

from __future__ import annotations

from pgqrs_celery.relay import FULL_LOOK, OVERLAP, Horizon


def test_the_first_look_leaves_nothing_out() -> None:
    assert Horizon().back(1000.0) is None


def test_a_look_goes_back_to_the_last_complete_one_and_a_bit_further() -> None:
    horizon = Horizon()
    horizon.looked(1000.0, None)
    assert horizon.back(1003.0) == 3.0 + OVERLAP
    horizon.looked(1003.0, 3.0 + OVERLAP)
    assert horizon.back(1004.0) == 1.0 + OVERLAP


def test_while_no_look_is_complete_the_next_ones_go_back_ever_further() -> None:
    horizon = Horizon()
    horizon.looked(1000.0, None)
    assert horizon.back(1008.0) == 8.0 + OVERLAP
    assert horizon.back(1009.0) == 9.0 + OVERLAP


def test_every_now_and_then_a_look_leaves_nothing_out() -> None:
    horizon = Horizon()
    horizon.looked(1000.0, None)
    horizon.looked(1000.0 + FULL_LOOK - 1, 5.0)
    assert horizon.back(1000.0 + FULL_LOOK) is None
    assert horizon.back(1000.0 + FULL_LOOK + 1) is None, "until it has been done"
    horizon.looked(1000.0 + FULL_LOOK + 1, None)
    assert horizon.back(1000.0 + FULL_LOOK + 2) is not None

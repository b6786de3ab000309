"""What the demo says of its claims. CI, which runs the demo itself, sees that all of them hold, within a minute."""

from __future__ import annotations

import pytest

from examples.demo.__main__ import verdict
from examples.demo.screen import Plain
from examples.demo.stage import Claim


@pytest.mark.parametrize("held", [(), (False,), (True, False), (True, True)])
def test_the_exit_code_is_zero_only_if_every_claim_held(held: tuple[bool, ...], capsys: pytest.CaptureFixture) -> None:
    claims = [Claim(one, "the moon is made of cheese", "a bite") for one in held]
    assert verdict(Plain(), claims, 1.0) == (0 if held == (True, True) else 1)
    assert f"{sum(held)} of {len(held)} claims held" in capsys.readouterr().out

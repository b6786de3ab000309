"""The demo, as a newcomer runs it. That it ends within a minute is seen by CI, where it has the machine to itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.demo.__main__ import verdict
from examples.demo.screen import Plain
from examples.demo.stage import Claim
from pgqrs_celery.conf import DSN_VARIABLE

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_every_claim_of_the_demo_holds() -> None:
    environment = {k: v for k, v in os.environ.items() if k not in (DSN_VARIABLE, "CELERY_BROKER_URL")}
    answer = subprocess.run(
        [sys.executable, "-m", "examples.demo"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert re.search(r"SIGKILL: worker-[12] .* is gone, \d+ of 249 records into transform", answer.stdout)
    assert re.search(r"from the kill to the resumption: \d+\.\d+ s", answer.stdout)
    assert re.search(r"SIGKILL: worker-\d .* with \d+ of 20 parts done and [1-9] cut short", answer.stdout)
    assert re.search(r"run \d+ is FAILED: part 7 cannot be read", answer.stdout)
    assert re.search(r"^transform +SUCCESS +2 +worker-[12]", answer.stdout, re.MULTILINE)


@pytest.mark.parametrize("held", [(), (False,), (True, False), (True, True)])
def test_the_exit_code_is_zero_only_if_every_claim_held(held: tuple[bool, ...], capsys: pytest.CaptureFixture) -> None:
    claims = [Claim(one, "the moon is made of cheese", "a bite") for one in held]
    assert verdict(Plain(), claims, 1.0) == (0 if held == (True, True) else 1)
    assert f"{sum(held)} of {len(held)} claims held" in capsys.readouterr().out

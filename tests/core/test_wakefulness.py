"""When the computer is kept from going to sleep by itself."""

from __future__ import annotations

import itertools

from emberd.core.memory import Power, PowerSource
from emberd.core.wakefulness import must_stay_awake


def test_only_who_wants_it_on_mains_with_a_ready_model_and_without_low_power_mode_stays_awake():
    for source, saves, is_wanted, is_ready in itertools.product(
        PowerSource, (True, False, None), (True, False), (True, False)
    ):
        power = Power(source=source, is_low_power=saves)
        expected = source is PowerSource.MAINS and saves is not True and is_wanted and is_ready
        assert must_stay_awake(power, is_wanted=is_wanted, is_ready=is_ready) is expected

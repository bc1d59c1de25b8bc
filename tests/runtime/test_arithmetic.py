"""Rounding up."""

from hypothesis import given
from hypothesis import strategies as st

from lavin.runtime.arithmetic import ceil_div, next_power_of_2, round_up


@given(st.integers(0, 10**6), st.integers(1, 5000))
def test_parts_and_multiples(n, k):
    assert ceil_div(n, k) == n // k + (n % k > 0)
    assert round_up(n, k) % k == 0 and n <= round_up(n, k) < n + k


@given(st.integers(1, 10**6))
def test_powers_of_two(n):
    power = next_power_of_2(n)
    assert power.bit_count() == 1 and power / 2 < n <= power

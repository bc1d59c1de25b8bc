"""Whole numbers rounded up: to a multiple, in a division, to a power of two."""


def ceil_div(n: int, k: int) -> int:
    """The number of parts of size k that hold n."""
    return -(-n // k)


def round_up(n: int, k: int) -> int:
    """The smallest multiple of k that is at least n."""
    return ceil_div(n, k) * k


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, for n of 1 or more."""
    return 1 << (n - 1).bit_length()

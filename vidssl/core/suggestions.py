"""Numbers in messages: counted things, and numbers near a wrong one that would be right."""


def counted(n: int, noun: str, ending: str = "s") -> str:
    """Returns "1 video", "2 videos"."""
    return f"{n} {noun}{ending * (n != 1)}"


def multiples_near(value: int, unit: int) -> str:
    """The multiples of `unit` below and above a value: '96 or 112'."""
    below = value // unit * unit
    return " or ".join(str(n) for n in (below, below + unit) if n > 0)


def divisors_near(value: int, divisor: int) -> str:
    """The divisors of `value` below and above one that does not divide it: '4 or 6'."""
    divisors = [n for n in range(1, value + 1) if value % n == 0]
    below = [n for n in divisors if n < divisor][-1:]
    above = [n for n in divisors if n > divisor][:1]
    return " or ".join(map(str, below + above))

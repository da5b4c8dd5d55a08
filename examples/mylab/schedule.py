"""A learning rate that falls in equal steps."""


def staircase(progress, stairs=4):
    """Return the factor of the learning rate, from 1 to 1 / ``stairs``. ``progress`` goes from 0 to 1."""
    return 1 - min(int(progress * stairs), stairs - 1) / stairs

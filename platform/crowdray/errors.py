"""The kinds of mistakes that are the user's: jobs print their message and exit with status 2, without a
traceback."""


class UserError(ValueError):
    """Something the user gave is wrong; the message shows the value, its place and the mend."""


class InfeasibleConfigError(UserError):
    """Settings that cannot be trained as they are; of a search they cost the trial that drew them."""


class DataError(UserError):
    """Data that cannot be used as it is: a broken file, a wrong hash, an annotation that does not fit its
    image."""

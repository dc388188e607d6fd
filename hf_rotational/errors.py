"""The one exception that means: a value you gave cannot be used."""


class UserError(ValueError):
    """A value the user gave cannot be used; the message names it, and says what would work.

    The command line prints the message without a traceback and exits with status 2. In Python it is a ``ValueError``.
    """

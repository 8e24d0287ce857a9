"""The one exception that a user's mistake raises."""


class UserError(ValueError):
    """A mistake in what the user gave. The message names the field, its value and the fix.

    Command lines print it as one sentence and exit with code 2; no traceback.
    """

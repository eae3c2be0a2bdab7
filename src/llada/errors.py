"""The one exception that means "the user can fix this"; every command turns it into one line and exit status 2."""


class UserError(ValueError):
    """A user's mistake. The message is one line: what was given, what is allowed, which flag to change."""

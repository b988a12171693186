"""The one exception whose text is meant for the person at the keyboard."""


class CommandError(Exception):
    """Something the user can mend. The text names what was got and what is needed."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's text that says something."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)

"""Why an edit was not made, each reason by a type of its own."""


class EditError(RuntimeError):
    """The fact could not be forgotten, not even partly, within the bounds; no weight was changed."""


class AlreadyForgottenError(ValueError):
    """An edit in effect has forgotten the fact already."""


class UnknownFactError(ValueError):
    """The model does not recall the fact: it never knew it, or has forgotten it in another way."""

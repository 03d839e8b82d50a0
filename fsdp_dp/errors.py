"""The errors that mean "private training cannot go on like this". Each message says what to do."""


class PrivacyError(RuntimeError):
    """A privacy rule would be broken; nothing was released."""


class UnsupportedModelError(ValueError):
    """The model, or how it is used, cannot be made private exactly."""


class BudgetExceededError(PrivacyError):
    """Another release would exceed the budget that was fixed at the start."""


class NoEpsilonWarning(UserWarning):
    """Training goes on, but no epsilon holds for what was released."""

"""Passwords and tokens: what they look like, and text without them. No message, log, file or parameter of a run holds
one.

Settings are recorded (config.yaml, MLflow's parameters, the command in environment.json, the jobs of a sweep), so a
secret in one of them is refused (caco/config/validation.py). Those that the environment holds reach libraries by
themselves; what these then say is shown through `redacted`. Imports nothing of caco.
"""

import os
import re
from collections.abc import Mapping
from urllib.parse import unquote

HIDDEN = "***"
OF_SECRETS = (
    "holds a password or a token, and settings are written into files. Put it into the environment:"
    " MLFLOW_TRACKING_URI=ADDRESS, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
)
_WORDS = r"password|passwd|pwd|secret|token|api_?key|access_?key|account_?key|private_?key|authorization|credentials?"
# postgresql://user:PASSWORD@host; with an @ in the password too, up to the last one before the path; with what
# SQLAlchemy takes in one besides: /, blanks, quotes within. A port is no password. As a folder's name an address has
# one slash for two.
_IN_ADDRESS = re.compile(
    r"(?P<before>[a-zA-Z][\w+.-]*:/{1,2}(?!/)[^\s/:@'\"]*:)(?!\d{1,5}(?:[/?#\s'\",;)\]}]|$))"
    r"(?P<secret>[^\s/'\"]+|[^\s@'\"](?:[^\n@'\"]|(?<=[\w\\'\"])['\"](?=[\w\\'\"]))*)(?=@)"
)
# ?password=..., MLFLOW_TRACKING_TOKEN=..., "api_key: ..."
_ASSIGNED = re.compile(
    rf"(?P<before>\b\w*(?:{_WORDS})[\"']?\s*[=:]\s*[\"']?(?:(?:bearer|basic)\s+)?)(?P<secret>[^\s&;,'\"}}]+)",
    re.IGNORECASE,
)
_NAME = re.compile(rf"(?:(?:^|[_.\-])(?:{_WORDS})|password)$", re.IGNORECASE)  # PGPASSWORD is libpq's
_SHORTEST = 6  # of a value that is looked for as it is: shorter ones are words that occur by themselves


def redacted(text: str) -> str:
    """The text with *** for each password and token in it: in addresses, in assignments, and those that the environment
    holds.
    """
    for value in _of_the_environment(os.environ):
        text = text.replace(value, HIDDEN)
    for pattern in (_IN_ADDRESS, _ASSIGNED):
        text = pattern.sub(lambda found: found["before"] + HIDDEN, text)
    return text


def shortened(value: object, length: int) -> str:
    """As `repr` shows it, no longer than so: hidden before it is cut, for half of an address is not known for one."""
    return redacted(repr(value))[:length]


def holds_secret(text: str) -> bool:
    """Whether a setting's text has one in it; what `redacted` has written has none."""
    return any(found["secret"] != HIDDEN for pattern in (_IN_ADDRESS, _ASSIGNED) for found in pattern.finditer(text))


def names_secret(key: str) -> bool:
    """Whether a setting of this name is one, as `tracking.password`."""
    return _NAME.search(key) is not None and key not in ("PWD", "OLDPWD")  # the shell's folders


def completed(address: str, known: str | None) -> str | None:
    """An address that was written down without its password, with that of `known`, if that is the same place; None
    where it is not.

    One that has none is complete as it is.
    """
    if HIDDEN not in address:
        return address
    return known if known and redacted(known) == address else None


def _of_the_environment(variables: Mapping[str, str]) -> list[str]:
    """The values of variables whose names say that they are secret, and the passwords of addresses; longest first."""
    values = [value for name, value in variables.items() if names_secret(name)]
    for value in variables.values():
        values += [
            form for found in _IN_ADDRESS.finditer(value) for form in {found["secret"], unquote(found["secret"])}
        ]
    hidden = {value for value in values if len(value) >= _SHORTEST and value != HIDDEN}
    return sorted((value for value in hidden if not _is_file(value)), key=len, reverse=True)


def _is_file(value: str) -> bool:
    """Whether it says where a secret lies, and is none itself (GOOGLE_APPLICATION_CREDENTIALS)."""
    try:
        return value.startswith("/") and os.path.exists(value)
    except ValueError:
        return False

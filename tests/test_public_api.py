"""The public names and their signatures are those of ``public_api.txt``: a change is made on purpose, and reviewed.

``python tests/test_public_api.py`` writes the file anew.
"""

import importlib
import inspect
from pathlib import Path

FILE = Path(__file__).parent / "public_api.txt"
PACKAGES = ("guides", "inference", "zoo")
SIMPLE = (bool, int, float, str, type(None))


def signature(thing):
    """Parameters with their kinds and defaults, without annotations, which Python's versions show differently."""
    try:
        parameters = list(inspect.signature(thing).parameters.values())
    except ValueError:  # a class of C, or an exception
        return "(...)"
    return str(inspect.Signature([p.replace(annotation=p.empty, default=default(p)) for p in parameters]))


class Shown:
    """A default that is shown by its kind alone, since its text may differ from run to run."""

    def __init__(self, value):
        self.value = value

    def __repr__(self):
        return f"<{getattr(self.value, '__name__', '...')}>"


def default(parameter):
    value = parameter.default
    plain = isinstance(value, SIMPLE) or (type(value) is tuple and all(isinstance(part, SIMPLE) for part in value))
    return value if value is parameter.empty or plain else Shown(value)


def members(kind):
    """Public methods and properties that a class of ours defines itself, constructors aside."""
    own = {name: value for name, value in vars(kind).items() if not name.startswith("_")}
    for name, value in sorted(own.items()):
        if isinstance(value, property):
            yield name
        elif inspect.isfunction(inspect.unwrap(getattr(value, "__func__", value))):
            yield name + signature(getattr(value, "__func__", value))


def public_api():
    lines = []
    for package in PACKAGES:
        for name in sorted(importlib.import_module(package).__all__):
            thing = getattr(importlib.import_module(package), name)
            lines.append(f"{package}.{name}{signature(thing)}")
            if inspect.isclass(thing):
                lines += [f"    .{member}" for member in members(thing)]
    return lines


def test_the_public_api_is_the_one_on_file():
    expected, found = FILE.read_text().splitlines(), public_api()
    gone, new = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    assert not gone, f"gone or changed: {gone}; if on purpose, run python {Path(__file__).name} and say so in CHANGELOG"
    assert not new, f"new: {new}; run python {Path(__file__).name}"
    assert found == expected


def test_the_check_sees_a_changed_default():
    def one(x, *, seed=None):
        """The signature on file."""

    def other(x, *, seed=0):
        """One that differs in a default."""

    assert signature(one) == "(x, *, seed=None)"
    assert signature(one) != signature(other)


if __name__ == "__main__":
    FILE.write_text("\n".join(public_api()) + "\n")

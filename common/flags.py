"""Makes one frozen dataclass of settings the source of defaults, command-line flags, --help,
config.json and a log's header, for toy/ and full/."""

import argparse
import dataclasses
import typing

NUMBERS = (0, 10**9)  # what a number may be unless its option says otherwise


def option(default, help, choices=(), limits=NUMBERS):
    """A dataclass field with a default, the text that --help shows, and the values that are
    allowed: one of the choices (none: any), numbers within the limits, both included, and so each
    number of a tuple."""
    return dataclasses.field(
        default=default, metadata={"help": help, "choices": choices, "limits": limits}
    )


def flag(name):
    """teacher_lr → teacher-lr."""
    return name.rstrip("_").replace("_", "-")  # lambda_ is --lambda


def check_choices(settings):
    """ValueError if a field has a value outside its choices."""
    for f in dataclasses.fields(settings):
        choices, value = f.metadata["choices"], getattr(settings, f.name)
        for x in value if isinstance(value, tuple) else (value,):
            if choices and x not in choices:
                known = ", ".join(map(str, choices))
                raise ValueError(f"--{flag(f.name)} {show(x)}: unknown; choose one of {known}")


def check_limits(settings):
    """ValueError if a field has a number outside its limits; a NaN is outside of any."""
    for f in dataclasses.fields(settings):
        value, (low, high) = getattr(settings, f.name), f.metadata["limits"]
        for x in value if isinstance(value, tuple) else (value,):
            if isinstance(x, (int, float)) and not low <= x <= high:
                raise ValueError(
                    f"--{flag(f.name)} {show(value)}: must be from {low:g} to {high:g}"
                )


def check_rising(settings, *names):
    """ValueError if one of these fields, tuples of numbers, is empty or does not rise strictly."""
    for name in names:
        values = getattr(settings, name)
        if not values:
            raise ValueError(f"--{flag(name)}: empty; give at least one number")
        if list(values) != sorted(set(values)):
            raise ValueError(f"--{flag(name)} {show(values)}: must rise strictly")


def _parser_for(annotation):
    """Text → value of a field's type; tuples are comma-separated, booleans are true or false."""
    if annotation is bool:
        return lambda text: {"true": True, "false": False}[text.lower()]
    if typing.get_origin(annotation) is tuple:
        item = typing.get_args(annotation)[0]
        return lambda text: tuple(item(part) for part in text.split(",") if part)
    return annotation


def show(value):
    """A value as one types it after its flag."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def add_flags(parser, settings_class, default="default"):
    """One flag for each setting, absent unless given: what is not given comes from the defaults or
    a preset."""
    hints = typing.get_type_hints(settings_class)
    for f in dataclasses.fields(settings_class):
        convert = _parser_for(hints[f.name])

        def parse(text, convert=convert):
            try:
                return convert(text)
            except (ValueError, KeyError):
                raise argparse.ArgumentTypeError(f"{text!r} is not valid here") from None

        value = "none" if f.default in ((), "") else show(f.default)
        parser.add_argument(
            f"--{flag(f.name)}",
            dest=f.name,
            type=parse,
            default=argparse.SUPPRESS,
            metavar="X",
            help=f"{f.metadata['help']} ({default}: {value})".replace("%", "%%"),
        )


def add_page_flags(parser, port=7860):
    """--host and --port of a local page."""
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1, reachable from this machine alone)",
    )
    parser.add_argument("--port", type=int, default=port, help=f"its port (default: {port})")


def from_dict(settings_class, values):
    """Settings from config.json's dictionary: lists become tuples. ValueError for a name that is no
    setting, or a value of another type than its setting's."""
    known = {f.name for f in dataclasses.fields(settings_class)}
    if unknown := sorted(set(values) - known):
        raise ValueError(
            f"unknown setting {', '.join(unknown)}; was this folder written by another version?"
        )
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    for name, hint in typing.get_type_hints(settings_class).items():
        kind = typing.get_origin(hint) or hint
        if name in values and not isinstance(values[name], (int, float) if kind is float else kind):
            raise ValueError(f"{name} is {values[name]!r}, not of type {kind.__name__}")
    return settings_class(**values)

"""The one error of the converters that a person can act on."""


class Refused(Exception):
    """What was given cannot become a bundle, or is none. The message names the file and the field."""

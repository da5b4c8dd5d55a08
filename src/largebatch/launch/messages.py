"""Readable messages for errors of Hydra and OmegaConf on the command line."""

from __future__ import annotations

import re

from hydra.errors import OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from largebatch.config.schema import explain
from largebatch.errors import choices


def composition_error(error: Exception) -> str:
    """Return a message with the key, its value and the allowed values if ``error`` has them, else its own text."""
    if isinstance(error, OmegaConfBaseException):
        return explain(error)
    text = str(error).replace("++", "")  # added by composition.by_force
    if isinstance(error, OverrideParseException):
        reason = " ".join(line for line in text.splitlines() if not line.startswith("See "))
        return f"{error.override}: {reason}. Fix: quote values with commas, brackets or spaces for the shell"
    if match := re.search(
        r"Could not find '([^'/]+)/([^']+)'\n\nAvailable options in '[^']+':\n((?:\t[^\n]+\n?)+)", text
    ):
        options = match[3].split()
        return f"{match[1]}={match[2]}: {choices(match[2], options)}"
    if match := re.search(r"Error merging override ([^\n]+)", text):
        return f"{match[1]}: {str(error.__cause__).splitlines()[0]}"
    return " ".join(line.strip() for line in text.splitlines() if line.strip())

"""The errors a user can meet. Each message is one sentence that names the thing at fault."""


def printable(text: str) -> str:
    """``text`` in one line: control characters, which names of files and tensors may hold, as their escapes."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with the second where that is only announced, or the error's name."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join(line.strip() for line in lines[: 2 if lines[0].rstrip().endswith(":") else 1])


def one_line(error: BaseException) -> str:
    """An error's whole message in one line, or the error's name."""
    return " ".join(str(error).split()) or type(error).__name__


class SurgeonError(Exception):
    """Base class of every error raised on purpose by ``llm_surgeon``."""

    def __str__(self) -> str:
        return printable(super().__str__())


class InputError(SurgeonError, ValueError):
    """The request cannot be met as it stands: an option, a file, a model or data at fault (exit code 2)."""


class UnsupportedModelError(InputError):
    """The model holds a layer that cannot be pruned here; the message names it."""


class NumericalError(SurgeonError, ArithmeticError):
    """NaN or infinity met in weights, activations or gradients; the message names the layer and batch (exit code 1)."""


class BadBatchError(NumericalError):
    """NaN or infinity met in a pass over a batch.

    Attributes:
        windows: numbers of the batch's sequences among those of the pass.
    """

    def __init__(self, place: str, batch: int, batches: int, windows: range) -> None:
        """``batch`` counts from 1."""
        super().__init__(f"NaN or infinity in {place} (batch {batch} of {batches})")
        self.windows = windows


class RankError(SurgeonError):
    """Another process of a run of several has ended (exit code 1)."""

"""Records by name, to which others add: by a call, or by an entry point of an installed distribution."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any, Generic, Protocol, TypeVar

from llm_surgeon.checks import require_choice
from llm_surgeon.errors import InputError, one_line


class Named(Protocol):
    """A record, which has a name."""

    @property
    def name(self) -> str: ...


R = TypeVar("R", bound=Named)


class Registry(Generic[R]):
    """Records of one class.

    Each entry point of the group ``llm_surgeon.methods`` (of ``what`` "method", say) is a record, and has its name. It
    is imported when it is first asked for.

    Attributes:
        records: by name, those of entry points once they are imported.
    """

    def __init__(self, what: str, cls: type[R], records: Iterable[R]) -> None:
        self._what, self._cls, self._group = what, cls, f"llm_surgeon.{what}s"
        self.records = {record.name: record for record in records}

    def register(self, record: R) -> None:
        """Add a record; an :class:`InputError` if another one has its name."""
        if self.records.setdefault(record.name, record) != record:
            raise InputError(f"a {self._what} {record.name!r} is registered already")

    def names(self) -> list[str]:
        """Names of all records, those of entry points included, which are not imported for it."""
        return list(dict.fromkeys([*self.records, *_entry_points(self._group, tuple(sys.path)).names]))

    def find(self, name: object) -> R:
        """The record of that name.

        Raises:
            InputError: there is none, or its entry point cannot be imported or is no record of that name.
        """
        if isinstance(name, str) and name in self.records:
            return self.records[name]
        require_choice(self._what, name, self.names())
        for point in _entry_points(self._group, tuple(sys.path)).select(name=name):
            try:
                record = point.load()
            except Exception as error:  # whatever a module may raise when it is imported
                raise InputError(
                    f"{self._what} {name!r} cannot be imported from {point.value}: {one_line(error)}"
                ) from error
            if not isinstance(record, self._cls) or record.name != name:
                raise InputError(
                    f"the entry point {name!r} of {self._group} is no {self._cls.__name__} of that name: {point.value}"
                )
            self.register(record)
        return self.records[str(name)]

    def where(self, is_so: Callable[[R], bool]) -> list[str]:
        """Names of the records for which ``is_so``, for messages."""
        return [record.name for record in self.records.values() if is_so(record)]


@functools.cache
def _entry_points(group: str, path: tuple[str, ...]) -> Any:
    """Entry points of all distributions on ``path``, which is ``sys.path``."""
    import importlib.metadata  # takes longer than this module, and is needed for names that are not built in

    return importlib.metadata.entry_points(group=group)

"""The list of an archive: its patients, their slices, and what the columns say of them."""

from typing import Any

import numpy as np

from decomp_jax.errors import UserError

MOST_PATIENTS = 100  # listed at a time
MOST_CHOICES = 20  # a column with more values is shown and not filtered by
OWN_COLUMNS = ("patient_id", "slice_index", "position_mm")


class Archive:
    """Rows of a bank by patient.

    Attributes:
        columns: names of the further columns.
        choices: {column: its values}, of those with few.
    """

    def __init__(self, rows: np.ndarray, heights: np.ndarray) -> None:
        self._rows = rows
        names, self._first, self._patient = np.unique(rows["patient_id"], return_index=True, return_inverse=True)
        self._names = names
        self._order = np.lexsort((heights, self._patient))
        self._starts = np.searchsorted(self._patient[self._order], np.arange(len(names) + 1))
        self.columns = [name for name in rows.dtype.names if name not in OWN_COLUMNS]
        self.choices = {}
        for name in self.columns:
            values = np.unique(rows[name])
            if 1 < len(values) <= MOST_CHOICES:
                self.choices[name] = [str(value) for value in values]

    def __len__(self) -> int:
        return len(self._names)

    def find(self, request: dict[str, Any]) -> dict[str, Any]:
        """Patients whose id contains `text`, with a slice that has every value of `where`; from the `start`-th on.

        Raises:
            UserError: the request asks for no such thing.
        """
        text, where, start = request.get("text", ""), request.get("where", {}), request.get("start", 0)
        if not isinstance(text, str) or not isinstance(where, dict) or type(start) is not int or start < 0:
            raise UserError("filter: needs a text, columns with values and a start; set it again")
        fits = np.ones(len(self._rows), bool)
        for column, value in where.items():
            if column not in self.choices or value not in self.choices[column]:
                raise UserError("filter: names a column or value that the archive lacks; set it again")
            fits &= self._rows[column].astype(str) == value
        wanted = np.char.find(np.char.lower(self._names), text.lower()) >= 0
        counts = np.bincount(self._patient[fits], minlength=len(self._names))
        found = np.flatnonzero(wanted & (counts > 0))
        some = found[start:start + MOST_PATIENTS]
        sizes = np.diff(self._starts)
        return {"count": len(found), "patients": [
            {"id": str(self._names[i]), "row": int(self._first[i]), "slices": int(sizes[i]), "fit": int(counts[i])}
            for i in some
        ]}

    def slices_of(self, row: int) -> np.ndarray:
        """Rows of the patient of `row`, from the feet up."""
        patient = self._patient[row]
        return self._order[self._starts[patient]:self._starts[patient + 1]]

    def describe(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """Columns of rows, as JSON has them; numbers that are none are left out."""
        names = self._rows.dtype.names
        return [{name: value if isinstance(value, bool | int | float | str) else str(value)
                 for name, value in zip(names, row.item()) if not isinstance(value, float) or np.isfinite(value)}
                for row in self._rows[rows]]

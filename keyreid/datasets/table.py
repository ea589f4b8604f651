"""Tables as people have them, CSV or Parquet: texts, and nothing is taken for anything else."""

import warnings
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from keyreid.errors import DataError


def read_table(path: Path, headed: bool = True) -> pd.DataFrame:
    """A table of texts, `""` where there is no value; its index counts the rows of the file, blank ones too, from 0.

    Raises:
        DataError: the file cannot be read or is no such table.
    """
    try:
        if path.suffix.lower() == ".parquet":
            table = _texts(pq.ParquetFile(path).read())
        else:
            head = 0 if headed else None
            texts = {"dtype": str, "na_filter": False, "skip_blank_lines": False, "skipinitialspace": True}
            with warnings.catch_warnings(action="error"):  # rows that are longer than the head would be cut
                table = pd.read_csv(path, header=head, index_col=False, encoding="utf-8-sig", **texts).fillna("")
    except Exception as error:  # pandas and pyarrow raise many kinds
        raise DataError(f"{path}: not a CSV or Parquet table: {' '.join(str(error).split())}") from None
    return table[(table != "").any(axis=1)]


def _texts(table: pa.Table) -> pd.DataFrame:
    names = [name for name in table.column_names if not name.startswith("__index_level_")]  # pandas' own
    if len(set(names)) < len(names):
        raise ValueError("two columns have the same name")
    columns = {}
    for name in names:
        column = table[name]
        if pa.types.is_floating(column.type):  # NaN is pandas' word for no value
            column = pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
        columns[name] = column.cast(pa.string()).to_pandas().fillna("")
    return pd.DataFrame(columns)

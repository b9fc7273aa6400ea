"""Reads raw files of public data sets, with errors that name the file and the column."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import polars as pl

from recsys.errors import SourceError, nearest

ColumnKind = Literal["int", "number", "text", "int_list"]


def read_table(path: Path, columns: Mapping[str, ColumnKind]) -> pl.DataFrame:
    """Reads columns of a Parquet or CSV file; others in the file are left out.

    Whole numbers that a CSV writes as ``1.0`` become integers; an empty field is null.

    Raises:
        SourceError: the file is missing or unreadable, lacks a column, or holds something else in one.
    """
    require_file(path)
    try:
        if path.suffix == ".parquet":
            table = pl.read_parquet(path, columns=_present(pl.read_parquet_schema(path), columns, path), glob=False)
        else:
            text = {name: pl.String for name, kind in columns.items() if kind == "text"}
            header = pl.read_csv(path, n_rows=0).schema
            chosen = _present(header, columns, path)
            table = pl.read_csv(path, columns=chosen, infer_schema_length=None, schema_overrides=text)
    except pl.exceptions.PolarsError as err:
        raise SourceError(
            f"{path} cannot be read as {'Parquet' if path.suffix == '.parquet' else 'CSV'}",
            hint="the file may be cut short: fetch it again",
        ) from err
    return table.select(_as_kind(table[name], kind, path) for name, kind in columns.items())


def require_file(path: Path) -> None:
    """Checks that a raw file is there.

    Raises:
        SourceError: it is not; the hint lists what the folder holds.
    """
    if path.is_file():
        return
    if not path.parent.is_dir():
        raise SourceError(
            f"raw folder {path.parent} does not exist", hint="give the folder that holds the unpacked raw files"
        )
    raise SourceError(f"{path} does not exist", hint=nearest(path.name, (p.name for p in path.parent.iterdir())))


def require_folder(folder: Path) -> None:
    """Checks that the raw folder is there.

    Raises:
        SourceError: it is not.
    """
    if not folder.is_dir():
        raise SourceError(
            f"raw folder {folder} does not exist", hint="give the folder that holds the unpacked raw files"
        )


def _present(schema: Mapping[str, object], columns: Mapping[str, ColumnKind], path: Path) -> list[str]:
    missing = [name for name in columns if name not in schema]
    if missing:
        raise SourceError(
            f"{path} must have the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}",
            hint=f"{missing[0]}: {nearest(missing[0], schema)}",
        )
    return list(columns)


def _as_kind(column: pl.Series, kind: ColumnKind, path: Path) -> pl.Series:
    dtype = column.dtype
    if kind == "text":
        return column.cast(pl.String)
    if column.null_count() == len(column):
        return column.cast(
            pl.List(pl.Int64) if kind == "int_list" else pl.Int64 if kind == "int" else pl.Float64, strict=False
        )
    if kind == "int_list":
        if isinstance(dtype, pl.List) and dtype.inner.is_integer():
            return column.cast(pl.List(pl.Int64))
    elif kind == "number":
        if dtype.is_numeric():
            return column.cast(pl.Float64)
    elif dtype.is_integer() or dtype == pl.Boolean:
        return column.cast(pl.Int64)
    elif dtype.is_float():
        whole = column.drop_nulls()
        if bool((whole.is_finite() & (whole == whole.round()) & (whole.abs() < 2.0**53)).all()):
            return column.cast(pl.Int64)
    wanted = {"int": "whole numbers", "number": "numbers", "int_list": "lists of whole numbers"}[kind]
    raise SourceError(f"{path}: column {column.name} must hold {wanted}, got {dtype}")
